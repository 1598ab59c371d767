"""
The packed interleaved sequence: text, ViT and latent tokens of many documents in one row of N
tokens, without padding.

A document is a tree laid out depth first. Its runs of tokens are causal (text) or bidirectional (an
image); a token sees the runs of its ancestors and its own run. A noised image is a leaf that nobody
else sees. Two integers a token say all of this (the proof is in kernels/mask.py):

    visible(i, j)  <=>  j < q_hi[i]  and  i < k_hi[j]
    q_hi[i] = i + 1 in a causal run, the end of the run in a bidirectional one
    k_hi[j] = the end of the document, branch or noised image that token j belongs to

RoPE positions are BAGEL's (modeling/bagel, data/data_utils): text takes one position a token; a
clean image takes one position altogether, markers included; a noised image stands at the current
position and does not advance it.

    layout = Layout(bos=0, eos=1, image_start=2, image_end=3, latent_side=16, vit_side=8)
    sequence = Sequence(layout)
    with sequence.document():
        sequence.image(reference)                   # clean latents, then ViT patches
        sequence.text(instruction_ids)
        for plan in plans:                          # GRPO: the plans share the prompt above
            with sequence.branch():
                sequence.text(plan, loss=True)
                sequence.noise(x_t, grid, t)        # always a leaf of its own
    packed = sequence.pack()

Letters, here and in the whole project:

    N tokens (rows) of a packed sequence      Nq, Nk queries and keys of attention
    X text tokens       V ViT tokens          U understanding tokens, X + V
    L latent tokens     M noised ones         C values of one latent token
    R values of one ViT patch                 W width of the residual stream
    H query heads       K key/value heads     D width of a head (head_dim)
    P prompts (groups) of a step              J plans of a group       G members of a group
    S scored pictures of a member (sde: steps of the window, forward: times)
    T tokens of one picture                   I pictures of a pack   Z tokens of those, I * T
    B members or items in one pass            E size of a CLIP embedding
    lower case n, h, w, t: counts, grids and times of the moment

Left out: what two vectors cannot say, namely siblings that later text sees together, and a clean
image before its own noised copy, which would see it. docs/tour/mask.png shows the mask of a pack.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mask import Mask

# what a row holds: known content, a noised image with its markers, a slot for decoded text
KINDS = ("given", "noised", "reserved")


@dataclass(frozen=True)
class Layout:
    """Special token ids, and the sides of both position tables (BAGEL: 64 tokens, 70 patches)."""

    bos: int
    eos: int
    image_start: int
    image_end: int
    latent_side: int
    vit_side: int


@dataclass(frozen=True)
class Read:
    """Rows of a pack whose hidden states somebody reads; the last layer computes no others."""

    und: Tensor  # (u,) which of the U understanding tokens
    gen: Tensor  # (l,) which of the L latent tokens
    und_place: Tensor  # (U,) which of `und` each token is; others: 0
    gen_place: Tensor  # (L,) the same of `gen`
    order: Tensor  # (u + l,) and its inverse: as those of Packed, among these rows alone
    inverse: Tensor
    mask: Mask
    all_text = False  # as of Packed: these rows are sorted apart

    def spread(self, und: Tensor, gen: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (u, W), (l, W) in their places, (U, W), (L, W); what stands elsewhere says nothing.

        A part of which nothing is read stays as it is.
        """
        und = F.embedding(self.und_place, und) if len(self.und) else und
        gen = F.embedding(self.gen_place, gen) if len(self.gen) else gen
        return und, gen


