"""
The bookkeeping of a training run: its folder, log, average, states, signals and its end.

    folder = start(config, preset)                     makes or reopens the folder, sets threads
    run = Run(folder, config, state, desc="sft")       continues from the newest state, if any
    for step in run.steps():                           a progress bar
        values, finite = ...                           forward, backward, optimiser: the stage's own
        run.end_step(step, values, finite=finite, decay=0.9, samples=numbers)
        if run.state_is_due(step): ...                 strips of pictures
    run.export(engine)

    out/<name>/config.json        the resolved options, argv, threads, processes
    out/<name>/metrics.jsonl      one line a step
    out/<name>/samples/           pictures of the same prompts and noise as training goes on
    out/<name>/curves.png         and lapse.png, lapse.webp: at the end (studies/curves.py)
    out/<name>/state-000200/      training state (runtime/state.py)
    out/<name>/model/             the finished model in BAGEL's layout (runtime/pretrained.py)

The same command continues a run from its newest state, which is never older than SAVE_MINUTES and a
step, unless writing states would take more than a twentieth of the time. Nothing random is carried
from step to step: data, noise and times depend on (seed, step, sample) alone, so a resumed run
equals an uninterrupted one bit for bit, and no state of a random generator is stored. On SIGTERM or
SIGUSR1 a run finishes its step, saves the state, and leaves with status 85.

Not a concept of the paper. Left out: hooks, restarting lost processes (torchrun and SLURM do that).
"""

import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from tqdm import tqdm

from runtime.config import UserError, to_dict
from runtime.files import check_writable, lines_of, object_of, read_json, to_json, write_text
from runtime.lora import merged_weight
from runtime.pretrained import find_model, save_model, stored_tensor
from runtime.processes import barrier, finish, is_main, merged, rank, reduced, say, size, warn
from runtime.quantised import library
from runtime.sharding import whole_weights
from runtime.state import newest_step, save_state, update_average
from runtime.tracker import Tracker
from toy import world

REQUEUE = 85  # exit status of a run that was asked to stop, has saved its state, and wants to go on
SAVE_MINUTES = 10  # a state is due so long after the last,
SAVING = 20  # or so many times as long as it takes to write, if that is more
MAX_GRAD_NORM = 1.0  # gradients are scaled down to it
BAD_STEPS = 3  # in a row without a finite gradient: the run stops
SILENT = 20  # in a row without a signal: worth a warning
MISMATCH = 0.1  # of the clip range, between rollout and update: more is worth a warning
# of the log, for a person
SHOWN = ("held_out_Overall", "reward", "reward_std", "kl", "ce", "mse", "grad_norm")


# --------------------------------------------------------------------------------------------------
# options


