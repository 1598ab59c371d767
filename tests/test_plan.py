"""The memory plan against real tensors of small models."""

import dataclasses

import pytest
import torch

import grpo
from bench import memory
from model import SMOKE, TOY, Cache, ModelConfig, UnifiedModel
from runtime import lora

CONFIG = dataclasses.replace(
    grpo.Config(config="smoke", **grpo.PRESETS["smoke"]),
    tokens_per_pack=2000,
    kl_beta=0.1,
    average=0.9,
)
CASE = memory.Case(references=2, side=32, words=20, plan=40)


@pytest.mark.parametrize("shape", [SMOKE, TOY], ids=["smoke", "toy"])
@pytest.mark.parametrize("train", ["all", "gen", "lora"])
def test_what_stands_always(shape, train):
    """Weights, gradients, moments, average and reference of one process, against the bytes of the tensors themselves."""
    from runtime.lora import add_lora

    shape, config = ModelConfig(**shape), dataclasses.replace(CONFIG, train=train)
    model = UnifiedModel(shape)
    if train == "lora":
        add_lora(model, config.lora_rank, config.lora_alpha)
    trained = lora.trained_parameters(model, train)
    optimizer = torch.optim.AdamW(trained.values(), 1e-3)
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    size = lambda tensors: sum(tensor.nbytes for tensor in tensors)
    moments = [
        state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]
    always = memory.memory(config, shape, 1, CASE)["always"]
    assert always["weights, trained"] + always["weights, frozen"] == size(model.parameters())
    assert (
        always["gradients"]
        == size(p.grad for p in trained.values())
        == always["average"]
        == always["reference"]
    )
    assert always["moments"] == size(moments)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [SMOKE, TOY], ids=["smoke", "toy"])
def test_activations(shape, checkpointing):
    """What autograd keeps in a real forward pass of the prompt, and of the members against it."""
    shape = ModelConfig(**shape)
    model = UnifiedModel(shape)
    model.checkpointing = checkpointing
    shared, members = memory.packs(shape, CASE, CONFIG)
    with memory.kept_bytes(model.parameters()) as prompt:
        context = model.keys_and_values(shared)
    leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in context]
    members.key_order = torch.arange(len(shared) + len(members))
    members.mask = type(members.mask)(
        members.mask.q_hi + len(shared),
        torch.cat([shared.mask.k_hi * 0 + 10**6, members.mask.k_hi + len(shared)]),
        torch.arange(len(members)) + len(shared),
    )
    with memory.kept_bytes(model.parameters()) as rest:
        model(members, context=leaves)
    computed = [
        memory.activations(shape, pack, checkpointing, rows, torch.float32)[0]
        for pack, rows in ((shared, 0), (members, len(shared)))
    ]
    measured = [prompt.total, rest.total]
    # without checkpointing, this CPU's attention keeps copies of rows and keys where the kernel keeps q, k and v
    assert computed == pytest.approx(measured, rel=0.05 if checkpointing else 0.35)
    assert all(a <= b * 1.05 for a, b in zip(computed, measured))


def test_cache():
    shape = ModelConfig(**SMOKE)
    cache = Cache(UnifiedModel(shape), 100)
    rollout = memory.memory(CONFIG, shape, 1, CASE)["rollout"]
    tokens = 2 * CONFIG.groups_at_once * len(
        memory.a_prompt(shape, CASE)[1]
    ) + CONFIG.groups_at_once * CONFIG.group_size * (40 + 66)
    assert rollout["KV cache"] == (cache.keys.nbytes + cache.values.nbytes) / 100 * tokens


def test_sharding_divides_what_is_sharded():
    shape = ModelConfig(**SMOKE)
    one, eight = (
        memory.memory(dataclasses.replace(CONFIG, sum_every_pass=True), shape, gpus, CASE)
        for gpus in (1, 8)
    )
    for name in ("weights, trained", "gradients", "moments", "average", "reference"):
        assert eight["always"][name] == one["always"][name] / 8
    assert eight["rollout"] == one["rollout"] and eight["update"] == one["update"]


def test_the_plan_of_the_full_preset(capsys):
    """It needs no GPU and no memory, and says whether each way of training fits."""
    grpo.train(grpo.Config(config="full", plan=True, gpus=8, gpu_memory=80))
    out = capsys.readouterr().out
    assert "36,062 tokens" in out and "weights, trained" in out and "fits" in out.splitlines()[-1]
