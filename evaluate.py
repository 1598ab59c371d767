"""
What a checkpoint can do: held-out prompts planned, painted and measured (studies/metrics.py).

    python evaluate.py --config toy --checkpoint out/toy-grpo --json

prints one row (PF, SC, Overall, CLIP_out, CLIP_plan, format_ok, caption_ok) and PF, SC and Overall
of each task. Two studies of the paper start here too, since they end in the same tables:

    python evaluate.py --config toy --ablation --seeds 3           studies/ablation.py
    python evaluate.py --config full --bench omnicontext OmniGen2/OmniContext --generate_only

the second being OmniContext or DreamOmni2Bench with an MLLM as the judge (studies/benchmarks.py).
Left out: judging real pictures without an MLLM.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from engine import Engine, Sampler, Thinking
from runtime import accountant, files, processes
from runtime.config import exit_on_user_error, parse, with_path
from runtime.pretrained import shape_of
from runtime.quantised import load_quantised
from studies.ablation import ablation
from studies.benchmarks import run_benchmark
from studies.metrics import HeldOut, by_task, measure, print_table
from studies.pictures import save_grid
from toy import world
from toy.prepare import metric_clip


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model
    side: int = world.SIZE  # pixels of the pictures, before the codec's resize rule
    data: str = "toy"  # held-out prompts of the toy world, or samples on disk (no exact judge)
    split: Literal["held_out", "all"] = "held_out"  # of samples on disk: one in fifty, or all
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
    cache_interval: int = 1  # denoising steps to a pass of the model, as in sample.py
    max_plan_tokens: int = 72  # of a plan, at most
    device: str = "auto"  # cuda, mps or cpu; auto: the first of them that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; bfloat16 on a GPU
    weights: Literal["full", "int8", "nf4"] = "full"  # of the experts, for cards that are too small
    batch: int = 50  # prompts painted at once: bounds the memory
    memory: str = ""  # 1x80: print what every phase would hold of a GPU of 80 GB, and stop
    # ablation
    ablation: bool = False  # train and measure all rows of the paper's ablation
    seeds: int = 3  # of the ablation
    runs: str = "out/ablation"  # where its runs are kept

    def __post_init__(self):
        if self.num_samples < 1 or self.seeds < 1:
            raise ValueError(
                f"num_samples={self.num_samples}, seeds={self.seeds}: both must be at least 1"
            )
        if min(self.batch, self.judge_workers) < 1:
            raise ValueError(
                f"batch={self.batch}, judge_workers={self.judge_workers}: expected at least 1"
            )
        _ = self.sampler, self.thinking  # ValueError for what cannot be drawn
        if bool(self.bench) != bool(self.bench_path):
            raise ValueError(
                "--bench needs the name of a benchmark and its data: --bench omnicontext PATH"
            )

    @property
    def sampler(self):
        return Sampler(
            self.num_timesteps,
            self.timestep_shift,
            self.text_guidance,
            self.image_guidance,
            (self.guidance_low, 1.0),
            self.renorm,
            cache_interval=self.cache_interval,
        )

    @property
    def thinking(self):
        return Thinking(self.max_plan_tokens) if self.use_plan else None

    @property
    def held_out(self):
        return HeldOut(
            data=self.data,
            count=self.num_samples,
            max_references=self.max_references,
            side=self.side,
            sampler=self.sampler,
            thinking=self.thinking,
            batch=self.batch,
            seed=self.seed,
            data_seed=self.data_seed,
            split=self.split,
        )

    @property
    def work(self):
        """What is painted at once, for --memory; a benchmark paints one by one."""
        return replace(self.held_out, batch=1) if self.bench else self.held_out


# fmt: off
PRESETS = {
    "toy": dict(metric_name="toy", metric="out/toy-clip-metric", clip_steps=300),
    "smoke": dict(
        checkpoint="out/smoke-grpo", num_samples=16, metric_name="toy",
        metric="out/smoke-clip-metric", clip_steps=20,
    ),
    "small": dict(
        checkpoint="out/small-grpo", side=64, metric_name="toy",
        metric="out/toy-clip-metric", clip_steps=300,
    ),
    "rehearsal": dict(
        checkpoint="out/rehearsal-grpo", side=512, num_samples=4, num_timesteps=5,
        timestep_shift=3.0, text_guidance=4.0, image_guidance=2.0, max_plan_tokens=256, batch=1,
        metric_name="toy", metric="out/smoke-clip-metric", clip_steps=20,
    ),
    "full": dict(
        checkpoint="out/full-grpo", side=1024, num_timesteps=50, timestep_shift=3.0,
        text_guidance=4.0, image_guidance=2.0, max_plan_tokens=1000, batch=1,
    ),
}
# fmt: on


def evaluate(config, engine, clip, *, samples):
    """Paint and measure; prints the tables and returns the row."""
    results = config.held_out.paint(engine, samples)
    row = measure(samples, results, clip)
    print_table({Path(config.checkpoint).name: row})
    for task, (pf, sc, overall, count) in by_task(samples, results).items():
        print(f"  {task:22s} PF {pf:5.2f}  SC {sc:5.2f}  Overall {overall:5.2f}  n {count}")
    if config.grid:
        save_grid(config.grid, samples[:8], {Path(config.checkpoint).name: results[:8]})
        print(f"pictures in {config.grid}")
    if config.json:
        print(files.to_json({key: round(value, 4) for key, value in row.items()}))
    return row


def arguments(argv):
    """`--bench NAME PATH` in the parser's words."""
    return with_path(argv, ("--bench",), 1, option="--bench_path")


def main(config):
    """One checkpoint, or the ablation, or a benchmark."""
    if config.memory:
        default = PRESETS.get(config.config, {}).get("checkpoint", Config.checkpoint)
        with exit_on_user_error(ValueError):
            shape = shape_of(config.checkpoint, config.config, default)
            accountant.dry_run(accountant.walk_evaluate, config, shape)
        return
    metric = partial(metric_clip, config.metric_name, config.metric, config.clip_steps)
    if config.grid:
        with exit_on_user_error():
            files.check_writable(Path(config.grid).parent)

    def load_engine():
        place = processes.placed(config.device, config.dtype)
        return Engine(*load_quantised(config.checkpoint, *place, kind=config.weights))

    with exit_on_user_error(ValueError):
        if config.ablation:
            files.check_writable(config.runs)
            processes.choose_threads(config.threads)
            ablation(config)
            return
        if config.bench:
            processes.choose_threads(config.threads)
            run_benchmark(config, load_engine, metric)
            return
        engine, clip, samples = load_engine(), metric(), config.held_out.samples()
    processes.choose_threads(config.threads)
    evaluate(config, engine, clip, samples=samples)


if __name__ == "__main__":
    main(parse(Config, PRESETS, arguments(sys.argv[1:])))
