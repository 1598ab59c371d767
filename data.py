"""
The toy world: samples drawn by Pillow, whose truth is known, and an exact judge (paper sections 2, 6 and 7).

A picture is 32 x 32 pixels: a scene, and up to four things of 16 x 16 at the four PLACES. Captions name the kind and
colour of a thing ("a man in red", "a blue ball") and the kind of a scene ("a meadow"); they leave out its LOOKS (hair,
face, accessory; pattern, accent; palette, sun, detail). So the text says what, and only the references say who.

    sample = draw_sample("train", index)      references + instruction -> IC-CoT -> target; a pure function, no state
    PF = 10 * mean over what was asked        things (kind, colour, place), the scene's kind, nothing else
    SC = 10 * mean over what references show  kind, looks, and colour unless the text changes it
    Overall = sqrt(PF * SC), a sample         the scale and the mean of OmniContext; `judge` has the formulas

Each identity (kind, colour, looks) and each scene variant belongs to one split for good, by a hash: no subject of a
held-out sample was ever seen in training. The seven tasks come in the paper's proportions (TASKS).
Left out: perspective, occlusion, more than four things. Captions never say what the instruction and the references
do not determine, so "caption exactly right" is a fair measure.

    python data.py --show                     draws out/samples.png: references, target, instruction, IC-CoT, judgement
    python data.py --show PATH                the same for samples on disk (shards.py)
    python data.py --check PATH               lists what is wrong with them
"""

import hashlib
import math
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import iccot
from config import UserError, exit_on_user_error, parse, with_path

SIZE, HALF = 32, 16  # pixels: a picture or scene; a thing or the reference picture of a subject
SPLITS = ("train", "held_out")
SALT = "81"  # of the hash that splits; chosen so that each kind of scene is in both
# fmt: off
TASKS = {"add": 15.1, "replace": 13.8, "attribute": 14.8, "scene": 13.8,                       # editing, per cent
         "subject": 14.4, "subject_composition": 15.9, "scene_composition": 12.2}              # generation
PLACES = ("top left", "top right", "bottom left", "bottom right")                              # in reading order
DEFAULT_PLACES = ("bottom left", "bottom right", "top left", "top right")   # who stands where when nobody says
# fmt: on

# fmt: off
COLOURS = {"red": (216, 48, 52), "yellow": (252, 214, 50), "green": (44, 160, 70), "blue": (50, 92, 220),
           "purple": (138, 62, 184), "pink": (250, 142, 196)}
CHARACTER_LOOKS = {
    "hair": {"black": (58, 50, 62), "brown": (172, 96, 40), "blond": (238, 200, 96), "silver": (196, 202, 214)},
    "face": {"light": (255, 226, 198), "tan": (222, 160, 112), "deep": (106, 62, 50)},
    "accessory": ("none", "glasses", "hat")}
OBJECT_LOOKS = {
    "pattern": ("plain", "stripes", "dots", "checks"),
    "accent": {"white": (255, 255, 255), "black": (44, 40, 52), "cyan": (110, 222, 228)}}
SCENE_LOOKS = {"palette": ("day", "dusk"), "sun": ("left", "right"), "detail": ("plain", "clouds", "stones")}
TINTS = ((250, 249, 244), (240, 246, 252), (252, 241, 241), (241, 250, 241))   # paper behind a reference subject
# fmt: on

# Sixteen sprites of 16 x 16 pixels, six a sheet. H hair, F face, C colour, c its shade, A accent; the rest is INK.
# A dark outline is added around each. Glasses and hat are laid over any character.
CHARACTERS = ("man", "woman", "robot", "cat", "bear", "rabbit")
OBJECTS = ("ball", "box", "cup", "star", "car", "fish", "tree", "house")
# fmt: off
INK = {"E": (34, 28, 44), "N": (196, 82, 92), "L": (70, 76, 112), "W": (236, 244, 250), "K": (40, 36, 50),
       "B": (128, 84, 52), "Y": (246, 150, 40), "M": (96, 40, 60), "G": (150, 214, 244)}
