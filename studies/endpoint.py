"""
Asking models over HTTP, and reading their replies: what curate.py and the judge need.

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

Of a reply in text, what stands outside of thinking counts, and of that the last JSON object that
holds a key. Whatever would take a guess is a ValueError, and the question is asked again.

Left out: streaming, batch interfaces, tool calls, several choices.

    model = Endpoint(Access("http://localhost:8000/v1", "judge"), "out/replies")
    model.ask(Question("What do you see?", (png,)), visible)
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
from urllib.parse import urljoin

import requests

from runtime.config import UserError
from runtime.files import object_of, published
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
        self.access, self.url, self.replies = access, access.url.rstrip("/"), Path(replies)
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"the URL {access.url!r} must begin with http:// or https://")
        key = os.environ.get(access.key_variable, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(f"the key in {access.key_variable} is torn; copy it again")
        try:
            import openai
        except ImportError:
            raise UserError("asking a model needs its client: pip install openai") from None
        self.client = openai.OpenAI(
            base_url=self.url,
            api_key=key or "none",
            timeout=openai.Timeout(access.timeout, connect=min(15.0, access.timeout)),
            max_retries=access.tries - 1,
        )
        self.replies.mkdir(parents=True, exist_ok=True)
        self.limit, self.tokens = "max_tokens", access.max_tokens  # its name, what it is

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
            return read(self._answer(question, kept["reply"]))
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
            reply = self._send(question, tokens)
            try:
                answer = self._answer(question, reply)
                value = read(answer)
            except ValueError as error:
                why = str(error)
                if cut_off(reply):
                    why += f"; cut off at {tokens:,} tokens, thinking included (max_tokens)"
                    tokens *= 4
                continue
            self.tokens = max(self.tokens, tokens)
            if question.size:  # a URL does not last
                reply = {"data": [{"b64_json": base64.b64encode(answer).decode()}]}
            return reply, value
        raise Fault(f"no usable answer in {TRIES}", why)

    def _keep(self, path, question, outcome):
        """Put the outcome of a question on the disk, for good."""
        about = {"prompt": question.prompt, "images": len(question.images)}
        text = json.dumps({"model": self.access.model, **about, **outcome})
        with published(path, threading.get_ident()) as hidden, open(hidden, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())  # it was paid for: it must outlive a power cut

    def _answer(self, question, reply):
        """What a reply holds. Refused; ValueError."""
        if not question.size:
            return text_in(reply)
        picture = picture_in(reply)
        if isinstance(picture, bytes):
            return picture
        address = urljoin(f"{self.url}/", picture)
        try:
            response = requests.get(address, timeout=self.access.timeout)
            response.raise_for_status()
        except requests.RequestException as error:
            raise ValueError(f"{address[:100]} gives no picture ({str(error)[:160]})") from None
        return response.content

    def _send(self, question, tokens):
        """What the model replies: JSON, or text where it is none. Refused; Fault."""
        import openai

        limit = self.limit
        try:
            text = self._post(question, limit, tokens)
        except openai.APIStatusError as error:
            words = f"{error.code or ''} {error.message}"
            if error.status_code in (400, 403, 422, 451) and REFUSALS.search(words):
                raise Refused(words) from None
            if limit == "max_tokens" and "max_completion_tokens" in words:
                self.limit = "max_completion_tokens"
                return self._send(question, tokens)
            advice = {
                401: f"; set the environment variable {self.access.key_variable} to a valid key",
                404: f"; is {self.access.model!r} the name of a model there, and does the URL end "
                "in /v1?",
            }.get(error.status_code, "")
            about = f"{self.url} ({error.message[:200]}){advice}"
            raise Fault(f"answered {error.status_code}", about) from None
        except openai.APIConnectionError as error:
            about = f"{self.url} ({error.__cause__ or error}); check URL and network"
            raise Fault("cannot be reached", about) from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def _post(self, question, limit, tokens):
        """The text of the reply to one request. limit: the name of the limit of tokens."""
        if question.size:
            reply = self.client.images.with_raw_response.edit(
                model=self.access.model,
                prompt=question.prompt,
                size=question.size,
                image=[
                    (f"image_{i}.png", image, "image/png")
                    for i, image in enumerate(question.images, 1)
                ],
            )
            return reply.text
        content = [{"type": "text", "text": question.prompt}]
        for image in question.images:
            url = "data:image/png;base64," + base64.b64encode(image).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        reply = self.client.chat.completions.with_raw_response.create(
            model=self.access.model,
            messages=[{"role": "user", "content": content}],
            extra_body={limit: tokens},
        )
        return reply.text


# --------------------------------------------------------------------------------------------------
# many questions


def in_parallel(function, items, workers, *, bar=None, patient=False):
    """(item, function(item)) in the order in which they are done, `workers` at a time.

    A Fault takes the place of a result. UserError when most of the last WINDOW items failed, unless
    `patient`; any other error ends it too. bar: a tqdm bar, moved on by each item.
    """
    recent = deque(maxlen=WINDOW)  # of each item its Fault, or None
    with ThreadPoolExecutor(workers) as pool:
        items = {pool.submit(_attempt, function, item): item for item in items}
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


def _attempt(function, item):
    """function(item), or its Fault."""
    try:
        return function(item)
    except Fault as fault:
        return fault


def commonest(reasons):
    """The last of those reasons whose kind (what stands before the colon) is the most frequent."""
    kinds = Counter(reason.partition(":")[0] for reason in reasons)
    kind = max(kinds, key=kinds.get)
    return [reason for reason in reasons if reason.partition(":")[0] == kind][-1]


# --------------------------------------------------------------------------------------------------
# replies. reply: JSON, or text where it is none


def text_in(reply):
    """The text of a chat reply, with whatever thinking is in it. Refused; ValueError."""
    choice = _first(reply, "choices")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError(f"the reply has no message: {str(reply)[:80]!r}")
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        raise Refused(message.get("refusal") or "content filter")
    content = message.get("content")
    if isinstance(content, str) and cut_off(reply):
        content = content[: content.rfind("}") + 1]
    if not isinstance(content, str) or not content.strip():
        raise ValueError("the reply has no text")
    return content.encode("utf-8", "replace").decode()  # half an emoji cannot be written


def cut_off(reply):
    """Whether a chat reply ended because its limit of tokens was reached."""
    try:
        return _first(reply, "choices").get("finish_reason") == "length"
    except ValueError:
        return False


def picture_in(reply):
    """The picture of an image reply, as bytes, or its URL as str. ValueError if it has none."""
    item = _first(reply, "data")
    content = item.get("b64_json") or item.get("url")
    if not isinstance(content, str):
        raise ValueError(f"the reply has no picture: {str(reply)[:80]!r}")
    if content.startswith("data:"):
        content = content.partition(",")[2]
    elif not item.get("b64_json"):
        return content
    return base64.b64decode(content)


def _first(reply, name):
    """The first object of a list in a reply."""
    items = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(items, list) or not items or not isinstance(items[0], dict):
        raise ValueError(f"the reply has no {name}: {str(reply)[:80]!r}")
    return items[0]


def visible(text):
    """The text outside of thinking: behind the last </think>, and before a <think> without end."""
    return THINKS.split(THOUGHT.split(text)[-1])[0].strip()


def last_object(text, key):
    """The last JSON object outside of thinking that has this key; {} if it is not sure which.

    Braces that hold no JSON hide what is inside them, and nothing counts if the key stands once
    more behind the object: neither half of an object nor a draft is taken for the answer.
    """
    text = visible(text)
    found, behind, end = {}, 0, 0
    while (start := text.find("{", end)) >= 0:
        try:
            value, end = DECODER.raw_decode(text, start)
            json.dumps(value, ensure_ascii=False).encode()  # half an emoji cannot be written
        except (ValueError, RecursionError):
            value, end = {}, _end_of_braces(text, start)
        if key in value:
            found, behind = value, end
    return {} if f'"{key}"' in text[behind:] else found


def _end_of_braces(text, start):
    """Where the braces that open at `start` are closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place + 1
    return len(text)
