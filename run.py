"""
The life of a run: its folder, its log, its training state, its pace. Not a concept of the paper.

    out/<name>/config.json        the resolved options, argv, threads
    out/<name>/metrics.jsonl      one line a step
    out/<name>/samples/           pictures of the same prompts and seeds as training goes on
    out/<name>/state-000200/      training state: weights, their moving average, optimiser (safetensors and JSON)
    out/<name>/model/             the finished model in BAGEL's layout (pretrained.py)

The same command continues a run from its newest state: data, noise and time depend on the seed and the step alone, so
a resumed run equals an uninterrupted one bit for bit. A state is written under a hidden name and published by one
rename; a run that was killed while writing leaves the state before it untouched.

Left out: more than one process.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import UserError, to_dict

MAY_CHANGE = ("steps", "threads", "eval_samples", "save_every", "sample_every", "target")  # between resumptions


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
        changed = [key for key in options if key not in MAY_CHANGE and before["options"].get(key) != options[key]]
        if changed:
            key = changed[0]
            raise UserError(f"{folder} was made with {key}={before['options'].get(key)}, now {key}={options[key]}; choose "
                            f"another --out, or delete the folder to start again")  # fmt: skip
        threads = threads or before["threads"]
    threads = choose_threads(threads)
    write_text(path, json.dumps({"options": options, "argv": sys.argv, "threads": threads}, indent=1) + "\n")
    return folder


def read_json(path):
    """The object in a JSON file that this project wrote."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is torn ({error}); delete its folder to start again") from None


def check_writable(folder):
    """Make `folder` if it is missing; UserError if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder} ({error.strerror}); choose another with --out") from None


def write_text(path, text):
    """Write a file whole or not at all."""
    hidden = Path(path).with_name(f".{Path(path).name}.tmp")
    hidden.write_text(text)
    os.replace(hidden, path)


def log(folder, values):
    """Append one line to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def read_log(folder):
    """All lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def save_state(folder, step, tensors, keep=2):
    """Publish the training state after `step` steps; the newest `keep` stay."""
    hidden, final = folder / f".state-{step:06d}.tmp", folder / f"state-{step:06d}"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, hidden / "state.safetensors")
    (hidden / "state.json").write_text(json.dumps({"step": step}) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(hidden, final)
    for old in sorted(folder.glob("state-*"))[:-keep]:
        shutil.rmtree(old)


def load_state(folder):
    """(step, tensors) of the newest state, or (0, None); the log is cut back to it."""
    states = sorted(folder.glob("state-*"))
    step, tensors = 0, None
    if states:
        try:
            tensors = load_file(states[-1] / "state.safetensors")
            step = json.loads((states[-1] / "state.json").read_text())["step"]
        except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{states[-1]} is torn ({error}); delete it to continue from the state before") from None
    lines = [line for line in read_log(folder) if line["step"] < step]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return step, tensors


def pack_state(model, optimizer, average):
    """Flat tensors of the model, its moving average and AdamW's moments, named by parameter."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        tensors[f"average.{name}"] = average[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


@torch.no_grad()
def unpack_state(tensors, model, optimizer, average):
    """Inverse of pack_state, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
        average[name].copy_(tensors[f"average.{name}"])
        keys = {key.split(".")[1] for key in tensors if key.startswith("optimizer.") and key.endswith(f".{name}")}
        optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"].clone() for key in keys}


def new_average(model):
    """The moving average of the weights, starting at the weights."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def update_average(average, model, decay):
    """average <- decay * average + (1 - decay) * weights."""
    torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - decay)


@torch.no_grad()
def swap_average(model, average):
    """Exchange the weights and their average, for evaluation; call it again to undo."""
    for name, parameter in model.named_parameters():
        held = parameter.detach().clone()
        parameter.copy_(average[name])
        average[name].copy_(held)


def generator(*numbers):
    """A torch.Generator that depends on these numbers alone: (seed, step, purpose)."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + int(number) + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def choose_threads(wanted):
    """Set the number of CPU threads: `wanted`, or with 0 the faster of one and two on a busy machine, measured."""
    if wanted == 0:
        wanted = min((1, min(2, os.cpu_count() or 1)), key=_seconds)
    torch.set_num_threads(wanted)
    return wanted


def _seconds(threads):
    torch.set_num_threads(threads)
    x, w = torch.randn(2048, 128), torch.randn(128, 384)
    best = float("inf")
    for _ in range(12):
        begun = time.perf_counter()
        for _ in range(8):
            torch.nn.functional.silu(x @ w).sum()
        best = min(best, time.perf_counter() - begun)
    return best


def seconds(begun):
    """Wall time since `begun` (time.perf_counter) as text."""
    spent = int(time.perf_counter() - begun)
    return f"{spent // 60} min {spent % 60:02d} s"
