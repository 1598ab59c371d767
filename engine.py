"""
From references and an instruction to a plan and a picture.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from tqdm import tqdm

import flow
import iccot
from iccot import is_valid
from model import Cache
from runtime import processes
from sequence import Sequence
from toy import world
from vision import to_pil, unpatchify


@dataclass(frozen=True)
class Prompt:
    """What stands before the plan: references (vision.Reference) and texts (lists of token ids) in order."""

    items: tuple
    vae: bool = True  # false: pictures go through the eye alone (docs/BAGEL.md §12)

    def write(self, sequence):
        for item in self.items:
            sequence.text(item) if isinstance(item, (list, tuple)) else sequence.image(
                item, vae=self.vae
            )

    def __len__(self):
        """Tokens in a packed sequence."""
        return sum(len(item) + 2 * isinstance(item, (list, tuple)) for item in self.items)

    @property
    def texts(self):
        return [item for item in self.items if isinstance(item, (list, tuple))]


@dataclass(frozen=True)
class Sampler:
    """How to paint. `num_timesteps` grid points give one model evaluation less (BAGEL)."""

    num_timesteps: int
    timestep_shift: float
    text_guidance: float = 1.0  # 1: off
    image_guidance: float = 1.0  # acts only when text_guidance does
    guidance_interval: tuple = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0

    @property
    def contexts(self):
        """What the velocity is asked with: everything; without text; without pictures."""
        if self.text_guidance <= 1:
            return ("full",)
        return ("full", "no_text", "no_image") if self.image_guidance > 1 else ("full", "no_text")


@torch.no_grad()
def prefill(model, layout, prompts):
    """Keys and values of the prompts alone: a Cache for `think` and `paint` to take over."""
    sequence = Sequence(layout)
    for prompt in prompts:
        with sequence.document():
            prompt.write(sequence)
    packed = sequence.pack().to(model.embed_tokens.weight.device)
    cache = Cache(model, len(packed))
    if len(packed):
        model(packed, cache)
    return cache


@torch.no_grad()
def think(
    model,
    layout,
    prompts,
    group_size,
    max_tokens,
    temperature=0.0,
    generators=None,
    top_p=1.0,
    prefix=None,
):
    """Decode `group_size` plans for each prompt, all together. prefix: what `prefill` gave for these prompts.

    Returns one list of token ids a member, prompts x group_size of them, and whether each ended with eos in time.
    temperature 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature), cut off at `top_p`, with a
    generator for each member, so that what a member gets does not depend on its company.
    """
    prefix = prefill(model, layout, prompts) if prefix is None else prefix
    sequence = Sequence(layout)
    for prompt in prompts:
        with sequence.document():
            prompt.write(sequence)
            for _ in range(group_size):
                with sequence.branch():
                    sequence.reserve(max_tokens)
    device = model.embed_tokens.weight.device
    packed = sequence.pack().to(device)
    cache = Cache(model, len(packed))
    cache.take_over(packed.rows_of("given"), prefix)
    slots = torch.tensor(sequence.reserved, device=device)  # (G,)
    fed = torch.full_like(slots, layout.bos)
    ended = torch.zeros_like(slots, dtype=torch.bool)
    tokens = []
    for step in range(max_tokens):
        hidden, _ = model(packed.decoding(slots + step, fed), cache)  # (G, W)
        logits = model.lm_head(hidden).float()  # (G, vocabulary)
        fed = choose(logits, temperature, top_p, generators)
        tokens.append(fed)
        ended |= fed == layout.eos
        if bool(ended.all()):
            break
    rows = torch.stack(tokens, 1).tolist()  # (G, steps)
    plans = [row[: row.index(layout.eos)] if layout.eos in row else row for row in rows]
    return plans, ended.tolist()


def choose(logits, temperature, top_p, generators):
    """The next token of each row, (G, vocabulary) -> (G,). Drawn on the CPU: a seed means the same everywhere."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        behind = ordered.cumsum(-1) - ordered >= top_p  # the likelier ones make up top_p already
        probabilities = probabilities.scatter(-1, index, ordered.masked_fill(behind, 0))
    rows = probabilities.cpu()
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(rows, generators, strict=True)
    ]
    return torch.cat(drawn).to(logits.device)


