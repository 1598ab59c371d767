"""Ten references, the most that data has (MACRO): toy world, parser, sheets, budgets, disk."""

import dataclasses
import hashlib

import numpy as np
import pytest

import iccot
import sft
from data import ShardWriter, Source, hash_of
from model import SMOKE, ModelConfig
from runtime import loop
from runtime.config import UserError
from studies.metrics import HeldOut
from studies.pictures import save_samples
from toy import world
from toy.judge import judge
from toy.tasks import draw_sample
from vision import to_png

# of 40 samples of each split with each number of references from 2 to 9, before there were ten
SAMPLES = "567fb644342718e8"


def test_samples_below_ten_references_never_change():
    digest = hashlib.sha256()
    for most in range(2, 10):
        for split in world.SPLITS:
            for index in range(40):
                one = draw_sample(split, index, max_references=most)
                digest.update(repr((one.task, one.instruction, one.plan, one.truth)).encode())
                for image in (*one.references, one.target):
                    digest.update(image.tobytes())
    assert digest.hexdigest()[:16] == SAMPLES


@pytest.fixture(scope="module")
def ten():
    """Samples with ten references, of 250 that may have so many."""
    drawn = [draw_sample("train", index, max_references=10) for index in range(250)]
    return [one for one in drawn if len(one.references) == 10]


def test_the_parser_reads_plans_of_ten(ten):
    """Kind 16."""
    assert len(ten) > 4
    for one in ten:
        text = iccot.render(one.plan)
        assert (
            iccot.parse(text, references=10)
            == one.plan
            == iccot.from_json(iccot.to_json(one.plan), 10)
        )
        assert iccot.salvage(text.replace("</relation_9>", ""), 10)[0] == one.plan
        assert not iccot.is_valid(text, 9)
        assert judge(one.target, one.truth).overall == 10


def test_sheets_show_all_ten_and_their_relations(ten, tmp_path):
    path = tmp_path / "sheet.png"
    sheet, narrow = (save_samples(path, [one]) for one in (ten[0], draw_sample("train", 0)))
    assert sheet.width == 11 * 136 + 640 and narrow.height == 144
    words = np.asarray(sheet)[:, 11 * 136 :].min((1, 2)) < 128  # rows with ink
    assert words.nonzero()[0].max() > 144 and not words[-4:].any()


def test_a_budget_for_ten_is_asked_for_at_the_start():
    shape = ModelConfig(**SMOKE)
    config = sft.Config(config="smoke", **sft.PRESETS["smoke"] | dict(max_references=10))
    pictures = 10 * (shape.latent_side**2 + 2 + shape.vit_side**2 + 2) + shape.latent_side**2 + 2
    words = sft.WORDS + 6 * sft.WORDS_OF_ONE
    fits = dataclasses.replace(config, tokens_per_pack=pictures + words)
    sft.check_budget(shape, fits)
    with pytest.raises(UserError, match=f"may take {pictures + words} tokens"):
        sft.check_budget(shape, dataclasses.replace(fits, tokens_per_pack=pictures + words - 1))


def test_stage_1_trains_on_ten(ten, tmp_path):
    """From shards, whose pictures ref_1 to ref_10 keep their order."""
    with ShardWriter(tmp_path / "shards") as shards:
        for one in ten[:2]:
            record = {"key": one.key, "task": one.task, "instruction": one.instruction}
            record["plan"] = iccot.to_record(one.plan)
            shards.write(record, [to_png(image) for image in one.references], to_png(one.target))
    read = Source(tmp_path / "shards").first(2)
    for one, kept in zip(sorted(ten[:2], key=lambda one: hash_of(one.key)), read):
        assert [x.tobytes() for x in one.references] == [x.tobytes() for x in kept.references]
    mine = dict(data=str(tmp_path / "shards"), out=str(tmp_path / "run"), threads=1, steps=1)
    mine |= dict(max_references=10, tokens_per_pack=4096, samples_per_step=2, painter_errors=0.0)
    sft.train(sft.Config(config="smoke", **sft.PRESETS["smoke"] | mine))
    assert loop.read_log(tmp_path / "run")[0]["grad_norm"] > 0


def test_plans_that_would_be_cut_off_are_said(capsys):
    held = HeldOut()
    held.check_length([52, 71])
    assert not capsys.readouterr().err
    held.check_length([52, 168])  # of ten references
    assert "take up to 168 tokens, and only 72" in capsys.readouterr().err
