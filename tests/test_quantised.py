"""
Weights in 8 and 4 bits: how much they change what the model says, adapters that are trained beside
them, and what people are told.

Skipped without bitsandbytes: pip install bitsandbytes
"""

import copy
import dataclasses
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import forked
import pytest
import torch
from torch.optim import AdamW

import bench.model as case
import grpo
import sft
from engine import Branch, Group, Thinking
from model import SMOKE, ModelConfig, UnifiedModel
from runtime import accountant, loop, quantised
from runtime.config import UserError
from runtime.lora import add_adapter, load_trained, trained_parameters
from runtime.pretrained import load_model, save_model
from runtime.quantised import BYTES, count, load_quantised, quantise, quantised_layers
from runtime.state import TrainingState
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
    values, kept = accountant.values_of(model), sum(p.nbytes for p in model.parameters())
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


# --------------------------------------------------------------------------------------------------
# adapters beside them


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a model of random weights, which has something to say about every latent."""
    folder, model = tmp_path_factory.mktemp("quantised"), UnifiedModel(ModelConfig(**SMOKE))
    model.initialise(0)
    model.latent_out.weight.data.normal_(0, 0.1)
    save_model(model, toy_tokenizer(folder, model.config.vocab_size), folder / "model")
    return str(folder)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradients_of_adapters_are_those_beside_what_the_weights_act_as(bitsandbytes, kind):
    """W is found by asking for the identity; B A is added to it."""
    torch.manual_seed(0)
    expert = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 128)})
    model = SimpleNamespace(blocks=[SimpleNamespace(und=expert, gen=torch.nn.Module())])
    quantise(model, kind)
    layer = expert.to("cpu")["q_proj"]
    layer.requires_grad_(False)
    acts = (layer(torch.eye(64)) - layer.bias).T  # (out, in)
    add_adapter(layer, 4, 8.0)
    x, y = torch.randn(10, 64), torch.randn(10, 128)
    assert torch.equal(layer(x), layer(x)) and not layer.lora_b.any()
    torch.nn.init.normal_(layer.lora_a), torch.nn.init.normal_(layer.lora_b)
    (layer(x) * y).sum().backward()
    a, b = (one.detach().clone().requires_grad_() for one in (layer.lora_a, layer.lora_b))
    expected = x @ (acts + 2.0 * b @ a).T + layer.bias
    (expected * y).sum().backward()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0.2 if kind == "int8" else 1e-4)
    for one, ours in ((a, layer.lora_a), (b, layer.lora_b)):
        torch.testing.assert_close(ours.grad, one.grad, rtol=1e-4, atol=1e-4)


FEW = {
    "sft": dict(
        samples_per_step=4, sample_plan_tokens=4, sample_timesteps=2, warmup=0, average=0.0
    ),
    "grpo": dict(prompts_per_step=2, eval_samples=2),
}


def smoke(script, checkpoint, out, **options):
    """A stage of a step or two from the checkpoint, as its Config."""
    module = {"sft": sft, "grpo": grpo}[script]
    how = dict(init=checkpoint, out=str(out), train="lora", lora_rank=4, threads=1, steps=1)
    values = module.PRESETS["smoke"] | FEW[script] | how | options
    return module.Config(config="smoke", **values)


def kernel_of_a_gpu(bnb, monkeypatch):
    """LLM.int8 as a GPU has it, which rounds activations too; a CPU takes another for training."""
    functions = sys.modules["bitsandbytes.autograd._functions"]

    def matmul(a, b, out=None, state=None, threshold=0.0, bias=None):
        state.threshold = threshold or state.threshold
        return functions.MatMul8bitLt.apply(a, b, out, bias, state)

    monkeypatch.setattr(bnb, "matmul", matmul)


@pytest.mark.parametrize("kind, on_gpu", [("nf4", False), ("int8", False), ("int8", True)])
def test_blocks_that_are_computed_again_keep_no_inputs(bitsandbytes, monkeypatch, kind, on_gpu):
    """Of any layer, and the gradients are those without."""
    if on_gpu:
        kernel_of_a_gpu(bitsandbytes, monkeypatch)
    torch.manual_seed(0)
    expert = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in ("q_proj", "o_proj")})
    quantise(SimpleNamespace(blocks=[SimpleNamespace(und=expert, gen=torch.nn.Module())]), kind)
    layers, kept = list(expert.to("cpu").values()), []
    for layer in layers:
        layer.requires_grad_(False)
        add_adapter(layer, 4, 8.0)
        torch.nn.init.normal_(layer.lora_a), torch.nn.init.normal_(layer.lora_b)

    def block(x):
        for layer in layers:
            x = torch.sin(x)
            kept.append(weakref.ref(x))
            x = layer(x)
        return x

    found, x = [], torch.randn(10, 64)
    for again in (True, False):
        for layer in layers:
            layer.lora_a.grad = layer.lora_b.grad = None
        leaf, before = x.clone().requires_grad_(), len(kept)
        y = (
            torch.utils.checkpoint.checkpoint(block, leaf, use_reentrant=False)
            if again
            else block(leaf)
        )
        assert again == all(one() is None for one in kept[before:])
        y.square().sum().backward()
        found.append([leaf.grad, *(p.grad for one in layers for p in (one.lora_a, one.lora_b))])
    assert all(torch.equal(one, two) for one, two in zip(*found))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_stage_1_trains_adapters_goes_on_and_merges_into_the_checkpoint(
    bitsandbytes, checkpoint, tmp_path, kind
):
    whole = smoke("sft", checkpoint, tmp_path / "whole", weights=kind, steps=2)
    half = smoke("sft", checkpoint, tmp_path / "half", weights=kind, save_every=1)
    sft.train(whole), sft.train(half)
    sft.train(dataclasses.replace(half, steps=2))
    folders = checkpoint, whole.out, half.out
    before, one, two = (dict(load_model(path)[0].named_parameters()) for path in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)  # resumed
    adapters = trained_parameters(load_trained(whole)[0], "lora")
    TrainingState(adapters, AdamW(adapters.values()), {}).load(whole.out, 2)
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_b" in adapters:
            b, a = (adapters[f"{layer}.lora_{part}"] for part in "ba")
            assert b.any()
            value = value + 2.0 * (b @ a)
        assert torch.equal(one[name], value), name


def test_two_processes_hold_rounded_weights_each_and_share_the_adapters(
    bitsandbytes, checkpoint, tmp_path
):
    lines = []
    for world in (1, 2):
        words = "--config smoke --train lora --lora_rank 4 --weights nf4 --steps 2 --threads 1"
        words += " --samples_per_step 4 --sample_plan_tokens 4 --sample_timesteps 2 --init"
        forked.run(
            "sft.py", *words.split(), checkpoint, "--out", tmp_path / str(world), processes=world
        )
        lines.append(loop.read_log(tmp_path / str(world)))
    for one, two in zip(*lines):
        for name in ("ce", "mse", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)
    assert len(lines[1]) == 2 and lines[1][1]["mse"] != lines[1][0]["mse"]


@pytest.mark.parametrize(
    "kind, options", [("int8", dict(likelihood="sde", window=1)), ("nf4", dict(kl_beta=0.1))]
)
def test_stage_2_trains_beside_them(bitsandbytes, checkpoint, tmp_path, monkeypatch, kind, options):
    def rewards(_, images, __, groups):
        return torch.randn(groups, len(images) // groups)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo, "group_rewards", rewards)
    grpo.train(smoke("grpo", checkpoint, "run", weights=kind, **options))
    (line,) = loop.read_log("run")
    assert line["grad_norm"] > 0


def test_what_cannot_be_trained_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="weights=nf4 rounds what is frozen.*add --train lora"):
        smoke("sft", checkpoint, tmp_path / "run", weights="nf4", train="gen")


def test_without_the_library_no_folder_is_made(monkeypatch, checkpoint, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    for script, stage in (("sft", sft), ("grpo", grpo)):
        with pytest.raises(SystemExit) as refused:
            stage.train(smoke(script, checkpoint, tmp_path / "run", weights="nf4"))
        assert refused.value.code == 2 and "pip install bitsandbytes" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_the_codec_goes_where_the_weights_go(bitsandbytes, monkeypatch, tmp_path):
    """It is no part of the module."""
    monkeypatch.setattr(quantised, "quantise", lambda *_: None)  # such weights cannot be on meta
    flux = dict(codec="flux", vae_multipliers=(1, 1), vae_channels=32, vae_blocks=1)
    shape = ModelConfig(**(SMOKE | flux))
    model = UnifiedModel(shape).initialise(0)
    save_model(model, toy_tokenizer(tmp_path, shape.vocab_size), tmp_path / "model")
    found, _ = load_quantised(tmp_path / "model", torch.device("meta"), torch.bfloat16, kind="nf4")
    assert all(p.is_meta for p in found.codec.weights.parameters())


def test_what_is_walked_is_held(bitsandbytes, checkpoint, world_of_one):
    """Bytes of weights of one process, without the scales of small blocks' scales."""
    for kind, width in (("int8", 1.0), ("nf4", 0.5)):
        config = smoke("grpo", checkpoint, "run", weights=kind, precision="bfloat16")
        model, _ = load_trained(config)
        always, *_ = accountant.training(config, model.config, 1)
        walked = always["weights, frozen"] + always["weights, trained"]
        held = sum(p.nbytes for p in model.parameters())
        narrow = sum(
            layer.in_features * layer.out_features for *_, layer in quantised_layers(model)
        )
        assert walked - held == (BYTES[kind] - width) * narrow
        on_meta = accountant.model_of(model.config, train="lora", lora_rank=4)
        assert count(model.parameters()) == accountant.values_of(on_meta)


