"""
The memory of a run of stage 2, as bench/ computes it, against tensors of small models.

What stands always is compared to the byte, the graphs of prompt and members with what autograd
keeps in a real forward pass, the KV cache with a real one. Left out: a GPU's own peaks.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import grpo
from bench import memory, walk
from bench.__main__ import Config, bench_memory
from model import SMOKE, TOY, Cache, ModelConfig, RMSNorm, UnifiedModel
from runtime.lora import add_lora, load_trained, trained_parameters
from runtime.pretrained import save_model
from runtime.sharding import gathered
from toy.tokenizer import train_tokenizer

CONFIG = dataclasses.replace(
    grpo.Config(config="smoke", **grpo.PRESETS["smoke"]),
    tokens_per_pack=2000,
    prompts_per_step=8,
    max_plan_tokens=40,
    kl_beta=0.1,
    average=0.9,
)
CASE = memory.Case(references=2, side=32, words=20, plan=40)


def size(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("shape", [SMOKE, TOY], ids=["smoke", "toy"])
@pytest.mark.parametrize("train", ["all", "gen", "lora"])
def test_what_stands_always(shape, train):
    """Weights, gradients, moments, average and reference of one process, to the byte."""
    shape, config = ModelConfig(**shape), dataclasses.replace(CONFIG, train=train)
    model = UnifiedModel(shape)
    if train == "lora":
        add_lora(model, config.lora_rank, config.lora_alpha)
    trained = trained_parameters(model, train)
    optimizer = torch.optim.AdamW(trained.values(), 1e-3)
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    states, names = optimizer.state.values(), ("exp_avg", "exp_avg_sq")
    always = memory.always(config, memory.model_of(shape, train, config.lora_rank), 1)
    assert always["weights, trained"] + always["weights, frozen"] == size(model.parameters())
    gradients = size(p.grad for p in trained.values())
    assert always["gradients"] == gradients == always["average"] == always["reference"]
    assert always["moments"] == size(state[name] for state in states for name in names)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [SMOKE, TOY], ids=["smoke", "toy"])
def test_activations(shape, checkpointing):
    """What autograd keeps in a real forward pass of the prompt, and of the members against it."""
    shape = ModelConfig(**shape)
    model = memory.fuse_norms(UnifiedModel(shape))
    model.checkpointing = checkpointing
    shared, members = memory.packs(shape, CASE, CONFIG)
    with memory.kept_bytes(model.parameters()) as prompt:
        prefix = model.keys_and_values(shared)
    leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in prefix]
    with memory.kept_bytes(model.parameters()) as rest:
        model(members, prefix=leaves, losses=True)
    computed = [
        memory.activations(shape, pack, checkpointing, dtype=torch.float32, **how)[0]
        for pack, how in ((shared, dict(keys=True)), (members, dict(prefix_rows=len(shared))))
    ]
    measured = [prompt.total, rest.total]
    if checkpointing:
        for i, pack in enumerate((shared, members)):
            measured[i] += memory.turn_bytes(shape, pack, 4)
    # without checkpointing, this CPU's attention keeps copies of rows and keys where the kernel
    # keeps q, k and v
    assert computed == pytest.approx(measured, rel=0.05 if checkpointing else 0.35)
    assert all(a <= b * 1.05 for a, b in zip(computed, measured))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch with CUDA")
def test_norms_keep_what_the_kernel_of_a_gpu_keeps():
    """By what autograd saves of tensors that are said to be on one."""
    how = dict(dtype=torch.bfloat16, requires_grad=True)
    with FakeTensorMode():
        x, weight = (torch.empty(*some, device="cuda", **how) for some in ((6, 8), (8,)))
        node = F.rms_norm(x, (8,), weight, 1e-6).grad_fn
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved = [one for one in saved if isinstance(one, torch.Tensor)]
    norm = memory.fuse_norms(torch.nn.ModuleList([RMSNorm(8, 1e-6).bfloat16()]))[0]
    with memory.kept_bytes() as kept:
        norm(torch.randn(6, 8, **how))
    assert kept.total == size(saved) == 2 * 48 + 2 * 8 + 4 * 6


def test_cache():
    shape = ModelConfig(**SMOKE)
    cache = Cache(UnifiedModel(shape), 100)
    work = walk.rollout_work(CONFIG)
    parts = {phase.name: phase.parts for phase in walk.painting(shape, work, {})}["paint"]
    prompt = len(memory.a_prompt(shape, work.case)[1])
    tokens = CONFIG.groups_at_once * (2 * prompt + CONFIG.group_size * (40 + 66))
    found = parts["KV cache"] + parts["prompts' KV"]
    assert found == size((cache.keys, cache.values)) / 100 * tokens


def test_sharding_divides_what_is_sharded():
    shape = ModelConfig(**SMOKE)
    config = dataclasses.replace(CONFIG, sum_every_pass=True, groups_at_once=1)
    one, eight = (walk.walk_grpo(dataclasses.replace(config, gpus=gpus), shape) for gpus in (1, 8))
    for name in ("weights, trained", "gradients", "moments", "average", "reference"):
        assert eight.always[name] == one.always[name] / 8
    assert eight.phases == one.phases


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("memory"), UnifiedModel(ModelConfig(**SMOKE))
    tokenizer = train_tokenizer(folder / "tokenizer", model.config.vocab_size)
    save_model(model.initialise(0), tokenizer, folder / "model")
    return str(folder)


@pytest.mark.parametrize("train", ["all", "gen", "lora"])
def test_a_world_of_one_holds_frozen_weights_once(world_of_one, checkpoint, train):
    """What is held, and what is copied to gather it, as walked; to the byte."""
    how = dict(init=checkpoint, train=train, lora_rank=4, precision="bfloat16", gpus=1)
    config = dataclasses.replace(CONFIG, **how)
    model, _ = load_trained(config)

    def held():
        local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
        return {tensor.data_ptr(): tensor.nbytes for tensor in local}

    before, on_meta = held(), memory.model_of(model.config, train, config.lora_rank)
    always = memory.always(config, on_meta, 1)
    assert sum(before.values()) == always["weights, frozen"] + always["weights, trained"]
    with gathered(model):
        inside = held()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    copied = sum(size for at, size in inside.items() if at not in before)
    assert copied == 2 * memory.values_of(on_meta, trained=True)
    assert copied == walk.gathered(config, on_meta)["gathered weights"]


def test_the_table_of_the_full_preset(capsys):
    """It needs no GPU and no memory, and says whether each way of training fits."""
    peaks = bench_memory(Config(gpus=8, gpu_memory=80.0))
    assert list(peaks) == ["all", "gen", "lora"]
    out = capsys.readouterr().out
    assert "36,062" in out and "weights, trained" in out and "fits" in out.splitlines()[-1]
