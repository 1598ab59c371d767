"""
Kill a random process at a random moment, again and again; every continuation must equal the
uninterrupted run bit for bit.

    python tests/faults.py --rounds 50       prints what was hit, and fails at the first difference

First one process is stopped (SIGSTOP) in the middle: the other must end the job when its time-out
is over. Then the rounds. A round starts two processes of sft.py that save after every step, waits
for a random time after the first new step, kills one of them with SIGKILL (also while a state is
being written: counted as "inside a save"), and starts again. When the run is finished, its weights
and its log are compared with those of a run that nobody disturbed, and the next run begins.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from runtime import loop, state  # noqa: E402
from runtime.config import parse  # noqa: E402

STEPS = 24


@dataclass(frozen=True)
class Config:
    rounds: int = 50  # kills
    seed: int = 0
    hang: bool = True  # also stop a process and wait for the time-out


PRESETS = {"default": {}}


def command(folder):
    """The run that is disturbed, as words of a command."""
    words = f"sft.py --config smoke --samples_per_step 4 --steps {STEPS} --save_every 1"
    return [*words.split(), "--out", str(folder)]


def start(folder, timeout_minutes=1.0):
    """Two processes as torchrun starts them, in a process group of their own."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    words = [sys.executable, *torchrun, *command(folder)]
    environment = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TRITON_INTERPRET="",
        TIMEOUT_MINUTES=str(timeout_minutes),
    )
    return subprocess.Popen(
        words,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def workers(launcher):
    """Process ids of the ranks."""
    found = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True
    ).stdout.split()
    return [int(pid) for pid in found]


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def losses(folder):
    return [
        (line["step"], line["ce"], line["mse"], line["grad_norm"]) for line in loop.read_log(folder)
    ]


def hang(folder):
    """Seconds from the stop of one process to the end of the job, with a time-out of 6 s."""
    launcher = start(folder, 0.1)
    while steps_done(folder) < 2:
        time.sleep(0.05)
    stopped, begun = workers(launcher)[-1], time.time()
    os.kill(stopped, signal.SIGSTOP)
    try:
        # torchrun gives its processes half a minute before it kills them
        launcher.communicate(timeout=180)
        assert launcher.returncode != 0
    finally:
        os.killpg(launcher.pid, signal.SIGKILL) if launcher.poll() is None else None
    return time.time() - begun


def main(config):
    """Returns {what: how often}."""
    rng, counts = (
        random.Random(config.seed),
        {"kills": 0, "inside a save": 0, "finished runs": 0, "torn states chosen": 0},
    )
    with tempfile.TemporaryDirectory() as temporary:
        whole, folder = Path(temporary) / "whole", Path(temporary) / "run"
        out, _ = (launcher := start(whole)).communicate(timeout=600)
        assert launcher.returncode == 0, out.decode()[-2000:]
        expected, expected_losses = load_file(whole / "model" / "ema.safetensors"), losses(whole)
        if config.hang:
            counts["seconds until a hung process ended the job"] = round(
                hang(Path(temporary) / "hung"), 1
            )
        pace = sum(line["seconds"] for line in loop.read_log(whole)) / STEPS
        while counts["kills"] < config.rounds or (folder / "config.json").is_file():
            launcher, before = start(folder), steps_done(folder)
            if counts["kills"] < config.rounds:
                while launcher.poll() is None and steps_done(folder) <= min(
                    before, state.newest_step(folder)
                ):
                    time.sleep(0.02)
                time.sleep(rng.uniform(0, 12 * pace))
                ranks = workers(launcher)
                if launcher.poll() is None and ranks:
                    counts["inside a save"] += any(folder.glob(".state-*.tmp"))
                    os.kill(rng.choice(ranks), signal.SIGKILL)
                    counts["kills"] += 1
            out, _ = launcher.communicate(timeout=600)
            counts["torn states chosen"] += b"is torn" in out
            if launcher.returncode == 0:
                found = load_file(folder / "model" / "ema.safetensors")
                assert all(torch.equal(expected[name], found[name]) for name in expected), (
                    "other weights"
                )
                assert losses(folder) == expected_losses, "another log"
                counts["finished runs"] += 1
                shutil.rmtree(folder)
    return counts


if __name__ == "__main__":
    print(json.dumps(main(parse(Config, PRESETS))))
