"""
The paper's ablation on the toy world: SFT without and with IC-CoT, then RGA, then RID.

    base                  a model that saw neither IC-CoT nor in-context pairs
    SFT without IC-CoT    stage 1, painting straight from the prompt
    SFT                   stage 1, with plans
    SFT + RGA             stage 2, one plan a group
    SFT + RGA + RID       stage 2, a plan of its own for each member

Each row is trained for each seed by sft.py and grpo.py, as processes of their own, and measured on
the same held-out prompts and the same noise (metrics.py). A model that is there is not trained
again, and a row that was measured is read from evaluation.json, so a killed ablation goes on where
it was. There is no BAGEL at toy size: for "base", prompts with several references became text to
image with the caption as the instruction; those with one reference it saw as they are, and the
targets of all were right. The paper's numbers stand beside ours and are of another world and
another judge: compare the order.

Left out: other sizes of model, statistics beyond mean and standard deviation over seeds.

    python evaluate.py --config toy --ablation --seeds 3
"""

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from engine import Engine
from runtime import files, loop
from runtime.pretrained import load_model
from studies.metrics import measure
from toy.prepare import metric_clip

COLUMNS = ("PF", "SC", "Overall", "CLIP_out")


@dataclass(frozen=True)
class Row:
    """One row of the table: how its model is trained, and what the paper measured."""

    script: str
    options: tuple[str, ...] = ()
    plans: bool = True  # whether it writes an IC-CoT before it paints
    paper: tuple[float, ...] | None = None  # the paper's COLUMNS


ROWS = {
    "base": Row(
        "sft.py",
        ("--plan_dropout", "1", "--in_context", "false", "--painter_errors", "0"),
        plans=False,
        paper=(6.92, 5.47, 5.80, 32.44),
    ),
    "SFT without IC-CoT": Row("sft.py", ("--plan_dropout", "1"), plans=False),
    "SFT": Row("sft.py", paper=(7.51, 6.46, 6.77, 33.32)),
    "SFT + RGA": Row("grpo.py", ("--rid", "false"), paper=(7.46, 6.54, 6.80, 33.50)),
    "SFT + RGA + RID": Row("grpo.py", paper=(7.61, 6.57, 6.89, 33.90)),
}


# --------------------------------------------------------------------------------------------------
# training and measuring


def ablation(config):
    """All rows, over all seeds. Returns {name: [row of each seed]}, see `metrics.measure`.

    config: an evaluate.Config. Writes the table and the curves of the rewards into config.runs.
    Exits with the status of a training run that fails.
    """
    clip = metric_clip(config.metric_name, config.metric, config.clip_steps)
    rows = {name: [] for name in ROWS}
    for seed in range(config.seeds):
        for name in ROWS:
            train_row(config, name, seed)
            folder = run_folder(config, name, seed)
            rows[name].append(measure_row(folder, name, config.held_out, clip=clip))
    text, path = ablation_table(rows), f"{config.runs}/{config.config}"
    print(text)
    files.write_text(f"{path}.md", text + "\n")
    plot_rewards(config, f"{path}.png")
    print(f"table in {path}.md, rewards in {path}.png")
    return rows


def run_folder(config, name, seed):
    """The folder of the run that trains a row with a seed."""
    short = name.lower().replace(" + ", "-").replace(" ", "-")
    return Path(config.runs) / f"{config.config}-{short}-{seed}"


def train_row(config, name, seed):
    """Train one row with a seed, unless its model is there; stage 2 starts at "SFT"."""
    row, folder = ROWS[name], run_folder(config, name, seed)
    if (folder / "model").is_dir():
        return
    command = [sys.executable, str(Path(__file__).parents[1] / row.script)]
    command += ["--config", config.config, "--out", str(folder), "--seed", str(seed)]
    command += ["--threads", str(torch.get_num_threads()), *row.options]
    if row.script == "grpo.py":
        command += ["--init", str(run_folder(config, "SFT", seed)), "--eval_samples", "8"]
    print(f"ablation: {name}, seed {seed}", flush=True)
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def measure_row(folder, name, held, *, clip):
    """`metrics.measure` of the model in `folder`; read from evaluation.json if it is there.

    It counts only if it was measured on the same prompts in the same way.
    """
    if not ROWS[name].plans:
        held = replace(held, thinking=None)
    path, how = folder / "evaluation.json", json.loads(files.to_json(asdict(held)))
    if path.is_file() and (found := files.read_json(path))["how"] == how:
        return {key: math.nan if v is None else v for key, v in found["row"].items()}
    samples = held.samples()
    row = measure(samples, held.paint(Engine(*load_model(folder)), samples), clip)
    files.write_text(path, files.to_json({"how": how, "row": row}) + "\n")
    return row


# --------------------------------------------------------------------------------------------------
# the table and the curves


def ablation_table(rows):
    """Markdown: mean ± standard deviation over seeds, all seeds, the paper's numbers in brackets.

    rows: {name: [row of each seed]}.
    """
    heads = [*COLUMNS, "Overall of each seed", "Overall over SFT", "CLIP_out over SFT"]
    lines = ["| | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for name, found in rows.items():
        cells = []
        for i, column in enumerate(COLUMNS):
            paper = f" ({ROWS[name].paper[i]:.2f})" if ROWS[name].paper else ""
            mean, std = spread([row[column] for row in found])
            cells.append(f"{mean:.2f} ± {std:.2f}{paper}")
        cells.append(", ".join(f"{row['Overall']:.2f}" for row in found))
        cells += [gain(found, rows["SFT"], column) for column in ("Overall", "CLIP_out")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "In brackets: the paper's numbers, of other pictures and another judge. Differences from "
        "SFT are of the same seed; \\*: a gain of more than two standard deviations.",
    ]
    return "\n".join(lines)


def spread(values):
    """(mean, standard deviation of the sample) over seeds."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / max(1, len(values) - 1))


def gain(found, sft, column):
    """A row's difference from SFT, seed by seed: its mean ± standard deviation, * if it counts."""
    if found is sft:
        return ""
    mean, std = spread([one[column] - other[column] for one, other in zip(found, sft)])
    mark = " \\*" if len(found) > 2 and mean > 2 * std else ""
    return f"{mean:+.2f} ± {std:.2f}{mark}"


def plot_rewards(config, path):
    """Mean reward and its standard deviation within groups, with and without RID, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    curves = {"reward": "mean reward", "reward_std": "standard deviation within a group"}
    for axis, (key, title) in zip(axes, curves.items()):
        for name, colour in (("SFT + RGA", "tab:orange"), ("SFT + RGA + RID", "tab:blue")):
            thin = dict(color=colour, linewidth=0.8, alpha=0.7)
            for seed in range(config.seeds):
                values = [line[key] for line in loop.read_log(run_folder(config, name, seed))]
                axis.plot(values, label=name if seed == 0 else None, **thin)
        axis.set(title=title, xlabel="iteration")
        axis.legend(frameon=False)
    with files.published(path) as hidden:
        figure.savefig(hidden, dpi=110, format="png")
    pyplot.close(figure)
