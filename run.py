"""
The life of a run: its processes, its folder, its log, its training state, its end. Not a concept of the paper.

    out/<name>/config.json        the resolved options, argv, threads, processes
    out/<name>/metrics.jsonl      one line a step
    out/<name>/samples/           pictures of the same prompts and seeds as training goes on
    out/<name>/state-000200/      training state: weights, their average, optimiser (torch.distributed.checkpoint)
    out/<name>/model/             the finished model in BAGEL's layout (pretrained.py)

The same command continues a run from its newest state. Nothing random is carried from step to step: data, noise and
times depend on (seed, step, sample) alone, so a resumed run equals an uninterrupted one bit for bit, and no state of a
random generator has to be stored. A state is written under a hidden name and published by one rename: a run that is
killed while writing leaves the state before it untouched.

Processes. A script alone is a world of one without collectives; under torchrun, or under srun with more than one task,
every process runs the same script. Weights are sharded block by block (FSDP2): float32 shards, `precision` for the
arithmetic. Losses are sums divided by counts over all processes, so the number of processes changes no mean.

Left out: tensor and pipeline parallelism, restarting lost processes (torchrun and SLURM do that).
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from config import UserError, to_dict

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
# what makes a process one of several
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
REQUEUE = 85  # exit status of a run that was asked to stop, has saved its state, and wants to go on
BAD_STEPS = 3  # in a row without a finite gradient: the run stops

# ---------------------------------------------------------------------------------------------------------------------
# processes


def launch(timeout_minutes=30.0):
    """Join the other processes, if torchrun or srun started any.

    On a GPU a world of one gets a process group too, so that the same sharding code runs; on a CPU it needs none.
    """
    if dist.is_initialized():
        return
    place = placement(os.environ)
    if torch.cuda.is_available():
        torch.cuda.set_device(place["local_rank"])
    elif place["size"] == 1:
        return
    backend = {"backend": "gloo"}
    if torch.cuda.is_available():
        backend = {"backend": "cpu:gloo,cuda:nccl", "device_id": device()}
    where = {"init_method": place["address"]} if place["address"] else {"store": dist.HashStore()}
    dist.init_process_group(
        rank=place["rank"],
        world_size=place["size"],
        timeout=timedelta(minutes=timeout_minutes),
        **backend,
        **where,
    )


def placement(environment):
    """{rank, local_rank, size, address} of this process among all: torchrun's, srun's, or a world of one.

    The batch shell of sbatch has SLURM_NTASKS too, but no step of several tasks: it is no rank.
    """
    e = environment
    if "RANK" in e:
        return {
            "rank": int(e["RANK"]),
            "local_rank": int(e["LOCAL_RANK"]),
            "size": int(e["WORLD_SIZE"]),
            "address": f"tcp://{e['MASTER_ADDR']}:{e['MASTER_PORT']}",
        }
    if int(e.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        port = 20_000 + (int(e["SLURM_JOB_ID"]) * 100 + int(e["SLURM_STEP_ID"])) % 20_000
        host = e.get("MASTER_ADDR") or first_host(e["SLURM_STEP_NODELIST"])
        return {
            "rank": int(e["SLURM_PROCID"]),
            "local_rank": int(e["SLURM_LOCALID"]),
            "size": int(e["SLURM_STEP_NUM_TASKS"]),
            "address": f"tcp://{host}:{port}",
        }
    return {"rank": 0, "local_rank": 0, "size": 1, "address": None}


def first_host(nodes):
    """The first host of a SLURM list: "gpu[003-004,010],x" -> "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0]  # up to the first comma outside brackets
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this process writes the log, the pictures and the model."""
    return rank() == 0


def device():
    """Where this process computes."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def say(*words):
    """Print on one process only."""
    if is_main():
        print(*words, flush=True)


def share(count, what, option, parts=1):
    """`count` divided by the processes, each of whose shares must have `parts` equal parts; UserError with the next
    numbers that can be divided."""
    unit = size() * parts
    if count % unit:
        below, above = count // unit * unit, (count // unit + 1) * unit
        raise UserError(
            f"{count} {what} cannot be shared evenly by {size()} processes"
            + (f" in {parts} updates" if parts > 1 else "")
            + f"; use --{option}="
            + " or ".join(str(n) for n in (below, above) if n)
        )
    return count // size()


