"""The open questions: scores against brute force, and prompts that are spoilt in exactly the way they should be."""

import math
import zlib

import numpy as np
import pytest
import torch

import iccot
import sft
from engine import Result, make_prompt
from model import UnifiedModel
from sequence import Sequence
from studies import questions
from studies.metrics import test_samples
from toy.tokenizer import train_tokenizer

SAMPLES = test_samples("toy", 40, 4)


def test_auc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    score, right = (
        torch.randint(0, 5, (30,), generator=generator).float(),
        torch.rand(30, generator=generator) < 0.6,
    )
    pairs = [(a > b) + (a == b) / 2 for a in score[right].tolist() for b in score[~right].tolist()]
    assert questions.auc(score, right) == pytest.approx(sum(pairs) / len(pairs))
    assert questions.auc(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([True, True, False])) == 1
    assert math.isnan(questions.auc(score, torch.ones(30, dtype=torch.bool)))


def test_votes_count_the_other_plans_of_the_prompt():
    assert questions.votes(["a", "a", "b", "b", "b", "b"], 3).tolist() == [
        0.5,
        0.5,
        0.0,
        1.0,
        1.0,
        1.0,
    ]


def test_noise_has_the_standard_deviation_asked_for():
    one = SAMPLES[0]
    assert questions.noisy(one, 0.0, 1).references[0].tobytes() == one.references[0].tobytes()
    spoilt = [np.asarray(image, float) / 255 for image in questions.noisy(one, 0.05, 1).references]
    for image, before in zip(spoilt, one.references):
        difference = image - np.asarray(before, float) / 255
        inside = (image > 0) & (image < 1)  # clipped values moved less
        assert 0.035 < difference[inside].std() < 0.06
    again = questions.noisy(one, 0.05, 1)
    assert again.references[0].tobytes() == questions.noisy(one, 0.05, 1).references[0].tobytes()
    assert again.references[0].tobytes() != questions.noisy(one, 0.05, 2).references[0].tobytes()


def test_a_mismatched_prompt_differs_in_its_last_reference_alone():
    before = {one.key: one for one in SAMPLES}
    found = questions.mismatched(SAMPLES)
    assert len(found) == len(SAMPLES)
    for one in found:
        was = before[one.key]
        assert (one.instruction, one.plan, one.truth, one.references[:-1]) == (
            was.instruction,
            was.plan,
            was.truth,
            was.references[:-1],
        )
        assert one.references[-1].size == was.references[-1].size
        assert any(
            one.references[-1] is other.references[-1] for other in SAMPLES if other.key != one.key
        )


def test_exchanged_prompts_have_the_same_pictures():
    some, swapped = questions.exchanged(SAMPLES)
    assert [one.key for one in some] == [one.key for one in swapped] and 0 < len(some) < len(
        SAMPLES
    )
    for a, b in zip(some, swapped):
        assert b.references == (a.references[1], a.references[0], *a.references[2:])


def test_prompts_by_number_of_references():
    found = questions.numbered(questions.Config(num_samples=3))
    assert [len(group[0].references) for group in found.values()] == [1, 2, 3, 4, 4, 5]
    for group in found.values():
        assert len(group) == 3 and len({len(one.references) for one in group}) == 1


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    config = sft.Config(config="smoke", **sft.PRESETS["smoke"])
    model = UnifiedModel(sft.model_config(config)).initialise(0)
    tokenizer = train_tokenizer(tmp_path_factory.mktemp("questions"), model.config.vocab_size)
    return model, tokenizer


@torch.no_grad()
def test_likelihood_is_that_of_the_plan_one_token_at_a_time(toy):
    model, tokenizer = toy
    layout = model.config.layout(tokenizer)
    texts = [iccot.render(one.plan) for one in SAMPLES[:3]]
    found = questions.likelihoods(model, layout, tokenizer, SAMPLES[:3], texts, batch=2)
    one, plan = SAMPLES[2], tokenizer.encode(texts[2])
    total = 0.0
    for i, token in enumerate([*plan, layout.eos]):
        sequence = Sequence(layout)
        with sequence.document():
            make_prompt(model, tokenizer, one.references, one.instruction).write(sequence)
            sequence.text(plan[:i], loss=True)
        packed = sequence.pack()
        und, _ = model(packed)
        total += model.lm_head(und[packed.label_rows]).log_softmax(-1)[i, token].item()
    assert found[2].item() == pytest.approx(total / (len(plan) + 1), rel=1e-5)


class OneHot:
    """A CLIP in which only the same words agree, and a picture stands for the caption whose picture it is."""

    def __init__(self, of_picture):
        self.of_picture = of_picture

    def embed_captions(self, captions):
        rows = torch.zeros(len(captions), 1000)
        rows[
            torch.arange(len(captions)),
            [zlib.crc32(caption.encode()) % 1000 for caption in captions],
        ] = 1
        return rows

    def embed_images(self, images):
        return self.embed_captions([self.of_picture[image.tobytes()] for image in images])


def test_captions_wrong_but_drawn_are_counted_and_ranked(toy, monkeypatch, capsys):
    """Of each prompt three right plans and two wrong ones, one of them drawn as it says; one more does not parse."""
    model, tokenizer = toy
    config, of_picture = questions.Config(num_samples=4, draws=6), {}

    def answers(*_, **how):
        assert how["temperature"] == 1
        found = []
        for i, one in enumerate(test_samples("toy", 4, 4)):
            other = test_samples("toy", 14, 4)[10 + i]
            of_picture.update({x.target.tobytes(): x.plan.caption for x in (one, other)})
            wrong = iccot.ICCoT(other.plan.caption, one.plan.relations)
            found += [
                Result(iccot.render(plan), plan, True, image)
                for plan, image in (
                    *[(one.plan, one.target)] * 3,
                    (wrong, other.target),
                    (wrong, one.target),
                )
            ]
            found.append(Result("no plan", None, False, one.target))
        return found

    monkeypatch.setattr(questions, "generate", answers)
    table = questions.captions(model, tokenizer, OneHot(of_picture), config)
    assert "20 plans that parse: 12 right, 8 wrong; drawn well: 12 and 4" in capsys.readouterr().out
    assert table["picture"] == (0.75, 0.5)  # blind to what is drawn as planned
    assert table["votes"] == (1.0, 1.0)
    assert all(0 <= value <= 1 for pair in table.values() for value in pair)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"draws": 1}, "draws=1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_timesteps": 1}, "num_timesteps=1"),
    ],
)
def test_options_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        questions.Config(**words)
