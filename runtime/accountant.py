"""
A dry run: what each phase of a command holds on a GPU, computed at true shapes without one.

    python grpo.py --config full --memory 8x80      on 8 GPUs of 80 GB; also sft, sample, evaluate

prints the phases that can decide (plans are written, pictures painted and decoded; the update; a
strip of pictures) and refuses in one line what cannot fit.

Weights, gradients, moments and caches are counts times bytes. Passes are measured: the real code
runs on PyTorch's meta device, which has shapes and no memory. Every plan is as long as it may be,
every prompt has `max_references` pictures of the largest side. Not a concept of the paper.
Letters: sequence.py. Left out: rewards, saving and the final table, which hold less; the host;
fragmentation, communication buffers, CUDA itself: a tenth of the card is kept free for them.
"""

import re
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import Branch, Group, Noised, Prompt, lay_out
from model import MAX_LOGITS, Cache, RMSNorm, UnifiedModel
from runtime.config import UserError
from runtime.lora import add_lora, trained_parameters
from runtime.processes import share
from runtime.quantised import BYTES, quantised_layers
from sequence import Layout
from tree import split_members
from vision import Reference

SPARE = 0.9  # of a card; the rest is for what is left out
WORDS, PLAN = 60, 150  # tokens of an instruction; of a plan in stage 1
# bytes in the text loss: logits as they are, in float32, normalised, two gradients
LOGITS = 16 * MAX_LOGITS
CLIPS = {"ViT-L-14": 1_710_466_052, "ViT-B-32": 605_109_252}  # bytes of their weights
UNKNOWN = "of unknown size, not counted"
LESS = (  # what always helps
    "less is needed with --train lora, --weights nf4, smaller --tokens_per_pack or "
    "--pictures_at_once, fewer --max_references, more GPUs"
)


@dataclass(frozen=True)
class Walk:
    """A walked command."""

    always: dict  # {what: bytes} that stand between the phases
    phases: dict  # {phase: {what: bytes} beside them}

    @property
    def peak(self):
        """(bytes, phase) of the phase that decides: it holds most."""
        always = sum(self.always.values())
        return max((always + sum(parts.values()), name) for name, parts in self.phases.items())

    def fits(self, card, spare=SPARE):
        """Whether every phase fits into a card of `card` GB."""
        return self.peak[0] <= spare * card * 1e9


def dry_run(walk, config, shape):
    """Print the phases of a command in GB (10^9 bytes); UserError if they cannot fit.

    walk: a walk_... below.
    """
    given = re.fullmatch(r"([1-9]\d*)x(\d+\.?\d*)", config.memory)
    if not given:
        raise UserError(f"memory={config.memory}: expected GPUs x GB of each, as 8x80")
    card, walked = float(given[2]), walk(config, shape, int(given[1]))
    print(f"{'GB on each GPU, computed':26s}{'own':>8s}{'peak':>8s}  of it")
    always = sum(walked.always.values())
    for phase, parts in {"always": walked.always, **walked.phases}.items():
        own, before = sum(parts.values()), always * (phase != "always")
        listed = [f"{what} {size / 1e9:.2f}" for what, size in parts.items() if size >= 5e6]
        listed += [what for what in parts if UNKNOWN in what]
        print(f"{phase:26s}{own / 1e9:8.2f}{(before + own) / 1e9:8.2f}  {', '.join(listed)}")
    peak, phase = walked.peak
    word = "fits" if walked.fits(card) else "tight" if walked.fits(card, spare=1.0) else "no"
    print(f"decides: {phase}, {peak / 1e9:.1f} GB of {card:g}; fits, a tenth left free: {word}")
    if word == "no":
        raise UserError(
            f"{phase} needs {peak / 1e9:.1f} GB of each GPU, more than {card:g}; {LESS}"
        )


# --------------------------------------------------------------------------------------------------
# passes, measured on the meta device


