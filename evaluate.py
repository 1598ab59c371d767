"""
What a checkpoint can do: held-out prompts of the toy world, planned, painted and judged (paper section 7).

    PF, SC      prompt following and subject consistency, 0-10, from pixels by the exact judge of data.py
    Overall     sqrt(PF * SC) per sample, then the mean (OmniContext)
    CLIP_out    100 * cosine of CLIP embeddings of the picture and the *ground truth* caption, by a CLIP that is not the
                reward's;   CLIP_plan   the same with the caption that the model wrote, which is what stage 2 rewards
    format_ok   share of plans that parse;   caption_ok   share of captions that are exactly right

Plans are greedy, pictures start from noise that depends on `seed` alone, so two checkpoints are compared on the same
prompts and the same noise.

The ablation of the paper (its rows are ROWS) trains what is missing, measures every row over several seeds and prints
mean and standard deviation beside the paper's numbers, which are of another world and another judge: compare the order.
There is no BAGEL at toy size, so "base" is a model that saw neither IC-CoT nor in-context pairs: prompts with several
references became text to image with the caption as the instruction; those with one reference it saw as they are.

The benchmarks of the paper, OmniContext and DreamOmni2Bench, need pictures of 1024 x 1024 and an MLLM as the judge: see
benchmarks.py.

    python evaluate.py --config toy --checkpoint out/toy-grpo --json
    python evaluate.py --config full --bench omnicontext OmniGen2/OmniContext --checkpoint out/full-grpo
    python evaluate.py --config toy --ablation --seeds 3           9 x stage 1, 6 x stage 2; finished runs are picked up
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

import data
import iccot
import run
from benchmarks import bench
from config import exit_on_user_error, parse, with_path
from pretrained import load_model
from reward import Clip, compare, train_toy_clip
from sample import Sampler, make_prompt, paint, picture, think
from shards import Drawn, Source

MAX_PLAN_TOKENS = 72  # the longest plan of the toy world has 52


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model
    side: int = data.SIZE  # pixels of the pictures, before the codec's resize rule
    data: str = "toy"  # held-out prompts of the toy world, or samples on disk (no exact judge)
    scale: int = 1  # of the toy world: pixels for each of its own, each way
    num_samples: int = 200  # prompts
    max_references: int = 4
    num_timesteps: int = 7  # grid points of the sampler; one more than model evaluations
    timestep_shift: float = 10.0
    text_guidance: float = 1.0  # 1: no guidance
    use_plan: bool = True  # write an IC-CoT first; false paints straight from the prompt
    metric_name: str = "ViT-B-32"  # open_clip architecture of the CLIP of CLIP_out; toys: toy
    metric: str = "openai"  # its weights: an open_clip tag, a .safetensors file, or a folder
    clip_steps: int = 0  # training steps of the toy CLIP, if it is missing
    seed: int = 0  # of the noise
    data_seed: int = 0  # of the prompts
    threads: int = 0  # CPU threads; 0 measures
    grid: str = ""  # write a picture grid of the first samples to this file
    json: bool = False  # end with one line of JSON
    config: str = ""  # name of the preset
    # benchmarks
    bench: Literal["", "omnicontext", "dreamomni2"] = ""  # paint, judge: --bench NAME PATH
    bench_path: str = ""  # its data: a folder, a parquet file, or owner/name on Hugging Face
    result_dir: str = "out/bench"
    model_name: str = "realign"  # folder of this model's pictures and scores
    generate_only: bool = False  # paint, and do not judge
    clip_out: bool = False  # CLIP_out, where the benchmark has ground-truth captions
    judge_url: str = "https://api.openai.com/v1"  # OpenAI-compatible; may be local
    judge_model: str = "gpt-4.1"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    judge_workers: int = 16  # questions at a time
    image_guidance: float = 1.0
    guidance_low: float = 0.0  # guidance acts at times above this
    renorm: Literal["global", "channel", "text_channel"] = "text_channel"
    max_plan_tokens: int = MAX_PLAN_TOKENS
    device: str = "cpu"  # or cuda
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in memory
    # ablation
    ablation: bool = False  # train and measure all rows of the paper's ablation
    seeds: int = 3  # of the ablation
    runs: str = "out/ablation"  # where its runs are kept

    def __post_init__(self):
        if self.num_samples < 1 or self.seeds < 1:
            raise ValueError(
                f"num_samples={self.num_samples}, seeds={self.seeds}: both must be at least 1"
            )
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps={self.num_timesteps}: expected at least 2 grid points, noise and picture"
            )
        if bool(self.bench) != bool(self.bench_path):
            raise ValueError(
                "--bench needs the name of a benchmark and its data: --bench omnicontext PATH"
            )


PRESETS = {
    "toy": dict(metric_name="toy", metric="out/toy-clip-metric", clip_steps=300),
    "smoke": dict(
        checkpoint="out/smoke-grpo",
        num_samples=16,
        metric_name="toy",
        metric="out/smoke-clip-metric",
        clip_steps=20,
    ),
    "full": dict(
        checkpoint="out/full-grpo",
        side=1024,
        num_timesteps=50,
        timestep_shift=3.0,
        text_guidance=4.0,
        image_guidance=2.0,
        max_plan_tokens=1000,
        device="cuda",
        dtype="bfloat16",
    ),
}


@dataclass(frozen=True)
class Result:
    """One painted prompt."""

    text: str  # what the model wrote
    plan: iccot.ICCoT | None  # what could be read from it
    valid: bool  # whether it parses strictly
    image: Image.Image


def generate(
    model,
    layout,
    tokenizer,
    samples,
    seed=0,
    shift=10.0,
    num_timesteps=7,
    text_guidance=1.0,
    use_plan=True,
    temperature=0.0,
    batch=50,
    side=data.SIZE,
):
    """Plan and paint `samples` (anything with references and an instruction). Returns a Result for each.

    side: pixels of the square pictures, before the codec's resize rule.
    """
    sampler = Sampler(
        num_timesteps, shift, text_guidance=text_guidance, guidance_interval=(0.0, 1.0)
    )
    grid = model.config.picture_grid(side, side)
    results = []
    for first in tqdm(range(0, len(samples), batch), disable=None, desc="evaluate", leave=False):
        part = samples[first : first + batch]
        prompts = [make_prompt(model, tokenizer, one.references, one.instruction) for one in part]
        generators = lambda purpose: [
            run.generator(seed, first + i, purpose) for i in range(len(part))
        ]
        plans = [None] * len(part)
        if use_plan:
            plans, _ = think(model, layout, prompts, 1, MAX_PLAN_TOKENS, temperature, generators(1))
        x = paint(
            model,
            layout,
            prompts,
            [[plan] for plan in plans],
            [grid] * len(part),
            sampler,
            generators(2),
        )
        for one, plan, tokens in zip(part, plans, x.split(grid[0] * grid[1])):
            text = "" if plan is None else tokenizer.decode(plan)
            read, problems = (
                iccot.salvage(text, len(one.references)) if plan is not None else (None, [])
            )
            valid = plan is not None and is_valid(text, len(one.references))
            results.append(Result(text, read, valid, picture(model, tokens, grid)))
    return results


def is_valid(text, references):
    try:
        iccot.parse(text, references)
    except iccot.PlanError:
        return False
    return True


def metric_clip(name, weights, steps):
    """The CLIP of CLIP_out. The toys' is trained if it is missing."""
    if name == "toy":
        train_metric_clip(weights, steps)
    return Clip(name, weights)