def draw_noise(lengths, channels, generators):
    """Standard normal (sum of lengths, C) on the CPU, a picture from each generator."""
    pairs = zip(lengths, generators, strict=True)
    return torch.cat([torch.randn(n, channels, generator=generator) for n, generator in pairs])


@torch.no_grad()
def paint(
    model, layout, prompts, plans, grids, sampler, generators=None, step=None, x=None, prefix=None
):
    """Paint a picture for each plan: x (all tokens, C), the final latent tokens of all pictures in order.

    plans: for each prompt a list with the token ids of each plan, or None to paint without a plan.
    grids: for each prompt the (h, w) token grid of its pictures. `step(k, x, v, t, t_next) -> x` replaces the Euler
    step (GRPO's SDE window). x: the initial noise; if it is not given it is drawn, with a generator for each picture.
    prefix: what `prefill` gave for these prompts.
    """
    model_device, channels = model.embed_tokens.weight.device, model.config.token_channels
    noised = [
        [[(torch.zeros(h * w, channels), (h, w), 1.0)] for _ in group]
        for (h, w), group in zip(grids, plans)
    ]
    packed, rows = lay_out(layout, prompts, plans, noised, sampler.contexts)
    packed, rows = (
        packed.to(model_device),
        {name: index.to(model_device) for name, index in rows.items()},
    )
    # tokens of each picture
    lengths = [len(image) for group in noised for images in group for image, *_ in images]
    image_of_token = torch.repeat_interleave(torch.tensor(lengths, device=model_device))
    cache = fill(model, layout, prompts, packed, prefix)
    canvas = packed.select(packed.rows_of("noised"))
    token = torch.empty_like(canvas.noised)  # of x, behind each noised token
    for index in rows.values():
        token[index] = torch.arange(len(index), device=model_device)
    x = (draw_noise(lengths, channels, generators) if x is None else x).to(model_device)
    grid = flow.time_grid(sampler.num_timesteps, sampler.timestep_shift)
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        canvas.latents = x[token]
        canvas.timesteps = torch.full_like(canvas.timesteps, t)
        v = guided(
            model.velocity(canvas, model(canvas, cache)[1]),
            rows,
            t,
            sampler,
            image_of_token,
            len(lengths),
        )
        x = flow.euler_step(x, v, t, t_next) if step is None else step(k, x, v, t, t_next)
    return x


def fill(model, layout, prompts, packed, prefix=None):
    """A KV cache with everything that is given: the prompts from `prefix` if there is one, the rest computed."""
    cache, given = Cache(model, len(packed)), packed.rows_of("given")
    if prefix is not None:
        mine = packed.rows_of("given", packed.shared & ~packed.extra)
        cache.take_over(mine, prefix)
        given = packed.rows_of("given", ~packed.shared | packed.extra)
    if len(given):
        model(packed.select(given), cache)
    return cache


def lay_out(layout, prompts, plans, noised, contexts, loss=False):
    """One pack for all guidance contexts of some groups.

    plans: for each prompt its plans, token ids or None; noised: for each prompt and each of its plans the noised images
    (x_t (n, C), grid, t). loss: the plans predict their tokens.
    Returns the pack, and for each context the rows of its noised tokens among all noised tokens, image by image in the
    order of `noised`.
    """
    sequence, rows = Sequence(layout), {name: [] for name in contexts}

    def leaves(name, images):
        for x_t, grid, t in images if name in rows else ():
            rows[name].append(torch.arange(len(sequence.noised), len(sequence.noised) + len(x_t)))
            sequence.noise(x_t, grid, t)

    for prompt, group, images in zip(prompts, plans, noised):
        every = [image for own in images for image in own]
        last_is_text = isinstance(prompt.items[-1], (list, tuple))
        cut = len(prompt.items) - last_is_text
        with sequence.document():
            Prompt(prompt.items[:cut], prompt.vae).write(sequence)
            leaves("no_text", every)
            Prompt(prompt.items[cut:]).write(sequence)
            for plan, own in zip(group, images):
                with sequence.branch():
                    if plan is not None:
                        sequence.text(plan, loss)
                    leaves("full", own)
        if "no_image" in rows:
            with sequence.document(extra=True):
                Prompt(tuple(prompt.texts)).write(sequence)
                leaves("no_image", every)
    return sequence.pack(), {name: torch.cat(parts) for name, parts in rows.items()}


