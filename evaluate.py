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
from pathlib import Path
from typing import Literal

from engine import Engine, Sampler, Thinking
from runtime import accountant, files, processes
from runtime.config import exit_on_user_error, parse, with_path
from runtime.pretrained import shape_of
from runtime.quantised import load_quantised
from studies.ablation import ablation
from studies.benchmarks import run_benchmark
from studies.metrics import IN_GRID, HeldOut, by_task, measure, print_table
from studies.pictures import save_grid
from toy import world
from toy.prepare import metric_clip_of_all


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-grpo"  # folder of a run or of a model, or owner/name on Hugging Face
    data: str = "toy"  # held-out prompts of the toy world, or samples on disk (no exact judge)
    split: Literal["held_out", "all"] = "held_out"  # of samples on disk: one in fifty, or all
    num_samples: int = 200  # prompts
    max_references: int = 4
    side: int = world.SIZE  # pixels of the pictures, before the codec's resize rule
    use_plan: bool = True  # write an IC-CoT first; false paints straight from the prompt
    max_plan_tokens: int = 72  # of a plan, at most
    num_timesteps: int = 7  # grid points of the sampler; one more than model evaluations
    timestep_shift: float = 10.0
    text_guidance: float = 1.0  # 1: no guidance
    image_guidance: float = 1.0
    cache_interval: int = 1  # denoising steps to a pass of the model; the others extrapolate
    batch: int = 50  # prompts painted at once: bounds the memory
    seed: int = 0  # of the noise
    metric: str = "ViT-B-32:openai"  # the CLIP of CLIP_out, see reward.Clip
    out: str = ""  # a grid of the first pictures (PNG); the folder of --bench or --ablation
    json: bool = False  # end with one line of JSON
    device: str = "auto"  # cuda, mps or cpu; auto: the first of them that is there
    weights: Literal["full", "int8", "nf4"] = "full"  # of the experts, for cards that are too small
    threads: int = 0  # CPU threads; 0: PyTorch's own number
    config: str = ""  # name of the preset
    memory: str = ""  # 1x80: print what every phase would hold of a GPU of 80 GB, and stop
    # benchmarks
    bench: Literal["", "omnicontext", "dreamomni2"] = ""  # paint, judge: --bench NAME PATH
    bench_path: str = ""  # its data: a folder, a parquet file, or owner/name on Hugging Face
    generate_only: bool = False  # paint, and do not judge
    judge_url: str = "https://api.openai.com/v1"  # OpenAI-compatible; key in OPENAI_API_KEY
    judge_model: str = "gpt-4.1"
    # ablation
    ablation: bool = False  # train and measure all rows of the paper's ablation
    seeds: int = 3  # of the ablation

    def __post_init__(self):
        for name in ("num_samples", "seeds", "batch"):
            if (value := vars(self)[name]) < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        _ = self.sampler, self.thinking  # ValueError for what cannot be drawn
        if bool(self.bench) != bool(self.bench_path):
            raise ValueError(
                "--bench needs the name of a benchmark and its data: --bench omnicontext PATH"
            )

    @property
    def folder(self):
        """Of a benchmark's pictures or the ablation's runs."""
        return Path(self.out or ("out/bench/realign" if self.bench else "out/ablation"))

    @property
    def sampler(self):
        """Editing's settings in BAGEL: guidance at all times, rescaled with the text's alone."""
        return Sampler(
            self.num_timesteps,
            self.timestep_shift,
            self.text_guidance,
            self.image_guidance,
            guidance_interval=(0.0, 1.0),
            renorm="text_channel",
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
            split=self.split,
        )

    def work(self, shape):
        """What is painted at once, for --memory; a benchmark paints one by one."""
        return replace(self.held_out, batch=1) if self.bench else self.held_out


# fmt: off
PRESETS = {
    "toy": dict(metric="out/toy-clip-metric"),
    "smoke": dict(
        checkpoint="out/smoke-grpo", num_samples=16, metric="out/smoke-clip-metric",
    ),
    "small": dict(checkpoint="out/small-grpo", side=64, metric="out/toy-clip-metric"),
    "rehearsal": dict(
        checkpoint="out/rehearsal-grpo", side=512, num_samples=4, num_timesteps=5,
        timestep_shift=3.0, text_guidance=4.0, image_guidance=2.0, max_plan_tokens=256, batch=1,
        metric="out/smoke-clip-metric",
    ),
    "full": dict(
        checkpoint="out/full-grpo", side=1024, num_timesteps=50, timestep_shift=3.0,
        text_guidance=4.0, image_guidance=2.0, max_plan_tokens=1000, batch=1,
    ),
}
# fmt: on


def arguments(argv):
    """`--bench NAME PATH` in the parser's words."""
    return with_path(argv, ("--bench",), 1, option="--bench_path")


def load_engine(config):
    """The checkpoint, where it shall be."""
    place = processes.placed(config.device, "auto")
    return Engine(*load_quantised(config.checkpoint, *place, kind=config.weights))


def evaluate(config, engine, clip, samples):
    """Paint, measure, print the tables."""
    results, name = config.held_out.paint(engine, samples), Path(config.checkpoint).name
    row = measure(samples, results, clip)
    print_table({name: row})
    for task, (pf, sc, overall, count) in by_task(samples, results).items():
        print(f"  {task:22s} PF {pf:5.2f}  SC {sc:5.2f}  Overall {overall:5.2f}  n {count}")
    if config.out:
        save_grid(config.out, samples[:IN_GRID], {name: results[:IN_GRID]})
        print(f"pictures in {config.out}")
    if config.json:
        print(files.to_json({key: round(value, 4) for key, value in row.items()}))


def main(config):
    """One checkpoint, or the ablation, or a benchmark."""
    with exit_on_user_error(ValueError):
        if config.memory:
            default = PRESETS.get(config.config, {}).get("checkpoint", Config.checkpoint)
            shape = shape_of(config.checkpoint, config.config, default)
            accountant.dry_run(accountant.walk_painting, config, shape)
            return
        processes.choose_threads(config.threads)
        if config.ablation:
            files.check_writable(config.folder)
            ablation(config, metric_clip_of_all(config, "cpu"))
            return
        if config.bench:
            run_benchmark(config, load_engine)
            return
        if config.out:
            files.check_writable(Path(config.out).parent)
        engine, clip = load_engine(config), metric_clip_of_all(config, "cpu")
        samples = config.held_out.samples()
    evaluate(config, engine, clip, samples)


if __name__ == "__main__":
    main(parse(Config, PRESETS, arguments(sys.argv[1:])))