def train_metric_clip(folder, steps):
    """The toys' CLIP of CLIP_out, unless it is there: another seed and picture tower than the reward's."""
    if not (Path(folder) / "clip.json").is_file():
        train_toy_clip(folder, seed=1, steps=steps, patch_size=8, width=128)


def measure(samples, results, clip):
    """The table row of a checkpoint: means over samples; PF and SC where the truth is known (the toy world).

    CLIP_out compares pictures with the true captions, CLIP_plan with those that the model wrote: what stage 2 rewards.
    """
    verdicts = [
        data.judge(result.image, one.truth) for one, result in zip(samples, results) if one.truth
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
    for task in data.TASKS:
        verdicts = [
            data.judge(r.image, one.truth)
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
    with run.gathered(model):
        if run.is_main():
            samples = test_samples(path, 8, config.max_references, scale=config.scale)
            results = generate(model, layout, tokenizer, samples, **how)
            save_grid(folder / "samples" / f"{step:06d}.png", samples, results)
    run.barrier()


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
        str(Path(__file__).with_name(script)),
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
    if path.is_file() and (found := run.read_json(path))["how"] == how:
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
    run.write_text(path, json.dumps({"how": how, "row": row}) + "\n")
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
    run.write_text(Path(config.runs) / f"{config.config}.md", text + "\n")
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
                values = [line[key] for line in run.read_log(run_folder(config, name, seed))]
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


def arguments(argv):
    """`--bench NAME PATH` in the parser's words."""
    return with_path(argv, ("--bench",), 1, "--bench_path")


def main(config):
    if config.ablation:
        with exit_on_user_error(ValueError):
            run.check_writable(config.runs)
            run.choose_threads(config.threads)
            ablation(config)
        return
    if config.bench:
        with exit_on_user_error(ValueError):
            run.choose_threads(config.threads)
            bench(
                config,
                partial(load_model, config.checkpoint, config.device, getattr(torch, config.dtype)),
                partial(metric_clip, config.metric_name, config.metric, config.clip_steps),
            )
        return
    with exit_on_user_error(ValueError):
        model, tokenizer = load_model(
            config.checkpoint, config.device, getattr(torch, config.dtype)
        )
        clip = metric_clip(config.metric_name, config.metric, config.clip_steps)
        samples = test_samples(
            config.data, config.num_samples, config.max_references, config.data_seed, config.scale
        )
    run.choose_threads(config.threads)
    results = generate(
        model,
        model.config.layout(tokenizer),
        tokenizer,
        samples,
        config.seed,
        config.timestep_shift,
        config.num_timesteps,
        config.text_guidance,
        config.use_plan,
        side=config.side,
    )
    row = measure(samples, results, clip)
    print_table({Path(config.checkpoint).name: row})
    for task, (pf, sc, overall, n) in by_task(samples, results).items():
        print(f"  {task:22s} PF {pf:5.2f}  SC {sc:5.2f}  Overall {overall:5.2f}  n {n}")
    if config.grid:
        save_grid(config.grid, samples[:8], results[:8])
        print(f"pictures in {config.grid}")
    if config.json:
        print(
            json.dumps(
                {key: None if math.isnan(value) else round(value, 4) for key, value in row.items()}
            )
        )


if __name__ == "__main__":
    main(parse(Config, PRESETS, arguments(sys.argv[1:])))
