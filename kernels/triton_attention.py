"""
Attention with the Triton kernels: tile sizes, lists, and the operators that launch the kernels.

    triton_attention(q, k, v, mask)     q (Nq, H, D)   k, v (Nk, K, D)   ->   (Nq, H, D)

Forward and backward are operators of torch.library: autograd and activation checkpointing see one
node each. Sequences of any length; float32, float16, bfloat16; head_dim up to 256.

Letters: sequence.py; Nq queries and Nk keys.
Left out: the mathematics (kernels/attention.py), the lists (kernels/tiles.py), the kernels
(kernels/triton_kernels.py), what a compiler makes of them (tests/offline.py).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.tiles import ceil_div, tile_lists
from kernels.triton_kernels import (
    combine_kernel,
    descriptor,
    dkdv_kernel,
    dq_kernel,
    forward_kernel,
    sum_kernel,
    triton,
)


def interpreted():
    """Whether Triton interprets the kernels on a CPU (TRITON_INTERPRET=1 at their import)."""
    return triton is not None and not isinstance(forward_kernel, triton.runtime.JITFunction)


def has_kernel(dtype, head_dim):
    """Whether the kernels know this type and width of a head."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and head_dim <= 256


# --------------------------------------------------------------------------------------------------
# Configurations


class Tiling(NamedTuple):
    """How one kernel is cut: rows and keys of a tile, warps, stages of the loop's pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# The fields of Tiling for BLOCK_D up to 64, 128 and 256. "few": the forward of few rows (decoding).
# Chosen from what the compiler makes of them (tests/offline.py): as large as fits without spilled
# registers, in two-byte types (but dq and dkdv of head_dim 256 spill).
# Three stages, not two: reading the list's entry takes one of them, and with two the compiler keeps
# a single buffer of keys and values in the first loop, loads nothing ahead, and ptxas runs the
# tensor cores synchronously (C7515).
HOPPER = {  # 227 KiB of shared memory: H100, H200, B200
    "forward": ((128, 128, 8, 3), (128, 128, 8, 3), (128, 32, 8, 3)),
    "few": ((64, 128, 4, 3), (64, 128, 4, 3), (64, 64, 8, 3)),
    "dq": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    "dkdv": ((64, 128, 8, 3), (64, 128, 8, 3), (32, 64, 8, 3)),
}
SMALL = {  # every other GPU: it runs, nobody has tuned it
    "forward": ((64, 64, 4, 3), (64, 64, 8, 3), (64, 32, 8, 1)),
    "few": ((64, 64, 4, 3), (64, 64, 8, 3), (64, 32, 8, 1)),
    "dq": ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 8, 1)),
    "dkdv": ((32, 64, 4, 3), (32, 64, 8, 3), (32, 32, 8, 1)),
}
FLOAT32 = {  # for tests and toys: three products for one, and the backward spills
    "forward": ((64, 32, 4, 3), (64, 32, 8, 1), (64, 32, 8, 1)),
    "few": ((64, 32, 4, 3), (64, 32, 8, 1), (64, 32, 8, 1)),
    "dq": ((64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1)),
    "dkdv": ((32, 64, 4, 3), (32, 64, 8, 1), (16, 64, 8, 1)),
}
PROGRAMS = 264  # enough items to fill a large GPU twice
FEW_ROWS = 64  # up to here (decoding) the forward tile has 64 rows


def block_d(head_dim):
    """The width of a head in the kernels: head_dim padded to a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_config(kernel, head_dim, dtype, device):
    """The Tiling of "forward", "few" (the forward of few rows), "dq" or "dkdv"."""
    large = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    table = FLOAT32 if dtype == torch.float32 else HOPPER if large else SMALL
    return Tiling(*table[kernel][(head_dim > 64) + (head_dim > 128)])


