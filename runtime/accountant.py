"""
A dry run: what each phase of a command holds on a GPU, computed at true shapes without one.

    python grpo.py --config full --memory 8x80      on 8 GPUs of 80 GB; also sft, sample, evaluate

walks one iteration: prompts are read, prefilled, plans decoded, pictures painted in all guidance
contexts and decoded, rewarded; the old policy and the reference, the update; a strip, the exported
weights, the final table. It prints the phases, and refuses in one line what cannot fit.

Weights, gradients, moments and caches are counts times bytes. Passes are measured: the real code
runs on PyTorch's meta device, which has shapes and no memory, with one and with two layers, since
every further layer adds the same. Every plan is as long as it may be, every prompt has
`max_references` pictures of the largest side. Not a concept of the paper. Letters: sequence.py.
Left out: the host; fragmentation, communication buffers, work spaces, CUDA itself, for which a
tenth of the card is kept free.
"""

import re
import weakref
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import Branch, Group, Noised, Prompt, Sampler, Thinking, lay_out
from model import MAX_LOGITS, Cache, RMSNorm, UnifiedModel
from runtime.config import UserError
from runtime.lora import add_lora, trained_parameters
from runtime.processes import share
from runtime.quantised import BYTES, quantised_layers
from sequence import Layout, Sequence
from tree import split_members
from vision import Reference

SPARE = 0.9  # of a card; the rest is for what is left out
WORDS, PLAN = 60, 150  # tokens of an instruction; of a plan in stage 1
LOGIT = 16  # bytes of a logit in the text loss: as it is, in float32, normalised, two gradients
# bytes of a CLIP: its weights, and the most that a batch of reward.BATCH pictures takes beside them
CLIPS = {"ViT-L-14": (1_710_466_052, 1_089_740_800), "ViT-B-32": (605_109_252, 195_035_136)}
LESS = (  # what always helps
    "less is needed with --train lora, --weights nf4, smaller --tokens_per_pack or "
    "--pictures_at_once, fewer --max_references, more GPUs"
)


@dataclass(frozen=True)
class Phase:
    """What a phase holds beside what stands always."""

    name: str
    tokens: int  # that go through the blocks at once
    parts: dict  # {what: bytes}
    always: bool = True  # false: what stands always is gone by then

    @property
    def own(self):
        return sum(self.parts.values())


@dataclass(frozen=True)
class Walk:
    """A walked command."""

    always: dict  # {what: bytes} between the phases
    phases: list

    def peak(self, phase):
        return phase.own + sum(self.always.values()) * phase.always

    @property
    def deciding(self):
        """The phase with the highest peak."""
        return max(self.phases, key=self.peak)

    def fits(self, card, spare=SPARE):
        """Whether every phase fits into a card of `card` GB."""
        return self.peak(self.deciding) <= spare * card * 1e9


def dry_run(walk, config, shape):
    """Print the phases of a command; UserError if they cannot fit. walk: a walk_... below."""
    found = re.fullmatch(r"([1-9]\d*)x(\d+\.?\d*)", config.memory)
    if not found:
        raise UserError(f"memory={config.memory}: expected GPUs x GB of each, as 8x80")
    gpus, card = int(found[1]), float(found[2])
    walked = walk(config, shape, gpus)
    print_walk(walked, card)
    if not walked.fits(card, spare=1.0):
        raise UserError(
            f"{walked.deciding.name} needs {walked.peak(walked.deciding) / 1e9:.1f} GB of each "
            f"GPU, more than {card:g}; {LESS}"
        )


def print_walk(walked, card):
    """The table, in GB (10^9 bytes)."""

    def line(name, tokens, own, peak, parts):
        listed = ", ".join(f"{k} {size / 1e9:.2f}" for k, size in parts.items() if size >= 5e6)
        print(f"{name:26s}{tokens:>9s}{own / 1e9:8.2f}{peak / 1e9:8.2f}  {listed}")

    print(f"{'GB on each GPU, computed':26s}{'tokens':>9s}{'own':>8s}{'peak':>8s}  of it")
    total = sum(walked.always.values())
    line("always", "", total, total, walked.always)
    for phase in walked.phases:
        tokens = f"{phase.tokens:,}" if phase.tokens else ""
        line(phase.name, tokens, phase.own, walked.peak(phase), phase.parts)
    word = "fits" if walked.fits(card) else "tight" if walked.fits(card, spare=1.0) else "no"
    print(
        f"decides: {walked.deciding.name}, {walked.peak(walked.deciding) / 1e9:.1f} GB of "
        f"{card:g}; fits, a tenth left free: {word}"
    )


