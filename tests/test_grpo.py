"""Stage 2: what must hold of the loop before any learning curve means something. The mathematics of a step is tested in test_flow.py."""

import dataclasses

import numpy as np
import pytest
import torch

import flow
import grpo
import iccot
from engine import Prompt
from model import SMOKE, ModelConfig, UnifiedModel
from runtime import lora
from sequence import Sequence
from toy.tasks import draw_sample
from toy.tokenizer import train_tokenizer

CONFIG = grpo.Config(config="smoke", **grpo.PRESETS["smoke"])


class FixedClip:
    """Known embeddings: all captions are the first axis, so that the cosine of a picture is the score given for it."""

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
    samples = [draw_sample("train", i) for i in range(2)]
    return model, model.config.layout(tokenizer), tokenizer, samples


def roll(toy, config=CONFIG, step=0, true_plans=False, monkeypatch=None):
    model, layout, tokenizer, samples = toy
    if true_plans:

        def think(model, layout, prompts, size, *rest, **more):
            plans = [
                tokenizer.encode(iccot.render(one.plan)) for one in samples for _ in range(size)
            ]
            return plans, [True] * len(plans)

        monkeypatch.setattr(grpo, "think", think)
    return grpo.sample_groups(
        model, layout, tokenizer, samples, range(2 * step, 2 * step + 2), config, step
    )


@pytest.mark.parametrize("same", [False, True])
def test_members_start_from_one_noise_if_asked_to(toy, monkeypatch, same):
    """With one plan a group all members are at the same place before the window, and at different ones after it."""
    rollout = roll(
        toy, dataclasses.replace(CONFIG, same_start=same), true_plans=True, monkeypatch=monkeypatch
    )
    of_member = lambda x: x.view(2, CONFIG.group_size, -1)  # (P, G, T * C)
    before, after = of_member(rollout.x[0]), of_member(rollout.x_next[0])
    assert torch.allclose(before, before[:, :1].expand_as(before), atol=1e-5) == same
    assert not torch.allclose(after[:, 0], after[:, 1], atol=1e-2)


