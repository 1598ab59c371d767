"""
Data that exists: samples of somebody else through `curate.py --from`.

MACRO's layout is rebuilt here from its authors' description (arXiv 2603.25319); its pictures and
prompts are the toy world's.
"""

import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import curate
import data
from data import Source
from runtime.config import UserError, parse
from studies.material import read_triples
from toy import server, tasks, world
from toy.clip import ToyClipSettings, train_toy_clip

JPEG = dict(quality=100, subsampling=0)


def portraits(rng, count):
    """Reference pictures of `count` subjects of different kinds."""
    pool = {one.kind: one for one in rng.permutation(tasks.pool_of("train", world.Subject))}
    return [Image.fromarray(world.portrait(rng, one)) for one in list(pool.values())[:count]]


def write_macro(root):
    """data/ of MACRO: an index of one JSON a sample, pictures elsewhere, a benchmark in eval/."""
    rng = np.random.default_rng(0)
    for number, (split, bracket, count) in enumerate(
        [
            ("train", "1-3", 1),
            ("train", "1-3", 3),
            ("train", "4-5", 5),
            ("train", ">=8", 10),
            ("eval", "1-3", 2),
        ]
    ):
        place = f"customization/{split}/{bracket}"
        folder = root / f"data/final/{place}/data/{number:08d}"
        folder.mkdir(parents=True)
        for i, image in enumerate(portraits(rng, count), 1):
            image.save(folder / f"image_{i}.jpg", **JPEG)
        names = [folder / f"image_{i}.jpg" for i in range(1, count + 1)]
        seen = [Image.open(name).convert("RGB") for name in names]
        prompt, _, truth = server.compose("subject_composition", seen)
        Image.fromarray(world.draw(truth)).save(folder / "image_output.jpg", **JPEG)
        index = root / f"data/filter/{place}"
        index.mkdir(parents=True, exist_ok=True)
        one = {
            "task": "customization",
            "idx": 1,  # not unique
            "prompt": re.sub(r"image (\d+)", r"<image \1>", prompt),
            "input_images": [str(name.relative_to(root)) for name in names],
            "output_image": str((folder / "image_output.jpg").relative_to(root)),
        }
        (index / f"{number}.json").write_text(json.dumps(one))
        if number == 1:  # broken in one way each
            for name, change in (
                ("missing", {"output_image": "data/final/gone.jpg"}),
                ("shown", {"output_image": one["input_images"][0]}),
            ):
                (index / f"{name}.json").write_text(json.dumps(one | change))
            (index / "torn.json").write_text('{"task": "customiz')


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """MACRO's layout through curate.py --from: (folder, questions, requests so far)."""
    pytest.importorskip("openai", reason="no client to ask with: pip install openai")
    folder, asked, answer = tmp_path_factory.mktemp("macro"), [], server.answer_text
    write_macro(folder / "Macro")
    train_toy_clip(folder / "clip", ToyClipSettings(steps=1))

    def answer_text(prompt, images):
        asked.append((prompt, images))
        return answer(prompt, images)

    with pytest.MonkeyPatch.context() as patch, server.make_server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        patch.chdir(folder)
        patch.setattr(server, "answer_text", answer_text)
        url = f"http://127.0.0.1:{running.server_port}/v1"
        words = f"--config toy --from Macro --out out --clip clip --chat_url {url}"
        words += " --count 100 --max_references 10 --drop_clip 0 --workers 1"
        requests = []
        for _ in range(2):
            argv = curate.arguments(words.split())
            curate.main(parse(curate.Config, curate.PRESETS, argv))
            requests.append(running.requests)
        running.shutdown()
    return folder, asked, requests


def test_macro_gets_its_plans_at_the_price_of_text(curated, capsys):
    """Kind 15: pictures are kept, a plan and two scores are asked for, nothing is asked twice."""
    folder, asked, requests = curated
    assert requests == [12, 12]
    plans = [prompt for prompt, _ in asked if "Write a plan" in prompt]
    assert len(plans) == 4 and not any("<image" in prompt for prompt in plans)
    data.main(["--check", str(folder / "out/shards")])
    assert ", 0 problems" in capsys.readouterr().out
    source = Source(folder / "out/shards")
    assert sorted(len(source.sample(i).references) for i in range(4)) == [1, 3, 5, 10]
    for i in range(4):
        record, sample = data.record_of(source.entries[i]), source.sample(i)
        assert sample.task == "customization" and sample.key.startswith("customization-")
        assert len(sample.plan.relations) == len(sample.references)
        paths = [folder / "Macro" / name for name in record["provenance"]["references"]]
        assert record["provenance"]["image_model"] == ""
        for image, path in zip([*sample.references, sample.target], [*paths, paths[0]]):
            kept = path.with_name("image_output.jpg") if image is sample.target else path
            assert image.tobytes() == Image.open(kept).convert("RGB").tobytes()
    assert str(folder) not in json.dumps([data.record_of(entry) for entry in source.entries])


