"""
The exact judge of the toy world: PF and SC from pixels, with no model in the loop.

It finds the scene variant nearest to the pixels that the true things leave visible; then, at each
place, the nearest of all subjects composited on that scene, or nothing. q in [0, 1] is the quality
of a match, 1 for a sharp one and 0 for a lost one: over the pixels of a place for a thing, over
all pixels but those of the things found for the scene.

    PF = 10 * mean of
        q * (kind right + colour right) / 2               for each thing asked, at its place
        q(scene) * kind right                             for the scene
        q(scene) * share of them empty                    for the places that should be free, if any
    SC = 10 * mean of
        q * kind right * share of given attributes right  for each thing that has given ones
        q(scene) * kind right * share of looks right      for a scene that a reference shows
    Overall = sqrt(PF * SC)                               a sample; the scale is OmniContext's

PF (prompt following) asks for what was asked: hidden looks do not enter it. SC (subject
consistency) asks for what references show: what only words say does not enter it.

Left out: things that stand between places, several pictures at once.

    judge(picture, sample.truth).overall
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from toy.world import (
    HALF,
    PLACES,
    SIZE,
    Subject,
    Truth,
    attributes,
    corner_of,
    scene_picture,
    scenes,
    sprite,
    subjects,
)

SHARP, LOST = 0.06, 0.22  # rms distance to the nearest template, of the range 0 to 1: q = 1, q = 0


@dataclass(frozen=True)
class Verdict:
    """Each from 0 to 10."""

    pf: float
    sc: float
    overall: float


# --------------------------------------------------------------------------------------------------
# what a picture is compared with


@dataclass(frozen=True)
class Templates:
    """All sprites and scenes as float32, in the order of `subjects()` and `scenes()`."""

    silhouettes: np.ndarray  # (subjects, 256), 0 or 1
    pixels: np.ndarray  # (subjects, 768), in [0, 1], 0 outside the silhouette
    squares: np.ndarray  # (subjects,), the sums of the squared pixels
    backgrounds: np.ndarray  # (scenes, 32, 32, 3), in [0, 1]


@cache
def templates() -> Templates:
    """The templates of the whole world, drawn once."""
    drawn = [sprite(subject) for subject in subjects()]
    # (subjects, 256), (subjects, 768), (scenes, 32, 32, 3)
    silhouettes = np.stack([silhouette.reshape(-1) for _, silhouette in drawn]).astype(np.float32)
    pixels = np.stack([rgb.reshape(-1) for rgb, _ in drawn]).astype(np.float32) / 255
    backgrounds = np.stack([scene_picture(scene) for scene in scenes()]).astype(np.float32) / 255
    return Templates(silhouettes, pixels, np.square(pixels).sum(1), backgrounds)


def pixels_of(image) -> np.ndarray:
    """A PIL image or uint8 array as float32 (32, 32, 3) in [0, 1]; others are averaged down."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def _crops(picture: np.ndarray) -> np.ndarray:
    """The four PLACES of a picture (32, 32, 3) as (4, 256, 3)."""
    rows = picture.reshape(2, HALF, 2, HALF, 3)  # (2, 16, 2, 16, 3)
    return rows.transpose(0, 2, 1, 3, 4).reshape(4, -1, 3)  # (4, 256, 3)


def _quality(seen: np.ndarray, template: np.ndarray) -> float:
    """q in [0, 1] of pixels against a template, both (pixels, 3): 1 up to SHARP, 0 from LOST.

    LOST is no more than the distance of the best picture of one colour: a grey sheet is no city at
    night.
    """
    lost = max(0.02, min(LOST, math.sqrt(np.square(template - template.mean(0)).mean())))
    sharp = min(SHARP, lost / 2)
    distance = math.sqrt(np.square(seen - template).mean())
    return min(1.0, max(0.0, (lost - distance) / (lost - sharp)))


# --------------------------------------------------------------------------------------------------
# what a picture shows


