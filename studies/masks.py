"""
Who sees whom, drawn: the attention mask of a packed sequence, with its runs named.

    python -m studies.masks --out mask.png      a pack of stage 1, the tree of a group of stage 2

A row is a token that looks, a column one that is looked at, coloured by what stands there where the
one sees the other:

    visible(i, j)  <=>  j < q_hi[i]  and  i < k_hi[j]                                  (sequence.py)

`runs_of` reads the runs and their names back from a pack: what is drawn is what a model gets, not
what the builder meant. Pictures of the example are of 2 x 2 tokens.
Left out: packs of thousands of tokens, of which nothing could be seen.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from runtime import files
from runtime.config import exit_on_user_error, parse
from sequence import Layout, Sequence
from vision import Reference

COLOURS = {  # of what is looked at
    "text": "#4878cf",
    "plan": "#6acc65",
    "latents": "#c4ad66",
    "ViT": "#d65f5f",
    "noised": "#956cb4",
}
LAYOUT = Layout(bos=0, eos=1, image_start=2, image_end=3, latent_side=8, vit_side=8)


@dataclass(frozen=True)
class Config:
    out: str = "mask.png"  # the PNG to write


PRESETS = {"default": {}}


@dataclass(frozen=True)
class Run:
    """Rows begin ... end - 1 of a pack: one text, or one image with its markers."""

    kind: str  # of COLOURS
    name: str
    begin: int
    end: int


def runs_of(packed, layout):
    """The runs of a pack in order, a list of Run. A text is a plan if it is trained or in a branch.

    packed: sequence.Packed.
    """
    kind = dict.fromkeys(packed.vit_index.tolist(), "ViT")
    kind |= dict.fromkeys(packed.latent_index.tolist(), "latents")
    kind |= dict.fromkeys(packed.latent_index[packed.noised].tolist(), "noised")
    times = packed.timesteps[packed.image_of_latent].tolist()
    time_of = dict(zip(packed.latent_index.tolist(), times))
    token_of = dict(zip(packed.text_index.tolist(), packed.text_ids.tolist()))
    trained = set(packed.text_index[packed.label_rows].tolist())
    runs, begin, images, plans = [], 0, 0, 0
    for row in range(len(packed)):
        if token_of.get(row) not in (layout.eos, layout.image_end):
            continue
        if packed.positions[begin] == 0:  # a new document
            images = plans = 0
        what = kind.get(begin + 1, "text")
        if what == "noised":
            name = f"noised, t = {time_of[begin + 1]:.2f}"
        elif what != "text":
            images += what == "latents"
            name = f"image {max(1, images)}: {what}"
        elif begin in trained or not packed.shared[begin]:
            plans += 1
            what, name = "plan", f"plan {plans}"
        else:
            name = "instruction"
        runs.append(Run(what, name, begin, row + 1))
        begin = row + 1
    return runs


def draw_mask(axis, packed, layout, title):
    """Draw the mask of a pack on an axis of matplotlib."""
    from matplotlib.colors import to_rgb

    runs, mask, n = runs_of(packed, layout), packed.mask, len(packed)
    i, j = torch.arange(n)[:, None], torch.arange(n)  # (N, 1), (N,)
    seen = (j < mask.q_hi[:, None]) & (i < mask.k_hi)  # (N, N)
    colour = torch.ones(n, 3)
    for run in runs:
        colour[run.begin : run.end] = torch.tensor(to_rgb(COLOURS[run.kind]))
        axis.axhline(run.begin, color="#bbbbbb", linewidth=0.5)
        axis.axvline(run.begin, color="#bbbbbb", linewidth=0.5)
    paint = torch.where(seen[..., None], colour, torch.ones(n, n, 3))  # (N, N, 3)
    axis.imshow(paint.numpy(), interpolation="nearest", extent=(0, n, n, 0))
    middles, names = [(run.begin + run.end) / 2 for run in runs], [run.name for run in runs]
    axis.set_yticks(middles, names, fontsize=8)
    axis.set_xticks(middles, names, fontsize=8, rotation=90)
    axis.tick_params(length=0)
    axis.set(ylabel="this token", xlabel="sees that one", title=title)


# --------------------------------------------------------------------------------------------------
# the example

NOISED = torch.zeros(4, 1)  # 2 x 2 latents
IMAGE = Reference(torch.zeros(4, 1), (2, 2), torch.zeros(4, 1), (2, 2), "")  # and 2 x 2 patches


def sft_pack():
    """Two samples of stage 1 in one row: with plan and two noised copies, and without a plan."""
    sequence = Sequence(LAYOUT)
    with sequence.document():
        sequence.image(IMAGE)
        sequence.image(IMAGE)
        sequence.text([9] * 4)
        sequence.text([9] * 6, loss=True)
        for t in (0.8, 0.3):
            sequence.noise(NOISED, (2, 2), t)
    with sequence.document():
        sequence.image(IMAGE)
        sequence.text([9] * 4)
        sequence.noise(NOISED, (2, 2), 0.5)
    return sequence.pack()


def grpo_tree():
    """A group of stage 2: one prompt, three members with a plan each, two scored pictures each."""
    sequence = Sequence(LAYOUT)
    with sequence.document():
        sequence.image(IMAGE)
        sequence.text([9] * 4)
        for _ in range(3):
            with sequence.branch():
                sequence.text([9] * 6)
                for t in (0.8, 0.3):
                    sequence.noise(NOISED, (2, 2), t)
    return sequence.pack()


@exit_on_user_error()
def main(config):
    """Draw both side by side."""
    from matplotlib.figure import Figure

    files.check_writable(Path(config.out).parent)
    figure = Figure(figsize=(14.4, 7.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_mask(left, sft_pack(), LAYOUT, "stage 1: two samples in one pack")
    draw_mask(right, grpo_tree(), LAYOUT, "stage 2: the tree of a group of three")
    with files.published(config.out) as hidden:
        figure.savefig(hidden, dpi=100, format="png")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(parse(Config, PRESETS))
