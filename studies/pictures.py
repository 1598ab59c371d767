"""
Pictures with words, for the eye: the one drawer of sheets.

    sheet_of       rows of cells: pictures, words below them, a frame where one is asked for
    save_samples   a row a sample: references, target in a dark frame, and in words the task, the
                   verdict of the toy's exact judge, the instruction and the plan
    save_grid      a row a prompt, a column a checkpoint: under each picture its reward, its verdict
                   and its plan; a frame marks what became better (green) or worse (red) than in the
                   first column, by a point of Overall
    save_path      a picture on its way from noise: x_t and, below, what the model takes it for

Pictures of the toy world keep hard pixels. Left out: pages to scroll, curves (studies/curves.py).
"""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.files import published
from toy.judge import judge
from toy.world import SIZE

BETTER, WORSE = (46, 160, 67), (207, 34, 46)  # frames of pictures, and words about them
BLACK, GREY, GREEN, DARK = (30, 30, 30), (110, 110, 110), (0, 90, 60), (40, 40, 40)
SIDE, PAD = 128, 4  # pixels of a picture, and between two of them
LINE, LETTER = 14, 6.1  # height of a line of words, mean width of a letter


@dataclass(frozen=True)
class Cell:
    """Pictures that share a square, and what is written below them."""

    pictures: tuple = ()
    words: tuple = ()  # of (text, colour), each from a new line
    frame: tuple | None = None  # its colour


def sheet_of(rows, titles=(), *, side=SIDE, gap=PAD, widths=None):
    """A picture of rows of Cells, with a title above each column.

    side: pixels of a square. gap: pixels between cells; twice PAD or more where there are frames.
    widths: of the columns, `side` each if None.
    """
    widths = widths or [side] * max(len(row) for row in rows)
    lefts = [gap * (i + 1) + sum(widths[:i]) for i in range(len(widths))]
    pictures, words = [], [((left, PAD), title, GREY) for left, title in zip(lefts, titles)]
    top = gap + (LINE + PAD if titles else 0)
    for row in rows:
        bottom = top + side
        for cell, left, width in zip(row, lefts, widths):
            below = top
            if cell.pictures:
                square = mosaic(cell.pictures, side)
                pictures.append((square, cell.frame, left, top))
                below += square.height + PAD
            for line, colour in wrapped(cell.words, width):
                words.append(((left, below), line, colour))
                below += LINE
            bottom = max(bottom, below if cell.words else 0)
        top = bottom + gap
    sheet = Image.new("RGB", (lefts[-1] + widths[-1] + gap, top), "white")
    for square, frame, left, top in pictures:
        if frame:
            sheet.paste(frame, (left - PAD, top - PAD, left + side + PAD, top + side + PAD))
        sheet.paste(square, (left, top))
    for place, line, colour in words:
        write(sheet, place, line, colour)
    return sheet


def write(sheet, place, line, colour=GREY):
    """A line of words on a sheet; place: pixels from the left and from the top."""
    font = ImageFont.load_default(12)
    ImageDraw.Draw(sheet).text(place, line, fill=colour, font=font)


def wrapped(words, width):
    """[(line, colour)] of [(text, colour)], each line at most `width` pixels wide."""
    return [
        (line, colour)
        for text, colour in words
        for line in textwrap.wrap(text, int(width / LETTER))
    ]


