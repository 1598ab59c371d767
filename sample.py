"""
From references and an instruction to a plan and a picture (paper section 2; docs/BAGEL.md §11-12).

    prompt    reference pictures and texts in any order, in one document; BAGEL's order is pictures, then instruction
    think     decode an IC-CoT after the prompt, one token at a time                        (KV cache, branches)
    paint     x ~ N(0, 1);  for t, t' in the time grid:  x <- x - v (t - t')                (rectified flow, Euler)
              v = guided mix of the velocities given everything, without text, without pictures (flow.guide)

Members of a group share their prompt: its keys and values are computed once and every member is a branch. The guidance
contexts are branches and documents of the same pack, so one forward pass serves all of them:

    document 1    pictures | {noise: no text} | instruction | branch a member: plan {noise: everything}
    document 2    instruction {noise: no pictures}

The contexts are those of the official inferencer: "no text" lacks the last text and what follows it, "no pictures" has
all texts but the plan. A picture is as large as the last reference after its resize, as in the inferencer, or square.

Each picture gets its plan beside it as JSON. Several seeds, or prompts from a file, go into a folder, one after the
other; pictures that are there already are not painted again.

Left out: top-k and beam search; answers about pictures (see `Prompt.vae`).

    python sample.py --checkpoint out/toy-grpo --ref a.png --ref b.png --prompt "Put them together." --out picture.png
    python sample.py --checkpoint out/toy-grpo --prompts prompts.jsonl --seeds 4 --out pictures

A line of prompts.jsonl: {"prompt": "Put them together.", "ref": ["a.png", "b.png"], "key": "meeting"}
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import flow
import iccot
import run
from config import UserError, exit_on_user_error, parse
from model import Cache
from pretrained import load_model
from sequence import Sequence
from vision import open_image, to_pil, unpatchify

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model, or owner/name on Hugging Face
    init: str = ""  # the same, under the name it has in training
    ref: tuple[str, ...] = ()  # reference pictures: --ref a.png --ref b.png
    prompt: str = ""  # the instruction; "image 1" names a reference, <image> places it
    prompts: str = ""  # in place of both: a file of JSON lines {"prompt", "ref", "key"}
    out: str = "picture.png"  # file to write; a folder for several prompts or seeds
    seeds: int = 1  # pictures of each prompt, with the seeds seed, seed + 1, ...
    plan: bool = True  # write an IC-CoT first; false paints straight from the prompt
    max_references: int = 4
    max_plan_tokens: int = 1000
    temperature: float = 0.0  # of the plan; 0 is greedy
    top_p: float = 1.0  # draw from the likeliest tokens of this total probability; 1: all
    system_prompt: bool = False  # BAGEL's request to think first; for weights not trained here
    num_timesteps: int = 50  # grid points; one more than model evaluations
    timestep_shift: float = 3.0
    text_guidance: float = 4.0  # 1: off
    image_guidance: float = 1.5
    guidance_low: float = 0.4  # guidance acts at times above this
    guidance_high: float = 1.0  # and up to this
    renorm: Literal["global", "channel", "text_channel"] = "global"  # see flow.guide
    renorm_min: float = 0.0  # the least factor of the renormalisation; 1: off
    square: bool = False  # without height and width: the largest square, not the last reference
    height: int = 0  # pixels; 0: see square
    width: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in memory
    device: str = "cpu"  # or cuda
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps={self.num_timesteps}: expected at least 2 grid points, noise and picture"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a probability above 0 and up to 1")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: expected at least 1")
        if self.prompts and (self.prompt or self.ref):
            raise ValueError(
                "--prompts brings prompts and references from a file; leave --prompt and --ref out"
            )


TOY = dict(
    max_plan_tokens=72,
    num_timesteps=7,
    timestep_shift=10.0,
    text_guidance=1.0,
    image_guidance=1.0,
    square=True,
)
PRESETS = {"toy": TOY, "smoke": TOY | dict(checkpoint="out/smoke-grpo"), "full": dict()}


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


@dataclass(frozen=True)
class Job:
    """One picture to paint."""

    prompt: str
    references: tuple  # paths
    seed: int
    out: Path


def jobs(config):
    """All pictures that are asked for, in order; UserError for a file of prompts that is none."""
    prompts = [("", config.prompt, config.ref)]
    if config.prompts:
        prompts = read_prompts(Path(config.prompts))
    if not config.prompts and config.seeds == 1:
        return [Job(config.prompt, config.ref, config.seed, Path(config.out))]
    folder, seeds = Path(config.out), range(config.seed, config.seed + config.seeds)
    if folder.suffix.lower() in PICTURES:
        raise UserError(
            f"--out {config.out}: several pictures go into a folder; give a name without {folder.suffix}"
        )
    return [
        Job(prompt, tuple(refs), seed, folder / f"{key or 'picture'}-{seed}.png")
        for key, prompt, refs in prompts
        for seed in seeds
    ]


def read_prompts(path):
    """[(key, prompt, paths of the references)]; relative paths are meant from the file's folder."""
    if not path.is_file():
        raise UserError(f"file of prompts not found: {path}")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            one = json.loads(line)
            key, refs = (
                str(one.get("key", f"{number:04d}")),
                [str(path.parent / ref) for ref in one.get("ref", [])],
            )
            found.append((key, str(one["prompt"]), refs))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}, line {number}: {error!r}; expected {{"prompt": "...", "ref": ["a.png"], "key": "..."}}'
            ) from None
    names = [key for key, *_ in found]
    if len(set(names)) < len(names) or any("/" in name for name in names):
        raise UserError(f"{path}: keys name files, so they must differ and hold no slash")
    return found


