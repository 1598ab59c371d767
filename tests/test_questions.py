"""
Wrong captions: scores against brute force. The plans are given by a scripted
engine: three right ones of each prompt, two wrong ones, one that does not parse. Left out: the
tables of a trained model, which are in RESULTS.md.
"""

import math
import zlib

import pytest
import torch

import iccot
from engine import Engine, Result
from model import SMOKE, ModelConfig, UnifiedModel
from sequence import Sequence
from studies import questions
from studies.metrics import HeldOut
from toy.tokenizer import train_tokenizer

SAMPLES = HeldOut(count=40).samples()


def test_auc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 5, (30,), generator=generator).float()
    right = torch.rand(30, generator=generator) < 0.6
    pairs = [(a > b) + (a == b) / 2 for a in score[right].tolist() for b in score[~right].tolist()]
    assert questions.auc(score, right) == pytest.approx(sum(pairs) / len(pairs))
    assert questions.auc(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([True, True, False])) == 1
    assert math.isnan(questions.auc(score, torch.ones(30, dtype=torch.bool)))


def test_votes_count_the_other_plans_of_the_prompt():
    found = questions.votes(["a", "a", "b", "b", "b", "b"], 3).tolist()
    assert found == [0.5, 0.5, 0.0, 1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    tokenizer = train_tokenizer(tmp_path_factory.mktemp("questions"), model.config.vocab_size)
    return Engine(model, tokenizer)


@torch.no_grad()
def test_likelihood_is_that_of_the_plan_one_token_at_a_time(engine):
    texts = [iccot.render(one.plan) for one in SAMPLES]
    found = questions.likelihoods(engine, SAMPLES, texts, batch=2)
    one, plan = SAMPLES[2], engine.tokenizer.encode(texts[2])
    total = 0.0
    for i, token in enumerate([*plan, engine.layout.eos]):
        sequence = Sequence(engine.layout)
        with sequence.document():
            engine.prompt(one.references, one.instruction).write(sequence)
            sequence.text(plan[:i], loss=True)
        packed = sequence.pack()
        und, _ = engine.model(packed)
        logits = engine.model.lm_head(und[packed.label_rows])  # (X, vocabulary)
        total += logits.log_softmax(-1)[i, token].item()
    assert found[2].item() == pytest.approx(total / (len(plan) + 1), rel=1e-5)


class OneHot:
    """A CLIP in which only the same words agree, and a picture stands for its caption."""

    def __init__(self, of_picture):
        self.of_picture = of_picture

    def embed_captions(self, captions):
        rows = torch.zeros(len(captions), 1000)  # (B, E)
        for row, words in zip(rows, captions):
            row[zlib.crc32(words.encode()) % 1000] = 1
        return rows

    def embed_images(self, images):
        return self.embed_captions([self.of_picture[image.tobytes()] for image in images])


class Scripted(Engine):
    """An engine that gives ready answers, and remembers how it was asked."""

    def __init__(self, engine, results):
        super().__init__(engine.model, engine.tokenizer)
        self.results = results

    def generate(self, requests, **how):
        self.requests, self.how = requests, how
        return self.results


def answers(one, other):
    """Three right plans of a prompt, two wrong ones, one of them drawn as it says, and no plan."""
    wrong = iccot.ICCoT(other.plan.caption, one.plan.relations)
    drawn = [*[(one.plan, one.target)] * 3, (wrong, other.target), (wrong, one.target)]
    found = [Result(iccot.render(plan), plan, [], True, image) for plan, image in drawn]
    return [*found, Result("no plan", None, ["no caption"], False, one.target)]


def test_captions_wrong_but_drawn_are_counted_and_ranked(engine, capsys):
    config, samples = questions.Config(num_samples=4, draws=6), HeldOut(count=14).samples()
    results = [
        result for one, other in zip(samples[:4], samples[10:]) for result in answers(one, other)
    ]
    of_picture = {one.target.tobytes(): one.plan.caption for one in samples}
    scripted = Scripted(engine, results)
    table = questions.captions(scripted, OneHot(of_picture), config)
    assert "20 plans that parse: 12 right, 8 wrong; drawn well: 12 and 4" in capsys.readouterr().out
    assert table["picture"] == (0.75, 0.5)  # blind to what is drawn as planned
    assert table["votes"] == (1.0, 1.0)
    assert all(0 <= value <= 1 for pair in table.values() for value in pair)
    asked = [request.instruction for request in scripted.requests]
    assert asked == [one.instruction for one in samples[:4] for _ in range(6)]
    assert scripted.how["thinking"].temperature == 1
    assert scripted.how["seeds"] == [(0, i) for i in range(24)]  # each plan has its own


@pytest.mark.parametrize("words", [{"draws": 1}, {"num_samples": 0}])
def test_options_that_cannot_be(words):
    with pytest.raises(ValueError, match="expected at least 1 and 2"):
        questions.Config(**words)
