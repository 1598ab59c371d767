"""
The least time of rivals, in alternating rounds, so that a noisy machine is noisy for all of them.

    best_of(5, {"naive": naive, "tree": tree})          CPU seconds, or those of another clock
    gpu_best_of(5, {"triton": ours, "flex": flex})      milliseconds on the GPU

A figure is the best of its rounds: what disturbs a measurement only ever adds to it.
Not a concept of the paper. Left out: means, deviations, percentiles.
"""

import time

import torch

CALLS = 5  # of a function between two events of the GPU


def best_of(repeats, rivals, clock=time.process_time):
    """{name: least seconds by `clock`} of functions without arguments, {name: function}."""
    best = {name: float("inf") for name in rivals}
    # the first round warms up, and counts if it happens to be the best
    for _ in range(repeats + 1):
        for name, function in rivals.items():
            begun = clock()
            function()
            best[name] = min(best[name], clock() - begun)
    return best


def gpu_best_of(repeats, rivals):
    """{name: least milliseconds on the GPU}; None for a rival that raises on its first call."""
    best = {}
    for name, function in rivals.items():
        try:
            function()
            torch.cuda.synchronize()
            best[name] = float("inf")
        except (RuntimeError, ValueError, AssertionError) as error:
            print(f"  {name}: {str(error)[:100]!r}")
            best[name] = None
    for _ in range(repeats):
        for name in [name for name, value in best.items() if value is not None]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(CALLS):
                rivals[name]()
            end.record()
            end.synchronize()
            best[name] = min(best[name], start.elapsed_time(end) / CALLS)
    return best
