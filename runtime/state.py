"""
The training state on disk, so that the same command continues a run from where it was.

    out/<name>/state-000200/            after 200 steps: a torch.distributed.checkpoint folder
        model.<name>                    the trained parameters, float32
        average.<name>                  their moving average, if the run has one
        optimizer.step.<name>           AdamW's count and moments; a parameter that never had a
        optimizer.exp_avg.<name>  ...   gradient has none
    out/<name>/.state-000400.tmp/       being written; the next save deletes what a crash left of it

    average <- decay * average + (1 - decay) * parameters               `update_average`

All processes write their shards under a hidden name, then the first gives the folder its name by
one rename: a run that is killed while writing leaves the state before it untouched. Any number of
processes may read what another number wrote. Nothing random is stored, see processes.generator.

Not a concept of the paper. Left out: states of other optimisers, storage that cannot rename.
"""

import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from runtime.config import UserError
from runtime.files import hidden_path, publish, remove
from runtime.processes import barrier, is_main, reduced, size

# what dcp raises when a state is torn, or does not fit
UNREADABLE = (OSError, CheckpointException, EOFError, ValueError, RuntimeError, KeyError)

# --------------------------------------------------------------------------------------------------
# what it is made of


@dataclass
class TrainingState:
    """What training changes. Nothing in here is a copy."""

    parameters: dict  # {name: parameter} that are trained
    optimizer: torch.optim.Optimizer  # AdamW over them
    average: dict  # {name: tensor} of their moving averages; {} without any

    def tensors(self):
        """{key: tensor} of all of it under the names on disk, for Saver.save."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            if name in self.average:
                tensors[f"average.{name}"] = self.average[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def load(self, folder, step):
        """Read the state after `step` steps of the run in `folder`, in place; UserError if it is
        torn or of another model. Any number of processes may read what another number wrote."""
        path = state_path(folder, step)
        _quiet()
        try:
            self._make_moments(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
            dcp.load(self.tensors(), checkpoint_id=path, no_dist=size() == 1)
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} is torn or of another model ({reason}); delete it to continue from the "
                f"state before"
            ) from None

    def _make_moments(self, stored):
        """Room for the moments of those parameters that have some among the `stored` keys."""
        for name, parameter in self.parameters.items():
            if f"optimizer.step.{name}" in stored:
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.detach()),
                    "exp_avg_sq": torch.zeros_like(parameter.detach()),
                }


def new_average(parameters):
    """The moving average of the parameters ({name: tensor}), starting at what they are."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def update_average(average, parameters, decay):
    """average <- decay * average + (1 - decay) * parameters, in place.

    Both are {name: tensor} with the same names in the same order.
    """
    values = [p.detach() for p in parameters.values()]
    torch._foreach_lerp_(list(average.values()), values, 1 - decay)


# --------------------------------------------------------------------------------------------------
# on disk


def state_path(folder, step):
    """The folder of the state after `step` steps of the run in `folder`."""
    return Path(folder) / f"state-{step:06d}"


def states(folder):
    """Finished states, oldest first."""
    return sorted(path for path in Path(folder).glob("state-*") if (path / ".metadata").is_file())


def newest_step(folder):
    """Step of the newest state, 0 if there is none; as the first process sees it, since a shared
    file system may show the others less."""
    found = states(folder)
    step = int(found[-1].name.removeprefix("state-")) if found and is_main() else 0
    return int(reduced([step])[0])


class Saver:
    """Writes training states, in the background if asked to; `keep` of them stay.

    All processes make the same calls in the same order. In the background a state costs one more
    copy of itself on the host; it is published by the next `poll`, `wait` or `save`.
    """

    def __init__(self, folder, keep=2, asynchronous=False):
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self.pending = None  # (step, future) of what is being written
        self.group = None  # of its own, beside the collectives of training
        if asynchronous and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")

    def save(self, step, tensors):
        """Write the state after `step` steps: {key: tensor}, from TrainingState.tensors.

        The values of this moment count, whatever training does next. UserError if they cannot be
        written; an error in the background comes with the next call.
        """
        self.wait()
        hidden = hidden_path(state_path(self.folder, step))
        if is_main():
            for left in self.folder.glob(".state-*"):  # by a run that was killed
                remove(left)
        barrier()
        _quiet()
        try:
            if self.asynchronous:
                future = dcp.async_save(tensors, checkpoint_id=hidden, process_group=self.group)
                self.pending = step, future
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
        """Give the state its name, and delete the oldest beyond `keep`."""
        if is_main():
            final = state_path(self.folder, step)
            publish(hidden_path(final), final)
            for old in states(self.folder)[: -self.keep]:
                remove(old)

    def _refuse(self, step, error):
        """UserError with the first reason why the state could not be written; nothing is left."""
        if is_main():
            with suppress(OSError):
                remove(hidden_path(state_path(self.folder, step)))
        reasons = [error]
        if isinstance(error, CheckpointException):
            reasons = list(error.failures.values())
        reason = " ".join(str(getattr(reasons[0], "__cause__", None) or reasons[0]).split())[:200]
        raise UserError(
            f"the training state after step {step} could not be written to {self.folder} "
            f"({reason}); the state before it is untouched: make room and repeat the command"
        ) from error


def _quiet():
    """A world of one has no process group, and dcp need not say so each time."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
