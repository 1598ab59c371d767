"""
Attention over a packed sequence: one mask of two vectors, one Triton kernel, forward and backward.

For query i of head h, with group = H / Hk query heads to a key head and c = 1 / sqrt(head_dim):

    s_ij = c q_i . k_j where j is visible to i, else -inf       visible(i, j) <=> j < q_hi[i] and q_pos[i] < k_hi[j]
    o_i  = sum_j exp(s_ij - lse_i) v_j                          lse_i = log sum_j exp(s_ij)

    attention(q, k, v, mask)     q (Nq, H, D)   k, v (Nk, Hk, D)   mask: kernels/mask.py   ->   (Nq, H, D)

Query head h reads key head h // group (the order of Hugging Face and BAGEL). A row that sees nothing gives zeros and
gets zero gradients. Sequences of any length; float32, float16, bfloat16; head_dim 16 to 256.

Contents: 1 the mathematics, 2 the mask, 3 tiles, 4 the reference, 5 the kernels, 6 configurations and operators,
7 dispatch, 8 cautions.

Left out: dropout, biases, soft caps, second derivatives, float8.
Credits: online softmax and its gradient as in FlashAttention-2 (arXiv 2307.08691); per-key row intervals and skipping
by extrema as in FlashMask (arXiv 2410.01359); splitting long lists as in Flash-Decoding.

    python kernels/attention.py          compile the kernels for sm_90 without a GPU: registers, spills, shared memory
"""

import math
import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton here: the kernels below are never called, sdpa does the work
    triton = tl = None


constexpr = tl.constexpr if triton else None


def jit(function):
    return triton.jit(function) if triton else function


# One alphabet:  N tokens (Nq queries, Nk keys)   H query heads   Hk key heads   G = H / Hk   D head_dim
#                T tiles   E entries in a tile's list   I items of work   P extra items allowed for splitting

# ----------------------------------------------------------------------------------------------------------------------
# 1. The mathematics
#
# Online softmax. Keys come in tiles. Keep, for each row, the maximum m of the scores seen so far, the sum l of
# exp(s - m) and acc = sum_j exp(s_j - m) v_j. A tile with a larger maximum m' rescales l and acc by exp(m - m'). At the
# end o = acc / l and lse = m + log l. The kernels work in base 2: the hardware has exp2, and c log2(e) rides along in
# the multiply-add that subtracts m,  p = exp2(s * c log2(e) - m).
#
# Gradient. With p_ij = exp(s_ij - lse_i) and do the gradient of o:
#
#     dv_j  = sum_i p_ij do_i
#     dp_ij = do_i . v_j
#     ds_ij = p_ij (dp_ij - delta_i),      delta_i = sum_j p_ij dp_ij = do_i . o_i     (softmax's Jacobian, one row)
#     dq_i  = c sum_j ds_ij k_j,           dk_j = c sum_i ds_ij q_i
#
# p is computed again from q, k and lse instead of being stored, so memory is O(N). The sums for dq run over keys and
# those for dk, dv over queries: two kernels, each with one writer for each of its rows. No atomics, so a repeated call
# gives the same bits.
#
# ----------------------------------------------------------------------------------------------------------------------
# 2. The mask
#
# Theorem. A Boolean matrix M has the form  M[i, j] = (j < q_hi[i]) and (i < k_hi[j])  if and only if no zero of M has
# both a one to its right in its row and a one below it in its column.
# Proof. If M has the form and M[i, j] = 0, then either j >= q_hi[i], and row i is zero from j on, or i >= k_hi[j], and
# column j is zero from i on. Conversely, let q_hi[i] be one past the last one of row i, and k_hi[j] one past the last
# one of column j. Every one passes both tests; a zero with nothing to its right fails the first, a zero with nothing
# below it fails the second.
#
# Corollary. Lay a forest of runs out depth first; a run is causal or bidirectional inside, and a token sees the runs of
# its ancestors and its own. Then q_hi[i] = i + 1 (causal) or the end of i's run (bidirectional), and k_hi[j] = the end
# of the subtree of j's run: for j > i only q_hi can forbid (j is in i's run or not), for j <= i only k_hi (i is in j's
# subtree or not). Any subset of the rows has the form too, with q_pos in place of i: queries against a cache.
#
# Also of this form: sliding windows, attention sinks, prefix language models, padding (0 in either vector), and
# decoding of several members on one prefix when each member has its own run of cache slots.
# Not of this form: siblings that later text sees together; a clean image laid out *before* its noised copy; a forest
# not in depth-first order. Those are bugs of the layout here, and sequence.py refuses them.
#
# ----------------------------------------------------------------------------------------------------------------------
# 3. Tiles
#
# The score matrix is cut into tiles of rows [r0, r1) and keys [c0, c1). From the extrema of the vectors over a tile:
#
#     empty   c0 >= max q_hi   or  min q_pos >= max k_hi     nothing is visible: never visited
#     whole   c1 <= min q_hi  and  max q_pos <  min k_hi     all is visible: no mask arithmetic
#     partly  the rest                                       both comparisons, element by element
#
# "empty" is always safe; for a forest whose queries are its keys it is also exact (off the diagonal only one of the two
# tests can forbid; a tile on the diagonal has a visible pair). "whole" is always exact. Overhanging tiles are padded
# with 0 in both vectors and so become "partly" by themselves.
#
# Each row tile gets the list of its key tiles, whole ones first; for dk/dv, each key tile the list of its row tiles.
# Lists, because an `if` inside a kernel's loop would stop Triton from loading the next tiles ahead of time. One loop
# runs over the whole tiles, a second over the others.
#
# Balance. In a tree every row sees the prompt's keys, so a few lists of dk/dv are much longer than the rest; in
# decoding there are one or two lists in all. Lists longer than total / P are therefore cut into even pieces. There are
# at most T + P pieces whatever the mask (sum ceil(len / (total / P)) <= T + P), so shapes are known without asking the
# device, and nothing synchronises. The pieces of a cut list write float32 partial results, which a small last kernel
# adds in order.