class kept_bytes(torch.autograd.graph.saved_tensors_hooks):
    """`with kept_bytes(parameters) as kept: forward` -> kept.total: bytes that autograd keeps.

    Each storage counts once, those of the parameters not at all.
    """

    def __init__(self, parameters):
        super().__init__(self._keep, lambda tensor: tensor)
        self.seen = {p.untyped_storage()._cdata for p in parameters}
        self.storages, self.total = [], 0  # alive, so that no address is given twice

    def __enter__(self):
        super().__enter__()
        return self

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.storages.append(storage)
            self.total += storage.nbytes()
        return tensor


class live_bytes(TorchDispatchMode):
    """`with live_bytes() as live: ...` -> live.peak: most bytes of the storages made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}  # {address of a storage: bytes that it counts}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._meet((args, kwargs or {}), made=False)
        result = function(*args, **(kwargs or {}))
        self._meet(result, made=True)
        return result

    def _meet(self, values, made):
        for storage in (x.untyped_storage() for x in tree_leaves(values) if torch.is_tensor(x)):
            if storage._cdata not in self.known:
                self.known[storage._cdata] = size = storage.nbytes() * made
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._leave, storage._cdata)

    def _leave(self, address):
        self.now -= self.known.pop(address)


class FusedNorm(torch.autograd.Function):
    """F.rms_norm as a GPU has it: one kernel, which keeps its input and a number a row for the
    backward pass. On the meta device PyTorch takes it apart, and keeps float32 copies."""

    @staticmethod
    def forward(ctx, weight, x):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


@cache
def model_of(shape, dtype=torch.float32, *, train="all", lora_rank=0):
    """The model on the meta device, with a GPU's norms; what is trained requires a gradient."""
    with torch.device("meta"):
        model = UnifiedModel(shape).to(dtype)
    if train == "lora":
        add_lora(model, lora_rank, 1.0)
    trained_parameters(model, train)  # marks them
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            norm.forward = partial(FusedNorm.apply, norm.weight)
    return model


def on_meta(packed):
    """A pack without memory."""
    tensors = {k: v for k, v in vars(packed).items() if isinstance(v, torch.Tensor)}
    made = ("order", "inverse")  # by the pack itself
    return replace(packed, **{k: v.to("meta") for k, v in tensors.items() if k not in made})


@torch.no_grad()
def forward_bytes(shape, packed, dtype, slots):
    """Most bytes in a pass without gradients, beside weights and a cache of so many slots."""
    model, packed = model_of(shape, dtype), on_meta(packed)
    with torch.device("meta"):
        cache = Cache(model, slots)
    with live_bytes() as live:
        model(packed, cache)
    return live.peak


def graph_bytes(shape, packed, dtype, checkpointing, *, cut=False):
    """(bytes kept for the backward pass of a pack, bytes of one block that is computed again).

    cut: the pack is a tree of GRPO's update, its prompt computed first (tree.cut_prompt).
    """
    packs = [on_meta(pack) for pack in (packed.cut() if cut else (packed,))]

    def kept(layers, checkpointing):
        model = model_of(replace(shape, num_hidden_layers=layers), dtype)
        model.checkpointing, leaves = checkpointing, None
        with kept_bytes(model.parameters()) as graph:
            if cut:
                prompt = model.keys_and_values(packs[0])
                leaves = [[x.detach().requires_grad_() for x in layer] for layer in prompt]
            model(packs[-1], prefix=leaves, losses=True)
        return graph.total

    whole = kept(shape.num_hidden_layers, checkpointing)
    if not checkpointing:
        return whole, 0
    # RoPE's cos and sin: checkpoint holds them where no hook sees them
    turn = len(packed) * shape.head_dim * dtype.itemsize
    return whole + 2 * turn, kept(2, False) - kept(1, False) + turn


@torch.no_grad()
def codec_bytes(shape, side):
    """Most bytes while a square picture is decoded; encoding it takes less."""
    if shape.codec != "flux":
        return 12 * side**2
    codec, grid = model_of(shape).codec, side // shape.codec_factor
    with live_bytes() as live:
        codec.decode(torch.empty(shape.latent_channels, grid, grid, device="meta"))
    return live.peak


# --------------------------------------------------------------------------------------------------
# what is computed at once


