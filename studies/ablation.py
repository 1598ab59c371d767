"""
The paper's ablation on the toy world: trains what is missing, measures every row over several seeds.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from engine import generate
from runtime import files, loop
from runtime.pretrained import load_model
from studies.metrics import measure, test_samples
from toy.prepare import metric_clip

# ---------------------------------------------------------------------------------------------------------------------
# the ablation

ROWS = {  # name: (script, options, whether it plans, the paper's PF, SC, Overall and CLIP_out)
    "base": (
        "sft.py",
        ["--plan_dropout", "1", "--in_context", "false"],
        False,
        (6.92, 5.47, 5.80, 32.44),
    ),
    "SFT without IC-CoT": ("sft.py", ["--plan_dropout", "1"], False, None),
    "SFT": ("sft.py", [], True, (7.51, 6.46, 6.77, 33.32)),
    "SFT + RGA": ("grpo.py", ["--rid", "false"], True, (7.46, 6.54, 6.80, 33.50)),
    "SFT + RGA + RID": ("grpo.py", [], True, (7.61, 6.57, 6.89, 33.90)),
}


COLUMNS = ("PF", "SC", "Overall", "CLIP_out")


def run_folder(config, name, seed):
    return (
        Path(config.runs)
        / f"{config.config}-{name.lower().replace(' + ', '-').replace(' ', '-')}-{seed}"
    )


def train_row(config, name, seed):
    """Train one row of the ablation unless its model is there."""
    script, options, _, _ = ROWS[name]
    folder = run_folder(config, name, seed)
    if (folder / "model").is_dir():
        return
    command = [
        sys.executable,
        str(Path(__file__).parents[1].joinpath(script)),
        "--config",
        config.config,
        "--out",
        str(folder),
        "--seed",
        str(seed),
        "--threads",
        str(torch.get_num_threads()),
        *options,
    ]
    if script == "grpo.py":
        command += ["--init", str(run_folder(config, "SFT", seed)), "--eval_samples", "8"]
    print(f"ablation: {name}, seed {seed}", flush=True)
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def measure_row(config, name, seed, samples, clip):
    """Table row of one trained model; measured once, then read from evaluation.json."""
    folder, how = (
        run_folder(config, name, seed),
        [config.num_samples, config.num_timesteps, config.timestep_shift, config.data_seed],
    )
    path = folder / "evaluation.json"
    if path.is_file() and (found := files.read_json(path))["how"] == how:
        return found["row"]
    model, tokenizer = load_model(folder)
    results = generate(
        model,
        model.config.layout(tokenizer),
        tokenizer,
        samples,
        config.seed,
        config.timestep_shift,
        config.num_timesteps,
        use_plan=ROWS[name][2],
    )
    row = measure(samples, results, clip)
    files.write_text(path, json.dumps({"how": how, "row": row}) + "\n")
    return row


def ablation(config):
    """All rows, over all seeds. Returns {name: [row of each seed]}."""
    clip = metric_clip(config.metric_name, config.metric, config.clip_steps)
    samples = test_samples("toy", config.num_samples, config.max_references, config.data_seed)
    rows = {name: [] for name in ROWS}
    for seed in range(config.seeds):
        for name in ROWS:
            train_row(config, name, seed)
            rows[name].append(measure_row(config, name, seed, samples, clip))
    text = ablation_table(rows)
    print(text)
    files.write_text(Path(config.runs) / f"{config.config}.md", text + "\n")
    plot_rewards(config, Path(config.runs) / f"{config.config}.png")
    print(
        f"table in {config.runs}/{config.config}.md, rewards in {config.runs}/{config.config}.png"
    )
    return rows


def ablation_table(rows):
    """Markdown: mean ± standard deviation over seeds, the values of all seeds, the paper's numbers in brackets."""
    lines = [
        "| | " + " | ".join(COLUMNS) + " | Overall of each seed |",
        "| --- " * (len(COLUMNS) + 2) + "|",
    ]
    for name, found in rows.items():
        cells = []
        for i, column in enumerate(COLUMNS):
            values = [row[column] for row in found]
            mean = sum(values) / len(values)
            std = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
            paper = f" ({ROWS[name][3][i]:.2f})" if ROWS[name][3] else ""
            cells.append(f"{mean:.2f} ± {std:.2f}{paper}")
        cells.append(", ".join(f"{row['Overall']:.2f}" for row in found))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", "In brackets: the paper's numbers, of other pictures and another judge."]
    )


def plot_rewards(config, path):
    """Mean reward and its standard deviation within groups, with and without RID, a thin line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, key, title in zip(
        axes, ("reward", "reward_std"), ("mean reward", "standard deviation within a group")
    ):
        for name, colour in (("SFT + RGA", "tab:orange"), ("SFT + RGA + RID", "tab:blue")):
            for seed in range(config.seeds):
                values = [line[key] for line in loop.read_log(run_folder(config, name, seed))]
                axis.plot(
                    values,
                    color=colour,
                    linewidth=0.8,
                    alpha=0.7,
                    label=name if seed == 0 else None,
                )
        axis.set(title=title, xlabel="iteration")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