SCREENS = {"light": (206, 240, 250), "tan": (126, 206, 184), "deep": (62, 92, 136)}   # the face of a robot
OUTLINE = (48, 42, 58)
# fmt: on
SHEETS = (
    """
................ ................ ......NNNN...... ................ ................ ...HH......HH...
...HHHHHHHHHH... ...HHHHHHHHHH... .......HH....... ..HH........HH.. ..HHH......HHH.. ...HF......FH...
..HHHHHHHHHHHH.. ..HHHHHHHHHHHH.. ..HHHHHHHHHHHH.. ..HHH......HHH.. .HFFHHHHHHHHFFH. ...HF......FH...
..HHHHHHHHHHHH.. ..HHHHHHHHHHHH.. ..HHHHHHHHHHHH.. ..HFHHHHHHHHFH.. .HFFHHHHHHHHFFH. ...HFH....HFH...
..HHFFFFFFFFHH.. ..HHHFFFFFFHHH.. ..HFFFFFFFFFFH.. ..HHHHHHHHHHHH.. .HHHHHHHHHHHHHH. ..HHHHHHHHHHHH..
..HFFEFFFFEFFH.. ..HFFEFFFFEFFH.. .HHFEEFFFFEEFHH. ..HHHEHHHHEHHH.. .HHHHEHHHHEHHHH. ..HHHEHHHHEHHH..
..HFFEFFFFEFFH.. ..HFFEFFFFEFFH.. .HHFEEFFFFEEFHH. ..HHHEHHHHEHHH.. .HHHHEFFFFEHHHH. ..HHHEHHHHEHHH..
...FFFFFFFFFF... ..HFFFFFFFFFFH.. ..HFFFFFFFFFFH.. ..HFFFFFFFFFFH.. ..HHHFFNNFFHHH.. ..HHFFFNNFFFHH..
...FFFNNNNFFF... ..HHFFNNNNFFHH.. ..HFFNNNNNNFFH.. ..HFFFFNNFFFFH.. ..HHFFFNNFFFHH.. ..HFFFFFFFFFFH..
....FFFFFFFF.... ..HH.FFFFFF.HH.. ..HHHHHHHHHHHH.. ...FFFFFFFFFF... ...HFFFFFFFFH... ...HFFFFFFFFH...
...CCCCCCCCCC... ..HHCCCCCCCCHH.. ......LLLL...... ...CCCCCCCCCC... ..CCCCCCCCCCCC.. ...CCCCCCCCCC...
..CCCCCCCCCCCC.. ..H.CCCCCCCC.H.. ..CCCCCCCCCCCC.. ..CCCCCCCCCCCC.. .HCCCCCCCCCCCCH. ..CCCCCCCCCCCC..
..CCCCCCCCCCCC.. ...FCCCCCCCCF... .HCCCWWWWWWCCCH. ..HCCCCCCCCCCH.. .HCCCCCCCCCCCCH. ..HCCCCCCCCCCH..
..FcCCCCCCCCcF.. ...CCCCCCCCCC... .HCCCCCCCCCCCCH. ..HCCCCCCCCCCH.. .HcCCCCCCCCCCcH. ..HcCCCCCCCCcH..
....LLLLLLLL.... ..cCCCCCCCCCCc.. ..CCCCCCCCCCCC.. ...CCCCCCCCCC... ..HHHH....HHHH.. ...CCCCCCCCCC...
....LL....LL.... ..ccFFccccFFcc.. ...LLL....LLL... ...HHH....HHH... ..HHHH....HHHH.. ..HHHH....HHHH..
""",
    """
................ ................ ................ ................ ................ ................
................ ....AA....AA.... ................ .......CC....... ................ ................
.....CCCCCC..... ...AA.A..A.AA... ..AAAAAAAAA..... .......CC....... ................ ......AAA.......
....CCCCCCCC.... ....AAAAAAAA.... ..AAAAAAAAA..... ......CCCC...... ....CCCCCCC..... .....AAAA.......
...CCAACCCCCC... ..CCCCCAACCCCC.. ..CCCCCCCCC..... ......CCCC...... ...CCCCCCCCC.... ...CCCCCCC...c..
..CCAAACCCCCCC.. ..CCCCCAACCCCC.. ..CCCCCCCCCccc.. .CCCCCCCCCCCCCC. ...CAACCAACC.... ..CCCCCCCCC.cc..
..CCAACCCCCCCC.. ..cccccAAccccc.. ..CCCCCCCCC..cc. ..CCCCAAAACCCC.. ..CCAACCAACCC... .CCCECCCCCCCcc..
..CCACCCCCCCCC.. ................ ..CCCCCCCCC...c. ...CCAAAAAACC... ..CCAACCAACCCC.. .CCCECCCCCCCcc..
..CCCCCCCCCCCC.. ..CCCCCAACCCCC.. ..CCCCCCCCC...c. ....CCAAAACC.... .CCCCCCCCCCCCCC. .CCCCCCCCCCCcc..
..CCCCCCCCCCCC.. ..CCCCCAACCCCC.. ..CCCCCCCCC..cc. ....CCCCCCCC.... .CCCCCCCCCCCCCW. .CCCCCCAACCCcc..
..CCCCCCCCCCCC.. ..CCCCCAACCCCC.. ..CCCCCCCCCccc.. ...CCCCCCCCCC... .CCCCCCCCCCCCCW. ..CCCCCAACC.cc..
...CCCCCCCCCC... ..CCCCCAACCCCC.. ..CCCCCCCCC..... ...CCCCCCCCCC... .CCKKKCCCCKKKCC. ...CCCCCCC...c..
....CCCCCCCC.... ..CCCCCAACCCCC.. ..CCCCCCCCC..... ..CCCC....CCCC.. ..KKWKK..KKWKK.. .....AAA........
.....CCCCCC..... ..CCCCCAACCCCC.. ...CCCCCCC...... ..CCC......CCC.. ...KKK....KKK... ......AA........
................ ..CCCCCAACCCCC.. ..ccccccccc..... ..C..........C.. ................ ................
................ ................ ................ ................ ................ ................
""",
    """
......CCCC...... .......AA....... ................ .....YYYYYY.....
....CCCCCCCC.... ......AAAA...... ................ .....YYYYYY.....
...CCCCCCACCC... .....AAAAAA..... ................ .....MMMMMM.....
..CCAACCCCCCCC.. ....AAAAAAAA.... ................ ...YYYYYYYYYY...
..CCAACCCCCCCC.. ...AAAAAAAAAA... ...KKKKKKKKKK... ................
.CCCCCCCCCCCCCC. ..AAAAAAAAAAAA.. ...KGEGKKGEGK... ................
.CCCCCCCCAACCCC. .AAAAAAAAAAAAAA. ...KGEGKKGEGK... ................
.CCCCCCCCAACCCC. ..CCCCCCCCCCCC.. ....KKK..KKK.... ................
..CCCAACCCCCCC.. ..CCCCCCCCCCCC.. ................ ................
...CCCCCCCCCC... ..CWWCCCCCCWWC.. ................ ................
....CCBBBBCC.... ..CWWCBBBBCWWC.. ................ ................
......BBBB...... ..CCCCBBBBCCCC.. ................ ................
......BBBB...... ..CCCCBBBBCCCC.. ................ ................
......BBBB...... ..CCCCBBBBCCCC.. ................ ................
.....BBBBBB..... ..CCCCBBBBCCCC.. ................ ................
................ ................ ................ ................
""",
)

