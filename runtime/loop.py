"""
The bookkeeping of a training run: its folder, log, average, states, signals and its end.

    folder = start(config)                             makes or reopens the folder, sets threads
    run = Run(folder, config, state, desc="sft")       continues from the newest state, if any
    for step in run.steps():                           a progress bar
        values, finite = ...                           forward, backward, optimiser: the stage's own
        run.end_step(step, values, finite=finite, decay=0.9, made_of=samples)
        if run.strip_is_due(step): ...
    run.finish()

    out/<name>/config.json        the resolved options, argv, threads, processes
    out/<name>/metrics.jsonl      one line a step
    out/<name>/samples/           pictures of the same prompts and noise as training goes on
    out/<name>/curves.png         and lapse.png, lapse.webp: at the end (studies/curves.py)
    out/<name>/state-000200/      training state (runtime/state.py)
    out/<name>/model/             the finished model in BAGEL's layout (runtime/pretrained.py)

The same command continues a run from its newest state, which is never older than `save_minutes`
and a step, unless writing states would take more than a twentieth of the time. Nothing random is
carried from step to step: data, noise and times depend on (seed, step, sample) alone, so a resumed
run equals an uninterrupted one bit for bit, and no state of a random generator is stored. On
SIGTERM or SIGUSR1 a run finishes its step, saves the state, and leaves with status 85.
Not a concept of the paper.
Left out: hooks, restarting lost processes (torchrun and SLURM do that).
"""

import json
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from runtime.config import UserError, to_dict
from runtime.files import check_writable, lines_of, object_of, read_json, to_json, write_text
from runtime.lora import merged_weight
from runtime.pretrained import find_model, save_model, stored_tensor
from runtime.processes import (
    barrier,
    choose_threads,
    device,
    finish,
    is_main,
    merged,
    rank,
    reduced,
    say,
    size,
    warn,
)
from runtime.quantised import count, library
from runtime.sharding import whole_weights
from runtime.state import Saver, newest_step, update_average
from runtime.tracker import Tracker

# fmt: off
MAY_CHANGE = (  # between resumptions
    "out", "steps", "threads", "eval_samples", "save_every", "sample_every", "target", "keep",
    "timeout_minutes", "tokens_per_pack", "replicas", "export", "pictures_at_once",
    "groups_at_once", "workers", "async_save", "save_minutes", "tracker", "eval_every",
    "eval_batch", "eval_data", "export_float32",
    "checkpointing", "sum_every_pass", "memory",
)
# fmt: on