@dataclass
class Packed:
    """One packed sequence, or a subset of its rows.

    Every `*_index` is a row of this pack. The model keeps text rows first, then ViT, then latent
    rows (`order`), so that each expert works on one slice.
    """

    text_ids: Tensor  # (X,)
    text_index: Tensor  # (X,)
    vit_patches: Tensor  # (V, R) float
    vit_index: Tensor  # (V,)
    vit_position_ids: Tensor  # (V,) row * side + column
    vit_lengths: tuple[int, ...]  # tokens of each ViT image; they sum to V
    latents: Tensor  # (L, C) float, clean or noised
    latent_index: Tensor  # (L,)
    latent_position_ids: Tensor  # (L,)
    image_of_latent: Tensor  # (L,) which latent image a token belongs to
    timesteps: Tensor  # (latent images,) float flow time, 0 for clean ones
    noised: Tensor  # (M,) which of the L latent tokens are noised
    noised_lengths: tuple[int, ...]  # tokens of each noised image; they sum to M
    positions: Tensor  # (N,) RoPE position of each row
    mask: Mask
    slots: Tensor  # (N,) places in the whole sequence
    label_rows: Tensor  # (labels,) which of the X text tokens predict
    labels: Tensor  # (labels,) what they shall predict
    # of the whole sequence, not of a subset of its rows:
    kinds: Tensor | None = None  # (N,) index into KINDS
    # (N,) bool: outside all branches and noised images of its document
    shared: Tensor | None = None
    extra: Tensor | None = None  # (N,) bool: in a document that was opened as `extra`
    # after `cut`: (Nk,) sorts the keys of the prefix and of these rows by slot
    key_order: Tensor | None = None
    # (N,) row of this pack for each row of the model's residual stream, and the other way round
    order: Tensor = field(init=False)
    inverse: Tensor = field(init=False)

    def __post_init__(self):
        # (N,)
        self.order = self.inverse = self.text_index
        if not self.all_text:
            self.order = torch.cat([self.text_index, self.vit_index, self.latent_index])
            self.inverse = torch.argsort(self.order)

    @property
    def all_text(self) -> bool:
        """Whether all rows are text; then the residual stream has them in the pack's order."""
        return not len(self.vit_index) and not len(self.latent_index)

    def __len__(self) -> int:
        return len(self.positions)

    def reading(self, losses: bool = True) -> Read:
        """The rows that carry a loss, labels and noised latents, or none at all.

        With losses, at least one row of each expert that has any: processes that share a model give
        the same weights gradients.
        """
        # (U,), (L,) rows of this pack
        und, gen = self.order.split([len(self) - len(self.latent_index), len(self.latent_index)])
        read_und, read_gen = self.label_rows[:0], self.noised[:0]
        if losses:
            read_und = self.label_rows if len(self.label_rows) else torch.zeros_like(und[:1])
            read_gen = self.noised if len(self.noised) else torch.zeros_like(gen[:1])
        rows = torch.cat([und[read_und], gen[read_gen]])  # (u + l,) of this pack
        inverse = torch.argsort(rows)
        rows = rows[inverse]
        mask = Mask(self.mask.q_hi[rows], self.mask.k_hi, self.mask.positions()[rows])
        return Read(
            und=read_und,
            gen=read_gen,
            und_place=_places(read_und, len(und)),
            gen_place=_places(read_gen, len(gen)),
            order=torch.argsort(inverse),
            inverse=inverse,
            mask=mask,
        )

    def image_of_token(self) -> Tensor:
        """(M,) number of the noised image that each noised token belongs to."""
        lengths = torch.tensor(self.noised_lengths, device=self.noised.device)
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def to(self, device) -> "Packed":
        """The same pack on another device; itself where it is already there."""
        if self.positions.device == torch.device(device):
            return self
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        moved = {k: v for k, v in moved.items() if k not in ("order", "inverse")}
        return replace(self, **moved, mask=self.mask.to(device))

    def select(self, rows: Tensor) -> "Packed":
        """The pack of only these rows (n,), sorted; it sees all keys, say those of a KV cache."""
        local = torch.full((len(self),), -1, dtype=torch.long, device=rows.device)
        local[rows] = torch.arange(len(rows), device=rows.device)
        # (X,), (V,), (L,) bool: is it selected?
        text, vit, latent = (
            local[index] >= 0 for index in (self.text_index, self.vit_index, self.latent_index)
        )
        is_noised = torch.zeros_like(latent)
        is_noised[self.noised] = True
        whole_vit = [bool(part.any()) for part in vit.split(self.vit_lengths)]
        whole_noised = [bool(part.any()) for part in latent[self.noised].split(self.noised_lengths)]
        labelled = text[self.label_rows]
        return Packed(
            text_ids=self.text_ids[text],
            text_index=local[self.text_index[text]],
            vit_patches=self.vit_patches[vit],
            vit_index=local[self.vit_index[vit]],
            vit_position_ids=self.vit_position_ids[vit],
            vit_lengths=tuple(n for n, kept in zip(self.vit_lengths, whole_vit) if kept),
            latents=self.latents[latent],
            latent_index=local[self.latent_index[latent]],
            latent_position_ids=self.latent_position_ids[latent],
            image_of_latent=self.image_of_latent[latent],
            timesteps=self.timesteps,
            noised=torch.nonzero(is_noised[latent]).squeeze(1),
            noised_lengths=tuple(n for n, kept in zip(self.noised_lengths, whole_noised) if kept),
            positions=self.positions[rows],
            mask=Mask(self.mask.q_hi[rows], self.mask.k_hi, rows),
            slots=rows,
            label_rows=(text.cumsum(0) - 1)[self.label_rows[labelled]],
            labels=self.labels[labelled],
        )

    def cut(self) -> tuple["Packed", "Packed"]:
        """(shared, rest): two packs that together compute what this one does.

        shared: what stands outside all branches and noised images, the prefix of everything else;
        it sees only itself. rest: all other rows. They need the keys and values of the shared ones,
        laid before their own (`key_order`).
        """
        shared, rest = (torch.nonzero(flags).squeeze(1) for flags in (self.shared, ~self.shared))

        def before(bound):  # rows of `shared` before a place in the whole
            return torch.searchsorted(shared, bound.long())

        first, second = self.select(shared), self.select(rest)
        first.mask = Mask(before(self.mask.q_hi[shared]), before(self.mask.k_hi[shared]))
        second.key_order = torch.argsort(torch.cat([shared, rest]))  # (N,)
        return first, second

    def rows_of(self, kind: str, among: Tensor | None = None) -> Tensor:
        """Rows (n,) that are of one of KINDS, markers of an image included.

        among: only those of these rows, (N,) bool.
        """
        is_kind = self.kinds == KINDS.index(kind)
        return torch.nonzero(is_kind if among is None else is_kind & among).squeeze(1)

    @cached_property
    def _no_rows(self):
        return self.select(self.slots[:0])

    def decoding(self, slots: Tensor, ids: Tensor) -> "Packed":
        """The pack of one decoding step: for each of B members a text token at its slot, (B,)."""
        return replace(
            self._no_rows,
            text_ids=ids,
            text_index=torch.arange(len(slots), device=slots.device),
            positions=self.positions[slots],
            mask=Mask(self.mask.q_hi[slots], self.mask.k_hi, slots),
            slots=slots,
        )


