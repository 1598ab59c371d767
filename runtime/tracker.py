"""
The log where people look at curves: TensorBoard events or a Weights & Biases run, both optional.

    --tracker tensorboard     out/<name>/events.out.*, for tensorboard --logdir out
    --tracker wandb           out/<name>/wandb, written offline; `wandb sync` sends it, if one wants

The values are those of metrics.jsonl, which stays the log of the run. Nothing is sent: W&B runs
offline unless WANDB_MODE says otherwise. Resumed runs go on: TensorBoard forgets the steps that are
done again, W&B continues the run of the folder's name.

Not a concept of the paper. Left out: pictures (they lie in samples/), other trackers.
"""

import hashlib
import os
from pathlib import Path

from runtime.config import UserError


class Tracker:
    """`log(step, values)` for one process; kind "" does nothing.

    first: the step with which this command begins. UserError if the library is missing.
    """

    def __init__(self, kind, folder, first, *, options):
        self.kind, folder = kind, Path(folder)
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(folder, purge_step=first)
            elif kind == "wandb":
                import wandb

                name = folder.resolve().as_posix()
                self.run = wandb.init(
                    project="realign",
                    dir=folder,
                    name=folder.name,
                    id=hashlib.sha256(name.encode()).hexdigest()[:16],
                    resume="allow",
                    config=options,
                    mode=os.environ.get("WANDB_MODE", "offline"),
                )
        except ImportError as error:
            raise UserError(
                f"--tracker {kind} needs a package that is not installed ({error}); "
                f"pip install {kind}, or leave the option out: metrics.jsonl has the same values"
            ) from None

    def log(self, step, values):
        """The values of one step, {name: number}."""
        numbers = {key: value for key, value in values.items() if key != "step"}
        if self.kind == "tensorboard":
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()
        elif self.kind == "wandb":
            self.run.log(numbers, step=step)

    def close(self):
        """Write what is left."""
        if self.kind == "tensorboard":
            self.writer.close()
        elif self.kind == "wandb":
            self.run.finish()
