"""The metrics of the paper's tables, and the ablation that is made of them."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from engine import Engine, Result, Sampler, Thinking
from iccot import ICCoT
from model import SMOKE, ModelConfig, UnifiedModel
from studies import metrics, pictures
from studies.ablation import ROWS, ablation_table
from studies.metrics import HeldOut, by_task, measure, measured_together
from toy.tokenizer import train_tokenizer


class WordCounts:
    """A CLIP that knows colours of pictures and lengths of captions, which is enough to compare."""

    def embed_images(self, images):
        pixels = [torch.tensor(image.resize((1, 1)).getpixel((0, 0))) for image in images]
        return self.unit(torch.stack(pixels).float().mean(1) / 255)

    def embed_captions(self, captions):
        return self.unit(torch.tensor([len(caption) / 100 for caption in captions]))

    @staticmethod
    def unit(angle):
        return torch.stack([angle.cos(), angle.sin()], 1)  # (B, E)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    return Engine(model, train_tokenizer(folder, model.config.vocab_size))


def painted(sample, plan=None, image=None):
    plan = plan or sample.plan
    return Result("text", plan, [], True, image or sample.target)


def worth(images, captions):
    return torch.tensor([-0.25] * len(images))


def test_true_pictures_and_plans_measure_ten():
    samples = HeldOut(count=12).samples()
    row = measure(samples, [painted(one) for one in samples], WordCounts())
    assert row["PF"] == row["SC"] == row["Overall"] == 10 and row["n"] == 12
    assert row["format_ok"] == row["caption_ok"] == row["plan_ok"] == 1
    assert row["CLIP_out"] == pytest.approx(row["CLIP_plan"])
    table = by_task(samples, [painted(one) for one in samples]).values()
    assert sum(row[-1] for row in table) == 12 and all(row[:3] == (10, 10, 10) for row in table)


def test_wrong_pictures_and_captions_cost_their_own_columns():
    samples = HeldOut(count=6).samples()
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    right = measure(samples, [painted(one) for one in samples], WordCounts())
    wrong_picture = measure(samples, [painted(one, image=grey) for one in samples], WordCounts())
    assert wrong_picture["Overall"] < 2 and wrong_picture["caption_ok"] == 1
    plans = [ICCoT("A moon.", one.plan.relations) for one in samples]
    results = [painted(one, plan) for one, plan in zip(samples, plans)]
    wrong_plan = measure(samples, results, WordCounts())
    assert wrong_plan["caption_ok"] == 0 and wrong_plan["Overall"] == 10
    assert wrong_plan["CLIP_out"] == right["CLIP_out"] != wrong_plan["CLIP_plan"]
    nothing = [replace(painted(one), plan=None, valid=False) for one in samples]
    row = measure(samples, nothing, WordCounts())
    assert math.isnan(row["CLIP_plan"]) and row["format_ok"] == row["caption_ok"] == 0


def test_the_ablation_table_has_mean_deviation_and_all_seeds():
    one = dict(PF=7.0, SC=6.0, Overall=6.5, CLIP_out=30.0)
    seeds = [one, one | dict(PF=8.0, Overall=7.0, CLIP_out=32.0)]
    lines = ablation_table({"SFT": seeds, "SFT without IC-CoT": seeds}).splitlines()
    assert lines[2].startswith("| SFT | 7.50 ± 0.71 (7.51) | 6.00 ± 0.00 (6.46) | ")
    assert lines[2].endswith(" | 6.50, 7.00 |  |  |") and "(" not in lines[3]
    assert [name for name, row in ROWS.items() if not row.plans] == ["base", "SFT without IC-CoT"]


def test_a_gain_is_one_beyond_two_standard_deviations_of_the_seeds():
    """Differences are of the same seed: what seeds have in common is no spread of the gain."""
    sft = [dict(PF=7.0, SC=6.0, Overall=x, CLIP_out=30 + x) for x in (6.0, 7.0, 8.0)]
    steady = [one | dict(Overall=one["Overall"] + 0.1) for one in sft]
    steady[0]["Overall"] += 0.01
    chance = [one | dict(Overall=one["Overall"] + x) for one, x in zip(sft, (0.0, 0.1, 0.5))]
    lines = ablation_table({"SFT": sft, "SFT + RGA": steady, "base": chance}).splitlines()
    assert "| +0.10 ± 0.01 \\* |" in lines[3] and "| +0.20 ± 0.26 |" in lines[4]
    two = ablation_table({"SFT": sft[:2], "base": steady[:2]})  # two seeds have no spread to trust
    assert "\\* |" not in two


def test_the_grid_says_what_was_planned_and_what_it_was_worth(tmp_path):
    """Frames and verdicts mark what changed; words of a plan are red where they are not true."""
    samples = HeldOut(count=3).samples()
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    before = [painted(one, image=image) for one, image in zip(samples, (grey, None, None))]
    after = [painted(one, image=image) for one, image in zip(samples, (None, grey, None))]
    wrong = ICCoT("A moon.", samples[0].plan.relations)
    after[0] = replace(after[0], plan=wrong)
    after[2] = replace(after[2], valid=False, plan=None)
    both = {"SFT": before, "SFT + GRPO": after}
    rewards = {name: metrics.rewards_of_plans(rs, worth) for name, rs in both.items()}
    assert rewards["SFT + GRPO"] == [-0.25, -0.25, None]
    *_, second = pictures.grid_row(samples[0], [before[0], after[0]], [-0.25, -0.25])
    assert second.words[:3] == [
        ("reward -0.250", pictures.BETTER),
        ("PF 10.0  SC 10.0  Overall 10.0", pictures.BETTER),
        ("A moon.", pictures.WORSE),
    ]
    assert [words for words, _ in second.words[3:]] == list(samples[0].plan.relations)
    *_, third = pictures.grid_row(samples[2], [before[2], after[2]], [-0.25, None])
    assert ("a plan that cannot be read", pictures.WORSE) in third.words
    pictures.save_grid(tmp_path / "grid.png", samples, both, rewards=rewards, side=64)
    sheet = Image.open(tmp_path / "grid.png")
    edge = [sheet.getpixel((sheet.width - 10, y)) for y in range(sheet.height)]
    assert edge.count(pictures.BETTER) == edge.count(pictures.WORSE) == 64 + 2 * pictures.PAD


@pytest.mark.parametrize("world", [1, 2, 5])
def test_processes_measure_together_what_one_measures(engine, monkeypatch, world):
    """Each its share: the sums over all are those of `measure`; more processes than prompts too."""
    held = HeldOut(count=4, sampler=Sampler(2, 10.0), thinking=Thinking(12), batch=3)
    samples, summed = held.samples(), []
    row = measure(samples, held.paint(engine, samples), WordCounts())
    monkeypatch.setattr(metrics, "size", lambda: world)
    monkeypatch.setattr(metrics, "reduced", lambda numbers: summed.append(numbers) or numbers)
    for number in range(world):
        monkeypatch.setattr(metrics, "rank", lambda number=number: number)
        measured_together(engine, held, WordCounts())
    sums = [[sum(column) for column in zip(*lists)] for lists in (summed[::2], summed[1::2])]
    found = {name: total / n for name, total, n in zip(metrics.COLUMNS, *sums) if n}
    expected = {name: row[name] for name in metrics.COLUMNS if not math.isnan(row[name])}
    assert found == pytest.approx(expected) and "PF" in found and "CLIP_out" in found
