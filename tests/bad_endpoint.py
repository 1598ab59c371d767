"""
curate.py against an endpoint that does everything wrong, killed at random moments and repeated.

    python tests/bad_endpoint.py --count 300 --kills 10     asserts what `audit` says, prints counts

Each fault of a route comes with one request in twenty. One picture in twenty is always answered
with 400, one file of the pools is torn and one disappears while the samples are made.
test_curate.py runs the same, smaller.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import curate  # noqa: E402
from runtime.config import parse  # noqa: E402
from toy import server  # noqa: E402
from toy.clip import ToyClipSettings, train_toy_clip  # noqa: E402
from toy.server import draw_pools  # noqa: E402

WORKERS = 4
STAGES = ("references", "instructions", "plans", "targets", "scores")


# --------------------------------------------------------------------------------------------------
# faults


def replies(content, status=200, **headers):
    """A fault: always the same reply."""
    return lambda handler: handler.reply(content, status, **headers)


def error(status, message, code="", **headers):
    return replies({"error": {"message": message, "code": code}}, status, **headers)


def says(content, finish="stop"):
    message = {"content": content, "reasoning_content": '{"score": 0}'}
    return replies({"choices": [{"message": message, "finish_reason": finish}]})


def until_a_date(handler):
    date = formatdate(time.time() + 1, usegmt=True)
    handler.reply({"error": {"message": "slow down"}}, 429, Retry_After=date)


def hang_up(handler):
    handler.close_connection = True


BOTH = {
    "429": error(429, "slow down", Retry_After_ms="5"),
    "429 with a date": until_a_date,
    "500": error(500, "oops", Retry_After_ms="5"),
    "hangs up": hang_up,
    "HTML": replies(b"<html>Bad gateway</html>"),
    "half of a reply": replies(b'{"choices": [{"message": '),
    "refusal": error(400, "content policy", "content_policy_violation"),
    "429 inside of a 200": replies({"error": {"message": "upstream", "code": 429}}),
}

CHAT = BOTH | {
    "empty content": says(""),
    "choices null": replies({"choices": None}),
    "thinking alone": says(None, "length"),
}

IMAGES = BOTH | {
    "data null": replies({"data": None}),
    "torn picture": replies({"data": [{"b64_json": "iVBORw0KGgoAAAANSUhEUgAAACAAAAAg"}]}),
}


# changes to an answer that can be read all the same


def of_json(change):
    return lambda text: change(text) if text.startswith("{") else text


TEXTS = {
    "thinking before": lambda text: '<think>{Or {"score": 0}? No, {</think>' + text,
    "two objects": of_json(lambda text: '{"score": 1, "reasoning": "a draft"} Better: ' + text),
    "text after": of_json(lambda text: text + "\nThat is all."),
}


class BadHandler(server.Handler):
    """The toy's endpoint with faults; counts them in server.faults."""

    change = None  # of this answer

    @staticmethod
    def fault(handler, number):
        chat = handler.path.endswith("completions")
        _, images = handler.question()
        if any(image.tobytes()[-3] % 20 == 0 for image in images[:1]):
            return handler.tell("400", error(400, "Could not process image"))
        faults, changes = (CHAT, TEXTS) if chat else (IMAGES, {})
        names = [*faults, *changes]
        place = int(random.Random(number).random() * 20)  # one in twenty each
        handler.change = name = names[place] if place < len(names) else None
        return handler.tell(name, faults[name]) if name in faults else False

    def tell(self, name, fault):
        self.server.faults[name] += 1
        self.change = None
        fault(self)
        return True

    def reply(self, content, status=200, **headers):
        if self.change:
            message = content["choices"][0]["message"]
            message["content"] = TEXTS[self.change](message["content"])
            self.server.faults[self.change] += 1
        super().reply(content, status, **headers)


@contextlib.contextmanager
def served(fault=None):
    """A toy endpoint in a thread: with one fault, or as a BadHandler. Its address is `home`."""
    one = server.make_server()
    one.RequestHandlerClass = BadHandler
    if fault is not None:
        one.RequestHandlerClass = type("Faulty", (BadHandler,), {"fault": staticmethod(fault)})
    one.faults, one.home = Counter(), f"http://127.0.0.1:{one.server_port}"
    one.handle_error = lambda *_: None  # clients are killed
    threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield one
    finally:
        one.shutdown()
        one.server_close()


# --------------------------------------------------------------------------------------------------
# runs


