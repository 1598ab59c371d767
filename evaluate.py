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
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from engine import MAX_PLAN_TOKENS, generate
from runtime import files, processes
from runtime.config import exit_on_user_error, parse, with_path
from runtime.pretrained import load_model
from studies.ablation import ablation
from studies.benchmarks import bench
from studies.metrics import by_task, measure, print_table, save_grid, test_samples
from toy import world
from toy.prepare import metric_clip


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model
    side: int = world.SIZE  # pixels of the pictures, before the codec's resize rule
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


def arguments(argv):
    """`--bench NAME PATH` in the parser's words."""
    return with_path(argv, ("--bench",), 1, "--bench_path")


def main(config):
    if config.ablation:
        with exit_on_user_error(ValueError):
            files.check_writable(config.runs)
            processes.choose_threads(config.threads)
            ablation(config)
        return
    if config.bench:
        with exit_on_user_error(ValueError):
            processes.choose_threads(config.threads)
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
    processes.choose_threads(config.threads)
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
