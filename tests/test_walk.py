"""
The dry run (bench/walk.py): presets and README's commands are walked at the GPUs that they name.

A command of README that cannot run by our own arithmetic fails here. Nothing needs a GPU.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
import grpo
import sample
import sft
from bench import advice, walk
from bench.peaks import live_bytes
from model import SMOKE, ModelConfig
from runtime.config import UserError, parse
from runtime.pretrained import official_configs, shape_of

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("I have one GPU", "I have a cluster", "Your own data, and the benchmarks")
COMMANDS = {"sft.py": sft, "grpo.py": grpo, "sample.py": sample, "evaluate.py": evaluate}
FULL = ModelConfig()


def readme_commands():
    """(script, its words, GPUs) of each command of the README that runs a stage or a model."""
    text = (ROOT / "README.md").read_text()
    for section in SECTIONS:
        part = text[text.index(f"## {section}") :]
        code = part[: part.index("\n## ", 3)].split("```")[1]
        for line in code.strip().splitlines():
            words = shlex.split(line, comments=True)
            gpus = 1
            if words[0] == "torchrun":
                gpus, words = int(words[2]), words[2:]
            elif words[0] == "sbatch":  # 8 nodes of 8, see launch/slurm.sh
                gpus, words = 64, ["", "grpo.py", "--config", "full", *words[2:]]
            if words[1] in COMMANDS:
                yield words[1], words[2:], gpus


def configured(script, words, gpus=1):
    """The Config of a command with --memory."""
    module = COMMANDS[script]
    words = module.arguments(words) if script == "evaluate.py" else words
    changed = {"memory": True}
    if script in ("sft.py", "grpo.py") and "--gpus" not in words:
        changed["gpus"] = gpus
    return dataclasses.replace(parse(module.Config, module.PRESETS, words), **changed)


def run(script, config):
    module = COMMANDS[script]
    (module.train if hasattr(module, "train") else module.main)(config)


@pytest.fixture
def a_folder(tmp_path, monkeypatch):
    """Work where BAGEL-7B-MoT lies, as far as its shape goes."""
    (tmp_path / "BAGEL-7B-MoT").mkdir()
    for name, content in official_configs(FULL).items():
        (tmp_path / "BAGEL-7B-MoT" / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("script, words, gpus", readme_commands(), ids=str)
def test_every_command_of_the_readme_fits_by_our_own_arithmetic(
    a_folder, capsys, script, words, gpus
):
    config = configured(script, words, gpus)
    run(script, config)  # exits if it is refused
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("fits"), out


def test_the_readme_names_all_commands():
    found = [(script, gpus) for script, _, gpus in readme_commands()]
    for one in (("sample.py", 1), ("grpo.py", 1), ("sft.py", 8), ("grpo.py", 8), ("grpo.py", 64)):
        assert one in found
    alone = [words for script, words, gpus in readme_commands() if (script, gpus) == ("sft.py", 1)]
    assert ["--config", "full"] in [words[:2] for words in alone]  # stage 1 of full on one GPU


# whether it fits on 80 GB, and which phase decides; None: whatever the cut of the tree makes of it
PRESETS = [
    ("grpo.py", "full", 8, False, "update"),
    ("grpo.py", "full", 64, True, "update"),
    ("sft.py", "full", 8, True, "strip: paint"),
    ("sft.py", "full", 64, True, "strip: paint"),
    ("grpo.py", "paper", 8, None, None),
    ("grpo.py", "paper", 64, None, None),
]


@pytest.mark.parametrize("script, preset, gpus, fits, deciding", PRESETS)
def test_presets_at_8_and_64_gpus(script, preset, gpus, fits, deciding):
    config = configured(script, ["--config", preset], gpus)
    walked = (walk.walk_sft if script == "sft.py" else walk.walk_grpo)(config, FULL)
    assert fits in (walked.fits(80), None)
    assert deciding in (walked.deciding.name, None)
    assert all(walked.peak(one) > 0 for one in walked.phases)
    assert [one.name for one in walked.phases if not one.parts] == ["save"]  # the host's


@pytest.mark.parametrize(
    "script, option, gpus",
    [("sft.py", "samples_per_step", 24), ("grpo.py", "prompts_per_step", 24)],
)
def test_work_that_cannot_be_shared_by_the_gpus_is_refused(a_folder, capsys, script, option, gpus):
    """As the run itself would, which would have cost a place in the queue."""
    with pytest.raises(SystemExit) as refused:
        run(script, configured(script, ["--config", "full", "--init", "BAGEL-7B-MoT"], gpus))
    assert refused.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"by {gpus} processes" in line and f"use --{option}=" in line


def test_no_advice_that_cannot_be_shared():
    """16 prompts of 3 pictures: more than 16 GPUs would have to cut a picture."""
    config = configured("grpo.py", "--config full --group_size 3".split(), 8)
    assert not advice.fits(walk.walk_grpo, dataclasses.replace(config, gpus=32), FULL)
    assert advice.fits(walk.walk_grpo, dataclasses.replace(config, gpus=16), FULL)


@pytest.mark.parametrize(
    "script, words, gpus, expected",
    [
        ("grpo.py", "--config full", 8, "--train gen"),
        ("sft.py", "--config full --init BAGEL-7B-MoT", 1, "--train lora"),
    ],
)
def test_a_refusal_is_one_line_and_its_advice_fits(a_folder, capsys, script, words, gpus, expected):
    config = configured(script, words.split(), gpus)
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        run(script, config)
    assert refused.value.code == 2
    out, error = capsys.readouterr()
    assert "fits, a tenth left free: no" in out
    (line,) = error.splitlines()
    ways = re.split(r" or (?=--)", line.partition("what would fit: ")[2])
    assert expected in ways and all(way.startswith("--") for way in ways)
    for way in ways:
        again = configured(script, [*words.split(), *way.split()], gpus)
        walked = (walk.walk_sft if script == "sft.py" else walk.walk_grpo)(again, FULL)
        assert walked.fits(80), way


def test_no_less_is_trained_where_that_cannot_be():
    """Fresh weights are trained whole, and plans with all weights."""
    fresh, full = sft.Config(config="full"), grpo.Config(config="full")
    started = dataclasses.replace(fresh, init="BAGEL-7B-MoT")
    assert not advice.less(fresh) and not advice.less(dataclasses.replace(full, train_text=True))
    assert advice.less(started) == advice.less(full) == [{"train": "gen"}, {"train": "lora"}]
    assert not advice.less(dataclasses.replace(full, train="lora"))


def test_a_mistyped_init_is_refused(a_folder, capsys):
    with pytest.raises(SystemExit) as refused:
        run("grpo.py", configured("grpo.py", ["--config", "full", "--init", "out/full-stf"], 64))
    assert refused.value.code == 2
    assert "checkpoint folder not found: out/full-stf" in capsys.readouterr().err
    assert shape_of("BAGEL-7B-MoT", "toy") == FULL  # a folder's shape is its own
    assert shape_of("out/full-sft", "full", "out/full-sft") == FULL  # still to come
    assert shape_of("ByteDance-Seed/BAGEL-7B-MoT", "full") == FULL  # on the hub
    with pytest.raises(UserError, match="not found: BAGEL-7B"):
        shape_of("BAGEL-7B", "full")


def test_live_bytes_counts_what_stands_at_once():
    x = torch.empty(1000, device="meta")
    with live_bytes() as live:
        y = x + 1  # 4,000 bytes
        y = (y * 2).sum()  # 8,000, then 4 more
        x.add_(1)  # made outside
        z = x.view(10, 100)
    assert live.peak == 8004
    assert live.now == y.nbytes and z.shape == (10, 100)


def test_smaller_shapes_are_walked_too():
    """The toys, whose codec and CLIP have no weights."""
    config = configured("grpo.py", ["--config", "smoke"], 1)
    walked = walk.walk_grpo(config, ModelConfig(**SMOKE))
    assert walked.fits(1) and walked.always["CLIP and codec"] == 0
