"""
The Triton kernels of attention, forward and backward.

    forward    the rows of a tile against a piece of its list of key tiles -> out, lse
    combine    joins the pieces of a cut list
    dq         the rows of a tile against its list of key tiles -> dq, delta
    dkdv       the keys of a tile against a piece of its list of row tiles -> dk, dv
    sum        adds the pieces of a cut list

The mathematics stand in kernels/attention.py, the lists in kernels/tiles.py, the launches in
kernels/triton_attention.py.

Grouped queries. The H / K query heads of one key head see the same keys through the same mask, so
they are folded into rows, r = token * GROUP + g: a tile of 128 rows is 18 tokens of 7 heads, one
pass over the keys serves them all (decoding is little else than that pass), and fewer pairs are
computed in vain at the mask's edges. Heads come in the order  key head * GROUP + g,  so row r lies
at  token * stride + (key head * GROUP + g) * D:  not one stride, and 7 heads fill no box whose
sides are powers of two, so a tensor descriptor cannot fetch a folded tile. It need not. Forward and
dq read their rows once, before the loop, by address, and stream keys and values by descriptor.
dk/dv streams queries, so there the loop runs over (tile, g), with tiles of tokens of one query
head, whose rows do have one stride. Nothing is copied or permuted, and the sum over the group in dk
and dv happens in the accumulator.

Descriptors (TMA on Hopper) read zeros beyond the end of a tensor, which pads the lengths and
head_dim 72 to 128.

Letters: sequence.py; Nq queries and Nk keys; BLOCK_M rows and BLOCK_N keys of a tile, BLOCK_D: D
padded to a power of two.
Left out: dropout, biases, soft caps, second derivatives, float8.
"""

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton here: the kernels below are never called, sdpa does the work
    triton = tl = None


constexpr = tl.constexpr if triton else None
# float32 goes through three tensor-core products; of other types the compiler ignores this
PRECISION = constexpr("tf32x3") if triton else None


def jit(function):
    """triton.jit, or the function itself where there is no Triton."""
    return triton.jit(function) if triton else function


# --------------------------------------------------------------------------------------------------
# What the kernels share


