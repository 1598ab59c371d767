"""
Other people's machines and runs that go wrong: start methods other than fork, a run without a
signal, a run that diverges. Systems without SIGUSR1, half a launcher, and devices that are not
there have their tests in test_loop.py.
"""

import json
import multiprocessing
import pickle

import pytest
import torch

import data
import grpo
import sft
from data import ShardWriter
from model import SMOKE, ModelConfig, UnifiedModel
from runtime import loop
from runtime.pretrained import save_model
from runtime.state import TrainingState
from toy.clip import ToyClipSettings, train_toy_clip
from toy.painter import Painted, Painter
from toy.tasks import Drawn, draw_sample
from toy.tokenizer import train_tokenizer
from vision import to_png

STAGE_1, STAGE_2 = sft.PRESETS["smoke"], grpo.PRESETS["smoke"]


# --------------------------------------------------------------------------------------------------
# 13: start methods


@pytest.fixture
def forkserver(monkeypatch):
    """Not on Linux workers start as Python has it: they inherit nothing, with spawn or this."""
    monkeypatch.setattr(data, "START", None)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_workers_start_without_fork(tmp_path, forkserver):
    """Kind 13: the smoke preset, from samples on disk, whose source has memory to share."""
    with ShardWriter(tmp_path / "shards") as shards:
        for index in range(4):
            one = draw_sample("train", index)
            record = {"key": one.key, "task": one.task, "instruction": one.instruction}
            relations = [{f"relation_{i}": text} for i, text in enumerate(one.plan.relations, 1)]
            record["plan"] = {"out_caption": one.plan.caption, "relations": relations}
            shards.write(record, [to_png(image) for image in one.references], to_png(one.target))
    mine = dict(data=str(tmp_path / "shards"), out=str(tmp_path / "run"), threads=1, workers=1)
    mine |= dict(steps=1, samples_per_step=4, painter_errors=0.0)
    sft.train(sft.Config(config="smoke", **STAGE_1 | mine))
    assert loop.read_log(tmp_path / "run")[0]["grad_norm"] > 0


def test_all_that_a_worker_needs_can_be_sent_to_it():
    source = Painted(Drawn("train", 0, 4), Painter(errors=1.0))
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


# --------------------------------------------------------------------------------------------------
# 14: no signal, and too much


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """`make(folder, **options)` -> the configuration of stage 2 behind a stage 1 of no steps."""
    folder = tmp_path_factory.mktemp("untrained")
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    tokenizer = train_tokenizer(folder / "tokenizer", model.config.vocab_size)
    save_model(model, tokenizer, folder / "sft/model")
    train_toy_clip(folder / "clip", ToyClipSettings(steps=1))
    paths = dict(init=folder / "sft", clip=folder / "clip", metric=folder / "clip")

    def make(out, **options):
        mine = dict(out=str(out), threads=1, eval_samples=2, prompts_per_step=2)
        mine |= {name: str(path) for name, path in paths.items()} | options
        return grpo.Config(config="smoke", **STAGE_2 | mine)

    return make


def test_a_short_run_without_signal_says_so_and_why(untrained, tmp_path, capsys):
    """Kind 14: at its end, if none of its steps had one."""
    grpo.train(untrained(tmp_path / "run"))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "signal" in line]
    assert "2 steps in a row without a signal: 100 % of the plans do not parse" in said
    assert "--max_plan_tokens" in said


@pytest.mark.parametrize(
    "values, why",
    [
        ({"dead_groups": 1.0, "parse_failures": 0.0, "grad_norm": 0.1}, "members do not differ"),
        ({"dead_groups": 1.0, "parse_failures": 0.9, "grad_norm": 0.0}, "90 % of the plans"),
        ({"dead_groups": 0.5, "parse_failures": 0.9, "grad_norm": 0.0}, "gradient is zero"),
        ({"dead_groups": 0.9, "parse_failures": 0.0, "grad_norm": 0.1}, None),
        ({"ce": 1.0, "mse": 1.0, "grad_norm": 2.0}, None),
    ],
)
def test_twenty_steps_without_signal(tmp_path, monkeypatch, values, why):
    said = []
    monkeypatch.setattr(loop, "warn", said.append)
    config = sft.Config(config="smoke", **STAGE_1 | dict(out=str(tmp_path), threads=1, steps=90))
    weight = {"w": torch.nn.Parameter(torch.zeros(2))}
    state = TrainingState(weight, torch.optim.SGD(weight.values(), 0.1), {})
    run = loop.Run(loop.start(config, {}), config, state, desc="test")
    run.steps()
    monkeypatch.setattr(loop, "save_state", lambda *_: None)
    good = {"grad_norm": 1.0, "dead_groups": 0.0}
    for step in range(65):  # a step with a signal begins the count anew
        run.end_step(step, good if step == 10 else values, finite=True, decay=0.0, samples=[])
    if why is None:
        assert not said
    else:
        assert [text.split()[0] for text in said] == ["20", "40"] and why in said[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_divergence_ends_with_the_bad_step_file(untrained, tmp_path, monkeypatch, capsys, value):
    """Weights that an earlier step blew up: plans are drawn and pictures painted all the same."""
    config, build = untrained(tmp_path / "run", steps=5), grpo.build

    def blown_up(config):
        learner = build(config)
        with torch.no_grad():
            for parameter in learner.state.parameters.values():
                parameter.fill_(value)
        return learner

    monkeypatch.setattr(grpo, "build", blown_up)
    with pytest.raises(SystemExit) as stopped:
        grpo.train(config)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "3 steps in a row without a finite gradient" in error
    (path,) = (tmp_path / "run").glob("bad-step-*.json")
    assert str(path) in error and json.loads(path.read_text())["samples"] == [4, 5]
