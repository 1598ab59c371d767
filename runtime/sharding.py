"""
Weights sharded over processes block by block (FSDP2), whole when needed, and optimiser steps that all take or none.
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