def reduced(numbers, how="sum"):
    """A list of numbers, summed (or "max", "min") over all processes."""
    if size() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device())
    dist.all_reduce(
        tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[how]
    )
    return tensor.tolist()


def merged(values):
    """Log values of all processes as one line: *_min, *_max as such, *tokens and truncated summed, others averaged."""
    if size() == 1:
        return values
    how = lambda key: key[-3:] if key.endswith(("_min", "_max")) else "sum"
    found = {}
    for kind in ("sum", "min", "max"):
        keys = [key for key in values if how(key) == kind]
        found |= dict(zip(keys, reduced([values[key] for key in keys], kind)))
    total = lambda key: key.endswith("tokens") or key == "truncated" or how(key) != "sum"
    return {
        key: type(values[key])(found[key] if total(key) else found[key] / size()) for key in values
    }


def finish():
    """Leave the process group; without this, the last process waits for the others until the time-out."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# sharding


def shard(model, precision="float32", replicas=1):
    """Split the model's weights over all processes, block by block; without a process group nothing is done.

    precision: of the arithmetic ("float32" or "bfloat16"); the shards, the gradients that are summed and the optimiser
    are float32. replicas: copies of the model, each sharded over size / replicas processes (hybrid sharding).
    """
    if not dist.is_initialized():
        if precision != "float32":
            raise UserError(
                f"precision={precision} keeps float32 weights beside it, which needs a GPU or several processes"
            )
        return model
    if size() % replicas:
        raise UserError(f"replicas={replicas} does not divide {size()} processes")
    kind = device().type
    mesh = (
        init_device_mesh(kind, (size(),))
        if replicas == 1
        else init_device_mesh(
            kind, (replicas, size() // replicas), mesh_dim_names=("replicate", "shard")
        )
    )
    # returned a view: nobody writes to it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*model.eye.layers, *model.blocks, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "keys_and_values")
    return model


@contextmanager
def gathered(model):
    """All weights whole on every process: forward passes inside need no communication, and no equal number of them.

    For rollouts and evaluation, under no_grad; the optimiser must not step inside.
    """
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    if units:
        # the root must know its units before the first of them is gathered
        units[0]._get_fsdp_state()._lazy_init()
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    with torch.no_grad():
        yield
    for unit in units:
        unit.set_reshard_after_forward(unit is not units[0], recurse=False)
        unit.reshard()


def sum_gradients(model, on):
    """Whether the coming backward pass sums gradients over the processes (and keeps a shard), or only adds them up.

    Off for all but the last pass of an optimiser step, gradients travel once, and stand whole in memory until then.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def clip_gradients(parameters, max_norm):
    """The norm over all processes, as a number, before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def step_if_finite(optimizer, max_norm):
    """Clip and step, on all processes or on none; clears the gradients. Returns the norm, and whether it stepped."""
    norm = clip_gradients(
        [p for group in optimizer.param_groups for p in group["params"]], max_norm
    )
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm, math.isfinite(norm)


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
        probe = Path(folder) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {folder} ({error.strerror}); choose another with --out"
        ) from None


def write_text(path, text):
    """Write a file whole or not at all."""
    hidden = Path(path).with_name(f".{Path(path).name}.tmp")
    hidden.write_text(text)
    os.replace(hidden, path)


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


# ---------------------------------------------------------------------------------------------------------------------
# the training state


def states(folder):
    """Finished states, oldest first."""
    return sorted(path for path in Path(folder).glob("state-*") if (path / ".metadata").is_file())


def newest_step(folder):
    """Step of the newest state as the first process sees it (file systems may show others less); 0 if there is none."""
    found = states(folder)
    step = int(found[-1].name.removeprefix("state-")) if found and is_main() else 0
    return int(reduced([step])[0])


def last_step(folder, step, config):
    """Where this command ends: after config.steps, or with --export at the newest state."""
    if config.export and not step:
        raise UserError(f"{folder} has no training state to export; train first")
    return step if config.export else config.steps


class Saver:
    """Writes training states, in the background if asked to; `keep` of them stay."""

    def __init__(self, folder, keep=2, asynchronous=False):
        self.folder, self.keep, self.pending = Path(folder), keep, None
        self.group = (
            dist.new_group(backend="gloo") if asynchronous and dist.is_initialized() else None
        )
        self.asynchronous = asynchronous

    def save(self, step, tensors):
        """Write the state after `step` steps. The values of this moment count, whatever training does next."""
        self.wait()
        hidden = self.folder / f".state-{step:06d}.tmp"
        if is_main():
            for left in self.folder.glob(".state-*.tmp"):  # by a run that was killed
                shutil.rmtree(left)
        barrier()
        quiet()
        try:
            if self.asynchronous:
                self.pending = (
                    step,
                    dcp.async_save(tensors, checkpoint_id=hidden, process_group=self.group),
                )
            else:
                dcp.save(tensors, checkpoint_id=hidden, no_dist=size() == 1)
                self._publish(step)
        except (OSError, CheckpointException) as error:
            self._refuse(step, error)

    def poll(self):
        """Publish a state that has been written in the meantime."""
        if self.pending is not None and self.pending[1].done():
            self.wait()

    def wait(self):
        """Finish what is being written."""
        if self.pending is None:
            return
        (step, future), self.pending = self.pending, None
        try:
            # of the first process: all processes have written, and the index is there
            future.result()
            self._publish(step)
        except (OSError, CheckpointException) as error:
            self._refuse(step, error)

    def _publish(self, step):
        final = self.folder / f"state-{step:06d}"
        if is_main():
            shutil.rmtree(final, ignore_errors=True)
            os.replace(self.folder / f".state-{step:06d}.tmp", final)
            for old in states(self.folder)[: -self.keep]:
                shutil.rmtree(old)

    def _refuse(self, step, error):
        hidden = self.folder / f".state-{step:06d}.tmp"
        if is_main():
            shutil.rmtree(hidden, ignore_errors=True)
        reasons = (
            list(error.failures.values()) if isinstance(error, CheckpointException) else [error]
        )
        reason = " ".join(str(getattr(reasons[0], "__cause__", None) or reasons[0]).split())[:200]
        raise UserError(
            f"the training state after step {step} could not be written to {self.folder} ({reason}); the state "
            f"before it is untouched: make room and repeat the command"
        ) from error


def quiet():
    """A world of one has no process group, and torch.distributed.checkpoint need not say so each time."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def barrier():
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier()