# --------------------------------------------------------------------------------------------------
# passes, measured on the meta device


class kept_bytes(torch.autograd.graph.saved_tensors_hooks):
    """`kept = kept_bytes()`, `with kept: forward` -> kept.total: bytes that autograd keeps.

    Each storage counts once, those of `parameters` not at all.
    """

    def __init__(self, parameters=()):
        super().__init__(self._keep, lambda tensor: tensor)
        self.seen = {p.untyped_storage()._cdata for p in parameters}
        self.storages = []  # alive, so that no address is given twice
        self.total = 0

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
    backward pass. Elsewhere PyTorch takes it apart, and keeps float32 copies."""

    @staticmethod
    def forward(ctx, weight, eps, x):
        """weight (W,), x (..., W) -> (..., W); on the meta device the shape."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x) if x.is_meta else F.rms_norm(x, weight.shape, weight, eps)


def fuse_norms(model):
    """Let the norms of a model keep what they keep on a GPU. Returns the model."""
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            norm.forward = partial(FusedNorm.apply, norm.weight, norm.eps)
    return model


@cache
def thin_model(shape, layers, dtype):
    """A model of so many layers on the meta device."""
    with torch.device("meta"):
        return fuse_norms(UnifiedModel(replace(shape, num_hidden_layers=layers)).to(dtype))


def on_meta(packed, prefix_rows):
    """A pack without memory, which attends to so many rows of a prompt before its own."""
    tensors = {k: v for k, v in vars(packed).items() if isinstance(v, torch.Tensor)}
    made = ("order", "inverse")  # by the pack itself
    packed = replace(packed, **{k: v.to("meta") for k, v in tensors.items() if k not in made})
    if prefix_rows:
        packed.key_order = torch.empty(prefix_rows + len(packed), dtype=torch.long, device="meta")
    return packed


def by_layers(shape, dtype, prefix_rows, measure):
    """(bytes of all layers, of one more) by measure(model, prefix) for one layer and for two.

    prefix: for each layer keys and values of so many rows of a prompt; None for no rows.
    """
    size, found = (prefix_rows, shape.num_key_value_heads, shape.head_dim), []
    for layers in (1, 2):
        keys_and_values = torch.empty(layers, 2, *size, dtype=dtype, device="meta")
        prefix = [[x.clone().requires_grad_() for x in pair] for pair in keys_and_values]
        found.append(measure(thin_model(shape, layers, dtype), prefix if prefix_rows else None))
    more = found[1] - found[0]
    return found[0] + (shape.num_hidden_layers - 1) * more, more


def forward_bytes(shape, packed, dtype, *, slots=0, prefix_rows=0):
    """Most bytes in a pass without gradients, beside weights, cache (of `slots`) and prefix."""
    packed = on_meta(packed, prefix_rows)

    @torch.no_grad()
    def measure(model, prefix):
        cache = Cache(model, slots) if slots else None
        with live_bytes() as live:
            _, gen = model(packed, cache, prefix)
            if len(packed.noised):
                model.velocity(packed, gen)
        return live.peak

    return by_layers(shape, dtype, prefix_rows, measure)[0]


def graph_bytes(shape, packed, dtype, checkpointing, *, keys=False, prefix_rows=0):
    """(bytes kept for the backward pass of a pack, bytes of one block while it is computed again).

    keys: the pack is a prompt, whose keys and values alone are wanted.
    """
    packed, turn = on_meta(packed, prefix_rows), len(packed) * shape.head_dim * dtype.itemsize

    def measure(model, prefix, checkpointing=False):
        model.checkpointing, kept = checkpointing, kept_bytes(model.parameters())
        with kept:
            if keys:
                model.keys_and_values(packed)
            else:
                model(packed, prefix=prefix, losses=True)
        return kept.total

    whole, block = by_layers(shape, dtype, prefix_rows, measure)
    if not checkpointing:
        return whole, 0
    few, _ = by_layers(shape, dtype, prefix_rows, partial(measure, checkpointing=True))
    # RoPE's cos and sin: checkpoint holds them where no hook sees them
    return few + 2 * turn, block + turn


@cache
def codec_bytes(shape, side):
    """(encoding, decoding): most bytes of a square picture, with the picture itself."""
    if shape.codec != "flux":
        return 12 * side**2, 12 * side**2
    codec, grid = thin_model(shape, 1, torch.float32).codec, side // shape.codec_factor
    picture = torch.empty(3, side, side, device="meta")
    latents = torch.empty(shape.latent_channels, grid, grid, device="meta")
    with live_bytes() as encoding:
        codec.encode(picture)
    with live_bytes() as decoding:
        codec.decode(latents)
    return encoding.peak + picture.nbytes, decoding.peak + latents.nbytes


