"""
What the data pipeline asks of models: an instruction, a plan, a picture. And how it reads answers.

    instruction    from the references and the task           -> {"instruction": text}
    plan           from the references and the instruction    -> {"plan": the IC-CoT as JSON}
    target         from references, instruction and caption   -> a picture

The one who writes the plan never sees the target: it does not exist yet. So the plan says what a
model can know before it paints. Whether a picture is good is another question, asked by judge.py.
A record is a line of curate.py's files; here it has "task", "references" (as many as pictures are
sent), and "instruction" and "plan" as far as the pipeline has come.

The paper does not publish its prompts; these are ours. Left out: examples in the prompts, other
languages than English.

    endpoint.ask(plan_question(record, images), partial(read_plan, record))
"""

import io
import json
import re

import iccot
from studies.endpoint import Question
from studies.replies import Refused, last_object, visible
from vision import open_image, to_png

LONGEST = 1000  # characters of an instruction

# how a model begins that declines in words
DECLINED = re.compile(
    r"\W*(?:(?:I['’]m|I am|we['’]re|we are) (?:very |so )?(?:sorry|unable|not able)|sorry\b|"
    r"I (?:can['’]?t|cannot|can not|won['’]t|will not)\b|as an AI\b)",
    re.IGNORECASE,
)

ACTIONS = {
    "add": "Image 1 is a picture to edit. The instruction adds the subject of image 2 to it.",
    "replace": "Image 1 is a picture to edit. The instruction replaces something in it with the "
    "subject of image 2.",
    "attribute": "Image 1 shows an object to edit. The instruction gives it an attribute of image "
    "2: its colour, pattern, material or style.",
    "scene": "The instruction moves what image 1 shows into the scene of image 2.",
    "subject": "The instruction shows the subject of image 1 in a new situation.",
    "subject_composition": "The instruction brings the subjects of all images together in one "
    "picture.",
    "scene_composition": "The instruction brings the subjects together in the scene of the last "
    "image.",
}

INSTRUCTION_PROMPT = """You write instructions for an artist who makes one new picture from {count}
reference image(s).
Task type: {task}. {action}
Look closely at the images, at secondary details too: what a subject holds or wears, where there is
room, how the light falls. Write one instruction that can be carried out, that uses every image, and
that does not describe what the images already show. Speak of the images as "image 1", "the second
image" and so on, or by what they show. Answer with the instruction alone, in one or two
sentences."""

PLAN_PROMPT = """An artist will make one new picture from {count} reference image(s) and this
instruction:
{instruction}
Task type: {task}. You see the references, not the picture: it does not exist yet. Write a plan for
it as one JSON object:
{{"out_caption": "one sentence that describes the finished picture by itself, without the word
image", "relations": [{shape}]}}
There is exactly one relation for each reference image, in order: one short sentence that says what
it gives to the picture, such as "The woman is from image_1." or "The style is consistent with
image_2." Answer with the JSON object alone."""

TARGET_PROMPT = """Make one picture from the reference images.
Instruction: {instruction}
The finished picture: {caption}
Keep the identity of every subject as its reference shows it."""

# characters of the three prompts, empty
PROMPT_LENGTH = len(INSTRUCTION_PROMPT) + len(PLAN_PROMPT) + len(TARGET_PROMPT)


# --------------------------------------------------------------------------------------------------
# questions. images: PNG bytes of the references, in order


def instruction_question(record, images):
    """Asks for an instruction: references and task."""
    prompt = INSTRUCTION_PROMPT.format(
        count=len(record["references"]), task=record["task"], action=ACTIONS[record["task"]]
    )
    return Question(prompt, images)


def plan_question(record, images):
    """Asks for an IC-CoT: references and instruction, and nothing else, never the target."""
    count = len(record["references"])
    shape = ", ".join(f'{{"relation_{i}": "..."}}' for i in range(1, count + 1))
    prompt = PLAN_PROMPT.format(
        count=count, instruction=record["instruction"], task=record["task"], shape=shape
    )
    return Question(prompt, images)


def target_question(record, images, size):
    """Asks for the picture: references, instruction and the plan's caption."""
    prompt = TARGET_PROMPT.format(
        instruction=record["instruction"], caption=record["plan"]["out_caption"]
    )
    return Question(prompt, images, size)


# --------------------------------------------------------------------------------------------------
# answers; ValueError for one that will not do


def read_instruction(record, answer):
    """{"instruction": ...}, neither empty nor too long, that names no reference that is not there.

    Refused if it is none, but says that the model declines.
    """
    instruction = " ".join(visible(answer).split()).strip('"').strip()
    if not 0 < len(instruction) <= LONGEST:
        raise ValueError(f"an instruction of {len(instruction)} characters")
    if DECLINED.match(instruction):
        raise Refused(instruction)
    iccot.check_instruction(instruction, len(record["references"]))
    return {"instruction": instruction}


def read_plan(record, answer):
    """{"plan": ...} of the last JSON object that looks like one, or of tags; else PlanError."""
    found, count = last_object(answer, "out_caption"), len(record["references"])
    plan = iccot.from_json(json.dumps(found), count) if found else iccot.parse(answer, count)
    return {"plan": json.loads(iccot.to_json(plan))}


def read_target(answer):
    """The picture as PNG bytes."""
    return to_png(open_image(io.BytesIO(answer), "the picture that came"))
