"""
What training did: the lines of metrics.jsonl as curves, for one run or several side by side; and
the strips of a run as one sheet and as an animation.

    python -m studies.curves --runs out/toy-grpo
    python -m studies.curves --runs "forward=out/f0,out/f1 sde=out/s0,out/s1" --over pictures

A curve is the running mean of what the last steps said, which stands behind it as a thin line.
Where a name has several runs (seeds) it is the mean over them, and they stand behind it.
Held-out metrics (`--eval_every`) are not smoothed.
`--over` says what stands at the bottom: steps, the pictures that were painted for them, or the
seconds that they took without measuring and saving. Also printed: the held-out metrics of each
name, at each measurement, as means over its runs.

During training `save_strip` paints the same prompts from the same noise, again and again. Both
stages end with `save_story`: curves.png, and of the strips lapse.png and lapse.webp, which moves.
The command draws the same of a run in progress; of several runs, curves alone.
Left out: TensorBoard and W&B, which `--tracker` serves.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from engine import Engine
from runtime import files, loop
from runtime.config import UserError, exit_on_user_error, parse
from runtime.processes import barrier, is_main, joined, rank, size
from runtime.sharding import gathered
from studies.metrics import COLUMNS
from studies.pictures import GREY, LINE, PAD, SIDE, save_png, sheet_of, some
from toy.sheets import fitted

SMOOTH = 5  # steps of a running mean; of a long run a twentieth
LINES = ("-", "--", ":")  # of the keys of a panel, which may coincide
LOGARITHMIC = ("ce", "mse")
COLUMNS_OF_LAPSE, FRAMES, PAUSE = 8, 60, 600  # strips of a sheet, of an animation; milliseconds
# panels, of those keys that a log has
PANELS = {
    "cross entropy of the plans": ("ce",),
    "squared error of the velocity": ("mse",),
    "reward": ("reward",),
    "spread of rewards in a group": ("reward_std", "reward_std_between", "reward_std_within"),
    "KL to stage 1": ("kl",),
    "share of ratios clipped": ("clip_high", "clip_low"),
    "share of groups, of plans": ("dead_groups", "parse_failures"),
    "norm of the gradient": ("grad_norm",),
} | {f"held out: {column}": (f"held_out_{column}",) for column in COLUMNS[:5]}


@dataclass(frozen=True)
class Config:
    runs: str  # run folders; NAME=FOLDER,FOLDER ... draws the means of runs that differ in the seed
    over: Literal["steps", "pictures", "seconds"] = "steps"
    out: str = ""  # the PNG; "": curves.png in the first folder


PRESETS = {"default": {}}


def save_curves(named, path, over="steps"):
    """Draw the runs, {name: [folder]}, into a PNG. UserError where a folder has no log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {name: [points(folder, over) for folder in runs] for name, runs in named.items()}
    seen = {key for runs in logs.values() for lines in runs for _, line in lines for key in line}
    panels = {title: [k for k in keys if k in seen] for title, keys in PANELS.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    rows = -(-len(panels) // 3)
    size = dict(figsize=(11, 2.6 * rows), layout="constrained")
    figure, axes = pyplot.subplots(rows, 3, squeeze=False, **size)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key, line in zip(keys, LINES):
            for name, runs in logs.items():
                label = " ".join([name] * (len(logs) > 1) + [key] * (len(keys) > 1))
                draw(axis, runs, key, label=label, line=line)
        if keys[0] in LOGARITHMIC:
            axis.set_yscale("log")
        axis.set(title=title, xlabel=over)
        if len(logs) * len(keys) > 1:
            axis.legend(frameon=False, fontsize="small")
    with files.published(path) as hidden:
        figure.savefig(hidden, dpi=100, format="png")
    pyplot.close(figure)


def draw(axis, runs, key, *, label, line):
    """The mean of some runs' curves in one colour; behind it they, or one run's single steps."""
    curves = [one for one in (curve(lines, key) for lines in runs) if one]
    if not curves:
        return
    mean = [tuple(sum(v) / len(at) for v in zip(*at)) for at in aligned(curves)]
    measured = key.startswith("held_out")
    how = dict(label=label or None, marker="." if measured else None, linestyle=line)
    (drawn,) = axis.plot(*zip(*mean), **how)
    behind = curves if len(curves) > 1 else [known(lines, key) for lines in runs]
    for one in behind if len(curves) > 1 or not measured else ():
        axis.plot(*zip(*one), color=drawn.get_color(), linewidth=0.6, alpha=0.5, zorder=1)


def aligned(curves):
    """The points of several curves that belong together, a tuple each: of one x, where there are
    such; otherwise (seconds) the first of each, the second of each and so on.
    """
    shared = set.intersection(*({x for x, _ in one} for one in curves))
    if shared:
        curves = [[(x, y) for x, y in one if x in shared] for one in curves]
    return list(zip(*curves))


def points(folder, over):
    """[(x, line of the log)] of a run. UserError where there is none."""
    lines = loop.read_log(folder)
    if not lines:
        raise UserError(f"{folder} has no metrics.jsonl with a step; give the folders of runs")
    options = files.read_json(Path(folder) / "config.json")["options"]
    each = options.get("prompts_per_step", 0) * options.get("group_size", 0)
    x, found = 0.0, []
    if over == "pictures" and not each:
        raise UserError(f"{folder} painted no pictures to learn from; use --over steps or seconds")
    for line in lines:
        parts = [key for key in line if key.endswith("seconds")]
        x = {
            "steps": line["step"] + 1,
            "pictures": (line["step"] + 1) * each,
            "seconds": x + sum(line[key] for key in parts),
        }[over]
        found.append((x, line))
    return found


def curve(lines, key):
    """[(x, y)] of one key; y is a running mean unless it is a held-out metric."""
    points = known(lines, key)
    if key.startswith("held_out"):
        return points
    means, over = [], max(SMOOTH, len(points) // 20)
    for i, (x, _) in enumerate(points):
        last = [y for _, y in points[max(0, i + 1 - over) : i + 1]]
        means.append((x, sum(last) / len(last)))
    return means


def known(lines, key):
    """[(x, y)] of one key, as it was logged."""
    return [(x, line[key]) for x, line in lines if line.get(key) is not None]


def named_runs(text):
    """{name: [folder]} of what --runs says; a folder without a name is called by its own."""
    found = {}
    for word in text.split():
        name, _, folders = word.rpartition("=")
        found[name or Path(folders).name] = folders.split(",")
    return found


def print_held_out(named, over):
    """A line a measurement, with the means over the runs of a name."""
    for name, runs in named.items():
        measured = [[(x, one) for x, one in points(f, over) if "held_out_PF" in one] for f in runs]
        for at in aligned(measured):
            x = sum(x for x, _ in at) / len(at)
            values = [
                sum(one.get(f"held_out_{column}", float("nan")) for _, one in at) / len(at)
                for column in COLUMNS
            ]
            words = "  ".join(f"{c} {v:.3f}" for c, v in zip(COLUMNS, values))
            print(f"{name}: {over} {x:,.0f}  {words}")


# --------------------------------------------------------------------------------------------------
# the strips of a run


def save_story(folder):
    """curves.png, lapse.png and lapse.webp of a run, into its folder; the first process draws.

    Nothing where it made no step.
    """
    if is_main() and loop.read_log(folder):
        save_curves({"": [folder]}, Path(folder) / "curves.png")
        save_lapse(folder)


def save_strip(folder, step, engine: Engine, *, held_out):
    """Pictures of the same eight prompts from the same noise after `step` steps of training.

    All processes take part: each paints its share, more than eight of them some twice.
    """
    eight = replace(held_out, count=8)
    samples = eight.samples()
    each = -(-len(samples) // size())
    mine = [(rank() * each + i) % len(samples) for i in range(each)]
    with gathered(engine.model):
        results = eight.paint(engine, [samples[number] for number in mine], mine)
    own = torch.stack([torch.from_numpy(np.array(one.image)) for one in results])  # (each, h, w, 3)
    pictures = joined(own, size(), 0)[: len(samples)].cpu().numpy()
    if is_main():
        sheet = strip(samples, [Image.fromarray(one) for one in pictures])
        save_png(sheet, Path(folder) / "samples" / f"{step:06d}.png")
    barrier()


def strip(samples, pictures):
    """One row a sample: references, the true target, and last its picture."""
    columns, cell = max(len(one.references) for one in samples) + 2, SIDE + PAD
    sheet, _ = sheet_of(columns * cell + PAD, len(samples) * cell + PAD)
    for row, (one, picture) in enumerate(zip(samples, pictures)):
        blank = [None] * (columns - 2 - len(one.references))
        for column, image in enumerate([*one.references, *blank, one.target, picture]):
            if image is not None:
                sheet.paste(fitted(image, SIDE), (PAD + column * cell, PAD + row * cell))
    return sheet


def save_lapse(folder):
    """The strips of a run as one sheet, a column each, and as an animation. Returns the paths."""
    paths = sorted(Path(folder, "samples").glob("*.png"))
    strips = [(f"step {int(path.stem):,}", Image.open(path).convert("RGB")) for path in paths]
    strips = [(title, one) for title, one in strips if one.size == strips[-1][1].size]
    if not strips:
        return []
    steps = [strips[i] for i in some(len(strips), COLUMNS_OF_LAPSE)]
    frames = [lapse([strips[i]]) for i in some(len(strips), FRAMES)]
    save_png(lapse(steps), Path(folder) / "lapse.png")
    moving = dict(save_all=True, append_images=frames[1:], loop=0, quality=90, method=4)
    with files.published(Path(folder) / "lapse.webp") as hidden:
        last = [PAUSE] * (len(frames) - 1) + [4 * PAUSE]
        frames[0].save(hidden, "WEBP", duration=last, **moving)
    return [Path(folder) / "lapse.png", Path(folder) / "lapse.webp"]


def lapse(strips):
    """References and true targets of a run's prompts, then the last column of each strip."""
    cell, (width, height) = SIDE + PAD, strips[0][1].size
    before, top = width - PAD - cell, LINE + PAD
    sheet, write = sheet_of(before + len(strips) * cell + PAD, top + height)
    sheet.paste(strips[0][1].crop((0, 0, before, height)), (0, top))
    write((PAD, PAD), "references", GREY)
    write((before - cell + PAD, PAD), "true target", GREY)
    for i, (title, one) in enumerate(strips):
        write((before + i * cell + PAD, PAD), title, GREY)
        sheet.paste(one.crop((before, 0, width, height)), (before + i * cell, top))
    return sheet


@exit_on_user_error()
def main(config):
    """Draw, and print where the pictures are."""
    named = named_runs(config.runs)
    folder, *others = [folder for runs in named.values() for folder in runs]
    out = config.out or str(Path(folder) / "curves.png")
    save_curves(named, out, config.over)
    print_held_out(named, config.over)
    for path in [out, *([] if others else save_lapse(folder))]:
        print(f"wrote {path}")


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
