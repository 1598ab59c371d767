"""
IC-CoT, the in-context chain of thought of Re-Align (arXiv 2601.05124): the plan of a picture.

In-context image generation and editing (ICGE): a prompt of several reference images and an
instruction that speaks about them ("the man of image 1 holds the toy of image 3") asks for one
picture. A unified model often understands such a prompt and then paints something else. Re-Align
lets it first write a plan, the IC-CoT, in two parts:

    semantic guidance        a caption of the picture to be: most of ICGE becomes text to image, and
                             the reward can compare picture and caption
    reference association    for each reference image, in order, what it gives to the picture

    plan      = "<think>" fields "</think>"  |  fields
    fields    = "<out_caption>" text "</out_caption>"
                { " <relation_" i ">" text "</relation_" i ">" }          i = 1, 2, ...
    text      = one short sentence without tags: "The ball is from image_1."

There are exactly as many relations as references. Images are counted from 1. `parse` is strict: it
takes this grammar with any white space between and around the fields, and says what is wrong and
where. `salvage` keeps what it can from a truncated or sloppy answer and lists every repair. Both
read decoded text, never token ids: a tokenizer may fuse a tag with its neighbours. The JSON form is
that of the paper's first figure.
Left out: checking that a relation is true, and escaping (no field may hold a tag).

    iccot.parse(iccot.render(plan), references=2) == plan
"""

import json
import re
from dataclasses import dataclass
from typing import NoReturn

from PIL import Image

# the seven tasks of ICGE and their share of the paper's samples, per cent: editing, then generation
# fmt: off
TASKS = {"add": 15.1, "replace": 13.8, "attribute": 14.8, "scene": 13.8,
         "subject": 14.4, "subject_composition": 15.9, "scene_composition": 12.2}
# fmt: on

# BAGEL's system prompt for thinking before painting (inferencer.py of the reference implementation;
# Apache-2.0). The space before the newline belongs to it: the released weights were trained with
# exactly these characters.
GENERATION_SYSTEM_PROMPT = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, "
    "i.e. <think> planning process here </think> image here"
)

TAG = re.compile(r"</?[A-Za-z]\w*>")

LOOSE_TAG = re.compile(
    r"<\s*(/?)\s*(think|out[_ -]?caption|relation[_ -]?\d{1,2})\s*>", re.IGNORECASE
)

# a reference that a relation names without doubt: "image_3", "image 3"; not "the image 3 times"
IMAGE_NUMBER = re.compile(
    r"(?<![A-Za-z])(?:image_|(?<!the )image )(\d{1,2})(?![A-Za-z0-9_%°:]|\.[a-z])", re.IGNORECASE
)


class PlanError(ValueError):
    """A text that does not follow the IC-CoT grammar."""