def guided(v, rows, t, sampler, image_of_token, images):
    """The velocity (tokens of x, C) that the sampler follows, from those of all contexts v (M, C).

    t: one time, or one a token (tokens,); outside the guidance interval the conditional velocity counts.
    """
    v = {name: v[index] for name, index in rows.items()}
    active = flow.guidance_active(t, sampler.guidance_interval)
    if "no_text" not in v or not bool(active.any()):
        return v["full"]
    mixed = flow.guide(
        v["full"],
        v["no_text"],
        v.get("no_image"),
        sampler.text_guidance,
        sampler.image_guidance,
        sampler.renorm,
        sampler.renorm_min,
        image_of_token,
        images,
    )
    return mixed if active.ndim == 0 else torch.where(active[:, None], mixed, v["full"])


def make_prompt(model, tokenizer, references, instruction, system=""):
    """Pictures (PIL), then the instruction: BAGEL's order. "<image>" in the instruction puts a picture in its place.

    system: a text of its own in front (iccot.GENERATION_SYSTEM_PROMPT). Pictures are resized as in BAGEL's inferencer.
    """
    items, pieces = [*references, instruction], instruction.split("<image>")
    if len(pieces) > 1:
        if len(pieces) - 1 != len(references):
            raise ValueError(
                f"the prompt has {len(pieces) - 1} times <image>, but {len(references)} references are given; "
                f"name each once, or none"
            )
        items = [item for pair in zip(pieces, [*references, ""]) for item in pair]
        items = [item for item in items if not isinstance(item, str) or item.strip()]
    items = [system] * bool(system) + items
    return Prompt(
        tuple(
            tokenizer.encode(item.strip() if len(pieces) > 1 else item)
            if isinstance(item, str)
            else model.read(item, as_inferencer=True)
            for item in items
        )
    )


def picture(model, tokens, grid):
    """Latent tokens (h * w, C) of one picture -> PIL RGB."""
    return to_pil(model.codec.decode(unpatchify(tokens, grid, model.config.latent_patch)))


MAX_PLAN_TOKENS = 72  # the longest plan of the toy world has 52


@dataclass(frozen=True)
class Result:
    """One painted prompt."""

    text: str  # what the model wrote
    plan: iccot.ICCoT | None  # what could be read from it
    valid: bool  # whether it parses strictly
    image: Image.Image


def generate(
    model,
    layout,
    tokenizer,
    samples,
    seed=0,
    shift=10.0,
    num_timesteps=7,
    text_guidance=1.0,
    use_plan=True,
    temperature=0.0,
    batch=50,
    side=world.SIZE,
):
    """Plan and paint `samples` (anything with references and an instruction). Returns a Result for each.

    side: pixels of the square pictures, before the codec's resize rule.
    """
    sampler = Sampler(
        num_timesteps, shift, text_guidance=text_guidance, guidance_interval=(0.0, 1.0)
    )
    grid = model.config.picture_grid(side, side)
    results = []
    for first in tqdm(range(0, len(samples), batch), disable=None, desc="evaluate", leave=False):
        part = samples[first : first + batch]
        prompts = [make_prompt(model, tokenizer, one.references, one.instruction) for one in part]
        generators = lambda purpose: [
            processes.generator(seed, first + i, purpose) for i in range(len(part))
        ]
        plans = [None] * len(part)
        if use_plan:
            plans, _ = think(model, layout, prompts, 1, MAX_PLAN_TOKENS, temperature, generators(1))
        x = paint(
            model,
            layout,
            prompts,
            [[plan] for plan in plans],
            [grid] * len(part),
            sampler,
            generators(2),
        )
        for one, plan, tokens in zip(part, plans, x.split(grid[0] * grid[1])):
            text = "" if plan is None else tokenizer.decode(plan)
            read, problems = (
                iccot.salvage(text, len(one.references)) if plan is not None else (None, [])
            )
            valid = plan is not None and is_valid(text, len(one.references))
            results.append(Result(text, read, valid, picture(model, tokens, grid)))
    return results
