"""
The speeds that this project quotes, beside their rivals: python -m bench NAME

    model          one thread of a CPU: training, prefill, denoising, decoding of a mid-size model
    attention      on a GPU: TFLOP/s of our kernel and its rivals; on a CPU: what the masks cost
    grpo           whole groups against one member and one step at a time; 7B computed

A speed is the best of `repeats` rounds, in CPU time on a CPU (bench/timing.py). Nothing here is a
test: a test that measures time fails by chance. Not a concept of the paper.
Left out: other figures of RESULTS.md; their commands live at the tag before-halving.
"""

import json
import sys
from dataclasses import dataclass

import torch

from bench.attention import bench_attention
from bench.grpo import bench_grpo
from bench.model import bench_model
from runtime.config import exit_on_user_error, parse


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # rounds; the best one counts
    threads: int = 1
    seed: int = 0
    json: bool = False  # end with one line of JSON


PRESETS = {"default": {}}
REGIMES = {"model": bench_model, "attention": bench_attention, "grpo": bench_grpo}


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
