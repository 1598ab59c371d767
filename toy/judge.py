"""
The exact judge of the toy world: PF and SC from pixels, with no model in the loop.

    PF = 10 * mean over what was asked        things (kind, colour, place), the scene's kind, nothing else
    SC = 10 * mean over what references show  kind, looks, and colour unless the text changes it
    Overall = sqrt(PF * SC), a sample         the scale and the mean of OmniContext; `judge` has the formulas
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


@dataclass(frozen=True)
class Verdict:
    """Each from 0 to 10."""

    pf: float
    sc: float
    overall: float


# ---------------------------------------------------------------------------------------------------------------------
# the judge

SHARP, LOST = 0.06, 0.22  # rms distance to the nearest template, of the range 0 to 1: q = 1, q = 0


def _quality(seen: np.ndarray, template: np.ndarray) -> float:
    """q in [0, 1] of pixels against a template, both (pixels, 3): 1 up to SHARP, 0 from LOST.

    LOST is no more than the distance of the best picture of one colour: a grey sheet is no city at night.
    """
    lost = max(0.02, min(LOST, math.sqrt(np.square(template - template.mean(0)).mean())))
    sharp = min(SHARP, lost / 2)
    distance = math.sqrt(np.square(seen - template).mean())
    return min(1.0, max(0.0, (lost - distance) / (lost - sharp)))


@cache
def templates() -> tuple[np.ndarray, ...]:
    """All T sprites: silhouettes (T, 256), pixels (T, 768), sums of their squares (T,); all scenes (V, 32, 32, 3)."""
    drawn = [sprite(subject) for subject in subjects()]
    silhouettes = np.stack([silhouette.reshape(-1) for _, silhouette in drawn]).astype(np.float32)
    pixels = np.stack([rgb.reshape(-1) for rgb, _ in drawn]).astype(np.float32) / 255
    backgrounds = np.stack([scene_picture(scene) for scene in scenes()]).astype(np.float32) / 255
    return silhouettes, pixels, np.square(pixels).sum(1), backgrounds


def pixels_of(image) -> np.ndarray:
    """Any PIL image or uint8 array as float32 (32, 32, 3) in [0, 1]; other sizes are averaged down."""
    image = (
        image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    ).convert("RGB")
    image = (
        image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX)
    )
    return np.asarray(image, np.float32) / 255


def nearest_subjects(
    picture: np.ndarray, background: np.ndarray
) -> dict[str, tuple[Subject | None, float]]:
    """For each place the nearest subject (None: nothing stands there) and the quality q of the match.

    With x the crop, b the scene behind it, s a sprite and m its silhouette, the squared distance to the composite
    is |m (x - s)|^2 + |(1 - m) (x - b)|^2 = |x - b|^2 + m (x^2 - (x - b)^2) - 2 x s + |s|^2: two matrix products.
    """
    silhouettes, pixels, squares, _ = templates()
    crops, behind = crops_of(picture), crops_of(background)  # (4, 256, 3)
    error = np.square(crops - behind).sum(-1)  # (4, 256)
    # (4, T)
    cost = (
        (np.square(crops).sum(-1) - error) @ silhouettes.T
        - 2 * crops.reshape(4, -1) @ pixels.T
        + squares
    )
    found = {}
    for place, crop, template, best, least in zip(
        PLACES, crops, behind, cost.argmin(1), cost.min(1)
    ):
        if least < 0:  # this subject explains the crop better than the empty scene
            template = np.where(
                silhouettes[best][:, None] > 0, pixels[best].reshape(-1, 3), template
            )
        found[place] = subjects()[best] if least < 0 else None, _quality(crop, template)
    return found


def crops_of(picture: np.ndarray) -> np.ndarray:
    """The four places of a picture (32, 32, 3) as (4, 256, 3)."""
    return picture.reshape(2, HALF, 2, HALF, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1, 3)


def _uncovered(standing: dict[str, Subject]) -> np.ndarray:
    """The pixels of the scene that the subjects at these places leave visible, bool (32, 32)."""
    visible = np.ones((SIZE, SIZE), bool)
    for place, subject in standing.items():
        y, x = corner_of(place)
        visible[y : y + HALF, x : x + HALF] = ~sprite(subject)[1]
    return visible


def judge(image, truth: Truth) -> Verdict:
    """Score a picture (PIL or uint8 array, any size) exactly, from its pixels, on OmniContext's scale of 0 to 10.

    Find the scene variant nearest to the pixels that the true things leave visible; then, at each place, the nearest
    of all subjects composited on that scene, or nothing. q is 1 for a sharp match and 0 for a lost one (`_quality`):
    over the 16 x 16 pixels of a place for a thing, over all pixels but the things found for the scene.

        PF = 10 * mean of   q * (kind right + colour right) / 2     for each thing asked, at its place
                            q(scene) * kind right                   for the scene
                            q(scene) * share of them empty          for the places that should be free, if any
        SC = 10 * mean of   q * kind right * share of its given attributes right        for each thing with given ones
                            q(scene) * kind right * share of palette, sun, detail right   for a scene of a reference
        Overall = sqrt(PF * SC)

    Hidden looks do not enter PF, and what only words say does not enter SC.
    """
    picture, backgrounds = pixels_of(image), templates()[3]
    visible = _uncovered({thing.place: thing.subject for thing in truth.things})
    weight = np.repeat(visible, 3).astype(np.float32)  # (3072,)
    flat = backgrounds.reshape(len(backgrounds), -1)  # (V, 3072)
    # the least |x - b|^2
    best = int((np.square(flat) @ weight - 2 * flat @ (weight * picture.reshape(-1))).argmin())
    scene, found = scenes()[best], nearest_subjects(picture, backgrounds[best])
    behind = _uncovered({place: subject for place, (subject, _) in found.items() if subject})
    scene_quality = _quality(picture[behind], backgrounds[best][behind])
    scene_right = scene_quality * (scene.kind == truth.scene.kind)

    following, consistent = [scene_right], []
    for thing in truth.things:
        subject, quality = found.pop(thing.place)
        kind_right = subject is not None and subject.kind == thing.subject.kind
        colour_right = subject is not None and subject.colour == thing.subject.colour
        following.append(quality * (kind_right + colour_right) / 2)
        if thing.given:
            wanted, seen = attributes(thing.subject), attributes(subject) if kind_right else {}
            consistent.append(
                quality * np.mean([seen.get(name) == wanted[name] for name in thing.given])
            )
    if found:  # the places that should be free
        following.append(
            scene_quality * np.mean([subject is None for subject, _ in found.values()])
        )
    if truth.scene_given:
        consistent.append(
            scene_right * np.mean([a == b for a, b in zip(scene.looks, truth.scene.looks)])
        )
    pf = 10 * float(np.mean(following))
    sc = 10 * float(np.mean(consistent)) if consistent else 10.0
    return Verdict(pf, sc, math.sqrt(pf * sc))
