"""
The data pipeline and the benchmarks from end to end, against an endpoint that draws, on a network that misbehaves:
pools -> curate.py, killed again and again -> shards -> data.py --check -> sft.py -> evaluate.py --bench with a judge.
"""

import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

import curate
import data
import evaluate
import iccot
import sft
from data import Source
from runtime import loop
from runtime.config import UserError, parse
from studies import benchmarks, judge
from studies.endpoint import Endpoint, Question, Refused, Unusable
from toy import server, tasks, world
from toy.clip import train_toy_clip
from toy.judge import Verdict
from toy.judge import judge as exact_judge
from toy.server import draw_pools
from toy.tasks import draw_sample
from toy.tokenizer import train_tokenizer
from vision import to_png

ROOT = Path(__file__).resolve().parents[1]


class Server:
    """`with Server(fault) as server`: the toy endpoint in a thread; server.url."""

    def __init__(self, fault=None):
        self.server = server.make_server(0, fault)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def misbehave(handler, number):
    """Every kind of trouble, by the number of the request."""
    kinds = {3: "429", 5: "500", 14: "timeout", 17: "429", 26: "503"}
    kinds |= dict.fromkeys((8, 40, 80), "refusal") | dict.fromkeys((11, 21, 83), "broken")
    # the last refusal and the last broken reply reach a client that lives to record them
    kind = kinds.get(number)
    if handler.path.endswith("edits") and not handler.server.requests % 9:
        kind = "truncated picture"
    if kind == "429":
        handler.reply({"error": {"message": "slow down"}}, 429, Retry_After="1")
    elif kind in ("500", "503"):
        handler.reply({"error": {"message": "oops"}}, int(kind))
    elif kind == "refusal":
        handler.reply(
            {"error": {"message": "content policy", "code": "content_policy_violation"}}, 400
        )
    elif kind == "broken":
        handler.reply(b'{"choices": [{"message": ')
    elif kind == "timeout":
        # the client waits for 6; less, and a busy machine is late with other answers too
        time.sleep(7)
        handler.close_connection = True
    elif kind == "truncated picture":
        import base64

        picture = base64.b64encode(to_png(Image.new("RGB", (32, 32), "red"))[:50]).decode()
        handler.reply({"data": [{"b64_json": picture}]})
    return kind is not None


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """What curate.py makes of toy pools over a bad network when it is killed at random moments."""
    folder = tmp_path_factory.mktemp("curated")
    draw_pools(folder / "pools", 12)
    train_toy_clip(folder / "clip", steps=1)
    rng, kills = random.Random(0), 0
    with Server(misbehave) as server:
        command = [
            sys.executable,
            str(ROOT / "curate.py"),
            "--config",
            "toy",
            "--pools",
            "pools",
            "--out",
            "out",
            "--count",
            "24",
            "--chat_url",
            server.url,
            "--clip",
            "clip",
            "--timeout",
            "6",
            "--workers",
            "4",
            "--shard_size",
            "10",
        ]
        environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRITON_INTERPRET="")
        for goes in range(12):
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if goes < 3:
                before = server.server.requests
                while process.poll() is None and server.server.requests < before + rng.randint(
                    8, 25
                ):
                    time.sleep(0.01)
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
            out, _ = process.communicate(timeout=240)
            if process.returncode == 0:
                break
        assert process.returncode == 0, out
        requests = server.server.requests
        subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, timeout=240
        )
        assert server.server.requests == requests  # a finished run asks nothing
        twice = sum(count - 1 for count in server.server.answered.values())
    return folder, out, kills, twice


