"""
A dry run: what each phase of a command holds on a GPU, computed at true shapes without one.

    python grpo.py --config full --memory --gpus 8 --gpu_memory 80      also sft, sample, evaluate

walks one iteration: prompts are read, prefilled, plans decoded, pictures painted in all guidance
contexts and decoded, rewarded; the old policy and the reference, the update; a strip, the exported
weights, the final table. What stands always is counted, passes are measured on the meta device
(memory.py, peaks.py); advice.py prints the phases, and refuses what cannot fit. Samples and groups
are shared by the GPUs as in the run itself.

Every plan is as long as it may be, every prompt has `max_references` pictures of the largest side.
Not a concept of the paper. Letters: sequence.py. Left out: fragmentation, communication buffers,
work spaces, CUDA itself: a tenth of the card is kept free for them.
"""

import functools
from dataclasses import dataclass, replace

import torch

import rollouts
from bench import memory
from bench.peaks import clip_bytes, codec_bytes, forward_bytes
from engine import Branch, Group, Noised, lay_out
from example import check_budget
from model import MAX_LOGITS
from runtime.processes import share
from sequence import Sequence

SPARE = 0.9  # of a card; the rest is for what is left out
PLAN = 150  # tokens of a plan in stage 1
LOGIT = 16  # bytes of a logit in the text loss: as it is, in float32, normalised, two gradients


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
    host: dict  # {what: bytes} on the host of the first process

    def peak(self, phase):
        return phase.own + sum(self.always.values()) * phase.always

    @property
    def deciding(self):
        """The phase with the highest peak."""
        return max(self.phases, key=self.peak)

    def fits(self, card, spare=SPARE):
        """Whether every phase fits into a card of `card` GB."""
        return self.peak(self.deciding) <= spare * card * 1e9


# --------------------------------------------------------------------------------------------------
# painting


@dataclass(frozen=True)
class Work:
    """What is planned and painted at once."""

    prompts: int
    plans: int  # of each prompt, decoded together; 0: none
    pictures: int  # of each prompt, painted together
    plan_tokens: int
    contexts: tuple  # of guidance
    references: int
    side: int  # pixels
    dtype: torch.dtype = torch.bfloat16

    @property
    def case(self):
        return memory.Case(self.references, self.side)


def type_of(name):
    """The type of the weights on a GPU that the option --dtype asks for."""
    return torch.float32 if name == "float32" else torch.bfloat16


def of_held_out(held_out, dtype):
    """The Work of a studies.metrics.HeldOut."""
    thinking, contexts = held_out.thinking, held_out.sampler.contexts
    plans, longest = (1, thinking.max_tokens) if thinking else (0, 0)
    how = dict(references=held_out.max_references, side=held_out.side, dtype=dtype)
    return Work(held_out.batch, plans, 1, longest, contexts, **how)


@functools.cache
def prompt_forward(shape, case, dtype):
    """(tokens, bytes of the forward pass) of one prompt."""
    layout, prompt, _ = memory.a_prompt(shape, case)
    sequence = Sequence(layout)
    with sequence.document():
        prompt.write(sequence)
    packed = sequence.pack()
    return len(packed), forward_bytes(shape, packed, slots=len(packed), dtype=dtype)


@functools.cache
def canvas_forward(shape, work):
    """(tokens of the whole, of the canvas, bytes of a denoising step) of one prompt's pictures."""
    layout, prompt, n = memory.a_prompt(shape, work.case)
    plan = [4] * (work.plan_tokens - 2) if work.plans else None
    noised, grid = Noised(torch.empty(n, shape.token_channels), 1.0), None
    grid = shape.picture_grid(work.side, work.side)
    group = Group(prompt, grid, (Branch(plan, (noised,)),) * work.pictures)
    packed, _ = lay_out(layout, [group], work.contexts)
    canvas = packed.select(packed.rows_of("noised"))
    used = forward_bytes(shape, canvas, slots=len(packed), dtype=work.dtype)
    return len(packed), len(canvas), used


