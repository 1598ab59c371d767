"""
What training did: the lines of metrics.jsonl as curves, for one run or several side by side; and
the strips of a run as one sheet and as an animation.

    python -m studies.curves --runs out/toy-grpo
    python -m studies.curves --runs "forward=out/f0,out/f1 sde=out/s0,out/s1"

A curve is the running mean of the last steps, over all runs (seeds) of a name; thin lines behind
it are what each run logged. Held-out metrics (`--eval_every`) are not smoothed.

During training `save_strip` paints the same prompts from the same noise, again and again. Both
stages end with `save_story`: curves.png, and of the strips lapse.png and lapse.webp, which moves.
The command draws the same of a run in progress; of several runs, curves alone.
Left out: other x than steps; TensorBoard and W&B, which `--tracker` serves, have wall time.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine import Engine
from runtime import files, loop
from runtime.config import UserError, exit_on_user_error, parse
from runtime.processes import barrier, is_main, joined, rank, size
from runtime.sharding import gathered
from studies import pictures
from studies.metrics import COLUMNS
from studies.pictures import PAD, SIDE, Cell, evenly

SMOOTH = 5  # steps of a running mean; of a long run a twentieth
STYLES = ("-", "--", ":")  # of the keys of a panel, which may coincide
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
    out: str = ""  # the PNG; "": curves.png in the first folder


PRESETS = {"default": {}}


# --------------------------------------------------------------------------------------------------
# curves


def save_curves(named, path):
    """Draw the runs, {name: [folder]}, into a PNG. UserError where a folder has no log."""
    from matplotlib.figure import Figure

    logs = {name: [log_of(folder) for folder in folders] for name, folders in named.items()}
    logged = {key for runs in logs.values() for run in runs for key in run}
    panels = {title: [k for k in keys if k in logged] for title, keys in PANELS.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (title, keys) in zip(axes, panels.items()):
        for key, style in zip(keys, STYLES):
            for name, runs in logs.items():
                label = " ".join([name] * (len(logs) > 1) + [key] * (len(keys) > 1))
                if curves := [run[key] for run in runs if key in run]:
                    draw(axis, curves, key, label, style)
        if keys[0] in LOGARITHMIC:
            axis.set_yscale("log")
        axis.set(title=title, xlabel="steps")
        if len(logs) * len(keys) > 1:
            axis.legend(frameon=False, fontsize="small")
    with files.published(path) as hidden:
        figure.savefig(hidden, dpi=100, format="png")


def draw(axis, curves, key, label, style):
    """The mean of curves {step: value}, smoothed unless it is of a held-out metric; behind it each.

    The mean is at the steps that all of them have.
    """
    shared = sorted(set.intersection(*map(set, curves)))
    mean, marker = [sum(c[step] for c in curves) / len(curves) for step in shared], "."
    if not key.startswith("held_out"):
        mean, marker = smoothed(mean), ""
    (line,) = axis.plot(shared, mean, label=label, marker=marker, linestyle=style)
    thin = dict(color=line.get_color(), linewidth=0.6, alpha=0.5, zorder=1)
    for curve in curves:
        axis.plot(curve.keys(), curve.values(), **thin)


def log_of(folder):
    """{key: {steps made: value}} of a run's log. UserError where there is none."""
    curves = {}
    for line in loop.read_log(folder):
        for key, value in line.items():
            if value is not None:
                curves.setdefault(key, {})[line["step"] + 1] = value
    if not curves:
        raise UserError(f"{folder} has no metrics.jsonl with a step; give the folders of runs")
    return curves


def smoothed(values):
    """The running mean of a list."""
    last = max(SMOOTH, len(values) // 20)
    windows = (values[max(0, end - last) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


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
    A row has a sample's references, its true target and last the picture.
    """
    eight = replace(held_out, count=8)
    samples = eight.samples()
    each = -(-len(samples) // size())
    mine = [(rank() * each + i) % len(samples) for i in range(each)]
    with gathered(engine.model):
        results = eight.paint(engine, [samples[number] for number in mine], mine)
    own = torch.stack(
        [torch.from_numpy(np.array(result.image)) for result in results]
    )  # (each, h, w, 3)
    painted = joined(own)[: len(samples)].cpu().numpy()
    if is_main():
        rows = pictures.reference_cells(samples)
        for row, sample, picture in zip(rows, samples, painted):
            row += [Cell((sample.target,)), Cell((Image.fromarray(picture),))]
        pictures.save_png(pictures.sheet_of(rows), Path(folder) / "samples" / f"{step:06d}.png")
    barrier()


def save_lapse(folder):
    """The strips of a run as one sheet, a column each, and as an animation. Returns the paths."""
    strips = []
    for path in sorted(Path(folder, "samples").glob("*.png")):
        with Image.open(path) as strip:
            strips.append((f"step {int(path.stem):,}", strip.convert("RGB")))
    strips = [(title, strip) for title, strip in strips if strip.size == strips[-1][1].size]
    if not strips:
        return []
    still, moving = Path(folder) / "lapse.png", Path(folder) / "lapse.webp"
    pictures.save_png(lapse([strips[i] for i in evenly(len(strips), COLUMNS_OF_LAPSE)]), still)
    first, *others = (lapse([strips[i]]) for i in evenly(len(strips), FRAMES))
    ms = [PAUSE] * len(others) + [4 * PAUSE]
    with files.published(moving) as hidden:
        first.save(
            hidden, "WEBP", save_all=True, append_images=others, duration=ms, loop=0, quality=90
        )
    return [still, moving]


def lapse(strips):
    """References and true targets of a run's prompts, then the last column of each strip.

    strips: [(title, a picture that save_strip made)].
    """
    first, column, top = strips[0][1], SIDE + PAD, pictures.LINE + PAD
    left = first.width - column  # of the first strip's last column
    sheet = Image.new("RGB", (left + column * len(strips), first.height + top), "white")
    sheet.paste(first, (0, top))
    pictures.write(sheet, (PAD, PAD), "references")
    pictures.write(sheet, (left - column, PAD), "true target")
    for i, (title, strip) in enumerate(strips):
        painted = strip.crop((left, 0, strip.width, strip.height))
        sheet.paste(painted, (left + i * column, top))
        pictures.write(sheet, (left + i * column, PAD), title)
    return sheet


# --------------------------------------------------------------------------------------------------
# the command


@exit_on_user_error()
def main(config):
    """Draw, and print where the pictures are."""
    named = {}
    for word in config.runs.split():  # a folder without a name is called by its own
        name, _, folders = word.rpartition("=")
        named[name or Path(folders).name] = folders.split(",")
    folder, *others = [folder for folders in named.values() for folder in folders]
    out = config.out or str(Path(folder) / "curves.png")
    save_curves(named, out)
    for path in [out, *([] if others else save_lapse(folder))]:
        print(f"wrote {path}")


if __name__ == "__main__":
    main(parse(Config, PRESETS))