def _forward_config(q, k):
    rows = q.shape[0] * (q.shape[1] // k.shape[1])
    return tile_config("few" if rows <= FEW_ROWS else "forward", q.shape[2], q.dtype, q.device)


# --------------------------------------------------------------------------------------------------
# Lists


def _lists(mask, group, config, by_key, wanted):
    """The tile lists of one kernel, made once per mask: [index, work, pieces]."""
    key = (group, by_key, wanted, config.block_m, config.block_n)
    if key not in mask.cache:
        vectors = mask.q_hi, mask.positions(), mask.k_hi
        mask.cache[key] = tile_lists(
            *vectors, group, config.block_m, config.block_n, by_key, wanted
        )
    return mask.cache[key]


def forward_lists(mask, q, k):
    """[index, work, pieces] of the forward kernel: kernels/tiles.py.

    Cut into pieces only where there are too few row tiles to fill a GPU (decoding).
    """
    config, group, key_heads = _forward_config(q, k), q.shape[1] // k.shape[1], k.shape[1]
    programs = ceil_div(q.shape[0] * group, config.block_m) * key_heads
    wanted = ceil_div(PROGRAMS, key_heads) if programs < PROGRAMS else 0
    return _lists(mask, group, config, False, wanted)


def backward_lists(mask, q, k):
    """[index, work, pieces] of dq, then of dk/dv.

    The latter are cut so finely that no long list is waited for.
    """
    dq = tile_config("dq", q.shape[2], q.dtype, q.device)
    dkdv = tile_config("dkdv", q.shape[2], q.dtype, q.device)
    by_row = _lists(mask, q.shape[1] // k.shape[1], dq, False, 0)
    wanted = ceil_div(4 * PROGRAMS, k.shape[1])
    return by_row + _lists(mask, 1, dkdv, True, wanted)


# --------------------------------------------------------------------------------------------------
# Operators


def _aligned(x):
    """x, copied only if a descriptor cannot address it.

    It wants a start and strides of whole 16 bytes and a dense last dimension.
    """
    unit = 16 // x.element_size()
    fits = (
        x.stride(2) == 1
        and all(s > 0 and s % unit == 0 for s in x.stride()[:2])
        and x.data_ptr() % 16 == 0
    )
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _boxes(x, block):
    """A descriptor of x (N, heads, D), read in boxes of one head and `block` tokens."""
    return descriptor(x, block, block_d(x.shape[2]))


def _options(q, k, config):
    """What forward, dq and dkdv are compiled for."""
    return dict(
        GROUP=q.shape[1] // k.shape[1],
        HEAD_DIM=q.shape[2],
        BLOCK_D=block_d(q.shape[2]),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@torch.library.custom_op("realign::attention_forward", mutates_args=())
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_hi: torch.Tensor,
    q_pos: torch.Tensor,
    k_hi: torch.Tensor,
    lists: list[torch.Tensor],
    later: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (Nq, H, D) and lse (H, Nq) float32.

    lists: forward_lists; later: backward_lists, or nothing without grad.
    """
    (n_queries, heads, head_dim), (n_keys, key_heads, _) = q.shape, k.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, n_queries, dtype=torch.float32, device=q.device)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    index, work, pieces = lists
    config = _forward_config(q, k)
    part_shape = 2 * (work.shape[0] - pieces.shape[0]), key_heads, config.block_m  # slots first
    part = torch.empty(*part_shape, block_d(head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part_shape, dtype=torch.float32, device=q.device)
    keys, values = _boxes(k, config.block_n), _boxes(v, config.block_n)
    vectors = q_hi, q_pos, k_hi, index, work
    sizes = n_queries, n_keys, index.shape[1], q.stride(0), q.stride(1), scale / math.log(2)
    options = _options(q, k, config)
    forward_kernel[work.shape[0], key_heads](
        q, keys, values, out, lse, part, part_lse, *vectors, *sizes, **options
    )
    if len(part):
        shape = {name: options[name] for name in ("GROUP", "HEAD_DIM", "BLOCK_D", "BLOCK_M")}
        combine_kernel[pieces.shape[0], key_heads](
            part, part_lse, out, lse, pieces, n_queries, **shape, num_warps=8
        )
    return out, lse


@attention_forward.register_fake
def _(q, k, v, q_hi, q_pos, k_hi, lists, later, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("realign::attention_backward", mutates_args=())
def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_hi: torch.Tensor,
    q_pos: torch.Tensor,
    k_hi: torch.Tensor,
    lists: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, contiguous, of the types of q, k, v. lists: backward_lists."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    do, q, k, v = _aligned(do), _aligned(q), _aligned(k), _aligned(v)
    delta = torch.empty_like(lse)  # (H, Nq)
    scale = scale / math.log(2)
    (n_queries, _, head_dim), (n_keys, key_heads, _) = q.shape, k.shape

    index, work, _ = lists[:3]
    config = tile_config("dq", head_dim, q.dtype, q.device)
    strides = q.stride(0), q.stride(1), do.stride(0), do.stride(1)
    dq_kernel[work.shape[0], key_heads](
        *(q, _boxes(k, config.block_n), _boxes(v, config.block_n), out, do, lse, delta, dq),
        *(q_hi, q_pos, k_hi, index, work, n_queries, n_keys, index.shape[1], *strides, scale),
        **_options(q, k, config),
    )

    index, work, pieces = lists[3:]
    config = tile_config("dkdv", head_dim, q.dtype, q.device)
    slots = 2 * (work.shape[0] - pieces.shape[0])
    part_shape = slots, key_heads, 2, config.block_n, block_d(head_dim)
    part = torch.empty(part_shape, dtype=torch.float32, device=q.device)
    options = _options(q, k, config)
    dkdv_kernel[work.shape[0], key_heads](
        *(_boxes(q, config.block_m), _boxes(k, config.block_n), _boxes(v, config.block_n)),
        *(_boxes(do, config.block_m), lse, delta, dk, dv, part),
        *(q_hi, q_pos, k_hi, index, work, n_queries, n_keys, index.shape[1], scale),
        **options,
    )
    if slots:
        shape = {name: options[name] for name in ("HEAD_DIM", "BLOCK_D", "BLOCK_N")}
        sum_kernel[pieces.shape[0], key_heads](part, dk, dv, pieces, n_keys, **shape, num_warps=8)
    return dq, dk, dv


@attention_backward.register_fake
def _(do, q, k, v, out, lse, q_hi, q_pos, k_hi, lists, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, q_hi, q_pos, k_hi, lists, later, scale = inputs
    ctx.save_for_backward(q, k, v, *output, q_hi, q_pos, k_hi, *later)
    ctx.lists, ctx.scale = len(lists), scale


def _backward(ctx, do, _):
    q, k, v, out, lse, q_hi, q_pos, k_hi, *lists = ctx.saved_tensors
    dq, dk, dv = attention_backward(do, q, k, v, out, lse, q_hi, q_pos, k_hi, lists, ctx.scale)
    return dq, dk, dv, None, None, None, [None] * ctx.lists, [None] * len(lists), None


attention_forward.register_autograd(_backward, setup_context=_save)


def triton_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v by the kernels: on CUDA, or with TRITON_INTERPRET=1.

    q (Nq, H, D), k and v (Nk, K, D), K divides H -> (Nq, H, D), differentiable. Checks nothing:
    kernels/attention.py does.
    """
    if q.shape[0] == 0 or k.shape[0] == 0:
        return q * 0 + 0 * (k.sum() + v.sum())  # nothing to see; still part of the graph
    head_dim = q.shape[2]
    padding = -head_dim % (16 // q.element_size())  # descriptors want rows of whole 16 bytes
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))  # (N, heads, D + padding)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    later = backward_lists(mask, q, k) if training else []
    lists, scale = forward_lists(mask, q, k), head_dim**-0.5
    out, _ = attention_forward(q, k, v, mask.q_hi, mask.positions(), mask.k_hi, lists, later, scale)
    return out[..., :head_dim] if padding else out  # (Nq, H, D)