# --------------------------------------------------------------------------------------------------
# what people are told


def test_it_says_what_it_needs(monkeypatch, drawn):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    with pytest.raises(UserError, match="--weights nf4 needs .*pip install bitsandbytes"):
        quantise(drawn[0].model, "nf4")
    with pytest.raises(UserError, match="needs bitsandbytes"):  # before anything is read
        load_quantised("nowhere", torch.device("cpu"), torch.bfloat16, kind="nf4")


def test_what_trains_on_small_cards():
    """Computed: README's settings for 24 GB."""
    how = dict(config="full", train="lora", weights="nf4", max_references=1)
    stage_1 = sft.Config(init="BAGEL-7B-MoT", tokens_per_pack=13_498, **how)
    assert accountant.walk_sft(stage_1, FULL, 1).fits(24)
    rounded_less = dataclasses.replace(stage_1, weights="int8")
    assert not accountant.walk_sft(rounded_less, FULL, 1).fits(24)
    how |= dict(lora_rank=16, picture_side=512, pictures_at_once=1, tokens_per_pack=16_384)
    assert accountant.walk_grpo(grpo.Config(**how), FULL, 1).fits(24)


def test_what_fits_small_cards():
    """Computed: the walk of a picture with one reference of 1024 pixels."""
    config = partial(Config, ref=("a.png",), text_guidance=4.0)
    for card, refused, fits in ((24, "full", "int8"), (16, "int8", "nf4")):
        for kind, expected in ((refused, False), (fits, True)):
            found = accountant.walk_painting(config(weights=kind), FULL, 1)
            assert found.fits(card) == expected, (card, kind)
