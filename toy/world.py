"""
The toy world: what there is in it, and how it is drawn.

A picture is 32 x 32 pixels: a scene, and up to four things of 16 x 16 at the four PLACES.

    subject    kind, colour, looks     16 x 16, outlined; alone on tinted paper it is a reference
    scene      kind, looks             32 x 32, empty
    thing      place, subject          a subject where it stands in a picture
    truth      scene, things           all that a picture shows: draw(truth) paints it

A caption names the kind and colour of a thing ("a man in red", "a blue ball") and the kind of a
scene ("a meadow"). It leaves out the looks (hair, face, accessory; pattern, accent; palette, sun,
detail). So the text says what, and only the references say who.

Each identity (kind, colour, looks) and each scene variant belongs to one split for good, by a
hash: no subject of a held-out sample was ever seen in training.

Left out: perspective, occlusion, more than four things.

    python data.py --show                          a sheet of samples
    draw(Truth(scenes()[0], (known_thing("top left", subjects()[0]),), scene_given=True))
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

SIZE, HALF = 32, 16  # pixels: a picture or scene; a thing or the reference picture of a subject
SPLITS = ("train", "held_out")
SALT = "81"  # of the hash that splits; chosen so that each kind of scene is in both

PLACES = ("top left", "top right", "bottom left", "bottom right")  # in reading order
# who stands where when nobody says
DEFAULT_PLACES = ("bottom left", "bottom right", "top left", "top right")

CHARACTERS = ("man", "woman", "robot", "cat", "bear", "rabbit")
OBJECTS = ("ball", "box", "cup", "star", "car", "fish", "tree", "house")

# fmt: off
COLOURS = {"red": (216, 48, 52), "yellow": (252, 214, 50), "green": (44, 160, 70),
           "blue": (50, 92, 220), "purple": (138, 62, 184), "pink": (250, 142, 196)}

CHARACTER_LOOKS = {
    "hair": {"black": (58, 50, 62), "brown": (172, 96, 40), "blond": (238, 200, 96),
             "silver": (196, 202, 214)},
    "face": {"light": (255, 226, 198), "tan": (222, 160, 112), "deep": (106, 62, 50)},
    "accessory": ("none", "glasses", "hat")}
OBJECT_LOOKS = {
    "pattern": ("plain", "stripes", "dots", "checks"),
    "accent": {"white": (255, 255, 255), "black": (44, 40, 52), "cyan": (110, 222, 228)}}
SCENE_LOOKS = {"palette": ("day", "dusk"), "sun": ("left", "right"),
               "detail": ("plain", "clouds", "stones")}

# A scene: its preposition, then for each palette the colours of sky, backdrop, ground and detail.
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

# the paper behind a reference subject
TINTS = ((250, 249, 244), (240, 246, 252), (252, 241, 241), (241, 250, 241))
# the letters of SHEETS whose colour never changes
INK = {"E": (34, 28, 44), "N": (196, 82, 92), "L": (70, 76, 112), "W": (236, 244, 250),
       "K": (40, 36, 50), "B": (128, 84, 52), "Y": (246, 150, 40), "M": (96, 40, 60),
       "G": (150, 214, 244)}
# the face of a robot
SCREENS = {"light": (206, 240, 250), "tan": (126, 206, 184), "deep": (62, 92, 136)}
OUTLINE = (48, 42, 58)
# fmt: on

# Sixteen sprites of 16 x 16 pixels, four a sheet: CHARACTERS, OBJECTS, glasses, hat. H hair,
# F face, C colour, c its shade, A accent; the rest is INK. A dark outline is added around each.
# Glasses and hat are laid over any character.
SHEETS = (
    """
................ ................ ......NNNN...... ................
...HHHHHHHHHH... ...HHHHHHHHHH... .......HH....... ..HH........HH..
..HHHHHHHHHHHH.. ..HHHHHHHHHHHH.. ..HHHHHHHHHHHH.. ..HHH......HHH..
..HHHHHHHHHHHH.. ..HHHHHHHHHHHH.. ..HHHHHHHHHHHH.. ..HFHHHHHHHHFH..
..HHFFFFFFFFHH.. ..HHHFFFFFFHHH.. ..HFFFFFFFFFFH.. ..HHHHHHHHHHHH..
..HFFEFFFFEFFH.. ..HFFEFFFFEFFH.. .HHFEEFFFFEEFHH. ..HHHEHHHHEHHH..
..HFFEFFFFEFFH.. ..HFFEFFFFEFFH.. .HHFEEFFFFEEFHH. ..HHHEHHHHEHHH..
...FFFFFFFFFF... ..HFFFFFFFFFFH.. ..HFFFFFFFFFFH.. ..HFFFFFFFFFFH..
...FFFNNNNFFF... ..HHFFNNNNFFHH.. ..HFFNNNNNNFFH.. ..HFFFFNNFFFFH..
....FFFFFFFF.... ..HH.FFFFFF.HH.. ..HHHHHHHHHHHH.. ...FFFFFFFFFF...
...CCCCCCCCCC... ..HHCCCCCCCCHH.. ......LLLL...... ...CCCCCCCCCC...
..CCCCCCCCCCCC.. ..H.CCCCCCCC.H.. ..CCCCCCCCCCCC.. ..CCCCCCCCCCCC..
..CCCCCCCCCCCC.. ...FCCCCCCCCF... .HCCCWWWWWWCCCH. ..HCCCCCCCCCCH..
..FcCCCCCCCCcF.. ...CCCCCCCCCC... .HCCCCCCCCCCCCH. ..HCCCCCCCCCCH..
....LLLLLLLL.... ..cCCCCCCCCCCc.. ..CCCCCCCCCCCC.. ...CCCCCCCCCC...
....LL....LL.... ..ccFFccccFFcc.. ...LLL....LLL... ...HHH....HHH...
""",
    """
