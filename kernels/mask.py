"""
Who sees whom in one packed sequence, in two integers a token.

    visible(i, j)  <=>  j < q_hi[i]  and  q_pos[i] < k_hi[j]

q_hi[i]   query i sees no key at or after this position:      i + 1 for a causal token, the end of
          its run for a token of a bidirectional run (an image), 0 for a padding query, which then
          sees nothing
k_hi[j]   key j is seen by no query at or after this position: the end of its document, branch or
          noised image; 0 for padding, or for a cache slot that nobody may see
q_pos[i]  where query i stands among the keys; left out when queries and keys are the same tokens

This is exact for every forest of runs laid out depth first: documents are its roots, a noised image
is a leaf, what follows a noised image is its sibling, the plans of one GRPO prompt are branches.

Letters: sequence.py; Nq queries and Nk keys.
Left out: a second interval a key (FlashMask, arXiv 2410.01359), which siblings that meet again
would need.
"""

import torch

# Theorem. A Boolean matrix M has the form  M[i, j] = (j < q_hi[i]) and (i < k_hi[j])  if and only
# if no zero of M has both a one to its right in its row and a one below it in its column.
# Proof. If M has the form and M[i, j] = 0, then either j >= q_hi[i], and row i is zero from j on,
# or i >= k_hi[j], and column j is zero from i on. Conversely, let q_hi[i] be one past the last one
# of row i, and k_hi[j] one past the last one of column j. Every one passes both tests; a zero with
# nothing to its right fails the first, a zero with nothing below it fails the second.
#
# Corollary. Lay a forest of runs out depth first; a run is causal or bidirectional inside, and a
# token sees the runs of its ancestors and its own. Then q_hi[i] = i + 1 (causal) or the end of i's
# run (bidirectional), and k_hi[j] = the end of the subtree of j's run: for j > i only q_hi can
# forbid (j is in i's run or not), for j <= i only k_hi (i is in j's subtree or not). Any subset of
# the rows has the form too, with q_pos in place of i: queries against a cache.
#
# Also of this form: sliding windows, attention sinks, prefix language models, padding (0 in either
# vector), and decoding of several members on one prefix when each member has its own run of cache
# slots.
# Not of this form: siblings that later text sees together; a clean image laid out *before* its
# noised copy; a forest not in depth-first order. sequence.py lays out none of these.


class Mask:
    """The two-vector mask of one packed sequence, shared by all layers, forward and backward.

    q_hi (Nq,), k_hi (Nk,), q_pos (Nq,) or None: integers on one device, 0 <= q_pos; kept as int32.
    ValueError where they do not fit each other. Treat a mask as constant: whatever a back end
    derives from it (tile lists, blocks) is built once, on first use, and kept in `cache`.
    """

    def __init__(self, q_hi, k_hi, q_pos=None):
        for name, vector in (("q_hi", q_hi), ("k_hi", k_hi), ("q_pos", q_pos)):
            if vector is not None and (vector.dim() != 1 or vector.is_floating_point()):
                raise ValueError(
                    f"Mask: {name} has shape {tuple(vector.shape)} and type {vector.dtype}; "
                    f"expected one integer a token, shape (N,)."
                )
        if q_pos is None and len(q_hi) != len(k_hi):
            raise ValueError(
                f"Mask: {len(q_hi)} queries and {len(k_hi)} keys; give q_pos, the position of each "
                f"query among the keys, unless queries and keys are the same tokens."
            )
        if q_pos is not None and len(q_pos) != len(q_hi):
            raise ValueError(
                f"Mask: q_pos has {len(q_pos)} entries and q_hi {len(q_hi)}; "
                f"expected one per query."
            )
        self.q_hi = q_hi.to(torch.int32).contiguous()  # (Nq,)
        self.k_hi = k_hi.to(torch.int32).contiguous()  # (Nk,)
        self.q_pos = None if q_pos is None else q_pos.to(torch.int32).contiguous()  # (Nq,)
        self.cache = {}

    @property
    def device(self):
        """The device of the vectors."""
        return self.q_hi.device

    def positions(self):
        """Where each query stands among the keys, (Nq,) int32: q_pos, or 0, 1, 2, ... if None."""
        if self.q_pos is not None:
            return self.q_pos
        if "positions" not in self.cache:
            positions = torch.arange(len(self.q_hi), dtype=torch.int32, device=self.device)
            self.cache["positions"] = positions  # (Nq,)
        return self.cache["positions"]

    def dense(self):
        """The mask as a Boolean matrix (Nq, Nk), for tests and short sequences."""
        j = torch.arange(len(self.k_hi), device=self.device)  # (Nk,)
        return (j < self.q_hi[:, None]) & (self.positions()[:, None] < self.k_hi)  # (Nq, Nk)

    def to(self, device):
        """The same mask on another device; itself where it is already there."""
        if torch.device(device) == self.device:
            return self
        q_pos = None if self.q_pos is None else self.q_pos.to(device)
        return Mask(self.q_hi.to(device), self.k_hi.to(device), q_pos)
