"""
The dry run (runtime/accountant.py): against tensors of small models, and for README's commands.

What stands always is compared to the byte, a graph with what autograd keeps in real forward passes,
the KV cache with a real one. A command of README that cannot run by our own arithmetic fails here.
Left out: a GPU's own peaks.
"""

import dataclasses
import json
import re
import shlex
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import evaluate
import grpo
import sample
import sft
from model import SMOKE, TOY, Cache, ModelConfig, RMSNorm, UnifiedModel
from runtime import accountant
from runtime.accountant import FusedNorm, kept_bytes, live_bytes, training, values_of
from runtime.config import UserError, parse
from runtime.lora import add_lora, load_trained, trained_parameters
from runtime.pretrained import official_configs, save_model, shape_of
from runtime.sharding import gathered
from toy.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"sft.py": sft, "grpo.py": grpo, "sample.py": sample, "evaluate.py": evaluate}
FULL = ModelConfig()
CONFIG = dataclasses.replace(
    grpo.Config(config="smoke", **grpo.PRESETS["smoke"]),
    tokens_per_pack=2000,
    prompts_per_step=8,
    max_plan_tokens=40,
    kl_beta=0.1,
    average=0.9,
)


def size(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def with_the_norms_of_a_gpu(model):
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            norm.forward = partial(FusedNorm.apply, norm.weight)
    return model


# --------------------------------------------------------------------------------------------------
# against tensors


@pytest.mark.parametrize("train", ["all", "gen", "lora"])
def test_what_stands_always(train):
    """Weights, gradients, moments, average and reference of one process, to the byte."""
    shape, config = ModelConfig(**TOY), dataclasses.replace(CONFIG, train=train)
    model = UnifiedModel(shape)
    if train == "lora":
        add_lora(model, config.lora_rank, 1.0)
    trained = trained_parameters(model, train)
    optimizer = torch.optim.AdamW(trained.values(), 1e-3)
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    states, names = optimizer.state.values(), ("exp_avg", "exp_avg_sq")
    always, *_ = training(config, shape, 1, reference=True)
    assert always["weights, trained"] + always["weights, frozen"] == size(model.parameters())
    gradients = size(p.grad for p in trained.values())
    assert always["gradients"] == gradients == always["average"] == always["reference"]
    assert always["moments"] == size(state[name] for state in states for name in names)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [SMOKE, TOY], ids=["smoke", "toy"])
def test_graphs(shape, checkpointing):
    """What autograd keeps in real forward passes of the prompt, and of the members against it."""
    shape = ModelConfig(**shape)
    model = with_the_norms_of_a_gpu(UnifiedModel(shape))
    model.checkpointing = checkpointing
    whole = accountant.a_group(shape, 2, 32, accountant.fullest(shape, CONFIG), ("full",))
    prompt, members = whole.cut()
    with kept_bytes(model.parameters()) as of_prompt:
        prefix = model.keys_and_values(prompt)
    leaves = [tuple(x.detach().requires_grad_() for x in pair) for pair in prefix]
    with kept_bytes(model.parameters()) as of_members:
        model(members, prefix=leaves, losses=True)
    computed, _ = accountant.graph_bytes(shape, whole, torch.float32, checkpointing, cut=True)
    # checkpoint holds RoPE's cos and sin where no hook sees them
    turn = 2 * len(whole) * shape.head_dim * 4 * checkpointing
    measured = of_prompt.total + of_members.total + turn
    # without checkpointing, this CPU's attention keeps copies of rows and keys where the kernel
    # keeps q, k and v
    assert computed == pytest.approx(measured, rel=0.05 if checkpointing else 0.35)
    assert computed <= measured * 1.05