def test_the_target_is_never_shown_to_the_one_who_plans(curated):
    folder, asked, _ = curated
    targets = [
        Image.open(path).convert("RGB").tobytes() for path in folder.rglob("image_output.jpg")
    ]
    judged = 0
    for prompt, images in asked:
        shown = sum(image.tobytes() in targets for image in images)
        judged += shown
        assert shown == ("Write a plan" not in prompt) and "image_output" not in prompt
    assert judged == 8


def test_samples_that_cannot_be_used_are_counted(curated):
    report = (curated[0] / "out/report.md").read_text()
    for why in ("a picture is missing", "the target is one of the references", "no JSON"):
        assert f"| references | {why} | 1 |" in report
    assert "| all | 7 | 4 " in report and "| customization | 6 | 4 |" in report


def test_any_folder_or_json_of_triples_is_read(tmp_path):
    """The same three samples as a list, as lines with a byte order mark, and as folders."""
    for number in range(3):
        folder = tmp_path / f"folders/{number}"
        folder.mkdir(parents=True)
        (folder / "instruction.txt").write_text(f"Put\u2028them together, {number}.\n")
        for name in ("ref_1", "ref_2", "ref_10", "target"):
            Image.new("RGB", (9, 9), "red").save(folder / f"{name}.png")
        (folder / "._ref_1.png").write_bytes(b"a Mac's")
    one = [
        {
            "references": [f"folders/{number}/ref_{i}.png" for i in (1, 2, 10)],
            "instruction": f"Put\u2028them together, {number}.",
            "target": f"folders/{number}/target.png",
        }
        for number in range(3)
    ]
    (tmp_path / "list.json").write_text(json.dumps(one))
    lines = "\r\n".join(json.dumps(sample, ensure_ascii=False) for sample in one)
    (tmp_path / "lines.jsonl").write_text("\ufeff" + lines + "\n\n", encoding="utf-8")

    def read(name, root):
        records = read_triples(tmp_path / name, count=10, most=3).values()
        assert all(record["task"] == "composition" for record in records)
        return {
            (record["instruction"], record["target"])
            + tuple(str((root / path).resolve()) for path in record["references"])
            for record in records
        }

    expected = read("list.json", tmp_path)
    assert len(expected) == 3 and read("lines.jsonl", tmp_path) == expected
    assert read("folders", tmp_path / "folders") == expected
    some = read_triples(tmp_path / "folders", count=2, most=3)
    assert some == read_triples(tmp_path / "folders", count=2, most=3) and len(some) == 2


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file or folder"),
        ('{"caption": "a"}', "holds no samples; expected JSON with the fields references or"),
        ('{"instruction": "a", "target": "t.png"}', "none of 1 samples.*no list of references"),
        ('{"prompt": "a", "input_images": ["x.png"]}', "no target picture"),
        ('{"prompt": 3, "input_images": ["x.png"], "target": "t.png"}', "no instruction"),
        ('{"prompt": "a", "references": [], "target": "t.png"}', "it has 0"),
        ('{"prompt": "a", "references": ["x.png"], "target": "t.png"}', "a picture is missing: x"),
        ("[1, ", "no JSON"),
    ],
)
def test_what_holds_no_samples_is_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_triples(tmp_path / "x.json", count=10, most=4)


def test_a_dry_run_counts_what_text_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_macro(Path("Macro"))
    words = "--config full --from=Macro --count 100 --dry_run"
    curate.main(parse(curate.Config, curate.PRESETS, curate.arguments(words.split())))
    out = capsys.readouterr().out
    assert "2 samples" in out and "6 requests (plan, PF, SC)" in out and "images" not in out
    assert not list(Path("out/curated").glob("*.jsonl"))


def test_an_instruction_that_is_no_text_is_one_dropped_sample(tmp_path):
    """And not the end of the run."""
    for name, words in (("good", b"Put it there."), ("bad", b"caf\xe9")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "instruction.txt").write_bytes(words)
        for i, picture in enumerate(("ref.png", "target.png")):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / picture)
    dropped = [record.get("dropped", "") for record in read_triples(tmp_path, 9, 4).values()]
    assert sorted(map(bool, dropped)) == [False, True] and "not UTF-8" in "".join(dropped)
