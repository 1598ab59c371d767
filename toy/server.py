"""
A model server that draws: the toy world behind the two routes of studies/endpoint.py, so that
curate.py and the judge of the benchmarks run from end to end without a network.

    POST .../chat/completions    "Task type: ..."              an instruction
                                 "... Write a plan ..."        a plan, as JSON
                                 "Editing instruction: ..."    {"score", "reasoning"}; the score is
                                                               SC where the question speaks of the
                                                               "subjects of the result", else PF
    POST .../images/edits        "Instruction: ..."            the target, PNG

It knows the toy world and nothing else: it recognises the pictures of a question by their pixels,
and from them and the task makes up an instruction, a plan and a target that belong together, the
same ones every time: a hash of the question takes the place of chance. It keeps nothing on disk, so
it can be stopped and started in the middle. What it does not understand gets score 0, or grey.

Left out: keys, several choices, streaming, pictures that nobody drew with the toy world.

    python curate.py --serve_toy
    python curate.py --config toy                  in another terminal
"""

import base64
import hashlib
import io
import json
import threading
from collections import Counter
from dataclasses import dataclass, replace
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

import iccot
from iccot import TASKS
from runtime.files import published
from toy import tasks, world
from toy.judge import Verdict, judge, nearest_subjects, pixels_of, templates
from toy.painter import painted
from toy.tasks import Wording
from toy.world import DEFAULT_PLACES, OBJECTS, PLACES, SCENES, Scene, Truth, known_thing
from vision import to_png

# --------------------------------------------------------------------------------------------------
# seeing: a picture of the toy world -> what it shows


def _check_side(image, side):
    if image.size != (side, side):
        raise ValueError(f"expected {side} x {side} pixels, not {image.width} x {image.height}")


def subject_of(image):
    """The subject of a portrait on paper of any tint. ValueError for a picture of another size.

    It has the least |m (x - s)|^2 + |(1 - m) (x - paper)|^2: s a sprite, m its silhouette.
    """
    _check_side(image, world.HALF)
    x, known = np.asarray(image, np.float32).reshape(-1, 3) / 255, templates()  # (256, 3)
    paper = np.square(x - 0.96).sum(1)  # (256,)
    inside = known.silhouettes @ (np.square(x).sum(1) - paper)  # (subjects,)
    error = inside - 2 * known.pixels @ x.reshape(-1) + known.squares  # (subjects,)
    return world.subjects()[int(error.argmin())]


def scene_of(image):
    """(scene, {place: subject}) of a picture. ValueError if it has not 32 x 32 pixels."""
    _check_side(image, world.SIZE)
    picture, backgrounds = pixels_of(image), templates().backgrounds
    # (scenes, 1024)
    errors = np.square(backgrounds - picture).sum(-1).reshape(len(backgrounds), -1)
    # by the 600 pixels that fit best: things cover the others
    scene = world.scenes()[int(np.sort(errors, 1)[:, :600].sum(1).argmin())]
    found = nearest_subjects(picture, world.scene_picture(scene).astype(np.float32) / 255)
    return scene, {
        place: subject
        for place, (subject, quality) in found.items()
        if subject is not None and quality > 0.5
    }


# --------------------------------------------------------------------------------------------------
# making up a sample


@dataclass(frozen=True)
class Given:
    """What a sample is made up from; `rng` and what was drawn from it depend on task and images."""

    task: str
    images: list[Image.Image]
    wording: Wording
    places: list[str]  # in a random order
    rng: np.random.Generator


def chance_of(word, images):
    """The random numbers that belong to a word and some pictures: a hash of them."""
    digest = hashlib.sha256(word.encode() + b"".join(image.tobytes() for image in images)).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def compose(task, images):
    """(instruction, plan, truth) for these references, always the same.

    IndexError, StopIteration or ValueError if they are references of another task.
    """
    rng = chance_of(task, images)
    style = "instructive" if rng.random() < 0.5 else "descriptive"
    wording = Wording(style, bool(rng.random() < 0.4))
    given = Given(task, images, wording, [PLACES[i] for i in rng.permutation(4)], rng)
    make = {"add": _edit, "replace": _edit, "attribute": _attribute}.get(task, _compose)
    instruction, relations, truth = make(given)
    plan = iccot.ICCoT(tasks.caption(truth), tuple(relations))
    return tasks.capitalised(instruction), plan, truth


