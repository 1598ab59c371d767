"""
What a run of stage 2 needs of each GPU, computed without one. Not a concept of the paper.

    python -m bench memory --gpus 8 --gpu_memory 80         the preset `full` of grpo.py

Weights, gradients, moments and caches are counts times bytes. Activations are not guessed: the real
forward pass runs on PyTorch's meta device, which has shapes and no memory, and what autograd keeps
for the backward pass is added up (tests/test_memory.py does the same with real tensors).

    always      float32 shards, gradients, two moments, reference (kl_beta), average
    rollout     + all weights gathered in `precision`, + the KV cache of `groups_at_once` groups
    update      + one block gathered and its gradient, + the prompt's graph, + one pack of members

Letters: sequence.py. Left out: fragmentation, communication buffers, CUDA itself; keep a tenth of
the card for them.
"""

from dataclasses import dataclass, replace

import torch

from engine import Prompt
from model import UnifiedModel
from runtime.config import UserError
from runtime.lora import add_lora, trained_parameters
from sequence import Layout, Sequence
from vision import Reference

CLIP = 428e6  # values of ViT-L/14, the reward's CLIP, kept in float32
PEAKS = ("peak of the update", "peak of a rollout")


@dataclass(frozen=True)
class Case:
    """A step's shapes: prompt of `references` pictures of `side` pixels, one group at a time."""

    references: int = 4
    side: int = 1024
    words: int = 60
    plan: int = 150


# --------------------------------------------------------------------------------------------------
# what autograd keeps


class kept_bytes:
    """`with kept_bytes() as kept: forward` -> kept.total: bytes that autograd keeps.

    Each storage counts once, those of `parameters` not at all.
    """

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
    tensors = {k: v for k, v in vars(packed).items() if isinstance(v, torch.Tensor)}
    made = ("order", "inverse")  # by the pack itself
    return replace(packed, **{k: v.to("meta") for k, v in tensors.items() if k not in made})


