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
where. `salvage` keeps what it can from a truncated or sloppy answer. Both read decoded text, never
token ids: a tokenizer may fuse a tag with its neighbours. The JSON form is that of the paper's
first figure.
Left out: checking that a relation is true, and escaping (no field may hold a tag).

    iccot.parse(iccot.render(plan), references=2) == plan
"""

import json
import re
from dataclasses import dataclass

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

NO_JSON = 'not JSON of the form {"out_caption": "...", "relations": [{"relation_1": "..."}, ...]}'


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
    items = []
    for text, picture in zip(pieces, [*references, None]):
        if text.strip():
            items.append(text.strip())
        if picture is not None:
            items.append(picture)
    return items


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
# reading


def parse(text: str, references: int | None = None) -> ICCoT:
    """Read `render`'s form, with or without think tags.

    With `references`, the plan must have that many relations, and they may name no image beyond it.
    PlanError says what is wrong and at which character.
    """
    start = re.match(r"\s*(<think>\s*)?", text)
    position, fields = start.end(), []

    def fail(message, place):
        raise PlanError(f"{message} (at character {place}: {text[place : place + 40]!r})")

    while True:
        name = f"relation_{len(fields)}" if fields else "out_caption"
        field = re.compile(rf"<{name}>(.*?)</{name}>\s*", re.DOTALL).match(text, position)
        if field is None:
            break
        if tag := TAG.search(field[1]):
            fail(f"the tag {tag[0]} stands inside <{name}>", field.start(1) + tag.start())
        if not field[1].strip():
            fail(f"<{name}> is empty", position)
        if references is not None and len(fields) > references:
            fail(f"<{name}> is one too many: {_there_are(references)}", position)
        for image in _absent(field[1], references) if fields else []:
            message = f"a relation names image {image[1]}, but {_there_are(references)}"
            fail(message, field.start(1) + image.start())
        fields.append(field[1].strip())
        position = field.end()
    if not fields or references is not None and len(fields) <= references:
        reason = f": {_there_are(references)}, each needs a relation" if fields else ""
        fail(f"<{name}>...</{name}> should stand here{reason}", position)
    closing = "</think>" if start[1] else ""
    if text[position:].rstrip() != closing:
        fail(f"{closing or 'the end'} should stand here", position)
    return ICCoT(fields[0], tuple(fields[1:]))


def is_valid(text: str, references: int) -> bool:
    """Whether `parse` takes the text."""
    try:
        parse(text, references)
    except PlanError:
        return False
    return True


def from_json(text: str, references: int | None = None) -> ICCoT:
    """Read `to_json`'s form, by the rules of `parse`; PlanError otherwise."""
    try:
        record = json.loads(text)
        relations = [item[f"relation_{i}"] for i, item in enumerate(record["relations"], 1)]
        written = ICCoT(record["out_caption"], tuple(relations))
        plan = ICCoT(written.caption.strip(), tuple(relation.strip() for relation in relations))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{NO_JSON}: {error!r}") from None
    if to_record(written) != record:
        raise PlanError(f"{NO_JSON}, without other keys")
    return parse(render(plan), references)


def salvage(text: str, references: int | None = None) -> tuple[ICCoT | None, list[str]]:
    """What can be saved from any text, and what was wrong with it. Never raises.

    Returns (plan, []) for a text that `parse` takes, and (None, notes) when there is no caption.
    Relations that are missing between others, or up to `references`, are "" in the plan; those
    beyond `references` are dropped.
    """
    try:
        return parse(text, references), []
    except PlanError as error:
        notes = [str(error)]
    fields = _loose_fields(text)
    caption = fields.pop("out_caption", "")
    if not caption:
        return None, notes + ["no caption"]
    numbers = {int(name.split("_")[1]): relation for name, relation in fields.items()}
    count = max(numbers, default=0) if references is None else references
    relations = tuple(numbers.get(i, "") for i in range(1, count + 1))
    for number in sorted(numbers):
        if not 1 <= number <= count:
            notes.append(f"relation_{number} dropped: {_there_are(count)}")
    for i, relation in enumerate(relations, 1):
        if not relation:
            notes.append(f"relation_{i} is missing")
        elif _absent(relation, references):
            notes.append(f"relation_{i} names an image that is not there")
    return ICCoT(caption, relations), notes


def _loose_fields(text: str) -> dict[str, str]:
    """{name: text} between tags of any case, opened and closed or not; of two the first counts.

    The text between two tags is that of the first if it opens a field, else of the second if it
    closes one.
    """
    fields, opened, start = {}, "", 0
    for tag in LOOSE_TAG.finditer(text + "</think>"):
        name = re.sub(r"[ -]", "_", tag[2].lower()).replace("outcaption", "out_caption")
        name = re.sub(r"relation_?0*(\d)", r"relation_\1", name)
        owner = opened or (name if tag[1] else "think")
        # without tags of other kinds, and without one that the end of the text cut off
        content = re.sub(r"</?[\w ]*$", "", text[start : tag.start()])
        content = " ".join(TAG.sub(" ", content).split())
        if owner != "think" and content:
            fields.setdefault(owner, content)
        opened, start = "" if tag[1] or name == "think" else name, tag.end()
    return fields


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
