"""
What a run of stage 2 needs of each GPU, computed without one. Not a concept of the paper.

    python grpo.py --config full --plan --gpus 8 --gpu_memory 80

Weights, gradients, moments and caches are counts times bytes. Activations are not guessed: the real forward pass runs
on PyTorch's meta device, which has shapes and no memory, and what autograd keeps for the backward pass is added up
(tests/test_plan.py does the same with real tensors). Not counted: fragmentation, communication buffers, CUDA itself;
keep a tenth of the card for them.

    trained     float32 shards, gradients, two moments, reference (kl_beta), average
    rollout     + all weights gathered in `precision`, + the KV cache of the groups rolled out at once
    update      + one block gathered and its gradient, + the prompt's graph, + one pack of members
"""

from dataclasses import dataclass, replace

import torch

from engine import Prompt
from model import UnifiedModel
from runtime.config import UserError
from runtime.lora import add_lora
from sequence import Layout, Sequence
from vision import Reference

CLIP = 428e6  # values of ViT-L/14, the reward's CLIP, kept in float32


@dataclass(frozen=True)
class Case:
    """A step's shapes: prompt of `references` pictures of `side` pixels, one group at a time."""

    references: int = 4
    side: int = 1024
    words: int = 60
    plan: int = 150


class kept_bytes:
    """`with kept_bytes() as kept: forward` -> kept.total: bytes that autograd keeps, each storage once."""

    def __init__(self, parameters=()):
        self.seen = {p.untyped_storage()._cdata for p in parameters}
        self.storages = []  # alive, so that no address is given twice
        self.total = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.storages.append(storage)
            self.total += storage.nbytes()
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *rest):
        self.hooks.__exit__(*rest)


def on_meta(packed):
    """A pack without memory."""
    moved = {
        name: value.to("meta")
        for name, value in vars(packed).items()
        if isinstance(value, torch.Tensor)
    }
    moved = {name: value for name, value in moved.items() if name not in ("order", "inverse")}
    return replace(packed, **moved)