def _edit(given):
    """A thing more in the picture, or another one where the first one stood."""
    scene, standing = scene_of(given.images[0])
    new = subject_of(given.images[1])
    replaced = None
    if given.task == "replace":
        replaced = next((place for place in PLACES if place in standing), None)
    place = replaced or next(place for place in given.places if place not in standing)
    shown = standing | {place: new}
    truth = Truth(scene, tuple(known_thing(*one) for one in shown.items()), True)
    one, two = given.wording.image(1), given.wording.image(2)
    if replaced:
        words = f"Replace the {standing[replaced].kind} of {one} with the thing of {two}."
    else:
        words = f"Add {given.wording.placed([known_thing(place, new)], 2)} to {one}."
    return words, [tasks.REST, f"The {new.kind} is from image_2."], truth


def _attribute(given):
    """An object with the pattern of another one."""
    first, owner = subject_of(given.images[0]), subject_of(given.images[1])
    if first.kind in OBJECTS and owner.kind in OBJECTS:
        first = replace(first, looks=(owner.looks[0], first.looks[1]))
    scene, place = _any_scene(given), given.places[0]
    one, two = given.wording.image(1), given.wording.image(2)
    words = f"Draw the thing of {one} with the pattern of {two} at the {place}, {_where(scene)}."
    relations = [
        f"The {first.kind} is from image_1.",
        f"The pattern of the {first.kind} is from image_2.",
    ]
    return words, relations, Truth(scene, (known_thing(place, first),), False)


def _compose(given):
    """Subjects together, in the scene of the last picture if it is one."""
    images, wording = given.images, given.wording
    with_scene = images[-1].width == world.SIZE
    subjects = [subject_of(image) for image in images[: len(images) - with_scene]]
    scene = scene_of(images[-1])[0] if with_scene else _any_scene(given)
    places = DEFAULT_PLACES if given.task == "scene" else given.places
    things = [known_thing(place, subject) for place, subject in zip(places, subjects)]
    where = f"in the scene of {wording.image(len(images))}" if with_scene else _where(scene)
    words = f"Draw {wording.placed(things, 1)}, {where}."
    relations = [f"The {subject.kind} is from image_{i}." for i, subject in enumerate(subjects, 1)]
    relations += [f"The scene is consistent with image_{len(images)}."] * with_scene
    return words, relations, Truth(scene, tuple(things), with_scene)


def _any_scene(given):
    return Scene(str(given.rng.choice(list(SCENES))), world.scenes()[0].looks)


def _where(scene):
    return f"{SCENES[scene.kind][0]} a {scene.kind}"


def draw_pools(folder, count=24):
    """Pools for curate.py: `count` characters, objects, scenes; in half the scenes is somebody.

    The folder appears when it is complete; an older one of that name is replaced.
    """
    rng, subjects = np.random.default_rng(0), tasks.pool_of("train", world.Subject)
    with published(folder) as hidden:
        for kind in ("characters", "objects", "scenes"):
            (hidden / kind).mkdir(parents=True)
            kinds = world.CHARACTERS if kind == "characters" else OBJECTS
            pool = [subject for subject in subjects if subject.kind in kinds]
            for i in range(count):
                if kind == "scenes":
                    source = tasks.picture_to_edit(rng, "train", 1)
                    picture = world.draw(source) if i % 2 else world.scene_picture(source.scene)
                else:
                    picture = world.portrait(rng, world.pick(rng, pool))
                Image.fromarray(picture).save(hidden / kind / f"{i:03d}.png")


# --------------------------------------------------------------------------------------------------
# answering