# --------------------------------------------------------------------------------------------------
# what is computed at once


def a_prompt(shape, references, side):
    """(layout, Prompt of empty references and words, grid of a picture of `side` pixels)."""
    layout = Layout(0, 1, 2, 3, shape.latent_side, shape.vit_side)
    h, w = shape.picture_grid(side, side)
    width, height = shape.vit_rule.size(side, side)
    rows, columns = height // shape.vit_patch, width // shape.vit_patch
    latents = torch.empty(h * w, shape.token_channels)
    patches = torch.empty(rows * columns, 3 * shape.vit_patch**2)
    reference = Reference(latents, (h, w), patches, (rows, columns))
    return layout, Prompt((*[reference] * references, [4] * WORDS)), (h, w)


def a_group(shape, references, side, branches=(), contexts=()):
    """The pack of a prompt and what stands behind it.

    branches: for each plan (its tokens, 0 for none; noised pictures).
    """
    layout, prompt, grid = a_prompt(shape, references, side)
    noised = Noised(torch.empty(grid[0] * grid[1], shape.token_channels), 0.5)
    behind = tuple(
        Branch([4] * (plan - 2) if plan else None, (noised,) * n) for plan, n in branches
    )
    return lay_out(layout, [Group(prompt, grid, behind)], contexts)[0]


@cache
def painted(shape, dtype, references, side, plan, pictures, contexts):
    """(tokens of a prompt, of all, of the canvas; bytes of the prompt's pass, of the canvas')."""
    prompt = a_group(shape, references, side)
    whole = a_group(shape, references, side, ((plan, 1),) * pictures, contexts)
    canvas = whole.select(whole.rows_of("noised"))
    of_prompt = forward_bytes(shape, prompt, dtype, slots=len(prompt))
    of_canvas = forward_bytes(shape, canvas, dtype, slots=len(whole))
    return len(prompt), len(whole), len(canvas), of_prompt, of_canvas


@dataclass(frozen=True)
class Work:
    """What is painted at once; a studies.metrics.HeldOut says as much."""

    batch: int  # prompts
    max_references: int
    side: int  # pixels
    sampler: Sampler
    thinking: Thinking | None


def painting(shape, dtype, base, work, *, plans=1, pictures=1):
    """Phases from prompts to pictures. base: {what: bytes} that stand in all of them.

    work: a Work or a HeldOut; plans, pictures: of each prompt, at once.
    """
    plan, prompts, contexts = 0, work.batch, work.sampler.contexts
    if work.thinking:
        plan = work.thinking.max_tokens
    length, whole, canvas, prompt_pass, canvas_pass = painted(
        shape, dtype, work.max_references, work.side, plan, pictures, contexts
    )
    token, (encoding, decoding) = token_bytes(shape, dtype), codec_bytes(shape, work.side)
    # x, its velocity in all contexts, and the next x, in float32
    values = prompts * pictures * picture_values(shape, work.side)
    latents = {"latents": 4 * (2 + len(contexts)) * values}
    keys = {"prompts' KV": token * prompts * length}
    phases = [
        Phase("read", 0, base | {"encoder": encoding}),
        Phase("prefill", prompts * length, base | keys | {"pass": prompts * prompt_pass}),
    ]
    paint = {"KV cache": token * prompts * whole, "pass": prompts * canvas_pass}
    if plan:
        rows = prompts * plans
        # logits in bfloat16, float32, divided by the temperature, as probabilities
        think = {"KV cache": token * (prompts * length + rows * plan)}
        think |= {"logits": 14 * rows * shape.vocab_size}
        phases.append(Phase("think", rows, base | keys | think))
        paint = keys | paint
    else:
        paint["pass"] = prompts * max(canvas_pass, prompt_pass)
    phases.append(Phase("paint", prompts * canvas, base | paint | latents))
    return [*phases, Phase("decode", 0, base | {"decoder": decoding} | latents)]


def largest(name, phases):
    """The one of some phases that holds most, under another name."""
    phase = max(phases, key=lambda phase: phase.own)
    return replace(phase, name=f"{name}: {phase.name}")


def picture_values(shape, side):
    """Values of the latents of a picture."""
    h, w = shape.picture_grid(side, side)
    return h * w * shape.token_channels