................ ...HH......HH... ................ ................
..HHH......HHH.. ...HF......FH... ................ ....AA....AA....
.HFFHHHHHHHHFFH. ...HF......FH... .....CCCCCC..... ...AA.A..A.AA...
.HFFHHHHHHHHFFH. ...HFH....HFH... ....CCCCCCCC.... ....AAAAAAAA....
.HHHHHHHHHHHHHH. ..HHHHHHHHHHHH.. ...CCAACCCCCC... ..CCCCCAACCCCC..
.HHHHEHHHHEHHHH. ..HHHEHHHHEHHH.. ..CCAAACCCCCCC.. ..CCCCCAACCCCC..
.HHHHEFFFFEHHHH. ..HHHEHHHHEHHH.. ..CCAACCCCCCCC.. ..cccccAAccccc..
..HHHFFNNFFHHH.. ..HHFFFNNFFFHH.. ..CCACCCCCCCCC.. ................
..HHFFFNNFFFHH.. ..HFFFFFFFFFFH.. ..CCCCCCCCCCCC.. ..CCCCCAACCCCC..
...HFFFFFFFFH... ...HFFFFFFFFH... ..CCCCCCCCCCCC.. ..CCCCCAACCCCC..
..CCCCCCCCCCCC.. ...CCCCCCCCCC... ..CCCCCCCCCCCC.. ..CCCCCAACCCCC..
.HCCCCCCCCCCCCH. ..CCCCCCCCCCCC.. ...CCCCCCCCCC... ..CCCCCAACCCCC..
.HCCCCCCCCCCCCH. ..HCCCCCCCCCCH.. ....CCCCCCCC.... ..CCCCCAACCCCC..
.HcCCCCCCCCCCcH. ..HcCCCCCCCCcH.. .....CCCCCC..... ..CCCCCAACCCCC..
..HHHH....HHHH.. ...CCCCCCCCCC... ................ ..CCCCCAACCCCC..
..HHHH....HHHH.. ..HHHH....HHHH.. ................ ................
""",
    """
................ ................ ................ ................
................ .......CC....... ................ ................
..AAAAAAAAA..... .......CC....... ................ ......AAA.......
..AAAAAAAAA..... ......CCCC...... ....CCCCCCC..... .....AAAA.......
..CCCCCCCCC..... ......CCCC...... ...CCCCCCCCC.... ...CCCCCCC...c..
..CCCCCCCCCccc.. .CCCCCCCCCCCCCC. ...CAACCAACC.... ..CCCCCCCCC.cc..
..CCCCCCCCC..cc. ..CCCCAAAACCCC.. ..CCAACCAACCC... .CCCECCCCCCCcc..
..CCCCCCCCC...c. ...CCAAAAAACC... ..CCAACCAACCCC.. .CCCECCCCCCCcc..
..CCCCCCCCC...c. ....CCAAAACC.... .CCCCCCCCCCCCCC. .CCCCCCCCCCCcc..
..CCCCCCCCC..cc. ....CCCCCCCC.... .CCCCCCCCCCCCCW. .CCCCCCAACCCcc..
..CCCCCCCCCccc.. ...CCCCCCCCCC... .CCCCCCCCCCCCCW. ..CCCCCAACC.cc..
..CCCCCCCCC..... ...CCCCCCCCCC... .CCKKKCCCCKKKCC. ...CCCCCCC...c..
..CCCCCCCCC..... ..CCCC....CCCC.. ..KKWKK..KKWKK.. .....AAA........
...CCCCCCC...... ..CCC......CCC.. ...KKK....KKK... ......AA........
..ccccccccc..... ..C..........C.. ................ ................
................ ................ ................ ................
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


# --------------------------------------------------------------------------------------------------
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
    """A subject at a place. `given`: the attributes that references show, all that SC asks for."""

    place: str
    subject: Subject
    given: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """All of a target.

    things: those of an edited picture in reading order, then in the order of the words.
    scene_given: a reference shows the scene; if not, words name its kind and its looks are free.
    """

    scene: Scene
    things: tuple[Thing, ...]
    scene_given: bool