def test_one_block_again():
    """Of a real block, called with tensors that nobody else holds."""
    shape = ModelConfig(**TOY)
    packed = accountant.a_group(shape, 2, 32)
    model = with_the_norms_of_a_gpu(UnifiedModel(shape))
    kept = kept_bytes(model.parameters())
    model.blocks[0].register_forward_pre_hook(lambda *_: kept.__enter__() and None)
    model.blocks[0].register_forward_hook(lambda *_: kept.__exit__(None, None, None))
    model(packed)
    _, computed = accountant.graph_bytes(shape, packed, torch.float32, True)
    assert computed == pytest.approx(kept.total, rel=0.35) and computed <= kept.total * 1.05


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch with CUDA")
def test_norms_keep_what_the_kernel_of_a_gpu_keeps():
    """By what autograd saves of tensors that are said to be on one."""
    sizes, how = ((6, 8), (8,)), dict(dtype=torch.bfloat16, requires_grad=True)
    with FakeTensorMode():
        x, weight = (torch.empty(*each, device="cuda", **how) for each in sizes)
        node = F.rms_norm(x, (8,), weight, 1e-6).grad_fn
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved = [value for value in saved if isinstance(value, torch.Tensor)]
    x, weight = (torch.empty(*each, device="meta", **how) for each in sizes)
    ours = FusedNorm.apply(weight, x).grad_fn.saved_tensors
    assert size(ours) == size(saved) == 2 * 48 + 2 * 8 + 4 * 6


def test_cache():
    shape = ModelConfig(**SMOKE)
    cache = Cache(UnifiedModel(shape), 100)
    work = dataclasses.replace(CONFIG.held_out, batch=3, thinking=CONFIG.thinking)
    walked = accountant.painting("", shape, torch.float32, {}, work, plans=4, pictures=4)
    prompt = len(accountant.a_group(shape, work.max_references, 32))
    tokens = 3 * (2 * prompt + 4 * (40 + 66))
    counted = walked["paint"]["KV cache"] + walked["paint"]["prompts' KV"]
    assert counted == size((cache.keys, cache.values)) / 100 * tokens


def test_live_bytes_counts_what_stands_at_once():
    x = torch.empty(1000, device="meta")
    with live_bytes() as live:
        y = x + 1  # 4,000 bytes
        y = (y * 2).sum()  # 8,000, then 4 more
        x.add_(1)  # made outside
        z = x.view(10, 100)
    assert live.peak == 8004
    assert live.now == y.nbytes and z.shape == (10, 100)


def test_what_a_clip_takes():
    """The table of CLIPs, against a model of open_clip on the meta device."""
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-32", device="meta")
    shape = ModelConfig(**SMOKE)
    parts = accountant.codec_and_clip(shape, "ViT-B-32:openai")
    assert parts == {"codec": 0, "CLIP": size(clip.parameters())}
    assert accountant.codec_and_clip(shape, "out/toy-clip-metric") == {"codec": 0, "CLIP": 0}


def test_a_clip_of_unknown_size_is_said(capsys):
    config = dataclasses.replace(CONFIG, clip="ViT-H-14:laion2b_s32b_b79k", memory="8x80")
    accountant.dry_run(accountant.walk_grpo, config, ModelConfig(**SMOKE))
    assert "CLIP ViT-H-14 of unknown size, not counted" in capsys.readouterr().out


def test_sharding_divides_what_is_sharded():
    shape = ModelConfig(**SMOKE)
    one, eight = (accountant.walk_grpo(CONFIG, shape, gpus) for gpus in (1, 8))
    for name in ("weights, trained", "gradients", "moments", "average", "reference"):
        assert eight.always[name] == one.always[name] / 8
    assert eight.phases["update"] == one.phases["update"]
    assert one.fits(1) and one.always["CLIP"] == 0  # the toys' have no weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("memory"), UnifiedModel(ModelConfig(**SMOKE))
    tokenizer = train_tokenizer(folder / "tokenizer", model.config.vocab_size)
    save_model(model.initialise(0), tokenizer, folder / "model")
    return str(folder)


@pytest.mark.parametrize("train", ["all", "gen", "lora"])
def test_a_world_of_one_holds_frozen_weights_once(world_of_one, checkpoint, train):
    """What is held, and what is copied to gather it, as walked; to the byte."""
    how = dict(init=checkpoint, train=train, lora_rank=4, precision="bfloat16")
    config = dataclasses.replace(CONFIG, **how)
    model, _ = load_trained(config)

    def held():
        local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
        return {tensor.data_ptr(): tensor.nbytes for tensor in local}

    before, (always, whole, _) = held(), training(config, model.config, 1)
    assert sum(before.values()) == always["weights, frozen"] + always["weights, trained"]
    with gathered(model):
        inside = held()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    copied = sum(size for at, size in inside.items() if at not in before)
    assert copied == 2 * values_of(model, trained=True) == whole["gathered weights"]