def run_curate(folder, url, count):
    """curate.py in a process that was forked, so that nothing is imported again."""
    torch.set_num_threads(1)
    words = f"--config toy --pools pools --out out --count {count} --clip clip --timeout 60"
    words += f" --workers {WORKERS} --shard_size 10 --chat_url {url}/v1"
    os.chdir(folder)
    with open("log.txt", "a") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            curate.main(parse(curate.Config, curate.PRESETS, words.split()))


def kill_after(process, one, requests):
    """Kill a process when the server has `requests` more; whether it still lived."""
    last = one.requests + requests
    while process.is_alive() and one.requests < last:
        time.sleep(0.01)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    return alive


@dataclass
class Outcome:
    """What became of a run and its repetitions."""

    folder: Path
    kills: int = 0
    runs: int = 0  # that ended by themselves
    requests: int = 0
    answered: Counter = None  # how often each question was answered
    faults: Counter = None
    asked_by_the_last: int = 0

    def counts(self):
        return {name: value for name, value in vars(self).items() if name != "answered"}


def curate_badly(folder, count, kills):
    """Pools, and curate.py on them until it ends by itself, and once more. Returns an Outcome."""
    import openai.resources  # noqa: F401  once, and not in each process that is forked

    folder, rng = Path(folder), random.Random(0)
    draw_pools(folder / "pools", 16)
    train_toy_clip(folder / "clip", ToyClipSettings(steps=1))
    torn = folder / "pools/objects/003.png"
    torn.write_bytes(torn.read_bytes()[:60])
    outcome, left = Outcome(folder), 2
    with served() as one:
        while left:
            before = one.requests
            how = dict(target=run_curate, args=(folder, one.home, count))
            process = multiprocessing.get_context("fork").Process(**how)
            process.start()
            if outcome.kills < kills:
                outcome.kills += kill_after(process, one, rng.randint(count // 10, count))
            process.join(600)
            (folder / "pools/scenes/002.png").unlink(missing_ok=True)  # from the first time on
            assert process.exitcode in (0, -signal.SIGKILL), (folder / "log.txt").read_text()[
                -3000:
            ]
            if process.exitcode == 0:
                outcome.runs += 1
                left -= 1
            outcome.asked_by_the_last = one.requests - before
        outcome.requests, outcome.answered, outcome.faults = one.requests, one.answered, one.faults
    return outcome


def audit(outcome):
    """Every sample is finished or dropped with a reason, once; what was answered was not asked
    again but for what was in flight at a kill; the report adds up. Returns counts."""
    out, config = outcome.folder / "out", curate.PRESETS["toy"]
    stages = {name: curate.by_key(out / f"{name}.jsonl") for name in STAGES}
    dropped, usable = {}, set(stages["references"])
    for name in STAGES[1:]:
        assert set(stages[name]) == usable, f"{name} is not about what came before"
        gone = {key: one["dropped"] for key, one in stages[name].items() if "dropped" in one}
        assert all(": " in reason for reason in gone.values()), gone
        dropped |= gone
        usable -= set(gone)
    scored = {key: stages["scores"][key] for key in usable}
    assert all(0 <= one["scores"][name] <= 10 for one in scored.values() for name in ("PF", "SC"))
    reasons = curate.why_dropped(scored, curate.Config(**config | {"out": str(out)}))
    cut = sum(map(bool, reasons.values()))
    why, tasks = (out / "report.md").read_text().split("\n\n")
    rows = [line.split("|")[1:-1] for line in why.splitlines()[2:]]
    gone = sum(int(count) for *_, count in rows)
    _, begun, kept = tasks.splitlines()[-1].split("|")[1:-1]
    begun, kept = int(begun), int(kept.split()[0])
    assert begun == len(stages["references"]) == gone + kept, why
    assert len(dropped) + cut <= gone, why  # and what could not be written any more
    twice = sum(times - 1 for times in outcome.answered.values())
    assert twice <= WORKERS * outcome.kills, f"{twice} questions were answered again"
    kinds = Counter(reason.partition(":")[0] for reason in dropped.values())
    counts = {"begun": begun, "kept": kept, "dropped": dict(kinds), "cut": gone - len(dropped)}
    return counts | {"questions": len(outcome.answered), "answered_again": twice}


@dataclass(frozen=True)
class Config:
    count: int = 300  # samples
    kills: int = 10


PRESETS = {"default": {}}


if __name__ == "__main__":
    options = parse(Config, PRESETS)
    with tempfile.TemporaryDirectory() as scratch:
        ended = curate_badly(scratch, options.count, options.kills)
        for title, value in (audit(ended) | ended.counts()).items():
            print(f"{title:18s}{dict(value) if isinstance(value, Counter) else value}")
        print((ended.folder / "out/report.md").read_text())
