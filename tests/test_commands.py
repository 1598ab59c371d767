"""The commands as a person types them: smoke from end to end, bad input, documented lines."""

import ast
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import forked
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

import evaluate
import grpo
import sample
import sft
from engine import Engine
from runtime import files, loop, processes, state
from runtime.config import UserError, parse
from studies import pictures as drawn
from studies import questions

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if "__main__" in path.read_text()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`python grpo.py --config smoke` in an empty folder: CLIPs, SFT, GRPO, table and grid."""
    cwd = tmp_path_factory.mktemp("fresh")
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    command = [sys.executable, ROOT / "grpo.py", "--config", "smoke", "--threads", "1"]
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd, done.stdout


def test_smoke_runs_both_stages_and_ends_with_table_and_grid(trained):
    cwd, out = trained
    assert "SFT + GRPO" in out and "CLIP_out" in out
    for path in (
        "smoke-sft/model/ema.safetensors",
        "smoke-grpo/model/llm_config.json",
        "smoke-grpo/grid.png",
        "smoke-grpo/config.json",
        "smoke-sft/curves.png",
        "smoke-grpo/curves.png",
        "smoke-grpo/lapse.webp",
        "smoke-clip-reward/clip.safetensors",
    ):
        assert (cwd / "out" / path).is_file(), path
    lines = loop.read_log(cwd / "out/smoke-grpo")
    assert [line["step"] for line in lines] == [0, 1]
    # real updates, or it would not see what an update breaks
    assert all(line["grad_norm"] > 0 and line["dead_groups"] < 1 for line in lines)
    with Image.open(cwd / "out/smoke-grpo/grid.png") as grid:
        assert grid.width > 100
    assert not list((cwd / "out").glob("**/.*.tmp"))
    # handed on, and kept by whoever resumes
    assert files.read_json(cwd / "out/smoke-sft/config.json")["threads"] == 1


def test_a_resumed_run_keeps_its_number_of_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        config = dataclasses.replace(sft.Config(**sft.PRESETS["smoke"]), out=str(tmp_path / "run"))
        loop.start(dataclasses.replace(config, threads=1), {})
        torch.set_num_threads(2)  # as PyTorch would
        loop.start(dataclasses.replace(config, out=str(tmp_path / "other")), {})
        assert torch.get_num_threads() == 2
        loop.start(config, {})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_same_command_again_does_not_train_again(trained):
    cwd, _ = trained
    before = (cwd / "out/smoke-sft/metrics.jsonl").read_text()
    forked.run("sft.py", "--config", "smoke", "--threads", "1", cwd=cwd)
    assert (cwd / "out/smoke-sft/metrics.jsonl").read_text() == before


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_the_process_group_is_left_at_a_normal_end(trained, tmp_path, monkeypatch, script):
    shutil.copytree(trained[0] / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    left = []
    monkeypatch.setattr(processes, "finish", lambda: left.append(True))
    words = ["--config", "smoke", "--threads", "1", "--export"]  # finished long ago
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert left == [True]


def test_the_final_table_paints_few_at_once_after_training_is_freed(trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0] / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    build, paint, held, seen = grpo.build, Engine.paint, [], []

    def watched(config):
        learner = build(config)
        held.extend(map(weakref.ref, (learner, learner.engine.model, learner.state)))
        return learner

    def recorded(self, groups, *rest, **how):
        seen.append((len(groups), [one() for one in held]))
        return paint(self, groups, *rest, **how)

    monkeypatch.setattr(grpo, "build", watched)
    monkeypatch.setattr(Engine, "paint", recorded)
    words = ["--config", "smoke", "--threads", "1", "--eval_batch", "6"]
    grpo.train(parse(grpo.Config, grpo.PRESETS, words))  # nothing is left to train: the table alone
    assert [count for count, _ in seen] == 2 * [6, 6, 4]
    assert all(found == [None] * 3 for _, found in seen)


def test_evaluate_ends_with_json(trained):
    cwd, _ = trained
    out = forked.run(
        "evaluate.py", "--config", "smoke", "--checkpoint", "out/smoke-grpo", "--json", cwd=cwd
    )
    row = json.loads(out.splitlines()[-1])
    assert {"PF", "SC", "Overall", "CLIP_out", "format_ok", "n"} <= set(row) and row["n"] == 16
    assert 0 <= row["PF"] <= 10 and 0 <= row["format_ok"] <= 1


def test_the_question_is_asked_of_a_trained_model(trained, monkeypatch, capsys):
    """Few or none of its plans parse; those of test_questions.py do."""
    monkeypatch.chdir(trained[0])
    words = ["--config", "smoke", "--num_samples", "3", "--threads", "1"]
    table = questions.main(parse(questions.Config, questions.PRESETS, words))
    assert list(table) in ([], ["picture", "instruction", "likelihood", "votes"])
    out = capsys.readouterr().out
    assert ("plans that parse" if table else "none of 6 plans parses") in out


def test_sample_prints_the_plan_and_writes_the_picture(trained, tmp_path):
    Image.effect_noise((300, 200), 80).convert("CMYK").save(tmp_path / "photo.jpg")
    Image.new("RGBA", (16, 16), (255, 0, 0, 128)).save(tmp_path / "a.webp")
    words = ["--checkpoint", "out/smoke-grpo", "--prompt", "Put them together."]
    words += ["--ref", tmp_path / "photo.jpg", "--ref", tmp_path / "a.webp"]
    words += ["--out", tmp_path / "picture.png", "--steps_picture", tmp_path / "steps.png"]
    out = forked.run("sample.py", *map(str, words), cwd=trained[0])
    assert "plan" in out or "caption" in out
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (32, 32)
        large = picture.resize((128, 128), Image.Resampling.NEAREST)
    with Image.open(tmp_path / "steps.png") as steps:  # the last estimate is the picture
        end = steps.width - drawn.PAD, steps.height - drawn.PAD
        last = steps.crop((end[0] - 128, end[1] - 128, *end))
    assert max(high for _, high in ImageChops.difference(last, large).getextrema()) <= 1


def test_sample_paints_a_file_of_prompts_and_goes_on_where_it_was(trained, tmp_path, capsys):
    for name in "ab":
        Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / f"{name}.png")
    lines = [
        {"prompt": "Put it in a meadow.", "ref": ["a.png"], "key": "one"},
        {"prompt": "They meet.", "ref": ["a.png", "b.png"]},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--checkpoint", trained[0] / "out/smoke-grpo", "--prompts", tmp_path / "prompts.jsonl"]
    words += ["--out", tmp_path / "many", *"--seeds 2 --threads 1 --max_plan_tokens 12".split()]
    config = parse(sample.Config, sample.PRESETS, [str(word) for word in words])
    sample.main(config)
    pictures = sorted((tmp_path / "many").glob("*.png"))
    names = ["0002-0.png", "0002-1.png", "one-0.png", "one-1.png"]
    assert [path.name for path in pictures] == names
    about = json.loads((tmp_path / "many/one-1.json").read_text())
    assert list(about) == ["text", "plan", "problems", "prompt", "references", "seed"]
    assert about["seed"] == 1 and about["prompt"] == "Put it in a meadow."
    assert pictures[2].read_bytes() != pictures[3].read_bytes()
    before = {path: path.stat().st_mtime_ns for path in pictures}
    pictures[0].unlink()
    sample.main(config)
    assert [path for path in pictures if path.stat().st_mtime_ns != before[path]] == [pictures[0]]


@pytest.mark.parametrize("script, half", [("sft", 30), ("grpo", 1)])
def test_a_resumed_run_equals_an_uninterrupted_one(trained, script, half, monkeypatch, capsys):
    """Bit for bit: stop after the first state, go on, compare with the unbroken run."""
    cwd, _ = trained
    monkeypatch.chdir(cwd)
    module = {"sft": sft, "grpo": grpo}[script]
    folder = cwd / "out" / f"again-{script}"
    words = ["--config", "smoke", "--threads", "1", "--out", str(folder)]
    config = parse(module.Config, module.PRESETS, words)
    saved = loop.save_state

    def stop(folder, step, tensors):
        saved(folder, step, tensors)
        if step == half:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        module.train(config)
    monkeypatch.setattr(loop, "save_state", saved)
    # a line written after the state: cut away on resume
    loop.log(folder, {"step": half, "torn": True})
    module.train(dataclasses.replace(config, export=True))
    assert (folder / "model/ema.safetensors").is_file() and len(loop.read_log(folder)) == half
    module.train(config)
    a = load_file(cwd / "out" / f"smoke-{script}" / "model" / "ema.safetensors")
    b = load_file(folder / "model" / "ema.safetensors")
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    assert not any("torn" in line for line in loop.read_log(folder))


# --------------------------------------------------------------------------------------------------
# bad input: one line that names the culprit, exit status 2, nothing half-written


def refused(capsys, module, *words):
    """The line with which a command ends."""
    command = getattr(module, "train", None) or module.main
    with pytest.raises(SystemExit) as stopped:
        command(parse(module.Config, module.PRESETS, list(words)))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    return line


@pytest.fixture
def pictures(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    return tmp_path


@pytest.mark.parametrize(
    "words, message",
    [
        ("--prompt A --ref missing.png", "missing.png"),
        ("--prompt A --ref truncated.png", "truncated.png cannot be read as a picture"),
        ('--prompt " "', "--prompt is empty"),
        ("--prompt A --num_timesteps 1", "num_timesteps=1"),
        ("--prompt A --size 32x30", "--size=32x30: expected multiples"),
        ("--prompt A --out good.png/x.png", "cannot write"),
        ("--prompt A --out picture.txt", "picture.txt"),
        ("--prompt A --checkpoint nowhere", "nowhere"),
        ("--promt A", "did you mean --prompt"),
        ("--prompts nothing.jsonl --out many", "file of prompts not found"),
        ("--prompts text.png --prompt A", "leave --prompt"),
        ("--prompt A --seeds 2 --steps_picture a.png", "shows one picture"),
        ("--prompt A --steps_picture a.jpg", "steps_picture=a.jpg: expected a name"),
        ("--prompt A --seed one", "--seed"),
        ("--prompt A --device gpu", "expected auto, cuda, mps or cpu"),
        ("--prompt A --device cuda:99", "--device=cuda:99"),
        ("--prompt A --timestep_shift 0", "timestep_shift=0.0: expected a number above"),
        (
            "--prompt A --text_guidance inf",
            "text_guidance=inf, image_guidance=1.0: expected numbers",
        ),
    ],
)
def test_bad_command_line(trained, pictures, capsys, monkeypatch, words, message):
    monkeypatch.chdir(pictures)
    before, words = sorted(os.listdir(pictures)), shlex.split(words)
    if "--checkpoint" not in words:
        words += ["--checkpoint", str(trained[0] / "out/smoke-grpo")]
    assert message in refused(capsys, sample, *words)
    assert sorted(os.listdir(pictures)) == before


GOOD = '{"prompt": "Show it.", "ref": ["a.png"]}'


@pytest.mark.parametrize(
    "content, prompts",
    [
        ('{"prompt": "Show\u2028it\x85a", "ref": []}', ["Show\u2028it\x85a"]),
        (f"\ufeff\r\n{GOOD}\r\n\r\n\n{GOOD}", ["Show it.", "Show it."]),
        ('{"prompt": "一只猫", "key": 7}\n', ["一只猫"]),
    ],
)
def test_a_file_of_prompts_is_read_as_people_write_it(tmp_path, content, prompts):
    (tmp_path / "p.jsonl").write_bytes(content.encode())
    read = sample.read_prompts(tmp_path / "p.jsonl").values()
    assert [prompt for prompt, _ in read] == prompts


@pytest.mark.parametrize(
    "content, message",
    [
        ("\n\n", "p.jsonl holds no prompts; expected a line for each"),
        ('{"prompt": "A", "ref": "a.png"}', 'p.jsonl, line 1: its ref is "a.png"; expected'),
        ('{"prompt": "A", "references": []}', "p.jsonl, line 1: its references is []; expected"),
        ('{"prompt": ""}', 'p.jsonl, line 1: its prompt is ""; expected'),
        (GOOD + "\n[]", "p.jsonl, line 2: it holds a list; expected"),
        (GOOD + '\n{"prompt": "to', "p.jsonl, line 2: Unterminated string"),
        ('{"prompt": "A", "key": "../a"}', "p.jsonl, line 1: its key: '../a' names files"),
        ('{"prompt": "A", "key": "a"}\n' * 2, "line 2: keys name files, so they must differ; 'a'"),
    ],
)
def test_a_bad_file_of_prompts_gets_one_line(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        sample.read_prompts(tmp_path / "p.jsonl")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "module, words, message",
    [
        (sft, ["--config", "smoke", "--out", "file/run"], "cannot write"),
        (grpo, ["--config", "smoke", "--group_size", "1"], "at least 2"),
        (sft, ["--config", "tiny"], "tiny"),
        (evaluate, ["--config", "smoke", "--checkpoint", "nowhere"], "nowhere"),
        (evaluate, ["--config", "smoke", "--device", "cuda:99"], "--device=cuda:99"),
        (evaluate, ["--config", "smoke", "--batch", "0"], "batch=0"),
        (sft, ["--config", "smoke", "--eval_batch", "0"], "eval_batch=0"),
        (sft, ["--config", "smoke", "--sample_plan_tokens", "0"], "max_plan_tokens=0"),
        (grpo, ["--config", "smoke", "--init", "out/typo"], "out/typo"),
        (questions, ["--config", "smoke", "--checkpoint", "nowhere"], "nowhere"),
        (questions, ["--question", "captions"], "unknown option --question"),
    ],
)
def test_bad_runs(tmp_path, capsys, monkeypatch, module, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert message in refused(capsys, module, *words)


def test_a_run_folder_keeps_its_options(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained[0])
    words = "--config smoke --threads 1 --lr 0.5".split()
    assert "lr=0.006, now lr=0.5" in refused(capsys, sft, *words)


def test_a_torn_state_is_named(trained, capsys, monkeypatch, tmp_path):
    shutil.copytree(trained[0] / "out/smoke-sft", tmp_path / "out/smoke-sft")
    monkeypatch.chdir(tmp_path)
    newest = state.states("out/smoke-sft")[-1]
    (newest / "__0_0.distcp").write_bytes(b"torn")
    again = ["--config", "smoke", "--threads", "1", "--steps", "61"]
    error = refused(capsys, sft, *again)
    assert newest.name in error and "torn" in error
    # a state without its index is no state: the one before is taken
    (newest / ".metadata").unlink()
    assert state.newest_step("out/smoke-sft") == 30


# --------------------------------------------------------------------------------------------------
# the documentation


WORD = r"(?:\"[^\"]*\"|[^\s`|;&#\"]+)"
LAUNCHER = r"(?:python(?: -m (?!pytest|pip))?|torchrun(?: --?[\w-]+(?:[= ][\w.:]+)?)*)"
COMMAND = re.compile(rf"{LAUNCHER} ?((?<=-m )[\w.]+|\w[\w/]*\.py)((?: {WORD})*)")


def documented():
    """(source, script or module, its words) of every command in README, scripts and docstrings.

    A command ends at two spaces, a line's end, or a character of the shell or of Markdown.
    """
    found = []
    texts = {
        path.name: path.read_text()
        for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.sh"))
        if path.name not in ("LOG.md", "RESULTS.md")  # what was run then
    }
    for path in ROOT.glob("**/*.py"):
        name = str(path.relative_to(ROOT))
        texts[name] = ast.get_docstring(ast.parse(path.read_text())) or ""
    for source, text in texts.items():
        for match in COMMAND.finditer(text):
            found.append((source, match[1], match[2].strip()))
    return found


def test_commands_of_all_kinds_are_found():
    names = {script for _, script, _ in documented()}
    assert {"grpo.py", "data.py", "tests/faults.py", "bench", "studies.questions"} <= names


def as_parsed(module, words):
    """The options of a documented command, as its script would hand them to the parser."""
    given = shlex.split(words)
    if hasattr(module, "REGIMES"):
        assert given and (given[0] in module.REGIMES or given[0] in ("NAME", "--help")), given
        return given[1:]
    return module.arguments(given) if hasattr(module, "arguments") else given


@pytest.mark.parametrize("source, script, words", documented())
def test_documented_commands_exist(source, script, words):
    if script.endswith(".py"):
        assert (ROOT / script).is_file(), f"{source} names {script}"
        name = script.removesuffix(".py").replace("/", ".").removeprefix("tests.")
    else:
        name = f"{script}.__main__" if (ROOT / script).is_dir() else script
    module = importlib.import_module(name)
    if hasattr(module, "Config") and not any(sign in words for sign in "$…["):
        # exits on an unknown option or preset
        parse(module.Config, module.PRESETS, as_parsed(module, words))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help(path, capsys):
    module = importlib.import_module(path.stem)
    if hasattr(module, "Config"):
        with pytest.raises(SystemExit) as stopped:
            parse(module.Config, module.PRESETS, ["--help"])
        out = capsys.readouterr().out
        assert stopped.value.code == 0
        assert all(f"--{field.name}" in out for field in dataclasses.fields(module.Config))
        # --help reads the comment behind an option, on its line
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                assert all(
                    part.lineno == part.end_lineno
                    for part in node.body
                    if isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.dump(part)
                )


def test_logged_keys_are_explained(trained):
    explained = (ROOT / "docs/RUNS.md").read_text()
    keys = {
        key
        for script in ("sft", "grpo")
        for line in loop.read_log(trained[0] / f"out/smoke-{script}")
        for key in line
    }
    assert not [key for key in sorted(keys) if f"`{key}`" not in explained]
