"""
runtime.loop
"""

import json
import signal
import sys
import time
from pathlib import Path

import torch

from runtime.config import UserError, to_dict
from runtime.files import check_writable, read_json, write_text
from runtime.processes import choose_threads, device, finish, is_main, rank, reduced, say, size

MAY_CHANGE = (
    "out",
    "steps",
    "threads",
    "eval_samples",
    "save_every",
    "sample_every",
    "target",
    "keep",
    "timeout_minutes",
    "tokens_per_pack",
    "replicas",
    "export",
)  # between resumptions


REQUEUE = 85  # exit status of a run that was asked to stop, has saved its state, and wants to go on


BAD_STEPS = 3  # in a row without a finite gradient: the run stops


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def start(config):
    """Make or reopen the folder of a run, and set the number of CPU threads; refuses a folder made with other options.

    A run keeps the number of threads that it began with, unless told otherwise: sums round differently with another.
    """
    folder = Path(config.out)
    check_writable(folder / "samples")
    options = json.loads(json.dumps(to_dict(config)))
    path, threads = folder / "config.json", config.threads
    if path.is_file():
        before = read_json(path)
        changed = [
            key
            for key in options
            if key not in MAY_CHANGE and before["options"].get(key) != options[key]
        ]
        if changed:
            key = changed[0]
            raise UserError(
                f"{folder} was made with {key}={before['options'].get(key)}, now {key}={options[key]}; "
                f"choose another --out, or delete the folder to start again"
            )
        threads = threads or before["threads"]
    threads = choose_threads(threads or (1 if size() > 1 else 0))
    if is_main():
        about = {"options": options, "argv": sys.argv, "threads": threads, "processes": size()}
        write_text(path, json.dumps(about, indent=1) + "\n")
    return folder


def log(folder, values):
    """Append one line to metrics.jsonl."""
    if is_main():
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")


def read_log(folder):
    """All lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def cut_log(folder, step):
    """Forget the lines of steps that will be done again; a line torn by a crash can only be the last one."""
    path = folder / "metrics.jsonl"
    if is_main() and path.is_file():
        lines = []
        for line in path.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] < step:
                    lines.append(line)
            except json.JSONDecodeError:
                break
        write_text(path, "".join(lines))


def last_step(folder, step, config):
    """Where this command ends: after config.steps, or with --export at the newest state."""
    if config.export and not step:
        raise UserError(f"{folder} has no training state to export; train first")
    return step if config.export else config.steps


# ---------------------------------------------------------------------------------------------------------------------
# the end


class Stop:
    """`Stop()` catches SIGTERM and SIGUSR1 (what SLURM sends before the end); `wanted()` tells all processes alike."""

    def __init__(self):
        self.flag = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._catch)

    def _catch(self, *_):
        self.flag = True

    def wanted(self):
        return bool(reduced([float(self.flag)], "max")[0])


def stop_here(step):
    """Leave with the status that asks for another go; the state has been saved.

    The first process to leave makes srun and torchrun terminate the others: whoever leaves ignores that, or the job's
    status would be that of a killed process and nothing would be requeued.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(f"stopped by a signal after step {step}; the same command goes on from here")
    finish()
    sys.exit(REQUEUE)


def give_up(folder, step, what):
    """Too many steps without a finite gradient: keep what they were made of, and say so."""
    path = Path(folder) / f"bad-step-{step:06d}-rank-{rank()}.json"
    write_text(path, json.dumps(what, indent=1) + "\n")
    raise UserError(
        f"{BAD_STEPS} steps in a row without a finite gradient, the last is step {step}; what it was made of is in "
        f"{path}. Lower --lr, or look at these samples"
    )


def matmul_speed(precision):
    """FLOP/s of a large square product on the device of this process: the ceiling of what training can reach."""
    n = 8192 if device().type == "cuda" else 1024
    x = torch.randn(n, n, device=device(), dtype=getattr(torch, precision))
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def pace(folder, first, model, precision):
    """Text: tokens/s of the job and its model FLOPs utilisation (MFU), from the log since step `first`; "" without any.

    A token meets one expert, half of each block's weights: 2 FLOPs a weight forward and, unless it belongs to a
    rollout, 4 more backward. The rest, attention and recomputation do not count. The ceiling is `matmul_speed`.
    """
    lines = [line for line in read_log(folder) if line["step"] >= first] if is_main() else []
    if not lines:
        return ""
    total = lambda *names: sum(line.get(name, 0) for line in lines for name in names)
    forward, trained = total("rollout_tokens"), total("tokens", "update_tokens")
    spent = total("seconds", "rollout_seconds", "reward_seconds", "update_seconds")
    weights = (
        sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks.")) / 2
    )
    used = (2 * forward + 6 * trained) * weights / spent / size() / matmul_speed(precision)
    return f", {(forward + trained) / spent:,.0f} tokens/s, MFU {100 * used:.0f} %"


def seconds(begun):
    """Wall time since `begun` (time.perf_counter) as text."""
    spent = int(time.perf_counter() - begun)
    return f"{spent // 60} min {spent % 60:02d} s"
