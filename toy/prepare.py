"""
What a run on the toy world prepares for itself where it is missing.

    toy_tokenizer(folder, vocab_size)    stage 1: the tokenizer, trained on toy texts
    prepare(config)                      stage 2: CLIPs of reward and metric, then stage 1 itself
    find_stage_1(config)                 whether that stands, before anything is written
    metric_clip_of_all(config)           the CLIP of CLIP_out, trained first if it is the toys'
    painter_of(config)                   stage 1: who paints its toy targets

So `python grpo.py --config toy` is one command from nothing. Everything is made by the first
process; the others wait. What is there is kept. Not a concept of the paper.
Left out: weights of real models, which are never trained behind anybody's back.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from reward import Clip
from runtime import processes
from runtime.config import UserError
from runtime.pretrained import find_model, load_tokenizer
from toy.clip import ToyClipSettings, train_metric_clip, train_toy_clip
from toy.painter import Painter
from toy.tokenizer import train_tokenizer

TOYS = ("toy", "smoke", "small", "rehearsal")  # presets whose stage 1 is trained from nothing


def toy_tokenizer(folder, vocab_size):
    """The tokenizer of the run, trained once on toy texts by the first process."""
    path = Path(folder) / "tokenizer"
    if processes.is_main() and not path.is_dir():
        train_tokenizer(path, vocab_size)
    processes.barrier()
    return load_tokenizer(path)


def clip_steps(config):
    """Training steps of the toys' CLIPs where they are missing; 0: this preset has none."""
    if config.config not in TOYS:
        return 0
    return 20 if config.config in ("smoke", "rehearsal") else 300


def toy_clip(source, steps, where="cpu"):
    """The CLIP that measures, on a device; a folder without one gets the toys', if steps > 0."""
    if steps and is_missing(source):
        train_metric_clip(source, steps)
    return Clip(source, where)


def metric_clip_of_all(config, where=None):
    """The CLIP of CLIP_out, for all processes together; each computes on its own device, or on
    `where`."""
    with processes.first_alone():
        return toy_clip(config.metric, clip_steps(config), where or processes.device())


def painter_of(config):
    """The painter of stage 1's toy targets; None for samples on disk, which have their own.

    UserError if those are to be filtered.
    """
    if config.data != "toy":
        if config.filter_targets:
            raise UserError(
                f"filter_targets={config.filter_targets} is for the toy world's targets; those of "
                f"data={config.data} are filtered by curate.py"
            )
        return None
    # on the CPU: a worker that reads samples cannot use a GPU
    clip = metric_clip_of_all(config, "cpu") if config.filter_targets else None
    first = config.pretraining_steps * config.samples_per_step
    return Painter(config.painter_errors, config.filter_targets, clip, first)


def find_stage_1(config):
    """The model folder that stage 2 starts from; None where it is to be trained first.

    That is so for the toy presets alone, and only under their own name: any other checkpoint is
    fetched (owner/name), or a FileNotFoundError.
    """
    its_own = config.config in TOYS and config.init == f"out/{config.config}-sft"
    if its_own and not (Path(config.init) / "model").is_dir():
        return None
    return find_model(config.init)


def prepare(config):
    """Train what stage 2 needs and is missing: two small CLIPs and the stage 1 model."""
    stage_1 = find_stage_1(config)
    if processes.is_main():
        train_clips(config)
        if stage_1 is None:
            run_stage_1(config)
    processes.barrier()


def train_clips(config):
    """The two CLIPs: each a process of one thread, side by side if there are two threads."""
    steps, spawn, jobs = clip_steps(config), multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(torch.get_num_threads(), spawn, torch.set_num_threads, (1,)) as pool:
        if steps and is_missing(config.clip):
            jobs.append(pool.submit(train_toy_clip, config.clip, ToyClipSettings(steps=steps)))
        if steps and is_missing(config.metric):
            jobs.append(pool.submit(train_metric_clip, config.metric, steps))
        for job in jobs:
            job.result()


def is_missing(source):
    """Whether a CLIP is a folder (reward.py) and not there yet."""
    return ":" not in source and not (Path(source) / "clip.json").is_file()


def run_stage_1(config):
    """sft.py with the same preset, seed and samples, in a process of its own.

    Leaves with its status if it fails.
    """
    script = str(Path(__file__).parents[1] / "sft.py")
    command = [sys.executable, script, "--config", config.config, "--out", config.init]
    command += ["--threads", str(torch.get_num_threads()), "--seed", str(config.seed)]
    command += ["--max_references", str(config.max_references)]
    command += ["--picture_side", str(config.picture_side)]
    launcher = processes.OF_A_LAUNCHER
    alone = {key: value for key, value in os.environ.items() if key not in launcher}
    status = subprocess.run(command, env=alone).returncode
    if status:
        sys.exit(status)
