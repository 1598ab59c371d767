"""
Who sees whom, drawn: the attention mask of a packed sequence, with its runs named.

    python sequence.py --picture mask.png       a pack of stage 1, the tree of a group of stage 2

A row is a token that looks, a column one that is looked at, coloured by what stands there where the
one sees the other:

    visible(i, j)  <=>  j < q_hi[i]  and  i < k_hi[j]                                  (sequence.py)

`runs_of` reads the runs and their names back from the two vectors and the rows of a pack, so what
is drawn is the pack that a model gets, not what its builder meant. Pictures of the example are of
2 x 2 tokens. Left out: packs of thousands of tokens, of which nothing could be seen.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime import files
from runtime.config import UserError, exit_on_user_error, parse
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
    picture: str = "mask.png"  # the PNG to write

    def __post_init__(self):
        if not self.picture.lower().endswith(".png"):
            raise UserError(f"--picture {self.picture}: expected a file name that ends in .png")


PRESETS = {"default": {}}


@dataclass(frozen=True)
class Run:
    """Rows begin ... end - 1 of a pack: one text, or one image with its markers."""

    kind: str  # of COLOURS
    name: str
    begin: int
    end: int


def runs_of(packed, layout):
    """The runs of a pack in order, a list of Run, named as one would call them.

    A text is a plan if it is trained or stands in a branch.
    """
    token, kind = ["text"] * len(packed), {}
    for name, index in (("ViT", packed.vit_index), ("latents", packed.latent_index)):
        kind |= dict.fromkeys(index.tolist(), name)
    kind |= dict.fromkeys(packed.latent_index[packed.noised].tolist(), "noised")
    times = packed.timesteps[packed.image_of_latent].tolist()
    time_at = dict(zip(packed.latent_index.tolist(), times))
    text_at = dict(zip(packed.text_index.tolist(), packed.text_ids.tolist()))
    trained = set(packed.text_index[packed.label_rows].tolist())
    q_hi, found, row = packed.mask.q_hi.tolist(), [], 0
    while row < len(token):
        if packed.positions[row] == 0 and text_at[row] in (layout.bos, layout.image_start):
            image = plan = 0  # a new document
        if text_at[row] == layout.image_start:
            end, what = q_hi[row], kind[row + 1]
            image += what == "latents"
            name = f"noised, t = {time_at[row + 1]:.2f}" if what == "noised" else what
            name = name if what == "noised" else f"image {max(1, image)}: {what}"
        else:
            end = next(i for i in range(row, len(token)) if text_at[i] == layout.eos) + 1
            what = "plan" if row in trained or not packed.shared[row] else "text"
            plan += what == "plan"
            name = f"plan {plan}" if what == "plan" else "instruction"
        found.append(Run(what, name, row, end))
        row = end
    return found


def draw_mask(axis, packed, layout, *, title):
    """Draw the mask of a pack on an axis of matplotlib."""
    from matplotlib.colors import to_rgb

    runs, mask, n = runs_of(packed, layout), packed.mask, len(packed)
    i, j = torch.arange(n)[:, None], torch.arange(n)  # (N, 1), (N,)
    seen = (j < mask.q_hi[:, None]) & (i < mask.k_hi)  # (N, N)
    colour = torch.ones(n, 3)
    for run in runs:
        colour[run.begin : run.end] = torch.tensor(to_rgb(COLOURS[run.kind]))
    paint = torch.where(seen[..., None], colour, torch.ones(n, n, 3))  # (N, N, 3)
    axis.imshow(paint.numpy(), interpolation="nearest", extent=(0, n, n, 0))
    for run in runs:
        axis.axhline(run.begin, color="#bbbbbb", linewidth=0.5)
        axis.axvline(run.begin, color="#bbbbbb", linewidth=0.5)
    middles = [(run.begin + run.end) / 2 for run in runs]
    axis.set_yticks(middles, [run.name for run in runs], fontsize=8)
    axis.set_xticks(middles, [run.name for run in runs], fontsize=8, rotation=90)
    axis.tick_params(length=0)
    axis.set(ylabel="this token", xlabel="sees that one", title=title)


def save_masks(path, packs, layout):
    """A PNG of the masks of some packs, {title: Packed}, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = dict(figsize=(7.2 * len(packs), 7.4), layout="constrained")
    figure, axes = pyplot.subplots(1, len(packs), squeeze=False, **size)
    for axis, (title, packed) in zip(axes[0], packs.items()):
        draw_mask(axis, packed, layout, title=title)
    with files.published(path) as hidden:
        figure.savefig(hidden, dpi=100, format="png")
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------
# the example


def an_image(name):
    """A vision.Reference of 2 x 2 latents and 2 x 2 patches, all zero."""
    return Reference(torch.zeros(4, 1), (2, 2), torch.zeros(4, 1), (2, 2), name)


def sft_pack():
    """Two samples of stage 1 in one row: with plan and two noised copies, and without a plan."""
    sequence = Sequence(LAYOUT)
    with sequence.document():
        for name in "ab":
            sequence.image(an_image(name))
        sequence.text([9] * 4)
        sequence.text([9] * 6, loss=True)
        for t in (0.8, 0.3):
            sequence.noise(torch.zeros(4, 1), (2, 2), t)
    with sequence.document():
        sequence.image(an_image("c"))
        sequence.text([9] * 4)
        sequence.noise(torch.zeros(4, 1), (2, 2), 0.5)
    return sequence.pack()


def grpo_tree():
    """A group of stage 2: one prompt, three members with a plan each, two scored pictures each."""
    sequence = Sequence(LAYOUT)
    with sequence.document():
        sequence.image(an_image("a"))
        sequence.text([9] * 4)
        for _ in range(3):
            with sequence.branch():
                sequence.text([9] * 6)
                for t in (0.8, 0.3):
                    sequence.noise(torch.zeros(4, 1), (2, 2), t)
    return sequence.pack()


@exit_on_user_error()
def main(config):
    """Draw both."""
    files.check_writable(Path(config.picture).parent)
    packs = {
        "stage 1: two samples in one pack": sft_pack(),
        "stage 2: the tree of a group of three": grpo_tree(),
    }
    save_masks(config.picture, packs, LAYOUT)
    print(f"wrote {config.picture}")


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:]))