def nearest_subjects(
    picture: np.ndarray, background: np.ndarray
) -> dict[str, tuple[Subject | None, float]]:
    """For each place the nearest subject (None: nothing stands there) and the q of the match.

    picture and background (32, 32, 3), float32 in [0, 1]. With x the crop, b the scene behind it,
    s a sprite and m its silhouette, the squared distance to the composite is two matrix products:

        |m (x - s)|^2 + |(1 - m) (x - b)|^2 = |x - b|^2 + m (x^2 - (x - b)^2) - 2 x s + |s|^2
    """
    known = templates()
    crops, behind = _crops(picture), _crops(background)  # (4, 256, 3)
    error = np.square(crops - behind).sum(-1)  # (4, 256)
    masked = (np.square(crops).sum(-1) - error) @ known.silhouettes.T  # (4, subjects)
    # (4, subjects)
    cost = masked - 2 * crops.reshape(4, -1) @ known.pixels.T + known.squares
    best, least = cost.argmin(1), cost.min(1)  # (4,)
    nearest = {}
    for i, place in enumerate(PLACES):
        subject, template = None, behind[i]  # (256, 3)
        if least[i] < 0:  # this subject explains the crop better than the empty scene
            subject = subjects()[best[i]]
            inside = known.silhouettes[best[i]][:, None] > 0  # (256, 1)
            # (256, 3)
            template = np.where(inside, known.pixels[best[i]].reshape(-1, 3), template)
        nearest[place] = subject, _quality(crops[i], template)
    return nearest


def _uncovered(standing: dict[str, Subject]) -> np.ndarray:
    """The pixels of the scene that the subjects at these places leave visible, bool (32, 32)."""
    visible = np.ones((SIZE, SIZE), bool)
    for place, subject in standing.items():
        y, x = corner_of(place)
        visible[y : y + HALF, x : x + HALF] = ~sprite(subject)[1]
    return visible


def _nearest_scene(picture: np.ndarray, visible: np.ndarray) -> int:
    """The scene with the least |x - b|^2 over the visible pixels, as a number of `scenes()`."""
    weight = np.repeat(visible, 3).astype(np.float32)  # (3072,)
    flat = templates().backgrounds.reshape(len(scenes()), -1)  # (scenes, 3072)
    return int((np.square(flat) @ weight - 2 * flat @ (weight * picture.reshape(-1))).argmin())


# --------------------------------------------------------------------------------------------------
# the judge


def judge(image, truth: Truth) -> Verdict:
    """Score a picture (PIL or uint8 array, any size) exactly, from its pixels.

    The formulas are at the top of this file. A sample whose references show nothing has SC 10.
    """
    picture = pixels_of(image)
    best = _nearest_scene(
        picture, _uncovered({thing.place: thing.subject for thing in truth.things})
    )
    scene, background = scenes()[best], templates().backgrounds[best]  # (32, 32, 3)
    standing = nearest_subjects(picture, background)
    behind = _uncovered({place: subject for place, (subject, _) in standing.items() if subject})
    scene_quality = _quality(picture[behind], background[behind])
    scene_right = scene_quality * (scene.kind == truth.scene.kind)

    following, consistent = [scene_right], []
    for thing in truth.things:
        subject, quality = standing.pop(thing.place)
        kind_right = subject is not None and subject.kind == thing.subject.kind
        colour_right = subject is not None and subject.colour == thing.subject.colour
        following.append(quality * (kind_right + colour_right) / 2)
        if thing.given:
            wanted, seen = attributes(thing.subject), attributes(subject) if kind_right else {}
            right = [seen.get(name) == wanted[name] for name in thing.given]
            consistent.append(quality * np.mean(right))
    if standing:  # the places that should be free
        free = [subject is None for subject, _ in standing.values()]
        following.append(scene_quality * np.mean(free))
    if truth.scene_given:
        right = [a == b for a, b in zip(scene.looks, truth.scene.looks)]
        consistent.append(scene_right * np.mean(right))
    pf = 10 * float(np.mean(following))
    sc = 10 * float(np.mean(consistent)) if consistent else 10.0
    return Verdict(pf, sc, math.sqrt(pf * sc))