# options of the stages, what they may be, and that in words
POSITIVE = (
    "samples_per_step prompts_per_step updates noise_copies lora_rank save_every sample_every keep "
    "eval_samples eval_batch groups_at_once pictures_at_once picture_side tokens_per_pack scale "
    "max_references replicas timestep_shift"
)
NOT_NEGATIVE = (
    "workers seed threads lr weight_decay warmup eval_every save_minutes ce_weight mse_weight "
    "kl_beta std_floor clip_steps pretraining_steps"
)
SHARES = "plan_dropout text_dropout vae_dropout vit_dropout decay painter_errors filter_targets"
BOUNDS = (
    (POSITIVE, lambda value: value > 0, "a number above 0"),
    (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (SHARES, lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    ("average beta2", lambda value: 0 <= value < 1, "0 or more, and below 1"),
)


@dataclass(frozen=True)
class Options:
    """What the configurations of both stages have in common."""

    # data
    data: str = ""  # "toy" draws them; or a tar shard, a folder of them or of records.jsonl
    scale: int = 1  # of the toy world: pixels for each of its own, each way
    # what is trained (runtime/lora.py)
    train: Literal["all", "gen", "lora"] = "all"  # gen: that expert, latent layers; lora: adapters
    lora_rank: int = 64
    lora_alpha: float = 128.0  # the adapters' sum counts alpha / rank
    weights: Literal["full", "int8", "nf4"] = "full"  # what frozen experts are rounded to, for lora
    max_grad_norm: float = 1.0
    # machine
    checkpointing: bool = True  # recompute each block backward: less memory, a third more time
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the arithmetic alone
    sum_every_pass: bool = True  # sum gradients every pass (a shard stays) or once a step
    replicas: int = 1  # copies of the model, each sharded over its part of the processes
    timeout_minutes: float = 30.0  # a process that waits longer than this for another ends the job
    memory: str = ""  # 8x80: print what every phase would hold of 8 GPUs of 80 GB, and stop
    # run
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures which of one and two is faster
    keep: int = 2  # training states that stay
    save_minutes: float = 10.0  # a state is due so long after the last; 0: off; see SAVING
    async_save: bool = False  # write states while training goes on; one more copy on the host
    tracker: Literal["", "tensorboard", "wandb"] = ""  # write the log there too; both optional
    eval_every: int = 0  # steps between measurements on held-out prompts; 0: at the end alone
    eval_batch: int = 1  # prompts painted at once by strips and tables: bounds the memory
    export_float32: bool = False  # write out/<name>/model in float32: small updates survive
    export: bool = False  # write the newest state as `out`/model (BAGEL's layout) and stop
    # the CLIP that measures CLIP_out
    metric_name: str = "ViT-B-32"  # its open_clip architecture; toys: toy
    metric: str = "openai"  # its weights: an open_clip tag, a .safetensors file, or a folder
    clip_steps: int = 0  # training steps of the toys' CLIPs, where they are missing

    def __post_init__(self):
        for names, allowed, words in BOUNDS:
            for name in names.split():
                if hasattr(self, name) and not allowed(getattr(self, name)):
                    raise ValueError(f"{name}={getattr(self, name)}: expected {words}")
        super().__post_init__()  # of the stage's own options
        if self.weights != "full" and self.train != "lora":
            raise ValueError(
                f"weights={self.weights} rounds what is frozen, and train={self.train} trains some "
                f"of it: add --train lora, or leave --weights out"
            )


REQUEUE = 85  # exit status of a run that was asked to stop, has saved its state, and wants to go on
MISMATCH = 0.1  # of the clip range, between rollout and update: more is worth a warning
# of the log, for a person
SHOWN = ("held_out_Overall", "reward", "reward_std", "kl", "ce", "mse", "grad_norm")
BAD_STEPS = 3  # in a row without a finite gradient: the run stops
SAVING = 20  # times as long as a state takes to write, at least, until one is due by time
SILENT = 20  # in a row without a signal: worth a warning


class Run:
    """One training run in this process.

    config: of the stage, with steps, save_every, sample_every, keep, async_save, export.
    state: runtime.state.TrainingState of what is trained; read in place if there is one on disk.
    """

    def __init__(self, folder, config, state, *, desc):
        self.folder, self.config, self.state, self.desc = Path(folder), config, state, desc
        self.begun, self.bad, self.silent = time.perf_counter(), 0, 0
        self.first = newest_step(folder)
        if self.first:
            state.load(folder, self.first)
        cut_log(folder, self.first)
        self.saved, self.saved_at, self.writing = self.first, time.perf_counter(), 0.0
        self.stop, self.saver = Stop(), Saver(folder, config.keep, config.async_save)
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

    def end_step(self, step, values, *, finite, decay, made_of):
        """After the optimiser: average, log, state, signals.

        values: the line of the log; finite: whether the optimiser stepped; decay: of the moving
        average; made_of: numbers of the samples, kept if the run has to be given up.
        """
        self.bad = 0 if finite else self.bad + 1
        if self.bad == BAD_STEPS:
            give_up(self.folder, step, {"values": values, "samples": made_of})
        if self.state.average and finite:
            update_average(self.state.average, self.state.parameters, decay)
        values = merged(values)
        log(self.folder, values)
        self.tracker.log(step, values)
        if values.get("mismatch_clip", 0) > MISMATCH:
            warn(
                "rollout and update differ by more than a tenth of the clip range (mismatch_clip "
                "in metrics.jsonl): rounding, not learning, decides what is clipped"
            )
        self.report(step, values)
        self.saver.poll()
        last, wanted = step + 1 == self.config.steps, self.stop.wanted()
        why = no_signal(values)
        self.silent = self.silent + 1 if why else 0
        if why and (self.silent % SILENT == 0 or last and self.silent == step + 1 - self.first):
            warn(f"{self.silent} steps in a row without a signal: {why}")
        if (step + 1) % self.config.save_every == 0 or last or self.save_is_due():
            self.save(step + 1)
        if wanted and not last:
            self.leave(step + 1)

    def report(self, step, values):
        """The step's numbers for a person: behind the bar on a terminal, as lines in a job log."""
        shown = {key: f"{values[key]:.4g}" for key in SHOWN if key in values}
        if not self.bar.disable:
            self.bar.set_postfix(shown)
            return
        spent = sum(value for key, value in values.items() if key.endswith("seconds"))
        words = " ".join(f"{key} {value}" for key, value in shown.items())
        say(f"{self.desc}: step {step + 1} of {self.config.steps}, {words}, {spent:.1f} s")

    def save_is_due(self):
        """Whether `save_minutes` have passed since the last state, and SAVING times what it took to
        write; the same answer on all."""
        passed = time.perf_counter() - self.saved_at
        wait = max(60 * self.config.save_minutes, SAVING * self.writing)
        late = bool(self.config.save_minutes) and passed > wait
        return bool(reduced([float(late)], "min")[0])

    def save(self, step):
        """Write the state after `step` steps."""
        begun = time.perf_counter()
        self.saver.save(step, self.state.tensors())
        self.saved, self.saved_at = step, time.perf_counter()
        self.writing = self.saved_at - begun  # in the background: what training waited for

    def leave(self, step):
        """Asked to stop after `step` whole steps: save what is not saved yet, and go."""
        if self.saved != step:
            self.save(step)
        self.finish()
        stop_here(step)

    def measurement_is_due(self, step):
        """Whether held-out prompts shall be measured in this step."""
        every = self.config.eval_every
        return bool(every) and (step + 1) % every == 0

    def strip_is_due(self, step):
        """Whether pictures of the same prompts shall be painted after this step."""
        return (step + 1) % self.config.sample_every == 0

    def finish(self):
        """Wait for the last state to be written."""
        self.saver.wait()
        self.tracker.close()

    def export(self, engine):
        """Write out/<name>/model: the average where there is one, with adapters merged; where the
        frozen weights are in few bits, into what they were rounded from."""
        config, whole, moved, lost = self.config, {}, 0, 0
        weights = dict(engine.model.named_parameters()) | self.state.average
        dtype = getattr(torch, "float32" if config.export_float32 else config.precision)
        before = self.before()
        changed = self.changed() if before and dtype != torch.float32 else ()
        for name in (name for name in weights if ".lora_" not in name):
            known, base = name in changed, weights[name]
            if not base.is_floating_point():
                if not is_main() and f"{name.removesuffix('.weight')}.lora_b" not in weights:
                    continue  # whole as it is, and the first process alone writes it
                base = self.weight_before(before, name, base).to(base.device)
            tensor = merged_weight(weights, name, config.lora_alpha / config.lora_rank, base=base)
            found = whole_weights({name: tensor}, torch.float32 if known else dtype)
            whole |= {key: value.to(dtype) for key, value in found.items()}
            if known:
                old = self.weight_before(before, name, weights[name]).float()
                is_new = found[name] != old
                moved += int(is_new.sum())
                lost += int((is_new & (whole[name] == old.to(dtype))).sum())
        self.say_what_is_lost(lost, moved)
        if is_main():
            save_model(engine.model, engine.tokenizer, self.folder / "model", weights=whole)
        barrier()

    def say_what_is_lost(self, lost, moved):
        """A warning where rounding undoes most of what was learned since `init`."""
        if lost > moved / 2:
            warn(
                f"{lost:,} of the {moved:,} weights that training changed are again what they were "
                f"in {self.config.init}, rounded to {self.config.precision}; the same command with "
                f"--export --export_float32 writes them as they are"
            )

    def before(self):
        """The folder of the weights from which training began; None if it is gone, or if there is
        none. UserError if a model cannot be written without it."""
        try:
            return find_model(self.config.init) if self.config.init else None
        except FileNotFoundError as error:
            if self.config.weights == "full":
                return None
            raise UserError(
                f"{error}; weights={self.config.weights} needs the checkpoint to write a model"
            ) from None

    def changed(self):
        """Names of the weights that training has changed, by adapters too; none on other processes
        than the first."""
        names = self.state.parameters if is_main() else ()
        return {re.sub(r"\.lora_[ab]$", ".weight", name) for name in names}

    def weight_before(self, folder, name, held):
        """A weight as it was when training began: of the type that it is `held` as, or where that
        is a few bits, what was rounded to them."""
        dtype = held.dtype if held.is_floating_point() else getattr(torch, self.config.precision)
        return stored_tensor(folder, name).to(dtype)

    def pace(self, model):
        """tokens/s and MFU of this command, as text to append."""
        return pace(self.folder, self.first, model, precision=self.config.precision)


# --------------------------------------------------------------------------------------------------
# the folder


def start(config):
    """Make or reopen the folder of a run, and set the number of CPU threads.

    UserError for a folder made with other options; one that was not there yet had its default. A
    run keeps the number of threads that it began with, unless told otherwise: sums round
    differently with another.
    """
    folder = Path(config.out)
    if not config.data:
        raise UserError(
            f"config={config.config} has no samples of its own: name yours with --data (a tar "
            f"shard, a folder of them or of records.jsonl), or --data toy for drawn ones"
        )
    if config.weights != "full":
        library(config.weights)  # UserError before there is a folder
    _ = config.held_out  # ValueError for prompts that cannot be drawn
    check_writable(folder / "samples")
    options, defaults = (json.loads(to_json(to_dict(one))) for one in (config, type(config)()))
    path, threads = folder / "config.json", config.threads
    if path.is_file():
        before = read_json(path)
        refuse_other_options(folder, defaults | before["options"], options)
        threads = threads or before["threads"]
    threads = choose_threads(threads or (1 if size() > 1 else 0))
    if is_main():
        about = {"options": options, "argv": sys.argv, "threads": threads, "processes": size()}
        write_text(path, to_json(about, indent=1) + "\n")
    return folder


def refuse_other_options(folder, before, options):
    """UserError that names the first option with which the folder was not made."""
    for key, value in options.items():
        if key not in MAY_CHANGE and before[key] != value:
            raise UserError(
                f"{folder} was made with {key}={before[key]}, now {key}={value}; "
                f"choose another --out, or delete the folder to start again (what may change: "
                f"{', '.join(MAY_CHANGE)})"
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


def give_up(folder, step, what):
    """Too many steps without a finite gradient: keep what they were made of, and say so."""
    path = Path(folder) / f"bad-step-{step:06d}-rank-{rank()}.json"
    write_text(path, to_json(what, indent=1) + "\n")
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
            "differ; raise --cot_temperature, or with --likelihood sde --noise_level"
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


def matmul_speed(precision):
    """FLOP/s of a large square product on this process's device: the ceiling of training."""
    n = 8192 if device().type == "cuda" else 1024
    x = torch.randn(n, n, device=device(), dtype=getattr(torch, precision))
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def pace(folder, first, model, *, precision):
    """Text: tokens/s of the job and its MFU, from the log since step `first`; "" without any.

    A token meets one expert, half of each block's weights: 2 FLOPs a weight forward and, in passes
    with gradients, 2 more backward and 2 for a weight that is trained. The rest, attention and
    recomputation do not count. The ceiling of the model FLOPs utilisation (MFU) is `matmul_speed`.
    """
    lines = [line for line in read_log(folder) if line["step"] >= first] if is_main() else []
    if not lines:
        return ""

    def total(*names):
        return sum(line.get(name, 0) for line in lines for name in names)

    trained = total("tokens", "trained_tokens")  # of stage 1, of stage 2
    forward = total("rollout_tokens", "update_tokens") - total("trained_tokens")
    spent = total("seconds", "rollout_seconds", "reward_seconds", "update_seconds")
    blocks = list(model.blocks.parameters())
    weights, learned = count(blocks), count(p for p in blocks if p.requires_grad)
    flops = (2 * forward + 4 * trained) * weights / 2 + 2 * trained * learned / 2
    used = flops / spent / size() / matmul_speed(precision)
    return f", {(forward + trained) / spent:,.0f} tokens/s, MFU {100 * used:.0f} %"
