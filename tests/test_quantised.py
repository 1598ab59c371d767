"""
Weights in 8 and 4 bits: how much they change what the model says, and what people are told.

Skipped without bitsandbytes: pip install bitsandbytes
"""

import copy
import sys
from functools import partial

import pytest
import torch

import bench.model as case
from bench import advice, walk
from bench.memory import values_of
from engine import Branch, Group, Thinking
from model import ModelConfig
from runtime.config import UserError
from runtime.pretrained import save_model
from runtime.quantised import BYTES, load_quantised, quantise, quantised_layers
from sample import Config
from toy.prepare import toy_tokenizer

FULL = ModelConfig()


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def drawn():
    """(engine, prompt, pack) of a model of random weights."""
    generator = torch.Generator().manual_seed(0)
    engine = case.random_engine(case.MID, 0, generator)
    prompt = case.random_prompt(generator)
    return engine, prompt, case.edits(engine.layout, generator, count=2)


def velocity(model, packed):
    with torch.no_grad():
        return model.velocity(packed, model(packed)[1]).float()


# against float32; bfloat16 itself is at 0.0074
@pytest.mark.parametrize(
    "kind, dtype, least, most",
    [
        ("int8", torch.float32, 0.001, 0.008),
        ("int8", torch.bfloat16, 0.001, 0.012),
        ("nf4", torch.bfloat16, 0.02, 0.1),
    ],
)
def test_velocities_and_bytes(bitsandbytes, drawn, kind, dtype, least, most):
    engine, _, packed = drawn
    expected = velocity(engine.model, packed)
    model = copy.deepcopy(engine.model).to(dtype)
    narrow = sum(layer.weight.numel() for *_, layer in quantised_layers(model))
    values, kept = values_of(model), sum(p.nbytes for p in model.parameters())
    quantise(model, kind)
    model.to("cpu")  # rounds
    error = (velocity(model, packed) - expected).norm() / expected.norm()
    assert least < error < most
    whole = dtype.itemsize * (values - narrow)
    rounded = sum(p.nbytes for p in model.parameters()) - whole  # without scales
    assert rounded == {"int8": narrow, "nf4": narrow // 2}[kind] <= BYTES[kind] * narrow
    assert kept == dtype.itemsize * values


def test_a_folder_is_opened_and_samples(bitsandbytes, drawn, tmp_path):
    engine, prompt, _ = drawn
    tokenizer = toy_tokenizer(tmp_path, case.MID.vocab_size)
    save_model(engine.model, tokenizer, tmp_path / "model")
    load = partial(load_quantised, tmp_path / "model", torch.device("cpu"), torch.bfloat16)
    (whole, _), (narrow, _) = load(kind="full"), load(kind="nf4")
    start, pictures = engine.start(case.GRID, torch.Generator().manual_seed(1)), []
    for model in (whole, narrow):
        one = case.Engine(model, case.Markers())
        plans, _ = one.think([prompt], Thinking(5))
        group = Group(prompt, case.GRID, (Branch(plans[0], (start,)),))
        pictures.append(one.paint([group], case.Sampler(3, 3.0)))
    error = (pictures[0] - pictures[1]).norm() / pictures[0].norm()
    assert 0 < error < 0.2


def test_it_says_what_it_needs(monkeypatch, drawn):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    with pytest.raises(UserError, match="--weights nf4 needs .*pip install bitsandbytes"):
        quantise(drawn[0].model, "nf4")
    with pytest.raises(UserError, match="needs bitsandbytes"):  # before anything is read
        load_quantised("nowhere", torch.device("cpu"), torch.bfloat16, kind="nf4")


def test_what_fits_small_cards():
    """Computed: the walk of a picture with one reference of 1024 pixels."""
    config = partial(Config, ref=("a.png",), text_guidance=4.0)
    for card, refused, fits in ((24, "full", "int8"), (16, "int8", "nf4")):
        for kind, expected in ((refused, False), (fits, True)):
            found = walk.walk_pictures(config(weights=kind), FULL)
            assert found.fits(card) == expected, (card, kind)
        wanted = config(weights=refused, gpu_memory=card)
        assert f"--weights {fits}" in advice.remedies(walk.walk_pictures, wanted, FULL)
