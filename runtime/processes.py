"""
The processes of a run, their threads and their random numbers.

    python sft.py                                  a world of one: no process group on a CPU
    torchrun --nproc_per_node=8 sft.py             one process a GPU on this machine
    srun -N2 --ntasks-per-node=8 python sft.py     one a task; launch/slurm.sh does this

Every process runs the same script, and `launch` joins them. What is one for all (the log, pictures,
the model) is written by the first, `is_main()`. Losses are sums divided by counts over all
processes (`reduced`), so the number of processes changes no mean. What talks to the other processes
(`launch`, `reduced`, `joined`, `merged`, `barrier`, `first_alone`, and whatever calls them) has to
be called by all of them, in one order.

Nothing random is carried from step to step: data, noise and times come from `generator(seed, step,
sample, ...)` and depend on these numbers alone. So a resumed run equals an uninterrupted one bit
for bit, whoever does which part of it, and no state of a generator has to be stored.

Not a concept of the paper. Left out: tensor and pipeline parallelism, restarting lost processes
(torchrun and SLURM do that).
"""

import functools
import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.config import UserError

# tensors on a CPU in pages of 2 MB where the kernel lends them, with far fewer page faults: PyTorch
# reads it before its first tensor
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# packs of every length follow each other on a GPU: freed memory grows together again
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# the variables that make a process one of several
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

# what each launcher sets, all of it
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
)

# --------------------------------------------------------------------------------------------------
# the process group


def launch():
    """Join the other processes, if torchrun or srun started any.

    A world of one needs no process group on a CPU; on a GPU it gets one, so that the same sharding
    code runs. A process that waits longer for another than TIMEOUT_MINUTES of the environment (30)
    ends the job.
    """
    if dist.is_initialized():
        return
    number, local_number, count, address = placement(os.environ)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(gpu_of(local_number, torch.cuda.device_count()))
    elif count == 1:
        return
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
        device_id=device() if gpu else None,
        init_method=address,
        store=None if address else dist.HashStore(),
        rank=number,
        world_size=count,
        timeout=timedelta(minutes=float(os.environ.get("TIMEOUT_MINUTES", 30))),
    )


def placement(environment):
    """(number of this process, its number on this machine, how many there are, address of the
    first): torchrun's, srun's, or a world of one, which has no address.

    The batch shell of sbatch has SLURM_NTASKS too, but no step of several tasks: it is no rank.
    UserError where a launcher's variables are there in part only.
    """
    e = environment
    if "RANK" in e:
        check_launcher(e, "torchrun", TORCHRUN)
        address = f"tcp://{e['MASTER_ADDR']}:{e['MASTER_PORT']}"
        return int(e["RANK"]), int(e["LOCAL_RANK"]), int(e["WORLD_SIZE"]), address
    count = int(e.get("SLURM_STEP_NUM_TASKS") or 1)
    if count == 1:
        return 0, 0, 1, None
    check_launcher(e, "srun", SRUN)
    port = 20_000 + (int(e["SLURM_JOB_ID"]) * 100 + int(e["SLURM_STEP_ID"])) % 12_000
    host = e.get("MASTER_ADDR") or first_host(e["SLURM_STEP_NODELIST"])
    return int(e["SLURM_PROCID"]), int(e["SLURM_LOCALID"]), count, f"tcp://{host}:{port}"


def check_launcher(environment, launcher, names):
    """UserError unless all variables of this launcher are set."""
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise UserError(
            f"{names[0]} is set, but {', '.join(missing)} not: start the processes with "
            f"{launcher}, or unset {names[0]} for one process alone"
        )


def first_host(nodes):
    """The first host of a SLURM list: "gpu[003-004,010],x" -> "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0]  # up to the first comma outside brackets
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def gpu_of(local_number, visible):
    """The number of this process's GPU: its own, or the only one that its launcher lets it see."""
    if 1 < visible <= local_number:
        raise UserError(
            f"process {local_number} of this machine has no GPU: {visible} are visible; start one "
            f"process a GPU"
        )
    return 0 if visible == 1 else local_number


