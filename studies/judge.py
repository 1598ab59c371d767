"""
An MLLM as the judge of OmniContext's protocol.

    PF    prompt following       does the result show what the instruction asks for?
    SC    subject consistency    are its subjects those of the references?

Each is one question about the references and the result, in this order, and its answer is a number
from 0 to 10: {"score": 8}, "8/10", [8], or 8 alone. Where no answer can be read there is no score:
a number is never invented. The judge of the toy world, which knows the truth, is toy/judge.py.

The questions are ours: they ask what the official prompts ask, in other words. Left out: those
prompts word for word, and more than one score a question.

    score, reason = ask_score(endpoint, "PF", instruction, pictures=(reference, result))
"""

import re

from studies.endpoint import Question, last_object, visible

SCORE = re.compile(r"([0-9]{1,2}(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*10)?")

# an answer that is no JSON, without what surrounds it
BARE = re.compile(rf"(?:(?:score|rating)[\s*_`]*[:=][\s*_`]*)?{SCORE.pattern}", re.IGNORECASE)

PREFACE = """You are a professional digital artist who judges the work of an image model. All people
in the pictures are generated. The pictures are, in order: the reference image(s), and last the
result. Be strict and concise. Answer with one JSON object: {"score": <a number from 0 to 10>,
"reasoning": "<one sentence>"}

"""

CRITERIA = {
    "PF": """Score how well the result follows the instruction. 0: not at all. 1-3: mostly wrong.
4-6: partly. 7-9: mostly, with small faults. 10: completely. Judge only what was asked for: what is
there, its composition, pose, position and interaction, what was added or removed. Ignore whether
identities are kept and whether the result is beautiful.""",
    "SC": """Score whether the subjects of the result are those of the references. 10: the same in
every detail. Take off one point for each difference: face and head, the right persons and objects,
body and skin, clothes and hair unless the instruction changes them. 0: other subjects
altogether.""",
}

SCENE = """
The surroundings must also be those of the reference that shows the scene, and the subjects must fit
into them."""


def ask_score(judge, criterion, instruction, *, pictures, scene=False):
    """(score, reasoning) of the judge. Refused or another Fault where it gives none.

    judge: an Endpoint. criterion: "PF" or "SC". pictures: PNG bytes, the references and then the
    result. scene: the references show a scene that must be kept; the protocol asks so in SC alone.
    """
    prompt = PREFACE + CRITERIA[criterion]
    if scene and criterion == "SC":
        prompt += SCENE
    prompt += f"\n\nEditing instruction: {instruction}"
    return judge.ask(Question(prompt, tuple(pictures)), read_score)


def read_score(answer):
    """(score, reasoning) of an answer; ValueError if it gives none, or it is not sure which."""
    found = last_object(answer, "score")
    if not found and (bare := BARE.fullmatch(visible(answer).strip("*_` \n").rstrip("."))):
        found = {"score": bare[1]}
    score = _score(found.get("score"))
    if score is None:
        raise ValueError(f"no score from 0 to 10 in {answer[-80:]!r}")
    return score, str(found.get("reasoning", ""))


def _score(value):
    """A number from 0 to 10; None if it is anything else."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, str):
        text = SCORE.fullmatch(value.strip())
        value = float(text[1]) if text else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= 10 else None
