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

JSON_FIELD = re.compile(
    r'"(out_caption|relation_\d{1,2})"\s*:\s*"((?:[^"\\]|\\.)*)("?)', re.IGNORECASE | re.DOTALL
)

# how people name a reference: "image 3", "image_3", "<image 3>", "images 1 and 3", "figure three",
# "the 3rd photo", "图3", "第三张图"; not "image 3 times", "image 90°", "image 16:9", "图一样"
ORDINALS = tuple("first second third fourth fifth sixth seventh eighth ninth tenth".split())
CARDINALS = tuple("one two three four five six seven eight nine ten".split())
HAN = tuple("一二三四五六七八九十")
NUMBERS = {word: i for words in (ORDINALS, CARDINALS, HAN) for i, word in enumerate(words, 1)}

COUNT = rf"(?:\d{{1,2}}|{'|'.join(CARDINALS)})"
UNITS = (
    r"percent|px|pixels?|times|deg|degrees?|mm|cm|inch(?:es)?|stops?|steps?|shades?|"
    r"years?|months?|weeks?|days?|hours?|minutes?|seconds?"
)
# after the number: no angle, size, factor, ratio, fraction, year or end of a file's name
COUNTED = (
    r"(?![A-Za-z0-9_]|\.(?:\d|png|jpe?g|webp)|[:：/x×]\d|\s[:：x×]\s?\d"
    rf"|\s*(?:[%°º度倍次]|像素|(?:{UNITS})\b))"
)

IMAGE_NUMBER = re.compile(
    r"(?<![A-Za-z])(image|img|picture|photo|figure|fig\.?|reference)"
    rf"(?:(s)[ _]?((?:{COUNT}\s*(?:,|and|or|to|&|/|-)\s*(?:and\s*)?)*)"
    rf"|[ _-]?(?:#|no\. ?)?[(\[]?\s?)({COUNT}){COUNTED}",
    re.IGNORECASE,
)

IMAGE_ORDINAL = re.compile(
    rf"(?<![A-Za-z])({'|'.join(ORDINALS)}|\d{{1,2}}(?=st|nd|rd|th))(?:st|nd|rd|th)?[ -]"
    r"((?:reference|input|given) )?(image|picture|photo|photograph|reference)"
    r"(?![A-Za-z]| (?:frame|album|book|booth)s?\b)",
    re.IGNORECASE,
)

IMAGE_HAN = re.compile(
    rf"(?<![地拼构插蓝版绘制画截底草])(?:[图圖][片像象]?|[照相]片)[ _#]{{0,2}}"
    rf"(\d{{1,2}}(?![个個只隻条條位张張幅名种種])|[{''.join(HAN)}](?=\W|[中里内內上的和与與跟及或是为為]|$))"
    rf"{COUNTED}"
)

IMAGE_HAN_ORDINAL = re.compile(
    rf"第 ?(\d{{1,2}}|[{''.join(HAN)}]) ?[张張幅副个個]?(?:参考|參考|输入|輸入)?"
    r"([图圖](?![书書表标標案纸紙层層])|[照相]片)"
)

# a name has no article; "picture" and "figure" are verbs too, but not after these words
ARTICLE = re.compile(r"\b(?:an?|the|this|that|another|every|each|your|my|its)\s+$", re.IGNORECASE)
IN_USE = re.compile(
    r"(?:\b(?:of|in|from|to|with|and|or|by|on|at|into|onto|like|as|for|use|using)\s+|[,(<\[|])$",
    re.IGNORECASE,
)
# "the second picture", and "the second image on the wall", may hang there
SOMEWHERE = re.compile(
    r"\s+(?:on|in|at|of|above|over|under|below|behind|near|next|beside|along|inside|hanging)\b",
    re.IGNORECASE,
)
MOST = 20  # references that anybody gives; a higher number is likelier an angle or a size


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


def to_json(plan: ICCoT) -> str:
    """The JSON form: {"out_caption": ..., "relations": [{"relation_1": ...}, ...]}."""
    relations = [{f"relation_{i}": text} for i, text in enumerate(plan.relations, 1)]
    return json.dumps({"out_caption": plan.caption, "relations": relations}, ensure_ascii=False)


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
        if references is not None:
            for number, offset, _ in _absent(text[start:position], references):
                message = f"a relation names image {number}, but {_there_are(references)}"
                _fail(text, start + offset, message)
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
    json_fields = JSON_FIELD.findall(text)
    fields = _loose_json(json_fields, notes) if json_fields else _loose_tags(text, notes)
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
        elif references is not None and _absent(relation, references):
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


