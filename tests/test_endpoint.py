"""
Questions to models over HTTP, and the reader of what they answer: what a fault is a fault of, what
is kept, what reasoning models do, how big requests are. How often and when a request is repeated is
the client's business. test_curate.py has the whole pipeline.
"""

import base64
import dataclasses
import io
import json
import random
import re
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from bad_endpoint import error, replies, says, served
from PIL import Image

import curate
import evaluate
from iccot import ICCoT, to_json
from runtime.config import UserError
from studies import benchmarks
from studies.endpoint import (
    WINDOW,
    Access,
    Endpoint,
    Fault,
    Question,
    Refused,
    answer_in,
    in_parallel,
    read_score,
    to_send,
    visible,
)
from toy import world
from vision import to_png

pytest.importorskip("openai", reason="no client to ask with: pip install openai")

RED = to_png(Image.new("RGB", (32, 32), "red"))


@contextmanager
def asked(folder, fault, **options):
    """An endpoint whose server has this fault, a question about one portrait, and the server."""
    portrait = world.portrait(np.random.default_rng(0), world.subjects()[5])
    question = Question("Task type: subject. Write.", (to_png(Image.fromarray(portrait)),))
    with served(fault) as running:
        access = Access(f"{running.home}/v1", "toy", **{"timeout": 60.0, "tries": 3, **options})
        yield Endpoint(access, folder / "replies"), question, running


def always(fault):
    """A fault that every request has."""
    return lambda handler, number: fault(handler) or True


def then_well(*faults):
    """These faults for the first requests, and no more."""

    def fault(handler, number):
        if number <= len(faults):
            faults[number - 1](handler)
        return number <= len(faults)

    return fault


def never(handler, number):
    return False


def picture_question(question):
    return dataclasses.replace(question, size="32x32")


# --------------------------------------------------------------------------------------------------
# a fault of one sample is a fault of one sample


@pytest.mark.parametrize(
    "status, words",
    [(400, "oops"), (401, "OPENAI_API_KEY"), (404, "name of a model"), (503, "oops")],
)
def test_an_http_error_is_a_fault_of_one_sample(tmp_path, status, words):
    fault = always(error(status, "oops", Retry_After_ms="5"))
    with asked(tmp_path, fault, tries=2) as (endpoint, question, one):
        with pytest.raises(Fault, match=f"answered {status}: .*{words}"):
            endpoint.ask(question, visible)
        assert one.requests == (2 if status == 503 else 1)
        assert not list((tmp_path / "replies").iterdir())
    nobody = Endpoint(Access(endpoint.access.url, "toy", tries=1), tmp_path / "replies")
    with pytest.raises(Fault, match="cannot be reached"):
        nobody.ask(question, visible)


def test_a_picture_that_does_not_open_is_a_fault_of_one_sample(tmp_path):
    (tmp_path / "torn.png").write_bytes(RED[:40])
    config = curate.Config(pools=str(tmp_path))
    for name in ("torn.png", "gone.png"):
        with pytest.raises(Fault, match=f"a picture does not open: .*{name}"):
            curate.pictures_of({"references": [name]}, config)


def failing(*numbers):
    def function(number):
        time.sleep(0.002)  # so that results are taken one by one, in order
        if number in numbers:
            raise Fault("no luck" if number % 3 else "no wind", f"with {number}")
        return {}

    return function


def test_a_run_stops_only_when_most_of_the_last_samples_fail():
    some = [number for number in range(200) if number % 5 < 2]
    found = dict(in_parallel(failing(*some), range(200), 1))
    assert [number for number in range(200) if isinstance(found[number], Fault)] == some
    found = {}
    with pytest.raises(UserError, match=r"2[12] of the last 40 .*: no luck: with 1\d\d; .*repeat"):
        for number, one in in_parallel(failing(*range(99, 200)), range(200), 1):
            found[number] = one
    assert len(found) >= 99 + WINDOW // 2  # and all of them were handed over
    assert len(list(in_parallel(failing(*range(99)), range(99), 2, patient=True))) == 99