def check(config, model, job):
    """The references and the token grid of the picture, after everything a person can get wrong was checked."""
    if not job.prompt.strip():
        raise UserError("--prompt is empty; say what to draw")
    if len(job.references) > config.max_references:
        raise UserError(
            f"{len(job.references)} references given, the preset allows {config.max_references}; "
            f"leave some out or raise --max_references"
        )
    iccot.check_instruction(job.prompt, len(job.references))
    if job.out.suffix.lower() not in PICTURES:
        raise UserError(f"--out {job.out}: expected a file name that ends in .png, .jpg or .webp")
    references = [open_image(path) for path in job.references]
    largest, unit = model.config.latent_side * model.config.token_pixels, model.config.token_pixels
    width, height = (
        (largest, largest)
        if config.square or not references
        else model.config.image_rule.size(*references[-1].size)
    )
    height, width = config.height or height, config.width or width
    for name, side in (("height", height), ("width", width)):
        if not 0 < side <= largest or side % unit:
            raise UserError(
                f"--{name}={side}: expected a multiple of {unit} up to {largest} pixels"
            )
    run.check_writable(job.out.parent)
    return references, (height // unit, width // unit)


def paint_job(config, model, tokenizer, layout, job, references, grid):
    """Write the plan (if there shall be one) and the picture."""
    system = iccot.GENERATION_SYSTEM_PROMPT if config.plan and config.system_prompt else ""
    prompts, plan, about = [make_prompt(model, tokenizer, references, job.prompt, system)], None, {}
    if config.plan:
        plans, _ = think(
            model,
            layout,
            prompts,
            1,
            config.max_plan_tokens,
            config.temperature,
            [run.generator(job.seed, 1)],
            config.top_p,
        )
        plan = plans[0]
        about = print_plan(tokenizer.decode(plan), len(references))
    sampler = Sampler(
        config.num_timesteps,
        config.timestep_shift,
        config.text_guidance,
        config.image_guidance,
        (config.guidance_low, config.guidance_high),
        config.renorm,
        config.renorm_min,
    )
    x = paint(model, layout, prompts, [[plan]], [grid], sampler, [run.generator(job.seed, 2)])
    about |= {"prompt": job.prompt, "references": list(job.references), "seed": job.seed}
    run.write_text(
        job.out.with_suffix(".json"), json.dumps(about, ensure_ascii=False, indent=1) + "\n"
    )
    hidden = job.out.with_name(f".{job.out.name}")
    picture(model, x, grid).save(hidden)
    os.replace(hidden, job.out)
    print(f"picture    {job.out}")


def main(config):
    with exit_on_user_error(ValueError):
        wanted = jobs(config)
        model, tokenizer = load_model(
            config.init or config.checkpoint, config.device, getattr(torch, config.dtype)
        )
        layout = model.config.layout(tokenizer)
        for job in wanted:
            check(config, model, job)
    run.choose_threads(config.threads)
    several = len(wanted) > 1 or Path(config.out) != wanted[0].out
    for job in tqdm(wanted, disable=None if several else True, desc="sample"):
        if several and job.out.is_file():
            continue
        paint_job(config, model, tokenizer, layout, job, *check(config, model, job))


def print_plan(text, references):
    """The IC-CoT as a person reads it, or the raw text with what is wrong with it. Returns it for the JSON file."""
    read, problems = iccot.salvage(text, references)
    about = {
        "text": text,
        "plan": json.loads(iccot.to_json(read)) if read else None,
        "problems": problems,
    }
    if read is None:
        print(f"plan       unreadable: {text}")
        return about
    print(f"caption    {read.caption}")
    for i, relation in enumerate(read.relations, 1):
        print(f"relation {i} {relation}")
    for problem in problems:
        print(f"problem    {problem}")
    return about


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
