"""Drawing plan tokens: the right distribution, one generator a member, no influence of company."""

import itertools

import pytest
import torch

import flow
from engine import Branch, Engine, Group, Noised, Sampler, Thinking, choose, lay_out
from model import SMOKE, ModelConfig, UnifiedModel
from runtime.processes import generator
from toy.prepare import toy_tokenizer

SAMPLING = Thinking(8, 1.0)


def test_tokens_come_with_their_probabilities():
    logits = torch.tensor([2.0, 0.5, -1.0, 1.0, -3.0])
    count = 40_000
    uniform = torch.rand(count, generator=generator(0), dtype=torch.float64)
    drawn = choose(logits.expand(count, -1), SAMPLING, uniform)
    found = torch.bincount(drawn, minlength=5) / count
    expected = logits.softmax(0)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 4 * deviation).all()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_every_number_gives_a_token_that_can_come(top_p):
    """At BAGEL's vocabulary, also for the smallest and the largest number in [0, 1)."""
    size = 152_064
    logits = torch.full((3, size), -torch.inf)
    logits[:, 100:200] = torch.randn(100, generator=generator(1))
    logits[:, 150] = 9.0
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    drawn = choose(logits, Thinking(8, 1.0, top_p), uniform)
    assert ((drawn >= 100) & (drawn < 200)).all()
    if top_p < 1:
        assert (drawn == 150).all()  # it has more than 0.9 alone


def test_rare_tokens_are_not_lost_in_a_large_vocabulary():
    """Half of the mass lies on 152,063 tokens of equal probability: their mean index is in the
    middle, and the place where a number falls is exact to a token."""
    size = 152_064
    logits = torch.zeros(size)
    logits[0] = torch.log(torch.tensor(size - 1.0))
    wanted = torch.tensor([1, 76_032, 152_063])
    uniform = 0.5 + (wanted.double() - 0.5) / (size - 1) / 2
    drawn = choose(logits.expand(3, -1), SAMPLING, uniform)
    assert (drawn - wanted).abs().max() <= 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A model with fresh weights that ends its plans at very different places."""
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    made = Engine(model, toy_tokenizer(tmp_path_factory.mktemp("run"), SMOKE["vocab_size"]))
    with torch.no_grad():
        model.lm_head.weight[made.layout.eos] *= 3
    return made


def test_plans_do_not_depend_on_their_company(engine):
    prompts = [engine.prompt((), text) for text in ("Draw a cat.", "A red ball at the left.")]
    thinking = Thinking(60, 1.0)

    def draw(number):
        return [generator(5, number, member) for member in range(4)]

    plans, ended = engine.think(prompts, thinking, count=4, generators=draw(0) + draw(1))
    lengths = [len(plan) for plan in plans]
    assert len(set(lengths)) > 3 and any(ended), lengths
    alone = [
        engine.think([prompts[number]], thinking, generators=[one])[0][0]
        for number in range(2)
        for one in draw(number)
    ]
    assert plans == alone
    for plan, end in zip(plans, ended):
        assert engine.layout.eos not in plan and (end or len(plan) == 60)


def test_ended_rows_leave(engine, monkeypatch):
    """The tokens that pass through the model are those of the plans and their ends, no more."""
    prompts = [engine.prompt((), "Draw a cat.")]
    prefix = engine.prefill(prompts)
    before, each = engine.model.tokens, dict(count=4, prefix=prefix)

    def draw():
        return [generator(5, 0, member) for member in range(4)]

    plans, ended = engine.think(prompts, Thinking(60, 1.0), generators=draw(), **each)
    assert engine.model.tokens - before == sum(map(len, plans)) + sum(ended)
    monkeypatch.setattr("engine.LOOK", {"cpu": 8})  # as on a GPU: the same plans
    assert engine.think(prompts, Thinking(60, 1.0), generators=draw(), **each) == (plans, ended)


def test_velocities_between_passes_are_extrapolated(engine, monkeypatch):
    """The first three steps ask the model, then every third; guidance that begins asks it anew."""
    torch.nn.init.normal_(engine.model.latent_out.weight, std=0.02, generator=generator(3))
    start = engine.start((2, 3), generator(2))
    group = Group(engine.prompt((), "Draw a cat."), (2, 3), (Branch([7, 8, 9], (start,)),))
    asked, pictures = [], {}
    forward = type(engine.model).velocity

    def counted(model, *words):
        asked.append(len(words[0].latents))
        return forward(model, *words)

    monkeypatch.setattr(type(engine.model), "velocity", counted)
    for interval in (1, 3, 100):
        sampler = Sampler(14, 3.0, cache_interval=interval)
        pictures[interval] = engine.paint([group], sampler)
        pictures[interval, "passes"] = len(asked)
        asked.clear()
    assert [pictures[i, "passes"] for i in (1, 3, 100)] == [13, 7, 3]
    off = {i: (pictures[i] - pictures[1]).norm() / pictures[1].norm() for i in (3, 100)}
    assert 0 < off[3] < 0.05 and off[3] < off[100]
    engine.paint([group], Sampler(14, 3.0, 4.0, 1.0, (0.6, 1.0), cache_interval=100))
    sizes = [len(list(same)) for _, same in itertools.groupby(asked)]
    assert sizes == [3, 3]  # with guidance, and without it
    with pytest.raises(ValueError, match="cache_interval=0"):
        Sampler(14, 3.0, cache_interval=0)


def test_guidance_contexts_are_computed_inside_the_interval_alone(engine):
    """As if all of them were, at every step, and guidance then switched off outside."""
    torch.nn.init.normal_(engine.model.latent_out.weight, generator=generator(3))
    prompt, grid = engine.prompt((), "Draw a cat."), (2, 3)
    noise = [engine.start(grid, generator(2, member)) for member in range(2)]
    group = Group(prompt, grid, tuple(Branch([7, 8, 9], (one,)) for one in noise))

    def paint(interval):
        before, steps = engine.model.tokens, []

        def step(k, x, v, t, t_next):
            steps.append(flow.euler_step(x, v, t, t_next=t_next))
            return steps[-1]

        engine.paint([group], Sampler(5, 3.0, 4.0, 2.0, interval, "text_channel"), step=step)
        return steps, engine.model.tokens - before

    (always, most), (partly, fewer) = paint((0.0, 1.0)), paint((0.8, 1.0))
    inside = int((flow.time_grid(5, 3.0)[:-1] > 0.8).sum())
    assert inside == 2 and most - fewer == (4 - inside) * 2 * 2 * (2 * 3 + 2)
    torch.testing.assert_close(partly[:inside], always[:inside])
    x, t = partly[-2], flow.time_grid(5, 3.0)[-2]
    last = tuple(Branch([7, 8, 9], (Noised(one, float(t)),)) for one in x.chunk(2))
    contexts = ("full", "no_text", "no_image")
    packed, rows = lay_out(engine.layout, [Group(prompt, grid, last)], contexts)
    with torch.no_grad():
        v = engine.model.velocity(packed, engine.model(packed)[1])[rows["full"]]
    torch.testing.assert_close(partly[-1], x - t * v, rtol=1e-4, atol=1e-4)