def test_nothing_is_lost_and_nothing_asked_twice(curated):
    folder, out, kills, twice = curated
    assert kills == 3
    lines = {
        name: [
            json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("references", "instructions", "plans", "targets", "scores")
    }
    for before, after in zip(lines, list(lines)[1:]):
        usable = {record["key"] for record in lines[before] if "dropped" not in record}
        assert sorted(record["key"] for record in lines[after]) == sorted(usable)
    unusable = sum(
        "unusable" in json.loads(path.read_text())
        for path in (folder / "out/replies").glob("*.json")
    )
    assert unusable >= 1 and twice <= unusable + 4 * kills  # what was in flight when it was killed
    refused = [
        record for name in lines for record in lines[name] if "refused" in record.get("dropped", "")
    ]
    assert len(refused) >= 1  # recorded, and not asked again
    assert not list((folder / "out").glob("**/*.partial"))


def test_the_shards_are_right_and_judged_ten(curated, capsys):
    folder, out, *_ = curated
    data.main(["--check", str(folder / "out/shards")])
    assert ", 0 problems" in capsys.readouterr().out
    source = Source(folder / "out/shards")
    assert len(source) >= 15
    for i in range(len(source)):
        record, sample = source.record(i), source.sample(i)
        assert (
            record["scores"]["PF"] == record["scores"]["SC"] == 10
            and record["provenance"]["image_model"] == "toy"
        )
        assert sample.target.size == (32, 32) and len(sample.plan.relations) == len(
            sample.references
        )
    report = (folder / "out/report.md").read_text()
    assert "caption and target disagree" in report and f"| all | 24 | {len(source)} " in report
    assert (folder / "out/examples.png").is_file()


def test_cuts_can_be_changed_without_asking(curated):
    folder, *_ = curated
    config = curate.Config(
        **{**curate.PRESETS["toy"], "out": str(folder / "out"), "pools": str(folder / "pools")}
    )
    scored = {
        key: record
        for key, record in curate.read_lines(folder / "out/scores.jsonl").items()
        if "dropped" not in record
    }
    kept = lambda **cuts: sum(
        not reason
        for reason in curate.why_dropped(scored, dataclasses.replace(config, **cuts)).values()
    )
    assert kept(drop_clip=0) == len(scored) > kept(drop_clip=50) > kept(least_clip=2.0) == 0
    scored[next(iter(scored))]["scores"]["PF"] = None
    assert kept(drop_clip=0) == len(scored) - 1


def test_sft_trains_on_it(curated, tmp_path):
    folder, *_ = curated
    config = sft.Config(
        config="smoke",
        **sft.PRESETS["smoke"]
        | dict(data=str(folder / "out/shards"), out=str(tmp_path / "run"), threads=1),
    )
    sft.train(config)
    lines = loop.read_log(tmp_path / "run")
    assert len(lines) == 20 and lines[-1]["ce"] < lines[0]["ce"]


def test_the_target_is_never_in_a_question_about_the_plan(curated):
    """Not its pixels, not its name: the only pictures are the references, and the stage runs before there is a target."""
    folder, *_ = curated
    config = curate.Config(
        **{**curate.PRESETS["toy"], "out": str(folder / "out"), "pools": str(folder / "pools")}
    )
    for record in curate.read_lines(folder / "out/targets.jsonl").values():
        if "dropped" in record:
            continue
        question = curate.plan_question(record, config)  # even from a record that knows its target
        target = (folder / "out" / record["target"]).read_bytes()
        assert len(question.images) == len(record["references"]) and target not in question.images
        assert record["target"] not in question.prompt
        blind = {
            key: value
            for key, value in record.items()
            if key in ("key", "task", "references", "instruction")
        }
        assert curate.plan_question(blind, config) == question


# ---------------------------------------------------------------------------------------------------------------------
# the endpoint


def ask(fault=None, tmp_path=None, **options):
    """A question about one portrait to a server with this fault. Returns a function that asks, and the server."""
    server = Server(fault).__enter__()
    image = to_png(
        Image.fromarray(world.portrait(data.np.random.default_rng(0), world.subjects()[5]))
    )
    question = Question("Task type: subject. Write.", (image,))
    return (
        Endpoint(
            server.url, "toy", tmp_path / "replies", **{"timeout": 1.0, "tries": 3, **options}
        ),
        question,
        server,
    )


@pytest.mark.parametrize(
    "status, words", [(401, "OPENAI_API_KEY"), (404, "name of a model"), (500, "nothing was lost")]
)
def test_an_endpoint_at_fault_is_one_clear_line(tmp_path, status, words, monkeypatch):
    monkeypatch.setattr("urllib3.util.Retry.sleep", lambda *_, **__: None)
    endpoint, question, server = ask(
        lambda handler, number: handler.reply({"error": {"message": "no"}}, status) or True,
        tmp_path,
    )
    with pytest.raises(UserError, match=words) as error:
        endpoint.text(question)
    assert str(status) in str(error.value) and not list((tmp_path / "replies").iterdir())
    server.__exit__()
    with pytest.raises(UserError, match="cannot be reached"):
        Endpoint(server.url, "toy", tmp_path / "replies", tries=1).text(question)


def test_retry_after_is_honoured(tmp_path):
    fault = lambda handler, number: (
        number == 1 and (handler.reply({"error": {}}, 429, Retry_After="1") or True)
    )
    endpoint, question, server = ask(fault, tmp_path)
    begun = time.monotonic()
    assert (
        endpoint.text(question) and time.monotonic() - begun >= 1.0 and server.server.requests == 2
    )
    assert endpoint.text(question) and server.server.requests == 2  # kept
    server.__exit__()


def test_refusals_and_broken_answers_are_kept(tmp_path):
    fault = lambda handler, number: (
        handler.reply({"error": {"message": "against our content policy"}}, 400) or True
    )
    endpoint, question, server = ask(fault, tmp_path)
    for _ in range(2):
        with pytest.raises(Refused):
            endpoint.text(question)
    assert server.server.requests == 1
    server.__exit__()
    endpoint, question, server = ask(
        lambda handler, number: handler.reply(b"<html>") or True, tmp_path / "b"
    )
    for _ in range(2):
        with pytest.raises(Unusable):
            endpoint.text(question)
    assert server.server.requests == 1
    server.__exit__()


def test_the_key_comes_from_the_environment_and_stays_there(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("MY_KEY", "secret-123")
    fault = lambda handler, number: seen.append(handler.headers["Authorization"])
    endpoint, question, server = ask(fault, tmp_path, key_variable="MY_KEY")
    endpoint.text(question)
    server.__exit__()
    assert seen == ["Bearer secret-123"]
    assert not any(
        b"secret-123" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )


def test_the_pace_is_kept(tmp_path):
    endpoint, question, server = ask(None, tmp_path, per_minute=240)
    begun = time.monotonic()
    for nonce in range(4):
        endpoint.text(dataclasses.replace(question, nonce=nonce))
    assert time.monotonic() - begun >= 0.7
    server.__exit__()


# ---------------------------------------------------------------------------------------------------------------------
# mistakes, and the dry run


@pytest.mark.parametrize(
    "words, message",
    [
        (["--pools", "nowhere"], "pool nowhere/characters is missing"),
        (["--pools", "empty"], "holds no .png"),
        (["--stage", "plan"], "expected all or one of"),
        (
            ["--chat_url", "http://127.0.0.1:9/v1", "--pools", "pools", "--tries", "1"],
            "cannot be reached",
        ),
        (["--pools", "broken", "--tries", "1"], "cannot be read as a picture"),
        (["--pools", "tiny", "--count", "500"], "too few pictures"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("pools", "empty", "broken", "tiny"):
        draw_pools(name, 2)
    for path in Path("empty/objects").iterdir():
        path.unlink()
    for path in Path("broken").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        curate.main(
            parse(
                curate.Config,
                curate.PRESETS,
                ["--config", "full", *([] if "--count" in words else ["--count", "4"]), *words],
            )
        )
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_a_dry_run_counts_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_pools("pools", 6)
    curate.main(
        parse(
            curate.Config,
            curate.PRESETS,
            ["--config", "full", "--pools", "pools", "--count", "10", "--dry_run"],
        )
    )
    out = capsys.readouterr().out
    assert "10 samples" in out and "40 requests" in out and "nothing was asked" in out
    assert not list(Path("out/curated").glob("*.jsonl"))


def test_a_line_torn_by_a_crash_is_forgotten(tmp_path):
    path = tmp_path / "x.jsonl"
    curate.append(path, {"key": "a"})
    with open(path, "a") as file:
        file.write('{"key": "b"')
    assert curate.read_lines(path) == {"a": {"key": "a"}}
    curate.append(path, {"key": "c"})
    assert list(curate.read_lines(path)) == ["a", "c"]


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    from model import SMOKE, ModelConfig, UnifiedModel
    from runtime.pretrained import save_model

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(folder / "tokenizer", 640)
    save_model(UnifiedModel(ModelConfig(**SMOKE)).initialise(0), tokenizer, folder / "model")
    return folder


def write_parquet(folder, count=16):
    """OmniContext's schema, two samples a task; their captions are known."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for i in range(count):
        sample = draw_sample("held_out", i)
        images = [{"bytes": to_png(image), "path": None} for image in sample.references]
        rows.append(
            {
                "key": f"k{i}",
                "task_type": benchmarks.OMNICONTEXT_TASKS[i % 8],
                "instruction": sample.instruction,
                "instruction_language": "en",
                "input_images": images,
                "caption": sample.plan.caption,
            }
        )
    (folder / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data/train-00000.parquet")
    return folder


def bench_words(folder, model, url, *words):
    return evaluate.arguments(
        [
            "--config",
            "smoke",
            "--bench",
            "omnicontext",
            str(folder / "bench"),
            "--checkpoint",
            str(model),
            "--result_dir",
            str(folder / "results"),
            "--model_name",
            "ours",
            "--judge_url",
            url,
            "--judge_model",
            "toy",
            "--threads",
            "1",
            "--max_plan_tokens",
            "20",
            *words,
        ]
    )


def test_omnicontext_from_pictures_to_the_table(tmp_path, small_model, capsys):
    write_parquet(tmp_path / "bench")
    train_toy_clip(tmp_path / "clip", steps=1)

    def sometimes(handler, number):
        if number in (2, 9):
            handler.reply({"choices": [{"message": {"content": "I would say seven."}}]})
            return True

    with Server(sometimes) as server:
        main = lambda *words: evaluate.main(
            parse(
                evaluate.Config,
                evaluate.PRESETS,
                bench_words(tmp_path, small_model, server.url, *words),
            )
        )
        main("--generate_only", "--clip_out", "--metric", str(tmp_path / "clip"))
        assert server.server.requests == 0 and "CLIP_out" in capsys.readouterr().out
        pictures = sorted((tmp_path / "results/ours/fullset").rglob("*.png"))
        assert len(pictures) == 16 and {path.parent.name for path in pictures} == set(
            benchmarks.OMNICONTEXT_TASKS
        )
        assert all(
            Image.open(io.BytesIO(path.read_bytes())).size == (1024, 1024) for path in pictures
        )
        assert "text" in json.loads(pictures[0].with_suffix(".json").read_text())
        pictures[3].write_bytes(pictures[3].read_bytes()[:200])  # torn: painted again
        times = {path: path.stat().st_mtime_ns for path in pictures}
        main()
        out = capsys.readouterr().out
        assert (
            "1 pictures painted" in out
            and sum(path.stat().st_mtime_ns != times[path] for path in pictures) == 1
        )
        assert (
            server.server.requests == 2 * 16 + 2
            and "average" in out
            and "not comparable" in out
            and "8.21" in out
        )
        rows = [
            json.loads(line)
            for path in (tmp_path / "results/ours/toy").rglob("score.jsonl")
            for line in path.read_text().splitlines()
        ]
        assert len(rows) == 16 and {
            "key",
            "task_type",
            "instruction",
            "PF_score",
            "SC_score",
            "output_image_path",
        } <= set(rows[0])
        main()
        assert server.server.requests == 2 * 16 + 2  # judged once
    table = json.loads((tmp_path / "results/ours/omnicontext.json").read_text())
    assert table["average"]["n"] == 16 and table["average"]["null"] == 0
    assert (tmp_path / "results/ours/scene_object.png").is_file()


def test_statistics_are_the_official_ones():
    rows = [
        {"task_type": task, "instruction_language": "en", "PF_score": pf, "SC_score": sc}
        for task, pf, sc in (("a", 9, 4), ("a", 4, 4), ("a", None, 8), ("b", 10, 10))
    ] + [{"task_type": "b", "instruction_language": "zh", "PF_score": 0, "SC_score": 0}]
    table = benchmarks.statistics(rows, ("a", "b", "c"))
    assert table["a"] == {"PF": 6.5, "SC": 4.0, "Overall": 5.0, "n": 2, "null": 1}
    assert table["average"] == {"PF": 8.25, "SC": 7.0, "Overall": 7.5, "n": 3, "null": 1}


@pytest.mark.parametrize(
    "answer, score",
    [
        ('{"score": 7, "reasoning": "x"}', 7),
        ('```json\n{"score": 8.5,\n"reasoning": "y"}\n```', 8.5),
        ('{"score": [6], "reasoning": ""}', 6),
        ("seven", None),
        ('{"score": 11}', None),
        ('{"score": "high"}', None),
        ('{"score": true}', None),
        ("{", None),
    ],
)
def test_scores_are_read_or_refused_and_never_guessed(answer, score):
    if score is None:
        with pytest.raises(Unusable):
            judge.read_score(answer)
    else:
        assert judge.read_score(answer)[0] == score


def test_a_judge_that_cannot_be_read_gives_null(tmp_path, monkeypatch):
    fault = lambda handler, number: (
        handler.reply({"choices": [{"message": {"content": "no idea"}}]}) or True
    )
    endpoint, question, server = ask(fault, tmp_path)
    score, reason = judge.ask_score(endpoint, "PF", "Do it.", question.images)
    assert (
        score is None and "no readable answer" in reason and server.server.requests == judge.TRIES
    )
    server.__exit__()


def test_dreamomni2_folders(tmp_path):
    for group, category, number in (
        ("editing", "add", 1),
        ("editing", "local_expression", 3),
        ("generation", "pose", 2),
    ):
        folder = tmp_path / f"{group}_benchmark" / category / str(number)
        folder.mkdir(parents=True)
        (folder / "instruction.txt").write_text(" Do it. \n")
        for name in ("ref_0.jpg", "ref_1.jpg", "res.jpg"):
            Image.new("RGB", (20, 20), "red").save(folder / name)
    cases = benchmarks.read_dreamomni2(tmp_path)
    assert [(case.key, case.task, len(case.references)) for case in cases] == [
        ("add-1", "add", 2),
        ("local_expression-3", "local", 2),
        ("pose-2", "generation", 2),
    ]
    assert cases[0].instruction == "Do it."


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: None, "is no folder here"),
        (lambda folder: folder.mkdir(), "holds no parquet"),
        (
            lambda folder: (folder.mkdir(), (folder / "x.parquet").write_bytes(b"torn")),
            "cannot be read as parquet",
        ),
    ],
)
def test_bad_benchmarks(tmp_path, make, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make(tmp_path / "bench")
    with pytest.raises(UserError, match=words):
        benchmarks.read_omnicontext(str(tmp_path / "bench"))


def test_the_toy_server_sees_what_was_drawn():
    """Every sample it makes up is judged ten, whatever the task, and a wrong instruction is not understood."""
    rng = data.np.random.default_rng(3)
    pool = lambda kinds: [one for one in tasks.pool_of("train", world.Subject) if one.kind in kinds]
    portrait = lambda kinds: Image.fromarray(world.portrait(rng, world.pick(rng, pool(kinds))))
    scene = lambda: Image.fromarray(world.draw(tasks.picture_to_edit(rng, "train", 1)))
    made = {
        "add": [scene(), portrait(world.OBJECTS)],
        "replace": [scene(), portrait(world.CHARACTERS)],
        "attribute": [portrait(world.OBJECTS), portrait(world.OBJECTS)],
        "scene": [portrait(world.CHARACTERS), scene()],
        "subject": [portrait(world.CHARACTERS)],
        "subject_composition": [portrait(world.CHARACTERS), portrait(world.OBJECTS)],
        "scene_composition": [portrait(world.CHARACTERS), portrait(world.OBJECTS), scene()],
    }
    assert set(made) == set(iccot.TASKS)
    for task, images in made.items():
        instruction, plan, truth = server.compose(task, images)
        iccot.parse(iccot.render(plan), len(images))
        iccot.check_instruction(instruction, len(images))
        picture = Image.open(
            io.BytesIO(server.answer_image(f"Instruction: {instruction}\n", images))
        )
        assert exact_judge(picture, truth) == Verdict(10, 10, 10), task
        assert server.compose(task, images)[0] == instruction
