"""
Asking models over HTTP: the two OpenAI-compatible routes that curate.py and benchmarks.py need.

    POST {url}/chat/completions    a prompt and pictures (data URLs) -> text
    POST {url}/images/edits        a prompt and pictures (multipart) -> a picture

Hosted APIs, vLLM and SGLang have them. An Access says where a model is and how it may be asked, an
Endpoint asks it. An answer that can be read (replies.py) is kept on disk before it is used, under a
name made of the model and the whole question: what has been answered once is never asked again,
however often a run is killed. Nothing else is kept but a refusal, which is an answer too.

    no readable answer            asked again, TRIES times in all; a reply that was cut off at its
                                  limit of tokens with four times the limit
    no network, 408, 429, 5xx     asked again with exponential pauses and jitter, or when the server
                                  says (Retry-After, as seconds or date), which is said aloud
    413                           asked once more with pictures of half the side
    max_tokens is not known       the limit goes by the name of max_completion_tokens from then on

What is left then is a Fault: of one question, not of the run. Only when most of the last WINDOW
items of `in_parallel` failed does a UserError say so, with the commonest reason. The key comes from
the environment only, and is written nowhere.

Left out: streaming, batch interfaces, asynchronous clients.

    model = Endpoint(Access("http://localhost:8000/v1", "judge"), "out/replies")
    model.ask(Question("What do you see?", (png,)), visible)
"""

import base64
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter

from runtime.config import UserError
from runtime.files import object_of, published
from studies.replies import Fault, Refused, cut_off, picture_in, text_in
from vision import open_image, to_png

TRIES = 3  # answers to get one that can be read

NOTHING = 0  # in place of an HTTP status where nothing came

AGAIN = (NOTHING, 408, 409, 425, 429)  # and 5xx: a request is repeated

WINDOW = 40  # items: when most of the last ones failed, something else is wrong

# what an API says that has looked at the content; a proxy's "denied by policy" is none of these
REFUSALS = re.compile(
    r"content[ _](management )?policy|content[ _]filter|usage polic|moderation|flagged|"
    r"safety (system|filter|polic)",
    re.IGNORECASE,
)

LARGEST = 1024 * 1024  # pixels of a picture that is sent


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
    per_minute: float | None = None  # requests a minute, at most; None: no limit
    timeout: float = 180.0  # seconds
    tries: int = 6  # of one request, with growing pauses
    longest_wait: float = 300.0  # seconds that a server may ask to wait, at most
    max_tokens: int = 1400  # of an answer in text, to begin with


@dataclass(frozen=True)
class Reply:
    """What came back from one request."""

    status: int  # of HTTP, or of the error in the reply, or NOTHING
    content: object  # JSON, or text where it is none
    pause: float | None = None  # seconds that the server asks to wait


# --------------------------------------------------------------------------------------------------
# pictures that are sent


