"""The tour: its links lead where they say, its numbers are those measured, and fit each other."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import flow
import grpo
import iccot
from engine import Engine
from model import SMOKE, ModelConfig, UnifiedModel
from objective import group_advantage
from runtime.config import UserError
from studies import tour, tour_page
from studies.metrics import HeldOut
from toy.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
AGAIN = "write it again: python -m studies.tour_page"


@pytest.fixture(scope="module")
def numbers():
    return json.loads((ROOT / "docs/tour/numbers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written():
    return (ROOT / "docs/TOUR.md").read_text(encoding="utf-8")


def test_the_links_lead_where_they_say(written):
    """By the text of the line, not by the function that wrote it."""
    links = re.findall(r"\[`([\w/]+\.py):([\w.]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)", written)
    assert len(links) > 25 and written.count("](../") == len(links)
    for path, name, file, line in links:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        wanted = rf"\s*(def|class) {name.split('.')[-1]}\b"
        assert path == file and re.match(wanted, text), f"docs/TOUR.md, {path}:{name}: {AGAIN}"


def test_a_link_to_nothing_is_refused():
    with pytest.raises(UserError, match="flow.py:no_step, and flow.py has no no_step"):
        tour_page.line_of("flow.py:no_step")


def test_the_page_is_made_of_its_words_and_numbers(written, numbers):
    assert written == tour_page.page(numbers), f"docs/TOUR.md is not current; {AGAIN}"
    shown = set(re.findall(r"\]\((tour/\w+\.png)\)", written))
    drawn = {f"tour/{path.name}" for path in (ROOT / "docs/tour").glob("*.png")}
    assert shown == drawn
    assert sum((ROOT / "docs" / name).stat().st_size for name in drawn) < 600_000


def test_the_numbers_fit_each_other_and_the_code(numbers):
    """What needs no weights is computed again, apart from the tour."""
    sample = HeldOut(count=tour.NUMBER + 1).samples()[tour.NUMBER]
    prompt, pack, group, step = (numbers[key] for key in ("prompt", "pack", "group", "step"))
    assert prompt["instruction"] == sample.instruction
    assert prompt["true_plan"] == iccot.render(sample.plan)
    assert group["true_caption"] == sample.plan.caption
    assert [one["rows"][0] for one in pack["runs"][1:]] + [pack["N"]] == [
        one["rows"][1] for one in pack["runs"]
    ]
    settings = tour.OPTIONS
    times = flow.time_grid(settings.num_timesteps, settings.timestep_shift).tolist()
    assert [one["t"] for one in numbers["path"]["steps"]] == pytest.approx(times[:-1])
    reward = torch.tensor([[one["reward"] for one in group["members"]]])
    again = group_advantage(reward, settings.std_floor, settings.max_advantage)[0]
    assert [one["advantage"] for one in group["members"]] == pytest.approx(again.tolist(), abs=1e-4)
    assert len(step["log_ratio"]) == len(step["reward_after"]) == settings.group_size
    assert numbers["plan"]["text"].count("<relation_") == len(sample.references)
    read = iccot.parse(numbers["plan"]["text"])
    assert (read.caption, list(read.relations)) == (
        numbers["plan"]["caption"],
        numbers["plan"]["relations"],
    )


def test_the_options_are_those_of_the_preset(numbers):
    about, preset = numbers["settings"], grpo.PRESETS["toy"]
    assert about["toy_steps"] == tour.TOY.steps
    assert numbers["whole"]["prompts"] == tour.TOY.prompts_per_step
    assert tour.TOY.likelihood == "forward" and grpo.PRESETS["paper"]["likelihood"] == "sde"
    assert about["shift"] == preset["timestep_shift"] == tour.OPTIONS.timestep_shift
    assert about["noise_level"] == tour.TOY.noise_level and numbers["step"]["lr"] == preset["lr"]


class Brightness:
    """A CLIP that knows how bright a picture is, and how long a caption."""

    def embed_images(self, images):
        angle = torch.tensor([sum(one.resize((1, 1)).getpixel((0, 0))) / 500 for one in images])
        return torch.stack([angle.cos(), angle.sin()], 1)  # (B, E)

    def embed_captions(self, captions):
        angle = torch.tensor([len(one) / 100 for one in captions])
        return torch.stack([angle.cos(), angle.sin()], 1)  # (B, E)


def test_it_can_be_measured_again(tmp_path, monkeypatch, numbers):
    """By a model of random weights: all that the page asks for, and a step that learns."""
    plans = iter(range(9))
    monkeypatch.setattr(tour.rollouts, "caption_of", lambda *_: "A" * (10 + 9 * next(plans)))
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    engine = Engine(model, train_tokenizer(tmp_path, model.config.vocab_size))
    settings = dataclasses.replace(tour.OPTIONS, group_size=3, max_plan_tokens=5)
    sample = HeldOut(count=tour.NUMBER + 1).samples()[tour.NUMBER]
    found = tour.measure(tour.Tour(engine, Brightness(), sample, settings, tmp_path / "tour"), 2)
    assert {key: list(value) for key, value in found.items()} == {
        key: list(numbers[key]) for key in found
    }
    json.dumps(found)
    assert "## 8." in tour_page.page(found)
    moved = torch.tensor(found["step"]["log_ratio"])
    worth = torch.tensor([one["advantage"] for one in found["group"]["members"]])
    assert abs(found["step"]["loss"]) < 1e-5 and (moved * worth).sum() > 0
    drawn = {path.name for path in (tmp_path / "tour").glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "docs/tour").glob("*.png")}