@dataclass(frozen=True)
class ICCoT:
    """One plan. relations[i] belongs to reference image i + 1; "" where `salvage` found none."""

    caption: str
    relations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One example of ICGE: a prompt, the plan for it, and the picture it asks for."""

    key: str  # its name in its source
    task: str  # one of TASKS, or what the source calls it
    references: tuple[Image.Image, ...]  # RGB, of any sizes
    instruction: str
    plan: ICCoT
    target: Image.Image  # RGB
    # what the toy world knows of a target it drew, for its judge; None for samples from elsewhere
    truth: object | None = None


def arranged(references, instruction: str) -> list:
    """A prompt's pictures and texts in their order, in all stages: pictures, then the instruction.

    "<image>" in it puts a picture in its place; ValueError unless each is named once, or none.
    """
    pieces = instruction.split("<image>")
    if len(pieces) == 1:
        return [*references, instruction]
    if len(pieces) - 1 != len(references):
        raise ValueError(
            f"the instruction has {len(pieces) - 1} times <image>, but {len(references)} "
            f"references are given; name each once, or none"
        )
    items = [item for pair in zip(pieces, [*references, ""]) for item in pair]
    items = [item.strip() if isinstance(item, str) else item for item in items]
    return [item for item in items if item != ""]


# --------------------------------------------------------------------------------------------------
# writing


def render(plan: ICCoT, think: bool = True) -> str:
    """The plan as text, in `<think>` tags unless think=False.

    A relation "" (lost, see `salvage`) is left out; the others keep their numbers.
    PlanError: a field is empty or holds a tag.
    """
    fields = [("out_caption", plan.caption)]
    fields += [(f"relation_{i}", text) for i, text in enumerate(plan.relations, 1) if text]
    for name, text in fields:
        if not text.strip() or text != text.strip() or TAG.search(text):
            raise PlanError(
                f"{name} cannot be written: {text!r} is empty, has outer white space or holds a tag"
            )
    body = " ".join(f"<{name}>{text}</{name}>" for name, text in fields)
    return f"<think>{body}</think>" if think else body


def to_record(plan: ICCoT) -> dict:
    """The form in files: {"out_caption": ..., "relations": [{"relation_1": ...}, ...]}."""
    relations = [{f"relation_{i}": text} for i, text in enumerate(plan.relations, 1)]
    return {"out_caption": plan.caption, "relations": relations}


def to_json(plan: ICCoT) -> str:
    """The same as JSON."""
    return json.dumps(to_record(plan), ensure_ascii=False)


# --------------------------------------------------------------------------------------------------
# reading, strictly


def parse(text: str, references: int | None = None) -> ICCoT:
    """Read `render`'s form, with or without think tags.

    With `references`, the plan must have that many relations, and they may name no image beyond it.
    PlanError says what is wrong and at which character.
    """
    position = _skip_space(text, 0)
    wrapped = text.startswith("<think>", position)
    if wrapped:
        position = _skip_space(text, position + len("<think>"))
    caption, position = _field(text, position, "out_caption")
    relations = []
    while text.startswith(f"<relation_{len(relations) + 1}>", position):
        start = position
        relation, position = _field(text, position, f"relation_{len(relations) + 1}")
        for match in _absent(text[start:position], references):
            message = f"a relation names image {match[1]}, but {_there_are(references)}"
            _fail(text, start + match.start(), message)
        relations.append(relation)
    read = len(relations)
    if references is not None and read < references and not _stray(text, position):
        missing = f"<relation_{read + 1}> is missing: {_there_are(references)}"
        _fail(text, position, f"{missing}, each needs a relation, found {read}")
    if wrapped:
        if not text.startswith("</think>", position):
            _fail(text, position, _unexpected(text, position, "</think>", relations=read))
        position = _skip_space(text, position + len("</think>"))
    if position < len(text):
        _fail(text, position, _unexpected(text, position, "the end", relations=read))
    if references is not None and read > references:
        first = text.index(f"<relation_{references + 1}>")
        _fail(text, first, f"{read} relations for {references} reference images")
    return ICCoT(caption, tuple(relations))


def is_valid(text: str, references: int) -> bool:
    """Whether `parse` takes the text."""
    try:
        parse(text, references)
    except PlanError:
        return False
    return True


def from_json(text: str, references: int | None = None) -> ICCoT:
    """Read `to_json`'s form strictly; PlanError otherwise."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"the plan is not JSON: {error}") from None
    if not isinstance(value, dict) or set(value) != {"out_caption", "relations"}:
        raise PlanError('a JSON plan needs exactly the keys "out_caption" and "relations"')
    if not isinstance(value["relations"], list):
        raise PlanError(
            '"relations" must be a list of {"relation_1": ...}, {"relation_2": ...}, ...'
        )
    relations = []
    for i, item in enumerate(value["relations"], 1):
        if not isinstance(item, dict) or set(item) != {f"relation_{i}"}:
            raise PlanError(
                f'item {i} of "relations" must be {{"relation_{i}": ...}}, found {json.dumps(item)}'
            )
        relations.append(item[f"relation_{i}"])
    fields = [("out_caption", value["out_caption"])]
    fields += [(f"relation_{i}", relation) for i, relation in enumerate(relations, 1)]
    for name, field in fields:
        if not isinstance(field, str) or not field.strip():
            raise PlanError(f'"{name}" must be a sentence, found {json.dumps(field)}')
    plan = ICCoT(value["out_caption"].strip(), tuple(relation.strip() for relation in relations))
    return parse(render(plan), references)  # the same rules as the tag form


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _field(text: str, position: int, name: str) -> tuple[str, int]:
    """Read `<name>text</name>` at `position`: the stripped text, and where what follows begins."""
    opening, closing = f"<{name}>", f"</{name}>"
    if not text.startswith(opening, position):
        _fail(text, position, _unexpected(text, position, opening, relations=-1))
    start = position + len(opening)
    tag = TAG.search(text, start)
    if tag is None or (tag.group() != closing and closing not in text[start:]):
        _fail(text, position, f"{opening} is never closed")
    if tag.group() != closing:
        _fail(text, tag.start(), f"the tag {tag.group()} stands inside {opening}")
    content = text[start : tag.start()].strip()
    if not content:
        _fail(text, position, f"{opening} is empty")
    return content, _skip_space(text, tag.end())


def _stray(text: str, position: int) -> bool:
    """Whether something other than `</think>` or the end follows: the clearer complaint."""
    return position < len(text) and not text.startswith("</think>", position)


