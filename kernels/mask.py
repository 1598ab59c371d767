"""
Who sees whom in one packed sequence, in two integers a token.

    visible(i, j)  <=>  j < q_hi[i]  and  q_pos[i] < k_hi[j]

q_hi[i]   query i sees no key at or after this position:      i + 1 for a causal token, the end of its run for a
          token of a bidirectional run (an image), 0 for a padding query, which then sees nothing
k_hi[j]   key j is seen by no query at or after this position: the end of its document, or of its branch; 0 for
          padding, or for a cache slot that nobody may see
q_pos[i]  where query i stands among the keys; left out when queries and keys are the same tokens

This is exact for every forest of runs laid out depth first: documents are its roots, a noised image is a leaf, what
follows a noised image is its sibling, the plans of one GRPO prompt are branches. kernels/attention.py has the proof,
and says which masks have no such form.

Left out: a second interval a key (FlashMask, arXiv 2410.01359), which siblings that meet again would need.
"""

import torch


class Mask:
    """The two-vector mask of one packed sequence, shared by all layers, forward and backward.

    q_hi (Nq,), k_hi (Nk,), q_pos (Nq,) or None: integers on one device, 0 <= q_pos; kept as int32. Treat a mask as
    constant: whatever a back end derives from it (tile lists, blocks) is built once, on first use, and kept in `cache`.
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
                f"Mask: q_pos has {len(q_pos)} entries and q_hi {len(q_hi)}; expected one per query."
            )
        self.q_hi = q_hi.to(torch.int32).contiguous()  # (Nq,)
        self.k_hi = k_hi.to(torch.int32).contiguous()  # (Nk,)
        self.q_pos = None if q_pos is None else q_pos.to(torch.int32).contiguous()  # (Nq,)
        self.cache = {}

    @property
    def device(self):
        return self.q_hi.device

    def positions(self):
        """Position of each query among the keys, (Nq,) int32: q_pos, or 0, 1, 2, ... where it was left out."""
        if self.q_pos is not None:
            return self.q_pos
        if "positions" not in self.cache:
            self.cache["positions"] = torch.arange(
                len(self.q_hi), dtype=torch.int32, device=self.device
            )
        return self.cache["positions"]

    def dense(self):
        """The mask as a Boolean matrix, (Nq, Nk); O(Nq * Nk) memory, for tests and short sequences."""
        j = torch.arange(len(self.k_hi), device=self.device)  # (Nk,)
        return (j < self.q_hi[:, None]) & (self.positions()[:, None] < self.k_hi)  # (Nq, Nk)

    def to(self, device):
        """The same mask on another device; itself where it is already there."""
        if torch.device(device) == self.device:
            return self
        q_pos = None if self.q_pos is None else self.q_pos.to(device)
        return Mask(self.q_hi.to(device), self.k_hi.to(device), q_pos)
