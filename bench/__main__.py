"""
Every speed and memory figure that this project quotes, beside its rival: python -m bench NAME
    model          one thread of a CPU: training, prefill, denoising, decoding of a mid-size model
    attention      on a GPU: TFLOP/s of our kernel and its rivals; on a CPU: what the masks cost
    growth         how time grows with documents, members and references
    packing        what the host does for a group of the preset `full`
    grpo           whole groups against one member and one step at a time; 7B computed
    data           samples a second read from shards at 1024 px, against decoding alone
    scale          one process against two; what 8 and 64 GPUs would have to send, computed
    signal         cosines between stage 2's gradients of independent groups, with RID and without
    memory         what each GPU holds in stage 2 of the preset `full`, computed

A speed is the best of `repeats` rounds, in CPU time on a CPU (bench/timing.py). Nothing here is a
test: a test that measures time fails by chance. Not a concept of the paper.
Left out: figures that were not measured here, unless they are named as such.
"""

import json
import sys
from dataclasses import dataclass

import torch

import grpo
from bench.advice import print_walk
from bench.attention import bench_attention
from bench.data import bench_data
from bench.growth import bench_growth
from bench.grpo import bench_grpo
from bench.model import bench_model
from bench.packing import bench_packing
from bench.scale import bench_scale
from bench.signal import bench_signal
from bench.walk import walk_grpo
from model import ModelConfig
from runtime.config import exit_on_user_error, parse


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # rounds; the best one counts
    threads: int = 1
    seed: int = 0
    json: bool = False  # end with one line of JSON
    init: str = "out/toy-sft"  # of signal: the stage 1 model
    gpus: int = 8  # of memory, and of packing in stage 1
    gpu_memory: float = 80.0  # GB of each, 10^9 bytes


PRESETS = {"default": {}}


def bench_memory(config):
    """The memory of stage 2 under the preset `full`, phase by phase, for each way to train.

    Returns {way: {phase: bytes of its peak}}.
    """
    peaks = {}
    for way in ("all", "gen", "lora"):
        full = grpo.Config(config="full", train=way, gpus=config.gpus, **grpo.PRESETS["full"])
        walked = walk_grpo(full, ModelConfig())
        print(f"train={way}, {config.gpus} GPUs")
        print_walk(walked, config.gpu_memory)
        peaks[way] = {one.name: walked.peak(one) for one in walked.phases}
    return peaks


REGIMES = {
    "model": bench_model,
    "growth": bench_growth,
    "attention": bench_attention,
    "packing": bench_packing,
    "grpo": bench_grpo,
    "data": bench_data,
    "scale": bench_scale,
    "signal": bench_signal,
    "memory": bench_memory,
}


def main(argv):
    """Run the regime that argv names."""
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    config = parse(Config, PRESETS, argv[bool(name) :])
    with exit_on_user_error(ValueError):
        if name not in REGIMES:
            raise ValueError(
                f"nothing to measure is called {name!r}; say python -m bench {' or '.join(REGIMES)}"
            )
    torch.set_num_threads(config.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {device}")
    result = REGIMES[name](config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