@dataclass(frozen=True)
class Options:
    """What the configurations of both stages have in common."""

    # what may differ when a run is resumed; all else changes what is learned
    # fmt: off
    MAY_CHANGE: ClassVar[tuple] = (
        "out", "steps", "threads", "save_every", "tokens_per_pack", "replicas", "export",
        "tracker", "eval_every", "eval_batch", "checkpointing", "memory",
    )
    # fmt: on

    # data
    data: str = ""  # "toy" draws them; or a tar shard, a folder of them or of records.jsonl
    max_references: int = 4  # pictures in a prompt, at most
    picture_side: int = 1024  # pixels of the pictures that are painted, before the resize rule
    # what is trained (runtime/lora.py)
    train: Literal["all", "gen", "lora"] = "all"  # gen: that expert, latent layers; lora: adapters
    lora_rank: int = 64  # of the adapters, which count twice (alpha is 2 * rank)
    weights: Literal["full", "int8", "nf4"] = "full"  # what frozen experts are rounded to, for lora
    # machine
    checkpointing: bool = True  # recompute each block backward: less memory, a third more time
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the arithmetic alone
    replicas: int = 1  # copies of the model, each sharded over its part of the processes
    memory: str = ""  # print what each phase holds of so many GPUs (8x80: eight of 80 GB), and stop
    threads: int = 0  # CPU threads; 0: as many as PyTorch takes
    # run
    seed: int = 0
    save_every: int = 20  # steps between training states, and strips of pictures
    tracker: Literal["", "tensorboard", "wandb"] = ""  # write the log there too; both optional
    eval_every: int = 0  # steps between measurements on held-out prompts; 0: at the end alone
    eval_batch: int = 1  # prompts painted at once by strips and tables: bounds the memory
    export: bool = False  # write the newest state as `out`/model (BAGEL's layout) and stop
    metric: str = "ViT-B-32:openai"  # CLIP of CLIP_out: architecture:weights, or a folder (toys)

    def __post_init__(self):
        positive(
            max_references=self.max_references,
            picture_side=self.picture_side,
            lora_rank=self.lora_rank,
            replicas=self.replicas,
            save_every=self.save_every,
            eval_batch=self.eval_batch,
        )
        not_negative(threads=self.threads, seed=self.seed, eval_every=self.eval_every)
        if self.weights != "full" and self.train != "lora":
            raise ValueError(
                f"weights={self.weights} rounds what is frozen, and train={self.train} trains some "
                f"of it: add --train lora, or leave --weights out"
            )

    @property
    def scale(self):
        """Pixels of a toy picture for each that the toy world has, each way."""
        return max(1, self.picture_side // world.SIZE)


def positive(**values):
    """ValueError for an option that is not above 0."""
    refuse_unless(lambda value: value > 0, "a number above 0", values)


def not_negative(**values):
    """ValueError for an option below 0."""
    refuse_unless(lambda value: value >= 0, "0 or more", values)


def shares(**values):
    """ValueError for an option that is no share."""
    refuse_unless(lambda value: 0 <= value <= 1, "a share from 0 to 1", values)


def decays(**values):
    """ValueError for an option that is no decay of a moving average."""
    refuse_unless(lambda value: 0 <= value < 1, "0 or more, and below 1", values)


def refuse_unless(allowed, expected, values):
    for name, value in values.items():
        if not allowed(value):
            raise ValueError(f"{name}={value}: expected {expected}")


# options that were: what they are today, in a config.json written before. Another value there means
# that today's code would train on differently.
# fmt: off
GONE = {
    "scale": None, "rid": True, "same_start": False, "sde": "flow", "noise_level": 0.7,
    "scored_times": 3, "reward": "clip_l2", "cross_score": False, "std": "group", "guard": False,
    "max_advantage": 5.0, "kl": "velocity", "text_clip_range": 0.2, "text_weight": 1.0,
    "max_grad_norm": 1.0, "weight_decay": 0.0, "mse_weight": 1.0,
}
# fmt: on


# --------------------------------------------------------------------------------------------------
# the run


class Run:
    """One training run in this process.

    config: of the stage. state: runtime.state.TrainingState of what is trained; read in place if
    there is one on disk.
    """

    def __init__(self, folder, config, state, *, desc):
        self.folder, self.config, self.state, self.desc = Path(folder), config, state, desc
        self.begun, self.bad, self.silent = time.perf_counter(), 0, 0
        self.first = newest_step(folder)
        if self.first:
            state.load(folder, self.first)
        cut_log(folder, self.first)
        self.saved_at, self.writing = time.perf_counter(), 0.0  # seconds that a state takes
        self.stop = Stop()
        kind = config.tracker if is_main() and not config.export else ""
        self.tracker = Tracker(kind, folder, self.first, options=to_dict(config))

    def steps(self):
        """The steps that are left, behind a progress bar; none with --export."""
        self.bar = tqdm(
            range(self.first, last_step(self.folder, self.first, self.config)),
            initial=self.first,
            total=self.config.steps,
            desc=self.desc,
            disable=None if is_main() else True,
        )
        return self.bar

    def end_step(self, step, values, *, finite, decay, samples):
        """After the optimiser: average, log, state, signals.

        values: the line of the log; finite: whether the optimiser stepped; decay: of the moving
        average; samples: their numbers, kept if the run has to be given up.
        """
        self.bad = 0 if finite else self.bad + 1
        if self.bad == BAD_STEPS:
            give_up(self.folder, step, {"values": values, "samples": samples})
        if self.state.average and finite:
            update_average(self.state.average, self.state.parameters, decay)
        values = merged(values)
        log(self.folder, values)
        self.tracker.log(step, values)
        self.warn_of(step, values)
        self.report(step, values)
        last, stopped = step + 1 == self.config.steps, self.stop.wanted()
        if self.state_is_due(step) or stopped or self.time_is_due():
            begun = time.perf_counter()
            save_state(self.folder, step + 1, self.state.tensors())
            self.saved_at = time.perf_counter()
            self.writing = self.saved_at - begun
        if stopped and not last:
            self.tracker.close()
            stop_here(step + 1)

    def state_is_due(self, step):
        """Whether a state is written after this step, and a strip of pictures painted."""
        return (step + 1) % self.config.save_every == 0 or step + 1 == self.config.steps

    def time_is_due(self):
        """Whether the last state is too old; the same answer on all processes."""
        wait = max(60 * SAVE_MINUTES, SAVING * self.writing)
        late = time.perf_counter() - self.saved_at > wait
        return bool(reduced([float(late)], "min")[0])

    def measurement_is_due(self, step):
        """Whether held-out prompts shall be measured in this step."""
        return bool(self.config.eval_every) and (step + 1) % self.config.eval_every == 0

    def warn_of(self, step, values):
        """Say what of a step's numbers means that the run does not learn what it should."""
        if values.get("mismatch_clip", 0) > MISMATCH:
            warn(
                "rollout and update differ by more than a tenth of the clip range (mismatch_clip "
                "in metrics.jsonl): rounding, not learning, decides what is clipped"
            )
        reason = no_signal(values)
        self.silent = self.silent + 1 if reason else 0
        never = step + 1 == self.config.steps and self.silent == step + 1 - self.first
        if reason and (self.silent % SILENT == 0 or never):
            warn(f"{self.silent} steps in a row without a signal: {reason}")

    def report(self, step, values):
        """The step's numbers for a person: behind the bar on a terminal, as lines in a job log."""
        shown = {key: f"{values[key]:.4g}" for key in SHOWN if key in values}
        if not self.bar.disable:
            self.bar.set_postfix(shown)
            return
        spent = sum(value for key, value in values.items() if key.endswith("seconds"))
        words = " ".join(f"{key} {value}" for key, value in shown.items())
        say(f"{self.desc}: step {step + 1} of {self.config.steps}, {words}, {spent:.1f} s")

    def export(self, engine):
        """Write out/<name>/model: the average where there is one, with adapters merged; where the
        frozen weights are in few bits, into what they were rounded from."""
        self.tracker.close()
        dtype, whole = getattr(torch, self.config.precision), {}
        weights = dict(engine.model.named_parameters()) | self.state.average
        for name, weight in weights.items():
            if ".lora_" in name:
                continue
            if not weight.is_floating_point():
                if not is_main() and f"{name.removesuffix('.weight')}.lora_b" not in weights:
                    continue  # whole on every process, and the first alone writes it
                stored = stored_tensor(find_model(self.config.init), name)
                weight = stored.to(dtype).to(weight.device)
            merged_with_adapter = merged_weight(weights, name, 2.0, base=weight)
            whole |= whole_weights({name: merged_with_adapter}, dtype)
        if is_main():
            save_model(engine.model, engine.tokenizer, self.folder / "model", weights=whole)
        barrier()

    def pace(self):
        """Text to append: tokens/s of this command, from its log; "" where it made no step."""
        lines = [line for line in read_log(self.folder) if line["step"] >= self.first]

        def total(*names):
            return sum(line.get(name, 0) for line in lines for name in names)

        spent = total("seconds", "rollout_seconds", "reward_seconds", "update_seconds")
        tokens = total("tokens", "rollout_tokens", "update_tokens")
        return f", {tokens / spent:,.0f} tokens/s" if spent else ""


# --------------------------------------------------------------------------------------------------
# the folder


def start(config, preset):
    """Make or reopen the folder of a run, and set the number of CPU threads.

    preset: {option: value} that `config` began with; an option that the folder does not know had
    the preset's value when it was made. UserError for a folder made with other options.
    A run keeps the number of threads that it began with, unless told otherwise: sums round
    differently with another.
    """
    folder = Path(config.out)
    if config.weights != "full":
        library(config.weights)  # UserError before there is a folder
    _ = config.held_out  # ValueError for prompts that cannot be drawn
    check_writable(folder / "samples")
    path, threads, options = folder / "config.json", config.threads, to_dict(config)
    if path.is_file():
        before = read_json(path)
        refuse_other_options(folder, preset | before["options"], config)
        threads = threads or before["threads"]
    if threads or size() > 1:
        torch.set_num_threads(threads or 1)
    if is_main():
        threads = torch.get_num_threads()
        about = {"options": options, "argv": sys.argv, "threads": threads, "processes": size()}
        write_text(path, to_json(about, indent=1) + "\n")
    return folder


def refuse_other_options(folder, before, config):
    """UserError that names the first option with which the folder was not made."""
    now, advice = to_dict(config), "choose another --out, or delete the folder to start again"
    for key, value in now.items():
        if key not in config.MAY_CHANGE and before.get(key, value) != value:
            raise UserError(
                f"{folder} was made with {key}={before[key]}, now {key}={value}; "
                f"{advice} (what may change: {', '.join(config.MAY_CHANGE)})"
            )
    for key, value in GONE.items():
        if value is not None and before.get(key, value) != value:
            raise UserError(
                f"{folder} was made with {key}={before[key]}, an option that is gone (now always "
                f"{value}); {advice}, or go on with commit e5ac0e4"
            )


def log(folder, values):
    """Append one line to metrics.jsonl."""
    if is_main():
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(to_json(values) + "\n")


def read_log(folder):
    """All lines of metrics.jsonl."""
    path = Path(folder) / "metrics.jsonl"
    return [object_of(line) for _, line in lines_of(path)] if path.is_file() else []


def cut_log(folder, step):
    """Forget the lines of steps that will be done again, and a last line torn by a crash."""
    path = Path(folder) / "metrics.jsonl"
    if is_main() and path.is_file():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
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


# --------------------------------------------------------------------------------------------------
# the end


class Stop:
    """`Stop()` catches SIGTERM and, where there is one, SIGUSR1 (SLURM's before the end)."""

    def __init__(self):
        self.flag = False
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._catch)

    def _catch(self, *_):
        self.flag = True

    def wanted(self):
        """Whether any process was asked to stop; the same answer on all."""
        return bool(reduced([float(self.flag)], "max")[0])


