"""
A model server that draws: the toy world behind the two routes of endpoint.py, so that curate.py and the judge of
benchmarks.py run from end to end without a network.

It knows the toy world and nothing else: it recognises the pictures of a question by their pixels, and from them and
the task makes up an instruction, a plan and a target that belong together, the same ones every time (a hash of the
question takes the place of chance). It keeps no state, so it can be stopped and started in the middle.

    python curate.py --serve_toy
"""

import base64
import hashlib
import io
import json
from collections import Counter
from dataclasses import replace
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

import iccot
from iccot import TASKS
from toy import tasks, world
from toy.judge import Verdict, judge, nearest_subjects, pixels_of, templates
from toy.tasks import Wording
from toy.world import DEFAULT_PLACES, OBJECTS, PLACES, SCENES
from vision import to_png

# ---------------------------------------------------------------------------------------------------------------------
# seeing: a picture of the toy world -> what it shows


def subject_of(image):
    """The subject of a portrait on paper of any tint: that with the least |m (x - s)|^2 + |(1 - m) (x - paper)|^2."""
    if image.size != (world.HALF, world.HALF):
        raise ValueError(
            f"a portrait has {world.HALF} x {world.HALF} pixels, not {image.width} x {image.height}"
        )
    x = np.asarray(image, np.float32).reshape(-1, 3) / 255  # (256, 3)
    silhouettes, pixels, squares, _ = templates()  # (T, 256), (T, 768), (T,)
    paper = np.square(x - 0.96).sum(1)  # (256,)
    # (T,)
    error = silhouettes @ (np.square(x).sum(1) - paper) - 2 * pixels @ x.reshape(-1) + squares
    return world.subjects()[int(error.argmin())]


def scene_of(image):
    """(scene, {place: subject}) of a picture of 32 x 32 pixels."""
    if image.size != (world.SIZE, world.SIZE):
        raise ValueError(
            f"a scene has {world.SIZE} x {world.SIZE} pixels, not {image.width} x {image.height}"
        )
    picture, backgrounds = pixels_of(image), templates()[3]
    errors = np.sort(np.square(backgrounds - picture).sum(-1).reshape(len(backgrounds), -1), 1)[
        :, :600
    ].sum(1)
    # by the 600 pixels that fit best: things cover the others
    scene = world.scenes()[int(errors.argmin())]
    found = nearest_subjects(picture, world.scene_picture(scene).astype(np.float32) / 255)
    return scene, {
        place: subject
        for place, (subject, quality) in found.items()
        if subject is not None and quality > 0.5
    }


# ---------------------------------------------------------------------------------------------------------------------
# making up a sample


def compose(task, images):
    """(instruction, plan, truth) for these references, always the same."""
    digest = hashlib.sha256(task.encode() + b"".join(image.tobytes() for image in images)).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    wording = Wording(
        "instructive" if rng.random() < 0.5 else "descriptive", bool(rng.random() < 0.4)
    )
    places = [PLACES[i] for i in rng.permutation(4)]
    make = {"add": _edit, "replace": _edit, "attribute": _attribute}.get(task, _compose)
    instruction, relations, truth = make(task, images, wording, places, rng)
    return (
        tasks.capitalised(instruction),
        iccot.ICCoT(tasks.caption(truth), tuple(relations)),
        truth,
    )


def _edit(task, images, wording, places, rng):
    scene, standing = scene_of(images[0])
    new = subject_of(images[1])
    replaced = (
        next((place for place in PLACES if place in standing), None) if task == "replace" else None
    )
    place = replaced or next(place for place in places if place not in standing)
    things = tuple(
        world.known_thing(where, subject) for where, subject in (standing | {place: new}).items()
    )
    truth = world.Truth(scene, things, True)
    one, two = wording.image(1), wording.image(2)
    words = (
        f"Replace the {standing[replaced].kind} of {one} with the thing of {two}."
        if replaced
        else f"Add {wording.placed([world.known_thing(place, new)], 2)} to {one}."
    )
    return (
        words,
        ["The rest is consistent with image_1.", f"The {new.kind} is from image_2."],
        truth,
    )


def _attribute(task, images, wording, places, rng):
    first, owner = subject_of(images[0]), subject_of(images[1])
    if first.kind in OBJECTS and owner.kind in OBJECTS:
        first = replace(first, looks=(owner.looks[0], first.looks[1]))
    scene = world.Scene(str(rng.choice(list(SCENES))), world.scenes()[0].looks)
    truth = world.Truth(scene, (world.known_thing(places[0], first),), False)
    words = f"Draw the thing of {wording.image(1)} with the pattern of {wording.image(2)}"
    words += f" at the {places[0]}, {_where(scene)}."
    return (
        words,
        [f"The {first.kind} is from image_1.", f"The pattern of the {first.kind} is from image_2."],
        truth,
    )


