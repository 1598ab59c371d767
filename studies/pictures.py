"""
What a checkpoint paints, for the eye: the final grid, and the denoising path.

    save_grid    a row a prompt, a column a checkpoint: under each picture its plan, its reward and
                 the verdict of the toy world's exact judge; a frame marks what became better
                 (green) or worse (red) than in the first column, by a point of Overall
    save_path    one picture on its way from noise: x_t and, below, what the model takes it for

Pictures of the toy world keep hard pixels. Left out: pages to scroll, what training did
(studies/curves.py), sheets of samples (toy/sheets.py).
"""

import math
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from runtime.files import published
from toy.judge import judge
from toy.sheets import fitted

BETTER, WORSE = (46, 160, 67), (207, 34, 46)  # frames of pictures, and words about them
BLACK, GREY = (30, 30, 30), (110, 110, 110)
SIDE, PAD = 128, 4  # pixels of a picture in a strip, and between two of them
LINE, LETTER = 14, 6.1  # height of a line of words, mean width of a letter


def sheet_of(width, height):
    """(an empty sheet, a function that writes (x, y) a line of words in a colour)."""
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def write(at, words, colour=BLACK):
        pen.text(at, words, fill=colour, font=font)

    return sheet, write


def save_png(sheet, path):
    """Publish a sheet, and make its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with published(path) as hidden:
        sheet.save(hidden, "PNG")


# --------------------------------------------------------------------------------------------------
# the final grid


def save_grid(path, samples, painted, *, rewards=None, side=224):
    """Pictures and words of some checkpoints, a row a sample; side: pixels of a picture.

    painted: {name: engine.Result of each sample}. rewards: {name: reward of each picture, None
    where its plan does not parse}.
    """
    cell, titles = side + 3 * PAD, ["references", "the true target", *painted]
    rows = [row_of(one, painted, rewards, number=i) for i, one in enumerate(samples)]
    width = int(side / LETTER)
    rows = [[(image, frame, wrapped(words, width)) for image, frame, words in row] for row in rows]
    heights = [max(len(lines) for *_, lines in row) * LINE + side + 5 * PAD for row in rows]
    sheet, write = sheet_of(len(titles) * cell + 2 * PAD, sum(heights) + LINE + 2 * PAD)
    for column, title in enumerate(titles):
        write((2 * PAD + column * cell, PAD), title, GREY)
    top = LINE + 3 * PAD
    for row, height in zip(rows, heights):
        for column, (image, frame, lines) in enumerate(row):
            left = 2 * PAD + column * cell
            if frame:
                sheet.paste(frame, (left - PAD, top - PAD, left + side + PAD, top + side + PAD))
            square = mosaic(image, side)
            sheet.paste(square, (left, top))
            for i, (line, colour) in enumerate(lines):
                write((left, top + square.height + PAD + LINE * i), line, colour)
        top += height
    save_png(sheet, path)


def row_of(sample, painted, rewards, *, number):
    """[(pictures, colour of its frame or None, [(words, colour)])] of a row of the grid."""
    results = [results[number] for results in painted.values()]
    marks = changes(sample, results)
    row = [
        (sample.references, None, [(sample.instruction, BLACK)]),
        ((sample.target,), None, in_words(sample.plan)),
    ]
    for name, result, mark in zip(painted, results, marks):
        plan = in_words(result.plan, than=sample.plan) if result.text else [("no plan", GREY)]
        reward = rewards[name][number] if rewards else None
        said = [] if reward is None else [f"reward {reward:.3f}"]
        if sample.truth:
            verdict = judge(result.image, sample.truth)
            said.append(f"PF {verdict.pf:.1f}  SC {verdict.sc:.1f}  Overall {verdict.overall:.1f}")
        row.append(((result.image,), mark, [(words, mark or BLACK) for words in said] + plan))
    return row


def changes(sample, results):
    """A colour for each result: BETTER or WORSE than the first one, else None."""
    if not sample.truth:
        return [None] * len(results)
    first, *others = [judge(result.image, sample.truth).overall for result in results]
    marks = [None if abs(x - first) < 1 else BETTER if x > first else WORSE for x in others]
    return [None, *marks]


def in_words(plan, than=None):
    """[(words, colour)] of a plan: caption, relations; red where they are not those of `than`."""
    if plan is None:
        return [("a plan that cannot be read", WORSE)]
    parts, true = [plan.caption, *plan.relations], than or plan
    wanted = [true.caption, *true.relations]
    wanted += [None] * (len(parts) - len(wanted))
    return [
        (words, WORSE if words != right else GREY if i else BLACK)
        for i, (words, right) in enumerate(zip(parts, wanted))
    ]


def wrapped(words, width):
    """[(line, colour)] of [(words, colour)], each line of at most `width` letters."""
    return [(line, colour) for text, colour in words for line in textwrap.wrap(text, width)]


def mosaic(images, side):
    """Pictures in a square of `side`, cut where it ends: one fills it, four take a quarter each."""
    across = max(1, math.ceil(math.sqrt(len(images))))
    down, each = -(-len(images) // across), (side - PAD * (across - 1)) // across
    height = side if across == 1 else down * (each + PAD) - PAD
    square = Image.new("RGB", (side, height), (255, 255, 255))
    for i, image in enumerate(images):
        y, x = divmod(i, across)
        square.paste(fitted(image, each), (x * (each + PAD), y * (each + PAD)))
    return square


# --------------------------------------------------------------------------------------------------
# the denoising path


def save_path(path, titles, rows, *, side=SIDE):
    """Columns of pictures, a title above each. rows: {what it shows: a picture for each title}."""
    margin, cell = 7 * LINE * any(rows) + PAD, side + PAD
    sheet, write = sheet_of(margin + len(titles) * cell, LINE + 2 * PAD + len(rows) * cell)
    for column, title in enumerate(titles):
        write((margin + column * cell, PAD), title, GREY)
    for row, (name, images) in enumerate(rows.items()):
        top = LINE + 2 * PAD + row * cell
        for i, line in enumerate(textwrap.wrap(name, 15)):
            write((PAD, top + LINE * i), line)
        for column, image in enumerate(images):
            sheet.paste(fitted(image, side), (margin + column * cell, top))
    save_png(sheet, path)


def some(count, most):
    """At most `most` of range(count), evenly, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
