"""
Sheets of samples: what a person would rather look at than read.

One row a sample, as high as its words need: its references, its target in a dark frame, and in
words the task, how the exact judge of the toy world scores the target (where the truth is known),
the instruction and the plan.
`python data.py --show` draws one; curate.py ends with one. Left out: pages to scroll.
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont

from iccot import Sample
from toy.judge import judge
from toy.world import SIZE

GREY, GREEN, BLACK = (150, 150, 150), (0, 90, 60), (0, 0, 0)
LINE = 15  # pixels of a line of text


def picture_sheet(samples: list[Sample], side: int = 128) -> Image.Image:
    """One row a sample: references, target, and in words task, judgement, instruction and plan."""
    cell = side + 8
    texts = [in_words(sample) for sample in samples]
    heights = [max(cell, LINE * len(lines) + 8) for lines in texts]  # ten relations are high
    columns = max(len(sample.references) for sample in samples)
    sheet = Image.new("RGB", (cell * (columns + 1) + 640, sum(heights) + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    left, top = 8 + columns * cell, 8
    for sample, lines, height in zip(samples, texts, heights):
        for column, image in enumerate(sample.references):
            sheet.paste(fitted(image, side), (8 + column * cell, top))
        pen.rectangle((left - 4, top - 4, left + cell - 5, top + cell - 5), fill=(40, 40, 40))
        sheet.paste(fitted(sample.target, side), (left, top))
        for i, (line, colour) in enumerate(lines):
            pen.text((left + cell + 8, top + LINE * i), line, fill=colour, font=font)
        top += height
    return sheet


def in_words(sample: Sample) -> list[tuple[str, tuple]]:
    """(line, colour): the task and how the target was judged, the instruction, the plan."""
    about = sample.key
    if sample.truth:
        verdict = judge(sample.target, sample.truth)
        about = f"(target: PF {verdict.pf:.1f}, SC {verdict.sc:.1f})"
    plan = textwrap.wrap("> " + sample.plan.caption, 92)
    plan += [f"> {i}: {relation}" for i, relation in enumerate(sample.plan.relations, 1)]
    lines = [(f"{sample.task}   {about}", GREY)]
    lines += [(line, BLACK) for line in textwrap.wrap(sample.instruction, 92)]
    return lines + [(line, GREEN) for line in plan]


def fitted(image: Image.Image, side: int) -> Image.Image:
    """A toy picture enlarged so that subjects keep their size beside scenes; any other fitted."""
    if max(image.size) <= SIZE:
        size = (image.width * side // SIZE, image.height * side // SIZE)
        return image.resize(size, Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