class Sequence:
    """Builder of a packed sequence; see the module docstring. Nothing is computed before `pack`."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.length = 0
        self.position = 0
        self.frames = []  # open document and branches: [runs that close with it]
        self.text_ids, self.text_index, self.labels, self.label_rows = [], [], [], []
        self.vit, self.latents = [], []  # of each image: first row, tokens, position ids
        self.timesteps, self.is_noised = [], []  # of each image in `latents`
        # of each run: rows, index into KINDS, causal, first position, shared, extra
        self.runs, self.closes = [], []  # and the row at which its frame closed
        self.reserved = []  # first slot of each reserved run, in order

    @property
    def noised_tokens(self) -> int:
        """M so far."""
        return sum(len(x) for (_, x, _), noised in zip(self.latents, self.is_noised) if noised)

    @contextmanager
    def document(self, extra: bool = False):
        """A root at position 0: its tokens and those of other documents do not see each other.

        extra: marks the rows of a document that repeats parts of another (a guidance context).
        """
        if self.frames:
            raise ValueError("a document cannot stand inside another document; use branch()")
        self.position, self.is_extra = 0, extra
        with self._frame():
            yield

    @contextmanager
    def branch(self):
        """A subtree: it sees what stands before it on its path; nothing after it sees it."""
        if not self.frames:
            raise ValueError("a branch must stand inside a document")
        position = self.position
        with self._frame():
            yield
        self.position = position

    @contextmanager
    def _frame(self):
        self.frames.append([])
        yield
        for run in self.frames.pop():
            self.closes[run] = self.length

    def _run(self, length, kind, causal):
        """Append `length` rows at the current position and return the first one."""
        if not self.frames:
            raise ValueError("tokens must stand inside a document: use `with sequence.document():`")
        start, shared = self.length, len(self.frames) == 1
        self.frames[-1].append(len(self.runs))
        self.runs.append((length, KINDS.index(kind), causal, self.position, shared, self.is_extra))
        self.closes.append(0)  # set when the frame closes
        self.length += length
        return start

    def text(self, ids, loss: bool = False) -> None:
        """A text segment bos + ids + eos.

        With `loss`, bos and ids predict ids and eos (docs/BAGEL.md §13.1).
        """
        tokens = [self.layout.bos, *map(int, ids), self.layout.eos]
        start = self._run(len(tokens), "given", causal=True)
        if loss:
            self.label_rows += range(len(self.text_ids), len(self.text_ids) + len(tokens) - 1)
            self.labels += tokens[1:]
        self.text_ids += tokens
        self.text_index += range(start, start + len(tokens))
        self.position += len(tokens)

    def reserve(self, length: int) -> int:
        """Room for text tokens that will be decoded into the KV cache; returns the first slot."""
        start = self._run(length, "reserved", causal=True)
        self.text_ids += [self.layout.bos] * length
        self.text_index += range(start, start + length)
        self.position += length
        self.reserved.append(start)
        return start

    def image(self, reference, vae: bool = True, vit: bool = True) -> None:
        """A clean image: its latents (t = 0), then its ViT patches; each a bidirectional block.

        reference: vision.Reference (latents (n, C) and patches (n, R), each with its grid). A half
        that is None was dropped as a condition in training: it leaves its position behind (a
        dropped text does not, docs/BAGEL.md §4).
        """
        if vae:
            if reference.latents is not None:
                self._latents(reference.latents, reference.latent_grid, 0.0, kind="given")
            self.position += 1
        if vit:
            if reference.patches is not None:
                self._patches(reference.patches, reference.patch_grid)
            self.position += 1

    def noise(self, x_t: Tensor, grid, timestep) -> None:
        """A noised image (n, C) at flow time `timestep`: a leaf that sees its path, seen by nobody.

        grid: (h, w) with h w = n.
        """
        with self._frame():
            self._latents(x_t, grid, timestep, kind="noised")

    def _latents(self, tokens, grid, timestep, *, kind):
        self._check(grid, self.layout.latent_side, tokens, kind="latent")
        start = self._image_run(len(tokens), kind)
        self.latents.append((start + 1, tokens, position_ids(*grid, self.layout.latent_side)))
        self.timesteps.append(float(timestep))
        self.is_noised.append(kind == "noised")

    def _patches(self, patches, grid):
        self._check(grid, self.layout.vit_side, patches, kind="ViT")
        start = self._image_run(len(patches), "given")
        self.vit.append((start + 1, patches, position_ids(*grid, self.layout.vit_side)))

    def _image_run(self, tokens, kind):
        """image_start + tokens + image_end in one bidirectional run; returns the first row.

        The markers are text (docs/BAGEL.md §6.2).
        """
        start = self._run(tokens + 2, kind, causal=False)
        self.text_ids += [self.layout.image_start, self.layout.image_end]
        self.text_index += [start, start + tokens + 1]
        return start

    def _check(self, grid, side, tokens, *, kind):
        height, width = grid
        if height * width != len(tokens):
            raise ValueError(
                f"{len(tokens)} {kind} tokens do not fill a grid of {height} x {width}"
            )
        if max(height, width) > side:
            raise ValueError(
                f"a {kind} grid of {height} x {width} exceeds the position table of {side} x {side}"
            )

    def pack(self) -> Packed:
        """Close the builder into tensors."""
        if self.frames:
            raise ValueError("pack() was called inside a document or branch")
        latent_lengths = _long([len(x) for _, x, _ in self.latents])
        image_of_latent = torch.repeat_interleave(latent_lengths)  # (L,)
        is_noised = torch.tensor(self.is_noised, dtype=torch.bool)  # (latent images,)
        return Packed(
            text_ids=_long(self.text_ids),
            text_index=_long(self.text_index),
            vit_patches=_cat([x for _, x, _ in self.vit], torch.float32),
            vit_index=_spans(self.vit),
            vit_position_ids=_cat([ids for *_, ids in self.vit], torch.long),
            vit_lengths=tuple(len(x) for _, x, _ in self.vit),
            latents=_cat([x for _, x, _ in self.latents], torch.float32),
            latent_index=_spans(self.latents),
            latent_position_ids=_cat([ids for *_, ids in self.latents], torch.long),
            image_of_latent=image_of_latent,
            timesteps=torch.tensor(self.timesteps, dtype=torch.float32),
            noised=torch.nonzero(is_noised[image_of_latent]).squeeze(1),
            noised_lengths=tuple(latent_lengths[is_noised].tolist()),
            label_rows=_long(self.label_rows),
            labels=_long(self.labels),
            **self._rows(),
        )

    def _rows(self):
        """What Packed holds of each row, from its run."""
        table = _long(self.runs).view(-1, 6)
        run = torch.repeat_interleave(table[:, 0])  # (N,)
        length, kind, causal, position, shared, extra = table[run].unbind(1)  # (N,) each
        row, end = torch.arange(self.length), table[:, 0].cumsum(0)[run]  # (N,)
        causal = causal.bool()
        return dict(
            slots=row,
            positions=position + torch.where(causal, row - end + length, 0),
            mask=Mask(torch.where(causal, row + 1, end), _long(self.closes)[run]),
            kinds=kind,
            shared=shared.bool(),
            extra=extra.bool(),
        )


def position_ids(height: int, width: int, side: int) -> Tensor:
    """Rows of a position table that a grid in its top left corner takes: row * side + column.

    (height * width,) in raster order (docs/BAGEL.md §6.3, extrapolate).
    """
    # (height * width,)
    return (torch.arange(height)[:, None] * side + torch.arange(width)).flatten()


def _places(chosen, count):
    """(count,) which of the chosen (n,) each of `count` tokens is; 0 where it is none."""
    places = torch.zeros(count, dtype=torch.long, device=chosen.device)
    places[chosen] = torch.arange(len(chosen), device=chosen.device)
    return places


def _long(values):
    return torch.tensor(values, dtype=torch.long)


def _spans(parts):
    """Rows of the tokens of all (first row, tokens, ...)."""
    return _cat([torch.arange(start, start + len(x)) for start, x, _ in parts], torch.long)


def _cat(parts, dtype):
    """The parts in one tensor, or an empty one where there are none."""
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
