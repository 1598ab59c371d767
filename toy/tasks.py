"""
The seven tasks of the paper in the toy world: references, instruction, IC-CoT and target that
belong together.

    add                  a picture, 1 or 2 subjects    the subjects stand in it too
    replace              a picture, a subject          it stands where another one stood
    attribute            a picture, maybe an object    a thing has another colour, or its pattern
    scene                a picture, a scene            all things of the picture in that scene
    subject              a subject                     it stands in a scene of words
    subject_composition  subjects                      they stand together in a scene of words
    scene_composition    subjects, a scene             they stand together in that scene

An edit (the first four) keeps what it does not change, so all of that counts as shown by image 1.
Instructions are instructive, descriptive or vague. Vague ones rely on DEFAULT_PLACES, in the order
of the references, or on there being one thing only. Captions never say what the instruction and
the references do not determine, so "caption exactly right" is a fair measure.

The tasks come in the paper's proportions (iccot.TASKS). Each draws from `ask.rng` in a fixed order:
the samples of a published run must never change.

Beyond four references, the most that the paper's tasks have, a composition may take looks from
pictures of their own: the pattern of an object; of ten, an accent, hair or an accessory too.
Left out: more than ten references, instructions that a language model wrote.

    sample = draw_sample("train", index)    a function of split, index and seed: no state, any order
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

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
    looks_of,
    pick,
    portrait,
    scene_picture,
    scenes,
    split_of,
    subjects,
)

REST = "The rest is consistent with image_1."  # the first relation of an edit

ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()

MOST_REFERENCES = 10  # of a sample, here and in the data that there is (MACRO)

# what a reference of its own may show of a thing: first this, then that
LENT = {OBJECTS: ("pattern", "accent"), CHARACTERS: ("hair", "accessory")}


# --------------------------------------------------------------------------------------------------
# words


def phrase(subject: Subject) -> str:
    """What a caption says of a subject: "a man in red", "a blue ball"."""
    if subject.kind in CHARACTERS:
        return f"a {subject.kind} in {subject.colour}"
    return f"a {subject.colour} {subject.kind}"


def listing(items: list[str]) -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def capitalised(words: str) -> str:
    """The words with a capital at the beginning, the others as they are."""
    return words[0].upper() + words[1:]


def caption(truth: Truth) -> str:
    """Kinds, colours, places and the scene; no hidden looks."""
    things = [f"{phrase(thing.subject)} at the {thing.place}" for thing in truth.things]
    if not things:
        return f"An empty {truth.scene.kind}."
    return f"A {truth.scene.kind} with {listing(things)}."


def wrong_captions(truth: Truth, rng: np.random.Generator, count: int) -> list[str]:
    """`count` different captions, each with exactly one fact changed: colour, kind, place or scene.

    ValueError if the world has too few of them.
    """
    captions = [caption(truth)]
    for _ in range(1000):
        if len(captions) > count:
            return captions[1:]
        fact = pick(rng, ("colour", "kind", "place", "scene")[0 if truth.things else 3 :])
        words = caption(one_fact_changed(truth, fact, rng))
        if words not in captions:
            captions.append(words)
    raise ValueError(
        f"{count} wrong captions asked of {captions[0]!r}, which has about {len(captions) - 1}; "
        "ask for fewer"
    )


def one_fact_changed(truth: Truth, fact: str, rng: np.random.Generator) -> Truth:
    """The truth with another colour, kind or place of a random thing, without it ("missing"), or
    with another scene; itself where that cannot be.
    """
    index = int(rng.integers(max(1, len(truth.things))))
    if fact == "scene":
        scene = replace(truth.scene, kind=pick(rng, tuple(SCENES)))
        return replace(truth, scene=scene)
    if not truth.things:
        return truth
    thing, changed = truth.things[index], []
    if fact == "colour":
        subject = replace(thing.subject, colour=pick(rng, tuple(COLOURS)))
        changed = [replace(thing, subject=subject)]
    elif fact == "kind":
        kind = pick(rng, CHARACTERS + OBJECTS)
        if kind in [other.subject.kind for other in truth.things]:
            return truth
        changed = [replace(thing, subject=replace(thing.subject, kind=kind))]
    elif fact == "place":
        taken = [other.place for other in truth.things]
        free = [place for place in PLACES if place not in taken]
        if not free:
            return truth
        changed = [replace(thing, place=pick(rng, free))]
    things = (*truth.things[:index], *changed, *truth.things[index + 1 :])
    return replace(truth, things=things)


@dataclass(frozen=True)
class Wording:
    """How an instruction speaks: `style`, and "the first image" (ordinal) or "image 1"."""

    style: str  # instructive, descriptive or vague
    ordinal: bool

    def image(self, number: int) -> str:
        """The name of reference `number`, from 1."""
        return f"the {ORDINALS[number - 1]} image" if self.ordinal else f"image {number}"

    def placed(self, things: Sequence[Thing], first: int, named: bool = True) -> str:
        """Things from the images `first`, `first` + 1, ... and their places, in this style."""
        words = []
        for number, thing in enumerate(things, first):
            if self.style == "descriptive":
                who = phrase(thing.subject) + (f" ({self.image(number)})" if named else "")
            else:
                who = f"{'the one' if words else 'the thing'} of {self.image(number)}"
            words.append(f"{who} at the {thing.place}")
        return listing(words)


# --------------------------------------------------------------------------------------------------
# who takes part


@cache
def pool_of(split: str, kind: type) -> tuple:
    """All identities of a split: kind is Subject or Scene."""
    world = subjects() if kind is Subject else scenes()
    return tuple(identity for identity in world if split_of(identity) == split)


def _cast(rng: np.random.Generator, split: str, count: int, *, taken: tuple = ()) -> list[Subject]:
    """`count` subjects of different kinds, none in `taken`: "the ball" always means one thing."""
    cast: list[Subject] = []
    while len(cast) < count:
        subject = pick(rng, pool_of(split, Subject))
        if subject.kind not in taken and all(subject.kind != other.kind for other in cast):
            cast.append(subject)
    return cast


def picture_to_edit(rng: np.random.Generator, split: str, count: int) -> Truth:
    """A picture to edit: `count` things at random places."""
    places = sorted(rng.permutation(4)[:count])
    cast = _cast(rng, split, count)
    things = tuple(known_thing(PLACES[i], subject) for i, subject in zip(places, cast))
    return Truth(pick(rng, pool_of(split, Scene)), things, True)


# --------------------------------------------------------------------------------------------------
# the seven tasks


@dataclass(frozen=True)
class Ask:
    """What a sample is drawn from."""

    rng: np.random.Generator
    split: str
    wording: Wording
    max_references: int

    def source(self, most: int) -> Truth:
        """A picture to edit with 1 to `most` things."""
        return picture_to_edit(self.rng, self.split, int(self.rng.integers(1, most + 1)))

    def source_of_a_change(self) -> Truth:
        """The same with 1 to 3 things; just one if the wording is vague, which cannot tell them."""
        if self.wording.style == "vague":
            return picture_to_edit(self.rng, self.split, 1)
        return self.source(3)


@dataclass(frozen=True)
class Draft:
    """A sample before it has its key and its caption."""

    references: list[np.ndarray]  # uint8 (32, 32, 3), or (16, 16, 3) of a subject
    instruction: str
    relations: list[str]
    truth: Truth


def _add(ask: Ask) -> Draft:
    rng, wording = ask.rng, ask.wording
    added = 2 if ask.max_references > 2 and rng.random() < 0.25 else 1
    source = ask.source(2)
    taken = [thing.place for thing in source.things]
    free = [place for place in DEFAULT_PLACES if place not in taken]
    if wording.style != "vague":
        free = [free[i] for i in rng.permutation(len(free))]
    kinds = tuple(thing.subject.kind for thing in source.things)
    cast = _cast(rng, ask.split, added, taken=kinds)
    things = [known_thing(place, subject) for place, subject in zip(free, cast)]
    first, placed = wording.image(1), wording.placed(things, 2)
    words = {
        "instructive": f"Add {placed} to {first}.",
        "descriptive": f"The picture of {first} with {placed}.",
        "vague": pick(
            rng, (f"Add {'it' if added == 1 else 'them'} to {first}.", f"Complete {first}.")
        ),
    }[wording.style]
    relations = [REST]
    relations += [f"The {subject.kind} is from image_{i}." for i, subject in enumerate(cast, 2)]
    references = [draw(source)] + [portrait(rng, subject) for subject in cast]
    return Draft(references, words, relations, replace(source, things=(*source.things, *things)))


def _replace(ask: Ask) -> Draft:
    rng, wording = ask.rng, ask.wording
    source = ask.source_of_a_change()
    things = list(source.things)
    index = int(rng.integers(len(things)))
    old = things[index]
    (new,) = _cast(rng, ask.split, 1, taken=tuple(thing.subject.kind for thing in things))
    things[index] = known_thing(old.place, new)
    first, second = wording.image(1), wording.image(2)
    name = pick(rng, (f"the {old.subject.kind}", f"the thing at the {old.place}"))
    words = {
        "instructive": f"Replace {name} of {first} with the thing of {second}.",
        "descriptive": f"The picture of {first} with {phrase(new)} ({second}) instead of {name}.",
        "vague": pick(rng, (f"Put the thing of {second} in its place.", f"Swap it for {second}.")),
    }[wording.style]
    references = [draw(source), portrait(rng, new)]
    relations = [REST, f"The {new.kind} is from image_2."]
    return Draft(references, words, relations, replace(source, things=tuple(things)))


@cache
def _edits(subject: Subject, name: str) -> tuple[Subject, ...]:
    """The subjects of the same split that differ in one attribute, colour or pattern, alone."""
    if name == "colour":
        changed = [replace(subject, colour=colour) for colour in COLOURS]
    else:
        accent = subject.looks[1]
        changed = [replace(subject, looks=(pattern, accent)) for pattern in OBJECT_LOOKS["pattern"]]
    return tuple(
        other for other in changed if other != subject and split_of(other) == split_of(subject)
    )


def _attribute(ask: Ask) -> Draft:
    rng, wording = ask.rng, ask.wording
    name = "pattern" if rng.random() < 0.4 else "colour"
    while True:  # until some thing of the source may change and stay in the split
        source = ask.source_of_a_change()
        old = pick(rng, source.things)
        if (name == "colour" or old.subject.kind in OBJECTS) and _edits(old.subject, name):
            break
    new = pick(rng, _edits(old.subject, name))
    kind, first, second = new.kind, wording.image(1), wording.image(2)
    who = "it"
    if wording.style != "vague":
        who = pick(rng, (f"the {kind}", f"the thing at the {old.place}"))
    references, relations = [draw(source)], [REST]
    if name == "pattern":
        references.append(portrait(rng, _owner(ask, new.looks[0])))
        relations.append(f"The pattern of the {kind} is from image_2.")
        words = {
            "instructive": f"Give {who} of {first} the pattern of {second}.",
            "vague": f"Use the pattern of {second}.",
            "descriptive": f"The picture of {first} where {who} has the pattern of {second}.",
        }[wording.style]
    else:
        words = {
            "instructive": f"Make {who} of {first} {new.colour}.",
            "vague": f"Make it {new.colour}.",
            "descriptive": f"The picture of {first} where {who} is {new.colour}.",
        }[wording.style]
    changed = known_thing(old.place, new, "colour" if name == "colour" else "")
    things = tuple(changed if thing is old else thing for thing in source.things)
    return Draft(references, words, relations, replace(source, things=things))


def _owner(ask: Ask, pattern: str) -> Subject:
    """An object that has this pattern."""
    while True:
        owner = pick(ask.rng, pool_of(ask.split, Subject))
        if owner.kind in OBJECTS and owner.looks[0] == pattern:
            return owner


def _scene(ask: Ask) -> Draft:
    rng, wording = ask.rng, ask.wording
    source = ask.source(3)
    while (scene := pick(rng, pool_of(ask.split, Scene))).kind == source.scene.kind:
        pass
    who = listing([f"the {thing.subject.kind}" for thing in source.things])
    first, second = wording.image(1), wording.image(2)
    words = {
        "instructive": f"Move everything of {first} into the scene of {second}.",
        "descriptive": f"{who} of {first} in the scene of {second}.",
        "vague": pick(rng, ("Change the scene.", f"Go to {second}.")),
    }[wording.style]
    relations = [
        f"{capitalised(who)} {'is' if len(source.things) == 1 else 'are'} from image_1.",
        "The scene is consistent with image_2.",
    ]
    references = [draw(source), scene_picture(scene)]
    return Draft(references, words, relations, replace(source, scene=scene))


def _subject(ask: Ask) -> Draft:
    return _compose(ask, 1, 1)


def _subject_composition(ask: Ask) -> Draft:
    return _compose(ask, 2, max(2, min(ask.max_references - 1, len(PLACES))))


def _scene_composition(ask: Ask) -> Draft:
    return _compose(ask, 1, min(ask.max_references - 1, len(PLACES)), scene_given=True)


def _compose(ask: Ask, fewest: int, most: int, *, scene_given: bool = False) -> Draft:
    """`fewest` to `most` subjects, and maybe a scene, that were never in one picture."""
    rng, wording = ask.rng, ask.wording
    most = min(most, ask.max_references - scene_given)
    cast = _cast(rng, ask.split, int(rng.integers(fewest, most + 1)))
    places = DEFAULT_PLACES if wording.style == "vague" else [PLACES[i] for i in rng.permutation(4)]
    references = [portrait(rng, subject) for subject in cast]
    relations = [f"The {subject.kind} is from image_{i}." for i, subject in enumerate(cast, 1)]
    looks = ""
    for turn, i in product(range(1 + (ask.max_references == MOST_REFERENCES)), range(len(cast))):
        if ask.max_references > max(4, len(references) + scene_given):
            cast[i], owner, name = _with_look(ask, cast[i], turn)
            if owner:
                references.append(portrait(rng, owner))
                kind, number = cast[i].kind, len(references)
                relations.append(f"The {name} of the {kind} is from image_{number}.")
                looks += f" The {kind} has the {name} of {wording.image(number)}."
    things = [known_thing(place, subject) for place, subject in zip(places, cast)]
    scene = pick(rng, pool_of(ask.split, Scene))
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
    return Draft(references, words + looks, relations, Truth(scene, tuple(things), scene_given))


def _with_look(ask: Ask, subject: Subject, turn: int) -> tuple[Subject, Subject | None, str]:
    """A subject with a look of another one, that owner, and the name of the look in LENT.

    The subject itself and None where it cannot be; a character's looks are its own below ten
    references.
    """
    sort = OBJECTS if subject.kind in OBJECTS else CHARACTERS
    name = LENT[sort][turn]
    if sort == CHARACTERS and ask.max_references < MOST_REFERENCES:
        return subject, None, name
    pool = pool_of(ask.split, Subject)
    owner = pick(
        ask.rng, [other for other in pool if other.kind in sort and "none" not in other.looks]
    )
    place = list(looks_of(subject.kind)).index(name)
    looks = (*subject.looks[:place], owner.looks[place], *subject.looks[place + 1 :])
    changed = replace(subject, looks=looks)
    if changed == subject or split_of(changed) != ask.split:
        return subject, None, name
    return changed, owner, name


DRAFTS = {
    "add": _add,
    "replace": _replace,
    "attribute": _attribute,
    "scene": _scene,
    "subject": _subject,
    "subject_composition": _subject_composition,
    "scene_composition": _scene_composition,
}


# --------------------------------------------------------------------------------------------------
# samples


def check_request(split: str, max_references: int) -> None:
    """ValueError for a split or a number of references that the toy world does not have."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist; choose from {', '.join(SPLITS)}")
    if not 2 <= max_references <= MOST_REFERENCES:
        raise ValueError(
            f"max_references={max_references} is outside 2 to {MOST_REFERENCES}, what the toy "
            f"world can ask for"
        )