def stop_here(step):
    """Leave with the status that asks for another go; the state has been saved.

    The first process to leave makes srun and torchrun terminate the others: whoever leaves ignores
    that, or the job's status would be that of a killed process and nothing would be requeued.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    barrier()  # the first process has published the state, and deleted the oldest
    say(f"stopped by a signal after step {step}; the same command goes on from here")
    finish()
    sys.exit(REQUEUE)


def give_up(folder, step, made_of):
    """Too many steps without a finite gradient: keep what they were made of, and say so."""
    path = Path(folder) / f"bad-step-{step:06d}-rank-{rank()}.json"
    write_text(path, to_json(made_of, indent=1) + "\n")
    raise UserError(
        f"{BAD_STEPS} steps in a row without a finite gradient, the last is step {step}; what it "
        f"was made of is in {path}. Lower --lr, or look at these samples"
    )


def no_signal(values):
    """Why a step taught the model nothing, by its line of the log; "" where it did."""
    if values.get("dead_groups") == 1:
        if values.get("parse_failures", 0) > 0.5:
            return (
                f"{100 * values['parse_failures']:.0f} % of the plans do not parse, and without "
                "plans all pictures of a group have the same reward (dead_groups 1); train stage 1 "
                "longer, raise --max_plan_tokens, or lower --cot_temperature"
            )
        return (
            "all pictures of a group have the same reward (dead_groups 1): its members do not "
            "differ; raise --cot_temperature"
        )
    if values.get("grad_norm") == 0:
        return "the gradient is zero (grad_norm 0): nothing that is trained changes the loss"
    return ""


# --------------------------------------------------------------------------------------------------
# time


def seconds(begun):
    """Wall time since `begun` (time.perf_counter) as text."""
    spent = int(time.perf_counter() - begun)
    return f"{spent // 60} min {spent % 60:02d} s"