def token_bytes(shape, dtype):
    """Bytes of the keys and values of one token, in all layers."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * dtype.itemsize


@cache
def group_graphs(shape, dtype, checkpointing, references, side, branches, contexts):
    """Of an update: tokens of the prompt and of its members, bytes of both graphs, of one block
    again, and of a pass over the members without gradients."""
    prompt, members = a_group(shape, references, side, branches, contexts).cut()
    rows = len(prompt)
    of_prompt, block = graph_bytes(shape, prompt, dtype, checkpointing, keys=True)
    of_members, other = graph_bytes(shape, members, dtype, checkpointing, prefix_rows=rows)
    plain = forward_bytes(shape, members, dtype, prefix_rows=rows)
    return rows, len(members), of_prompt, of_members, max(block, other), plain


def fullest(shape, config):
    """The branches of the fullest pack of members, as tree.plant cuts a group."""
    tokens, grid = config.max_plan_tokens, shape.picture_grid(*[config.picture_side] * 2)
    picture, packs = len(config.sampler.contexts) * (grid[0] * grid[1] + 2), []
    of_plans = [tokens] * config.plans_per_group
    for pictures in split_members(of_plans, grid, config):
        plans = [member // config.pictures_per_plan for member, _ in pictures]
        packs.append(tuple((tokens, plans.count(plan)) for plan in dict.fromkeys(plans)))
    return max(packs, key=lambda pack: sum(plan + count * picture for plan, count in pack))


@cache
def example_graph(shape, dtype, checkpointing, references, copies, tokens_per_pack):
    """(tokens, bytes kept, bytes of one block again) of the fullest pack of stage 1."""
    side, sequence = shape.latent_side * shape.token_pixels, None
    for count in range(references, -1, -1):
        layout, prompt, (h, w) = a_prompt(shape, count, side)
        sequence, canvas = sequence or Sequence(layout), torch.empty(h * w, shape.token_channels)
        size = len(prompt) + PLAN + copies * (h * w + 2)
        while sequence.length + size <= tokens_per_pack:
            with sequence.document():
                prompt.write(sequence)
                sequence.text([4] * (PLAN - 2), loss=True)
                for _ in range(copies):
                    sequence.noise(canvas, (h, w), 0.5)
    packed = sequence.pack()
    return len(packed), *graph_bytes(shape, packed, dtype, checkpointing)


# --------------------------------------------------------------------------------------------------
# what a model holds


@cache
def model_of(shape, train="all", lora_rank=0):
    """The model on the meta device; what is trained requires a gradient."""
    with torch.device("meta"):
        model = UnifiedModel(shape)
    if train == "lora":
        add_lora(model, lora_rank, 1.0)
    trained_parameters(model, train)  # marks them
    return model


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


def codec_weights(shape):
    """Bytes of the codec, in float32."""
    return 4 * values_of(model_of(shape).codec.weights) if shape.codec == "flux" else 0


class Stage:
    """The model of a training run on each GPU. config: of sft.py or grpo.py."""

    def __init__(self, config, shape, gpus):
        if gpus % config.replicas:
            raise UserError(f"replicas={config.replicas} does not divide {gpus} GPUs")
        self.config, self.shape, self.shards = config, shape, gpus // config.replicas
        self.model = model_of(shape, config.train, config.lora_rank)
        self.dtype = getattr(torch, config.precision)

    def always(self, reference=False):
        """{what: bytes} that stand between the steps, beside CLIP and codec."""
        trained, full = values_of(self.model, trained=True), self.config.weights == "full"
        frozen = values_of(self.model) - trained
        frozen = held_bytes(self.model, frozen, self.dtype, self.config.weights)
        return {
            "weights, frozen": frozen / (self.shards if full else 1),
            "weights, trained": 4 * trained / self.shards,
            "gradients": 4 * trained / self.shards,
            "moments": 8 * trained / self.shards,
            "average": 4 * trained / self.shards * (self.config.average > 0),
            "reference": 4 * trained / self.shards * reference,
        }

    def gathered(self, module):
        """Bytes that are copied to gather a module: where a GPU keeps whole weights, frozen ones
        are used as they are held (runtime/sharding.py)."""
        trained = self.shards == 1 or self.config.weights != "full"
        return self.dtype.itemsize * values_of(module, trained)

    def gathered_units(self):
        """Bytes of two gathered blocks, of what is no block, and of their gradients."""
        width, block = self.dtype.itemsize, self.model.blocks[0]
        units = (*self.model.blocks, *self.model.eye.layers)  # sharded by themselves
        root = self.gathered(self.model) - sum(map(self.gathered, units))
        trained = values_of(self.model, True) - sum(values_of(unit, True) for unit in units)
        gradients = (width + 4) * values_of(block, True) + width * trained
        return 2 * self.gathered(block) + root + gradients

    def ends(self):
        """The phases after the steps, but for the table."""
        base = {"gathered weights": self.gathered(self.model)}
        strip = largest("strip", painting(self.shape, self.dtype, base, self.config.held_out))
        weight = max(p.numel() for p in self.model.parameters())  # adapters merge one by one
        export = Phase("export", 0, {"one weight, whole, twice": 8 * weight})
        return [Phase("save", 0, {}), strip, export]  # a state leaves tensor by tensor


def clip_bytes(source):
    """Of a CLIP as the options name it: weights, and a batch of pictures; nothing for the toys'."""
    return CLIPS.get(source.partition(":")[0], (0, 0))