def to_send(image):
    """PNG bytes of a picture as it is sent: at most LARGEST pixels, sides times 16."""
    scale = min(1.0, math.sqrt(LARGEST / (image.width * image.height)))
    size = tuple(max(16, int(side * scale) // 16 * 16) for side in image.size)
    return to_png(image if size == image.size else image.resize(size))


def halved(png):
    """PNG bytes with half the side; as they are, where they cannot be what makes a request big."""
    image = open_image(io.BytesIO(png), "a picture to send")
    if min(image.size) < 64:
        return png
    return to_png(image.resize((image.width // 2, image.height // 2)))


# --------------------------------------------------------------------------------------------------
# one model


class Pace:
    """At most `per_minute` starts a minute over all threads; None: no limit."""

    def __init__(self, per_minute):
        self.gap, self.next, self.lock = 60 / per_minute if per_minute else 0, 0.0, threading.Lock()

    def wait(self):
        """Sleep until it is this caller's turn."""
        with self.lock:
            now = time.monotonic()
            start = max(now, self.next)
            self.next = start + self.gap
        time.sleep(start - now)

    def rest(self, seconds):
        """Nobody starts for so long; returns whether that is news to the others."""
        with self.lock:
            until = time.monotonic() + seconds
            news = until > self.next + seconds / 2
            self.next = max(self.next, until)
        return news


class Endpoint:
    """One model behind an OpenAI-compatible URL. replies: the folder where answers are kept."""

    def __init__(self, access, replies):
        self.access, self.url, self.replies = access, access.url.rstrip("/"), Path(replies)
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"the URL {access.url!r} must begin with http:// or https://")
        key = os.environ.get(access.key_variable, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(f"the key in {access.key_variable} is torn; copy it again")
        self.replies.mkdir(parents=True, exist_ok=True)
        self.pace, self.session = Pace(access.per_minute), requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=64))
        self.session.headers["Authorization"] = f"Bearer {key or 'none'}"
        self.limit, self.tokens = "max_tokens", access.max_tokens  # its name, what it is

    def ask(self, question, read):
        """read(answer) of the first answer that can be read, kept or new.

        An answer is text with its thinking, or the bytes of an image file. read: ValueError for an
        answer that will not do. Refused; Fault where there is none.
        """
        path = self.replies / f"{question.digest(self.access.model)}.json"
        kept = _kept(path)
        if "refused" in kept:
            raise Refused(kept["refused"])
        if "reply" in kept:
            try:
                return read(self._answer(question, kept["reply"]))
            except ValueError:
                pass  # kept by a reader that took more: asked again
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
        found = picture_in(reply)
        if isinstance(found, bytes):
            return found
        address = urljoin(f"{self.url}/", found)
        at_home = urlsplit(address).netloc == urlsplit(self.url).netloc
        get = self.session.get if at_home else requests.get  # nobody else is shown the key
        try:
            response = get(address, timeout=self.access.timeout)
            response.raise_for_status()
        except requests.RequestException as error:
            raise ValueError(f"{address[:100]} gives no picture ({_reason(error)})") from None
        return response.content

    def _send(self, question, tokens):
        """What the model replies: JSON, or text where it is none. Refused; Fault."""
        attempt, small = 0, False
        while True:
            limit = self.limit
            reply = self._post(question, {limit: tokens})
            if reply.status == 200:
                return reply.content
            message, code = _complaint(reply.content)
            if reply.status in (400, 403, 422, 451) and REFUSALS.search(f"{code} {message}"):
                raise Refused(message)
            if limit == "max_tokens" and "max_completion_tokens" in message:
                self.limit = "max_completion_tokens"
                continue
            if reply.status == 413 and not small:
                question = replace(question, images=tuple(map(halved, question.images)))
                small = True
                continue
            attempt += 1
            again = reply.status in AGAIN or reply.status >= 500
            if not again or attempt >= self.access.tries or code == "insufficient_quota":
                kind = f"answered {reply.status}" if reply.status else "cannot be reached"
                raise Fault(kind, f"{self.url} ({message}){self._advice(reply.status)}")
            self._pause(attempt, reply.pause)

    def _post(self, question, limits):
        """One request, when its turn has come."""
        self.pace.wait()
        route, content = self._request(question, limits)
        timeout = (min(15.0, self.access.timeout), self.access.timeout)  # to connect, to answer
        try:
            response = self.session.post(f"{self.url}/{route}", timeout=timeout, **content)
        except requests.RequestException as error:
            return Reply(NOTHING, _reason(error))
        try:
            found = response.json()
        except (ValueError, RecursionError):
            found = response.text
        status = 200 if 200 <= response.status_code < 300 else response.status_code
        if status == 200 and isinstance(found, dict) and found.get("error"):
            _, code = _complaint(found)  # some gateways pass on another's error like this
            status = int(code) if code in map(str, range(400, 600)) else 502
        return Reply(status, found, _retry_after(response.headers.get("Retry-After", "")))

    def _request(self, question, limits):
        """(route, what requests.post is to send) of a question."""
        if question.size:
            files = [
                ("image[]", (f"image_{i}.png", image, "image/png"))
                for i, image in enumerate(question.images, 1)
            ]
            data = {"model": self.access.model, "prompt": question.prompt, "size": question.size}
            return "images/edits", {"files": files, "data": data}
        content = [{"type": "text", "text": question.prompt}]
        for image in question.images:
            url = "data:image/png;base64," + base64.b64encode(image).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": content}]
        body = {"model": self.access.model, "messages": messages, **limits}
        return "chat/completions", {"json": body}

    def _pause(self, attempt, asked):
        """Before the next attempt: a growing pause, or what the server asks for, said aloud."""
        seconds = min(60, 0.5 * 2 ** (attempt - 1)) * random.uniform(1, 1.5)
        if asked is None or asked <= seconds:
            time.sleep(seconds)
            return
        seconds = min(asked, self.access.longest_wait)
        if self.pace.rest(seconds):
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
            print(
                f"{self.access.model} at {self.url} asks to wait {asked:,.0f} s; the next request "
                f"goes out in {seconds:,.0f} s, at {until} (--longest_wait)",
                file=sys.stderr,
                flush=True,
            )

    def _advice(self, status):
        """What a person can do about this HTTP status."""
        name = self.access.key_variable
        return {
            NOTHING: "; check URL and network",
            401: f"; set the environment variable {name} to a valid key",
            403: f"; the key in {name} may not do this",
            404: f"; is {self.access.model!r} the name of a model there, and does the URL end in "
            "/v1?",
        }.get(status, "")


def _kept(path):
    """What is kept under this name, {} if that is nothing."""
    try:
        return object_of(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _retry_after(text):
    """Seconds that a Retry-After asks for, given as a number or as a date; None if as neither."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _complaint(content):
    """(message, code) of what came with an HTTP error."""
    if not isinstance(content, dict):
        return str(content)[:200], ""
    error = content.get("error") or content
    if not isinstance(error, dict):
        return str(error)[:200], ""
    message = error.get("message") or error.get("detail") or error
    return str(message)[:200], str(error.get("code", ""))


def _reason(error):
    """The innermost words of a chain of network errors."""
    text = str(error.args[0] if error.args else error)
    return text.rsplit("Caused by ", 1)[-1][:160].strip("()")


# --------------------------------------------------------------------------------------------------
# many questions


def in_parallel(function, items, workers, *, bar=None, patient=False):
    """(item, function(item)) in the order in which they are done, `workers` at a time.

    A Fault takes the place of a result. UserError when most of the last WINDOW items failed, unless
    `patient`; any other error ends it too. bar: a tqdm bar, moved on by each item.
    """
    recent = deque(maxlen=WINDOW)
    with ThreadPoolExecutor(workers) as pool:
        waiting, pending = iter(items), {}
        try:
            while True:
                while len(pending) < 2 * workers and (item := next(waiting, None)) is not None:
                    pending[pool.submit(_attempt, function, item)] = item
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield pending.pop(future), result
                    recent.append(result if isinstance(result, Fault) else None)
                    if bar is not None:
                        bar.update()
                if not patient:
                    _check(recent)
        finally:
            for future in pending:
                future.cancel()


def _attempt(function, item):
    """function(item), or its Fault."""
    try:
        return function(item)
    except Fault as fault:
        return fault


def _check(recent):
    """UserError when more than half of WINDOW items failed."""
    faults = [str(fault) for fault in recent if fault is not None]
    if 2 * len(faults) > WINDOW:
        raise UserError(
            f"{len(faults)} of the last {len(recent)} samples failed, most often: "
            f"{commonest(faults)}; nothing was lost: repeat the command to go on"
        )


def commonest(reasons):
    """The last of those reasons whose kind (what stands before the colon) is the most frequent."""
    kinds = [reason.partition(":")[0] for reason in reasons]
    ((kind, _),) = Counter(kinds).most_common(1)
    return [reason for reason in reasons if reason.partition(":")[0] == kind][-1]