def test_repeating_gets_past_what_fails_again(tmp_path, capsys):
    config = curate.Config(out=str(tmp_path), workers=1)
    before = {f"k{i}": {"key": f"k{i}"} for i in range(60)}

    def stage(broken, known):
        def function(record):
            seen.append(record["key"])
            if record["key"] in broken:
                raise (Refused if record["key"] == "k0" else Fault)(*broken[record["key"]])
            return {"text": "x"}

        seen = []
        records = curate.run_stage("plans", known, function, config=config)
        return seen, [key for key, one in records.items() if "dropped" in one]

    broken = {f"k{i}": ("answered 400", "no") for i in range(0, 60, 2)} | {"k0": ("no",)}
    _, dropped = stage(broken, dict(list(before.items())[:50]))
    assert len(dropped) == 25
    seen, dropped = stage(broken, before)  # 24 of 34 fail, and it goes on
    assert sorted(seen) == sorted({*broken} - {"k0"} | {f"k{i}" for i in range(50, 60)})
    assert len(dropped) == 30 and "30 dropped (29 will be tried again)" in capsys.readouterr().out
    seen, dropped = stage({"k2": ("answered 400", "no")}, before)
    assert dropped == ["k0", "k2"] and len(seen) == 29  # what the model declined stays
    everything = {key: ("answered 401", "key") for key in before}
    with pytest.raises(UserError, match="2. of the last"):
        curate.run_stage("scores", before, failing_all(everything), config=config)
    with pytest.raises(UserError, match="none of 3 samples is usable, most often: answered 401"):
        few = dict(list(before.items())[:3])
        curate.run_stage("targets", few, failing_all(everything), config=config)


def failing_all(broken):
    def function(record):
        raise Fault(*broken[record["key"]])

    return function


def test_a_case_that_cannot_be_judged_is_null_and_asked_again(tmp_path, capsys):
    def fault(handler, number):
        prompt, _ = handler.question()
        name = prompt.rsplit(" ", 1)[-1]
        asked_of.append(name)
        faults = {"well": says('{"score": 8}'), "declined": error(400, "content policy")}
        faults.get(name, error(400, "no such luck") if sick else faults["well"])(handler)
        return True

    names, sick = ("well", "declined", "sick"), True
    red, asked_of = Image.new("RGB", (32, 32), "red"), []
    cases = [benchmarks.Case(name, "add", f"Draw {name}", "en", (red,)) for name in names]
    with served(fault) as one:
        config = evaluate.Config(judge_url=f"{one.home}/v1", out=str(tmp_path))
        path = benchmarks.picture_path(tmp_path, cases[0])
        path.parent.mkdir(parents=True)
        for case in cases:
            red.save(benchmarks.picture_path(tmp_path, case))

        def scores():
            asked_of.clear()
            return [row["PF_score"] for row in benchmarks.judge_cases(cases, config)]

        assert scores() == [8, None, None]
        assert "no score for 2 of 3 pictures, most often: " in capsys.readouterr().out
        sick = False
        assert scores() == [8, None, 8] and asked_of == ["sick", "sick"]
        assert scores() == [8, None, 8] and not asked_of


# --------------------------------------------------------------------------------------------------
# only answers are kept for good


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Bad gateway</html>",
        {"choices": None},
        {"choices": [{"message": {"content": ""}}]},
        {"choices": [{"message": {"content": None}, "finish_reason": "length"}]},
        {"choices": [{"message": {"content": "<think>Let me see"}}]},
    ],
)
def test_only_answers_are_kept_for_good(tmp_path, content):
    def read(answer):
        if not visible(answer):
            raise ValueError("nothing to see")
        return answer

    with asked(tmp_path, then_well(*3 * [replies(content)])) as (endpoint, question, one):
        with pytest.raises(Fault, match="no usable answer in 3: "):
            endpoint.ask(question, read)
        assert one.requests == 3 and not list((tmp_path / "replies").iterdir())
        for _ in range(2):
            assert endpoint.ask(question, read)
        assert one.requests == 4


def test_what_was_kept_without_being_an_answer_is_asked_again(tmp_path):
    with asked(tmp_path, never) as (endpoint, question, one):
        path = tmp_path / "replies" / f"{question.digest('toy')}.json"
        for kept in ('{"unusable": "no JSON"}', '{"reply": {"choices": null}}', '{"reply": {"cho'):
            path.write_text(kept)
            assert endpoint.ask(question, visible)
        assert one.requests == 3


