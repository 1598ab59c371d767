"""
Stage 2: what must hold of the loop before any learning curve means something.

The mathematics of a step is tested in test_flow.py, the reward of a group in test_reward.py.
"""

import dataclasses
import types

import numpy as np
import pytest
import torch

import flow
import grpo
import iccot
import tree
from engine import Branch, Engine, Group, Prompt
from grpo import clipped, group_advantage
from model import SMOKE, ModelConfig, UnifiedModel
from reward import group_rewards
from runtime import loop, lora, processes
from runtime.processes import generator
from runtime.state import TrainingState
from sequence import Sequence
from toy.tasks import draw_sample
from toy.tokenizer import train_tokenizer

# fmt: off
SDE = dict(
    likelihood="sde", window=2, kl_beta=0.0, updates=2, prompts_per_step=2, max_plan_tokens=40,
    cot_temperature=1.0,
)
# fmt: on
CONFIG = grpo.Config(config="smoke", **grpo.PRESETS["smoke"] | SDE)


class FixedClip:
    """Known embeddings: all captions are the first axis, so a picture's cosine is its score."""

    def __init__(self, scores):
        self.scores = torch.tensor(scores)

    def embed_images(self, images):
        assert len(images) == len(self.scores)
        return torch.stack([self.scores, (1 - self.scores.square()).sqrt()], 1)

    def embed_captions(self, captions):
        assert captions and all(captions)
        return torch.tensor([[1.0, 0.0]]).expand(len(captions), -1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    tokenizer = train_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer", model.config.vocab_size)
    return Engine(model, tokenizer), [draw_sample("train", i) for i in range(2)]


def write_true_plans(toy, monkeypatch):
    """From here on the engine "thinks" the plans of the samples."""
    engine, samples = toy

    def think(prompts, thinking, *, count, **_):
        texts = [iccot.render(one.plan) for one in samples for _ in range(count)]
        return [engine.tokenizer.encode(text) for text in texts], [True] * len(texts)

    monkeypatch.setattr(engine, "think", think)


def roll(toy, config=CONFIG, step=0):
    engine, samples = toy
    numbers = [2 * step, 2 * step + 1]
    return grpo.roll_out(engine, samples, numbers, config, step)


def update(learner, rollout, reward, config):
    return grpo.update(learner, rollout, *grpo.advantages(reward, config), config)


def learner(engine, optimizer, anchor=None):
    return grpo.Learner(engine, TrainingState({}, optimizer, {}), anchor)


def run_update(toy, rollout, reward, config=CONFIG, *, lr=100.0, anchor=None):
    """One update phase on a copy of the weights: health, weights before, weights after."""
    engine, _ = toy
    model = engine.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(lora.trained_parameters(model, config.train).values(), lr)
    health, finite = update(learner(engine, optimizer, anchor), rollout, reward, config)
    assert finite
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data.copy_(before[name])
    lora.trained_parameters(model, "all")
    return health, before, after


def some_reward(config=CONFIG, seed=0):
    return torch.randn(
        config.prompts_per_step, config.group_size, generator=torch.Generator().manual_seed(seed)
    )


VARIANTS = {
    "plain": {},
    "no rid": dict(images_per_cot=0),
    "small packs": dict(tokens_per_pack=400),
    "guided": dict(text_guidance=3.0, image_guidance=1.5),
    "two pictures a plan": dict(images_per_cot=2),
    "text": dict(train_text=True),
    "text, small packs": dict(train_text=True, images_per_cot=2, tokens_per_pack=150),
    # members split by score; with three of them some batches end one member and begin the next
    "split": dict(tokens_per_pack=120),
    "guided text, split": dict(
        text_guidance=3.0,
        image_guidance=1.5,
        train_text=True,
        images_per_cot=2,
        window=3,
        tokens_per_pack=450,
    ),
    "no rid, split": dict(images_per_cot=0, window=3, tokens_per_pack=200),
    "forward": dict(likelihood="forward"),
    "forward, no rid": dict(likelihood="forward", images_per_cot=0),
    "forward, guided text, split": dict(
        likelihood="forward",
        text_guidance=3.0,
        image_guidance=1.5,
        train_text=True,
        images_per_cot=2,
        tokens_per_pack=450,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_ratio_is_one_until_weights_move(toy, name):
    """p_old of the second optimiser step comes from a pass without gradients, p_new from one with
    them, after a step that changed nothing or something."""
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    rollout = roll(toy, config)
    health, before, after = run_update(toy, rollout, some_reward(), config)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert abs(health["ratio_last"] - 1) > 1e-6
    health, *_ = run_update(toy, rollout, some_reward(), config, lr=0.0)
    assert health["ratio_last"] == pytest.approx(1, abs=1e-6)
    assert health.get("mismatch", 0) < 1e-5
    assert ("mismatch" in health) == (config.likelihood == "sde")


def another_plan(rollout, monkeypatch):
    rollout.plans = [plan[::-1] for plan in rollout.plans]


def another_noise(rollout, monkeypatch):
    rollout.x += 0.05


def another_mask(rollout, monkeypatch):
    """The update hides the beginning of the prompt from plans and pictures."""
    plant = tree.plant

    def planted_wrongly(*arguments):
        planted = plant(*arguments)
        for batch in planted.batches:
            batch.packed.mask.k_hi[:5] = 0
        return planted

    monkeypatch.setattr(tree, "plant", planted_wrongly)


@pytest.mark.parametrize("fault", [another_plan, another_noise, another_mask])
@pytest.mark.parametrize("likelihood", ["sde", "forward"])
def test_a_fault_between_rollout_and_update_is_seen(toy, monkeypatch, likelihood, fault):
    """sde: in the logged mismatch. forward: against scores of each picture in a pass of its own."""
    write_true_plans(toy, monkeypatch)
    config = dataclasses.replace(CONFIG, likelihood=likelihood)
    rollout = roll(toy, config)
    engine, members = toy[0], range(2 * config.group_size)
    with torch.no_grad():
        alone = [
            [naive_density(engine, rollout, member, k, config) for k in range(config.scores)]
            for member in members
        ]

    def difference():
        if likelihood == "sde":
            return run_update(toy, rollout, some_reward(), config, lr=0.0)[0]["mismatch"]
        trees = [tree.plant(engine.layout, rollout, group, config) for group in range(2)]
        scores = [p.log_prob for t in trees for p in tree.policies(engine.model, t, config)]
        return float((torch.cat(scores) - torch.tensor(alone).flatten()).abs().mean())

    rounding = difference()
    assert rounding < 1e-5
    fault(rollout, monkeypatch)
    assert difference() > 10 * rounding


def test_rid_gives_every_member_its_own_plan(toy):
    with_rid, without = roll(toy), roll(toy, dataclasses.replace(CONFIG, images_per_cot=0))
    size = CONFIG.group_size
    for group in range(2):
        assert len({tuple(plan) for plan in with_rid.plans[group * size :][:size]}) > 1
    assert len(without.plans) == 2


def test_seeds_differ_between_members_and_iterations(toy):
    rollout = roll(toy)
    first_values = (rollout.target - rollout.x)[0, :, :, 0].flatten(0, 1).tolist()  # (P * G, C)
    assert len({tuple(values) for values in first_values}) == 2 * CONFIG.group_size
    again = roll(toy)
    assert torch.equal(again.target, rollout.target) and again.plans == rollout.plans
    starts = {
        float(roll(toy, dataclasses.replace(CONFIG, window=1), step).t[0, 0]) for step in range(4)
    }
    assert len(starts) > 1


def test_chunks_of_a_rollout_change_nothing(toy):
    """Groups and members that go through the model together: rounding alone may differ."""
    whole = roll(toy)
    for pictures_at_once in (1, 3, 4):
        parts = roll(toy, dataclasses.replace(CONFIG, pictures_at_once=pictures_at_once))
        assert parts.plans == whole.plans and parts.captions == whole.captions
        for name in ("x", "target", "t", "t_next", "log_prob"):
            expected = getattr(whole, name)
            torch.testing.assert_close(getattr(parts, name), expected, rtol=1e-4, atol=1e-4)


def test_forward_scores_the_finished_picture_where_the_group_noises_it(toy):
    """Pictures are what the sampler paints without noise; times and noises belong to the group."""
    config = dataclasses.replace(CONFIG, likelihood="forward")
    engine, rollout, size = toy[0], roll(toy, config), config.group_size
    start = generator(config.seed, 1, grpo.STARTS, 2)
    branch = Branch(rollout.plans[size + 2], (engine.start(rollout.grid, start),))
    painted = engine.paint([Group(rollout.prompts[1], rollout.grid, (branch,))], config.sampler)
    t = rollout.t[:, :, None, None, None]
    x0, noise = rollout.x - t * rollout.target, rollout.x + (1 - t) * rollout.target  # both ends
    for score in range(grpo.SCORED_TIMES):
        torch.testing.assert_close(x0[score, 1, 2], painted, rtol=1e-4, atol=1e-4)
    assert rollout.t.unique().numel() == 2 * grpo.SCORED_TIMES
    torch.testing.assert_close(noise, noise[:, :, :1].expand_as(noise), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(noise[0, 0], noise[0, 1], atol=1e-2)
    assert not torch.equal(roll(toy, config, step=1).t, rollout.t)


@pytest.mark.parametrize("name", ["plain", "guided", "text"])
def test_equal_rewards_give_exactly_no_gradient(toy, name):
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    _, before, after = run_update(
        toy, roll(toy, config), torch.full((2, config.group_size), 0.3), config
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_advantages():
    reward = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage = group_advantage(reward, 1e-3)
    expected = (reward - reward.mean(1, keepdim=True)) / reward.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(group_advantage(3 * reward + 7, 1e-3), advantage)
    outlier = torch.cat([torch.zeros(1, 63), torch.ones(1, 1)], 1)
    assert group_advantage(outlier, 1e-3).max() == grpo.MAX_ADVANTAGE
    tiny = torch.tensor([[0.0, 1e-5]])
    torch.testing.assert_close(group_advantage(tiny, 0.003), (tiny - tiny.mean()) / 0.003)
    assert not group_advantage(torch.tensor([[0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2]]), 1e-30).any()
    without_floor = group_advantage(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), 0.0)
    assert without_floor.tolist() == [[0, 0], [-1, 1]]


def test_pictures_of_one_plan_compete_with_each_other():
    reward = some_reward().double()
    config = dataclasses.replace(CONFIG, images_per_cot=2, std_floor=0.003)
    images, plans = grpo.advantages(reward, config)
    pairs = reward.view(2, 2, 2)
    expected = group_advantage(pairs.flatten(0, 1), 0.003)
    torch.testing.assert_close(images.view(4, 2), expected)
    torch.testing.assert_close(plans, group_advantage(pairs.mean(2), 0.003).flatten())


def test_unparsable_plans_get_the_lowest_reward_of_their_group(toy, monkeypatch):
    write_true_plans(toy, monkeypatch)
    rollout = roll(toy)
    assert all(rollout.captions) and rollout.captions[0] == toy[1][0].plan.caption
    clip = FixedClip([0.5, 0.1, 0.2, 0.9, 0.1, 0.3, 0.4, 0.8])

    def rewards(captions):
        return group_rewards(clip, rollout.images, captions, groups=2)

    captions = [*rollout.captions]
    captions[1] = ""
    cosines = torch.tensor([[0.5, 0.2, 0.2, 0.9], [0.1, 0.3, 0.4, 0.8]])
    torch.testing.assert_close(rewards(captions), -(2 - 2 * cosines).sqrt())
    # a group without any plan teaches nothing
    advantage = group_advantage(rewards([""] * 4 + captions[4:]), 0.003)
    assert not advantage[0].any() and advantage[1].any()
    assert (rewards([""] * 8) == -2).all()  # the lowest there is


def make_policy(log_prob, v=None, text=None):
    return tree.Policy(log_prob, text, torch.zeros(2, 3) if v is None else v)


def test_objective_is_the_equation():
    """L by hand: clipped ratios, divergence and text, each with its weight."""
    old = make_policy(torch.zeros(2), text=torch.zeros(3))
    new = make_policy(
        torch.tensor([0.3, 0.05]), torch.full((2, 3), 2.0), torch.tensor([0.1, 9.0, -0.4])
    )
    found = grpo.objective(
        new,
        old,
        make_policy(torch.zeros(2)),
        advantage=torch.tensor([1.0, -2.0]),
        scale=1 / 2,
        clip_range=0.1,
        kl_beta=0.5,
    )
    ratio = torch.tensor([0.3, 0.05]).exp()
    images = (-1.0 * 1.1 + 2.0 * ratio[1]) / 2  # the first is clipped at 1 + eps
    torch.testing.assert_close(found.surrogate, images)
    torch.testing.assert_close(found.kl, torch.tensor(4.0))
    torch.testing.assert_close(found.total, images + 0.5 * 4.0)
    torch.testing.assert_close(found.ratio, ratio)
    batch = types.SimpleNamespace(
        token_plans=torch.tensor([1, 1, 0]), token_counts=torch.tensor([True, False, True])
    )
    text = grpo.text_objective(new, old, batch, torch.tensor([-1.0, 1.0]), 1 / 2)
    # the last is clipped at 0.8, against its advantage
    torch.testing.assert_close(text, (-torch.tensor(0.1).exp() + 0.8) / 2)


def test_gradient_at_ratio_one_is_reinforce():
    log_prob = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(6, 1, dtype=torch.float64)
    loss = clipped((log_prob - log_prob.detach()).exp(), advantage, 1e-3).mean()
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, -advantage.expand(6, 3) / log_prob.numel())


def test_clipping_stops_only_what_goes_too_far():
    log_prob = torch.tensor([0.1, 0.1, -0.1, -0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (gradient,) = torch.autograd.grad(clipped(log_prob.exp(), advantage, 0.01).sum(), log_prob)
    assert (gradient != 0).tolist() == [False, True, True, False]


def naive_loss(engine, rollout, reward, config):
    """One member and one score at a time, each in a sequence of its own; texts plan by plan."""
    advantage, plan_advantage = grpo.advantages(reward, config)
    terms = []
    for member in range(len(advantage)):
        for k in range(config.scores):
            density = naive_density(engine, rollout, member, k, config)
            terms.append(-advantage[member] * (density - density.detach()).exp())
    loss = torch.stack(terms).mean()
    if config.train_text:
        loss = loss + naive_text_loss(engine, rollout, plan_advantage, config)
    return loss


def naive_density(engine, rollout, member, k, config):
    """Score k of a member: of a step that was taken, or of its finished picture."""
    group, column = divmod(member, config.group_size)
    plan = rollout.plans[member // config.pictures_per_plan]
    x, target = rollout.x[k, group, column], rollout.target[k, group, column]
    t, t_next = rollout.t[k, group], rollout.t_next[k, group]
    v = guided_alone(engine, rollout.prompts[group], plan, x, t=t, config=config)
    if config.likelihood == "forward":
        return -(v - target).square().mean()
    mean, std = flow.transition(x.to(v), v, t.to(v), t_next=t_next.to(v))
    return torch.distributions.Normal(mean, std).log_prob(target.to(v)).mean()


def naive_text_loss(engine, rollout, advantage, config):
    words = []
    for j, plan in enumerate(rollout.plans):
        sequence = Sequence(engine.layout)
        with sequence.document():
            rollout.prompts[j // config.plans_per_group].write(sequence)
            sequence.text(plan, loss=True)
        packed = sequence.pack()
        log_prob = -engine.model.cross_entropy(engine.model(packed)[0], packed)
        log_prob = log_prob[: len(plan) + int(rollout.ended[j])]
        words.append(-advantage[j] * (log_prob - log_prob.detach()).exp())
    return torch.cat(words).mean()


def guided_alone(engine, prompt, plan, x, *, t, config):
    v = velocity_alone(engine, prompt, plan, x, t=t)
    if config.text_guidance <= 1 or not flow.guidance_active(t, config.sampler.guidance_interval):
        return v
    pictures_only, texts_only = Prompt(prompt.items[:-1]), Prompt(prompt.items[-1:])
    others = [velocity_alone(engine, one, None, x, t=t) for one in (pictures_only, texts_only)]
    return flow.guide(v, *others, guidance=config.sampler.guidance)


def velocity_alone(engine, prompt, plan, x, *, t):
    sequence = Sequence(engine.layout)
    with sequence.document():
        prompt.write(sequence)
        if plan is not None:
            sequence.text(plan)
        sequence.noise(x, (int(len(x) ** 0.5),) * 2, t)
    packed = sequence.pack()
    return engine.model.velocity(packed, engine.model(packed)[1])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "no rid",
        "small packs",
        "guided",
        "two pictures a plan",
        "text, small packs",
        "split",
        "guided text, split",
        "forward",
        "forward, no rid",
        "forward, guided text, split",
    ],
)
def test_the_tree_equals_the_naive_loop(toy, monkeypatch, name, dtype, tolerance):
    """Gradients of an update: prompt cut, plans shared, steps packed, against a pass for each."""
    monkeypatch.setattr(loop, "MAX_GRAD_NORM", 1e9)
    config = dataclasses.replace(CONFIG, **VARIANTS[name], updates=1)
    rollout = roll(toy, config)
    model = UnifiedModel(toy[0].model.config).to(dtype)
    model.load_state_dict(toy[0].model.state_dict())
    engine = Engine(model, toy[0].tokenizer)
    for field in ("x", "target", "t", "t_next", "log_prob"):
        setattr(rollout, field, getattr(rollout, field).to(dtype))
    rollout.ended[0] = False  # one plan was cut off: its eos is not the model's word
    reward = some_reward(config).to(dtype)
    parameters = dict(model.named_parameters())
    naive = torch.autograd.grad(
        naive_loss(engine, rollout, reward, config), parameters.values(), allow_unused=True
    )
    found = {}

    class Recorder(torch.optim.SGD):
        def step(self):
            found.update(
                {key: None if p.grad is None else p.grad.clone() for key, p in parameters.items()}
            )

    recorder = Recorder(model.parameters(), 0.0)
    update(learner(engine, recorder), rollout, reward, config)
    largest = max(gradient.norm() for gradient in naive if gradient is not None)
    for key, gradient in zip(parameters, naive):
        got, gradient = (torch.zeros(1) if one is None else one for one in (found[key], gradient))
        error = (got - gradient).norm() / gradient.norm().clamp_min(1e-3 * largest)
        assert error <= tolerance, (key, float(error))


@pytest.mark.parametrize("budget", [1, 106, 120, 231, 240, 300, 500, 10_000])
@pytest.mark.parametrize("name", ["plain", "no rid", "guided", "two pictures a plan"])
def test_batches_are_within_the_budget(toy, name, budget):
    """So are steps with all their contexts if one fits; members are split only if they must."""
    config = dataclasses.replace(CONFIG, **VARIANTS[name], train_text=True, tokens_per_pack=budget)
    rollout = roll(toy, config)
    step = len(config.sampler.contexts) * (rollout.x.shape[3] + 2)
    plans = rollout.plan_lengths[: config.plans_per_group] + 1  # with bos and eos
    least = int(plans.max()) + step
    batches = tree.plant(toy[0].layout, rollout, 0, config).batches
    pictures = tree.split_members(plans.tolist(), rollout.grid, config)
    every = [(member, k) for member in range(config.group_size) for k in range(config.window)]
    assert sum(pictures, []) == every
    for batch, some in zip(batches, pictures, strict=True):
        assert batch.members.tolist() == [member for member, _ in some]
        assert len(batch.packed) <= budget or (budget < least and len(some) == 1)
    for member in range(config.group_size):
        whole = int(plans[member // config.pictures_per_plan]) + config.window * step
        parts = sum(member in [of for of, _ in some] for some in pictures)
        assert parts == 1 if whole <= budget else parts <= config.window
    counted = sum(int(batch.token_counts.sum()) for batch in batches)
    assert counted == int(rollout.written[: config.plans_per_group].sum())  # each plan once
    assert budget > 1 or len(batches) == len(every)


def test_kl_is_zero_at_the_anchor_and_pulls_back_after(toy):
    rollout = roll(toy)
    anchor = {name: p.detach().clone() for name, p in toy[0].model.named_parameters()}
    config = dataclasses.replace(CONFIG, kl_beta=1.0, updates=1)
    zero = torch.zeros(2, CONFIG.group_size)
    health, before, after = run_update(toy, rollout, zero, config, anchor=anchor)
    assert health["kl"] == 0 and all(torch.equal(before[name], after[name]) for name in before)
    for value in anchor.values():
        value.mul_(1.05)
    kept = {name: value.clone() for name, value in anchor.items()}
    health, before, after = run_update(toy, rollout, zero, config, anchor=anchor)
    assert health["kl"] > 0 and any(not torch.equal(before[name], after[name]) for name in before)
    # exchanged, and back in their place
    assert all(torch.equal(anchor[name], kept[name]) for name in kept)


def test_gen_only_training_leaves_the_understanding_expert_alone(toy):
    rollout = roll(toy)
    config = dataclasses.replace(CONFIG, train="gen")
    _, before, after = run_update(toy, rollout, some_reward(), config)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(
        ".gen." in n or n.startswith(("norm_gen", "latent", "time")) for n in moved
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(group_size=1), "at least 2"),
        (dict(prompts_per_step=3), "multiple of updates"),
        (dict(window=6), "does not fit"),
        (dict(images_per_cot=3), "must divide"),
        (dict(train_text=True, cot_temperature=0.7), "cot_temperature=1"),
        (dict(train_text=True, train="gen"), "train=all"),
    ],
)
def test_impossible_combinations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)


def test_what_is_trained_guided_is_measured_guided():
    guided = dataclasses.replace(CONFIG, text_guidance=4.0, image_guidance=2.0, eval_timesteps=9)
    assert guided.held_out.sampler == dataclasses.replace(guided.sampler, num_timesteps=9)
    assert len(guided.held_out.sampler.contexts) == 3


def test_a_detached_prompt_is_not_the_gradient(toy):
    """What published systems leave out: without the way through the prompt it is another one."""
    engine, _ = toy
    model, config = engine.model, dataclasses.replace(CONFIG, updates=1)
    planted = tree.plant(engine.layout, roll(toy), 0, config)

    def gradient(detach):
        model.zero_grad()
        prefix = model.keys_and_values(planted.prompt)
        prefix = [tuple(x.detach() for x in pair) for pair in prefix] if detach else prefix
        log_prob = tree.policy(model, prefix, planted.batches[0], config).log_prob
        weights = torch.linspace(-1, 1, log_prob.numel()).view_as(log_prob)
        (log_prob * weights).sum().backward()
        gen = [p.grad.flatten() for name, p in model.named_parameters() if ".gen." in name]
        found = torch.cat(gen)
        model.zero_grad()
        return found

    exact, detached = gradient(False), gradient(True)
    assert (exact - detached).norm() > 1e-3 * exact.norm()


def test_a_synthetic_reward_rises(toy, monkeypatch):
    """The whole machine on a reward that needs no CLIP: pictures shall get redder."""
    model = UnifiedModel(toy[0].model.config).initialise(0)
    engine, samples = Engine(model, toy[0].tokenizer), toy[1]
    write_true_plans((engine, samples), monkeypatch)
    config = dataclasses.replace(CONFIG, group_size=8, window=3, updates=1)

    def redness(images):
        pixels = [torch.from_numpy(np.asarray(image).astype("float32")) for image in images]
        values = [float(p[..., 0].mean() - p[..., 1:].mean()) / 255 for p in pixels]
        return torch.tensor(values).view(-1, config.group_size)  # (P, G)

    optimizer = torch.optim.AdamW(lora.trained_parameters(model, "all").values(), 2e-3)
    means = []
    for step in range(8):
        rollout = roll((engine, samples), config, step)
        reward = redness(rollout.images)
        means.append(reward.mean().item())
        update(learner(engine, optimizer), rollout, reward, config)
    assert sum(means[-3:]) / 3 > sum(means[:2]) / 2 + 0.05, means


@pytest.mark.parametrize("world, updates", [(1, 1), (4, 1), (4, 2), (16, 1)])
def test_every_group_of_a_step_is_on_one_process(monkeypatch, world, updates):
    """Dealt by their references; those of the first update come first."""
    config = grpo.Config(config="full", prompts_per_step=16, updates=updates)
    references = [1, 4, 2, 4, 3, 1, 2, 1, *[2] * 7, 1]  # of the samples of step 5
    count = dict(zip(range(80, 96), references)).get
    monkeypatch.setattr(processes, "size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(grpo.own_numbers(5, count, config))
    assert sorted(sum(shares, [])) == list(range(80, 96))
    if (world, updates) == (4, 2):
        assert [[count(number) for number in own] for own in shares] == [
            *([4, 1, 2, 1], [4, 1, 2, 2], [3, 1, 2, 2], [2, 2, 2, 2])
        ]
        assert all(max(own[:2]) < 88 <= min(own[2:]) for own in shares)