def activations(shape, packed, checkpointing, context_rows=0, dtype=torch.bfloat16):
    """Bytes kept for the backward pass of a pack by a model of this shape, and what one block adds while it is computed
    again. context_rows: keys of a prompt that the pack attends to."""
    with torch.device("meta"):
        model = UnifiedModel(shape).to(dtype)
    model.checkpointing, packed = checkpointing, on_meta(packed)
    size = (context_rows, shape.num_key_value_heads, shape.head_dim)
    context = None
    if context_rows:
        context = [
            tuple(torch.empty(size, dtype=dtype, device="meta").requires_grad_() for _ in range(2))
            for _ in model.blocks
        ]
        packed.key_order = torch.empty(context_rows + len(packed), dtype=torch.long, device="meta")
    with kept_bytes(model.parameters()) as whole:
        model(packed, context=context)
    width = shape.hidden_size
    und, gen = (
        torch.empty(n, width, dtype=dtype, device="meta").requires_grad_()
        for n in (len(packed) - len(packed.latent_index), len(packed.latent_index))
    )
    cos = torch.empty(len(packed), 1, shape.head_dim // 2, dtype=dtype, device="meta")
    with kept_bytes(model.parameters()) as block:
        model.blocks[0](und, gen, packed, cos, cos, None, context[0] if context else None)
    return whole.total, block.total if checkpointing else 0


def a_prompt(shape, case):
    """References and words, as the sequence builder lays them out."""
    layout = Layout(0, 1, 2, 3, shape.latent_side, shape.vit_side)
    h, w = shape.picture_grid(case.side, case.side)
    width, height = shape.vit_rule.size(case.side, case.side)
    patches = (height // shape.vit_patch, width // shape.vit_patch)
    reference = Reference(
        torch.empty(h * w, shape.token_channels),
        (h, w),
        torch.empty(patches[0] * patches[1], 3 * shape.vit_patch**2),
        patches,
    )
    return layout, Prompt((*[reference] * case.references, [4] * case.words)), h * w


def packs(shape, case, config):
    """(pack of the prompt, pack of as many members as fit into tokens_per_pack)."""
    layout, prompt, n = a_prompt(shape, case)
    sequence = Sequence(layout)
    with sequence.document():
        prompt.write(sequence)
    shared, members = sequence.pack(), Sequence(layout)
    with members.document():
        while (
            members.length == 0
            or members.length + case.plan + config.window * (n + 2) <= config.tokens_per_pack
        ):
            with members.branch():
                members.text([4] * (case.plan - 2))
                for _ in range(config.window):
                    members.noise(
                        torch.empty(n, shape.token_channels),
                        shape.picture_grid(case.side, case.side),
                        0.5,
                    )
    return shared, members.pack()


def memory(config, shape, gpus, case=Case()):
    """{what: bytes on each GPU} of a step of grpo.py under `config`; "update" and "rollout" are the two peaks."""
    from runtime.lora import trained_parameters

    if gpus % config.replicas:
        raise UserError(f"replicas={config.replicas} does not divide {gpus} GPUs")
    shards, width = gpus // config.replicas, 2 if config.precision == "bfloat16" else 4
    with torch.device("meta"):
        model = UnifiedModel(shape)
    if config.train == "lora":
        add_lora(model, config.lora_rank, config.lora_alpha)
    trained = sum(p.numel() for p in trained_parameters(model, config.train).values())
    everything = sum(p.numel() for p in model.parameters())
    count = lambda module, grad=False: sum(
        p.numel() for p in module.parameters() if p.requires_grad or not grad
    )
    block, block_trained = count(model.blocks[0]), count(model.blocks[0], True)
    inside = sum(count(unit) for unit in (*model.blocks, *model.eye.layers))
    inside_trained = sum(count(unit, True) for unit in (*model.blocks, *model.eye.layers))
    root, root_trained = everything - inside, trained - inside_trained
    _, prompt, n = a_prompt(shape, case)
    shared, members = packs(shape, case, config)
    # bytes a token
    kv = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * width
    painted = config.groups_at_once * min(config.group_size, config.pictures_at_once)
    canvas = painted * len(config.sampler.contexts) * (n + 2)
    cached = (
        2 * config.groups_at_once * len(prompt) + painted * case.plan + canvas
    )  # the prompt's own cache, and a copy
    dtype = getattr(torch, config.precision)
    prompt_kept, prompt_block = activations(shape, shared, config.checkpointing, 0, dtype)
    members_kept, members_block = activations(
        shape, members, config.checkpointing, len(shared), dtype
    )
    codec = sum(p.numel() for p in model.codec.weights.parameters()) if shape.codec == "flux" else 0
    parts = {
        "weights, frozen": width * (everything - trained) / shards,
        "weights, trained": 4 * trained / shards,
        "gradients": 4 * trained / (shards if config.sum_every_pass else 1),
        "moments": 8 * trained / shards,
        "average": 4 * trained / shards * (config.average > 0),
        "reference": 4 * trained / shards * (config.kl_beta > 0),
        "CLIP and codec": 4 * ((CLIP if config.clip_name != "toy" else 0) + codec),
    }
    update = {
        "gathered blocks and root": width * (2 * block + root)
        + (width + 4) * block_trained
        + width * root_trained,
        # and its keys and values as leaves, and their gradients
        "prompt's graph": prompt_kept + 3 * kv * len(shared),
        "members' graph": members_kept,
        "one block again": max(prompt_block, members_block),
    }
    rollout = {
        "gathered weights": width * everything,
        "KV cache": kv * cached,
        "activations": width * canvas * (3 * shape.hidden_size + 3 * shape.intermediate_size),
    }
    always = sum(parts.values())
    return {
        "always": parts,
        "update": update,
        "rollout": rollout,
        "peak of the update": always + sum(update.values()),
        "peak of a rollout": always + sum(rollout.values()),
        "prompt tokens": len(shared),
        "pack tokens": len(members),
    }


def print_plan(config, shape):
    """The table of all three ways to train, in GB (10^9 bytes), and whether they fit."""
    case = Case(references=config.max_references)
    ways = {
        way: memory(replace(config, train=way, train_text=False), shape, config.gpus, case)
        for way in ("all", "gen", "lora")
    }
    first = ways["all"]
    print(
        f"{config.gpus} GPUs of {config.gpu_memory:.0f} GB, {config.precision}, {case.references} references "
        f"({first['prompt tokens']:,} tokens), {config.group_size} members, packs of {first['pack tokens']:,} tokens"
    )
    print(f"{'GB on each GPU':30s}" + "".join(f"{way:>10s}" for way in ways))
    for kind in ("always", "update", "rollout"):
        for name in first[kind]:
            print(
                f"  {name:28s}" + "".join(f"{way[kind][name] / 1e9:10.2f}" for way in ways.values())
            )
    for peak in ("peak of the update", "peak of a rollout"):
        print(f"{peak:30s}" + "".join(f"{way[peak] / 1e9:10.2f}" for way in ways.values()))
    most = {
        name: max(way["peak of the update"], way["peak of a rollout"]) / 1e9
        for name, way in ways.items()
    }
    verdict = {
        name: "fits"
        if peak <= 0.9 * config.gpu_memory
        else "tight"
        if peak <= config.gpu_memory
        else "no"
        for name, peak in most.items()
    }
    print(f"{'fits, a tenth left free':30s}" + "".join(f"{verdict[way]:>10s}" for way in ways))
    return ways
