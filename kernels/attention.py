"""
Attention over a packed sequence: one mask of two vectors, one Triton kernel, forward and backward.

For query i of head h, with group = H / K query heads to a key head and c = 1 / sqrt(D):

    s_ij = c q_i . k_j where j is visible to i, else -inf
    visible(i, j)  <=>  j < q_hi[i]  and  q_pos[i] < k_hi[j]
    o_i  = sum_j exp(s_ij - lse_i) v_j                          lse_i = log sum_j exp(s_ij)

    attention(q, k, v, mask)     q (Nq, H, D)   k, v (Nk, K, D)   mask: kernels/mask.py
                                 -> (Nq, H, D)

Query head h reads key head h // group (the order of Hugging Face and BAGEL). A row that sees
nothing gives zeros and gets zero gradients. Sequences of any length; float32, float16, bfloat16;
head_dim 16 to 256.

This file is the chapter's interface: the mathematics, the reference, the back ends, cautions. Then
read mask.py (two vectors, and what they can say), tiles.py (what is visited), triton_kernels.py,
triton_attention.py (how they are launched), sdpa.py (the back end of CPUs).

Letters: sequence.py; Nq queries and Nk keys.
Left out: dropout, biases, soft caps, second derivatives, float8.
Credits: online softmax and its gradient as in FlashAttention-2 (arXiv 2307.08691); per-key row
intervals and skipping by extrema as in FlashMask (arXiv 2410.01359); splitting long lists as in
Flash-Decoding.
"""

import math
import os

import torch

from kernels.sdpa import sdpa_attention
from kernels.triton_attention import has_kernel, interpreted, triton_attention
from kernels.triton_kernels import triton

# --------------------------------------------------------------------------------------------------
# The mathematics
#
# Online softmax. Keys come in tiles. Keep, for each row, the maximum m of the scores seen so far,
# the sum z of exp(s - m) and acc = sum_j exp(s_j - m) v_j. A tile with a larger maximum m' rescales
# z and acc by exp(m - m'). At the end o = acc / z and lse = m + log z. The kernels work in base 2:
# the hardware has exp2, and c log2(e) rides along in the multiply-add that subtracts m,
# p = exp2(s * c log2(e) - m).
#
# Gradient. With p_ij = exp(s_ij - lse_i) and do the gradient of o:
#
#     dv_j  = sum_i p_ij do_i
#     dp_ij = do_i . v_j
#     ds_ij = p_ij (dp_ij - delta_i),     delta_i = sum_j p_ij dp_ij = do_i . o_i
#     dq_i  = c sum_j ds_ij k_j,          dk_j = c sum_i ds_ij q_i
#
# (ds is softmax's Jacobian, one row.) p is computed again from q, k and lse instead of being
# stored, so memory is O(N). The sums for dq run over keys and those for dk, dv over queries: two
# kernels, each with one writer for each of its rows. No atomics, so a repeated call gives the same
# bits.


