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

import iccot
from engine import Sampler, make_prompt, paint, picture, think
from runtime import files, processes
from runtime.config import UserError, exit_on_user_error, parse
from runtime.pretrained import load_model
from vision import open_image

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
    files.check_writable(job.out.parent)
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
            [processes.generator(job.seed, 1)],
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
    x = paint(model, layout, prompts, [[plan]], [grid], sampler, [processes.generator(job.seed, 2)])
    about |= {"prompt": job.prompt, "references": list(job.references), "seed": job.seed}
    files.write_text(
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
    processes.choose_threads(config.threads)
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
