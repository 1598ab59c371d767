"""
Asking models over HTTP, and reading their replies: what curate.py and the benchmarks need.

    POST {url}/chat/completions    a prompt and pictures (data URLs) -> text
    POST {url}/images/edits        a prompt and pictures (multipart) -> a picture

Hosted APIs, vLLM and SGLang have both. The client is `openai` (pip install openai): it ends a
request after `timeout` and repeats it, `tries` times in all, where there is no network and after
408, 409, 429 and 5xx, with growing pauses or when the server says (Retry-After). What is ours:

    kept answers    an answer that can be read is on the disk before it is used, under a name made
                    of the model and the whole question. What was answered once is never asked
                    again, however often a run is killed. A refusal is an answer too
    no answer       a reply that cannot be read is asked for again, TRIES times in all; one that
                    was cut off at its limit of tokens with four times the limit
    a Fault         what is left then: of one question, not of the run. Only when most of the last
                    WINDOW items of `in_parallel` failed does a UserError say so
    the judge       an MLLM that gives a result PF (does it show what the instruction asks for?) or
                    SC (are its subjects those of the references?), from 0 to 10, as in
                    OmniContext's protocol. Each is one question, in our words

Of a reply in text, what stands outside of thinking counts, and of that the last JSON object that
holds a key. Whatever would take a guess is a ValueError, and the question is asked again: a score
is never invented. The judge of the toy world, which knows the truth, is toy/judge.py.

Left out: streaming, batch interfaces, tool calls, several choices, pictures that come as URLs,
servers that know max_tokens but not max_completion_tokens, the official prompts word for word.

    model = Endpoint(Access("http://localhost:8000/v1", "judge"), "out/replies")
    model.ask(Question("What do you see?", (png,)), visible)
    score, reason = ask_score(model, "PF", instruction, pictures=(reference, result))
"""

import base64
import hashlib
import json
import math
import os
import re
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from runtime.config import UserError
from runtime.files import object_of, write_text
from vision import to_png

TRIES = 3  # answers to get one that can be read
WINDOW = 40  # items: when most of the last ones failed, something else is wrong
LARGEST = 1024 * 1024  # pixels of a picture that is sent

# what an API says that has looked at the content; a proxy's "denied by policy" is none of these
REFUSALS = re.compile(
    r"content[ _](management )?policy|content[ _]filter|usage polic|moderation|flagged|"
    r"safety (system|filter|polic)",
    re.IGNORECASE,
)

CUT_OFF = re.compile(r'"finish_reason":\s*"length"')
THINKS = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
DECODER = json.JSONDecoder(strict=False)  # a string may hold a line break


class Fault(Exception):
    """Why one sample fails: "kind: detail", one line that any file can hold."""

    def __init__(self, kind, detail):
        detail = str(detail).encode("utf-8", "replace").decode()
        super().__init__(f"{kind}: {' '.join(detail.split())}")


class Refused(Fault):
    """The model declined to answer this question; asking again would not help."""

    def __init__(self, detail):
        super().__init__("refused", detail)


@dataclass(frozen=True)
class Question:
    """What one request asks. images: PNG bytes, in order."""

    prompt: str
    images: tuple[bytes, ...] = ()
    size: str = ""  # of the picture asked for, "1024x1024"; "" asks for text

    def digest(self, model):
        """The name of the answer: a hash of everything that it depends on."""
        # the 0 has always been there; without it, what was paid for would be asked again
        digest = hashlib.sha256(json.dumps([model, self.prompt, self.size, 0]).encode())
        for image in self.images:
            digest.update(hashlib.sha256(image).digest())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Access:
    """Where a model is and how it may be asked."""

    url: str  # OpenAI-compatible base URL, up to /v1
    model: str  # its name there
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    timeout: float = 180.0  # seconds
    tries: int = 6  # of one request, with growing pauses
    max_tokens: int = 1400  # of an answer in text, to begin with