def reference(q, k, v, mask):
    """The formulas above, densely; differentiable; float64 if q is. O(H Nq Nk) memory.

    q (Nq, H, D), k and v (Nk, K, D) -> (Nq, H, D).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))  # (Nk, H, D)
    scores = torch.einsum("ihd,jhd->hij", q.to(dtype), k) * q.shape[2] ** -0.5  # (H, Nq, Nk)
    scores = scores.masked_fill(~mask.dense(), -math.inf)
    # finite for a row without keys
    top = scores.detach().amax(2, keepdim=True).clamp(min=torch.finfo(dtype).min)  # (H, Nq, 1)
    weight = (scores - top).exp()  # (H, Nq, Nk)
    total = weight.sum(2, keepdim=True)  # (H, Nq, 1)
    weight = weight / torch.where(total > 0, total, 1)
    return torch.einsum("hij,jhd->ihd", weight, v).to(q.dtype)  # (Nq, H, D)


# --------------------------------------------------------------------------------------------------
# Dispatch

BACKENDS = ("triton", "sdpa", "reference")


def choose_backend(device, dtype=torch.bfloat16, head_dim=128):
    """(name, reason) of the back end that attention() uses when its caller names none.

    REALIGN_ATTENTION in the environment forces one of BACKENDS.
    """
    forced = os.environ.get("REALIGN_ATTENTION")
    if forced:
        return forced, "as REALIGN_ATTENTION says"
    if torch.device(device).type != "cuda":
        return "sdpa", f"on {torch.device(device).type}"
    if triton is None:
        return "sdpa", "Triton is not installed"
    if not has_kernel(dtype, head_dim):
        return "sdpa", f"no kernel for {dtype} with head_dim {head_dim}"
    return "triton", "on cuda"


def describe_backend():
    """One line for the start of a run: which back end attention uses, and why."""
    name, reason = choose_backend("cuda" if torch.cuda.is_available() else "cpu")
    return f"attention: {name} ({reason})"


def _check(q, k, v, mask):
    three = q.dim() == k.dim() == 3 and k.shape == v.shape
    if not three or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            f"expected (Nq, H, D), (Nk, K, D), (Nk, K, D) with H a multiple of K."
        )
    if len(mask.q_hi) != q.shape[0] or len(mask.k_hi) != k.shape[0]:
        raise ValueError(
            f"attention: the mask is for {len(mask.q_hi)} queries and {len(mask.k_hi)} keys, "
            f"q and k have {q.shape[0]} and {k.shape[0]}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one type."
        )


def _check_triton(q):
    if triton is None or not (q.is_cuda or interpreted()) or not has_kernel(q.dtype, q.shape[2]):
        raise ValueError(
            f"attention back end 'triton' cannot run here: {q.dtype}, head_dim {q.shape[2]}, on "
            f"{q.device.type}. It needs Triton, a CUDA device (or TRITON_INTERPRET=1), float32, "
            f"float16 or bfloat16, and head_dim up to 256; use 'sdpa'."
        )


class ShapesOfAttention(torch.autograd.Function):
    """Attention on the meta device: shapes, and what the Triton kernel keeps for its backward."""

    @staticmethod
    def forward(ctx, q, k, v):
        """q (Nq, H, D), k and v (Nk, K, D) -> (Nq, H, D)."""
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, gradient):
        """The shapes of dq, dk, dv."""
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def attention(q, k, v, mask, backend=None):
    """softmax(q k^T / sqrt(D)) v under the mask; differentiable.

    q (Nq, H, D), k and v (Nk, K, D), K divides H -> (Nq, H, D). backend: one of BACKENDS; None:
    see choose_backend. ValueError if shapes, types or mask do not fit each other, or if the back
    end is unknown or cannot run here.
    """
    if q.is_meta:  # shapes without memory (runtime/accountant.py): no mask is read
        return ShapesOfAttention.apply(q, k, v)
    _check(q, k, v, mask)
    name = backend or choose_backend(q.device, q.dtype, q.shape[2])[0]
    if name == "sdpa":
        return sdpa_attention(q, k, v, mask)
    if name == "reference":
        return reference(q, k, v, mask)
    if name != "triton":
        raise ValueError(
            f"attention back end {name!r} is unknown; expected one of {', '.join(BACKENDS)}."
        )
    _check_triton(q)
    return triton_attention(q, k, v, mask)


# --------------------------------------------------------------------------------------------------
# Cautions
#
# - Values behind the mask must be finite. A hidden key has weight 0, and 0 * NaN is NaN: allocate
#   caches with zeros.
# - Deterministic for one set of tile sizes. A row computed against a cache may fall into another
#   tile than in the full call, and then differs in the last bits.
# - float32 goes through three TF32 products, about as exact as float32; not so fast.
# - Lists live on the mask; building them does not synchronise.
# - Kernels are launched on the current CUDA device, which must be that of the tensors.
# - The interpreter shows that masks, lists and algebra are right. It ignores precision, accepts
#   tiles that a GPU does not, and gets bfloat16 wrong (tests/test_attention.py repairs that). A GPU
#   needs the tests run on it once.