@pytest.mark.parametrize(
    "fault",
    [
        error(400, "against our content policy"),
        error(403, "no", "moderation_blocked"),
        replies({"choices": [{"message": {"refusal": "no"}}]}),
        says("I’m sorry, but I can't help with that."),
    ],
)
def test_a_refusal_is_an_answer(tmp_path, fault):
    read = partial(curate.read_instruction, {"references": ["a.png"]})
    with asked(tmp_path, always(fault)) as (endpoint, question, one):
        for _ in range(2):
            with pytest.raises(Refused, match="refused: "):
                endpoint.ask(question, read)
        assert one.requests == 1


def encoded(content):
    return base64.b64encode(content).decode()


def test_a_picture_is_kept(tmp_path):
    with asked(tmp_path, always(replies({"data": [{"b64_json": encoded(RED)}]}))) as (
        endpoint,
        question,
        running,
    ):
        for _ in range(2):
            assert endpoint.ask(picture_question(question), curate.read_picture) == RED
        assert running.requests == 1


@pytest.mark.parametrize("item", [{"b64_json": encoded(RED[:50])}, {"b64_json": "?"}, {"url": "x"}])
def test_a_picture_that_is_none_is_not_kept(tmp_path, item):
    with asked(tmp_path, always(replies({"data": [item]}))) as (endpoint, question, _):
        with pytest.raises(Fault, match="no usable answer"):
            endpoint.ask(picture_question(question), curate.read_picture)
        assert not list((tmp_path / "replies").iterdir())


# --------------------------------------------------------------------------------------------------
# reasoning models, and the reader


def test_thinking_that_uses_up_the_limit_raises_it(tmp_path):
    limits = []

    def fault(handler, number):
        limits.append(json.loads(handler.body)["max_completion_tokens"])
        if limits[-1] < 5000:
            says(None, "length")(handler)
            return True

    with asked(tmp_path, fault) as (endpoint, question, _):
        assert endpoint.ask(question, visible)
        assert endpoint.ask(dataclasses.replace(question, prompt="Task type: subject."), visible)
    assert limits == [1400, 5600, 5600]  # the second question begins where the first one ended
    with asked(tmp_path / "2", always(says("Put the", "length"))) as (endpoint, question, _):
        with pytest.raises(Fault, match="cut off at 22,400 tokens"):
            endpoint.ask(question, visible)
        assert endpoint.tokens == 1400


THINKING = '<think>{"score": 1}? {Or <think>{"score": 2}</think> not.</think>'