def resting(shape, dtype, kind, clip=(0, 0)):
    """{what: bytes} of a model that is not trained. kind: as for held_bytes."""
    model = model_of(shape)
    weights = held_bytes(model, values_of(model), dtype, kind)
    return {"weights": weights, "codec, CLIP": codec_weights(shape) + clip[0]}


# --------------------------------------------------------------------------------------------------
# the commands


def walk_sft(config, shape, gpus):
    """The Walk of sft.py; UserError if the samples cannot be shared by the GPUs."""
    share(config.samples_per_step, "samples a step", "samples_per_step", among=gpus)
    stage = Stage(config, shape, gpus)
    encoding, _ = codec_bytes(shape, shape.latent_side * shape.token_pixels)
    packing = (config.max_references, config.noise_copies, config.tokens_per_pack)
    tokens, kept, block = example_graph(shape, stage.dtype, config.checkpointing, *packing)
    update = {
        "gathered blocks and root": stage.gathered_units(),
        "graph": kept,
        "one block again": block,
        "logits": LOGIT * MAX_LOGITS,
    }
    phases = [Phase("read", 0, {"encoder": encoding}), Phase("update", tokens, update)]
    standing = stage.always() | {"codec": codec_weights(shape)}
    return Walk(standing, phases + stage.ends())


def walk_grpo(config, shape, gpus):
    """The Walk of grpo.py; UserError if the groups cannot be shared by the GPUs."""
    prompts = "prompts a step", "prompts_per_step"
    groups = share(config.prompts_per_step, *prompts, parts=config.updates, among=gpus)
    groups = min(groups, max(1, config.pictures_at_once // config.group_size))
    stage, side = Stage(config, shape, gpus), config.picture_side
    dtype, clip, metric = stage.dtype, clip_bytes(config.clip), clip_bytes(config.metric)
    work = Work(groups, config.max_references, side, config.sampler, config.thinking)
    whole = {"gathered weights": stage.gathered(stage.model)}
    plans, pictures = config.plans_per_group, min(config.group_size, config.pictures_at_once)
    rollout = painting(shape, dtype, whole, work, plans=plans, pictures=pictures)
    group = config.max_references, side, fullest(shape, config), config.sampler.contexts
    prompt, members, of_prompt, of_members, block, plain = group_graphs(
        shape, dtype, config.checkpointing, *group
    )
    keys = token_bytes(shape, dtype) * prompt
    old = whole | {"prompts' KV": keys, "pass": plain}
    update = {
        "gathered blocks and root": stage.gathered_units(),
        "prompt's graph": of_prompt + 3 * keys,  # keys and values as leaves, and their gradients
        "members' graph": of_members,
        "one block again": block,
    }
    # the table at the end: another model, whole on every GPU
    base = resting(shape, dtype, config.weights, metric)
    table = painting(shape, dtype, base, config.held_out)
    table.append(Phase("measure", 0, base | {"CLIP's pass": metric[1]}))
    return Walk(
        stage.always(config.kl_beta > 0) | {"CLIP and codec": codec_weights(shape) + clip[0]},
        [
            *[replace(phase, name=f"rollout: {phase.name}") for phase in rollout],
            Phase("reward", 0, {"CLIP's pass": clip[1]}),
            Phase("old policy, reference", prompt + members, old),
            Phase("update", prompt + members, update),
            *stage.ends(),
            replace(largest("table", table), always=False),
        ],
    )


def walk_sample(config, shape, gpus):
    """The Walk of sample.py, one process a GPU, whose config says its `work`."""
    dtype = torch.bfloat16
    base = resting(shape, dtype, config.weights)
    return Walk(base, painting(shape, dtype, {}, config.work(shape)))


def walk_evaluate(config, shape, gpus):
    """The Walk of evaluate.py, likewise, with the CLIP of CLIP_out."""
    dtype, clip = torch.bfloat16, clip_bytes(config.metric)
    phases = painting(shape, dtype, {}, config.work)
    measure = Phase("measure", 0, {"CLIP's pass": clip[1]})
    return Walk(resting(shape, dtype, config.weights, clip), [*phases, measure])
