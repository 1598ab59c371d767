"""
The processes of a run: a world of one, or those that torchrun or srun started; their threads and random numbers.
"""

import os
import re
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.config import UserError

# what makes a process one of several
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


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


def barrier():
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier()


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