@pytest.mark.parametrize(
    "answer, score",
    [
        ('{"score": 7, "reasoning": "x"}', 7),
        ('```json\n{"score": 8.5,\n"reasoning": "y\nz"}\n```', 8.5),
        ('{"score": 3} No: {"score": 8}', 8),
        (THINKING + ' {"score": 8}', 8),
        ('So {"score": 3}.</think>\n{"score": 8}', 8),
        ('{"score": 8} <think>{"score": 3}', 8),
        ('{"score": 8, "list": [1, 2,],}', None),
        ("I would say 8/10.", None),
        ('{"score": 11}', None),
        ('{"score": 3} No: {"score": 11}', None),
        ('{"score": 3} No: {"score": 8', None),
        ('{"score": 8, "reasoning": "as {"score": 3} says"}', None),
        ('{"score": [8, 3]}', None),
        ('{"score": "high"}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        (THINKING, None),
        ('{"score":' * 20000, None),
    ],
)
def test_scores_are_read_or_refused_and_never_guessed(answer, score):
    if score is None:
        with pytest.raises(ValueError, match="no score from 0 to 10|no JSON"):
            read_score(answer)
    else:
        assert read_score(answer)[0] == score


@pytest.mark.parametrize("before", ["", THINKING, '{"out_caption": "A draft."} Better:\n'])
@pytest.mark.parametrize("after", ["", "\n```\nI hope this helps."])
def test_plans_are_read_by_the_same_reader(before, after):
    plan = ICCoT("A man.", ("The man is from image_1.",))
    read = partial(curate.read_plan, {"references": ["a.png"]})
    found = json.loads(to_json(plan))
    assert read(before + to_json(plan) + after) == {"plan": found}
    with pytest.raises(ValueError):
        read(before + to_json(plan)[:-1] + after)


def test_an_instruction_is_what_stands_outside_of_thinking():
    read = partial(curate.read_instruction, {"references": ["a.png"]})
    assert read(THINKING + ' "Draw  image 1."') == {"instruction": "Draw image 1."}
    for answer in (THINKING, '""', "x" * 1001):
        with pytest.raises(ValueError, match="an instruction of"):
            read(answer)


PIECES = ("{", "}", '"', ",", ":", "[", "]", "\\", "<think>", "</think>", "\n", "\u2028", "\ud83d")
PIECES += (" ", ".", "-", "/", "e", "null", "NaN", "```", "é", "\\ud83d", "'", "score", "**", "\0")


def mutated(rng, text, most=4):
    """A text with pieces put in, taken out, doubled, or cut off; its digits stay as they are."""
    for _ in range(rng.randint(1, most)):
        start = rng.randint(0, len(text))
        piece = re.match(r"\D{0,9}", text[start:])[0]
        way = rng.randrange(8)
        if way < 4:
            text = text[:start] + rng.choice(PIECES) + text[start:]
        elif way < 6:
            text = text[:start] + text[start + len(piece) :]
        elif way < 7:
            text = text[:start] + piece + text[start:]
        else:
            text = text[:start]
    return text


ANSWERS = (
    '{{"score": {n}, "reasoning": "3 of 4 {{persons}} are right\\n"}}',
    '<think>{{"score": 2}} {{</think>```json\n{{"score": {n}, "reasoning": "x"}}\n```\nDone.',
    'Perhaps {{"score": 4}}. No: {{"score": {n}, "reasoning": ["a", 1]}} It is.',
    '{{"reasoning": "not {{\\"score\\": 2}}", "score": {n}}}',
    '{{"out_caption": "A {n}.", "relations": [{{"relation_1": "It is from image_1."}}]}}',
)


def test_no_mutated_answer_crashes_the_reader_or_invents_a_score():
    """2,000 answers, whose digits stay as they are: a score is one that stands behind its word."""
    rng, scores = random.Random(0), 0
    question = Question("")
    for _ in range(2000):
        text = mutated(rng, rng.choice(ANSWERS).format(n=rng.randint(6, 9)))
        for reader in (read_score, partial(curate.read_plan, {"references": ["a.png"]})):
            try:
                answer = answer_in({"choices": [{"message": {"content": text}}]}, question)
                value = reader(answer)
            except ValueError:
                continue
            if reader is read_score:
                scores += 1
                assert re.search(rf'"score"\s*:\s*{value[0]:g}(?!\d)', text), (value, text)
            json.dumps(value, ensure_ascii=False).encode()
    assert scores > 300  # the reader does not just give up


# --------------------------------------------------------------------------------------------------
# requests: their size, pauses, the key, the client


def photograph(width, height):
    pixels = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def test_phone_photographs_are_shrunk_before_they_are_sent(tmp_path):
    photograph(2000, 1504).save(tmp_path / "a.jpg")
    config = curate.Config(pools=str(tmp_path))
    sent = curate.pictures_of({"references": ["a.jpg"] * 2}, config)
    width, height = Image.open(io.BytesIO(sent[0])).size
    assert width * height <= 1024 * 1024 and width % 16 == height % 16 == 0
    assert abs(width / height - 4 / 3) < 0.03
    (kept, _) = curate.references_of({"references": ["a.jpg"] * 2}, config)
    assert kept.size == (2000, 1504)  # for the shards
    small = Image.new("RGB", (32, 16))
    assert to_send(small) == to_png(small)


def test_the_client_repeats_a_request_when_the_server_says(tmp_path):
    faults = [error(429, "slow down", Retry_After="1"), error(503, "oops", Retry_After_ms="5")]
    with asked(tmp_path, then_well(*faults)) as (endpoint, question, one):
        begun = time.monotonic()
        assert endpoint.ask(question, visible) and time.monotonic() - begun >= 1
        assert one.requests == 3
        assert endpoint.ask(question, visible) and one.requests == 3  # kept


def test_a_client_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai"):
        Endpoint(Access("http://127.0.0.1:9", "toy"), tmp_path)


def test_the_key_comes_from_the_environment_and_stays_there(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("MY_KEY", "secret-123\n")

    def fault(handler, number):
        seen.append(handler.headers["Authorization"])

    with asked(tmp_path, fault, key_variable="MY_KEY") as (endpoint, question, _):
        endpoint.ask(question, visible)
    assert seen == ["Bearer secret-123"]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(b"secret-123" in content for content in written)