def activations(shape, packed, checkpointing, *, prefix_rows=0, dtype=torch.bfloat16):
    """(bytes kept for the backward pass of a pack, bytes of one block while it is computed again).

    shape: of the model; prefix_rows: keys of a prompt that the pack attends to.
    """
    with torch.device("meta"):
        model = UnifiedModel(shape).to(dtype)
    model.checkpointing, packed = checkpointing, on_meta(packed)

    def leaf(*size):
        return torch.empty(size, dtype=dtype, device="meta").requires_grad_()

    prefix = None
    if prefix_rows:
        size = (prefix_rows, shape.num_key_value_heads, shape.head_dim)
        prefix = [(leaf(*size), leaf(*size)) for _ in model.blocks]
        packed.key_order = torch.empty(prefix_rows + len(packed), dtype=torch.long, device="meta")
    with kept_bytes(model.parameters()) as whole:
        model(packed, prefix=prefix)
    latents = len(packed.latent_index)
    und = leaf(len(packed) - latents, shape.hidden_size)  # (U, W)
    gen = leaf(latents, shape.hidden_size)  # (L, W)
    cos = torch.empty(len(packed), 1, shape.head_dim // 2, dtype=dtype, device="meta")
    with kept_bytes(model.parameters()) as block:
        model.blocks[0](und, gen, packed, (cos, cos), None, prefix[0] if prefix else None)
    if not checkpointing:
        return whole.total, 0
    return whole.total + turn_bytes(shape, packed, cos.itemsize), block.total


def turn_bytes(shape, packed, width):
    """Bytes of RoPE's cos and sin (N, 1, D / 2): checkpoint holds them where no hook sees them."""
    return len(packed) * shape.head_dim * width


# --------------------------------------------------------------------------------------------------
# a step


def a_prompt(shape, case):
    """(layout, Prompt of empty references and words, latent tokens of a picture)."""
    layout = Layout(0, 1, 2, 3, shape.latent_side, shape.vit_side)
    h, w = shape.picture_grid(case.side, case.side)
    width, height = shape.vit_rule.size(case.side, case.side)
    rows, columns = height // shape.vit_patch, width // shape.vit_patch
    latents = torch.empty(h * w, shape.token_channels)
    patches = torch.empty(rows * columns, 3 * shape.vit_patch**2)
    reference = Reference(latents, (h, w), patches, (rows, columns))
    return layout, Prompt((*[reference] * case.references, [4] * case.words)), h * w


def packs(shape, case, config):
    """(pack of the prompt, pack of as many members as fit into tokens_per_pack)."""
    layout, prompt, n = a_prompt(shape, case)
    sequence = Sequence(layout)
    with sequence.document():
        prompt.write(sequence)
    shared, members = sequence.pack(), Sequence(layout)
    grid, canvas = shape.picture_grid(case.side, case.side), torch.empty(n, shape.token_channels)
    member = case.plan + config.window * (n + 2)
    with members.document():
        while members.length == 0 or members.length + member <= config.tokens_per_pack:
            with members.branch():
                members.text([4] * (case.plan - 2))
                for _ in range(config.window):
                    members.noise(canvas, grid, 0.5)
    return shared, members.pack()


def values_of(module, trained=False):
    """Number of values in the parameters of a module, or in the trained ones of them."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def value_bytes(config):
    """Bytes of one value in the arithmetic of a run."""
    return 2 if config.precision == "bfloat16" else 4


def token_bytes(config, shape):
    """Bytes of the keys and values of one token, in all layers."""
    values = shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return 2 * values * value_bytes(config)


def always(config, model, shards):
    """{what: bytes} that stand on each GPU between the steps.

    model: on the meta device; what is trained requires a gradient.
    """
    everything, trained = values_of(model), values_of(model, trained=True)
    codec = values_of(model.codec.weights) if model.config.codec == "flux" else 0
    return {
        "weights, frozen": value_bytes(config) * (everything - trained) / shards,
        "weights, trained": 4 * trained / shards,
        "gradients": 4 * trained / (shards if config.sum_every_pass else 1),
        "moments": 8 * trained / shards,
        "average": 4 * trained / shards * (config.average > 0),
        "reference": 4 * trained / shards * (config.kl_beta > 0),
        "CLIP and codec": 4 * ((CLIP if config.clip_name != "toy" else 0) + codec),
    }


def of_update(config, model, shared, *, members):
    """{what: bytes} that one update pass adds: the pack of a prompt, and a pack of its members."""
    width, dtype, shape = value_bytes(config), getattr(torch, config.precision), model.config
    units = (*model.blocks, *model.eye.layers)  # sharded by themselves; the rest is the root
    root = values_of(model) - sum(values_of(unit) for unit in units)
    root_trained = values_of(model, True) - sum(values_of(unit, True) for unit in units)
    block, block_trained = values_of(model.blocks[0]), values_of(model.blocks[0], True)
    prompt_kept, prompt_block = activations(shape, shared, config.checkpointing, dtype=dtype)
    members_kept, members_block = activations(
        shape, members, config.checkpointing, prefix_rows=len(shared), dtype=dtype
    )
    gathered = width * (2 * block + root) + (width + 4) * block_trained + width * root_trained
    return {
        "gathered blocks and root": gathered,
        # and its keys and values as leaves, and their gradients
        "prompt's graph": prompt_kept + 3 * token_bytes(config, shape) * len(shared),
        "members' graph": members_kept,
        "one block again": max(prompt_block, members_block),
    }


def of_rollout(config, model, case):
    """{what: bytes} that the rollout of `groups_at_once` groups adds."""
    width, shape = value_bytes(config), model.config
    _, prompt, n = a_prompt(shape, case)
    painted = config.groups_at_once * min(config.group_size, config.pictures_at_once)
    canvas = painted * len(config.sampler.contexts) * (n + 2)
    # the prompt's own cache, and a copy
    cached = 2 * config.groups_at_once * len(prompt) + painted * case.plan + canvas
    return {
        "gathered weights": width * values_of(model),
        "KV cache": token_bytes(config, shape) * cached,
        "activations": width * canvas * (3 * shape.hidden_size + 3 * shape.intermediate_size),
    }


def memory(config, shape, gpus, *, case):
    """{what: bytes on each GPU} of a step of grpo.py; "update" and "rollout" are the two peaks.

    config: a grpo.Config; shape: a ModelConfig; case: the step's shapes. UserError if `replicas`
    does not divide the GPUs.
    """
    if gpus % config.replicas:
        raise UserError(f"replicas={config.replicas} does not divide {gpus} GPUs")
    with torch.device("meta"):
        model = UnifiedModel(shape)
    if config.train == "lora":
        add_lora(model, config.lora_rank, config.lora_alpha)
    trained_parameters(model, config.train)  # marks them
    shared, members = packs(shape, case, config)
    parts = {
        "always": always(config, model, gpus // config.replicas),
        "update": of_update(config, model, shared, members=members),
        "rollout": of_rollout(config, model, case),
    }
    total = {name: sum(part.values()) for name, part in parts.items()}
    return parts | {
        "peak of the update": total["always"] + total["update"],
        "peak of a rollout": total["always"] + total["rollout"],
        "prompt tokens": len(shared),
        "pack tokens": len(members),
    }


def verdict(way, card):
    """Whether the peaks of `memory` fit into a card of `card` GB: "fits" leaves a tenth free."""
    peak = max(way[name] for name in PEAKS) / 1e9
    return "fits" if peak <= 0.9 * card else "tight" if peak <= card else "no"


def print_memory(config, shape):
    """The table of all three ways to train, in GB (10^9 bytes), and whether they fit.

    config: a grpo.Config; shape: a ModelConfig. Returns {way: what `memory` gave}.
    """
    case = Case(references=config.max_references)
    ways = {}
    for way in ("all", "gen", "lora"):
        changed = replace(config, train=way, train_text=False)
        ways[way] = memory(changed, shape, config.gpus, case=case)
    first = ways["all"]
    print(
        f"{config.gpus} GPUs of {config.gpu_memory:.0f} GB, {config.precision}, "
        f"{case.references} references ({first['prompt tokens']:,} tokens), "
        f"{config.group_size} members, packs of {first['pack tokens']:,} tokens"
    )
    print(f"{'GB on each GPU':30s}" + "".join(f"{way:>10s}" for way in ways))
    for kind in ("always", "update", "rollout"):
        for name in first[kind]:
            row = "".join(f"{way[kind][name] / 1e9:10.2f}" for way in ways.values())
            print(f"  {name:28s}{row}")
    for peak in PEAKS:
        print(f"{peak:30s}" + "".join(f"{way[peak] / 1e9:10.2f}" for way in ways.values()))
    verdicts = "".join(f"{verdict(way, config.gpu_memory):>10s}" for way in ways.values())
    print(f"{'fits, a tenth left free':30s}{verdicts}")
    return ways