@cache
def a_group(shape, references, side, branches=(), contexts=()):
    """The pack of a prompt of empty references and words, and what stands behind it.

    side: pixels of all pictures. branches: for each plan (its tokens, 0 for none; noised pictures).
    """
    layout = Layout(0, 1, 2, 3, shape.latent_side, shape.vit_side)
    h, w = shape.picture_grid(side, side)
    width, height = shape.vit_rule.size(side, side)
    rows, columns = height // shape.vit_patch, width // shape.vit_patch
    latents = torch.empty(h * w, shape.token_channels)
    patches = torch.empty(rows * columns, 3 * shape.vit_patch**2)
    reference, noised = Reference(latents, (h, w), patches, (rows, columns)), Noised(latents, 0.5)
    prompt = Prompt((*[reference] * references, [4] * WORDS))
    behind = tuple(
        Branch([4] * (plan - 2) if plan else None, (noised,) * n) for plan, n in branches
    )
    return lay_out(layout, [Group(prompt, (h, w), behind)], contexts)[0]


def token_bytes(shape, dtype):
    """Bytes of the keys and values of one token, in all layers."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * dtype.itemsize


def painting(name, shape, dtype, base, work, *, plans=1, pictures=1):
    """{phase: {what: bytes}} from prompts to pictures. base: {what: bytes} in all of them.

    work: batch, max_references, side, sampler and thinking of what is painted at once, as those of
    a studies.metrics.HeldOut; plans, pictures: of each prompt, at once.
    """
    plan, contexts = work.thinking.max_tokens if work.thinking else 0, work.sampler.contexts
    prompt = a_group(shape, work.max_references, work.side)
    branches = ((plan, 1),) * pictures
    whole = a_group(shape, work.max_references, work.side, branches, contexts)
    canvas = whole.select(whole.rows_of("noised"))
    token, rows = work.batch * token_bytes(shape, dtype), work.batch * plans
    keys = {"prompts' KV": token * len(prompt) * (plan > 0)}  # each plan has a cache of its own
    think = {
        "KV cache": token * (len(prompt) + plans * plan),
        # in bfloat16, float32, divided by the temperature, as probabilities
        "logits": 14 * rows * shape.vocab_size * (plan > 0),
    }
    paint = {
        "KV cache": token * len(whole),
        "pass": work.batch * forward_bytes(shape, canvas, dtype, len(whole)),
    }
    return {
        f"{name}think": base | keys | think,
        f"{name}paint": base | keys | paint,
        f"{name}decode": base | {"codec": codec_bytes(shape, work.side)},
    }


def fullest(shape, config):
    """The branches of the fullest pack of members, as tree.plant cuts a group."""
    tokens, grid = config.max_plan_tokens, shape.picture_grid(*[config.picture_side] * 2)
    pictures = max(split_members([tokens] * config.plans_per_group, grid, config), key=len)
    plans = Counter(member // config.pictures_per_plan for member, _ in pictures)
    return tuple((tokens, number) for number in plans.values())


# --------------------------------------------------------------------------------------------------
# what a model holds, and the commands


def values_of(module, trained=False):
    """Number of values in the parameters of a module, or in the trained ones of them."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def held_bytes(model, values, dtype, kind):
    """Bytes of so many values of a model; kind: "full", or what the experts among them are rounded
    to (runtime/quantised.py)."""
    if kind == "full":
        return dtype.itemsize * values
    narrow = sum(layer.weight.numel() for *_, layer in quantised_layers(model))
    return dtype.itemsize * (values - narrow) + BYTES[kind] * narrow


def codec_and_clip(shape, clip=""):
    """{what: bytes} of the codec and of a CLIP, in float32; a toy's, a folder, counts nothing."""
    codec = 4 * values_of(model_of(shape).codec.weights) if shape.codec == "flux" else 0
    name, colon, _ = clip.partition(":")
    what = f"CLIP {name} {UNKNOWN}" if colon and name not in CLIPS else "CLIP"
    return {"codec": codec, what: CLIPS.get(name, 0)}


