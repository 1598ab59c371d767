"""
The seven tasks of the paper in the toy world: references, instruction, IC-CoT and target that belong together.

    sample = draw_sample("train", index)      a pure function of split, index and seed: no state, any order

The tasks come in the paper's proportions (iccot.TASKS), instructions in instructive, descriptive and vague wordings.
Captions never say what the instruction and the references do not determine, so "caption exactly right" is a fair
measure. Left out: more than nine references.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from PIL import Image

import iccot
from iccot import TASKS, Sample
from toy.world import (
    CHARACTERS,
    COLOURS,
    DEFAULT_PLACES,
    OBJECT_LOOKS,
    OBJECTS,
    PLACES,
    SCENES,
    SPLITS,
    Scene,
    Subject,
    Thing,
    Truth,
    draw,
    known_thing,
    pick,
    portrait,
    scene_picture,
    scenes,
    split_of,
    subjects,
)

# ---------------------------------------------------------------------------------------------------------------------
# words


def phrase(subject: Subject) -> str:
    """What a caption says of a subject: "a man in red", "a blue ball"."""
    if subject.kind in CHARACTERS:
        return f"a {subject.kind} in {subject.colour}"
    return f"a {subject.colour} {subject.kind}"


def listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def caption(truth: Truth) -> str:
    """Kinds, colours, places and the scene; no hidden looks."""
    things = [f"{phrase(thing.subject)} at the {thing.place}" for thing in truth.things]
    return (
        f"A {truth.scene.kind} with {listing(things)}."
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
        fact = pick(rng, ("colour", "kind", "place", "scene")[0 if truth.things else 3 :])
        index = int(rng.integers(max(1, len(truth.things))))
        thing = truth.things[index] if truth.things else None
        if fact == "scene":
            words = caption(
                replace(truth, scene=replace(truth.scene, kind=pick(rng, tuple(SCENES))))
            )
        elif fact == "colour":
            words = change(subject=replace(thing.subject, colour=pick(rng, tuple(COLOURS))))
        elif fact == "kind":
            kind = pick(rng, CHARACTERS + OBJECTS)
            words = found[0] if kind in taken else change(subject=replace(thing.subject, kind=kind))
        else:
            words = change(place=pick(rng, free)) if free else found[0]
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
        return listing(words)


@cache
def pool_of(split: str, kind: type) -> tuple:
    return tuple(
        one for one in (subjects() if kind is Subject else scenes()) if split_of(one) == split
    )


def _cast(rng: np.random.Generator, split: str, count: int, taken: tuple = ()) -> list[Subject]:
    """`count` subjects of different kinds, none of a kind in `taken`, so that "the ball" always means one thing."""
    cast: list[Subject] = []
    while len(cast) < count:
        subject = pick(rng, pool_of(split, Subject))
        if subject.kind not in taken and all(subject.kind != other.kind for other in cast):
            cast.append(subject)
    return cast


def picture_to_edit(rng: np.random.Generator, split: str, count: int) -> Truth:
    """A picture to edit: `count` things at random places."""
    places = sorted(rng.permutation(4)[:count])
    things = [
        known_thing(PLACES[i], subject) for i, subject in zip(places, _cast(rng, split, count))
    ]
    return Truth(pick(rng, pool_of(split, Scene)), tuple(things), True)


def _add(rng, split, wording, max_references):
    added = 2 if max_references > 2 and rng.random() < 0.25 else 1
    source = picture_to_edit(rng, split, int(rng.integers(1, 3)))
    taken = [thing.place for thing in source.things]
    free = [place for place in DEFAULT_PLACES if place not in taken]
    if wording.style != "vague":
        free = [free[i] for i in rng.permutation(len(free))]
    cast = _cast(rng, split, added, tuple(thing.subject.kind for thing in source.things))
    things = [known_thing(place, subject) for place, subject in zip(free, cast)]
    one, placed = wording.image(1), wording.placed(things, 2)
    words = {
        "instructive": f"Add {placed} to {one}.",
        "descriptive": f"The picture of {one} with {placed}.",
        "vague": pick(rng, (f"Add {'it' if added == 1 else 'them'} to {one}.", f"Complete {one}.")),
    }
    relations = ["The rest is consistent with image_1."]
    relations += [f"The {subject.kind} is from image_{i}." for i, subject in enumerate(cast, 2)]
    truth = Truth(source.scene, (*source.things, *things), True)
    return (
        [draw(source)] + [portrait(rng, subject) for subject in cast],
        words[wording.style],
        relations,
        truth,
    )


def _replace(rng, split, wording, max_references):
    source = picture_to_edit(rng, split, 1 if wording.style == "vague" else int(rng.integers(1, 4)))
    things = list(source.things)
    index = int(rng.integers(len(things)))
    old = things[index]
    (new,) = _cast(rng, split, 1, tuple(thing.subject.kind for thing in things))
    things[index] = known_thing(old.place, new)
    one, two = wording.image(1), wording.image(2)
    name = pick(rng, (f"the {old.subject.kind}", f"the thing at the {old.place}"))
    words = {
        "instructive": f"Replace {name} of {one} with the thing of {two}.",
        "descriptive": f"The picture of {one} with {phrase(new)} ({two}) instead of {name}.",
        "vague": pick(rng, (f"Put the thing of {two} in its place.", f"Swap it for {two}.")),
    }[wording.style]
    relations = ["The rest is consistent with image_1.", f"The {new.kind} is from image_2."]
    return (
        [draw(source), portrait(rng, new)],
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
        source = picture_to_edit(
            rng, split, 1 if wording.style == "vague" else int(rng.integers(1, 4))
        )
        old = pick(rng, source.things)
        if (name == "colour" or old.subject.kind in OBJECTS) and _edits(old.subject, name):
            break
    new = pick(rng, _edits(old.subject, name))
    kind, one, two = new.kind, wording.image(1), wording.image(2)
    who = (
        pick(rng, (f"the {kind}", f"the thing at the {old.place}"))
        if wording.style != "vague"
        else "it"
    )
    references, relations = [draw(source)], ["The rest is consistent with image_1."]
    if name == "pattern":
        while (owner := pick(rng, pool_of(split, Subject))).kind not in OBJECTS or owner.looks[
            0
        ] != new.looks[0]:
            pass
        references.append(portrait(rng, owner))
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
        known_thing(old.place, new, "colour" if name == "colour" else "") if thing is old else thing
        for thing in source.things
    ]
    return references, words, relations, Truth(source.scene, tuple(things), True)


def _scene(rng, split, wording, max_references):
    source = picture_to_edit(rng, split, int(rng.integers(1, 4)))
    while (scene := pick(rng, pool_of(split, Scene))).kind == source.scene.kind:
        pass
    who = listing([f"the {thing.subject.kind}" for thing in source.things])
    one, two = wording.image(1), wording.image(2)
    words = {
        "instructive": f"Move everything of {one} into the scene of {two}.",
        "descriptive": f"{who} of {one} in the scene of {two}.",
        "vague": pick(rng, ("Change the scene.", f"Go to {two}.")),
    }[wording.style]
    relations = [
        f"{capitalised(who)} {'is' if len(source.things) == 1 else 'are'} from image_1.",
        "The scene is consistent with image_2.",
    ]
    return [draw(source), scene_picture(scene)], words, relations, replace(source, scene=scene)


def _compose(rng, split, wording, max_references, fewest, most, scene_given):
    """`fewest` to `most` subjects; beyond four references, objects may also take the pattern of one more reference."""
    cast = _cast(rng, split, int(rng.integers(fewest, min(most, max_references - scene_given) + 1)))
    places = DEFAULT_PLACES if wording.style == "vague" else [PLACES[i] for i in rng.permutation(4)]
    references = [portrait(rng, subject) for subject in cast]
    relations = [f"The {subject.kind} is from image_{i}." for i, subject in enumerate(cast, 1)]
    patterns = ""
    for i, subject in enumerate(cast):
        if max_references > max(4, len(references) + scene_given) and subject.kind in OBJECTS:
            owner = pick(rng, [one for one in pool_of(split, Subject) if one.kind in OBJECTS])
            changed = replace(subject, looks=(owner.looks[0], subject.looks[1]))
            if changed != subject and split_of(changed) == split:
                cast[i] = changed
                references.append(portrait(rng, owner))
                number = len(references)
                relations.append(f"The pattern of the {subject.kind} is from image_{number}.")
                patterns += f" The {subject.kind} has the pattern of {wording.image(number)}."
    things = [known_thing(place, subject) for place, subject in zip(places, cast)]
    scene = pick(rng, pool_of(split, Scene))
    where = f"{SCENES[scene.kind][0]} a {scene.kind}"
    if scene_given:
        references.append(scene_picture(scene))
        where = f"in the scene of {wording.image(len(references))}"
        relations.append(f"The scene is consistent with image_{len(references)}.")
    placed = wording.placed(things, 1, named=rng.random() < 0.7)
    together = ("Put it", "It is") if len(cast) == 1 else ("Put them together", "They meet")
    words = {
        "instructive": f"{pick(rng, ('Put', 'Draw'))} {placed}, {where}.",
        "descriptive": f"{placed}, {where}.",
        "vague": f"{pick(rng, together)} {where}.",
    }[wording.style]
    return references, words + patterns, relations, Truth(scene, tuple(things), scene_given)


def capitalised(words: str) -> str:
    return words[0].upper() + words[1:]


def check_request(split: str, max_references: int) -> None:
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
    check_request(split, max_references)
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    ends = np.cumsum(tuple(TASKS.values()))
    task = tuple(TASKS)[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]
    wording = Wording(pick(rng, ("instructive", "descriptive", "vague")), bool(rng.random() < 0.4))
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
        capitalised(words),
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


class Drawn(torch.utils.data.Dataset):
    """The toy world as a source: position p is sample p of a split, `scale` times as large as it is drawn."""

    def __init__(self, split, seed, max_references, scale=1):
        self.split, self.seed, self.max_references, self.scale = split, seed, max_references, scale

    def __getitem__(self, position):
        return enlarged(
            draw_sample(self.split, int(position), self.seed, self.max_references), self.scale
        )