def mosaic(images, side):
    """Pictures in a square of `side`, cut where it ends: one fills it, four take a quarter each."""
    across = math.ceil(math.sqrt(len(images)))
    down, each = -(-len(images) // across), (side - PAD * (across - 1)) // across
    height = side if across == 1 else down * (each + PAD) - PAD
    square = Image.new("RGB", (side, height), "white")
    for i, image in enumerate(images):
        y, x = divmod(i, across)
        square.paste(fitted(image, each), (x * (each + PAD), y * (each + PAD)))
    return square


def fitted(image, side):
    """A toy picture enlarged so that subjects keep their size beside scenes; any other fitted."""
    if max(image.size) <= SIZE:
        size = (image.width * side // SIZE, image.height * side // SIZE)
        return image.resize(size, Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def reference_cells(samples):
    """For each sample a Cell for each of its references, and empty ones to as many as any has."""
    most = max(len(sample.references) for sample in samples)
    rows = [[Cell((image,)) for image in sample.references] for sample in samples]
    return [row + [Cell()] * (most - len(row)) for row in rows]


def save_png(sheet, path):
    """Publish a sheet, and make its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with published(path) as hidden:
        sheet.save(hidden, "PNG")


def evenly(count, most):
    """At most `most` of range(count), evenly, first and last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


# --------------------------------------------------------------------------------------------------
# samples


def save_samples(path, samples):
    """Samples of training or of a data pipeline, a row each; returns the sheet."""
    rows = reference_cells(samples)
    for row, sample in zip(rows, samples):
        about = sample.key
        if sample.truth:
            verdict = judge(sample.target, sample.truth)
            about = f"(target: PF {verdict.pf:.1f}, SC {verdict.sc:.1f})"
        words = [(f"{sample.task}   {about}", GREY), (sample.instruction, BLACK)]
        words.append((f"> {sample.plan.caption}", GREEN))
        for i, relation in enumerate(sample.plan.relations, 1):
            words.append((f"> {i}: {relation}", GREEN))
        row += [Cell((sample.target,), frame=DARK), Cell(words=words)]
    widths = [SIDE] * (len(rows[0]) - 1) + [624]
    sheet = sheet_of(rows, gap=2 * PAD, widths=widths)
    save_png(sheet, path)
    return sheet


# --------------------------------------------------------------------------------------------------
# the final grid


def save_grid(path, samples, painted, rewards=None, side=224):
    """Pictures and words of some checkpoints, a row a sample; side: pixels of a picture.

    painted: {name: engine.Result of each sample}. rewards: {name: reward of each picture, None
    where its plan does not parse}.
    """
    rows = []
    for i, sample in enumerate(samples):
        results = [results[i] for results in painted.values()]
        worth = [rewards[name][i] if rewards else None for name in painted]
        rows.append(grid_row(sample, results, worth))
    titles = ["references", "the true target", *painted]
    save_png(sheet_of(rows, titles, side=side, gap=3 * PAD), path)


def grid_row(sample, results, rewards):
    """The Cells of a row of the grid. results, rewards: of this sample by each checkpoint."""
    row = [
        Cell(sample.references, [(sample.instruction, BLACK)]),
        Cell((sample.target,), plan_in_words(sample.plan, sample.plan)),
    ]
    first = None  # Overall of the first checkpoint
    for result, reward in zip(results, rewards):
        frame, said = None, [] if reward is None else [f"reward {reward:.3f}"]
        if sample.truth:
            verdict = judge(result.image, sample.truth)
            said.append(f"PF {verdict.pf:.1f}  SC {verdict.sc:.1f}  Overall {verdict.overall:.1f}")
            first = verdict.overall if first is None else first
            if abs(verdict.overall - first) >= 1:
                frame = BETTER if verdict.overall > first else WORSE
        words = [(text, frame or BLACK) for text in said]
        words += plan_in_words(result.plan, sample.plan) if result.text else [("no plan", GREY)]
        row.append(Cell((result.image,), words, frame))
    return row


def plan_in_words(plan, true):
    """[(text, colour)] of a plan: caption, relations; red where they are not those of `true`."""
    if plan is None:
        return [("a plan that cannot be read", WORSE)]
    words = [(plan.caption, BLACK if plan.caption == true.caption else WORSE)]
    for i, relation in enumerate(plan.relations):
        words.append((relation, GREY if relation in true.relations[i : i + 1] else WORSE))
    return words


# --------------------------------------------------------------------------------------------------
# the denoising path


def save_path(path, titles, rows):
    """Columns of pictures, a title above each. rows: {what it shows: a picture for each title}."""
    cells = [
        [Cell(words=[(name, BLACK)]), *(Cell((image,)) for image in images)]
        for name, images in rows.items()
    ]
    widths = [7 * LINE] + [SIDE] * len(titles)
    save_png(sheet_of(cells, ["", *titles], widths=widths), path)