def load_state(folder, step, parameters, optimizer, average):
    """Read the state after `step` steps, in place. Any number of processes may read what another number wrote."""
    path = Path(folder) / f"state-{step:06d}"
    quiet()
    try:
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        for name, parameter in parameters.items():
            # a parameter that never had a gradient has no moments
            if f"optimizer.step.{name}" in stored:
                moments = {
                    key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")
                }
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    **moments,
                }
        dcp.load(
            pack_state(parameters, optimizer, average), checkpoint_id=path, no_dist=size() == 1
        )
    except (OSError, CheckpointException, EOFError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is torn or of another model ({reason}); delete it to continue from the state before"
        ) from None


def pack_state(parameters, optimizer, average):
    """{name: tensor} of trained parameters, averages (if there are any) and AdamW's moments; not copies."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = parameter.detach()
        if name in average:
            tensors[f"average.{name}"] = average[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


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


# ---------------------------------------------------------------------------------------------------------------------
# averages, randomness, threads, time


def new_average(parameters):
    """The moving average of the parameters ({name: tensor}), starting at what they are."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def update_average(average, parameters, decay):
    """average <- decay * average + (1 - decay) * parameters."""
    torch._foreach_lerp_(
        list(average.values()), [p.detach() for p in parameters.values()], 1 - decay
    )


@contextmanager
def exchanged(model, values):
    """The model with `values` ({name: tensor}) in place of those parameters: their average, or what they once were.

    A graph that was built before must not be used after: its parameters have been written to in between.
    """
    parameters = dict(model.named_parameters())

    def swap():
        with torch.no_grad():
            for name, value in values.items():
                held = parameters[name].detach().clone()
                parameters[name].copy_(value)
                value.copy_(held)

    swap()
    try:
        yield
    finally:
        swap()


def whole_weights(weights, dtype):
    """{name: tensor}, gathered one by one onto the first process; {} on the others."""
    found = {}
    for name, tensor in weights.items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if is_main():
            found[name] = tensor.detach().to("cpu", dtype, copy=True)
    return found


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
    share = (2 * forward + 6 * trained) * weights / spent / size() / matmul_speed(precision)
    return f", {(forward + trained) / spent:,.0f} tokens/s, MFU {100 * share:.0f} %"


def seconds(begun):
    """Wall time since `begun` (time.perf_counter) as text."""
    spent = int(time.perf_counter() - begun)
    return f"{spent // 60} min {spent % 60:02d} s"
