"""
Attention under the two-vector mask with PyTorch's scaled_dot_product_attention, block by block of
the tree.

The back end of CPUs. A tree of N tokens is mostly invisible to itself, so the N x N matrix is never
built. Rows are cut where the branch changes (where k_hi of the row's own position changes); each
piece needs only the keys on its path to the root:

    rows   | prompt ........ | leaf 1          | leaf 2          | ...
    keys   | prompt          | prompt + leaf 1 | prompt + leaf 2 | ...

A piece of r rows and c keys costs r c for the scores and GATHER c to fetch its keys. Neighbours are
merged while that is cheaper (decoding: one row a member), pieces of similar size are padded to one
batch, and each batch is one call with a dense mask. This schedule depends on the mask alone: it is
made once per pack and shared by all layers.

Letters: sequence.py; B pieces in one call, Nq queries and Nk keys.
Left out: anything about tiles; a GPU has the Triton kernel for that.
"""

import numpy as np
import torch
import torch.nn.functional as F

# fetching one key costs about as much as this many scores (measured on a CPU at head_dim 32)
GATHER = 64
PADDING = 1.35  # a batch may compute this many times the scores its pieces need


def sdpa_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v. q (Nq, H, D), k and v (Nk, K, D), K divides H -> (Nq, H, D)."""
    if "sdpa" not in mask.cache:
        mask.cache["sdpa"] = make_schedule(mask)
    batches, restore, empty = mask.cache["sdpa"]
    outputs = []
    for rows, keys, bias in batches:
        query = _rows(q, rows).transpose(1, 2)  # (B, H, rows, D)
        key, value = (_rows(x, keys).transpose(1, 2) for x in (k, v))  # (B, K, keys, D)
        bias = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (B * rows, H, D)
    out = _rows(torch.cat(outputs) if len(outputs) > 1 else outputs[0], restore)  # (Nq, H, D)
    return out if empty is None else out.masked_fill(empty[:, None, None], 0)


def _rows(x, index):
    """x[index] of x (N, heads, D), as an embedding: on a CPU its gradient is far faster."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])  # (*index, heads, D)


def make_schedule(mask):
    """What to compute together: (batches, restore, empty), on the device of the mask.

    batches: of (rows (B, rows), keys (B, keys), bias (B, 1, rows, keys) or None where all is seen).
    restore (Nq,): where each row lies among the concatenated results of the batches.
    empty (Nq,) bool, the rows that see nothing, or None.
    """
    q_hi, k_hi = mask.q_hi.cpu().numpy(), mask.k_hi.cpu().numpy()
    q_pos = mask.positions().cpu().numpy()
    pieces = _merge([_piece(rows, q_hi, k_hi, q_pos) for rows in _cut(k_hi, q_pos)])
    batches, restore, offset = [], np.zeros(len(q_hi), dtype=np.int64), 0
    empty = np.zeros(len(q_hi), dtype=bool)
    for batch in _batch(pieces):
        height, width = max(len(r) for r, _ in batch), max(1, *(len(c) for _, c in batch))
        rows = np.zeros((len(batch), height), np.int64)
        keys = np.zeros((len(batch), width), np.int64)
        visible = np.zeros((len(batch), height, width), dtype=bool)
        for b, (r, c) in enumerate(batch):
            rows[b, : len(r)], keys[b, : len(c)] = r, c
            seen = (c[None] < q_hi[r, None]) & (q_pos[r, None] < k_hi[None, c])  # (rows, keys)
            visible[b, : len(r), : len(c)] = seen
            restore[r] = offset + b * height + np.arange(len(r))
            empty[r] = ~seen.any(1)
        batches.append((torch.from_numpy(rows), torch.from_numpy(keys), _bias(visible)))
        offset += rows.size
    device = mask.device
    batches = [tuple(x if x is None else x.to(device) for x in batch) for batch in batches]
    empty = torch.from_numpy(empty).to(device) if empty.any() else None
    return batches, torch.from_numpy(restore).to(device), empty


def _bias(visible):
    """0 where visible (B, rows, keys) and -inf elsewhere, (B, 1, rows, keys); None: all is seen."""
    # softmax needs one key in every row; rows without are padding, dropped, or empty, zeroed
    visible[..., 0] |= ~visible.any(2)
    if visible.all():
        return None
    hidden = torch.from_numpy(~visible)
    return torch.zeros(visible.shape).masked_fill(hidden, float("-inf"))[:, None]


def _cut(k_hi, q_pos):
    """Runs of rows whose own position lies in the same branch."""
    own = k_hi[np.minimum(q_pos, len(k_hi) - 1)]
    return np.split(np.arange(len(q_pos)), np.flatnonzero(own[1:] != own[:-1]) + 1)


def _piece(rows, q_hi, k_hi, q_pos):
    """(rows, keys that some of them may see)."""
    return rows, np.flatnonzero(k_hi[: q_hi[rows].max()] > q_pos[rows].min())


def _cost(rows, keys):
    """Of one call, in scores."""
    return (rows + GATHER) * keys


def _merge(pieces):
    """Join neighbours while one call on both is cheaper than two."""
    merged = pieces[:1]
    for rows, keys in pieces[1:]:
        above, above_keys = merged[-1]
        both = len(np.union1d(above_keys, keys))
        apart = _cost(len(above), len(above_keys)) + _cost(len(rows), len(keys))
        if _cost(len(above) + len(rows), both) < apart:
            merged[-1] = np.concatenate([above, rows]), np.union1d(above_keys, keys)
        else:
            merged.append((rows, keys))
    return merged


def _batch(pieces):
    """Group pieces of similar size, so that padding them to one shape wastes little."""
    batches = []
    for piece in sorted(pieces, key=lambda piece: (len(piece[0]), len(piece[1])), reverse=True):
        needed = _cost(len(piece[0]), len(piece[1]))
        if batches:
            batch = batches[-1]
            height, width = len(batch[0][0]), max(len(piece[1]), *(len(keys) for _, keys in batch))
            total = sum(_cost(len(rows), len(keys)) for rows, keys in batch) + needed
            if _cost(height, width) * (len(batch) + 1) <= PADDING * total:
                batch.append(piece)
                continue
        batches.append([piece])
    return batches