def painting(shape, work, base):
    """Phases from prompts to pictures. base: {what: bytes} that stand in all of them."""
    token, rows = memory.token_bytes(shape, work.dtype.itemsize), work.prompts * work.plans
    length, prompt_pass = prompt_forward(shape, work.case, work.dtype)
    alike = replace(work, prompts=1, plans=min(1, work.plans))
    whole, canvas, canvas_pass = canvas_forward(shape, alike)
    encoding, decoding = codec_bytes(shape, work.side)
    prompts = token * work.prompts * length
    h, w = shape.picture_grid(work.side, work.side)
    # x, its velocity in all contexts, and the next x, in float32
    latents = 4 * (2 + len(work.contexts)) * h * w * shape.token_channels
    latents = {"latents": latents * work.prompts * work.pictures}
    of_paint = {
        "prompts' KV": prompts if work.plans else 0,  # kept from the plans on
        "KV cache": token * work.prompts * whole,
        "pass": work.prompts * max(canvas_pass, 0 if work.plans else prompt_pass),
        **latents,
    }
    # bfloat16, float32, divided by the temperature, probabilities
    logits = 14 * rows * shape.vocab_size
    cached = prompts + token * rows * work.plan_tokens
    of_think = {"prompts' KV": prompts, "KV cache": cached, "logits": logits}
    of_prefill = {"prompts' KV": prompts, "pass": work.prompts * prompt_pass}
    phases = [
        Phase("read", 0, base | {"encoder": encoding}),
        Phase("prefill", work.prompts * length, base | of_prefill),
        Phase("think", rows, base | of_think),
        Phase("paint", work.prompts * canvas, base | of_paint),
        Phase("decode", 0, base | {"decoder": decoding} | latents),
    ]
    return [one for one in phases if one.name != "think" or work.plans]


def largest(name, phases):
    """The one of some phases that holds most, under another name."""
    one = max(phases, key=lambda phase: phase.own)
    return replace(one, name=f"{name}: {one.name}")


# --------------------------------------------------------------------------------------------------
# the commands


def gathered(config, model):
    """{what: bytes} that are copied to have all weights whole on every GPU."""
    return {"gathered weights": memory.value_bytes(config) * memory.values_gathered(config, model)}


def codec_weights(model):
    """Bytes of the codec."""
    flux = model.config.codec == "flux"
    return 4 * memory.values_of(model.codec.weights) if flux else 0


def ends(config, model):
    """The phases after the steps, but for the table."""
    work = of_held_out(config.held_out, getattr(torch, config.precision))
    strip = largest("strip", painting(model.config, work, gathered(config, model)))
    largest_weight = max(p.numel() for p in model.parameters())  # adapters are merged one by one
    export = Phase("export", 0, {"one weight, whole, twice": 8 * largest_weight})
    return [Phase("save", 0, {}), strip, export]  # a state goes to the host tensor by tensor


def host_bytes(config, model, standing):
    """{what: bytes} on the host of the first process, which has up to eight."""
    width = 4 if config.export_float32 else memory.value_bytes(config)
    host = {"exported weights": width * memory.values_of(model)}
    if config.weights != "full":
        each = memory.value_bytes(config) * memory.values_of(model)
        host["weights before they are rounded"] = min(8, config.gpus) * each
    if config.async_save:
        names = ("weights, trained", "moments", "average")
        host["state being written"] = min(8, config.gpus) * sum(standing[name] for name in names)
    return host


def rollout_work(config):
    """The Work of a rollout."""
    return Work(
        config.groups_at_once,
        config.plans_per_group,
        min(config.group_size, config.pictures_at_once),
        config.max_plan_tokens,
        config.sampler.contexts,
        references=config.max_references,
        side=config.picture_side,
        dtype=getattr(torch, config.precision),
    )


@functools.cache
def policy_forward(shape, case, config):
    """Bytes of a pass without gradients over the largest pack of members. config: plain."""
    shared, members = memory.packs(shape, case, config)
    how = dict(prefix_rows=len(shared), dtype=getattr(torch, config.precision))
    return forward_bytes(shape, members, **how)


def of_table(config, shape, dtype):
    """The largest Phase of the table at the end: another model, whole on every process."""
    model = memory.model_of(shape, "all", 0)
    values, width = memory.values_of(model), dtype.itemsize
    weights = memory.held_bytes(model, values, width, kind=config.weights)
    base = {"weights": weights, "codec, CLIP": codec_weights(model)}
    base["codec, CLIP"] += clip_bytes(config.metric_name)[0]
    phases = painting(shape, of_held_out(config.held_out, dtype), base)
    phases.append(Phase("measure", 0, base | {"CLIP's pass": clip_bytes(config.metric_name)[1]}))
    return replace(largest("table", phases), always=False)


