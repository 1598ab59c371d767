"""
What a checkpoint can do: held-out prompts of the toy world, planned, painted and judged.
"""

import math
from pathlib import Path

from PIL import Image

import data
import iccot
from data import Source
from engine import generate
from reward import compare
from runtime import processes, sharding
from toy.judge import judge
from toy.tasks import Drawn


def measure(samples, results, clip):
    """The table row of a checkpoint: means over samples; PF and SC where the truth is known (the toy world).

    CLIP_out compares pictures with the true captions, CLIP_plan with those that the model wrote: what stage 2 rewards.
    """
    verdicts = [
        judge(result.image, one.truth) for one, result in zip(samples, results) if one.truth
    ]
    pictures = clip.embed_images([result.image for result in results])  # (n, embedding)
    agreement = lambda e, captions: (
        100 * float(compare(e, clip.embed_captions(captions), "clip_cos").mean())
    )
    mean = lambda values: sum(values) / len(values) if values else math.nan
    planned = [i for i, r in enumerate(results) if r.plan is not None and r.plan.caption.strip()]
    return {
        "PF": mean([v.pf for v in verdicts]),
        "SC": mean([v.sc for v in verdicts]),
        "Overall": mean([v.overall for v in verdicts]),
        "CLIP_out": agreement(pictures, [one.plan.caption for one in samples]),
        "CLIP_plan": agreement(pictures[planned], [results[i].plan.caption for i in planned])
        if planned
        else math.nan,
        "format_ok": mean([result.valid for result in results]),
        "caption_ok": mean(
            [
                r.plan is not None and r.plan.caption == one.plan.caption
                for one, r in zip(samples, results)
            ]
        ),
        "plan_ok": mean([result.plan == one.plan for one, result in zip(samples, results)]),
        "n": len(samples),
    }


def by_task(samples, results):
    """{task: (PF, SC, Overall, count)}."""
    table = {}
    for task in iccot.TASKS:
        verdicts = [
            judge(r.image, one.truth)
            for one, r in zip(samples, results)
            if one.truth and one.task == task
        ]
        if verdicts:
            n = len(verdicts)
            table[task] = tuple(
                sum(getattr(v, key) for v in verdicts) / n for key in ("pf", "sc", "overall")
            ) + (n,)
    return table


def save_grid(path, samples, results, side=128, pad=4):
    """One row a sample: references, the true target, the painted picture."""
    columns = max(len(one.references) for one in samples) + 2
    cell = side + pad
    sheet = Image.new("RGB", (columns * cell + pad, len(samples) * cell + pad), (255, 255, 255))
    for row, (one, result) in enumerate(zip(samples, results)):
        pictures = [
            *one.references,
            *[None] * (columns - 2 - len(one.references)),
            one.target,
            result.image,
        ]
        for column, image in enumerate(pictures):
            if image is not None:
                sheet.paste(data.fitted(image, side), (pad + column * cell, pad + row * cell))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_strip(folder, step, model, layout, tokenizer, config, path, **how):
    """The grid of the same eight prompts from the same noise after `step` steps of training, in folder/samples.

    config: of the training script; path: as in `test_samples`. All processes take part, the first one paints.
    """
    with sharding.gathered(model):
        if processes.is_main():
            samples = test_samples(path, 8, config.max_references, scale=config.scale)
            results = generate(model, layout, tokenizer, samples, **how)
            save_grid(folder / "samples" / f"{step:06d}.png", samples, results)
    processes.barrier()


def test_samples(path, count, max_references, seed=0, scale=1):
    """The first `count` held-out samples of the toy world, or those of samples on disk."""
    if path == "toy":
        source = Drawn("held_out", seed, max_references, scale)
        return [source[i] for i in range(count)]
    source = Source(path)
    return [source.sample(i) for i in range(min(count, len(source)))]


def print_table(rows):
    """rows: {name: measure(...)}."""
    keys = ("PF", "SC", "Overall", "CLIP_out", "CLIP_plan", "format_ok", "caption_ok")
    print(f"{'':16s}" + "".join(f"{key:>12s}" for key in keys))
    for name, row in rows.items():
        print(f"{name:16s}" + "".join(f"{row[key]:12.3f}" for key in keys))
