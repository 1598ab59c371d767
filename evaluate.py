"""
What a checkpoint can do: held-out prompts of the toy world, planned, painted and judged (paper section 7).

    PF, SC      prompt following and subject consistency, 0-10, from pixels by the exact judge of data.py
    Overall     sqrt(PF * SC) per sample, then the mean (OmniContext)
    CLIP_out    100 * cosine of CLIP embeddings of the picture and the *ground truth* caption, by a CLIP that is not the
                reward's
    format_ok   share of plans that parse;   caption_ok   share of captions that are exactly right

Plans are greedy, pictures start from noise that depends on `seed` alone, so two checkpoints are compared on the same
prompts and the same noise.

Left out: OmniContext and DreamOmni2Bench, which need a judge model.

    python evaluate.py --config toy --checkpoint out/toy-grpo --json
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import iccot
import run
from config import exit_on_user_error, parse
from pretrained import load_model
from reward import Clip, train_toy_clip
from sample import Sampler, make_prompt, paint, picture, think

MAX_PLAN_TOKENS = 72  # the longest plan of the toy world has 52


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model
    num_samples: int = 200  # held-out prompts
    max_references: int = 4
    num_timesteps: int = 7  # grid points of the sampler; one more than model evaluations
    timestep_shift: float = 10.0
    text_guidance: float = 1.0  # 1: no guidance
    use_plan: bool = True  # write an IC-CoT first; false paints straight from the prompt
    metric_name: str = "ViT-B-32"  # open_clip architecture of the CLIP that measures CLIP_out; toys: toy
    metric: str = "openai"  # its weights: an open_clip tag, a .safetensors file, or the folder of a toy CLIP
    clip_steps: int = 0  # training steps of the toy CLIP, if it is missing
    seed: int = 0  # of the noise
    data_seed: int = 0  # of the prompts
    threads: int = 0  # CPU threads; 0 measures
    grid: str = ""  # write a picture grid of the first samples to this file
    json: bool = False  # end with one line of JSON


PRESETS = {
    "toy": dict(metric_name="toy", metric="out/toy-clip-metric", clip_steps=300),
    "smoke": dict(checkpoint="out/smoke-grpo", num_samples=16, metric_name="toy",
                  metric="out/smoke-clip-metric", clip_steps=20),
}


@dataclass(frozen=True)
class Result:
    """One painted prompt."""

    text: str  # what the model wrote
    plan: iccot.ICCoT | None  # what could be read from it
    valid: bool  # whether it parses strictly
    image: Image.Image


def generate(model, layout, tokenizer, samples, seed=0, shift=10.0, num_timesteps=7, text_guidance=1.0, use_plan=True,
             temperature=0.0, batch=50):  # fmt: skip
    """Plan and paint `samples` (data.Sample, or anything with references and instruction). Returns a Result for each."""
    sampler = Sampler(num_timesteps, shift, text_guidance=text_guidance, guidance_interval=(0.0, 1.0))
    grid = model.config.picture_grid(data.SIZE, data.SIZE)
    results = []
    for first in tqdm(range(0, len(samples), batch), disable=None, desc="evaluate", leave=False):
        part = samples[first : first + batch]
        prompts = [make_prompt(model, tokenizer, one.references, one.instruction) for one in part]
        generators = lambda purpose: [run.generator(seed, first + i, purpose) for i in range(len(part))]
        plans = [None] * len(part)
        if use_plan:
            plans, _ = think(model, layout, prompts, 1, MAX_PLAN_TOKENS, temperature, generators(1))
        x = paint(model, layout, prompts, [[plan] for plan in plans], [grid] * len(part), sampler, generators(2))
        for one, plan, tokens in zip(part, plans, x.split(grid[0] * grid[1])):
            text = "" if plan is None else tokenizer.decode(plan)
            read, problems = iccot.salvage(text, len(one.references)) if plan is not None else (None, [])
            results.append(Result(text, read, plan is not None and is_valid(text, len(one.references)), picture(model, tokens, grid)))
    return results


def is_valid(text, references):
    try:
        iccot.parse(text, references)
    except iccot.PlanError:
        return False
    return True


def metric_clip(name, weights, steps):
    """The CLIP of CLIP_out. The toys' is trained if it is missing: other seed, other picture tower than the reward's."""
    if name == "toy" and not (Path(weights) / "clip.json").is_file():
        train_toy_clip(weights, seed=1, steps=steps, patch_size=8, width=128)
    return Clip(name, weights)


def measure(samples, results, clip):
    """The table row of a checkpoint: means over samples."""
    verdicts = [data.judge(result.image, one.truth) for one, result in zip(samples, results)]
    clip_out = clip.clip_out([result.image for result in results], [one.plan.caption for one in samples])
    mean = lambda values: sum(values) / len(values)
    return {
        "PF": mean([v.pf for v in verdicts]),
        "SC": mean([v.sc for v in verdicts]),
        "Overall": mean([v.overall for v in verdicts]),
        "CLIP_out": float(clip_out.mean()),
        "format_ok": mean([result.valid for result in results]),
        "caption_ok": mean([result.plan is not None and result.plan.caption == one.plan.caption for one, result in zip(samples, results)]),
        "plan_ok": mean([result.plan == one.plan for one, result in zip(samples, results)]),
        "n": len(samples),
    }  # fmt: skip


def by_task(samples, results):
    """{task: (PF, SC, Overall, count)}."""
    table = {}
    for task in data.TASKS:
        verdicts = [data.judge(r.image, one.truth) for one, r in zip(samples, results) if one.task == task]
        if verdicts:
            n = len(verdicts)
            table[task] = tuple(sum(getattr(v, key) for v in verdicts) / n for key in ("pf", "sc", "overall")) + (n,)
    return table


def save_grid(path, samples, results, scale=4, pad=4):
    """One row a sample: references, the true target, the painted picture in a frame."""
    columns = max(len(one.references) for one in samples) + 2
    cell = data.SIZE * scale + pad
    sheet = Image.new("RGB", (columns * cell + pad, len(samples) * cell + pad), (255, 255, 255))
    for row, (one, result) in enumerate(zip(samples, results)):
        pictures = [*one.references, *[None] * (columns - 2 - len(one.references)), one.target, result.image]
        for column, image in enumerate(pictures):
            if image is not None:
                image = image.resize((image.width * scale, image.height * scale), Image.NEAREST)
                sheet.paste(image, (pad + column * cell, pad + row * cell))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_strip(path, model, layout, tokenizer, max_references, count=8, **how):
    """The grid of the first held-out prompts, always the same ones from the same noise."""
    samples = [data.draw_sample("held_out", i, 0, max_references) for i in range(count)]
    save_grid(path, samples, generate(model, layout, tokenizer, samples, **how))


def print_table(rows):
    """rows: {name: measure(...)}."""
    keys = ("PF", "SC", "Overall", "CLIP_out", "format_ok", "caption_ok")
    print(f"{'':16s}" + "".join(f"{key:>12s}" for key in keys))
    for name, row in rows.items():
        print(f"{name:16s}" + "".join(f"{row[key]:12.3f}" for key in keys))


def main(config):
    with exit_on_user_error(ValueError):
        model, tokenizer = load_model(config.checkpoint)
        clip = metric_clip(config.metric_name, config.metric, config.clip_steps)
        samples = [data.draw_sample("held_out", i, config.data_seed, config.max_references) for i in range(config.num_samples)]
    run.choose_threads(config.threads)
    results = generate(model, model.config.layout(tokenizer), tokenizer, samples, config.seed, config.timestep_shift,
                       config.num_timesteps, config.text_guidance, config.use_plan)  # fmt: skip
    row = measure(samples, results, clip)
    print_table({Path(config.checkpoint).name: row})
    for task, (pf, sc, overall, n) in by_task(samples, results).items():
        print(f"  {task:22s} PF {pf:5.2f}  SC {sc:5.2f}  Overall {overall:5.2f}  n {n}")
    if config.grid:
        save_grid(config.grid, samples[:8], results[:8])
        print(f"pictures in {config.grid}")
    if config.json:
        print(json.dumps({key: round(value, 4) for key, value in row.items()}))


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