def ceil_div(a, b):
    return (a + b - 1) // b


def tile_extrema(vector, size, low, high):
    """Minima and maxima of (N,) over tiles of `size`, 2 x (T,); the overhang counts as `low` and as `high`."""
    tiles, overhang = ceil_div(vector.shape[0], size), -vector.shape[0] % size
    minima = F.pad(vector, (0, overhang), value=low).view(tiles, size).amin(1)
    maxima = F.pad(vector, (0, overhang), value=high).view(tiles, size).amax(1)
    return minima, maxima


def classify_tiles(q_hi, q_pos, k_hi, group, block_m, block_n):
    """Class of every tile from the extrema alone: whole and partly, each (row tiles, key tiles) bool.

    Rows are `group` to a token: row r is token r // group.
    """
    far = torch.iinfo(torch.int32).max
    sees = q_hi > 0  # padding must not widen a tile
    first, last = torch.where(sees, q_pos, far), torch.where(sees, q_pos, 0)
    # (Nq * G,)
    q_hi, first, last = (x[:, None].expand(-1, group).flatten() for x in (q_hi, first, last))
    q_hi_min, q_hi_max = tile_extrema(q_hi, block_m, 0, 0)  # (row tiles,)
    q_pos_min, _ = tile_extrema(first, block_m, far, 0)
    _, q_pos_max = tile_extrema(last, block_m, 0, 0)
    k_hi_min, k_hi_max = tile_extrema(k_hi, block_n, 0, 0)  # (key tiles,)
    start = torch.arange(k_hi_min.shape[0], dtype=torch.int32, device=k_hi.device) * block_n
    some = (start < q_hi_max[:, None]) & (q_pos_min[:, None] < k_hi_max)  # (row tiles, key tiles)
    whole = (start + block_n <= q_hi_min[:, None]) & (q_pos_max[:, None] < k_hi_min)
    return whole, some & ~whole


def compact(*classes):
    """Lists of the columns that are set, class after class, and their running counts.

    Each class (T, E) bool, disjoint -> index (T, E) int32, counts (T, classes) int32. Behind a list's end: anything.
    """
    tiles, width = classes[0].shape
    column = torch.arange(width, dtype=torch.int32, device=classes[0].device).expand(tiles, width)
    # one more: where the rest goes
    index = torch.zeros(tiles, width + 1, dtype=torch.int32, device=column.device)
    target, used, counts = None, 0, []
    for flags in classes:
        place = flags.cumsum(1, dtype=torch.int32) + used  # 1 + place in the list, where flagged
        target = torch.where(flags, place - 1, width if target is None else target)
        used = place[:, -1:]
        counts.append(used)
    index.scatter_(1, target.long(), column)
    return index[:, :width].contiguous(), torch.cat(counts, 1)


MIN_PIECE = 8  # do not cut lists into pieces shorter than this


def cut_lists(counts, extra):
    """Work items from lists: long lists in even pieces, longest item first.

    counts (T, 2) int32: whole tiles, all tiles. extra: P.
    Returns work (T + P, 5) int32: tile (-1: nothing to do), begin, middle, end, slot (-1: the list is in one piece);
    pieces (T, 2) int32: first slot and number of pieces, 0 where the list is in one piece. At most 2 P slots are used.
    """
    tiles, length = counts.shape[0], counts[:, 1].long()  # (T,)
    total = length.sum()
    piece = (ceil_div(total, extra) if extra else total).clamp(min=MIN_PIECE)  # stays on the device
    number = ceil_div(length, piece).clamp(min=1)  # (T,) an empty list still writes zeros
    behind = number.cumsum(0)  # (T,) items up to and with this tile
    item = torch.arange(tiles + extra, device=counts.device)  # (T + P,)
    tile = torch.searchsorted(behind, item, right=True)  # (T + P,) T: no such item
    valid, tile = tile < tiles, tile.clamp(max=max(tiles - 1, 0))
    part = item - (behind - number)[tile]
    size = ceil_div(length, number)[tile]
    begin = torch.minimum(part * size, length[tile])
    end = torch.minimum(begin + size, length[tile])
    middle = torch.minimum(torch.maximum(counts[tile, 0].long(), begin), end)
    cut = torch.where(number > 1, number, 0)  # (T,)
    first = cut.cumsum(0) - cut
    slot = torch.where(cut[tile] > 0, first[tile] + part, -1)
    work = torch.stack([torch.where(valid, tile, -1), begin, middle, end, slot], 1)
    order = torch.where(valid, end - begin, -1).argsort(descending=True, stable=True)
    return work[order].int(), torch.stack([first, cut], 1).int()