def training(config, shape, gpus, *, reference=False):
    """(what stands between the steps, gathered weights, what is gathered in an update) of a run's
    model on each GPU: {what: bytes}, all three. config: of sft.py or grpo.py."""
    if gpus % config.replicas:
        raise UserError(f"replicas={config.replicas} does not divide {gpus} GPUs")
    model = model_of(shape, train=config.train, lora_rank=config.lora_rank)
    dtype, shards = getattr(torch, config.precision), gpus // config.replicas
    trained, in_full = values_of(model, trained=True), config.weights == "full"
    frozen = held_bytes(model, values_of(model) - trained, dtype, config.weights)
    shard = 4 * trained / shards
    always = {
        "weights, frozen": frozen / (shards if in_full else 1),
        "weights, trained": shard,
        "gradients": shard,
        "moments": 2 * shard,
        "average": shard * (config.average > 0),
        "reference": shard * reference,
    }

    def gathered(module):  # where a GPU keeps whole weights, frozen ones are used as they are held
        return dtype.itemsize * values_of(module, trained=shards == 1 or not in_full)

    block, units = model.blocks[0], (*model.blocks, *model.eye.layers)  # sharded by themselves
    root = gathered(model) - sum(map(gathered, units))
    beside = trained - sum(values_of(unit, trained=True) for unit in units)
    gradients = (dtype.itemsize + 4) * values_of(block, trained=True) + dtype.itemsize * beside
    update = {"gathered blocks and root": 2 * gathered(block) + root + gradients}
    return always, {"gathered weights": gathered(model)}, update


def walk_sft(config, shape, gpus):
    """The Walk of sft.py; UserError if the samples cannot be shared by the GPUs."""
    share(config.samples_per_step, "samples a step", "samples_per_step", among=gpus)
    always, whole, update = training(config, shape, gpus)
    dtype, side = getattr(torch, config.precision), shape.latent_side * shape.token_pixels
    example = a_group(shape, config.max_references, side, ((PLAN, config.noise_copies),), ("full",))
    kept, block = graph_bytes(shape, example, dtype, config.checkpointing)
    full = config.tokens_per_pack / len(example)  # examples in a pack
    update |= {"graph": full * kept, "one block again": full * block, "logits": LOGITS}
    phases = {"read": {"codec": codec_bytes(shape, side)}, "update": update}
    phases |= painting("strip: ", shape, dtype, whole, config.held_out)
    return Walk(always | codec_and_clip(shape), phases)


def walk_grpo(config, shape, gpus):
    """The Walk of grpo.py; UserError if the groups cannot be shared by the GPUs."""
    prompts = "prompts a step", "prompts_per_step"
    groups = share(config.prompts_per_step, *prompts, parts=config.updates, among=gpus)
    groups = min(groups, max(1, config.pictures_at_once // config.group_size))
    always, whole, update = training(config, shape, gpus, reference=config.kl_beta > 0)
    dtype, held_out, side = getattr(torch, config.precision), config.held_out, config.picture_side
    # the prompt goes through once, then its members
    contexts, references = config.sampler.contexts, config.max_references
    both = a_group(shape, references, side, fullest(shape, config), contexts)
    prompt = len(a_group(shape, references, side))
    graph, block = graph_bytes(shape, both, dtype, config.checkpointing, cut=True)
    update |= {
        "graph": graph,
        "prompt's KV and gradients": 3 * token_bytes(shape, dtype) * prompt,
        "one block again": block * max(prompt, len(both) - prompt) / len(both),
    }
    work = replace(held_out, batch=groups, sampler=config.sampler, thinking=config.thinking)
    plans, pictures = config.plans_per_group, min(config.group_size, config.pictures_at_once)
    phases = painting("rollout: ", shape, dtype, whole, work, plans=plans, pictures=pictures)
    phases["update"] = update
    phases |= painting("strip: ", shape, dtype, whole, held_out)
    return Walk(always | codec_and_clip(shape, config.clip), phases)


def walk_painting(config, shape, gpus):
    """The Walk of sample.py and evaluate.py, one process a GPU; the host measures CLIP_out."""
    model, dtype = model_of(shape), torch.bfloat16
    weights = {"weights": held_bytes(model, values_of(model), dtype, config.weights)}
    always = weights | codec_and_clip(shape)
    return Walk(always, painting("", shape, dtype, {}, config.work(shape)))
