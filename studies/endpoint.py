"""
Asking models over HTTP: the two OpenAI-compatible routes that curate.py and benchmarks.py need.

    POST {url}/chat/completions   a prompt and pictures (data URLs) -> text         hosted APIs, vLLM, SGLang
    POST {url}/images/edits       a prompt and several pictures (multipart) -> a picture

Every reply is kept on disk before it is used, under a name made of the model and the whole question: what has been
answered once is never asked again, however often a run is killed. Network errors, 408, 409, 429 and 5xx are tried
again with exponential backoff and jitter, after Retry-After if the server says so (urllib3's Retry). A refusal
(content policy) is an answer: it is kept and not asked again. The key comes from the environment only.

Left out: streaming, batch interfaces, asynchronous clients.
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

AGAIN = (408, 409, 429, 500, 502, 503, 504)


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


class Pace:
    """At most `per_minute` starts a minute over all threads; None: no limit."""

    def __init__(self, per_minute):
        self.gap, self.next, self.lock = 60 / per_minute if per_minute else 0, 0.0, threading.Lock()

    def wait(self):
        with self.lock:
            now = time.monotonic()
            start = max(now, self.next)
            self.next = start + self.gap
        time.sleep(start - now)


class Endpoint:
    """One model behind an OpenAI-compatible URL. replies: the folder where answers are kept."""

    def __init__(
        self,
        url,
        model,
        replies,
        key_variable="OPENAI_API_KEY",
        per_minute=None,
        timeout=180.0,
        tries=6,
        max_tokens=1400,
    ):
        self.url, self.model, self.replies = url.rstrip("/"), model, Path(replies)
        self.timeout, self.max_tokens, self.pace, self.asked = (
            timeout,
            max_tokens,
            Pace(per_minute),
            0,
        )
        self.replies.mkdir(parents=True, exist_ok=True)
        retry = Retry(
            tries - 1,
            status_forcelist=AGAIN,
            allowed_methods=None,
            backoff_factor=0.5,
            backoff_max=60,
            backoff_jitter=0.5,
            respect_retry_after_header=True,
            raise_on_status=False,
        )
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=64))
        key = os.environ.get(key_variable, "")
        self.session.headers["Authorization"] = f"Bearer {key}" if key else "Bearer none"
        self.key_variable = key_variable

    def text(self, question):
        """The text that answers a question. Refused, Unusable; UserError where no question can be answered."""
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
        """The picture, as bytes of an image file, that answers a question."""
        reply = self._kept(question, self._ask_image)
        try:
            return base64.b64decode(reply["data"][0]["b64_json"], validate=True)
        except (KeyError, IndexError, TypeError, ValueError):
            raise Unusable("the reply has no data[0].b64_json") from None

    def forget(self, question):
        """Drop the kept answer to a question, so that it is asked again."""
        self._path(question).unlink(missing_ok=True)

    def _path(self, question):
        return self.replies / f"{question.digest(self.model)}.json"

    def _kept(self, question, ask):
        """The reply to a question: from disk, or asked for and put there."""
        path = self._path(question)
        if path.is_file():
            kept = json.loads(path.read_text())
        else:
            self.pace.wait()
            kept = {
                "model": self.model,
                "prompt": question.prompt,
                "images": len(question.images),
                **ask(question),
            }
            hidden = path.with_suffix(f".{threading.get_ident()}.tmp")
            with open(hidden, "w") as file:
                file.write(json.dumps(kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, path)
        if "refused" in kept:
            raise Refused(kept["refused"])
        if "unusable" in kept:
            raise Unusable(kept["unusable"])
        return kept["reply"]

    def _ask_chat(self, question):
        images = [
            {
                "type": "image_url",
                "image_url": {"url": "data:image/png;base64," + base64.b64encode(image).decode()},
            }
            for image in question.images
        ]
        content = [{"type": "text", "text": question.prompt}, *images]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
        }
        return self._post("chat/completions", json=body)

    def _ask_image(self, question):
        files = [
            ("image[]", (f"image_{i}.png", image, "image/png"))
            for i, image in enumerate(question.images, 1)
        ]
        return self._post(
            "images/edits",
            files=files,
            data={"model": self.model, "prompt": question.prompt, "size": question.size},
        )

    def _post(self, route, **content):
        """{"reply": ...}, {"refused": why} or {"unusable": why}; UserError where the endpoint itself is at fault."""
        self.asked += 1
        try:
            response = self.session.post(f"{self.url}/{route}", timeout=self.timeout, **content)
        except requests.RequestException as error:
            raise UserError(
                f"{self.url} cannot be reached ({_reason(error)}); check URL and network, then repeat the command"
            ) from None
        try:
            reply = response.json()
        except requests.JSONDecodeError:
            reply = None
        if response.status_code == 200:
            return {"unusable": "the reply is not JSON"} if reply is None else {"reply": reply}
        error = reply.get("error", reply) if isinstance(reply, dict) else {}
        message = (
            str(error.get("message", "") if isinstance(error, dict) else error)[:200]
            or response.reason
        )
        code = str(error.get("code", "")) if isinstance(error, dict) else ""
        if response.status_code == 400 and (
            "policy" in code + message.lower()
            or "moderation" in code + message.lower()
            or "safety" in message.lower()
        ):
            return {"refused": message}
        advice = {
            401: f"set the environment variable {self.key_variable} to a valid key",
            403: f"the key in {self.key_variable} may not do this",
            404: f"is {self.model!r} the name of a model there, and does the URL end in /v1?",
        }
        raise UserError(
            f"{self.url}/{route} answered {response.status_code} ({message}); "
            + advice.get(response.status_code, "nothing was lost: repeat the command to go on")
        )


def _reason(error):
    """The innermost words of a chain of network errors."""
    text = str(getattr(error, "args", [error])[0] if getattr(error, "args", None) else error)
    return text.rsplit("Caused by ", 1)[-1][:160].strip("()")


def in_parallel(function, items, workers, bar=None):
    """(item, function(item)) in the order in which they are done, `workers` at a time; the first error ends it."""
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
