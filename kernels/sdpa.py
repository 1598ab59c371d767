"""
Attention under the two-vector mask with PyTorch's scaled_dot_product_attention, block by block of
the tree.

The back end of CPUs. A sequence of N tokens is mostly invisible to itself, so the N x N matrix is
never built. Rows are cut where the branch changes (where k_hi of the row's own position changes)
and where a picture begins or ends; text is cut into pieces of TEXT rows. Each piece needs only the
keys that some of its rows may see:

    rows   | picture | text           | leaf 1                   | leaf 2                   | ...
    keys   | picture | picture + text | picture + text + leaf 1  | picture + text + leaf 2  | ...
    bias   | none    | of the text    | none, if it is a picture | ...

All rows of a picture see the same keys: such a piece is *whole* and has no bias, neither built nor
added. Bias has as many numbers as text rows times the keys before them. A piece of r rows and c
keys costs CALL + (r + FETCH) c, and BIASED times as much where it has a bias. Neighbours are merged
while that is cheaper (decoding: one row a member), pieces of similar size are padded to one batch
while that is, and each batch is one call. This schedule depends on the mask alone: it is made once
per pack and shared by all layers.

Letters: sequence.py; B pieces in one call, Nq queries and Nk keys.
Left out: anything about tiles; a GPU has the Triton kernel for that.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# measured on a CPU at head_dim 32 to 64, all in scores
CALL = 4096  # what a call costs whatever its size
FETCH = 16  # what a key costs whatever the rows
BIASED = 1.2  # how much more a score costs that has a bias
TEXT = 128  # rows of text in a piece, before merging
VIEW = 8  # a view of n keys is taken of up to VIEW n: its gradient is as long as all of them
FEW = 16  # up to so many rows, query heads of one key head are computed as rows of it
MAX_BIAS = 2**22  # numbers in the bias of several pieces together


class Piece(NamedTuple):
    """Rows [begin, end), the keys (n,) that some of them see, and whether all of them see all."""

    begin: int
    end: int
    keys: np.ndarray
    whole: bool


class Call(NamedTuple):
    """One call: B pieces of so many rows. keys: a slice of them, or None: they are fetched.

    bias: (B, 1, rows, keys), or None: all is seen.
    """

    count: int
    rows: int
    keys: slice | None
    bias: torch.Tensor | None


class Schedule(NamedTuple):
    """The calls of one attention, see `make_schedule`.

    order    the rows of all calls, one after another, padding included
    fetch    the keys of all calls that fetch them, one after another
    lengths  keys that each call fetches, of all its pieces together
    restore  (Nq,) where each row lies among the results of all calls
    empty    (Nq,) bool, the rows that see nothing, or None
    """

    calls: list[Call]
    order: torch.Tensor
    fetch: torch.Tensor
    lengths: list[int]
    restore: torch.Tensor
    empty: torch.Tensor | None


def sdpa_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v. q (Nq, H, D), k and v (Nk, K, D), K divides H -> (Nq, H, D)."""
    if "sdpa" not in mask.cache:
        mask.cache["sdpa"] = make_schedule(mask)
    schedule = mask.cache["sdpa"]
    queries = _rows(q, schedule.order).split([call.count * call.rows for call in schedule.calls])
    # those of a call that takes a slice are empty
    keys, values = (_rows(x, schedule.fetch).split(schedule.lengths) for x in (k, v))
    outputs = []
    for query, key, value, call in zip(queries, keys, values, schedule.calls):
        if call.keys is not None:
            key, value = k[call.keys], v[call.keys]
        # (B, H, rows, D), (B, K, keys, D), (B, K, keys, D)
        query, key, value = (
            x.unflatten(0, (call.count, -1)).transpose(1, 2) for x in (query, key, value)
        )
        bias = None if call.bias is None else call.bias.to(q.dtype)
        out = _one_call(query, key, value, bias)  # (B, H, rows, D)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (B * rows, H, D)
    del queries, query, keys, key, values, value  # what follows needs as much memory
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    del outputs
    out = _rows(out, schedule.restore)  # (Nq, H, D)
    return out if schedule.empty is None else out.masked_fill(schedule.empty[:, None, None], 0)


def _one_call(query, key, value, bias):
    """Attention of (B, H, rows, D) to (B, K, keys, D) -> (B, H, rows, D)."""
    group = query.shape[1] // key.shape[1]  # query heads of a key head
    sdpa = F.scaled_dot_product_attention
    if group == 1 or query.shape[2] > FEW:
        return sdpa(query, key, value, attn_mask=bias, enable_gqa=group > 1)
    # few rows: keys are repeated for each query head; so let these be more rows of one head
    folded = query.unflatten(1, (-1, group)).flatten(2, 3)  # (B, K, group * rows, D)
    bias = None if bias is None else bias.repeat(1, 1, group, 1)
    out = sdpa(folded, key, value, attn_mask=bias)
    return out.unflatten(2, (group, -1)).flatten(1, 2)  # (B, H, rows, D)