def _count_lists(n_queries, n_keys, group, block_m, block_n, by_key, wanted):
    """(T, E, P): tiles, entries in a list at most, and extra items: `wanted`, or all that lists so short can use."""
    rows, keys = ceil_div(n_queries * group, block_m), ceil_div(n_keys, block_n)
    extra = torch.sym_min(wanted, rows * keys // MIN_PIECE)
    return (keys, rows, extra) if by_key else (rows, keys, extra)


@torch.library.custom_op("realign::tile_lists", mutates_args=())
def tile_lists(
    q_hi: torch.Tensor,
    q_pos: torch.Tensor,
    k_hi: torch.Tensor,
    group: int,
    block_m: int,
    block_n: int,
    by_key: bool,
    wanted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index (T, E), work (T + P, 5) and pieces (T, 2) of one kernel; an operator, so that compilers see one node."""
    whole, partly = classify_tiles(q_hi, q_pos, k_hi, group, block_m, block_n)
    if by_key:
        whole, partly = whole.T, partly.T
    index, counts = compact(whole, partly)
    extra = _count_lists(len(q_hi), len(k_hi), group, block_m, block_n, by_key, wanted)[2]
    work, pieces = cut_lists(counts, extra)
    return index, work, pieces


@tile_lists.register_fake
def _(q_hi, q_pos, k_hi, group, block_m, block_n, by_key, wanted):
    tiles, entries, extra = _count_lists(
        q_hi.shape[0], k_hi.shape[0], group, block_m, block_n, by_key, wanted
    )
    return (
        q_hi.new_empty(tiles, entries),
        q_hi.new_empty(tiles + extra, 5),
        q_hi.new_empty(tiles, 2),
    )


# ----------------------------------------------------------------------------------------------------------------------
# 4. The reference


def reference(q, k, v, mask):
    """The formulas of the head of this file, densely; differentiable; float64 if q is. O(H Nq Nk) memory."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))  # (Nk, H, D)
    scores = torch.einsum("ihd,jhd->hij", q.to(dtype), k) * q.shape[2] ** -0.5  # (H, Nq, Nk)
    scores = scores.masked_fill(~mask.dense(), -math.inf)
    # finite for a row without keys
    top = scores.detach().amax(2, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weight = (scores - top).exp()  # (H, Nq, Nk)
    total = weight.sum(2, keepdim=True)
    weight = weight / torch.where(total > 0, total, 1)
    return torch.einsum("hij,jhd->ihd", weight, v).to(q.dtype)  # (Nq, H, D)


# ----------------------------------------------------------------------------------------------------------------------
# 5. The kernels
#
# Grouped queries. The G query heads of one key head see the same keys through the same mask, so they are folded into
# rows, r = token * G + g: a tile of 128 rows is 18 tokens of 7 heads, one pass over the keys serves them all (decoding
# is little else than that pass), and fewer pairs are computed in vain at the mask's edges. Heads come in the order
# head = hk * G + g, so row r lies at token * stride + (hk * G + g) * D: not one stride, and 7 heads fill no box whose
# sides are powers of two, so a tensor descriptor cannot fetch a folded tile. It need not. Forward and dq read their
# rows once, before the loop, by address, and stream keys and values by descriptor. dk/dv streams queries, so there the
# loop runs over (tile, g), with tiles of tokens of one query head, whose rows do have one stride. Nothing is copied or
# permuted, and the sum over the group in dk and dv happens in the accumulator.
#
# Descriptors (TMA on Hopper) read zeros beyond the end of a tensor, which pads the lengths and head_dim 72 to 128.


@jit
def _folded_rows(tile, n_queries, GROUP: constexpr, BLOCK_M: constexpr):
    """Token, head within the group and validity of the rows of a tile."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    return token, row - token * GROUP, token < n_queries


@jit
def _load_2d(descriptor, head, start, BLOCK: constexpr, BLOCK_D: constexpr):
    """Rows start ... start + BLOCK of one head of a (heads, N, D) descriptor, (BLOCK, BLOCK_D)."""
    return descriptor.load([head, start, 0]).reshape(BLOCK, BLOCK_D)


@jit
def _forward_tiles(
    acc,
    m,
    l,
    q,
    q_hi,
    q_pos,
    k_desc,
    v_desc,
    k_hi_ptr,
    list_ptr,
    begin,
    end,
    head,
    n_keys,
    scale,
    MASKED: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    PRECISION: constexpr,
):
    """One pass of the online softmax over entries begin ... end of a list; scale is c * log2(e)."""
    for x in tl.range(begin, end):
        start = tl.load(list_ptr + x) * BLOCK_N
        k = _load_2d(k_desc, head, start, BLOCK_N, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            k_hi = tl.load(k_hi_ptr + key, mask=key < n_keys, other=0)
            s = tl.where(
                (key[None, :] < q_hi[:, None]) & (q_pos[:, None] < k_hi[None, :]), s, float("-inf")
            )
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        v = _load_2d(v_desc, head, start, BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, l


@jit
def forward_kernel(
    q_ptr,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    q_hi_ptr,
    q_pos_ptr,
    k_hi_ptr,
    index_ptr,
    work_ptr,
    n_queries,
    n_keys,
    entries,
    q_stride,
    q_head_stride,
    scale,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    BLOCK_D: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    PRECISION: constexpr,
):
    """One item: the rows of one tile against a piece of its list. out (Nq, H, D), lse (H, Nq) float32, or a part."""
    work_ptr += tl.program_id(0) * 5
    head, heads = tl.program_id(1), tl.num_programs(1)
    tile, begin, middle, end = (
        tl.load(work_ptr),
        tl.load(work_ptr + 1),
        tl.load(work_ptr + 2),
        tl.load(work_ptr + 3),
    )
    if tile < 0:
        return
    token, g, valid = _folded_rows(tile, n_queries, GROUP, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (d[None, :] < HEAD_DIM)
    row = token.to(tl.int64) * q_stride + (head * GROUP + g) * q_head_stride
    q = tl.load(q_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)  # (BLOCK_M, BLOCK_D)
    q_hi = tl.load(q_hi_ptr + token, mask=valid, other=0)
    q_pos = tl.load(q_pos_ptr + token, mask=valid, other=0)

    # A finite start for the maximum: -inf - -inf would be NaN in a row without visible keys.
    m = tl.full((BLOCK_M,), -1e30, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    list_ptr = index_ptr + tile * entries
    acc, m, l = _forward_tiles(
        acc,
        m,
        l,
        q,
        q_hi,
        q_pos,
        k_desc,
        v_desc,
        k_hi_ptr,
        list_ptr,
        begin,
        middle,
        head,
        n_keys,
        scale,
        False,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    acc, m, l = _forward_tiles(
        acc,
        m,
        l,
        q,
        q_hi,
        q_pos,
        k_desc,
        v_desc,
        k_hi_ptr,
        list_ptr,
        middle,
        end,
        head,
        n_keys,
        scale,
        True,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )

    total = tl.where(l > 0, l, 1.0)
    lse = tl.where(l > 0, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    out = acc / total[:, None]
    # Where to write is worked out again: kept through the loops it costs registers (Triton 3.6 spills them).
    slot = tl.load(work_ptr + 4)
    token, g, valid = _folded_rows(tl.load(work_ptr), n_queries, GROUP, BLOCK_M)
    inside = valid[:, None] & (d[None, :] < HEAD_DIM)
    if slot < 0:
        row = token.to(tl.int64) * heads * GROUP + head * GROUP + g
        tl.store(
            out_ptr + row[:, None] * HEAD_DIM + d[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=inside,
        )
        tl.store(lse_ptr + (head * GROUP + g) * n_queries + token, lse, mask=valid)
    else:
        row = (slot * heads + head).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(part_ptr + row[:, None] * BLOCK_D + d[None, :], out)
        tl.store(part_lse_ptr + row, lse)


@jit
def combine_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    pieces_ptr,
    n_queries,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    BLOCK_D: constexpr,
    BLOCK_M: constexpr,
):
    """Join the parts of a cut list: out = sum_p exp(lse_p - lse) out_p, lse = log sum_p exp(lse_p)."""
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, number = tl.load(pieces_ptr + tile * 2), tl.load(pieces_ptr + tile * 2 + 1)
    if number == 0:
        return
    token, g, valid = _folded_rows(tile, n_queries, GROUP, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    m = tl.full((BLOCK_M,), -1e30, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for slot in tl.range(first, first + number):
        row = (slot * heads + head).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        lse = tl.load(part_lse_ptr + row) * 1.4426950408889634
        m_new = tl.maximum(m, lse)
        p, alpha = tl.exp2(lse - m_new), tl.exp2(m - m_new)
        l = l * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * tl.load(
            part_ptr + row[:, None] * BLOCK_D + d[None, :]
        )
        m = m_new
    total = tl.where(l > 0, l, 1.0)
    lse = tl.where(l > 0, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    out = acc / total[:, None]
    row = token.to(tl.int64) * heads * GROUP + head * GROUP + g
    inside = valid[:, None] & (d[None, :] < HEAD_DIM)
    tl.store(
        out_ptr + row[:, None] * HEAD_DIM + d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )
    tl.store(lse_ptr + (head * GROUP + g) * n_queries + token, lse, mask=valid)


@jit
def _dq_tiles(
    dq,
    q,
    do,
    lse,
    delta,
    q_hi,
    q_pos,
    k_desc,
    v_desc,
    k_hi_ptr,
    list_ptr,
    begin,
    end,
    head,
    n_keys,
    scale,
    MASKED: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    PRECISION: constexpr,
):
    """dq += ds k over entries begin ... end of a list; lse in base 2."""
    for x in tl.range(begin, end):
        start = tl.load(list_ptr + x) * BLOCK_N
        k = _load_2d(k_desc, head, start, BLOCK_N, BLOCK_D)
        v = _load_2d(v_desc, head, start, BLOCK_N, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            k_hi = tl.load(k_hi_ptr + key, mask=key < n_keys, other=0)
            s = tl.where(
                (key[None, :] < q_hi[:, None]) & (q_pos[:, None] < k_hi[None, :]), s, float("-inf")
            )
        p = tl.exp2(s * scale - lse[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@jit
def dq_kernel(
    q_ptr,
    k_desc,
    v_desc,
    out_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_hi_ptr,
    q_pos_ptr,
    k_hi_ptr,
    index_ptr,
    work_ptr,
    n_queries,
    n_keys,
    entries,
    q_stride,
    q_head_stride,
    do_stride,
    do_head_stride,
    scale,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    BLOCK_D: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    PRECISION: constexpr,
):
    """dq (Nq, H, D) and delta (H, Nq) of the rows of one tile; lists are never cut here."""
    work_ptr += tl.program_id(0) * 5
    head, heads = tl.program_id(1), tl.num_programs(1)
    tile, begin, middle, end = (
        tl.load(work_ptr),
        tl.load(work_ptr + 1),
        tl.load(work_ptr + 2),
        tl.load(work_ptr + 3),
    )
    token, g, valid = _folded_rows(tile, n_queries, GROUP, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (d[None, :] < HEAD_DIM)
    q_head = head * GROUP + g
    row = token.to(tl.int64) * q_stride + q_head * q_head_stride
    q = tl.load(q_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
    row = token.to(tl.int64) * do_stride + q_head * do_head_stride
    do = tl.load(do_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
    row = (token.to(tl.int64) * heads * GROUP + q_head) * HEAD_DIM
    out = tl.load(out_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)  # (BLOCK_M,)
    tl.store(delta_ptr + q_head * n_queries + token, delta, mask=valid)
    lse = tl.load(lse_ptr + q_head * n_queries + token, mask=valid, other=0.0)
    # a row without keys: p = exp2(-inf - 0) = 0
    lse = tl.where(lse > float("-inf"), lse, 0.0) * 1.4426950408889634
    q_hi = tl.load(q_hi_ptr + token, mask=valid, other=0)
    q_pos = tl.load(q_pos_ptr + token, mask=valid, other=0)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    list_ptr = index_ptr + tile * entries
    dq = _dq_tiles(
        dq,
        q,
        do,
        lse,
        delta,
        q_hi,
        q_pos,
        k_desc,
        v_desc,
        k_hi_ptr,
        list_ptr,
        begin,
        middle,
        head,
        n_keys,
        scale,
        False,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    dq = _dq_tiles(
        dq,
        q,
        do,
        lse,
        delta,
        q_hi,
        q_pos,
        k_desc,
        v_desc,
        k_hi_ptr,
        list_ptr,
        middle,
        end,
        head,
        n_keys,
        scale,
        True,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    dq = dq * (scale * 0.6931471805599453)
    tl.store(dq_ptr + row[:, None] + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)


@jit
def _dkdv_tiles(
    dk,
    dv,
    k,
    v,
    k_hi,
    key,
    q_desc,
    do_desc,
    lse_ptr,
    delta_ptr,
    q_hi_ptr,
    q_pos_ptr,
    list_ptr,
    begin,
    end,
    head,
    n_queries,
    scale,
    MASKED: constexpr,
    GROUP: constexpr,
    BLOCK_M: constexpr,
    BLOCK_D: constexpr,
    PRECISION: constexpr,
):
    """dk += ds^T q and dv += p^T do over entries begin ... end of a list, for each head of the group."""
    for x in tl.range(begin * GROUP, end * GROUP):
        entry = x // GROUP
        q_head = head * GROUP + x - entry * GROUP
        start = tl.load(list_ptr + entry) * BLOCK_M
        token = start + tl.arange(0, BLOCK_M)
        q = _load_2d(q_desc, q_head, start, BLOCK_M, BLOCK_D)
        do = _load_2d(do_desc, q_head, start, BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + q_head * n_queries + token, mask=token < n_queries, other=0.0)
        delta = tl.load(delta_ptr + q_head * n_queries + token, mask=token < n_queries, other=0.0)
        s = tl.dot(k, q.T, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M): transposed
        if MASKED:
            q_hi = tl.load(q_hi_ptr + token, mask=token < n_queries, other=0)
            q_pos = tl.load(q_pos_ptr + token, mask=token < n_queries, other=0)
            lse = tl.where(lse > float("-inf"), lse, 0.0)
            s = tl.where(
                (key[:, None] < q_hi[None, :]) & (q_pos[None, :] < k_hi[:, None]), s, float("-inf")
            )
        p = tl.exp2(s * scale - (lse * 1.4426950408889634)[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@jit
def dkdv_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    part_ptr,
    q_hi_ptr,
    q_pos_ptr,
    k_hi_ptr,
    index_ptr,
    work_ptr,
    n_queries,
    n_keys,
    entries,
    scale,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    BLOCK_D: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    PRECISION: constexpr,
):
    """One item: the keys of one tile against a piece of its list. dk, dv (Nk, Hk, D), or a float32 part of them."""
    work_ptr += tl.program_id(0) * 5
    head, heads = tl.program_id(1), tl.num_programs(1)
    tile, begin, middle = tl.load(work_ptr), tl.load(work_ptr + 1), tl.load(work_ptr + 2)
    end, slot = tl.load(work_ptr + 3), tl.load(work_ptr + 4)
    if tile < 0:
        return
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = _load_2d(k_desc, head, tile * BLOCK_N, BLOCK_N, BLOCK_D)
    v = _load_2d(v_desc, head, tile * BLOCK_N, BLOCK_N, BLOCK_D)
    k_hi = tl.load(k_hi_ptr + key, mask=key < n_keys, other=0)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    list_ptr = index_ptr + tile * entries
    dk, dv = _dkdv_tiles(
        dk,
        dv,
        k,
        v,
        k_hi,
        key,
        q_desc,
        do_desc,
        lse_ptr,
        delta_ptr,
        q_hi_ptr,
        q_pos_ptr,
        list_ptr,
        begin,
        middle,
        head,
        n_queries,
        scale,
        False,
        GROUP,
        BLOCK_M,
        BLOCK_D,
        PRECISION,
    )
    dk, dv = _dkdv_tiles(
        dk,
        dv,
        k,
        v,
        k_hi,
        key,
        q_desc,
        do_desc,
        lse_ptr,
        delta_ptr,
        q_hi_ptr,
        q_pos_ptr,
        list_ptr,
        middle,
        end,
        head,
        n_queries,
        scale,
        True,
        GROUP,
        BLOCK_M,
        BLOCK_D,
        PRECISION,
    )
    dk = dk * (scale * 0.6931471805599453)
    if slot < 0:
        inside = (key[:, None] < n_keys) & (d[None, :] < HEAD_DIM)
        row = (key.to(tl.int64) * heads + head) * HEAD_DIM
        tl.store(dk_ptr + row[:, None] + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + row[:, None] + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=inside)
    else:
        row = ((slot * heads + head) * 2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(part_ptr + row[:, None] * BLOCK_D + d[None, :], dk)
        tl.store(part_ptr + (row + BLOCK_N)[:, None] * BLOCK_D + d[None, :], dv)


@jit
def sum_kernel(
    part_ptr,
    dk_ptr,
    dv_ptr,
    pieces_ptr,
    n_keys,
    HEAD_DIM: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
):
    """Add the parts of a cut list, in order: the same bits every time."""
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, number = tl.load(pieces_ptr + tile * 2), tl.load(pieces_ptr + tile * 2 + 1)
    if number == 0:
        return
    d = tl.arange(0, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for slot in tl.range(first, first + number):
        row = ((slot * heads + head) * 2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        dk += tl.load(part_ptr + row[:, None] * BLOCK_D + d[None, :])
        dv += tl.load(part_ptr + (row + BLOCK_N)[:, None] * BLOCK_D + d[None, :])
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (key[:, None] < n_keys) & (d[None, :] < HEAD_DIM)
    row = (key.to(tl.int64) * heads + head) * HEAD_DIM
    tl.store(dk_ptr + row[:, None] + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + row[:, None] + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Configurations and operators

# (BLOCK_M, BLOCK_N, warps, stages) for BLOCK_D up to 64, 128 and 256. "few": the forward of few rows (decoding). Chosen
# from what the compiler makes of them (run this file): as large as fits without spilled registers, in two-byte types
# (but dq and dkdv of head_dim 256 spill).
# Three stages, not two: reading the list's entry takes one of them, and with two the compiler keeps a single buffer of
# keys and values in the first loop, loads nothing ahead, and ptxas runs the tensor cores synchronously (C7515).
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
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_config(kernel, head_dim, dtype, device):
    """(BLOCK_M, BLOCK_N, warps, stages) of "forward", "few" (the forward of few rows), "dq" or "dkdv"."""
    large = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    table = FLOAT32 if dtype == torch.float32 else HOPPER if large else SMALL
    return table[kernel][(head_dim > 64) + (head_dim > 128)]


def _forward_config(q, k):
    rows = q.shape[0] * (q.shape[1] // k.shape[1])
    return tile_config("few" if rows <= FEW_ROWS else "forward", q.shape[2], q.dtype, q.device)


def _lists(mask, group, by_key, wanted, config):
    """The tile lists of one kernel, made once per mask: [index, work, pieces]."""
    key = (group, by_key, wanted, config[0], config[1])
    if key not in mask.cache:
        mask.cache[key] = tile_lists(
            mask.q_hi, mask.positions(), mask.k_hi, group, config[0], config[1], by_key, wanted
        )
    return list(mask.cache[key])


def forward_lists(mask, q, k):
    """Lists of the forward kernel; cut into pieces only where there are too few row tiles to fill a GPU (decoding)."""
    config, group, key_heads = _forward_config(q, k), q.shape[1] // k.shape[1], k.shape[1]
    programs = ceil_div(q.shape[0] * group, config[0]) * key_heads
    wanted = ceil_div(PROGRAMS, key_heads) if programs < PROGRAMS else 0
    return _lists(mask, group, False, wanted, config)


def backward_lists(mask, q, k):
    """Lists of dq, then of dk/dv; the latter cut so finely that no long list is waited for."""
    dq = tile_config("dq", q.shape[2], q.dtype, q.device)
    dkdv = tile_config("dkdv", q.shape[2], q.dtype, q.device)
    wanted = ceil_div(4 * PROGRAMS, k.shape[1])
    return _lists(mask, q.shape[1] // k.shape[1], False, 0, dq) + _lists(
        mask, 1, True, wanted, dkdv
    )


def _aligned(x):
    """x, copied only if a descriptor cannot address it: 16-byte aligned start and strides, dense last dimension."""
    unit = 16 // x.element_size()
    fits = (
        x.stride(2) == 1
        and all(s > 0 and s % unit == 0 for s in x.stride()[:2])
        and x.data_ptr() % 16 == 0
    )
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _descriptor(x, block):
    """(N, heads, D) seen as (heads, N, D), read in boxes of one head and `block` tokens."""
    n, heads, head_dim = x.shape
    return TensorDescriptor(
        x, [heads, n, head_dim], [x.stride(1), x.stride(0), 1], [1, block, block_d(head_dim)]
    )


def _precision(dtype):
    # float32 as three tensor-core products; ignored otherwise
    return "tf32x3" if dtype == torch.float32 else "tf32"


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
    """out (Nq, H, D) and lse (H, Nq) float32. lists: forward_lists; later: backward_lists, or nothing without grad."""
    (n_queries, heads, head_dim), (n_keys, key_heads, _) = q.shape, k.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, n_queries, dtype=torch.float32, device=q.device)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    index, work, pieces = lists
    block_m, block_n, warps, stages = _forward_config(q, k)
    slots = 2 * (work.shape[0] - pieces.shape[0])
    part = torch.empty(
        slots, key_heads, block_m, block_d(head_dim), dtype=torch.float32, device=q.device
    )
    part_lse = torch.empty(slots, key_heads, block_m, dtype=torch.float32, device=q.device)
    shape = dict(
        GROUP=heads // key_heads, HEAD_DIM=head_dim, BLOCK_D=block_d(head_dim), BLOCK_M=block_m
    )
    forward_kernel[work.shape[0], key_heads](
        q,
        _descriptor(k, block_n),
        _descriptor(v, block_n),
        out,
        lse,
        part,
        part_lse,
        q_hi,
        q_pos,
        k_hi,
        index,
        work,
        n_queries,
        n_keys,
        index.shape[1],
        q.stride(0),
        q.stride(1),
        scale / math.log(2),
        **shape,
        BLOCK_N=block_n,
        PRECISION=_precision(q.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    if slots:
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
    (n_queries, heads, head_dim), (n_keys, key_heads, _) = q.shape, k.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    do, q, k, v = _aligned(do), _aligned(q), _aligned(k), _aligned(v)
    delta = torch.empty_like(lse)  # (H, Nq)
    shape = dict(
        GROUP=heads // key_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        PRECISION=_precision(q.dtype),
    )

    index, work, _ = lists[:3]
    block_m, block_n, warps, stages = tile_config("dq", head_dim, q.dtype, q.device)
    dq_kernel[work.shape[0], key_heads](
        q,
        _descriptor(k, block_n),
        _descriptor(v, block_n),
        out,
        do,
        lse,
        delta,
        dq,
        q_hi,
        q_pos,
        k_hi,
        index,
        work,
        n_queries,
        n_keys,
        index.shape[1],
        q.stride(0),
        q.stride(1),
        do.stride(0),
        do.stride(1),
        scale / math.log(2),
        **shape,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )

    index, work, pieces = lists[3:]
    block_m, block_n, warps, stages = tile_config("dkdv", head_dim, q.dtype, q.device)
    slots = 2 * (work.shape[0] - pieces.shape[0])
    part = torch.empty(
        slots, key_heads, 2, block_n, block_d(head_dim), dtype=torch.float32, device=q.device
    )
    dkdv_kernel[work.shape[0], key_heads](
        _descriptor(q, block_m),
        _descriptor(k, block_n),
        _descriptor(v, block_n),
        _descriptor(do, block_m),
        lse,
        delta,
        dk,
        dv,
        part,
        q_hi,
        q_pos,
        k_hi,
        index,
        work,
        n_queries,
        n_keys,
        index.shape[1],
        scale / math.log(2),
        **shape,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    if slots:
        sum_kernel[pieces.shape[0], key_heads](
            part,
            dk,
            dv,
            pieces,
            n_keys,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d(head_dim),
            BLOCK_N=block_n,
            num_warps=8,
        )
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
    """The Triton back end: CUDA, or TRITON_INTERPRET=1."""
    if q.shape[0] == 0 or k.shape[0] == 0:
        return q * 0 + 0 * (k.sum() + v.sum())  # nothing to see; still part of the graph
    head_dim = q.shape[2]
    padding = -head_dim % (16 // q.element_size())  # descriptors want rows of whole 16 bytes
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    later = backward_lists(mask, q, k) if training else []
    out, _ = attention_forward(
        q,
        k,
        v,
        mask.q_hi,
        mask.positions(),
        mask.k_hi,
        forward_lists(mask, q, k),
        later,
        head_dim**-0.5,
    )
    return out[..., :head_dim] if padding else out


# ----------------------------------------------------------------------------------------------------------------------
# 7. Dispatch

BACKENDS = ("triton", "sdpa", "flex", "reference")
_forced = None


def set_backend(name):
    """Force a back end for this process, one of BACKENDS; None: choose automatically again."""
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"attention back end {name!r} is unknown; expected one of {', '.join(BACKENDS)}."
        )
    _forced = name


set_backend(os.environ.get("REALIGN_ATTENTION") or None)


def interpreted():
    """Whether Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1 when this file was imported)."""
    return triton is not None and not isinstance(forward_kernel, triton.runtime.JITFunction)


def _has_kernel(dtype, head_dim):
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and head_dim <= 256


def choose_backend(device, dtype=torch.bfloat16, head_dim=128):
    """(name, reason) of the back end that attention() uses when its caller names none."""
    if _forced is not None:
        return _forced, "as asked"
    if torch.device(device).type != "cuda":
        return "sdpa", f"on {torch.device(device).type}"
    if triton is None:
        return "sdpa", "Triton is not installed"
    if not _has_kernel(dtype, head_dim):
        return "sdpa", f"no kernel for {dtype} with head_dim {head_dim}"
    return "triton", "on cuda"


def describe_backend(device=None):
    """One line for the start of a run: which back end attention uses, and why."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = choose_backend(device)
    return f"attention: {name} ({reason})"


def flex_block_mask(mask, block=128):
    """FlexAttention's BlockMask from the same vectors and the same classes of tiles; nothing of size Nq x Nk."""
    from torch.nn.attention.flex_attention import BlockMask

    key = ("flex", block)
    if key not in mask.cache:
        q_hi, q_pos, k_hi = mask.q_hi, mask.positions(), mask.k_hi
        whole, partly = classify_tiles(q_hi, q_pos, k_hi, 1, block, block)
        (full, full_count), (part, part_count) = compact(whole), compact(partly)

        def visible(batch, head, i, j):
            return (j < q_hi[i]) & (q_pos[i] < k_hi[j])

        mask.cache[key] = BlockMask.from_kv_blocks(
            part_count[None, None, :, 0],
            part[None, None],
            full_count[None, None, :, 0],
            full[None, None],
            BLOCK_SIZE=block,
            mask_mod=visible,
            seq_lengths=(len(q_hi), len(k_hi)),
        )
    return mask.cache[key]


_compiled_flex = None


def flex_attention(q, k, v, mask):
    """FlexAttention, compiled on a GPU; for comparison."""
    global _compiled_flex
    from torch.nn.attention import flex_attention as flex

    function = flex.flex_attention
    if q.is_cuda:
        function = _compiled_flex = _compiled_flex or torch.compile(function, dynamic=True)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention back end 'flex' has no gradient on a CPU; use 'sdpa' here.")
    else:
        # it looks at requires_grad, not at the grad mode
        q, k, v = q.detach(), k.detach(), v.detach()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, D)
    out = function(q, k, v, block_mask=flex_block_mask(mask), enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)  # (Nq, H, D)


def _check(q, k, v, mask):
    if (
        q.dim() != 3
        or k.dim() != 3
        or k.shape != v.shape
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected (Nq, H, D), "
            f"(Nk, Hk, D), (Nk, Hk, D) with H a multiple of Hk."
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


class ShapesOfAttention(torch.autograd.Function):
    """Attention on the meta device: shapes, and what the Triton kernel keeps for its backward."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def attention(q, k, v, mask, backend=None):
    """softmax(q k^T / sqrt(D)) v under the mask. q (Nq, H, D), k and v (Nk, Hk, D) -> (Nq, H, D), differentiable.

    backend: one of BACKENDS for this call; None: the one set by set_backend, REALIGN_ATTENTION, or the device.
    ValueError if shapes, types or mask do not fit each other, or if the back end is unknown or cannot run here.
    """
    if q.is_meta:  # shapes without memory (bench/memory.py): no mask is read
        return ShapesOfAttention.apply(q, k, v)
    _check(q, k, v, mask)
    name = backend or choose_backend(q.device, q.dtype, q.shape[2])[0]
    if name == "sdpa":
        from kernels.sdpa import sdpa_attention

        return sdpa_attention(q, k, v, mask)
    if name == "flex":
        return flex_attention(q, k, v, mask)
    if name == "reference":
        return reference(q, k, v, mask)
    if name != "triton":
        raise ValueError(
            f"attention back end {name!r} is unknown; expected one of {', '.join(BACKENDS)}."
        )
    if triton is None or not (q.is_cuda or interpreted()):
        raise ValueError(
            "attention back end 'triton' needs Triton and a CUDA device (or TRITON_INTERPRET=1); "
            "use 'sdpa' here."
        )
    if not _has_kernel(q.dtype, q.shape[2]):
        raise ValueError(
            f"attention back end 'triton' has no kernel for {q.dtype} with head_dim {q.shape[2]}; it does "
            f"float32, float16 and bfloat16 up to 256; use 'sdpa'."
        )
    return triton_attention(q, k, v, mask)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Cautions
#
# - Values behind the mask must be finite. A hidden key has weight 0, and 0 * NaN is NaN: allocate caches with zeros.
# - Deterministic for one set of tile sizes. A row computed against a cache may fall into another tile than in the full
#   call, and then differs in the last bits.
# - float32 goes through three TF32 products, about as exact as float32; not so fast.
# - Lists live on the mask. Building them does not synchronise and can be captured in a CUDA graph, if the captured step
#   makes its own Mask around vectors that are updated in place (decoding: q_hi and q_pos advance, k_hi never changes).
# - Under torch.compile the first layer of a step builds the lists and the others find them: two graphs, not one.
#   Lengths do not add graphs (test_attention.py), except that few rows (decoding) take other tiles than many.
# - Kernels are launched on the current CUDA device, which must be that of the tensors.
# - The interpreter shows that masks, lists and algebra are right. It ignores precision, accepts tiles that a GPU does
#   not, and gets bfloat16 wrong (tests/test_attention.py repairs that). A GPU needs the tests run on it once.


def compile_offline(kernel, config, head_dim=128, group=7, dtype="bf16"):
    """Compile a kernel for sm_90 without a GPU: {registers, spilled_bytes, shared, wgmma, tma, serialized}.

    The last three count instructions of the tensor cores and of the copy engine, and the assembler's warnings that it
    cannot run the former asynchronously.
    """
    import re
    import subprocess
    import tempfile

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    function, (block_m, block_n, warps, stages) = globals()[kernel], config
    boxes = {
        name: f"tensordesc<{dtype}[1, {rows}, {block_d(head_dim)}]>"
        for name, rows in (
            ("q_desc", block_m),
            ("do_desc", block_m),
            ("k_desc", block_n),
            ("v_desc", block_n),
        )
    }
    types = {
        "lse_ptr": "*fp32",
        "delta_ptr": "*fp32",
        "part_ptr": "*fp32",
        "part_lse_ptr": "*fp32",
        "scale": "fp32",
    }
    types |= {
        f"{name}_ptr": "*i32" for name in ("q_hi", "q_pos", "k_hi", "index", "work", "pieces")
    }
    types |= boxes
    values = dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION="tf32x3" if dtype == "fp32" else "tf32",
    )
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        default = f"*{dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in values else types.get(name, default)
        if name in values:
            constants[i,] = values[name]
        elif name.endswith("_ptr") or "stride" in name:
            attributes[i,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    built = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=stages)
    )
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/kernel.ptx", "w") as file:
            file.write(built.asm["ptx"])
        command = [
            get_ptxas(90).path,
            "-v",
            "--gpu-name=sm_90a",
            file.name,
            "-o",
            f"{folder}/kernel.cubin",
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {
        name: int(re.search(rf"(\d+) {words}", log)[1])
        for name, words in (("registers", "registers"), ("spilled_bytes", "bytes spill stores"))
    }
    return found | dict(
        shared=built.metadata.shared,
        wgmma=built.asm["ptx"].count("wgmma.mma_async"),
        tma=built.asm["ptx"].count("cp.async.bulk.tensor"),
        serialized=log.count("serialized"),
    )


def main():
    """Print what the compiler makes of the shipped configurations: python kernels/attention.py [head_dim [dtype]]."""
    import sys

    head_dim, dtype = int((sys.argv[1:] or [128])[0]), (sys.argv[2:] or ["bf16"])[0]
    if triton is None or interpreted():
        print("offline compilation needs Triton (and no TRITON_INTERPRET)")
        return 2
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    print(
        f"sm_90, {dtype}, head_dim {head_dim}, 7 query heads a key head, torch {torch.__version__}, "
        f"triton {triton.__version__}"
    )
    for name in ("forward", "few", "dq", "dkdv"):
        config = tile_config(name, head_dim, torch_dtype, torch.device("cpu"))
        kernel = {"few": "forward"}.get(name, name) + "_kernel"
        found = compile_offline(kernel, config, head_dim, dtype=dtype)
        shape = "tile {}x{}, {} warps, {} stages".format(*config)
        print(
            f"{name:8} {shape:33}", *(f"{key} {value}" for key, value in found.items()), flush=True
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
