"""
The training state on disk: written under a hidden name, published by one rename, read by any number of processes.
"""

import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from runtime.config import UserError
from runtime.processes import barrier, is_main, reduced, size

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
