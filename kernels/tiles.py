"""
Which tiles of the score matrix a kernel visits, from the two vectors of the mask.

The score matrix is cut into tiles of rows [r0, r1) and keys [c0, c1). From the extrema of the
vectors over a tile:

    empty   c0 >= max q_hi   or  min q_pos >= max k_hi     nothing is visible: never visited
    whole   c1 <= min q_hi  and  max q_pos <  min k_hi     all is visible: no mask arithmetic
    partly  the rest                                       both comparisons, element by element

"empty" is always safe; for a forest whose queries are its keys it is also exact (off the diagonal
only one of the two tests can forbid; a tile on the diagonal has a visible pair). "whole" is always
exact. Overhanging tiles are padded with 0 in both vectors and so become "partly" by themselves.

Each row tile gets the list of its key tiles, whole ones first; for dk/dv, each key tile the list of
its row tiles. Lists, because an `if` inside a kernel's loop would stop Triton from loading the next
tiles ahead of time. One loop runs over the whole tiles, a second over the others.

Balance. In a tree every row sees the prompt's keys, so a few lists of dk/dv are much longer than
the rest; in decoding there are one or two lists in all. Lists longer than total / extra are
therefore cut into even pieces. There are at most tiles + extra pieces whatever the mask
(sum ceil(len / (total / extra)) <= tiles + extra), so shapes are known without asking the device,
and nothing synchronises. The pieces of a cut list write float32 partial results, which a small last
kernel adds in order.

Letters: sequence.py; Nq queries and Nk keys. Shapes in words: `tiles` have a list each, of at most
`entries` tiles of the other side; `extra` items of work are allowed for cutting.
Left out: anything about GPUs: kernels/triton_attention.py chooses the sizes of tiles.
"""

import torch
import torch.nn.functional as F

MIN_PIECE = 8  # do not cut lists into pieces shorter than this


def ceil_div(a, b):
    """a / b, rounded up."""
    return (a + b - 1) // b


def tile_extrema(vector, size, low, high):
    """Minima and maxima of vector (N,) over tiles of `size`, each (tiles,).

    Behind the vector's end stand `low` for the minima and `high` for the maxima.
    """
    tiles, overhang = ceil_div(vector.shape[0], size), -vector.shape[0] % size
    minima = F.pad(vector, (0, overhang), value=low).view(tiles, size).amin(1)  # (tiles,)
    maxima = F.pad(vector, (0, overhang), value=high).view(tiles, size).amax(1)  # (tiles,)
    return minima, maxima


def classify_tiles(q_hi, q_pos, k_hi, group, block_m, block_n):
    """From the extrema alone, which tiles are whole and which partly, (row tiles, key tiles) bool.

    Rows are `group` to a token: row r is token r // group. A tile is block_m rows by block_n keys.
    """
    far = torch.iinfo(torch.int32).max
    sees = q_hi > 0  # padding must not widen a tile
    first, last = torch.where(sees, q_pos, far), torch.where(sees, q_pos, 0)
    # each (Nq * group,)
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

    Each class (tiles, entries) bool, disjoint -> index (tiles, entries) int32, counts
    (tiles, classes) int32. Behind a list's end: anything.
    """
    tiles, width = classes[0].shape
    column = torch.arange(width, dtype=torch.int32, device=classes[0].device)
    column = column.expand(tiles, width)  # (tiles, entries)
    # one more: where the rest goes
    index = torch.zeros(tiles, width + 1, dtype=torch.int32, device=column.device)
    target, used, counts = None, 0, []
    for flags in classes:
        place = flags.cumsum(1, dtype=torch.int32) + used  # 1 + place in the list, where flagged
        target = torch.where(flags, place - 1, width if target is None else target)
        used = place[:, -1:]  # (tiles, 1)
        counts.append(used)
    index.scatter_(1, target.long(), column)
    # (tiles, entries), (tiles, classes)
    return index[:, :width].contiguous(), torch.cat(counts, 1)


def cut_lists(counts, extra):
    """Work items from lists: long lists in even pieces, longest item first.

    counts (tiles, 2) int32: whole tiles, all tiles.
    Returns
        work (tiles + extra, 5) int32: tile (-1: nothing to do), begin, middle, end,
            slot (-1: the list is in one piece);
        pieces (tiles, 2) int32: first slot and number of pieces, 0 where the list is in one piece.
    At most 2 * extra slots are used.
    """
    tiles, length = counts.shape[0], counts[:, 1].long()  # (tiles,)
    total = length.sum()
    piece = (ceil_div(total, extra) if extra else total).clamp(min=MIN_PIECE)  # stays on the device
    number = ceil_div(length, piece).clamp(min=1)  # (tiles,) an empty list still writes zeros
    behind = number.cumsum(0)  # (tiles,) items up to and with this tile
    item = torch.arange(tiles + extra, device=counts.device)  # (tiles + extra,)
    tile = torch.searchsorted(behind, item, right=True)  # (tiles + extra,) `tiles`: no such item
    valid, tile = tile < tiles, tile.clamp(max=max(tiles - 1, 0))
    part = item - (behind - number)[tile]  # (tiles + extra,), as all below that is taken at [tile]
    size = ceil_div(length, number)[tile]
    begin = torch.minimum(part * size, length[tile])
    end = torch.minimum(begin + size, length[tile])
    middle = torch.minimum(torch.maximum(counts[tile, 0].long(), begin), end)
    cut = torch.where(number > 1, number, 0)  # (tiles,)
    first = cut.cumsum(0) - cut
    slot = torch.where(cut[tile] > 0, first[tile] + part, -1)
    # (tiles + extra, 5)
    work = torch.stack([torch.where(valid, tile, -1), begin, middle, end, slot], 1)
    order = torch.where(valid, end - begin, -1).argsort(descending=True, stable=True)
    return work[order].int(), torch.stack([first, cut], 1).int()  # as above, (tiles, 2)


def tile_lists(q_hi, q_pos, k_hi, group, block_m, block_n, by_key, wanted):
    """What one kernel visits: index (tiles, entries), work (tiles + extra, 5), pieces (tiles, 2).

    by_key: a list for each key tile, not for each row tile. wanted: extra items that would be well
    used; as many are allowed, or all that lists so short can use.
    """
    whole, partly = classify_tiles(q_hi, q_pos, k_hi, group, block_m, block_n)
    if by_key:
        whole, partly = whole.T, partly.T  # (key tiles, row tiles)
    index, counts = compact(whole, partly)
    work, pieces = cut_lists(counts, min(wanted, index.numel() // MIN_PIECE))
    return [index, work, pieces]