def run_update(toy, rollout, reward, config=CONFIG, lr=100.0, anchor=None):
    """One update phase on a copy of the weights: health, weights before, weights after."""
    model, layout, _, _ = toy
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(lora.trained_parameters(model, config.train).values(), lr)
    health, finite = grpo.update(model, anchor, optimizer, layout, rollout, reward, config)
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
    "no rid": dict(rid=False),
    "cps": dict(sde="cps", noise_level=0.8),
    "small packs": dict(tokens_per_pack=400),
    "guided": dict(text_guidance=3.0, image_guidance=1.5),
    "two pictures a plan": dict(images_per_cot=2),
    "text": dict(train_text=True),
    "text, small packs": dict(train_text=True, images_per_cot=2, tokens_per_pack=150),
    "guard": dict(guard=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_ratio_is_exactly_one_before_the_first_update(toy, name):
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    rollout = roll(toy, config)
    health, before, after = run_update(toy, rollout, some_reward(), config)
    assert (
        health["ratio_first_min"] == health["ratio_first_mean"] == health["ratio_first_max"] == 1.0
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert health["ratio_last"] != 1.0  # the second share of groups meets weights that have moved
    # or not, while nothing has moved
    health, *_ = run_update(toy, rollout, some_reward(), config, lr=0.0)
    assert health["ratio_last"] == 1.0
    assert health["mismatch"] < 1e-3


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
    starts = {
        float(roll(toy, dataclasses.replace(CONFIG, window=1), step).times[0]) for step in range(8)
    }
    assert len(starts) > 1


@pytest.mark.parametrize("name", ["plain", "guided", "text"])
def test_equal_rewards_give_exactly_no_gradient(toy, name):
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    _, before, after = run_update(
        toy, roll(toy, config), torch.full((2, config.group_size), 0.3), config
    )
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
    assert not grpo.group_advantage(
        torch.tensor([[0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2]]), 1e-30, 5.0
    ).any()


def test_global_std_and_pictures_of_one_plan():
    reward = some_reward().double()
    images, plans = grpo.advantages(reward, dataclasses.replace(CONFIG, std="global"))
    torch.testing.assert_close(
        images, (reward - reward.mean(1, keepdim=True)) / reward.std(correction=0)
    )
    images, plans = grpo.advantages(reward, dataclasses.replace(CONFIG, images_per_cot=2))
    pairs = reward.view(2, 2, 2)
    torch.testing.assert_close(
        images.view(2, 2, 2), grpo.group_advantage(pairs.flatten(0, 1), 0.003, 5.0).view(2, 2, 2)
    )
    torch.testing.assert_close(plans, grpo.group_advantage(pairs.mean(2), 0.003, 5.0))


def test_unparsable_plans_get_the_lowest_reward_of_their_group(toy, monkeypatch):
    rollout = roll(toy, true_plans=True, monkeypatch=monkeypatch)
    assert rollout.valid.all() and rollout.captions[0] == toy[3][0].plan.caption
    config = dataclasses.replace(CONFIG, reward="clip_cos")
    clip = FixedClip([0.5, 0.1, 0.2, 0.9, 0.1, 0.3, 0.4, 0.8])
    rollout.valid[1], rollout.captions[1] = False, ""
    reward = grpo.rewards(clip, rollout, config)
    torch.testing.assert_close(reward, torch.tensor([[0.5, 0.2, 0.2, 0.9], [0.1, 0.3, 0.4, 0.8]]))
    for i in range(4):
        rollout.valid[i], rollout.captions[i] = False, ""
    reward = grpo.rewards(clip, rollout, config)
    # a group without any plan teaches nothing
    assert not grpo.group_advantage(reward, 0.003, 5.0)[0].any()
    rollout.valid[:], rollout.captions = False, [""] * 8
    assert not grpo.rewards(clip, rollout, config).any()


def test_cross_scores_are_means_over_the_captions_of_the_group(toy, monkeypatch):
    class Angles:
        embed_images = staticmethod(lambda images: unit(torch.linspace(0, 1, len(images))))
        embed_captions = staticmethod(lambda captions: unit(torch.linspace(2, 3, len(captions))))

    unit = lambda angle: torch.stack([angle.cos(), angle.sin()], 1)
    rollout = roll(toy, true_plans=True, monkeypatch=monkeypatch)
    got = grpo.rewards(
        Angles, rollout, dataclasses.replace(CONFIG, reward="clip_cos", cross_score=True)
    )
    e, u = (
        Angles.embed_images(rollout.images).view(2, 4, 2),
        Angles.embed_captions(rollout.captions).view(2, 4, 2),
    )
    torch.testing.assert_close(got, torch.einsum("pgd,pcd->pgc", e, u).mean(2))
    own = grpo.rewards(Angles, rollout, dataclasses.replace(CONFIG, reward="clip_cos"))
    torch.testing.assert_close(own, (e * u).sum(-1))


def test_gradient_at_ratio_one_is_reinforce():
    log_prob = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(6, 1, dtype=torch.float64)
    loss = grpo.clipped((log_prob - log_prob.detach()).exp(), advantage, 1e-3).mean()
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, -advantage.expand(6, 3) / log_prob.numel())


def test_clipping_stops_only_what_goes_too_far():
    log_prob = torch.tensor([0.1, 0.1, -0.1, -0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (gradient,) = torch.autograd.grad(grpo.clipped(log_prob.exp(), advantage, 0.01).sum(), log_prob)
    assert (gradient != 0).tolist() == [False, True, True, False]


def test_guard_centres_the_ratio_and_levels_the_steps(toy):
    """A known change of the mean: the plain log-ratio is -|dm|^2 / (2 std^2) off on average, the guarded one is not."""
    g, n, scale = torch.Generator().manual_seed(0), 20_000, 0.05
    mean, std = (
        torch.zeros(n, 4),
        torch.cat([torch.full((n // 2, 1), 0.1), torch.full((n // 2, 1), 0.5)]),
    )
    image_of_token = torch.arange(2).repeat_interleave(n // 2)
    x_next = mean + std * torch.randn(n, 4, generator=g)
    moved = mean + scale * std
    log_prob = lambda centre: flow.log_prob(x_next, centre, std, image_of_token, 2).view(1, 2)
    new, old = (grpo.Policy(log_prob(centre), None, centre, std, None) for centre in (moved, mean))
    batch = grpo.Batch(None, None, None, None, None, None, None, None, image_of_token)
    plain = grpo.likelihood_ratio(new, old, batch, CONFIG).log()
    guarded = grpo.likelihood_ratio(new, old, batch, dataclasses.replace(CONFIG, guard=True)).log()
    expected = (plain + scale**2 / 2) * torch.tensor([[0.1, 0.5]])
    torch.testing.assert_close(guarded, expected, rtol=1e-3, atol=1e-6)
    assert (plain < 0).all() or (guarded.abs() < plain.abs()).all()


def naive_loss(model, layout, rollout, reward, config):
    """One member and one step at a time, each in a sequence of its own; texts one plan at a time."""
    advantage, plan_advantage = grpo.advantages(reward, config)
    n, size, terms = rollout.grid[0] * rollout.grid[1], config.group_size, []
    pictures = size // config.plans_per_group
    for group, prompt in enumerate(rollout.prompts):
        for i in range(size):
            plan = rollout.plans[group][i // pictures]
            span = slice((group * size + i) * n, (group * size + i + 1) * n)
            for k in range(len(rollout.x)):
                x, t, t_next = rollout.x[k, span], rollout.times[k], rollout.times[k + 1]
                v = velocity_alone(model, layout, prompt, plan, x, rollout.grid, t)
                if config.text_guidance > 1:
                    pictures_only = Prompt(prompt.items[:-1])
                    texts_only = Prompt(prompt.items[-1:])
                    others = [
                        velocity_alone(model, layout, one, None, x, rollout.grid, t)
                        for one in (pictures_only, texts_only)
                    ]
                    if flow.guidance_active(t, config.sampler.guidance_interval):
                        v = flow.guide(v, *others, config.text_guidance, config.image_guidance)
                mean, std = flow.transition(
                    x.to(v), v, t.to(v), t_next.to(v), config.noise_level, config.sde
                )
                density = (
                    torch.distributions.Normal(mean, std)
                    .log_prob(rollout.x_next[k, span].to(v))
                    .mean()
                )
                terms.append(-advantage[group, i] * (density - density.detach()).exp())
    loss = torch.stack(terms).mean()
    if config.train_text:
        words = []
        for group, prompt in enumerate(rollout.prompts):
            for j, plan in enumerate(rollout.plans[group]):
                sequence = Sequence(layout)
                with sequence.document():
                    prompt.write(sequence)
                    sequence.text(plan, loss=True)
                packed = sequence.pack()
                log_prob = -model.cross_entropy(model(packed)[0], packed)
                log_prob = log_prob[
                    : len(plan) + int(rollout.ended[group * config.plans_per_group + j])
                ]
                words.append(-plan_advantage[group, j] * (log_prob - log_prob.detach()).exp())
        loss = loss + torch.cat(words).mean()
    return loss


def velocity_alone(model, layout, prompt, plan, x, grid, t):
    sequence = Sequence(layout)
    with sequence.document():
        prompt.write(sequence)
        if plan is not None:
            sequence.text(plan)
        sequence.noise(x, grid, t)
    packed = sequence.pack()
    return model.velocity(packed, model(packed)[1])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "name",
    ["plain", "no rid", "small packs", "guided", "two pictures a plan", "text, small packs", "cps"],
)
def test_the_tree_equals_the_naive_loop(toy, name, dtype, tolerance):
    """Gradients of an update: prompt shared and cut, plans shared, steps packed, against one forward for each."""
    _, layout, _, _ = toy
    config = dataclasses.replace(CONFIG, **VARIANTS[name], updates=1, max_grad_norm=1e9)
    rollout = roll(toy, config)
    model = UnifiedModel(toy[0].config).to(dtype)
    model.load_state_dict(toy[0].state_dict())
    rollout.x, rollout.x_next, rollout.times = (
        x.to(dtype) for x in (rollout.x, rollout.x_next, rollout.times)
    )
    rollout.ended[0] = False  # one plan was cut off: its eos is not the model's word
    reward = some_reward(config).to(dtype)
    parameters = dict(model.named_parameters())
    naive = torch.autograd.grad(
        naive_loss(model, layout, rollout, reward, config), parameters.values(), allow_unused=True
    )
    found = {}

    class Recorder(torch.optim.SGD):
        def step(self):
            found.update(
                {key: None if p.grad is None else p.grad.clone() for key, p in parameters.items()}
            )

    grpo.update(model, None, Recorder(model.parameters(), 0.0), layout, rollout, reward, config)
    largest = max(gradient.norm() for gradient in naive if gradient is not None)
    for key, gradient in zip(parameters, naive):
        got, gradient = (torch.zeros(1) if one is None else one for one in (found[key], gradient))
        error = (got - gradient).norm() / gradient.norm().clamp_min(1e-3 * largest)
        assert error <= tolerance, (key, float(error))


@pytest.mark.parametrize("kind", ["velocity", "latent"])
def test_kl_is_zero_at_the_anchor_and_pulls_back_after(toy, kind):
    rollout = roll(toy)
    anchor = {name: p.detach().clone() for name, p in toy[0].named_parameters()}
    config = dataclasses.replace(CONFIG, kl=kind, kl_beta=1.0, updates=1)
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
        (dict(images_per_cot=2, rid=False), "rid on"),
        (dict(train_text=True, cot_temperature=0.7), "cot_temperature=1"),
        (dict(train_text=True, train="gen"), "train=all"),
    ],
)
def test_impossible_combinations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)


def test_a_detached_context_is_not_the_gradient(toy):
    """What published systems leave out: without the way through the prompt, the gradient is another one."""
    model, layout, _, _ = toy
    rollout, config = roll(toy), dataclasses.replace(CONFIG, updates=1)
    shared, (batch, *_) = grpo.batches(layout, rollout, 0, config)

    def gradient(detach):
        model.zero_grad()
        context = model.keys_and_values(shared)
        context = [tuple(x.detach() for x in pair) for pair in context] if detach else context
        policy = grpo.policy(model, context, batch, config)
        (
            policy.log_prob
            * torch.linspace(-1, 1, policy.log_prob.numel()).view_as(policy.log_prob)
        ).sum().backward()
        found = torch.cat(
            [p.grad.flatten() for name, p in model.named_parameters() if ".gen." in name]
        )
        model.zero_grad()
        return found

    exact, detached = gradient(False), gradient(True)
    assert (exact - detached).norm() > 1e-3 * exact.norm()


def test_a_synthetic_reward_rises(toy, monkeypatch):
    """The whole machine on a reward that needs no CLIP: pictures shall get redder."""
    from model import UnifiedModel

    _, layout, tokenizer, samples = toy
    model = UnifiedModel(toy[0].config).initialise(0)
    config = dataclasses.replace(CONFIG, group_size=8, window=3, updates=1)

    def redness(clip, rollout, config):
        pixels = [torch.from_numpy(np.asarray(image).astype("float32")) for image in rollout.images]
        return torch.tensor(
            [float(p[..., 0].mean() - p[..., 1:].mean()) / 255 for p in pixels]
        ).view(-1, config.group_size)

    plans = [tokenizer.encode(iccot.render(one.plan)) for one in samples for _ in range(8)]
    monkeypatch.setattr(grpo, "think", lambda *_, **__: (plans, [True] * len(plans)))
    optimizer = torch.optim.AdamW(lora.trained_parameters(model, "all").values(), 2e-3)
    means = []
    for step in range(8):
        rollout = grpo.sample_groups(
            model, layout, tokenizer, samples, [2 * step, 2 * step + 1], config, step
        )
        reward = redness(None, rollout, config)
        means.append(reward.mean().item())
        grpo.update(model, None, optimizer, layout, rollout, reward, config)
    assert sum(means[-3:]) / 3 > sum(means[:2]) / 2 + 0.05, means
