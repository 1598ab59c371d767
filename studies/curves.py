"""
What training did: the lines of metrics.jsonl as curves, for one run or several side by side.

    python -m studies.curves --runs out/toy-grpo
    python -m studies.curves --runs "forward=out/f0,out/f1 sde=out/s0,out/s1" --over pictures

A curve is the mean over the runs of its name (seeds), which stand behind it as thin lines; what a
step says is smoothed over the last `SMOOTH` steps, held-out metrics (`--eval_every`) are not.
`--over` says what stands at the bottom: steps, the pictures that were painted for them, or the
seconds that they took without measuring and saving. Also printed: the held-out metrics of each
name, at each measurement, as means over its runs.

A run in progress can be looked at too. grpo.py draws curves.png into its folder at the end.
Left out: TensorBoard and W&B, which `--tracker` serves.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime import files, loop
from runtime.config import UserError, exit_on_user_error, parse
from studies.metrics import COLUMNS

SMOOTH = 5
# panels, of those keys that a log has
PANELS = {
    "loss": ("ce", "mse"),
    "reward": ("reward",),
    "spread of rewards in a group": ("reward_std", "reward_std_between", "reward_std_within"),
    "KL to stage 1": ("kl",),
    "clipped": ("clip_high", "clip_low"),
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
        for key in keys:
            for name, runs in logs.items():
                label = " ".join([name] * (len(logs) > 1) + [key] * (len(keys) > 1))
                draw(axis, [curve(lines, key) for lines in runs], label)
        axis.set(title=title, xlabel=over)
        if len(logs) * len(keys) > 1:
            axis.legend(frameon=False, fontsize="small")
    with files.published(path) as hidden:
        figure.savefig(hidden, dpi=100, format="png")
    pyplot.close(figure)


def draw(axis, curves, label):
    """The mean of some curves [(x, y)] in one colour, and they themselves behind it."""
    curves = [one for one in curves if one]
    if not curves:
        return
    mean = [tuple(sum(v) / len(at) for v in zip(*at)) for at in aligned(curves)]
    (line,) = axis.plot(*zip(*mean), label=label or None)
    for one in curves if len(curves) > 1 else ():
        axis.plot(*zip(*one), color=line.get_color(), linewidth=0.6, alpha=0.5)


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
    config, x, found = files.read_json(Path(folder) / "config.json"), 0.0, []
    each = config.get("prompts_per_step", 0) * config.get("group_size", 0)
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
    """[(x, y)] of one key; y is smoothed unless it is a held-out metric."""
    known = [(x, line[key]) for x, line in lines if line.get(key) is not None]
    if key.startswith("held_out"):
        return known
    return [
        (x, sum(y for _, y in known[max(0, i + 1 - SMOOTH) : i + 1]) / min(i + 1, SMOOTH))
        for i, (x, _) in enumerate(known)
    ]


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


@exit_on_user_error()
def main(config):
    """Draw, and print where the PNG is."""
    named = named_runs(config.runs)
    out = config.out or str(Path(next(iter(named.values()))[0]) / "curves.png")
    save_curves(named, out, config.over)
    print_held_out(named, config.over)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