def _unexpected(text: str, position: int, wanted: str, *, relations: int) -> str:
    """Say what stands at `position` where `wanted` should.

    relations: how many were read; -1: none could be.
    """
    if position >= len(text):
        return f"{wanted} is missing: the text ends here"
    tag = TAG.match(text, position)
    if tag is None:
        return f"there is text outside the tags where {wanted} should be"
    number = re.fullmatch(r"<relation_(\d+)>", tag.group())
    if relations < 0 and number:
        if wanted not in text:
            return f"{wanted} is missing"
        return f"{tag.group()} is out of order: {wanted} should come first"
    if relations >= 0:
        if tag.group() == "<out_caption>" or number and int(number[1]) <= relations:
            return f"{tag.group()} occurs twice"
        if number:
            return f"{tag.group()} is out of order: <relation_{relations + 1}> should come first"
    return f"{tag.group()} stands where {wanted} should be"


def _fail(text: str, position: int, message: str) -> NoReturn:
    """Raise PlanError with the message and the place it speaks of."""
    snippet = text[position : position + 40]
    raise PlanError(f"{message} (at character {position}: {snippet!r})")


# --------------------------------------------------------------------------------------------------
# reading, leniently


def salvage(text: str, references: int | None = None) -> tuple[ICCoT | None, list[str]]:
    """What can be saved from any text, and a list of what was missing or repaired. Never raises.

    Returns (plan, []) for a text that `parse` takes, and (None, notes) when there is no caption.
    Relations that are missing between others, or up to `references`, are "" in the plan; those
    beyond `references` are dropped.
    """
    try:
        return parse(text, references), []
    except PlanError as error:
        notes = [str(error)]
    fields = _loose_tags(text, notes)
    caption = fields.pop("out_caption", "")
    if not caption:
        return None, notes + ["no caption"]
    numbers = {int(name.split("_")[1]): relation for name, relation in fields.items()}
    count = max(numbers, default=0) if references is None else references
    for number in sorted(numbers):
        if not 1 <= number <= count:
            notes.append(f"relation_{number} dropped: {_there_are(count)}")
    relations = tuple(numbers.get(i, "") for i in range(1, count + 1))
    for i, relation in enumerate(relations, 1):
        if not relation:
            notes.append(f"relation_{i} is missing")
        elif _absent(relation, references):
            notes.append(f"relation_{i} names an image that is not there")
    return ICCoT(caption, relations), notes


def _loose_tags(text: str, notes: list[str]) -> dict[str, str]:
    """Fields between tags of any case, closed and opened or not; the first of duplicates counts."""
    fields: dict[str, str] = {}
    tags = list(LOOSE_TAG.finditer(text))
    ends = [tag.start() for tag in tags[1:]] + [len(text)]
    previous = None  # name of the last tag when it was an opening one
    before = text[: tags[0].start()] if tags else text  # text between the last tag and this one
    for tag, end in zip(tags, ends):
        name = re.sub(r"[ -]", "_", tag[2].lower()).replace("outcaption", "out_caption")
        name = re.sub(r"relation_?0*(\d)", r"relation_\1", name)
        if name != "think":
            if not tag[1]:  # <name>: its text runs to the next tag, whichever that is
                _keep(fields, name, text[tag.end() : end], notes=notes)
                closed = LOOSE_TAG.match(text, end)
                if not (closed and closed[1]):
                    notes.append(f"<{name}> was not closed")
            # </name> alone: its text runs back to the last tag
            elif previous is None and name not in fields:
                notes.append(f"</{name}> was not opened")
                _keep(fields, name, before, notes=notes)
        previous = name if not tag[1] and name != "think" else None
        before = text[tag.end() : end]
    return fields


def _keep(fields: dict[str, str], name: str, content: str, *, notes: list[str]) -> None:
    """Store a cleaned field unless it is empty or a duplicate."""
    content = re.sub(r"</?[\w ]*$", "", content)  # a closing tag cut off by the end of the text
    content = " ".join(TAG.sub(" ", content).split())
    if name in fields:
        notes.append(f"{name} occurs twice, the first one counts")
    elif content:
        fields[name] = content


def _absent(relation: str, references: int | None) -> list[re.Match]:
    """Where a relation names an image that is not among the references."""
    if references is None:
        return []
    named = IMAGE_NUMBER.finditer(relation)
    return [match for match in named if not 1 <= int(match[1]) <= references]


def _there_are(references: int) -> str:
    """The number of reference images in words."""
    if references == 1:
        return "there is 1 reference image"
    return f"there are {references or 'no'} reference images"
