"""
The page: what it does without a browser, and then in one (Chromium, driven by Selenium).

In the browser the model is a fresh one that cannot write, so its plans are put into its mouth; what
is painted is really painted, and noted. Skipped without Gradio, Selenium or Chromium: pip install
-r requirements-optional.txt, and the distribution's packages chromium and chromium-driver.
"""

import dataclasses
import gc
import shutil
import socket
import types
import warnings

import pytest
import torch

import demo
import grpo
import iccot
from engine import Engine, Thinking
from model import SMOKE, ModelConfig, UnifiedModel
from reward import Clip
from runtime.config import UserError, parse
from runtime.pretrained import load_model, save_model
from toy.clip import ToyClipSettings, train_toy_clip
from toy.prepare import toy_tokenizer
from toy.tasks import draw_sample
from vision import to_png

# of Gradio, Selenium and what they import
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = demo.Config(**demo.PRESETS["smoke"] | dict(clip="", group_size=4, threads=1))
SAMPLE = next(s for s in (draw_sample("held_out", i) for i in range(99)) if len(s.references) == 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with fresh weights, a CLIP of one step, the sample's references as files."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = toy_tokenizer(folder, SMOKE["vocab_size"])
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    with torch.no_grad():  # as it is, nothing it sees moves its velocity
        model.latent_out.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    save_model(model, tokenizer, folder / "model")
    train_toy_clip(folder / "clip", ToyClipSettings(steps=1), log=lambda *_: None)
    for i, image in enumerate(SAMPLE.references, 1):
        (folder / f"{i}.png").write_bytes(to_png(image))
    (folder / "broken.png").write_bytes(to_png(SAMPLE.target)[:60])
    return folder


@pytest.fixture(scope="module")
def studio(folder):
    """Two checkpoints, and a first one that writes the sample's plan."""
    engine, before = (Engine(*load_model(folder)) for _ in range(2))
    made = demo.Studio(engine, Clip(str(folder / "clip")), before, CONFIG)
    plan = made.engine.tokenizer.encode(iccot.render(SAMPLE.plan)) + [made.engine.layout.eos]

    def tokens(prompts, thinking, *, count=1, **_):
        """As Engine.tokens, of a model that has learned this one plan."""
        written = torch.full((len(prompts) * count, thinking.max_tokens), -1)
        for i, token in enumerate(plan):
            written[:, i] = token
            yield written

    made.engine.tokens = tokens
    return made


def ask(**changes):
    whole = demo.Ask(SAMPLE.references, SAMPLE.instruction, 3)
    return dataclasses.replace(whole, **changes)


# --------------------------------------------------------------------------------------------------
# without a browser


def test_a_plan_appears_as_it_is_written(studio):
    texts = list(studio.thoughts(ask()))
    assert len(texts) > 10 and texts[-1] == iccot.render(SAMPLE.plan)
    fields = [demo.so_far(text, 2, 4) for text in texts]
    whole = [SAMPLE.plan.caption, *SAMPLE.plan.relations, "", ""]
    assert fields[-1] == whole and all(one[3:] == ["", ""] for one in fields)
    for before, after in zip(fields, fields[1:]):
        assert all(b.startswith(a) for a, b in zip(before, after))
    assert len({tuple(one) for one in fields}) > 10


def test_the_edited_plan_is_what_is_painted(studio):
    """By the same road as everybody's: the same seed gives the picture of whoever thinks so."""
    relations = ("The first.", "The second.", "", "")
    text = studio.write(ask(caption="A red cat.", relations=relations))
    assert iccot.parse(text, 2) == iccot.ICCoT("A red cat.", ("The first.", "The second."))
    engine = Engine(studio.engine.model, studio.engine.tokenizer)
    engine.think = lambda *_, **__: ([engine.tokenizer.encode(text)], [True])
    request = engine.request(SAMPLE, 32)
    painting = dict(sampler=CONFIG.sampler, thinking=Thinking(72), batch=1, seeds=[(3,)])
    (result,) = engine.generate([request], **painting)
    assert to_png(result.image) == to_png(studio.paint(ask(), text))
    assert to_png(result.image) != to_png(studio.paint(ask(), ""))


def test_compare_and_group(studio):
    plan = dict(caption=SAMPLE.plan.caption, relations=SAMPLE.plan.relations)
    rows = studio.compare(ask(**plan, truth=SAMPLE.truth))
    words = [row[1].partition(".")[0] for row in rows]
    assert words == ["no plan", "this plan", "this plan, before"]
    assert all("CLIP agreement" in row[1] and "PF" in row[1] for row in rows)
    members = studio.group(ask())
    assert len(members) == 4 and all(SAMPLE.plan.caption in words for _, words in members)
    numbers = [words.removeprefix("reward ").partition(":")[0] for _, words in members]
    rewards, advantages = zip(*(map(float, n.split(", advantage ")) for n in numbers))
    assert list(rewards) == sorted(rewards, reverse=True)
    expected = studio.clip.score([image for image, _ in members], [SAMPLE.plan.caption] * 4)
    assert rewards == pytest.approx(expected.tolist(), abs=1e-3)
    trained = grpo.Config(std_floor=CONFIG.std_floor, group_size=4)
    as_trained, _ = grpo.advantages(expected[None], trained)
    assert advantages == pytest.approx(as_trained.tolist(), abs=1e-2)


def test_plans_and_pictures_that_cannot_be(studio, folder):
    with pytest.raises(UserError, match="the instruction is empty"):
        ask(instruction=" ")
    with pytest.raises(ValueError, match="3 times <image>"):
        next(studio.thoughts(ask(instruction="<image> and <image> and <image>")))
    with pytest.raises(UserError, match="the line of reference 2 is empty"):
        studio.write(ask(caption="A cat.", relations=("The first.", "", "", "")))
    for words, relation in (("A </out_caption> cat.", "One."), ("A cat.", "That of image_3.")):
        with pytest.raises(UserError, match="does not parse"):
            studio.write(ask(caption=words, relations=(relation, "Two.")))
    with pytest.raises(UserError, match="reference 2 cannot be read") as refused:
        studio.read([folder / "1.png", folder / "broken.png"])
    assert str(folder) not in str(refused.value)
    with pytest.raises(UserError, match="reference 1 is missing"):  # its line is not the second's
        studio.read([None, folder / "1.png", None])
    assert len(studio.read([folder / "1.png", None, None, None])) == 1


def pressed(folder, references=2, caption="", relations=("",) * 4):
    """What a button of the page gets."""
    paths = [folder / f"{i}.png" if i <= references else None for i in range(1, 5)]
    return [SAMPLE.instruction, 3, *paths, SAMPLE, caption, *relations]


def test_a_plan_that_does_not_parse_is_shown_as_far_as_it_can_be_read(studio, folder, monkeypatch):
    monkeypatch.setattr(demo, "gr", types.SimpleNamespace(Warning=(warned := []).append))
    monkeypatch.setattr(studio, "thoughts", lambda _: ["<think><out_caption>A cat."])
    *_, fields = demo.Page(studio).on_think(*pressed(folder))
    assert fields == ["A cat.", "", "", "", ""]
    assert len(warned) == 1 and "does not parse" in warned[0]


def test_an_example_is_known_until_somebody_changes_it(studio, monkeypatch):
    """Its verdict is the exact judge's; with other words there is no truth."""
    page = demo.Page(studio)
    number, truth, instruction, *rest = page.on_example(0)
    pictures, plan = rest[:4], rest[4:]
    monkeypatch.setattr(studio, "read", lambda paths: tuple(path for path in paths if path))
    values = [3, *pictures, truth, *plan]
    assert number == 1 and page.asked([instruction, *values]).truth == truth.truth is not None
    assert page.asked(["Something else.", *values]).truth is None


@pytest.mark.skipif(demo.gr is None, reason="needs Gradio")
def test_messages_keep_their_tags_and_say_when_memory_ends(studio, folder, monkeypatch):
    page = demo.Page(studio)
    with pytest.raises(demo.gr.Error, match="3 times &lt;image&gt;"):
        next(page.on_think("<image> <image> <image>", *pressed(folder)[1:]))

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(studio, "group", full)
    with pytest.raises(demo.gr.Error, match="fewer or smaller references"):
        page.on_group(*pressed(folder))


def refused(capsys, config):
    with pytest.raises(SystemExit) as stopped:
        demo.main(config())
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line


@pytest.mark.parametrize("words", ["--checkpoint nowhere", "--port 0", "--max_references 0"])
@pytest.mark.skipif(demo.gr is None, reason="needs Gradio")
def test_mistakes_of_the_command(capsys, words):
    argv = ["--config", "smoke", *words.split()]
    line = refused(capsys, lambda: parse(demo.Config, demo.PRESETS, argv))
    assert words.split()[1] in line


@pytest.mark.skipif(demo.gr is None, reason="needs Gradio")
def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(capsys, lambda: dataclasses.replace(CONFIG, port=port))
    assert f"--port {port}" in line


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr(demo, "gr", None)
    assert "pip install -r requirements-optional.txt" in refused(capsys, lambda: CONFIG)


# --------------------------------------------------------------------------------------------------
# in a browser

try:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    webdriver = None

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
HERE = demo.gr is not None and webdriver is not None and bool(CHROMIUM) and bool(DRIVER)
in_a_browser = pytest.mark.skipif(not HERE, reason="needs Gradio, Selenium, Chromium, its driver")


def forget():
    """Selenium and Gradio leave sockets to be collected: here, where nobody is warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


class Person:
    """Somebody in front of the page."""

    def __init__(self, port):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for word in (
            "headless=new",
            "no-sandbox",
            "disable-dev-shm-usage",
            "window-size=1280,1200",
        ):
            options.add_argument(f"--{word}")
        self.browser = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.browser.get(f"http://127.0.0.1:{port}/")
        self.until(lambda: self.find("#think"))

    def leave(self):
        self.browser.quit()
        forget()

    def find(self, where):
        return next(iter(self.browser.find_elements(By.CSS_SELECTOR, where)), None)

    def until(self, what, seconds=30):
        """What it gives, once it is true."""
        return WebDriverWait(self.browser, seconds, 0.05).until(lambda _: what())

    def write(self, field, text):
        area = self.find(f"#{field} textarea")
        area.clear()
        area.send_keys(text)

    def read(self, field):
        return self.find(f"#{field} textarea").get_attribute("value")

    def upload(self, number, path):
        self.drop(number, path)
        self.until(lambda: self.find(f"#reference-{number} img"))

    def drop(self, number, path):
        where = f"#reference-{number} input[type=file]"
        self.until(lambda: self.find(where)).send_keys(str(path))

    def click(self, name):
        self.find(f"#{name}").click()

    def said(self, words):
        """Wait for a message on the page."""
        script = "return [...document.querySelectorAll('.toast-body')].map(x => x.textContent)"
        self.until(lambda: words in " ".join(self.browser.execute_script(script)))

    def picture(self):
        """The address of the picture that is shown."""
        shown = self.find("#picture img")
        return shown.get_attribute("src") if shown else ""


@pytest.fixture(scope="module")
def page(studio):
    """The page's port, and the list of the plans that were painted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    painted, paint = [], studio.paint
    studio.paint = lambda ask, text, *rest: painted.append(text) or paint(ask, text, *rest)
    studio.config = dataclasses.replace(CONFIG, port=port, num_timesteps=5)
    blocks = demo.serve(studio.config, studio, block=False)
    yield port, painted
    blocks.close()
    studio.paint, studio.config = paint, CONFIG
    forget()


@pytest.fixture
def person(page):
    one = Person(page[0])
    yield one
    one.leave()


@in_a_browser
def test_upload_think_edit_paint(page, person, folder):
    _, painted = page
    person.click("example")
    person.until(lambda: person.read("instruction") == draw_sample("held_out", 0).instruction)
    person.browser.refresh()
    person.until(lambda: person.find("#think"))
    for i in (1, 2):
        person.upload(i, folder / f"{i}.png")
    person.write("instruction", SAMPLE.instruction)
    person.click("think")
    person.until(lambda: person.read("relation-2") == SAMPLE.plan.relations[1])
    assert person.read("caption") == SAMPLE.plan.caption
    person.until(lambda: "CLIP agreement" in person.find("#words").text)
    assert painted[-1] == iccot.render(SAMPLE.plan)
    first = person.picture()
    person.write("caption", "A blue bird in a meadow.")
    person.click("paint")
    person.until(lambda: person.picture() not in ("", first))
    assert iccot.parse(painted[-1], 2).caption == "A blue bird in a meadow."
    person.click("group")
    person.until(lambda: person.find("#cards").text.count("advantage") == CONFIG.group_size)
    script = "return performance.getEntriesByType('resource').map(one => one.name)"
    loaded = person.browser.execute_script(script)
    assert loaded and all("127.0.0.1" in one or one.startswith("data:") for one in loaded)


@in_a_browser
def test_mistakes_are_said_and_what_was_typed_stays(person, folder):
    person.click("think")
    person.said("the instruction is empty")
    person.write("instruction", "Draw image 2.")
    person.upload(1, folder / "1.png")
    person.write("caption", "A cat.")
    person.click("paint")
    person.said("the line of reference 1 is empty")
    assert person.read("instruction") == "Draw image 2." and person.read("caption") == "A cat."
    person.drop(2, folder / "broken.png")
    person.until(lambda: person.find("#reference-2 img"))
    person.click("think")
    person.said("reference 2 cannot be read as a picture")
    assert person.read("caption") == "A cat."
