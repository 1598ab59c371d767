"""
Asking models over HTTP: the two OpenAI-compatible routes that curate.py and benchmarks.py need.

    POST {url}/chat/completions    a prompt and pictures (data URLs) -> text
    POST {url}/images/edits        a prompt and pictures (multipart) -> a picture

Hosted APIs, vLLM and SGLang have them. An Access says where a model is and how it may be asked, an
Endpoint asks it. Every reply is kept on disk before it is used, under a name made of the model and
the whole question: what has been answered once is never asked again, however often a run is killed.
Network errors, 408, 409, 429 and 5xx are tried again with exponential backoff and jitter, after
Retry-After if the server says so (urllib3's Retry). A refusal (content policy) is an answer: it is
kept and not asked again. So is an answer that is no JSON. The key comes from the environment only,
and is written nowhere.

    Refused      the model declined
    Unusable     an answer came and cannot be used; another nonce asks again
    UserError    the endpoint is at fault: no network, no key, no such model; nothing is lost

Left out: streaming, batch interfaces, asynchronous clients.

    judge = Endpoint(Access("http://localhost:8000/v1", "judge"), "out/replies")
    judge.text(Question("What do you see?", (png,)))
"""

import base64
import hashlib
import json
import os
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from runtime.config import UserError
from runtime.files import published

AGAIN = (408, 409, 429, 500, 502, 503, 504)  # answers after which a request is repeated


class Refused(Exception):
    """The model declined to answer this question; asking again would not help."""


class Unusable(Exception):
    """An answer came and cannot be used: broken JSON, a truncated picture, a missing field."""


@dataclass(frozen=True)
class Question:
    """What one request asks. images: PNG bytes, in order."""

    prompt: str
    images: tuple[bytes, ...] = ()
    size: str = ""  # of the picture asked for, "1024x1024"; "" asks for text
    nonce: int = 0  # another answer to the same question has another number

    def digest(self, model):
        """The name of the answer: a hash of everything that it depends on."""
        digest = hashlib.sha256(json.dumps([model, self.prompt, self.size, self.nonce]).encode())
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
    max_tokens: int = 1400  # of an answer in text


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


