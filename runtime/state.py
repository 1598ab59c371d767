"""
The training state on disk, so that the same command continues a run from where it was.

    out/<name>/state-000200/            after 200 steps: a torch.distributed.checkpoint folder
        model.<name>                    the trained parameters, float32
        average.<name>                  their moving average, if the run has one
        optimizer.step.<name>           AdamW's count and moments; a parameter that never had a
        optimizer.exp_avg.<name>  ...   gradient has none
    out/<name>/.state-000400.tmp/       being written; the next save deletes what a crash left

    average <- decay * average + (1 - decay) * parameters               `update_average`

All processes write their shards under a hidden name, then the first gives the folder its name by
one rename: a run that is killed while writing leaves the state before it untouched. Any number of
processes may read what another number wrote. Nothing random is stored, see processes.generator.

Not a concept of the paper. Left out: states of other optimisers, storage that cannot rename.
"""

import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from runtime.config import UserError
from runtime.files import hidden_path, publish, remove
from runtime.processes import barrier, is_main, reduced, size

KEPT = 2  # states of a run: the newest, and the one before
# what dcp raises when a state is torn, or does not fit
UNREADABLE = (OSError, CheckpointException, EOFError, ValueError, RuntimeError, KeyError)


@dataclass
class TrainingState:
    """What training changes. Nothing in here is a copy."""

    parameters: dict  # {name: parameter} that are trained
    optimizer: torch.optim.Optimizer  # AdamW over them
    average: dict  # {name: tensor} of their moving averages; {} without any

    def tensors(self):
        """{key: tensor} of all of it under the names on disk, for `save_state`."""
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
        torn or of another model."""
        path = state_path(folder, step)
        try:
            _quietly(dcp.load, {}, path)  # a CheckpointException if .metadata is garbage
            stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            for name, parameter in self.parameters.items():
                if f"optimizer.step.{name}" in stored:  # make room for its moments
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter.detach()),
                        "exp_avg_sq": torch.zeros_like(parameter.detach()),
                    }
            _quietly(dcp.load, self.tensors(), path)
        except UNREADABLE as error:
            raise UserError(
                f"{path} is torn or of another model ({_reason(error)}); delete it to continue "
                f"from the state before"
            ) from None


def new_average(parameters):
    """The moving average of the parameters ({name: tensor}), starting at what they are."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def update_average(average, parameters, decay):
    """average <- decay * average + (1 - decay) * parameters, in place; both have the same names in
    the same order."""
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
    """Step of the newest state, 0 if there is none, as the first process sees it: a shared file
    system may show the others less."""
    finished = states(folder) if is_main() else []
    step = int(finished[-1].name.removeprefix("state-")) if finished else 0
    return int(reduced([step])[0])


def save_state(folder, step, tensors):
    """Write {key: tensor}, from TrainingState.tensors, as the state after `step` steps; the KEPT
    newest ones stay. UserError if it cannot be written; nothing is left then."""
    final = state_path(folder, step)
    hidden = hidden_path(final)
    if is_main():
        for left in Path(folder).glob(".state-*"):  # by a run that was killed
            remove(left)
    barrier()
    try:
        _quietly(dcp.save, tensors, hidden)
        if is_main():
            publish(hidden, final)
            for old in states(folder)[:-KEPT]:
                remove(old)
    except (OSError, CheckpointException) as error:
        if is_main():
            with suppress(OSError):
                remove(hidden)
        raise UserError(
            f"the training state after step {step} could not be written to {folder} "
            f"({_reason(error)}); the state before it is untouched: make room and repeat the "
            f"command"
        ) from error


def _quietly(transfer, tensors, path):
    """dcp.save or dcp.load; a world of one has no process group, and need not say so each time."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    logging.disable(logging.CRITICAL)  # it also logs what it raises; one message is enough
    try:
        transfer(tensors, checkpoint_id=path, no_dist=size() == 1)
    finally:
        logging.disable(logging.NOTSET)


def _reason(error):
    """Why something failed, on one line: the first of what the processes say."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))  # and its traceback
    return " ".join(str(getattr(error, "__cause__", None) or error).split())[:200]
