"""
Weights sharded over processes block by block (FSDP2), whole when needed; steps all or none take.

    shard(model, "bfloat16")                    each process keeps 1 / size of every weight
    norm, stepped = step_if_finite(optimizer, 1.0)
    with gathered(model): ...                   rollouts and pictures, without communication
    with exchanged(model, average): ...         the same model with other weights, for a while
    whole_weights(average, torch.bfloat16)      to be saved, on the first process

Shards, summed gradients and moments are float32, whatever `precision` the arithmetic has; weights
that are frozen have the type that they are given. FSDP2 averages gradients over the processes: a
loss that is divided by counts over all of them is to be multiplied by their number before the
backward pass. In a world of one without a process group all of this is the identity.

Not a concept of the paper. Left out: tensor and pipeline parallelism, offloading to the host.
"""

import math
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from runtime.config import UserError
from runtime.processes import device, is_main, size


def shard(model, precision="float32", replicas=1):
    """Split the model's weights over all processes, block by block; without a process group nothing
    is done. Returns the model.

    precision: of the arithmetic ("float32" or "bfloat16"). replicas: copies of the model, each
    sharded over size / replicas processes; UserError if they cannot be had. Weights that are frozen
    stay so; where nothing is split they are used as they are held, in that precision already.
    """
    if size() % replicas:
        raise UserError(f"replicas={replicas} does not divide {size()} processes")
    if not dist.is_initialized():
        if precision != "float32":
            raise UserError(
                f"precision={precision} keeps float32 weights beside it, which needs a GPU or "
                f"several processes"
            )
        return model
    if replicas == 1:
        mesh = init_device_mesh(device().type, (size(),))
    else:
        shape, names = (replicas, size() // replicas), ("replicate", "shard")
        mesh = init_device_mesh(device().type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        # the model casts its own inputs: FSDP2 would narrow flow times, and fails on a Packed
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # of a module that returns a view: nobody writes to it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    # where nothing is split, gathered weights would be a second copy; rounded ones cannot be split
    frozen = [p for p in model.parameters() if not p.requires_grad]
    rounded = not all(p.is_floating_point() for p in frozen)
    held = set(frozen) if size() == replicas or rounded else None
    for unit in (*model.eye.layers, *model.blocks, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=held)
    for method in ("keys_and_values", "fill"):
        register_fsdp_forward_method(model, method)
    model.every_unit = size() > 1
    return model


@contextmanager
def gathered(model):
    """All weights whole on every process, for rollouts and pictures: forward passes inside need no
    communication, and no equal number of them. Gradients are off, the optimiser must not step."""
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    if units:
        # the root must know its units before the first of them is gathered
        units[0]._get_fsdp_state()._lazy_init()
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with torch.no_grad():
            yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not units[0], recurse=False)
            unit.reshard()


def step_if_finite(optimizer, max_norm):
    """Scale the gradients down to the norm `max_norm` and step, on all processes or on none; clears
    the gradients.

    Returns the norm of the gradient (of all processes) before, and whether it was finite, so that
    the step was made.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm, math.isfinite(norm)


@contextmanager
def exchanged(model, values):
    """The model with `values` ({name: tensor}) in place of those parameters: their average, or what
    they once were. Inside, `values` hold the parameters; no second copy of the model is made.

    A graph that was built before must not be used after: its parameters were written to.
    """
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def swap():
        for name, value in values.items():
            held = parameters[name].detach().clone()
            parameters[name].copy_(value)
            value.copy_(held)

    swap()
    try:
        yield
    finally:
        swap()


def whole(tensor):
    """A tensor that may be sharded, whole on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(weights, dtype):
    """{name: tensor} -> whole copies as `dtype` on the CPU of the first process; {} on the others.

    Gathered one by one, so that a device holds one whole tensor at a time.
    """
    copies = {}
    for name, tensor in weights.items():
        tensor = whole(tensor)
        if is_main():
            copies[name] = tensor.detach().to("cpu", dtype, copy=True)
    return copies
