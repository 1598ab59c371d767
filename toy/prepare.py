"""
What a run on the toy world prepares for itself where it is missing: tokenizer, two CLIPs, and the stage 1 model.
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
from runtime.pretrained import load_tokenizer
from toy import clip
from toy.clip import train_metric_clip, train_toy_clip
from toy.tokenizer import train_tokenizer


def train_clips(config):
    """The toys' two CLIPs, where they are missing: each a process of one thread, side by side if we have two."""
    missing = lambda name, folder: name == "toy" and not (Path(folder) / "clip.json").is_file()
    spawn = multiprocessing.get_context("spawn")
    jobs = []
    with ProcessPoolExecutor(torch.get_num_threads(), spawn, torch.set_num_threads, (1,)) as pool:
        if missing(config.clip_name, config.clip):
            jobs.append(pool.submit(train_toy_clip, config.clip, seed=0, steps=config.clip_steps))
        if missing(config.metric_name, config.metric):
            jobs.append(pool.submit(clip.train_metric_clip, config.metric, config.clip_steps))
        for job in jobs:
            job.result()


def prepare(config):
    """Train what stage 2 needs and is missing, on the first process: two small CLIPs and the stage 1 model."""
    if processes.is_main():
        train_clips(config)
        if (
            not (Path(config.init) / "model").is_dir()
            and not (Path(config.init) / "llm_config.json").is_file()
        ):
            script = str(Path(__file__).parents[1].joinpath("sft.py"))
            command = [sys.executable, script, "--config", config.config, "--out", config.init]
            command += ["--threads", str(torch.get_num_threads())]
            alone = {
                key: value
                for key, value in os.environ.items()
                if key not in processes.OF_A_LAUNCHER
            }
            code = subprocess.run(command, env=alone).returncode
            if code:
                sys.exit(code)
    processes.barrier()


def toy_tokenizer(folder, vocab_size):
    """The tokenizer of the run, trained once on toy texts by the first process."""
    path = Path(folder) / "tokenizer"
    if processes.is_main() and not path.is_dir():
        train_tokenizer(path, vocab_size)
    processes.barrier()
    return load_tokenizer(path)


def metric_clip(name, weights, steps):
    """The CLIP of CLIP_out. The toys' is trained if it is missing."""
    if name == "toy":
        train_metric_clip(weights, steps)
    return Clip(name, weights)