class Endpoint:
    """One model behind an OpenAI-compatible URL. replies: the folder where answers are kept."""

    def __init__(self, access, replies):
        self.access, self.url, self.replies = access, access.url.rstrip("/"), Path(replies)
        self.replies.mkdir(parents=True, exist_ok=True)
        self.pace, self.session = Pace(access.per_minute), requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=_retry(access), pool_maxsize=64))
        key = os.environ.get(access.key_variable, "")
        self.session.headers["Authorization"] = f"Bearer {key}" if key else "Bearer none"

    def text(self, question):
        """The text that answers a question.

        Refused, Unusable: see above. UserError where no question can be answered.
        """
        reply = self._kept(question, self._ask_chat)
        try:
            message = reply["choices"][0]["message"]
        except (KeyError, IndexError, TypeError):
            raise Unusable("the reply has no choices[0].message") from None
        if message.get("refusal") or reply["choices"][0].get("finish_reason") == "content_filter":
            raise Refused(message.get("refusal") or "content filter")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise Unusable("the reply has no text")
        return message["content"]

    def picture(self, question):
        """The picture that answers a question, as bytes of an image file. Errors as in `text`."""
        reply = self._kept(question, self._ask_image)
        try:
            return base64.b64decode(reply["data"][0]["b64_json"], validate=True)
        except (KeyError, IndexError, TypeError, ValueError):
            raise Unusable("the reply has no data[0].b64_json") from None

    def _kept(self, question, ask):
        """The reply to a question: from disk, or asked for and put there."""
        path = self.replies / f"{question.digest(self.access.model)}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
        else:
            self.pace.wait()
            about = {"prompt": question.prompt, "images": len(question.images)}
            kept = {"model": self.access.model, **about, **ask(question)}
            with (
                published(path, threading.get_ident()) as hidden,
                open(hidden, "w", encoding="utf-8") as file,
            ):
                file.write(json.dumps(kept))
                file.flush()
                os.fsync(file.fileno())  # it was paid for: it must outlive a power cut
        if "refused" in kept:
            raise Refused(kept["refused"])
        if "unusable" in kept:
            raise Unusable(kept["unusable"])
        return kept["reply"]

    def _ask_chat(self, question):
        content = [{"type": "text", "text": question.prompt}]
        for image in question.images:
            url = "data:image/png;base64," + base64.b64encode(image).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": content}]
        limits = {"max_tokens": self.access.max_tokens}
        body = {"model": self.access.model, "messages": messages, **limits}
        return self._post("chat/completions", json=body)

    def _ask_image(self, question):
        files = [
            ("image[]", (f"image_{i}.png", image, "image/png"))
            for i, image in enumerate(question.images, 1)
        ]
        data = {"model": self.access.model, "prompt": question.prompt, "size": question.size}
        return self._post("images/edits", files=files, data=data)

    def _post(self, route, **content):
        """{"reply": ...}, {"refused": why} or {"unusable": why}.

        UserError where the endpoint itself is at fault.
        """
        address, timeout = f"{self.url}/{route}", self.access.timeout
        try:
            response = self.session.post(address, timeout=timeout, **content)
        except requests.RequestException as error:
            raise UserError(
                f"{self.url} cannot be reached ({_reason(error)}); "
                "check URL and network, then repeat the command"
            ) from None
        try:
            reply = response.json()
        except requests.JSONDecodeError:
            reply = None
        if response.status_code == 200:
            return {"unusable": "the reply is not JSON"} if reply is None else {"reply": reply}
        message, code = _complaint(response, reply)
        if response.status_code == 400 and _is_refusal(message.lower(), code):
            return {"refused": message}
        raise UserError(
            f"{address} answered {response.status_code} ({message}); "
            + self._advice(response.status_code)
        )

    def _advice(self, status):
        """What a person can do about this HTTP status."""
        return {
            401: f"set the environment variable {self.access.key_variable} to a valid key",
            403: f"the key in {self.access.key_variable} may not do this",
            404: f"is {self.access.model!r} the name of a model there, "
            "and does the URL end in /v1?",
        }.get(status, "nothing was lost: repeat the command to go on")


def _retry(access):
    return Retry(
        access.tries - 1,
        status_forcelist=AGAIN,
        allowed_methods=None,  # POST too: nothing is changed by asking twice
        backoff_factor=0.5,
        backoff_max=60,
        backoff_jitter=0.5,
        respect_retry_after_header=True,
        raise_on_status=False,
    )


def _complaint(response, reply):
    """(message, code) of an HTTP error; reply: its JSON, if it is some."""
    error = reply.get("error", reply) if isinstance(reply, dict) else {}
    if not isinstance(error, dict):
        return str(error)[:200] or response.reason, ""
    return str(error.get("message", ""))[:200] or response.reason, str(error.get("code", ""))


def _is_refusal(message, code):
    """Whether a 400 says that the content, not the form of the question, was the trouble."""
    words = code + message
    return "policy" in words or "moderation" in words or "safety" in message


def _reason(error):
    """The innermost words of a chain of network errors."""
    text = str(getattr(error, "args", [error])[0] if getattr(error, "args", None) else error)
    return text.rsplit("Caused by ", 1)[-1][:160].strip("()")


# --------------------------------------------------------------------------------------------------
# many questions


def in_parallel(function, items, workers, *, bar=None):
    """(item, function(item)) in the order in which they are done, `workers` at a time.

    The first error ends it. bar: a tqdm bar, moved on by each item.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting, pending = iter(items), {}
        try:
            while True:
                while len(pending) < 2 * workers and (item := next(waiting, None)) is not None:
                    pending[pool.submit(function, item)] = item
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
                    if bar is not None:
                        bar.update()
        finally:
            for future in pending:
                future.cancel()