def draw_sample(split: str, index: int, seed: int = 0, *, max_references: int = 4) -> Sample:
    """Sample `index` of a split, a pure function of its arguments: a run resumes at any position.

    max_references: 2 to MOST_REFERENCES; up to 4 the tasks are the paper's. ValueError for a bad
    split or number.
    """
    check_request(split, max_references)
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    ends = np.cumsum(tuple(TASKS.values()))
    task = tuple(TASKS)[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]
    wording = Wording(pick(rng, ("instructive", "descriptive", "vague")), bool(rng.random() < 0.4))
    draft = DRAFTS[task](Ask(rng, split, wording, max_references))
    return Sample(
        key=f"{split}-{seed}-{index:08d}",
        task=task,
        references=tuple(Image.fromarray(pixels) for pixels in draft.references),
        instruction=capitalised(draft.instruction),
        plan=iccot.ICCoT(caption(draft.truth), tuple(draft.relations)),
        target=Image.fromarray(draw(draft.truth)),
        truth=draft.truth,
    )


def enlarged(sample: Sample, scale: int) -> Sample:
    """The sample with every pixel `scale` x `scale` pixels large; the judge averages them again."""

    def grow(image: Image.Image) -> Image.Image:
        size = (image.width * scale, image.height * scale)
        return image.resize(size, Image.Resampling.NEAREST)

    references = tuple(grow(image) for image in sample.references)
    return replace(sample, references=references, target=grow(sample.target))


class Drawn(torch.utils.data.Dataset):
    """The toy world as a source: position p is sample p of a split, enlarged `scale` times."""

    def __init__(self, split: str, seed: int, max_references: int, scale: int = 1):
        check_request(split, max_references)
        self.split, self.seed, self.max_references, self.scale = split, seed, max_references, scale

    def references(self, position: int) -> int:
        """How many a sample has."""
        return len(self[position].references)

    def __getitem__(self, position: int) -> Sample:
        sample = draw_sample(
            self.split, int(position), self.seed, max_references=self.max_references
        )
        return enlarged(sample, self.scale)
