"""The picture of a mask: its runs, their names and their colours are those of the pack."""

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from studies import masks


def test_runs_are_named_in_order():
    names = [run.name for run in masks.runs_of(masks.sft_pack(), masks.LAYOUT)]
    one = ["image 1: latents", "image 1: ViT"]
    two = ["image 2: latents", "image 2: ViT"]
    noised = ["noised, t = 0.80", "noised, t = 0.30"]
    assert names[:8] == [*one, *two, "instruction", "plan 1", *noised]
    assert names[8:] == [*one, "instruction", "noised, t = 0.50"]
    tree = masks.runs_of(masks.grpo_tree(), masks.LAYOUT)
    assert [run.name for run in tree if run.kind == "plan"] == ["plan 1", "plan 2", "plan 3"]
    assert [run.begin for run in tree[1:]] == [run.end for run in tree[:-1]]


def test_a_square_has_the_colour_of_what_is_seen_there():
    """Against the rule in words: own run, and the prompt; of the own branch the plan."""
    packed = masks.grpo_tree()
    axis = Figure().subplots()
    masks.draw_mask(axis, packed, masks.LAYOUT, "")
    drawn = torch.tensor(axis.images[0].get_array())  # (N, N, 3)
    at = {run.name: run for run in reversed(masks.runs_of(packed, masks.LAYOUT))}
    first, plan, other = at["noised, t = 0.80"], at["plan 1"], at["plan 2"]
    row, white = drawn[first.begin], torch.ones(3)
    assert torch.allclose(row[first.end - 1], torch.tensor(to_rgb(masks.COLOURS["noised"])))
    assert torch.allclose(row[plan.begin], torch.tensor(to_rgb(masks.COLOURS["plan"])))
    assert torch.allclose(row[0], torch.tensor(to_rgb(masks.COLOURS["latents"])))
    assert torch.equal(row[other.begin], white) and torch.equal(row[first.end], white)
    assert torch.equal(drawn[plan.begin, plan.begin + 1], white)  # a text is causal


def test_the_command_writes_both(tmp_path):
    out = tmp_path / "new" / "mask.png"
    masks.main(masks.Config(str(out)))
    with Image.open(out) as drawn:
        assert drawn.width > 1000