def _compose(task, images, wording, places, rng):
    given = images[-1].width == world.SIZE
    subjects = [subject_of(image) for image in images[: len(images) - given]]
    scene = (
        scene_of(images[-1])[0]
        if given
        else world.Scene(str(rng.choice(list(SCENES))), world.scenes()[0].looks)
    )
    places = DEFAULT_PLACES if task == "scene" else places
    things = [world.known_thing(place, subject) for place, subject in zip(places, subjects)]
    where = f"in the scene of {wording.image(len(images))}" if given else _where(scene)
    words = f"Draw {wording.placed(things, 1)}, {where}."
    relations = [f"The {subject.kind} is from image_{i}." for i, subject in enumerate(subjects, 1)]
    relations += [f"The scene is consistent with image_{len(images)}."] * given
    return words, relations, world.Truth(scene, tuple(things), given)


def _where(scene):
    return f"{SCENES[scene.kind][0]} a {scene.kind}"


def draw_pools(folder, count=24, seed=0):
    """Pools for curate.py: `count` characters, objects and scenes; every second scene has somebody in it."""
    rng = np.random.default_rng(seed)
    for kind in ("characters", "objects", "scenes"):
        (Path(folder) / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            if kind == "scenes":
                source = tasks.picture_to_edit(rng, "train", 1)
                picture = world.draw(source) if i % 2 else world.scene_picture(source.scene)
            else:
                wanted = world.CHARACTERS if kind == "characters" else OBJECTS
                subject = world.pick(
                    rng,
                    [one for one in tasks.pool_of("train", world.Subject) if one.kind in wanted],
                )
                picture = world.portrait(rng, subject)
            Image.fromarray(picture).save(Path(folder) / kind / f"{i:03d}.png")


# ---------------------------------------------------------------------------------------------------------------------
# answering


def answer_text(prompt, images):
    """What an MLLM would say: an instruction, a plan, or a score."""
    if "Editing instruction: " in prompt:
        return _judge(prompt, images)
    task = prompt.split("Task type: ")[1].split(".")[0].split("\n")[0]
    instruction, plan, _ = compose(task, images)
    return iccot.to_json(plan) if "Write a plan" in prompt else instruction


def _judge(prompt, images):
    """The exact judge's score of the last picture; another instruction than ours is not understood, and gets 0."""
    instruction, truth = prompt.split("Editing instruction: ")[1], None
    for task in TASKS:
        try:
            made, _, found = compose(task, images[:-1])
        except (IndexError, StopIteration, ValueError):
            continue  # these references are none of this task
        if made == instruction:
            truth = found
    verdict = judge(images[-1], truth) if truth else Verdict(0, 0, 0)
    score = verdict.sc if "subjects of the result" in prompt else verdict.pf
    return json.dumps({"score": round(score, 1), "reasoning": "compared with the true picture"})


def answer_image(prompt, images):
    """What an image model would paint: the target that belongs to the instruction, PNG bytes."""
    for task in TASKS:
        try:
            instruction, _, truth = compose(task, images)
        except (IndexError, StopIteration, ValueError):
            continue
        if f"Instruction: {instruction}\n" in prompt:
            return to_png(Image.fromarray(world.draw(truth)))
    return to_png(Image.new("RGB", (world.SIZE, world.SIZE), "grey"))


class Handler(BaseHTTPRequestHandler):
    """Both routes. `fault` may answer in their place (tests): fault(handler, request number) -> whether it did."""

    fault = staticmethod(lambda handler, number: False)
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests += 1
            number = self.server.requests
        if self.fault(self, number):
            return
        if self.path.endswith("/chat/completions"):
            content = json.loads(body)["messages"][0]["content"]
            prompt = next(part["text"] for part in content if part["type"] == "text")
            urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            images = [_open(base64.b64decode(url.split(",", 1)[1])) for url in urls]
            self.count(prompt, images)
            message = {"role": "assistant", "content": answer_text(prompt, images)}
            self.reply({"choices": [{"message": message, "finish_reason": "stop"}]})
        elif self.path.endswith("/images/edits"):
            head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
            parts = {}
            for part in BytesParser(policy=HTTP).parsebytes(head + body).iter_parts():
                parts.setdefault(part.get_param("name", header="content-disposition"), []).append(
                    part.get_payload(decode=True)
                )
            prompt, images = (
                parts["prompt"][0].decode(),
                [_open(image) for image in parts["image[]"]],
            )
            self.count(prompt, images)
            picture = answer_image(prompt, images)
            self.reply({"created": 0, "data": [{"b64_json": base64.b64encode(picture).decode()}]})
        else:
            self.reply({"error": {"message": f"no route {self.path}"}}, 404)

    def count(self, prompt, images):
        """Remember how often each question was answered."""
        digest = hashlib.sha256(
            prompt.encode() + b"".join(image.tobytes() for image in images)
        ).hexdigest()
        with self.server.lock:
            self.server.answered[digest] += 1

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def _open(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def make_server(port=0, fault=None):
    """A server on this machine alone; port 0 takes a free one. It counts `requests` and what it has `answered`."""
    import threading

    handler = (
        type("FaultyHandler", (Handler,), {"fault": staticmethod(fault)}) if fault else Handler
    )
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.requests, server.answered, server.lock = 0, Counter(), threading.Lock()
    return server


def serve(port):
    """Answer until stopped."""
    with make_server(port) as server:
        print(
            f"the toy world answers at http://127.0.0.1:{server.server_port}/v1 (stop with Ctrl-C)",
            flush=True,
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"{server.requests} requests answered")
