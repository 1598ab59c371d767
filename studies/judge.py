"""
An MLLM as the judge of OmniContext's protocol.

    PF    prompt following       does the result show what the instruction asks for?
    SC    subject consistency    are its subjects those of the references?

Each is one question about the references and the result, in this order, and its answer is a number
from 0 to 10. Where no answer of TRIES can be read there is no score: a number is never invented. A
judge that declines raises Refused. curate.py cuts by these scores, benchmarks.py tabulates them;
the judge of the toy world, which knows the truth, is toy/judge.py.

The questions are ours: they ask what the official prompts ask, in other words. Left out: those
prompts word for word, and more than one score a question.

    score, reason = ask_score(endpoint, "PF", instruction, pictures=(reference, result))
"""

import json
import math

from studies.endpoint import Question, Unusable
from vision import to_png

TRIES = 3  # questions to get a readable score

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

LARGEST = 1024 * 1024  # pixels of a reference that the judge is sent


def ask_score(judge, criterion, instruction, *, pictures, scene=False):
    """(score, reasoning) of the judge, or (None, why) when no answer could be read.

    judge: an Endpoint; what it raises goes through: Refused where it declines, UserError where
    nothing can be asked. criterion: "PF" or "SC". pictures: PNG bytes, the references and then the
    result. scene: the references show a scene that must be kept; the protocol asks so in SC alone.
    """
    prompt = PREFACE + CRITERIA[criterion]
    if scene and criterion == "SC":
        prompt += SCENE
    prompt += f"\n\nEditing instruction: {instruction}"
    for nonce in range(TRIES):
        try:
            return read_score(judge.text(Question(prompt, tuple(pictures), nonce=nonce)))
        except Unusable as error:
            reason = str(error)
    return None, f"no readable answer in {TRIES}: {reason}"


def read_score(answer):
    """(score, reasoning) from a JSON object that may have words around it; Unusable otherwise."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        found = json.loads(answer[start : end + 1].replace("\n", " "))
        score = found["score"][0] if isinstance(found["score"], list) else found["score"]
        if isinstance(score, bool) or not 0 <= float(score) <= 10:
            raise ValueError(f"a score of {score}")
        return float(score), str(found.get("reasoning", ""))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Unusable(f"no score from 0 to 10 in {answer[:80]!r} ({error})") from None


def for_judge(image):
    """PNG bytes of a reference as the protocol sends it: at most LARGEST pixels, sides times 16."""
    scale = min(1.0, math.sqrt(LARGEST / (image.width * image.height)))
    size = tuple(max(16, int(side * scale) // 16 * 16) for side in image.size)
    return to_png(image if size == image.size else image.resize(size))
