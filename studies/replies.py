"""
What a model answered: the one reader of all replies, for endpoint.py, writer.py and judge.py.

    text_in       choices[0].message.content         text, with whatever thinking is in it
    picture_in    data[0].b64_json or data[0].url    the bytes of a picture, or where it lies
    visible       text - thinking                    thinking = <think> ... </think>, nested too; up
                                                     to a lone </think>, and from a lone <think> on
    last_object   visible -> a JSON object           the last one that holds a key

Forgiven: text around an object, drafts before it, a trailing comma, 8/10 for 8. Not forgiven:
whatever would take a guess. Braces that hold no JSON hide what is inside them, and nothing counts
when the key stands once more behind it; so neither half of an object nor a draft is taken for the
answer. Of a reply that was cut off at its limit of tokens only what ends in a brace counts. What
cannot be read is a ValueError: the question may be asked again.

    Fault      why one sample fails, as "kind: detail"; the next run asks again
    Refused    the model declined: a Fault that is an answer, kept and not asked again

Left out: tool calls, several choices, reasoning in fields of its own (it is no answer).

    last_object('<think>{"score": 3}?</think> It is {"score": 8,}.', "score")    # {"score": 8}
"""

import base64
import json
import re

THINKING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)

SLIP = re.compile(r",(?=\s*[}\]])|/\s*10(?![\d.])")  # in JSON that is sound but for it

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


# --------------------------------------------------------------------------------------------------
# replies of the two routes. reply: JSON, or text where it is none


def text_in(reply):
    """The text of a chat reply. Refused; ValueError if it has none."""
    choice = _first(reply, "choices")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError(f"the reply has no message: {_glimpse(reply)}")
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        raise Refused(message.get("refusal") or "content filter")
    content = message.get("content")
    if isinstance(content, list):  # in parts, some of which may be thinking
        parts = [part for part in content if isinstance(part, dict)]
        texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
        content = "".join(text for text in texts if isinstance(text, str))
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
    one = _first(reply, "data")
    content = one.get("b64_json") or one.get("url")
    if not isinstance(content, str):
        raise ValueError(f"the reply has no picture: {_glimpse(reply)}")
    if content.startswith("data:"):
        content = content.partition(",")[2]
    elif not one.get("b64_json") or content.startswith(("http://", "https://")):
        return content
    content = "".join(content.split()).rstrip("=")
    return base64.b64decode(content + "=" * (-len(content) % 4), validate=True)


def _first(reply, name):
    """The first object of a list in a reply."""
    if isinstance(reply, str):
        raise ValueError(f"the reply is not JSON: {_glimpse(reply)}")
    found = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise ValueError(f"the reply has no {name}: {_glimpse(reply)}")
    return found[0]


def _glimpse(reply):
    return repr(str(reply)[:80])


# --------------------------------------------------------------------------------------------------
# text


def visible(text):
    """The text outside of thinking."""
    parts, depth, end = [], 0, 0
    for tag in THINKING.finditer(text):
        if tag[1]:
            if depth == 0:  # it was opened in the prompt
                parts.clear()
            depth = max(0, depth - 1)
        else:
            if depth == 0:
                parts.append(text[end : tag.start()])
            depth += 1
        end = tag.end()
    return " ".join([*parts, text[end:] if depth == 0 else ""]).strip()


def last_object(text, key):
    """The last JSON object outside of thinking that has this key; {} if it is not sure which."""
    text, found, behind, start = visible(text), {}, 0, 0
    while (start := text.find("{", start)) >= 0:
        value, start = _object_at(text, start)
        if value and key in value:
            found, behind = value, start
    return {} if f'"{key}"' in text[behind:] else found


def _object_at(text, start):
    """(the object that begins at `start`, or None; where it ends)."""
    for _ in range(20):  # slips
        try:
            value, end = DECODER.raw_decode(text, start)
            json.dumps(value, ensure_ascii=False).encode()  # half an emoji cannot be written
            return value, end
        except json.JSONDecodeError as error:
            place = error.pos  # Python 3.13 points at the trailing comma, others behind it
            if text[place : place + 1] not in ("/", ","):
                place = len(text[:place].rstrip()) - 1
            slip = SLIP.match(text, place)
            if slip is None or place < start:
                break
            text = text[:place] + " " * len(slip[0]) + text[slip.end() :]
        except (ValueError, RecursionError):
            break
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return None, place + 1
    return None, len(text)
