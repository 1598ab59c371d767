"""
One process against two: tokens a second of stage 1; what 8 and 64 GPUs would have to send.

    python -m bench scale

sft.py runs its toy preset, by itself and under torchrun with two processes, one thread each, in
alternating rounds of 30 steps; the first ten steps are left out, the best round counts. The
communication of sharded training at 7B is computed, not measured; each of n GPUs sends

    (2 + 2 + 4) (n - 1) / n bytes a weight      bfloat16 gathered twice, float32 gradients scattered

Left out: more processes than a laptop has cores; the overlap of communication and arithmetic.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime.loop import read_log

SFT = Path(__file__).resolve().parent.parent / "sft.py"
OPTIONS = "--config toy --threads 1 --steps 30 --save_every 1000 --sample_every 1000 --out"
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2"
WARM_UP = 10  # steps that do not count

VALUES, ACTIVE = 14.59e9, 6.5e9  # weights of BAGEL-7B-MoT, and those that one token meets
BYTES = 2 * 2 + 4  # sent for each value in a pass, times (n - 1) / n


def bench_scale(config):
    """Prints and returns tokens a second of one process and of two, and their ratio."""
    best = {1: 0.0, 2: 0.0}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(config.repeats):
            for processes in best:
                out = Path(folder) / f"{processes}-{repeat}"
                best[processes] = max(best[processes], tokens_per_second(processes, out))
    print(
        f"sft.py --config toy, tokens/s: one process {best[1]:,.0f}, two {best[2]:,.0f}, "
        f"{best[2] / best[1]:.2f} times as many"
    )
    print_communication()
    return {"one": round(best[1]), "two": round(best[2]), "speedup": round(best[2] / best[1], 3)}


def tokens_per_second(processes, out):
    """Tokens a second of a run of stage 1 in the folder `out`, by one process or two."""
    launcher = TORCHRUN.split() if processes == 2 else []
    command = [sys.executable, *launcher, str(SFT), *OPTIONS.split(), str(out)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = read_log(out)[WARM_UP:]
    return sum(line["tokens"] for line in lines) / sum(line["seconds"] for line in lines)


def print_communication(tokens=36_864, tflops=400, intra=360e9, *, inter=45e9):
    """Sharded training at 7B: bytes that each GPU sends for one pack, and their time.

    Every pass gathers all weights (bfloat16), and the backward pass gathers them again and scatters
    float32 gradients; a GPU moves (n - 1) / n of each. Assumed: `tflops` reached, NVLink of `intra`
    bytes/s in a node of 8, `inter` between nodes.
    """
    seconds = 6 * ACTIVE * tokens * 4 / 3 / (tflops * 1e12)
    print(
        f"computed for BAGEL-7B, all weights trained, a pack of {tokens:,} tokens a pass, "
        f"{seconds:.2f} s of arithmetic (recomputation included) at {tflops} TFLOP/s"
    )
    for gpus in (8, 64):
        sent = BYTES * VALUES * (gpus - 1) / gpus
        flat = sent / (intra if gpus <= 8 else inter)
        line = f"  {gpus:3d} GPUs, sharded over all: {sent / 1e9:6.1f} GB, {flat:5.2f} s"
        if gpus > 8:
            nodes = gpus // 8  # each holds a replica, sharded over its 8 GPUs
            inside, across = BYTES * VALUES * 7 / 8, 2 * 4 * VALUES / 8 * (nodes - 1) / nodes
            line += f"; replicas={nodes}: {inside / 1e9:6.1f} GB in the node and "
            line += f"{across / 1e9:5.1f} GB between, {inside / intra + across / inter:5.2f} s"
        print(line)