def _loose_json(found: list[tuple[str, str, str]], notes: list[str]) -> dict[str, str]:
    """Fields of a JSON plan that may be cut off anywhere.

    found: (name, raw text, closing quote) of each.
    """
    notes.append("read as JSON")
    fields: dict[str, str] = {}
    for name, raw, quote in found:
        name = re.sub(r"relation_0*(\d)", r"relation_\1", name.lower())
        if not quote:
            notes.append(f'"{name}" was not closed')
        try:
            content = json.loads(f'"{raw}"', strict=False)
        except json.JSONDecodeError:  # an escape that JSON does not know: keep the raw characters
            content = raw
        _keep(fields, name, content, notes=notes)
    return fields


def _keep(fields: dict[str, str], name: str, content: str, *, notes: list[str]) -> None:
    """Store a cleaned field unless it is empty or a duplicate."""
    content = re.sub(r"</?[\w ]*$", "", content)  # a closing tag cut off by the end of the text
    content = " ".join(TAG.sub(" ", content).split())
    if name in fields:
        notes.append(f"{name} occurs twice, the first one counts")
    elif content:
        fields[name] = content


# --------------------------------------------------------------------------------------------------
# references named in a sentence


def image_numbers(text: str) -> list[tuple[int, int, bool]]:
    """(number, offset, certain) of each reference that a sentence names, in English or Chinese.

    certain: it can mean nothing else; not so "the image 3", "the second picture on the wall".
    """
    found = []
    for match in IMAGE_NUMBER.finditer(text):  # "images 1, 2 and 3" is one match with three numbers
        words = re.findall(COUNT, f"{match[3] or ''} {match[4]}", re.IGNORECASE)
        found += [(word, match.start(), _is_a_name(text, match)) for word in words]
    for match in IMAGE_ORDINAL.finditer(text):
        loose = match[3].lower() == "image" and not SOMEWHERE.match(text, match.end())
        certain = match[2] or match[3].lower() == "reference" or loose
        another = re.search(r"\b(?:an?|another) $", text[: match.start()], re.IGNORECASE)
        found.append((match[1], match.start(), bool(certain and not another)))
    for match in IMAGE_HAN.finditer(text):
        found.append((match[1], match.start(), True))
    for match in IMAGE_HAN_ORDINAL.finditer(text):
        elsewhere = text[: match.start()].endswith(tuple("的上里裡中内內边邊"))
        found.append((match[1], match.start(), match[2] in "图圖" and not elsewhere))
    numbered = [(NUMBERS.get(word.lower()) or int(word), *rest) for word, *rest in found]
    return [(number, offset, certain and number <= MOST) for number, offset, certain in numbered]


def _is_a_name(text: str, match: re.Match) -> bool:
    """Whether what IMAGE_NUMBER found is certainly the name of a reference."""
    noun, number = match[1].lower(), match[4].lower()
    if match[2]:  # the plural: "images 1 and 3", not "the sign pictures 3 men"
        return bool(match[3])
    if not text[match.end(1) : match.start(4)].isspace():  # "image_3", "image3", "image #3"
        return number.isdecimal()
    if ARTICLE.search(text, 0, match.start()) or noun == "figure" and number in ("8", "eight"):
        return False
    return noun in ("image", "img", "reference") or bool(IN_USE.search(text, 0, match.start()))


def check_instruction(instruction: str, references: int) -> list[str]:
    """ValueError when the instruction certainly names a reference image that was not given.

    Returns a sentence for each one that it may name.
    """
    doubts = []
    for number, offset, certain in _absent(instruction, references, only_certain=False):
        sentence = (
            f"the instruction {'names' if certain else 'may name'} image {number} (at character "
            f"{offset}: {instruction[offset : offset + 20]!r}), but {_there_are(references)}"
        )
        if certain:
            raise ValueError(f"{sentence}; give the missing reference or change the instruction")
        doubts.append(sentence)
    return doubts


def _absent(text: str, references: int, only_certain: bool = True) -> list[tuple[int, int, bool]]:
    """Those of `image_numbers` that are not among the references."""
    found = [one for one in image_numbers(text) if not 1 <= one[0] <= references]
    return [one for one in found if one[2] or not only_certain]


def _there_are(references: int) -> str:
    """The number of reference images in words."""
    if references == 1:
        return "there is 1 reference image"
    return f"there are {references or 'no'} reference images"
