"""The packed sequence against brute force: explicit ancestors, BAGEL's mask rule and positions."""

import random

import pytest
import torch

from sequence import Layout, Sequence
from vision import Reference

LAYOUT = Layout(bos=0, eos=1, image_start=2, image_end=3, latent_side=8, vit_side=8)


def reference(rng):
    h, w, a, b = (rng.randint(1, 3) for _ in range(4))
    return Reference(torch.randn(h * w, 4), (h, w), torch.randn(a * b, 12), (a, b))


def random_tree(rng):
    """A random pack, and for each token of it (path of frames, run, causal, position)."""
    sequence, rows, frames, runs = Sequence(LAYOUT), [], [0], [0]

    def add(path, length, causal, position):
        runs[0] += 1
        for i in range(length):
            rows.append((path, runs[0], causal, position + i if causal else position))

    def content(path, position, depth):
        for _ in range(rng.randint(1, 4)):
            what = rng.choice(["text", "image", "noise", "branch", "reserve"])
            if what == "text":
                n = rng.randint(0, 5)
                sequence.text([7] * n, loss=rng.random() < 0.5)
                add(path, n + 2, True, position)
                position += n + 2
            elif what == "reserve":
                n = rng.randint(1, 4)
                sequence.reserve(n)
                add(path, n, True, position)
                position += n
            elif what == "image":
                one = reference(rng)
                sequence.image(one)
                add(path, len(one.latents) + 2, False, position)
                add(path, len(one.patches) + 2, False, position + 1)
                position += 2
            elif what == "noise":
                one = reference(rng)
                sequence.noise(one.latents, one.latent_grid, rng.random())
                frames[0] += 1
                add((*path, frames[0]), len(one.latents) + 2, False, position)
            elif depth < 3:
                frames[0] += 1
                with sequence.branch():
                    content((*path, frames[0]), position, depth + 1)

    for _ in range(rng.randint(1, 3)):
        frames[0] += 1
        with sequence.document():
            content((frames[0],), 0, 0)
    return sequence.pack(), rows


def test_mask_and_positions_equal_explicit_ancestors():
    for seed in range(150):
        packed, rows = random_tree(random.Random(seed))
        n = len(rows)
        expected = torch.zeros(n, n, dtype=torch.bool)
        for i, (path_i, run_i, causal_i, _) in enumerate(rows):
            for j, (path_j, run_j, _, _) in enumerate(rows):
                if run_i == run_j:
                    expected[i, j] = j <= i if causal_i else True
                else:
                    expected[i, j] = j < i and path_i[: len(path_j)] == path_j
        assert torch.equal(packed.mask.dense(), expected), seed
        assert packed.positions.tolist() == [position for *_, position in rows], seed


def test_mask_equals_bagels_rule():
    """docs/BAGEL.md §5: allowed = same sample and (k <= q or same full/noise split)
    and (k not noise or same split)."""
    for seed in range(100):
        rng = random.Random(seed)
        sequence, split, mode, sample = Sequence(LAYOUT), [], [], []
        for s in range(rng.randint(1, 3)):
            with sequence.document():
                for _ in range(rng.randint(1, 5)):
                    kind = rng.choice(["causal", "full", "noise"])
                    one = reference(rng)
                    lengths = [len(one.latents) + 2]
                    if kind == "causal":
                        lengths = [5]
                        sequence.text([9, 9, 9])
                    elif kind == "full":
                        lengths.append(len(one.patches) + 2)
                        sequence.image(one)
                    else:
                        sequence.noise(one.latents, one.latent_grid, 0.5)
                    for length in lengths:
                        new = split[-1] + 1 if split else 0
                        split += [new] * length
                        mode += [kind] * length
                        sample += [s] * length
        n = len(split)
        P, S = torch.tensor(split), torch.tensor(sample)
        full = torch.tensor([m != "causal" for m in mode])
        noise = torch.tensor([m == "noise" for m in mode])
        same = P[:, None] == P
        earlier = torch.arange(n) <= torch.arange(n)[:, None]
        allowed = (S[:, None] == S) & (earlier | (same & full[:, None])) & (~noise | same)
        assert torch.equal(sequence.pack().mask.dense(), allowed), seed


def test_routing_covers_every_row_once_and_labels_are_shifted():
    packed, _ = random_tree(random.Random(5))
    assert sorted(packed.order.tolist()) == list(range(len(packed)))
    assert torch.equal(packed.order[packed.inverse], torch.arange(len(packed)))
    sequence = Sequence(LAYOUT)
    with sequence.document():
        sequence.text([10, 11])
        sequence.text([12, 13, 14], loss=True)
    packed = sequence.pack()
    assert packed.text_ids[packed.label_rows].tolist() == [0, 12, 13, 14]
    assert packed.labels.tolist() == [12, 13, 14, 1]


def test_a_subset_of_rows_has_the_rows_of_the_whole():
    for seed in range(50):
        packed, _ = random_tree(random.Random(seed))
        for kind in ("given", "noised", "reserved"):
            rows = packed.rows_of(kind)
            if len(rows):
                part = packed.select(rows)
                assert torch.equal(part.mask.dense(), packed.mask.dense()[rows])
                assert torch.equal(part.positions, packed.positions[rows])
                assert sorted(part.order.tolist()) == list(range(len(rows)))
                assert sum(part.noised_lengths) == len(part.noised)
                assert sum(part.vit_lengths) == len(part.vit_index)
        together = torch.cat([packed.rows_of(kind) for kind in ("given", "noised", "reserved")])
        assert sorted(together.tolist()) == list(range(len(packed)))


def test_what_cannot_be_laid_out_is_refused():
    sequence = Sequence(LAYOUT)
    with pytest.raises(ValueError, match="inside a document"):
        sequence.text([1])
    with pytest.raises(ValueError, match="must stand inside a document"):
        with sequence.branch():
            pass
    with sequence.document():
        with pytest.raises(ValueError, match="do not fill a grid"):
            sequence.noise(torch.zeros(9, 4), (7, 7), 0.3)
        with pytest.raises(ValueError, match="exceeds the position table"):
            sequence.noise(torch.zeros(9, 4), (1, 9), 0.3)
        with pytest.raises(ValueError, match="inside a document or branch"):
            sequence.pack()
        with pytest.raises(ValueError, match="cannot stand inside another document"):
            with sequence.document():
                pass
