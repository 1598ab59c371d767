"""The toy's image model that errs, and its filter: how often, and that nothing else changes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import sft
from data import open_source
from runtime.config import UserError
from toy import painter, prepare
from toy.judge import judge
from toy.painter import Painted, Painter
from toy.prepare import painter_of
from toy.tasks import Drawn, draw_sample
from toy.world import split_of

COUNT = 600


def facts(truth):
    """What can be wrong: the scene, and of each thing its kind, colour and place."""
    things = {t.subject.kind: (t.subject.colour, t.place, t.subject.looks) for t in truth.things}
    return truth.scene, things


def test_a_share_of_the_targets_has_one_wrong_fact():
    found = Counter()
    for number in range(COUNT):
        truth = draw_sample("train", number).truth
        shown = painter.painted(truth, np.random.default_rng(number), 0.45)
        (scene, things), (other, others) = facts(truth), facts(shown)
        changed = [kind for kind in things if others.get(kind) != things[kind]]
        assert (scene != other) + len(changed) == (shown != truth)
        assert {split_of(one.subject) for one in shown.things} <= {"train"}
        assert split_of(shown.scene) == "train"
        found["wrong"] += shown != truth
        found["scene"] += scene != other
        found["missing"] += len(others) < len(things)
        for kind in set(changed) & set(others):
            (colour, place, _), (new_colour, new_place, _) = things[kind], others[kind]
            assert (colour != new_colour) + (place != new_place) == 1
            found["colour"] += colour != new_colour
            found["place"] += place != new_place
    assert abs(found["wrong"] / COUNT - 0.45) < 4 * (0.45 * 0.55 / COUNT) ** 0.5
    assert all(found[fact] > COUNT / 20 for fact in painter.FACTS)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_painter_changes_nothing_but_targets(scale):
    drawn = Drawn("train", 3, 4, scale)
    source = Painted(drawn, Painter(errors=0.5))
    pairs = [(drawn[i], source[i]) for i in range(40)]
    for right, one in pairs:
        assert replace(one, target=right.target) == replace(right, target=right.target)
        assert one.target.size == right.target.size and one.truth == right.truth
    wrong = sum(right.target.tobytes() != one.target.tobytes() for right, one in pairs)
    assert 8 < wrong < 32
    assert all(source[i].target.tobytes() == pairs[i][1].target.tobytes() for i in (7, 3, 7))
    perfect = Painted(drawn, Painter())
    assert all(perfect[i].target.tobytes() == drawn[i].target.tobytes() for i in range(40))


def test_the_filter_drops_the_worst_of_each_task(monkeypatch):
    """With the judge for a CLIP, so that what is dropped is wrong; all tasks stay."""
    monkeypatch.setattr(painter, "FIRST", 150)
    monkeypatch.setattr(Painted, "_cosine", lambda _, one: judge(one.target, one.truth).overall)
    drawn = Drawn("train", 0, 4)
    before, after = (
        [source[i] for i in range(80)]
        for source in (Painted(drawn, Painter(0.3)), Painted(drawn, Painter(0.3, dropped=0.2)))
    )

    def share_wrong(samples):
        return np.mean([judge(one.target, one.truth).overall < 9.99 for one in samples])

    assert share_wrong(before) > 0.22 and share_wrong(after) < 0.75 * share_wrong(before)
    assert Counter(one.task for one in after).keys() == Counter(one.task for one in before).keys()
    kept = [a.key == b.key for a, b in zip(before, after)]
    assert 0.7 < np.mean(kept) < 0.9  # the others were drawn anew


def test_the_toys_source_has_the_painter_it_is_asked_for():
    config = sft.Config(config="toy", **sft.PRESETS["toy"])
    assert config.painter_errors > 0
    asked = painter_of(config)
    source = open_source("toy", 0, 4, painter=asked)
    assert source.painter.errors == config.painter_errors and asked.clip is None
    assert isinstance(open_source("toy", 0, 4), Drawn)  # stage 2's prompts, and the held-out ones
    on_disk = replace(config, data="shards")
    assert painter_of(on_disk) is None
    with pytest.raises(UserError, match="filter_targets=0.2.*data=shards"):
        painter_of(replace(on_disk, filter_targets=0.2))


def test_the_first_samples_are_right():
    """Those of the steps that stand for the base model's training, whatever the filter."""
    config = sft.Config(config="toy", **sft.PRESETS["toy"])
    config = replace(config, pretraining_steps=3, samples_per_step=2, painter_errors=1.0)
    source = open_source("toy", 0, 4, painter=painter_of(config))
    right = [judge(source[i].target, source[i].truth).overall > 9.99 for i in range(12)]
    assert right == [True] * 6 + [False] * 6


@pytest.mark.parametrize("shares", [dict(dropped=1.0), dict(dropped=-0.1), dict(errors=1.5)])
def test_shares_that_are_none_are_refused(shares):
    """A filter that drops everything would look for a sample for ever."""
    with pytest.raises(ValueError, match="painter_errors=.*expected shares"):
        Painter(**shares)


def test_the_filter_reads_on_the_cpu(monkeypatch):
    """Wherever the model is: a worker that reads samples ahead cannot use a GPU."""
    made = []
    monkeypatch.setattr(prepare, "train_metric_clip", lambda *_: None)
    monkeypatch.setattr(prepare.processes, "device", lambda: "cuda")
    monkeypatch.setattr(prepare, "Clip", lambda *words: made.append(words))
    config = sft.Config(config="toy", **sft.PRESETS["toy"] | dict(filter_targets=0.2))
    assert painter_of(config).dropped == 0.2
    assert made == [(config.metric, "cpu")]
    prepare.metric_clip_of_all(config)
    assert made[1] == (config.metric, "cuda")