def to_send(image):
    """PNG bytes of a picture as it is sent: at most LARGEST pixels, sides times 16."""
    scale = min(1.0, math.sqrt(LARGEST / (image.width * image.height)))
    size = tuple(max(16, int(side * scale) // 16 * 16) for side in image.size)
    return to_png(image if size == image.size else image.resize(size))


# --------------------------------------------------------------------------------------------------
# one model


class Endpoint:
    """One model behind an OpenAI-compatible URL. replies: the folder where answers are kept."""

    def __init__(self, access, replies):
        self.access, self.replies, self.lock = access, Path(replies), threading.Lock()
        if not access.url.startswith(("http://", "https://")):
            raise UserError(f"the URL {access.url!r} must begin with http:// or https://")
        try:
            import openai
        except ImportError:
            raise UserError("asking a model needs its client: pip install openai") from None
        self.client = openai.OpenAI(
            base_url=access.url,
            api_key=os.environ.get(access.key_variable, "").strip() or "none",
            timeout=openai.Timeout(access.timeout, connect=min(15.0, access.timeout)),
            max_retries=access.tries - 1,
        )
        self.replies.mkdir(parents=True, exist_ok=True)
        self.tokens = access.max_tokens

    def ask(self, question, read):
        """read(answer) of the first answer that can be read, kept or new.

        An answer is text with its thinking, or the bytes of an image file. read: ValueError for an
        answer that will not do. Refused; Fault where there is none.
        """
        path = self.replies / f"{question.digest(self.access.model)}.json"
        try:
            kept = object_of(path.read_bytes())
            if "refused" in kept:
                raise Refused(kept["refused"])
            return read(answer_in(kept["reply"], question))
        except (FileNotFoundError, KeyError, ValueError):
            pass  # nothing is kept, or by a reader that took more
        try:
            reply, value = self._ask(question, read)
        except Refused as error:
            self._keep(path, question, {"refused": str(error).removeprefix("refused: ")})
            raise
        self._keep(path, question, {"reply": reply})
        return value

    def _ask(self, question, read):
        """(reply, what was read of it). Refused; Fault when none of TRIES can be read."""
        tokens = self.tokens
        for _ in range(TRIES):
            text = self._send(question, tokens)
            try:
                reply = object_of(text.encode())
                value = read(answer_in(reply, question))
            except ValueError as error:
                why = str(error)
                if CUT_OFF.search(text):
                    why += f"; cut off at {tokens:,} tokens, thinking included (max_tokens)"
                    tokens *= 4
                continue
            self.tokens = max(self.tokens, tokens)
            return reply, value
        raise Fault(f"no usable answer in {TRIES}", why)

    def _keep(self, path, question, outcome):
        """Put the outcome of a question on the disk, for good."""
        about = {"prompt": question.prompt, "images": len(question.images)}
        with self.lock:  # the same question may be asked twice at a time
            write_text(path, json.dumps({"model": self.access.model, **about, **outcome}))

    def _send(self, question, tokens):
        """The text of the model's reply. Refused; Fault."""
        import openai

        try:
            return self._post(question, tokens).text
        except openai.APIStatusError as error:
            words = f"{error.code or ''} {error.message}"
            if error.status_code in (400, 403, 422, 451) and REFUSALS.search(words):
                raise Refused(words) from None
            advice = {
                401: f"; set the environment variable {self.access.key_variable} to a valid key",
                404: f"; is {self.access.model!r} the name of a model there, and does the URL end "
                "in /v1?",
            }.get(error.status_code, "")
            about = f"{self.access.url} ({error.message[:200]}){advice}"
            raise Fault(f"answered {error.status_code}", about) from None
        except openai.APIConnectionError as error:
            about = f"{self.access.url} ({error.__cause__ or error}); check URL and network"
            raise Fault("cannot be reached", about) from None

    def _post(self, question, tokens):
        """The reply to one request, as it came."""
        if question.size:
            return self.client.images.with_raw_response.edit(
                model=self.access.model,
                prompt=question.prompt,
                size=question.size,
                image=[
                    (f"image_{i}.png", image, "image/png")
                    for i, image in enumerate(question.images, 1)
                ],
            )
        content = [{"type": "text", "text": question.prompt}]
        for image in question.images:
            url = "data:image/png;base64," + base64.b64encode(image).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        return self.client.chat.completions.with_raw_response.create(
            model=self.access.model,
            messages=[{"role": "user", "content": content}],
            max_completion_tokens=tokens,
        )


# --------------------------------------------------------------------------------------------------
# many questions


def in_parallel(function, items, workers, *, bar=None, patient=False):
    """(item, function(item)) in the order in which they are done, `workers` at a time.

    A Fault takes the place of a result. UserError when most of the last WINDOW items failed, unless
    `patient`; any other error ends it too. bar: a tqdm bar, moved on by each item.
    """
    recent = deque(maxlen=WINDOW)  # of each item its Fault, or None

    def attempt(item):
        try:
            return function(item)
        except Fault as fault:
            return fault

    with ThreadPoolExecutor(workers) as pool:
        items = {pool.submit(attempt, item): item for item in items}
        try:
            for future in as_completed(items):
                result = future.result()
                yield items.pop(future), result
                recent.append(str(result) if isinstance(result, Fault) else None)
                if bar is not None:
                    bar.update()
                faults = [fault for fault in recent if fault is not None]
                if 2 * len(faults) > WINDOW and not patient:
                    raise UserError(
                        f"{len(faults)} of the last {len(recent)} samples failed, most often: "
                        f"{commonest(faults)}; nothing was lost: repeat the command to go on"
                    )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def commonest(reasons):
    """The last of those reasons whose kind (what stands before the colon) is the most frequent."""
    kinds = Counter(reason.partition(":")[0] for reason in reasons)
    kind = max(kinds, key=kinds.get)
    return [reason for reason in reasons if reason.partition(":")[0] == kind][-1]


# --------------------------------------------------------------------------------------------------
# replies


def answer_in(reply, question):
    """What a reply in JSON holds: text, or the bytes of a picture. Refused; ValueError."""
    try:
        if question.size:
            return base64.b64decode(reply["data"][0]["b64_json"])
        choice = reply["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        refusal, content = message.get("refusal"), message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"the reply holds no answer: {str(reply)[:80]!r}") from None
    if refusal or reason == "content_filter":
        raise Refused(refusal or "content filter")
    content = content if isinstance(content, str) else ""
    if reason == "length":  # a whole object may have been cut off behind it
        content = content[: content.rfind("}") + 1]
    if not content.strip():
        raise ValueError("the reply has no text")
    content.encode()  # ValueError: half an emoji cannot be written
    return content


def visible(text):
    """The text outside of thinking: behind the last </think>, and before a <think> without end."""
    return THINKS.split(THOUGHT.split(text)[-1])[0].strip()


def last_object(text, key):
    """The last JSON object outside of thinking that has this key. ValueError where there is none,
    or where braces hold no JSON: neither half of an object nor a draft is taken for the answer."""
    text, last, end = visible(text), None, 0
    while (start := text.find("{", end)) >= 0:
        try:
            value, end = DECODER.raw_decode(text, start)
            json.dumps(value, ensure_ascii=False).encode()  # half an emoji cannot be written
        except (ValueError, RecursionError):
            raise ValueError(f"no JSON: {text[start : start + 80]!r}") from None
        last = value if key in value else last
    if last is None:
        raise ValueError(f"no JSON object with {key!r} in {text[-80:]!r}")
    return last


# --------------------------------------------------------------------------------------------------
# the judge

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
    """(score, reasoning) of an answer in JSON; ValueError if it gives none from 0 to 10."""
    judgement = last_object(answer, "score")
    score = judgement["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 10:
        raise ValueError(f"no score from 0 to 10: {score!r}")
    return float(score), str(judgement.get("reasoning", ""))