# A scene: its preposition, then for each palette the colours of sky, backdrop, ground and detail.
# fmt: off
SCENES = {
    "meadow": ("in", ((150, 208, 250), (92, 168, 92), (140, 206, 92), (250, 250, 255)),
                     ((252, 190, 140), (110, 130, 70), (160, 164, 76), (255, 226, 190))),
    "beach": ("on", ((176, 230, 255), (44, 140, 206), (246, 222, 158), (255, 255, 255)),
                    ((244, 150, 150), (96, 88, 170), (218, 172, 138), (255, 206, 190))),
    "desert": ("in", ((252, 232, 180), (204, 118, 60), (232, 168, 84), (255, 255, 255)),
                     ((222, 108, 84), (112, 54, 64), (176, 98, 66), (250, 190, 150))),
    "city": ("in", ((26, 30, 72), (62, 70, 116), (92, 94, 108), (120, 128, 170)),
                   ((92, 44, 104), (50, 28, 72), (122, 88, 112), (160, 100, 140))),
    "snowfield": ("in", ((180, 212, 242), (136, 168, 200), (248, 251, 255), (255, 255, 255)),
                        ((142, 156, 208), (96, 104, 166), (206, 214, 246), (184, 196, 240))),
    "forest": ("in", ((132, 176, 130), (30, 92, 56), (92, 122, 58), (190, 214, 150)),
                     ((96, 132, 140), (16, 50, 54), (66, 84, 58), (150, 184, 176))),
}
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# what there is to know about a picture


@dataclass(frozen=True)
class Subject:
    """One identity. `looks` are hidden from captions: hair, face, accessory; or pattern, accent."""

    kind: str
    colour: str
    looks: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """One background. `looks` are hidden from captions: palette, sun, detail."""

    kind: str
    looks: tuple[str, str, str]


@dataclass(frozen=True)
class Thing:
    """A subject at a place. `given` names the attributes that the references show: SC asks for these alone."""

    place: str
    subject: Subject
    given: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """All of a target. `scene_given`: a reference shows the scene; if not, words name its kind, its looks are free."""

    scene: Scene
    # those of an edited picture in reading order, then in the order of the words
    things: tuple[Thing, ...]
    scene_given: bool


@dataclass(frozen=True)
class Sample:
    """RGB pictures. references: 16 x 16 for a subject, 32 x 32 for a scene or a picture to edit; target: 32 x 32."""

    key: str
    task: str
    references: tuple[Image.Image, ...]
    instruction: str
    plan: iccot.ICCoT
    target: Image.Image
    truth: Truth | None = None  # known only of what the toy world drew


@dataclass(frozen=True)
class Verdict:
    """Each from 0 to 10."""

    pf: float
    sc: float
    overall: float


def looks_of(kind: str) -> dict:
    """The hidden attributes of a kind of thing and the values each may take."""
    return CHARACTER_LOOKS if kind in CHARACTERS else OBJECT_LOOKS


def attributes(subject: Subject) -> dict[str, str]:
    """Everything but the kind: colour and hidden looks, by name."""
    return {"colour": subject.colour, **dict(zip(looks_of(subject.kind), subject.looks))}


def _thing(place: str, subject: Subject, unknown: str = "") -> Thing:
    """A thing known from references, except for the attribute `unknown`."""
    return Thing(place, subject, tuple(name for name in attributes(subject) if name != unknown))


@cache
def subjects() -> tuple[Subject, ...]:
    """Every identity of the world: 6 x 6 x 36 characters and 8 x 6 x 12 objects."""
    return tuple(
        Subject(kind, colour, looks)
        for kind in CHARACTERS + OBJECTS
        for colour in COLOURS
        for looks in product(*looks_of(kind).values())
    )


@cache
def scenes() -> tuple[Scene, ...]:
    """Every scene variant of the world: 6 x 12."""
    return tuple(Scene(kind, looks) for kind in SCENES for looks in product(*SCENE_LOOKS.values()))


@cache
def split_of(identity: Subject | Scene) -> str:
    """The one split in which an identity or scene variant occurs: one in six, by a stable hash, is held out."""
    words = (SALT, identity.kind, getattr(identity, "colour", "scene"), *identity.looks)
    return SPLITS[hashlib.sha256(" ".join(words).encode()).digest()[0] % 6 == 0]


# ---------------------------------------------------------------------------------------------------------------------
# drawing


