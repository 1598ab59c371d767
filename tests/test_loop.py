"""The bookkeeping of a run: what may change, what is counted, what is refused before it starts."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import grpo
import sft
from engine import Engine
from model import SMOKE, ModelConfig, UnifiedModel
from runtime import loop, processes
from runtime.config import UserError
from runtime.state import TrainingState
from toy.prepare import prepare
from toy.tokenizer import train_tokenizer

SFT = dataclasses.replace(sft.Config(config="smoke", **sft.PRESETS["smoke"]), threads=1)
GRPO = dataclasses.replace(grpo.Config(config="smoke", **grpo.PRESETS["smoke"]), threads=1)


def test_what_bounds_memory_alone_may_change_and_the_refusal_says_so(tmp_path):
    config = dataclasses.replace(GRPO, out=str(tmp_path / "run"))
    loop.start(config)
    loop.start(dataclasses.replace(config, pictures_at_once=3, groups_at_once=1, eval_batch=2))
    with pytest.raises(UserError, match="lr=0.0003, now lr=0.5.*what may change.*eval_batch"):
        loop.start(dataclasses.replace(config, lr=0.5))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(init="out/typo"), "out/typo"),
        (dict(init="out/smoke-stf"), "smoke-stf"),
        (dict(clip_name="ViT-L-14", init="out/full-sft"), "out/full-sft"),
    ],
)
def test_only_a_toy_trains_stage_1_and_under_its_own_name(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError, match=words):
        prepare(dataclasses.replace(GRPO, **change))
    assert not list((tmp_path / "out").iterdir())  # nothing was trained, no CLIP either


@pytest.fixture
def run(tmp_path):
    """(make, engine, folder): `make(**options)` begins the run of a fresh smoke model."""
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    engine = Engine(model, train_tokenizer(tmp_path / "tokenizer", model.config.vocab_size))
    parameters = dict(model.named_parameters())
    state = TrainingState(parameters, torch.optim.SGD(parameters.values(), 0.1), {})

    def make(**options):
        config = dataclasses.replace(SFT, out=str(tmp_path / "run"), **options)
        one = loop.Run(loop.start(config), config, state, desc="test")
        one.steps()
        return one

    return make, engine, tmp_path / "run"


def test_rounding_that_decides_what_is_clipped_is_said_once(run, capsys):
    make, *_ = run
    one = make(save_every=100)
    for step, mismatch in enumerate((0.01, 0.2, 0.3)):
        values = {"step": step, "mismatch_clip": mismatch}
        one.end_step(step, values, finite=True, decay=0.0, made_of=[])
    assert capsys.readouterr().out.count("warning") == 1


def test_weights_are_exported_in_float32_on_request(run):
    make, engine, folder = run
    weights = {name: p.detach() + 1e-6 for name, p in engine.model.named_parameters()}
    for asked, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        make(precision="bfloat16", export_float32=asked).export(engine, weights)
        written = load_file(folder / "model" / "ema.safetensors")
        assert written["language_model.lm_head.weight"].dtype == dtype
    assert torch.equal(written["language_model.lm_head.weight"], weights["lm_head.weight"])


def test_passes_without_gradients_are_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "matmul_speed", lambda precision: 1e8)
    model = UnifiedModel(ModelConfig(**SMOKE))
    line = {"step": 0, "rollout_tokens": 100, "update_tokens": 100, "rollout_seconds": 1.0}
    found = []
    for trained in (100, 40):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        loop.log(tmp_path, line | {"trained_tokens": trained})
        text = loop.pace(tmp_path, 0, model, precision="float32")
        found.append(int(text.split("MFU ")[1].split(" ")[0]))
    assert found[1] / found[0] == pytest.approx((2 * 160 + 6 * 40) / (2 * 100 + 6 * 100), rel=0.02)


def test_the_spread_is_that_of_all_processes(monkeypatch):
    values, other = torch.randn(4, 5), torch.randn(4, 5) + 3
    assert processes.spread(values) == values.std(correction=0)

    def summed(numbers):
        wide = other.double()
        theirs = [wide.numel(), float(wide.sum()), float(wide.square().sum())]
        return [a + b for a, b in zip(numbers, theirs)]

    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "reduced", summed)
    expected = torch.cat([values, other]).std(correction=0)
    torch.testing.assert_close(processes.spread(values), expected)


@pytest.mark.parametrize("name, words", [("gpu", "expected auto"), ("cuda", "no CUDA device")])
def test_devices_that_are_not_there(name, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        processes.placed(name, "auto")
    assert processes.placed("auto", "auto") == (torch.device("cpu"), torch.float32)