def walk_grpo(config, shape):
    """The Walk of grpo.py. config: a grpo.Config; shape: a ModelConfig.

    UserError if the groups cannot be shared by the GPUs.
    """
    part = rollouts.share_of(config, config.gpus)
    groups = config.prompts_per_step * part.ranks // config.gpus  # of a step, on each GPU
    config = replace(part.config, groups_at_once=min(config.groups_at_once, groups))
    shards, work = memory.shards_of(config), rollout_work(config)
    model = memory.model_of(shape, config.train, config.lora_rank)
    standing, whole = memory.always(config, model, shards), gathered(config, model)
    standing["CLIP and codec"] = clip_bytes(config.clip_name)[0] + codec_weights(model)
    h, w = shape.picture_grid(work.side, work.side)
    # x before and after each stochastic step stays until the group's last picture is painted
    steps = config.window if config.likelihood == "sde" else 0
    window = 8 * steps * config.group_size * h * w * shape.token_channels
    kept = whole | {"window": window * config.groups_at_once}
    rollout = painting(shape, work, kept)
    case, plain = replace(work.case, plan=config.max_plan_tokens), memory.plain(config)
    found = memory.graphs(shape, case, plain)
    tokens = found.prompt_tokens + found.member_tokens
    keys = memory.token_bytes(shape, work.dtype.itemsize) * found.prompt_tokens
    old = whole | {"prompts' KV": keys, "pass": policy_forward(shape, case, plain)}
    return Walk(
        standing,
        [
            *[replace(one, name=f"rollout: {one.name}") for one in rollout],
            Phase("reward", 0, {"CLIP's pass": clip_bytes(config.clip_name)[1]}),
            Phase("old policy, reference", tokens, old),
            Phase("update", tokens, memory.of_update(config, model, case)),
            *ends(config, model),
            of_table(config, shape, work.dtype),
        ],
        host_bytes(config, model, standing),
    )


@functools.cache
def example_graph(shape, config):
    """(tokens, bytes kept, bytes of one block again) of the fullest pack of examples.

    config: a sft.Config; those that differ in nothing but what is no matter here should be equal.
    """
    side, sequence = shape.latent_side * shape.token_pixels, None
    for references in range(config.max_references, -1, -1):
        layout, prompt, n = memory.a_prompt(shape, memory.Case(references, side))
        sequence = sequence or Sequence(layout)
        size = len(prompt) + PLAN + config.noise_copies * (n + 2)
        canvas, grid = torch.empty(n, shape.token_channels), shape.picture_grid(side, side)
        while sequence.length + size <= config.tokens_per_pack:
            with sequence.document():
                prompt.write(sequence)
                sequence.text([4] * (PLAN - 2), loss=True)
                for _ in range(config.noise_copies):
                    sequence.noise(canvas, grid, 0.5)
    packed, dtype = sequence.pack(), getattr(torch, config.precision)
    kept, block = memory.activations(shape, packed, config.checkpointing, dtype=dtype)
    return len(packed), kept, block


def walk_sft(config, shape):
    """The Walk of sft.py. config: a sft.Config; shape: a ModelConfig.

    UserError if the samples cannot be shared by the GPUs.
    """
    share(config.samples_per_step, "samples a step", "samples_per_step", among=config.gpus)
    if config.data != "toy":
        check_budget(shape, config)
    model = memory.model_of(shape, config.train, config.lora_rank)
    standing = memory.always(config, model, memory.shards_of(config))
    standing["codec"] = codec_weights(model)
    encoding, _ = codec_bytes(shape, shape.latent_side * shape.token_pixels)
    names = ("max_references", "noise_copies", "tokens_per_pack", "checkpointing", "precision")
    alike = type(config)(**{name: getattr(config, name) for name in names})
    tokens, kept, block = example_graph(shape, alike)
    update = {
        "gathered blocks and root": memory.gathered_bytes(config, model),
        "graph": kept,
        "one block again": block,
        "logits": LOGIT * MAX_LOGITS,
    }
    phases = [
        Phase("read", 0, {"encoder": encoding}),
        Phase("update", tokens, update),
        *ends(config, model),
    ]
    host = host_bytes(config, model, standing)
    each = config.samples_per_step // config.gpus * sample_bytes(config, shape)
    host["samples of this step and of the next"] = 2 * min(8, config.gpus) * each
    return Walk(standing, phases, host)


def sample_bytes(config, shape):
    """Bytes of what stage 1 keeps of a sample on the host: pixels, 8 bits each."""
    for_codec = 3 * (shape.latent_side * shape.token_pixels) ** 2
    for_eye = 3 * (shape.vit_side * shape.vit_patch) ** 2
    return config.max_references * (for_codec + for_eye) + for_codec


def walk_pictures(config, shape):
    """The Walk of sample.py and evaluate.py, whose configs say their `work`."""
    model, name = memory.model_of(shape, "all", 0), getattr(config, "metric_name", "")
    work = config.work(shape)
    weights, embedding = clip_bytes(name)
    standing = {
        "weights": memory.held_bytes(
            model, memory.values_of(model), work.dtype.itemsize, kind=config.weights
        ),
        "codec, CLIP": codec_weights(model) + weights,
    }
    measure = [Phase("measure", 0, {"CLIP's pass": embedding})] if name else []
    return Walk(standing, painting(shape, work, {}) + measure, {})