def finish():
    """Leave the process group: otherwise the last process waits for the others to the time-out."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# this process among all


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this process writes the log, the pictures and the model."""
    return rank() == 0


def device():
    """Where this process computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def placed(name, dtype):
    """(torch.device, torch.dtype) of the options --device and --dtype; UserError for no device.

    auto: the first that is there of cuda, mps and cpu; bfloat16 on a GPU, float32 on a CPU.
    """
    there = ["cuda"] if torch.cuda.is_available() else []
    there += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    there += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if name == "auto":
        name = there[0]
    if name not in there:
        raise UserError(
            f"--device={name}: expected auto, cuda, mps or cpu; here there is {', '.join(there)}"
        )
    if dtype == "auto":
        dtype = "float32" if name == "cpu" else "bfloat16"
    return torch.device(name), getattr(torch, dtype)


def say(*words):
    """Print on one process only."""
    if is_main():
        print(*words, flush=True)


@functools.cache
def warn(text):
    """A warning on stderr, once, from one process only."""
    if is_main():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def share(count, what, option, *, parts=1, among=None):
    """`count` divided by the number of processes, which can be cut into `parts` equal parts.

    UserError with the next numbers that can be divided. what, option: the words of that sentence;
    among: so many processes, not those there are (a dry run).
    """
    among = among or size()
    unit = among * parts
    if count % unit:
        below, above = count // unit * unit, (count // unit + 1) * unit
        in_parts = f" in {parts} updates" if parts > 1 else ""
        raise UserError(
            f"{count} {what} cannot be shared evenly by {among} processes{in_parts}; "
            f"use --{option}={f'{below} or ' if below else ''}{above}"
        )
    return count // among


def dealt(numbers, weight, among):
    """Numbers dealt to `among` takers, who divide them: as many to each, and about as much weight.

    The heaviest go to one taker after another, the next heaviest back, and so on. Each has its own
    in that order; a single taker has all as they come. weight(number): alike on all processes.
    """
    if among == 1:
        return [list(numbers)]
    takers = [[] for _ in range(among)]
    for place, number in enumerate(sorted(numbers, key=weight, reverse=True)):
        turn, taker = divmod(place, among)
        takers[taker if turn % 2 == 0 else among - 1 - taker].append(number)
    return takers


# --------------------------------------------------------------------------------------------------
# numbers of all processes


def reduced(numbers, operation="sum"):
    """A list of numbers, summed (or "max", "min") over all processes."""
    if size() == 1:
        return list(numbers)
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, operations[operation])
    return tensor.tolist()


def joined(tensor):
    """The tensors (of one shape) of all processes, one behind the other; all get the same."""
    if size() == 1:
        return tensor
    tensor = tensor.to(device()).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def merged(values):
    """Log values of all processes as one line, {key: number}, types kept.

    *_min and *_max as such, *tokens and truncated summed, others averaged over the processes.
    """
    if size() == 1:
        return values
    operations = {key: key[-3:] if key.endswith(("_min", "_max")) else "sum" for key in values}
    line = dict(values)  # in this order
    for operation in ("sum", "min", "max"):
        keys = [key for key in values if operations[key] == operation]
        for key, number in zip(keys, reduced([values[key] for key in keys], operation)):
            is_mean = operation == "sum" and not key.endswith("tokens") and key != "truncated"
            line[key] = type(values[key])(number / size() if is_mean else number)
    return line


def barrier():
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier()


@contextmanager
def first_alone():
    """The first process does what is inside before the others do: they find what it downloads."""
    if not is_main():
        barrier()
    try:
        yield
    finally:  # what it raises the others find too
        if is_main():
            barrier()


# --------------------------------------------------------------------------------------------------
# random numbers and threads


def generator(*numbers):
    """A torch.Generator that depends on these numbers alone: (seed, step, purpose)."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + int(number) + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def choose_threads(wanted):
    """Compute on so many CPU threads (0: as PyTorch chooses). Returns their number."""
    if wanted:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()