@jit
def _folded_rows(tile, n_queries, GROUP: constexpr, BLOCK_M: constexpr):
    """Token, head within the group and validity of the rows of a tile."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    return token, row - token * GROUP, token < n_queries


def descriptor(x, block, width):
    """x (N, heads, D) seen as (heads, N, D), for _load_2d: boxes of one head, `block` x `width`."""
    (n, heads, head_dim), (stride, head_stride, _) = x.shape, x.stride()
    return TensorDescriptor(x, [heads, n, head_dim], [head_stride, stride, 1], [1, block, width])


@jit
def _load_2d(descriptor, head, start):
    """One box of a (heads, N, D) descriptor: the rows of one head from `start` on."""
    box = descriptor.load([head, start, 0])  # (1, rows, BLOCK_D)
    return box.reshape(box.shape[1], box.shape[2])  # (rows, BLOCK_D)


@jit
def _hidden_are_inf(s, rows, keys, start, BLOCK_N: constexpr):
    """s (BLOCK_M, BLOCK_N), scores of the keys from `start` on; -inf where a key is hidden."""
    _, q_hi, q_pos = rows
    _, _, _, k_hi_ptr, n_keys = keys
    key = start + tl.arange(0, BLOCK_N)
    k_hi = tl.load(k_hi_ptr + key, mask=key < n_keys, other=0)
    seen = (key[None, :] < q_hi[:, None]) & (q_pos[:, None] < k_hi[None, :])  # (BLOCK_M, BLOCK_N)
    return tl.where(seen, s, float("-inf"))


# --------------------------------------------------------------------------------------------------
# Forward


@jit
def _forward_tiles(
    state, rows, keys, list_ptr, begin, end, scale, MASKED: constexpr, BLOCK_N: constexpr
):
    """The online softmax over entries begin ... end of a list; scale is c * log2(e).

    state: acc, m, z.   rows: q, q_hi, q_pos.   keys: k_desc, v_desc, head, k_hi_ptr, n_keys.
    """
    acc, m, z = state
    q, _, _ = rows
    k_desc, v_desc, head, _, _ = keys
    for x in tl.range(begin, end):
        start = tl.load(list_ptr + x) * BLOCK_N
        k = _load_2d(k_desc, head, start)
        s = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            s = _hidden_are_inf(s, rows, keys, start, BLOCK_N)
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        z = z * alpha + tl.sum(p, 1)
        v = _load_2d(v_desc, head, start)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, z


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
):
    """The rows of one tile against a piece of its list.

    out (Nq, H, D) and lse (H, Nq) float32, or a part of both where the item has a slot.
    """
    work_ptr += tl.program_id(0) * 5
    head, heads = tl.program_id(1), tl.num_programs(1)
    tile, begin = tl.load(work_ptr), tl.load(work_ptr + 1)
    middle, end = tl.load(work_ptr + 2), tl.load(work_ptr + 3)
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
    z = tl.zeros((BLOCK_M,), tl.float32)
    state = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), m, z
    rows, keys = (q, q_hi, q_pos), (k_desc, v_desc, head, k_hi_ptr, n_keys)
    entry = index_ptr + tile * entries
    state = _forward_tiles(state, rows, keys, entry, begin, middle, scale, False, BLOCK_N)
    acc, m, z = _forward_tiles(state, rows, keys, entry, middle, end, scale, True, BLOCK_N)

    total = tl.where(z > 0, z, 1.0)
    lse = tl.where(z > 0, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    out = acc / total[:, None]
    # Where to write is worked out again: kept through the loops it costs registers (Triton 3.6
    # spills them).
    slot = tl.load(work_ptr + 4)
    token, g, valid = _folded_rows(tl.load(work_ptr), n_queries, GROUP, BLOCK_M)
    inside = valid[:, None] & (d[None, :] < HEAD_DIM)
    if slot < 0:
        row = token.to(tl.int64) * heads * GROUP + head * GROUP + g
        here = out_ptr + row[:, None] * HEAD_DIM + d[None, :]
        tl.store(here, out.to(out_ptr.dtype.element_ty), mask=inside)
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
    """Join the parts of a list: out = sum_p exp(lse_p - lse) out_p, lse = log sum_p exp(lse_p)."""
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, number = tl.load(pieces_ptr + tile * 2), tl.load(pieces_ptr + tile * 2 + 1)
    if number == 0:
        return
    token, g, valid = _folded_rows(tile, n_queries, GROUP, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    m = tl.full((BLOCK_M,), -1e30, tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for slot in tl.range(first, first + number):
        row = (slot * heads + head).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        lse = tl.load(part_lse_ptr + row) * 1.4426950408889634
        m_new = tl.maximum(m, lse)
        p, alpha = tl.exp2(lse - m_new), tl.exp2(m - m_new)
        z = z * alpha + p
        part = tl.load(part_ptr + row[:, None] * BLOCK_D + d[None, :])  # (BLOCK_M, BLOCK_D)
        acc = acc * alpha[:, None] + p[:, None] * part
        m = m_new
    total = tl.where(z > 0, z, 1.0)
    lse = tl.where(z > 0, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    out = acc / total[:, None]
    row = token.to(tl.int64) * heads * GROUP + head * GROUP + g
    inside = valid[:, None] & (d[None, :] < HEAD_DIM)
    here = out_ptr + row[:, None] * HEAD_DIM + d[None, :]
    tl.store(here, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + (head * GROUP + g) * n_queries + token, lse, mask=valid)


# --------------------------------------------------------------------------------------------------
# Backward


@jit
def _dq_tiles(
    dq, rows, keys, gradient, list_ptr, begin, end, scale, MASKED: constexpr, BLOCK_N: constexpr
):
    """dq += ds k over entries begin ... end of a list; scale is c * log2(e).

    rows: q, q_hi, q_pos.   keys: k_desc, v_desc, head, k_hi_ptr, n_keys.
    gradient: do, lse in base 2, delta.
    """
    q, _, _ = rows
    do, lse, delta = gradient
    k_desc, v_desc, head, _, _ = keys
    for x in tl.range(begin, end):
        start = tl.load(list_ptr + x) * BLOCK_N
        k = _load_2d(k_desc, head, start)
        v = _load_2d(v_desc, head, start)
        s = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            s = _hidden_are_inf(s, rows, keys, start, BLOCK_N)
        p = tl.exp2(s * scale - lse[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
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
):
    """dq (Nq, H, D) and delta (H, Nq) of the rows of one tile; lists are never cut here."""
    work_ptr += tl.program_id(0) * 5
    head, heads = tl.program_id(1), tl.num_programs(1)
    tile, begin = tl.load(work_ptr), tl.load(work_ptr + 1)
    middle, end = tl.load(work_ptr + 2), tl.load(work_ptr + 3)
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
    rows, keys = (q, q_hi, q_pos), (k_desc, v_desc, head, k_hi_ptr, n_keys)
    gradient = do, lse, delta
    entry = index_ptr + tile * entries
    dq = _dq_tiles(dq, rows, keys, gradient, entry, begin, middle, scale, False, BLOCK_N)
    dq = _dq_tiles(dq, rows, keys, gradient, entry, middle, end, scale, True, BLOCK_N)
    dq = dq * (scale * 0.6931471805599453)
    tl.store(dq_ptr + row[:, None] + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)


@jit
def _dkdv_tiles(
    state,
    keys,
    queries,
    list_ptr,
    begin,
    end,
    scale,
    MASKED: constexpr,
    GROUP: constexpr,
    BLOCK_M: constexpr,
):
    """dk += ds^T q, dv += p^T do over entries begin ... end of a list, for each head of the group.

    state: dk, dv.   keys: k, v, k_hi, key.   scale is c * log2(e).
    queries: q_desc, do_desc, lse_ptr, delta_ptr, q_hi_ptr, q_pos_ptr, key head, n_queries.
    """
    dk, dv = state
    k, v, k_hi, key = keys
    q_desc, do_desc, lse_ptr, delta_ptr, q_hi_ptr, q_pos_ptr, head, n_queries = queries
    for x in tl.range(begin * GROUP, end * GROUP):
        entry = x // GROUP
        q_head = head * GROUP + x - entry * GROUP
        start = tl.load(list_ptr + entry) * BLOCK_M
        token = start + tl.arange(0, BLOCK_M)
        q = _load_2d(q_desc, q_head, start)
        do = _load_2d(do_desc, q_head, start)
        lse = tl.load(lse_ptr + q_head * n_queries + token, mask=token < n_queries, other=0.0)
        delta = tl.load(delta_ptr + q_head * n_queries + token, mask=token < n_queries, other=0.0)
        s = tl.dot(k, q.T, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M): transposed
        if MASKED:
            q_hi = tl.load(q_hi_ptr + token, mask=token < n_queries, other=0)
            q_pos = tl.load(q_pos_ptr + token, mask=token < n_queries, other=0)
            lse = tl.where(lse > float("-inf"), lse, 0.0)
            seen = (key[:, None] < q_hi[None, :]) & (q_pos[None, :] < k_hi[:, None])
            s = tl.where(seen, s, float("-inf"))  # (BLOCK_N, BLOCK_M)
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
):
    """The keys of one tile against a piece of its list.

    dk, dv (Nk, K, D), or a float32 part of both where the item has a slot.
    """
    work_ptr += tl.program_id(0) * 5
    head, heads = tl.program_id(1), tl.num_programs(1)
    tile, begin, middle = tl.load(work_ptr), tl.load(work_ptr + 1), tl.load(work_ptr + 2)
    end, slot = tl.load(work_ptr + 3), tl.load(work_ptr + 4)
    if tile < 0:
        return
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = _load_2d(k_desc, head, tile * BLOCK_N)
    v = _load_2d(v_desc, head, tile * BLOCK_N)
    k_hi = tl.load(k_hi_ptr + key, mask=key < n_keys, other=0)

    state = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    keys = k, v, k_hi, key
    queries = q_desc, do_desc, lse_ptr, delta_ptr, q_hi_ptr, q_pos_ptr, head, n_queries
    entry = index_ptr + tile * entries
    state = _dkdv_tiles(state, keys, queries, entry, begin, middle, scale, False, GROUP, BLOCK_M)
    dk, dv = _dkdv_tiles(state, keys, queries, entry, middle, end, scale, True, GROUP, BLOCK_M)
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