def looks_of(kind: str) -> dict:
    """The hidden attributes of a kind of thing and the values each may take."""
    return CHARACTER_LOOKS if kind in CHARACTERS else OBJECT_LOOKS


def attributes(subject: Subject) -> dict[str, str]:
    """Everything but the kind: colour and hidden looks, by name."""
    return {"colour": subject.colour, **dict(zip(looks_of(subject.kind), subject.looks))}


def known_thing(place: str, subject: Subject, unknown: str = "") -> Thing:
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
    """The one split an identity or scene variant occurs in: one in six, by a hash, is held out."""
    words = (SALT, identity.kind, getattr(identity, "colour", "scene"), *identity.looks)
    return SPLITS[hashlib.sha256(" ".join(words).encode()).digest()[0] % 6 == 0]


def pick(rng: np.random.Generator, items):
    """One of the items, each as likely: one number of `rng`."""
    return items[int(rng.integers(len(items)))]


# --------------------------------------------------------------------------------------------------
# drawing


def _letters(kind: str) -> np.ndarray:
    """One sprite of SHEETS as characters, (16, 16)."""
    index = (CHARACTERS + OBJECTS + ("glasses", "hat")).index(kind)
    rows = SHEETS[index // 4].split("\n")[1:17]
    return np.array([list(row.split()[index % 4]) for row in rows])


@cache
def sprite(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """A subject: rgb uint8 (16, 16, 3), 0 outside the silhouette; silhouette bool (16, 16)."""
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
        ink["A"] = OBJECT_LOOKS["accent"][looks["accent"]]
        letters = np.where((letters == "C") & _pattern(looks["pattern"]), "A", letters)
    inside = np.pad(letters != ".", 1)
    around = inside[:-2, 1:-1] | inside[2:, 1:-1] | inside[1:-1, :-2] | inside[1:-1, 2:]
    silhouette = inside[1:-1, 1:-1] | around
    rgb = np.zeros((HALF, HALF, 3), np.uint8)
    rgb[silhouette] = OUTLINE
    for letter, value in ink.items():
        rgb[letters == letter] = value
    return rgb, silhouette


def _pattern(name: str) -> np.ndarray:
    """Where a pattern has its accent, bool (16, 16)."""
    y, x = np.mgrid[:HALF, :HALF]
    return {
        "plain": x < 0,
        "stripes": y % 4 == 3,
        "dots": (x % 4 % 3 > 0) & (y % 4 % 3 > 0),
        "checks": (x // 2 + y // 2) % 2 == 0,
    }[name]


def _backdrop(pen: ImageDraw.ImageDraw, kind: str, fill: tuple, *, ground: tuple) -> None:
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
            windows = ((left + 1, top + 2), (left + 2, top + 4), (left + 1, top + 6))
            pen.point(windows, (250, 214, 110))
    elif kind == "snowfield":
        pen.polygon(((-8, 18), (4, 5), (15, 18)), fill)
        pen.polygon(((9, 18), (19, 7), (29, 18)), fill)
        pen.polygon(((22, 18), (33, 6), (40, 18)), fill)
    elif kind == "forest":
        for x in range(-1, 34, 6):
            pen.polygon(((x - 5, 18), (x + 1, 1 + x % 4), (x + 6, 18)), fill)
    pen.rectangle((0, {"beach": 19, "city": 17}.get(kind, 15), 31, 31), ground)


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
    _backdrop(pen, scene.kind, backdrop, ground=ground)
    if detail == "stones":
        shade = tuple(value * 2 // 3 for value in ground)
        for left, top in ((0, 22), (14, 21), (29, 24), (7, 30), (15, 28), (24, 30)):
            pen.rectangle((left, top, left + 2, top + 1), shade)
    return np.asarray(image)


def corner_of(place: str) -> tuple[int, int]:
    """Row and column of the first pixel of a place."""
    return HALF * (PLACES.index(place) // 2), HALF * (PLACES.index(place) % 2)


def draw(truth: Truth) -> np.ndarray:
    """Paint a Truth, uint8 (32, 32, 3)."""
    picture = scene_picture(truth.scene).copy()
    for thing in truth.things:
        rgb, silhouette = sprite(thing.subject)
        y, x = corner_of(thing.place)
        # a view: (16, 16, 3)
        np.copyto(picture[y : y + HALF, x : x + HALF], rgb, where=silhouette[..., None])
    return picture


def portrait(rng: np.random.Generator, subject: Subject) -> np.ndarray:
    """The reference picture of a subject, on plain paper of a random tint, uint8 (16, 16, 3)."""
    rgb, silhouette = sprite(subject)
    return np.where(silhouette[..., None], rgb, np.uint8(pick(rng, TINTS)))  # (16, 16, 3)
