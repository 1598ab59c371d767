"""Stage 2: what must hold of the loop before any learning curve means something. The mathematics of a step is tested in test_flow.py."""

import dataclasses

import pytest
import torch

import data
import flow
import grpo
import iccot
from model import SMOKE, ModelConfig, UnifiedModel
from sequence import Sequence

CONFIG = grpo.Config(**grpo.PRESETS["smoke"])


class FixedClip:
    """A reward with known scores."""

    truncated = 0

    def __init__(self, scores):
        self.scores = torch.tensor(scores)

    def score(self, images, captions, kind):
        assert len(images) == len(captions) and all(captions)
        return self.scores[: len(images)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    tokenizer = data.train_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer", model.config.vocab_size)
    samples = [data.draw_sample("train", i) for i in range(2)]
    return model, model.config.layout(tokenizer), tokenizer, samples


def roll(toy, config=CONFIG, step=0, true_plans=False, monkeypatch=None):
    model, layout, tokenizer, samples = toy
    if true_plans:
        def think(model, layout, prompts, size, *rest):
            plans = [tokenizer.encode(iccot.render(one.plan)) for one in samples for _ in range(size)]
            return plans, [True] * len(plans)

        monkeypatch.setattr(grpo, "think", think)
    return grpo.sample_groups(model, layout, tokenizer, samples, config, step)


def run_update(toy, rollout, advantage, config=CONFIG, lr=1e-3, reference=None):
    model, layout, _, _ = toy
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(grpo.trained_parameters(model, config.train), lr)
    health = grpo.update(model, reference, optimizer, layout, rollout, advantage, config)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data.copy_(before[name])
    return health, before, after


@pytest.mark.parametrize("rid", [True, False])
def test_ratio_is_exactly_one_before_the_first_update(toy, rid):
    config = dataclasses.replace(CONFIG, rid=rid)
    rollout = roll(toy, config)
    batch = grpo.pack_groups(toy[1], rollout, [0, 1])
    with torch.no_grad():
        old, _ = grpo.policy(toy[0], rollout, batch, config)
    new, _ = grpo.policy(toy[0], rollout, batch, config)
    assert torch.equal(new, old)
    advantage = torch.randn(2, config.group_size, generator=torch.Generator().manual_seed(0))
    health, before, after = run_update(toy, rollout, advantage, config)
    assert health["ratio_first_min"] == health["ratio_first_max"] == 1.0
    assert any(not torch.equal(before[name], after[name]) for name in before)
    health, *_ = run_update(toy, rollout, advantage, config, lr=0.0)  # later updates too, while nothing has moved
    assert health["ratio_last"] == 1.0
    assert health["mismatch"] < 1e-4


def test_rid_gives_every_member_its_own_plan(toy):
    with_rid, without = roll(toy), roll(toy, dataclasses.replace(CONFIG, rid=False))
    assert all(len({tuple(plan) for plan in group}) > 1 for group in with_rid.plans)
    assert all(len({tuple(plan) for plan in group}) == 1 for group in without.plans)


def test_seeds_differ_between_members_and_iterations(toy):
    rollout = roll(toy)
    n = rollout.grid[0] * rollout.grid[1]
    members = rollout.x.shape[1] // n
    steps = (rollout.x_next - rollout.x).view(len(rollout.x), members, n, -1)
    assert len({tuple(steps[0, m, 0].tolist()) for m in range(members)}) == members
    again = roll(toy)
    assert torch.equal(again.x_next, rollout.x_next) and again.plans == rollout.plans
    starts = {float(roll(toy, dataclasses.replace(CONFIG, window=1), step).times[0]) for step in range(8)}
    assert len(starts) > 1


def test_equal_rewards_give_exactly_no_gradient(toy):
    rollout = roll(toy)
    advantage = grpo.group_advantage(torch.full((2, CONFIG.group_size), 0.3), 0.003, 5.0)
    assert not advantage.any()
    _, before, after = run_update(toy, rollout, advantage)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_advantages():
    reward = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage = grpo.group_advantage(reward, 1e-3, 100.0)
    expected = (reward - reward.mean(1, keepdim=True)) / reward.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(grpo.group_advantage(3 * reward + 7, 1e-3, 100.0), advantage)
    assert grpo.group_advantage(reward, 1e-3, 0.5).abs().max() == 0.5
    tiny = torch.tensor([[0.0, 1e-5]])
    torch.testing.assert_close(grpo.group_advantage(tiny, 0.003, 5.0), (tiny - tiny.mean()) / 0.003)
    assert not grpo.group_advantage(torch.tensor([[0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2]]), 1e-30, 5.0).any()


def test_unparsable_plans_get_the_lowest_reward_of_their_group(toy, monkeypatch):
    rollout = roll(toy, true_plans=True, monkeypatch=monkeypatch)
    assert rollout.valid.all() and rollout.captions[0] == toy[3][0].plan.caption
    rollout.valid[1] = False
    reward = grpo.rewards(FixedClip([0.5, 0.2, 0.9, 0.1, 0.3, 0.4, 0.8]), rollout, CONFIG)
    torch.testing.assert_close(reward, torch.tensor([[0.5, 0.2, 0.2, 0.9], [0.1, 0.3, 0.4, 0.8]]))
    rollout.valid[:4] = False
    reward = grpo.rewards(FixedClip([0.1, 0.3, 0.4, 0.8]), rollout, CONFIG)
    assert not grpo.group_advantage(reward, 0.003, 5.0)[0].any()  # a group without any plan teaches nothing


def test_gradient_at_ratio_one_is_reinforce():
    log_prob = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(6, dtype=torch.float64)
    loss, ratio = grpo.objective(log_prob, log_prob.detach(), advantage, 1e-3)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert (ratio == 1).all()
    torch.testing.assert_close(gradient, -advantage[:, None].expand(6, 3) / log_prob.numel())


def test_clipping_stops_only_what_goes_too_far():
    old = torch.zeros(4, 1)
    log_prob = torch.tensor([[0.1], [0.1], [-0.1], [-0.1]], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, _ = grpo.objective(log_prob, old, advantage, 0.01)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert (gradient != 0).flatten().tolist() == [False, True, True, False]


def naive_loss(model, layout, rollout, advantage, config):
    """One member and one step at a time, each in a sequence of its own."""
    n, size, terms = rollout.grid[0] * rollout.grid[1], config.group_size, []
    for group, prompt in enumerate(rollout.prompts):
        for i, plan in enumerate(rollout.plans[group]):
            span = slice((group * size + i) * n, (group * size + i + 1) * n)
            for k in range(len(rollout.x)):
                sequence = Sequence(layout)
                with sequence.document():
                    prompt.write(sequence)
                    sequence.text(plan)
                    sequence.noise(rollout.x[k, span], rollout.grid, rollout.times[k])
                packed = sequence.pack()
                v = model.velocity(packed, model(packed)[1])
                t, t_next = rollout.times[k], rollout.times[k + 1]
                mean, std = flow.transition(rollout.x[k, span].to(v), v, t.to(v), t_next.to(v), config.noise_level)
                density = torch.distributions.Normal(mean, std).log_prob(rollout.x_next[k, span].to(v)).mean()
                terms.append(-advantage[group, i] * (density - density.detach()).exp())
    return torch.stack(terms).mean()


def test_the_tree_equals_the_naive_loop(toy):
    """Loss and all gradients in float64: prompts shared, plans shared, steps packed, against one forward each."""
    _, layout, tokenizer, samples = toy
    rollout = roll(toy)
    model = UnifiedModel(toy[0].config).double()
    model.load_state_dict(toy[0].state_dict())
    rollout.x, rollout.x_next, rollout.times = rollout.x.double(), rollout.x_next.double(), rollout.times.double()
    advantage = torch.randn(2, CONFIG.group_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    naive = torch.autograd.grad(naive_loss(model, layout, rollout, advantage, CONFIG), list(model.parameters()), allow_unused=True)
    packed, steps, tokens = grpo.pack_groups(layout, rollout, [0, 1])
    v = model.velocity(packed, model(packed)[1])
    t, t_next = rollout.times[steps][:, None], rollout.times[steps + 1][:, None]
    mean, std = flow.transition(rollout.x[steps, tokens], v, t, t_next, CONFIG.noise_level)
    log_prob = flow.log_prob(rollout.x_next[steps, tokens], mean, std, packed.image_of_token(), len(packed.noised_lengths))
    log_prob = log_prob.view(-1, len(rollout.x))
    loss, _ = grpo.objective(log_prob, log_prob.detach(), advantage.flatten(), 1e-3)
    tree = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), naive, tree):
        if a is None or b is None:
            assert (a is None or not a.any()) and (b is None or not b.any()), name
        else:
            scale = a.abs().max().clamp_min(1e-12)
            assert (a - b).abs().max() <= 1e-10 * scale + 1e-14, (name, (a - b).abs().max() / scale)


def test_velocity_kl_is_zero_at_the_reference_and_pulls_back_after(toy):
    import copy

    rollout = roll(toy)
    reference = copy.deepcopy(toy[0])
    config = dataclasses.replace(CONFIG, kl_beta=1.0, updates=1)
    zero = torch.zeros(2, CONFIG.group_size)
    health, before, after = run_update(toy, rollout, zero, config, reference=reference)
    assert health["kl"] == 0 and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)
    health, before, after = run_update(toy, rollout, zero, config, reference=reference)
    assert health["kl"] > 0 and any(not torch.equal(before[name], after[name]) for name in before)


def test_gen_only_training_leaves_the_understanding_expert_alone(toy):
    rollout = roll(toy)
    config = dataclasses.replace(CONFIG, train="gen")
    _, before, after = run_update(toy, rollout, torch.randn(2, CONFIG.group_size), config)
    grpo.trained_parameters(toy[0], "all")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".gen." in n or n.startswith(("norm_gen", "latent", "time")) for n in moved)


@pytest.mark.parametrize("change, words", [
    (dict(group_size=1), "at least 2"), (dict(prompts_per_step=3), "multiple of updates"),
    (dict(window=6), "does not fit"), (dict(train="some"), "expected all or gen"), (dict(reward="clip"), "clip_l2 or clip_cos"),
])  # fmt: skip
def test_impossible_combinations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)