def _rows(x, index):
    """x[index] of x (N, heads, D), as an embedding: on a CPU its gradient is far faster."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])  # (n, heads, D)


# --------------------------------------------------------------------------------------------------
# the schedule


def make_schedule(mask):
    """What to compute together, on the device of the mask."""
    q_hi, k_hi = mask.q_hi.cpu().numpy(), mask.k_hi.cpu().numpy()
    q_pos = mask.positions().cpu().numpy()
    pieces = [_piece(begin, end, q_hi, k_hi, q_pos) for begin, end in _cut(q_hi, k_hi, q_pos)]
    calls, order, fetch, offset = [], [], [], 0
    restore, empty = np.zeros(len(q_hi), np.int64), np.zeros(len(q_hi), bool)
    for batch in _batch(_merge(pieces)):
        height, width = _shape(batch)
        rows = np.zeros((len(batch), height), np.int64)
        keys = np.zeros((len(batch), width), np.int64)
        visible = None if _is_whole(batch) else np.zeros((len(batch), height, width), bool)
        for b, piece in enumerate(batch):
            inside = np.arange(piece.begin, piece.end)
            rows[b, : len(inside)], keys[b, : len(piece.keys)] = inside, piece.keys
            restore[inside] = offset + b * height + np.arange(len(inside))
            if visible is not None:
                below, behind = q_hi[inside, None], k_hi[piece.keys]
                pairs = (piece.keys < below) & (q_pos[inside, None] < behind)  # (rows, keys)
                visible[b, : len(inside), : len(piece.keys)] = pairs
                empty[inside] = ~pairs.any(1)
        seen = keys.ravel()
        in_a_row = (seen[1:] == seen[:-1] + 1).all() and len(k_hi) <= VIEW * len(seen)
        view = slice(int(seen[0]), int(seen[-1]) + 1) if in_a_row else None
        bias = None if visible is None else _bias(visible).to(mask.device)
        calls.append(Call(len(batch), height, view, bias))
        order.append(rows.ravel())
        fetch.append(seen[:0] if in_a_row else seen)
        offset += rows.size
    lengths = [len(keys) for keys in fetch]
    vectors = np.concatenate(order), np.concatenate(fetch), restore, empty
    order, fetch, restore, empty = (torch.from_numpy(x).to(mask.device) for x in vectors)
    return Schedule(calls, order, fetch, lengths, restore, empty if empty.any() else None)


def _bias(visible):
    """0 where visible (B, rows, keys) and -inf elsewhere, (B, 1, rows, keys)."""
    # softmax needs one key in every row; rows without are padding, dropped, or empty, zeroed
    visible[..., 0] |= ~visible.any(2)
    hidden = torch.from_numpy(~visible)
    return torch.zeros(visible.shape).masked_fill(hidden, float("-inf"))[:, None]


def _cut(q_hi, k_hi, q_pos):
    """[(begin, end)] of runs of rows in one branch: a picture, or up to TEXT rows of text."""
    own = k_hi[np.minimum(q_pos, len(k_hi) - 1)]
    together = q_hi[1:] == q_hi[:-1]  # both rows are of one picture
    picture = np.concatenate([[False], together]) | np.concatenate([together, [False]])
    edge = (own[1:] != own[:-1]) | (~together & (picture[1:] | picture[:-1]))
    cuts = [0, *(np.flatnonzero(edge) + 1).tolist(), len(q_hi)]
    pieces = []
    for begin, end in zip(cuts, cuts[1:]):
        size = end - begin if picture[begin] else TEXT
        pieces += [(first, min(first + size, end)) for first in range(begin, end, size)]
    return pieces


def _piece(begin, end, q_hi, k_hi, q_pos):
    q_hi, q_pos = q_hi[begin:end], q_pos[begin:end]
    keys = np.flatnonzero(k_hi[: q_hi.max()] > q_pos.min())
    whole = len(keys) > 0 and keys[-1] < q_hi.min() and q_pos.max() < k_hi[keys].min()
    return Piece(begin, end, keys, bool(whole))


def _shape(batch):
    """(rows, keys) that each piece of a batch is padded to."""
    return max(p.end - p.begin for p in batch), max(1, *(len(p.keys) for p in batch))


def _is_whole(batch):
    """Whether nothing in a batch is hidden or padding."""
    return all(p.whole for p in batch) and len({(p.end - p.begin, len(p.keys)) for p in batch}) == 1


def _fits(batch):
    """Whether the bias of a batch is bounded."""
    rows, keys = _shape(batch)
    return _is_whole(batch) or rows * keys * len(batch) <= MAX_BIAS


def _cost(batch):
    """Of one call on a batch, in scores."""
    rows, keys = _shape(batch)
    return CALL + len(batch) * (rows + FETCH) * keys * (1 if _is_whole(batch) else BIASED)


def _merge(pieces):
    """Join neighbours while one call on both is cheaper than two."""
    merged = pieces[:1]
    for piece in pieces[1:]:
        above = merged[-1]
        seen = np.zeros(max([0, *above.keys[-1:], *piece.keys[-1:]]) + 1, bool)
        seen[above.keys] = seen[piece.keys] = True
        keys = np.flatnonzero(seen)
        same = len(keys) == len(above.keys) == len(piece.keys)
        joined = Piece(above.begin, piece.end, keys, same and above.whole and piece.whole)
        if _fits([joined]) and _cost([joined]) < _cost([above]) + _cost([piece]):
            merged[-1] = joined
        else:
            merged.append(piece)
    return merged


def _batch(pieces):
    """Group pieces of similar size, so that padding them to one shape wastes little."""
    batches = []
    for piece in sorted(pieces, key=lambda p: (p.end - p.begin, len(p.keys)), reverse=True):
        joined = [*batches[-1], piece] if batches else [piece]
        if batches and _fits(joined) and _cost(joined) <= _cost(batches[-1]) + _cost([piece]):
            batches[-1] = joined
        else:
            batches.append([piece])
    return batches
