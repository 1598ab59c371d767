"""
The paper's ablation on the toy world: SFT without and with IC-CoT, then RGA, then RID.

    python evaluate.py --config toy --ablation --seeds 3

    base                  a model that saw neither IC-CoT nor in-context pairs
    SFT without IC-CoT    stage 1, painting straight from the prompt
    SFT                   stage 1, with plans
    SFT + RGA             stage 2, one plan a group
    SFT + RGA + RID       stage 2, a plan of its own for each member

Each row is trained for each seed by sft.py and grpo.py, as processes of their own, and measured on
the same held-out prompts and the same noise (metrics.py). What was trained is not trained again, so
a killed ablation goes on where it was. There is no BAGEL at toy size: for "base" prompts with
several references became text to image with the caption as the instruction, and all targets were
right. The paper's numbers are of another world and another judge: compare the order.
Left out: other sizes of model, statistics beyond mean and standard deviation over seeds.
"""

import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine import Engine
from runtime import files
from runtime.pretrained import load_model
from studies.curves import save_curves
from studies.metrics import measure

COLUMNS = ("PF", "SC", "Overall", "CLIP_out")


@dataclass(frozen=True)
class Row:
    """One row of the table: how its model is trained, and what the paper measured."""

    script: str
    options: tuple[str, ...] = ()
    plans: bool = True  # whether it writes an IC-CoT before it paints
    paper: tuple[float, ...] = ()  # the paper's COLUMNS


BASE = ("--plan_dropout", "1", "--in_context", "false", "--painter_errors", "0")
ROWS = {
    "base": Row("sft.py", BASE, plans=False, paper=(6.92, 5.47, 5.80, 32.44)),
    "SFT without IC-CoT": Row("sft.py", ("--plan_dropout", "1"), plans=False),
    "SFT": Row("sft.py", paper=(7.51, 6.46, 6.77, 33.32)),
    "SFT + RGA": Row("grpo.py", ("--images_per_cot", "0"), paper=(7.46, 6.54, 6.80, 33.50)),
    "SFT + RGA + RID": Row("grpo.py", paper=(7.61, 6.57, 6.89, 33.90)),
}


def ablation(config, clip):
    """All rows, over all seeds; the table and the curves of stage 2 go into config.folder.

    config: an evaluate.Config; clip: of CLIP_out. Exits with the status of a training run that
    fails.
    """
    rows, folders = {name: [] for name in ROWS}, {name: [] for name in ROWS}
    for seed in range(config.seeds):
        for name in ROWS:
            train_row(config, name, seed)
            rows[name].append(measure_row(config, name, seed, clip))
            folders[name].append(run_folder(config, name, seed))
    text, path = ablation_table(rows), config.folder / config.config
    print(text)
    files.write_text(f"{path}.md", text + "\n")
    stage_2 = {name: folders[name] for name, row in ROWS.items() if row.script == "grpo.py"}
    save_curves(stage_2, f"{path}.png")
    print(f"table in {path}.md, curves of stage 2 in {path}.png")


def run_folder(config, name, seed):
    """The folder of the run that trains a row with a seed."""
    short = name.lower().replace(" + ", "-").replace(" ", "-")
    return config.folder / f"{config.config}-{short}-{seed}"


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
    if status := subprocess.run(command).returncode:
        sys.exit(status)


def measure_row(config, name, seed, clip):
    """`metrics.measure` of a row's model: without plans where it was trained without."""
    held_out = config.held_out
    if not ROWS[name].plans:
        held_out = replace(held_out, thinking=None)
    samples, engine = held_out.samples(), Engine(*load_model(run_folder(config, name, seed)))
    return measure(samples, held_out.paint(engine, samples), clip)


def ablation_table(rows):
    """Markdown: mean ± standard deviation over seeds, all seeds, the paper's numbers in brackets.

    rows: {name: [`metrics.measure` of each seed]}.
    """
    heads = [*COLUMNS, "Overall of each seed", "Overall over SFT", "CLIP_out over SFT"]
    lines = ["| | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for name, seeds in rows.items():
        cells = [spread([row[column] for row in seeds]) for column in COLUMNS]
        for i, value in enumerate(ROWS[name].paper):
            cells[i] += f" ({value:.2f})"
        cells.append(", ".join(f"{row['Overall']:.2f}" for row in seeds))
        for column in ("Overall", "CLIP_out"):
            gains = [row[column] - sft[column] for row, sft in zip(seeds, rows["SFT"])]
            counts = len(gains) > 2 and statistics.fmean(gains) > 2 * statistics.stdev(gains)
            gain = spread(gains, "+") + " \\*" * counts
            cells.append("" if name == "SFT" else gain)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "In brackets: the paper's numbers, of other pictures and another judge. Differences from "
        "SFT are of the same seed; \\*: a gain of more than two standard deviations.",
    ]
    return "\n".join(lines)


def spread(values, sign=""):
    """Mean ± standard deviation of the sample, in words; 0 for one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.2f} ± {deviation:.2f}"