def _letters(kind: str) -> np.ndarray:
    """One sprite of SHEETS as characters, (16, 16)."""
    index = (CHARACTERS + OBJECTS + ("glasses", "hat")).index(kind)
    rows = SHEETS[index // 6].split("\n")[1:17]
    return np.array([list(row.split()[index % 6]) for row in rows])


@cache
def sprite(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """A subject as (rgb uint8 (16, 16, 3), silhouette bool (16, 16)); outside the silhouette rgb is 0."""
    letters, looks = _letters(subject.kind), attributes(subject)
    colour = COLOURS[subject.colour]
    ink = {**INK, "C": colour, "c": tuple(value * 3 // 4 for value in colour)}
    if subject.kind in CHARACTERS:
        ink["H"] = CHARACTER_LOOKS["hair"][looks["hair"]]
        ink["F"] = (SCREENS if subject.kind == "robot" else CHARACTER_LOOKS["face"])[looks["face"]]
        if looks["accessory"] != "none":
            over = _letters(looks["accessory"])
            letters = np.where(over == ".", letters, over)
    else:
        y, x = np.mgrid[:HALF, :HALF]
        pattern = {
            "plain": x < 0,
            "stripes": y % 4 == 3,
            "dots": (x % 4 % 3 > 0) & (y % 4 % 3 > 0),
            "checks": (x // 2 + y // 2) % 2 == 0,
        }[looks["pattern"]]
        ink["A"] = OBJECT_LOOKS["accent"][looks["accent"]]
        letters = np.where((letters == "C") & pattern, "A", letters)
    inside = np.pad(letters != ".", 1)
    around = inside[:-2, 1:-1] | inside[2:, 1:-1] | inside[1:-1, :-2] | inside[1:-1, 2:]
    silhouette = inside[1:-1, 1:-1] | around
    rgb = np.zeros((HALF, HALF, 3), np.uint8)
    rgb[silhouette] = OUTLINE
    for letter, value in ink.items():
        rgb[letters == letter] = value
    return rgb, silhouette


def _backdrop(pen: ImageDraw.ImageDraw, kind: str, fill: tuple, ground: tuple) -> None:
    """What stands between sky and ground, which begins at row 14."""
    if kind == "meadow":
        pen.ellipse((-12, 9, 16, 26), fill)
        pen.ellipse((14, 11, 42, 26), fill)
    elif kind == "beach":
        pen.rectangle((0, 11, 31, 20), fill)
    elif kind == "desert":
        pen.polygon(((0, 13), (9, 8), (22, 14), (31, 10), (31, 18), (0, 18)), fill)
    elif kind == "city":
        for left, top in ((0, 9), (5, 5), (10, 11), (14, 7), (19, 4), (23, 10), (28, 6)):
            pen.rectangle((left, top, left + 3, 20), fill)
            pen.point(
                ((left + 1, top + 2), (left + 2, top + 4), (left + 1, top + 6)), (250, 214, 110)
            )
    elif kind == "snowfield":
        pen.polygon(((-8, 18), (4, 5), (15, 18)), fill)
        pen.polygon(((9, 18), (19, 7), (29, 18)), fill)
        pen.polygon(((22, 18), (33, 6), (40, 18)), fill)
    elif kind == "forest":
        for x in range(-1, 34, 6):
            pen.polygon(((x - 5, 18), (x + 1, 1 + x % 4), (x + 6, 18)), fill)
    pen.rectangle((0, 19 if kind == "beach" else 17 if kind == "city" else 15, 31, 31), ground)


@cache
def scene_picture(scene: Scene) -> np.ndarray:
    """An empty scene, uint8 (32, 32, 3)."""
    palette, sun, detail = scene.looks
    sky, backdrop, ground, extra = SCENES[scene.kind][1 + SCENE_LOOKS["palette"].index(palette)]
    image = Image.new("RGB", (SIZE, SIZE), sky)
    pen = ImageDraw.Draw(image)
    x = 3 if sun == "left" else 28
    pen.ellipse((x - 4, -1, x + 4, 7), (255, 224, 92) if palette == "day" else (255, 244, 226))
    if detail == "clouds":
        pen.rectangle((10, 1, 21, 3), extra)
        pen.rectangle((13, 0, 18, 5), extra)
    _backdrop(pen, scene.kind, backdrop, ground)
    if detail == "stones":
        shade = tuple(value * 2 // 3 for value in ground)
        for left, top in ((0, 22), (14, 21), (29, 24), (7, 30), (15, 28), (24, 30)):
            pen.rectangle((left, top, left + 2, top + 1), shade)
    return np.asarray(image)


def _corner(place: str) -> tuple[int, int]:
    """Row and column of the first pixel of a place."""
    return HALF * (PLACES.index(place) // 2), HALF * (PLACES.index(place) % 2)


def draw(truth: Truth) -> np.ndarray:
    """Render a Truth, uint8 (32, 32, 3)."""
    picture = scene_picture(truth.scene).copy()
    for thing in truth.things:
        rgb, silhouette = sprite(thing.subject)
        y, x = _corner(thing.place)
        np.copyto(picture[y : y + HALF, x : x + HALF], rgb, where=silhouette[..., None])
    return picture


def _portrait(rng: np.random.Generator, subject: Subject) -> np.ndarray:
    """The reference picture of a subject, on plain paper of a random tint, uint8 (16, 16, 3)."""
    rgb, silhouette = sprite(subject)
    return np.where(silhouette[..., None], rgb, np.uint8(_pick(rng, TINTS)))


# ---------------------------------------------------------------------------------------------------------------------
# words


def phrase(subject: Subject) -> str:
    """What a caption says of a subject: "a man in red", "a blue ball"."""
    if subject.kind in CHARACTERS:
        return f"a {subject.kind} in {subject.colour}"
    return f"a {subject.colour} {subject.kind}"


def _listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def caption(truth: Truth) -> str:
    """Kinds, colours, places and the scene; no hidden looks."""
    things = [f"{phrase(thing.subject)} at the {thing.place}" for thing in truth.things]
    return (
        f"A {truth.scene.kind} with {_listing(things)}."
        if things
        else f"An empty {truth.scene.kind}."
    )


def wrong_captions(truth: Truth, rng: np.random.Generator, count: int) -> list[str]:
    """`count` different captions, each with exactly one fact changed: a colour, a kind, a place or the scene."""

    def change(**fields):
        things = list(truth.things)
        things[index] = replace(thing, **fields)
        return caption(Truth(truth.scene, tuple(things), truth.scene_given))

    found = [caption(truth)]
    taken = [thing.subject.kind for thing in truth.things]
    free = [place for place in PLACES if place not in [thing.place for thing in truth.things]]
    for _ in range(1000):
        if len(found) > count:
            return found[1:]
        fact = _pick(rng, ("colour", "kind", "place", "scene")[0 if truth.things else 3 :])
        index = int(rng.integers(max(1, len(truth.things))))
        thing = truth.things[index] if truth.things else None
        if fact == "scene":
            words = caption(
                replace(truth, scene=replace(truth.scene, kind=_pick(rng, tuple(SCENES))))
            )
        elif fact == "colour":
            words = change(subject=replace(thing.subject, colour=_pick(rng, tuple(COLOURS))))
        elif fact == "kind":
            kind = _pick(rng, CHARACTERS + OBJECTS)
            words = found[0] if kind in taken else change(subject=replace(thing.subject, kind=kind))
        else:
            words = change(place=_pick(rng, free)) if free else found[0]
        if words not in found:
            found.append(words)
    raise ValueError(
        f"{count} wrong captions asked of {found[0]!r}, which has about {len(found) - 1}; ask for fewer"
    )


@dataclass(frozen=True)
class Wording:
    """How an instruction speaks: `style`, and "the first image" (ordinal) or "image 1"."""

    style: str  # instructive, descriptive or vague
    ordinal: bool

    def image(self, number: int) -> str:
        return f"the {iccot.ORDINALS[number - 1]} image" if self.ordinal else f"image {number}"

    def placed(self, things: list[Thing], first: int, named: bool = True) -> str:
        """Things from the images `first`, `first` + 1, ... and their places, in the wording's style."""
        words = []
        for number, thing in enumerate(things, first):
            if self.style == "descriptive":
                who = phrase(thing.subject) + (f" ({self.image(number)})" if named else "")
            else:
                who = f"{'the one' if words else 'the thing'} of {self.image(number)}"
            words.append(f"{who} at the {thing.place}")
        return _listing(words)


# ---------------------------------------------------------------------------------------------------------------------
# the seven tasks; each returns (references as arrays, instruction, relations, truth)
#
# An edit keeps what it does not change, so all of that counts as shown by image 1. Vague wordings rely on
# DEFAULT_PLACES, in the order of the references, or on there being one thing only.


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


@cache
def _pool(split: str, kind: type) -> tuple:
    return tuple(
        one for one in (subjects() if kind is Subject else scenes()) if split_of(one) == split
    )


def _cast(rng: np.random.Generator, split: str, count: int, taken: tuple = ()) -> list[Subject]:
    """`count` subjects of different kinds, none of a kind in `taken`, so that "the ball" always means one thing."""
    cast: list[Subject] = []
    while len(cast) < count:
        subject = _pick(rng, _pool(split, Subject))
        if subject.kind not in taken and all(subject.kind != other.kind for other in cast):
            cast.append(subject)
    return cast


def _source(rng: np.random.Generator, split: str, count: int) -> Truth:
    """A picture to edit: `count` things at random places."""
    places = sorted(rng.permutation(4)[:count])
    things = [_thing(PLACES[i], subject) for i, subject in zip(places, _cast(rng, split, count))]
    return Truth(_pick(rng, _pool(split, Scene)), tuple(things), True)


def _add(rng, split, wording, max_references):
    added = 2 if max_references > 2 and rng.random() < 0.25 else 1
    source = _source(rng, split, int(rng.integers(1, 3)))
    taken = [thing.place for thing in source.things]
    free = [place for place in DEFAULT_PLACES if place not in taken]
    if wording.style != "vague":
        free = [free[i] for i in rng.permutation(len(free))]
    cast = _cast(rng, split, added, tuple(thing.subject.kind for thing in source.things))
    things = [_thing(place, subject) for place, subject in zip(free, cast)]
    one, placed = wording.image(1), wording.placed(things, 2)
    words = {
        "instructive": f"Add {placed} to {one}.",
        "descriptive": f"The picture of {one} with {placed}.",
        "vague": _pick(
            rng, (f"Add {'it' if added == 1 else 'them'} to {one}.", f"Complete {one}.")
        ),
    }
    relations = ["The rest is consistent with image_1."]
    relations += [f"The {subject.kind} is from image_{i}." for i, subject in enumerate(cast, 2)]
    truth = Truth(source.scene, (*source.things, *things), True)
    return (
        [draw(source)] + [_portrait(rng, subject) for subject in cast],
        words[wording.style],
        relations,
        truth,
    )


def _replace(rng, split, wording, max_references):
    source = _source(rng, split, 1 if wording.style == "vague" else int(rng.integers(1, 4)))
    things = list(source.things)
    index = int(rng.integers(len(things)))
    old = things[index]
    (new,) = _cast(rng, split, 1, tuple(thing.subject.kind for thing in things))
    things[index] = _thing(old.place, new)
    one, two = wording.image(1), wording.image(2)
    name = _pick(rng, (f"the {old.subject.kind}", f"the thing at the {old.place}"))
    words = {
        "instructive": f"Replace {name} of {one} with the thing of {two}.",
        "descriptive": f"The picture of {one} with {phrase(new)} ({two}) instead of {name}.",
        "vague": _pick(rng, (f"Put the thing of {two} in its place.", f"Swap it for {two}.")),
    }[wording.style]
    relations = ["The rest is consistent with image_1.", f"The {new.kind} is from image_2."]
    return (
        [draw(source), _portrait(rng, new)],
        words,
        relations,
        Truth(source.scene, tuple(things), True),
    )


@cache
def _edits(subject: Subject, name: str) -> tuple[Subject, ...]:
    """The subjects of the same split that differ in one attribute, colour or pattern, alone."""
    if name == "colour":
        changed = (replace(subject, colour=colour) for colour in COLOURS)
    else:
        changed = (
            replace(subject, looks=(pattern, subject.looks[1]))
            for pattern in OBJECT_LOOKS["pattern"]
        )
    return tuple(one for one in changed if one != subject and split_of(one) == split_of(subject))


def _attribute(rng, split, wording, max_references):
    name = "pattern" if rng.random() < 0.4 else "colour"
    while True:  # until some thing of the source may change and stay in the split
        source = _source(rng, split, 1 if wording.style == "vague" else int(rng.integers(1, 4)))
        old = _pick(rng, source.things)
        if (name == "colour" or old.subject.kind in OBJECTS) and _edits(old.subject, name):
            break
    new = _pick(rng, _edits(old.subject, name))
    kind, one, two = new.kind, wording.image(1), wording.image(2)
    who = (
        _pick(rng, (f"the {kind}", f"the thing at the {old.place}"))
        if wording.style != "vague"
        else "it"
    )
    references, relations = [draw(source)], ["The rest is consistent with image_1."]
    if name == "pattern":
        while (owner := _pick(rng, _pool(split, Subject))).kind not in OBJECTS or owner.looks[
            0
        ] != new.looks[0]:
            pass
        references.append(_portrait(rng, owner))
        relations.append(f"The pattern of the {kind} is from image_2.")
        words = {
            "instructive": f"Give {who} of {one} the pattern of {two}.",
            "vague": f"Use the pattern of {two}.",
            "descriptive": f"The picture of {one} where {who} has the pattern of {two}.",
        }[wording.style]
    else:
        words = {
            "instructive": f"Make {who} of {one} {new.colour}.",
            "vague": f"Make it {new.colour}.",
            "descriptive": f"The picture of {one} where {who} is {new.colour}.",
        }[wording.style]
    things = [
        _thing(old.place, new, "colour" if name == "colour" else "") if thing is old else thing
        for thing in source.things
    ]
    return references, words, relations, Truth(source.scene, tuple(things), True)


def _scene(rng, split, wording, max_references):
    source = _source(rng, split, int(rng.integers(1, 4)))
    while (scene := _pick(rng, _pool(split, Scene))).kind == source.scene.kind:
        pass
    who = _listing([f"the {thing.subject.kind}" for thing in source.things])
    one, two = wording.image(1), wording.image(2)
    words = {
        "instructive": f"Move everything of {one} into the scene of {two}.",
        "descriptive": f"{who} of {one} in the scene of {two}.",
        "vague": _pick(rng, ("Change the scene.", f"Go to {two}.")),
    }[wording.style]
    relations = [
        f"{_capital(who)} {'is' if len(source.things) == 1 else 'are'} from image_1.",
        "The scene is consistent with image_2.",
    ]
    return [draw(source), scene_picture(scene)], words, relations, replace(source, scene=scene)


def _compose(rng, split, wording, max_references, fewest, most, scene_given):
    """`fewest` to `most` subjects; beyond four references, objects may also take the pattern of one more reference."""
    cast = _cast(rng, split, int(rng.integers(fewest, min(most, max_references - scene_given) + 1)))
    places = DEFAULT_PLACES if wording.style == "vague" else [PLACES[i] for i in rng.permutation(4)]
    references = [_portrait(rng, subject) for subject in cast]
    relations = [f"The {subject.kind} is from image_{i}." for i, subject in enumerate(cast, 1)]
    patterns = ""
    for i, subject in enumerate(cast):
        if max_references > max(4, len(references) + scene_given) and subject.kind in OBJECTS:
            owner = _pick(rng, [one for one in _pool(split, Subject) if one.kind in OBJECTS])
            changed = replace(subject, looks=(owner.looks[0], subject.looks[1]))
            if changed != subject and split_of(changed) == split:
                cast[i] = changed
                references.append(_portrait(rng, owner))
                number = len(references)
                relations.append(f"The pattern of the {subject.kind} is from image_{number}.")
                patterns += f" The {subject.kind} has the pattern of {wording.image(number)}."
    things = [_thing(place, subject) for place, subject in zip(places, cast)]
    scene = _pick(rng, _pool(split, Scene))
    where = f"{SCENES[scene.kind][0]} a {scene.kind}"
    if scene_given:
        references.append(scene_picture(scene))
        where = f"in the scene of {wording.image(len(references))}"
        relations.append(f"The scene is consistent with image_{len(references)}.")
    placed = wording.placed(things, 1, named=rng.random() < 0.7)
    together = ("Put it", "It is") if len(cast) == 1 else ("Put them together", "They meet")
    words = {
        "instructive": f"{_pick(rng, ('Put', 'Draw'))} {placed}, {where}.",
        "descriptive": f"{placed}, {where}.",
        "vague": f"{_pick(rng, together)} {where}.",
    }[wording.style]
    return references, words + patterns, relations, Truth(scene, tuple(things), scene_given)


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _check(split: str, max_references: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose from {', '.join(SPLITS)}")
    if not 2 <= max_references <= 9:
        raise ValueError(
            f"max_references={max_references} is outside 2 to 9, what the toy world can ask for"
        )


def draw_sample(split: str, index: int, seed: int = 0, max_references: int = 4) -> Sample:
    """Sample number `index` of a split: a pure function of its arguments, so any position can be resumed at.

    max_references: 2 to 9; up to 4 the tasks are the paper's. ValueError for a bad split or number.
    """
    _check(split, max_references)
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    ends = np.cumsum(tuple(TASKS.values()))
    task = tuple(TASKS)[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]
    wording = Wording(_pick(rng, ("instructive", "descriptive", "vague")), bool(rng.random() < 0.4))
    if task in ("add", "replace", "attribute", "scene"):
        make = {"add": _add, "replace": _replace, "attribute": _attribute, "scene": _scene}[task]
        references, words, relations, truth = make(rng, split, wording, max_references)
    else:
        most = min(max_references - 1, len(PLACES))
        fewest, most, scene_given = {
            "subject": (1, 1, False),
            "subject_composition": (2, max(2, most), False),
            "scene_composition": (1, most, True),
        }[task]
        references, words, relations, truth = _compose(
            rng, split, wording, max_references, fewest, most, scene_given
        )
    return Sample(
        f"{split}-{seed}-{index:08d}",
        task,
        tuple(Image.fromarray(one) for one in references),
        _capital(words),
        iccot.ICCoT(caption(truth), tuple(relations)),
        Image.fromarray(draw(truth)),
        truth,
    )


def enlarged(sample: Sample, scale: int) -> Sample:
    """The same sample with every pixel `scale` x `scale` pixels wide; the judge averages them down again."""
    grow = lambda image: image.resize(
        (image.width * scale, image.height * scale), Image.Resampling.NEAREST
    )
    return replace(
        sample, references=tuple(map(grow, sample.references)), target=grow(sample.target)
    )


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
def _templates() -> tuple[np.ndarray, ...]:
    """All T sprites: silhouettes (T, 256), pixels (T, 768), sums of their squares (T,); all scenes (V, 32, 32, 3)."""
    drawn = [sprite(subject) for subject in subjects()]
    silhouettes = np.stack([silhouette.reshape(-1) for _, silhouette in drawn]).astype(np.float32)
    pixels = np.stack([rgb.reshape(-1) for rgb, _ in drawn]).astype(np.float32) / 255
    backgrounds = np.stack([scene_picture(scene) for scene in scenes()]).astype(np.float32) / 255
    return silhouettes, pixels, np.square(pixels).sum(1), backgrounds


def _pixels(image) -> np.ndarray:
    """Any PIL image or uint8 array as float32 (32, 32, 3) in [0, 1]; other sizes are averaged down."""
    image = (
        image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    ).convert("RGB")
    image = (
        image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX)
    )
    return np.asarray(image, np.float32) / 255


def _nearest(
    picture: np.ndarray, background: np.ndarray
) -> dict[str, tuple[Subject | None, float]]:
    """For each place the nearest subject (None: nothing stands there) and the quality q of the match.

    With x the crop, b the scene behind it, s a sprite and m its silhouette, the squared distance to the composite
    is |m (x - s)|^2 + |(1 - m) (x - b)|^2 = |x - b|^2 + m (x^2 - (x - b)^2) - 2 x s + |s|^2: two matrix products.
    """
    silhouettes, pixels, squares, _ = _templates()
    crops, behind = _places(picture), _places(background)  # (4, 256, 3)
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


def _places(picture: np.ndarray) -> np.ndarray:
    """The four places of a picture (32, 32, 3) as (4, 256, 3)."""
    return picture.reshape(2, HALF, 2, HALF, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1, 3)


def _uncovered(standing: dict[str, Subject]) -> np.ndarray:
    """The pixels of the scene that the subjects at these places leave visible, bool (32, 32)."""
    visible = np.ones((SIZE, SIZE), bool)
    for place, subject in standing.items():
        y, x = _corner(place)
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
    picture, backgrounds = _pixels(image), _templates()[3]
    visible = _uncovered({thing.place: thing.subject for thing in truth.things})
    weight = np.repeat(visible, 3).astype(np.float32)  # (3072,)
    flat = backgrounds.reshape(len(backgrounds), -1)  # (V, 3072)
    # the least |x - b|^2
    best = int((np.square(flat) @ weight - 2 * flat @ (weight * picture.reshape(-1))).argmin())
    scene, found = scenes()[best], _nearest(picture, backgrounds[best])
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


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer of the toys

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def train_tokenizer(folder, vocab_size: int = 1024):
    """Train a byte-level BPE on 2000 train samples, save it into `folder`, and return it as `load_tokenizer` does.

    vocab_size: the most tokens; the toy world needs fewer. ValueError if it cannot even hold the bytes.

    Text is cut at white space only, so that tags fuse with their neighbours as in Qwen2.5 ("<out_caption>A" is one
    token); the think and field tags are ordinary text. Every byte is in the vocabulary: any unicode round-trips.
    """
    # slow to import: only here
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from pretrained import load_tokenizer

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size={vocab_size} is too small; {256 + len(SPECIAL_TOKENS)} hold the bytes alone"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    samples = (draw_sample("train", index, max_references=4 + index % 2) for index in range(2000))
    tokenizer.train_from_iterator(
        (text for one in samples for text in (one.instruction, iccot.render(one.plan))), trainer
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return load_tokenizer(folder)


# ---------------------------------------------------------------------------------------------------------------------
# looking at it


@dataclass(frozen=True)
class Config:
    show: bool = False  # draw a sheet of samples
    check: bool = False  # read every sample at `path`, list what is wrong; then status 1
    path: str = ""  # samples on disk; "": the toy world (--show PATH)
    split: str = "train"  # train or held_out
    index: int = 0  # number of the first sample to look at
    count: int = 21  # samples to show, evenly of the seven tasks
    seed: int = 0  # of the samples
    max_references: int = 4  # most reference images of a sample, 2 to 9
    out: str = "out/samples.png"  # where the sheet goes

    def __post_init__(self):
        if self.count < 1 or self.index < 0 or self.seed < 0:
            raise ValueError(
                f"count={self.count}, index={self.index}, seed={self.seed}: "
                "count must be positive, index and seed not negative"
            )
        if Path(self.out).suffix.lower() != ".png":
            raise ValueError(
                f"out={self.out}: the sheet is a PNG file; give a name that ends in .png"
            )
        if self.check and not self.path:
            raise ValueError(
                "check needs samples on disk: --check PATH; those of the toy world are drawn and right"
            )
        _check(self.split, self.max_references)


PRESETS = {"toy": {}}


def picture_sheet(samples: list[Sample], side: int = 128) -> Image.Image:
    """One row a sample: references, target, and in words task, judgement, instruction and IC-CoT."""
    cell = side + 8
    columns = max(len(sample.references) for sample in samples)
    sheet = Image.new("RGB", (cell * (columns + 1) + 640, cell * len(samples) + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, sample in enumerate(samples):
        top = 8 + row * cell
        for column, image in enumerate(sample.references):
            sheet.paste(fitted(image, side), (8 + column * cell, top))
        left = 8 + columns * cell
        pen.rectangle((left - 4, top - 4, left + cell - 5, top + cell - 5), fill=(40, 40, 40))
        sheet.paste(fitted(sample.target, side), (left, top))
        verdict = judge(sample.target, sample.truth) if sample.truth else None
        judged = (
            f"   (target: PF {verdict.pf:.1f}, SC {verdict.sc:.1f})"
            if verdict
            else f"   {sample.key}"
        )
        lines = [
            sample.task + judged,
            *textwrap.wrap(sample.instruction, 92),
            *textwrap.wrap("> " + sample.plan.caption, 92),
            *(f"> {i}: {relation}" for i, relation in enumerate(sample.plan.relations, 1)),
        ]
        for i, line in enumerate(lines[: side // 15]):
            colour = (
                (150, 150, 150) if i == 0 else (0, 90, 60) if line.startswith(">") else (0, 0, 0)
            )
            pen.text((left + cell + 8, top + 15 * i), line, fill=colour, font=font)
    return sheet


def fitted(image: Image.Image, side: int) -> Image.Image:
    """A toy picture enlarged four times, so that subjects keep their size beside scenes; any other fitted."""
    if max(image.size) <= SIZE:
        return image.resize(
            (image.width * side // SIZE, image.height * side // SIZE), Image.Resampling.NEAREST
        )
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _first_of_each_task(config: Config) -> list[Sample]:
    """`count` toy samples from `index` on, evenly of the seven tasks."""
    shown: dict[str, list[Sample]] = {task: [] for task in TASKS}
    index = config.index
    while sum(map(len, shown.values())) < config.count:
        sample = draw_sample(config.split, index, config.seed, config.max_references)
        if len(shown[sample.task]) < math.ceil(config.count / len(TASKS)):
            shown[sample.task].append(sample)
        index += 1
    return [sample for group in shown.values() for sample in group]


def _check_all(path: str) -> None:
    """Print what is wrong with the samples at `path`; exit status 1 if anything is."""
    from tqdm import tqdm

    from shards import Source, problems_of

    source = Source(path)
    bar = tqdm(range(len(source)), disable=None, desc="check")
    problems = [problem for number in bar for problem in problems_of(source, number)]
    for problem in problems:
        print(problem)
    print(f"{path}: {len(source)} samples, {len(problems)} problems")
    if problems:
        sys.exit(1)


def arguments(argv: list[str]) -> list[str]:
    """`--show PATH` and `--check PATH` in the parser's words."""
    return with_path(argv, ("--show", "--check"), 0, "--path")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, arguments(sys.argv[1:] if argv is None else argv))
    if not config.show and not config.check:
        parse(Config, PRESETS, ["--help"])
    with exit_on_user_error():
        if config.check:
            _check_all(config.path)
        if config.show:
            if config.path:
                from shards import Source

                source = Source(config.path, config.seed)
                samples = [
                    source.sample(i)
                    for i in range(config.index, min(len(source), config.index + config.count))
                ]
                if not samples:
                    raise UserError(
                        f"--index={config.index}: {config.path} holds {len(source)} samples"
                    )
            else:
                samples = _first_of_each_task(config)
            out = Path(config.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            picture_sheet(samples).save(out)
            print(
                f"wrote {out}: {len(samples)} samples of {config.path or f'the {config.split} split'}"
            )


if __name__ == "__main__":
    main()