# --------------------------------------------------------------------------------------------------
# commands


def readme_commands():
    """(script, its words, GPUs) of each documented command that runs a stage or a model."""
    texts = [(ROOT / "docs" / name).read_text() for name in ("RUNS.md", "DATA.md")]
    texts.append((ROOT / "README.md").read_text().split("## I have one GPU")[1])
    for text in texts:
        blocks = "\n".join(text.split("```")[1::2])
        for line in filter(None, blocks.splitlines()):
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
    memory = [] if "--memory" in words else ["--memory", f"{gpus}x80"]
    return parse(module.Config, module.PRESETS, [*words, *memory])


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
    for command in (("sample.py", 1), ("grpo.py", 1), ("sft.py", 8), ("grpo.py", 8)):
        assert command in found
    alone = [words for script, words, gpus in readme_commands() if (script, gpus) == ("sft.py", 1)]
    assert ["--config", "full"] in [words[:2] for words in alone]  # stage 1 of full on one GPU


# GB of the phase that decides, as in RESULTS.md
PRESETS = [
    ("grpo.py", "--config full", 8, 85.9, "update"),
    ("grpo.py", "--config full --prompts_per_step 128", 64, 47.6, "update"),
    ("grpo.py", "--config full --train gen", 8, 60.1, "update"),
    ("grpo.py", "--config full --train lora", 1, 66.0, "update"),
    ("sft.py", "--config full", 8, 70.8, "strip: paint"),
    ("sft.py", "--config full", 64, 38.9, "strip: paint"),
]


@pytest.mark.parametrize("script, words, gpus, peak, deciding", PRESETS)
def test_the_table_of_the_results(script, words, gpus, peak, deciding):
    config = configured(script, words.split(), gpus)
    walk = accountant.walk_sft if script == "sft.py" else accountant.walk_grpo
    most, phase = walk(config, FULL, gpus).peak
    assert phase == deciding and most / 1e9 == pytest.approx(peak, abs=0.05)


@pytest.mark.parametrize(
    "script, words, memory, expected",
    [
        # as the run itself would, which would have cost a place in the queue
        ("sft.py", "--init BAGEL-7B-MoT", "24x80", "by 24 processes; use --samples_per_step=504"),
        ("grpo.py", "--init BAGEL-7B-MoT", "24x80", "by 24 processes; use --prompts_per_step=24"),
        ("grpo.py", "", "8x80", "update needs 85.9 GB of each GPU, more than 80; .* --train lora"),
        ("grpo.py", "--init out/full-stf", "8x80", "checkpoint folder not found: out/full-stf"),
        ("sample.py", "", "1x16", "decode needs 32.7 GB of each GPU, more than 16; .* --weights"),
        ("grpo.py", "", "8", "memory=8: expected GPUs x GB of each, as 8x80"),
        ("sft.py", "", "0x80", "memory=0x80: expected GPUs x GB"),
    ],
)
def test_refusals_are_one_line(a_folder, capsys, script, words, memory, expected):
    words = ["--config", "full", *words.split(), "--memory", memory]
    with pytest.raises(SystemExit) as left:
        run(script, configured(script, words))
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and line.startswith("error: ") and re.search(expected, line), line


def test_a_shape_is_that_of_the_folder(a_folder):
    assert shape_of("BAGEL-7B-MoT", "toy") == FULL  # a folder's shape is its own
    assert shape_of("out/full-sft", "full", "out/full-sft") == FULL  # still to come
    assert shape_of("ByteDance-Seed/BAGEL-7B-MoT", "full") == FULL  # on the hub
    with pytest.raises(UserError, match="not found: BAGEL-7B"):
        shape_of("BAGEL-7B", "full")