def answer_text(prompt, images):
    """What an MLLM would say: an instruction, a plan, or a score."""
    if "Editing instruction: " in prompt:
        return _judge(prompt, images)
    task = prompt.split("Task type: ")[1].split(".")[0].split("\n")[0]
    instruction, plan, _ = compose(task, images)
    return iccot.to_json(plan) if "Write a plan" in prompt else instruction


def _read_as_any_task(images):
    """(instruction, truth) of each task that has such references."""
    for task in TASKS:
        try:
            instruction, _, truth = compose(task, images)
        except (IndexError, StopIteration, ValueError):
            continue  # these references are none of this task
        yield instruction, truth


def _judge(prompt, images):
    """The exact judge's score of the last picture; another instruction than ours gets 0."""
    instruction = prompt.split("Editing instruction: ")[1]
    truth = dict(_read_as_any_task(images[:-1])).get(instruction)
    verdict = judge(images[-1], truth) if truth else Verdict(0, 0, 0)
    score = verdict.sc if "subjects of the result" in prompt else verdict.pf
    return json.dumps({"score": round(score, 1), "reasoning": "compared with the true picture"})


def answer_image(prompt, images, errors=0.0):
    """What an image model would paint: the target that belongs to the instruction, PNG bytes.

    errors: share of the targets that show one wrong fact (toy/painter.py), always the same ones.
    """
    for instruction, truth in _read_as_any_task(images):
        if f"Instruction: {instruction}\n" in prompt:
            shown = painted(truth, chance_of("paint", images), errors)
            return to_png(Image.fromarray(world.draw(shown)))
    return to_png(Image.new("RGB", (world.SIZE, world.SIZE), "grey"))


class Handler(BaseHTTPRequestHandler):
    """Both routes."""

    protocol_version = "HTTP/1.1"

    @staticmethod
    def fault(handler, number):
        """May answer in their place (tests): whether it did. number: of the request, from 1."""
        return False

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests += 1
            number = self.server.requests
        if self.fault(self, number):
            return
        prompt, images = self.question()
        asked = prompt.encode() + b"".join(image.tobytes() for image in images)
        with self.server.lock:
            self.server.answered[hashlib.sha256(asked).hexdigest()] += 1
        if self.path.endswith("/chat/completions"):
            message = {"role": "assistant", "content": answer_text(prompt, images)}
            self.reply({"choices": [{"message": message, "finish_reason": "stop"}]})
        else:
            picture = base64.b64encode(answer_image(prompt, images, self.server.errors)).decode()
            self.reply({"created": 0, "data": [{"b64_json": picture}]})

    def question(self):
        """(prompt, pictures) of a request: JSON with data URLs, or multipart."""
        if self.path.endswith("/chat/completions"):
            text, *pictures = json.loads(self.body)["messages"][0]["content"]
            urls = [part["image_url"]["url"] for part in pictures]
            images = [base64.b64decode(url.partition(",")[2]) for url in urls]
            return text["text"], [_open(image) for image in images]
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        fields = {}
        for part in BytesParser(policy=HTTP).parsebytes(head + self.body).iter_parts():
            name = part.get_param("name", header="content-disposition")
            fields.setdefault(name, []).append(part.get_payload(decode=True))
        return fields["prompt"][0].decode(), [_open(image) for image in fields["image[]"]]

    def reply(self, content, status=200, **headers):
        """content: bytes as they are, anything else as JSON. headers: Retry_After=... and so on."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        standard = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in (standard | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing: tests and runs have their own words."""


def _open(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def make_server(port=0, errors=0.0):
    """A server on this machine alone; port 0 takes a free one. errors: as in `answer_image`.

    It counts its `requests` and what it has `answered`.
    """
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.requests, server.answered, server.lock = 0, Counter(), threading.Lock()
    server.errors = errors
    return server


def serve(port, errors):
    """Answer until stopped."""
    with make_server(port, errors=errors) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        print(f"the toy world answers at {url} (stop with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"{server.requests} requests answered")
