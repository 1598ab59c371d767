"""Rectified flow against closed forms, torch.distributions, and BAGEL's own numbers.

`tests/fixtures/bagel_grids.safetensors` holds outputs of the official code: time grids, velocities
guided in eleven ways, and one Euler trajectory. Run: python -m pytest tests/test_flow.py
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import flow
from flow import Guidance

FIXTURE = Path(__file__).parent / "fixtures" / "bagel_grids.safetensors"
SIZES = (3, 5, 1)  # tokens of three packed images
IMAGE_OF_TOKEN = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
EACH = dict(image_of_token=IMAGE_OF_TOKEN, images=3)


@pytest.fixture(scope="module")
def official():
    with safe_open(FIXTURE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["cfg_combos"])


def packed(count=4, seed=0, dtype=torch.float64, channels=4):
    """`count` independent packed tensors (9, channels)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(SIZES), channels, generator=generator, dtype=dtype) for _ in range(count)
    ]


# --------------------------------------------------------------------------------------------------
# the convention


def test_time_runs_from_data_to_noise():
    data, noise = torch.zeros(4, 8), torch.ones(4, 8)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(4)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(4, 1)), noise)
    assert torch.equal(flow.interpolate(data, noise, 0.25), torch.full((4, 8), 0.25))
    assert torch.equal(flow.velocity(data, noise), noise - data)


def test_one_euler_step_with_the_exact_velocity_lands_on_the_path():
    data, noise = packed(2)
    v = flow.velocity(data, noise)
    for t, t_next in ((1.0, 0.0), (0.9, 0.3), (0.3, 0.0)):
        landed = flow.euler_step(flow.interpolate(data, noise, t), v, t, t_next=t_next)
        torch.testing.assert_close(
            landed, flow.interpolate(data, noise, t_next), rtol=0, atol=1e-14
        )


def test_estimates_recover_both_ends():
    data, noise = packed(2)
    t = torch.linspace(0.1, 1, len(data), dtype=torch.float64)
    result = flow.estimates(flow.interpolate(data, noise, t), flow.velocity(data, noise), t)
    torch.testing.assert_close(result, (data, noise), rtol=0, atol=1e-14)


def test_time_per_token_agrees_with_scalar_time_bit_for_bit():
    """Rollouts pass one number, updates one value a token; yet the first ratio must be just 1."""
    x, v, x_next = packed(3, dtype=torch.float32)
    grid = flow.time_grid(7, 3.0)
    for t, t_next in zip(grid[:-2], grid[1:-1]):
        # (N,) and (N, 1) are both understood
        each, each_next = t.expand(len(x)), t_next.expand(len(x), 1)
        for time, time_next in ((float(t), float(t_next)), (t, t_next)):
            mean, std = flow.transition(x, v, time, t_next=time_next, noise_level=0.7)
            mean_each, std_each = flow.transition(x, v, each, t_next=each_next, noise_level=0.7)
            assert std.shape == () and std_each.shape == (len(x), 1)
            assert torch.equal(mean, mean_each)
            assert torch.equal(std.expand_as(std_each), std_each)
            result = flow.log_prob(x_next, mean, std, **EACH)
            assert torch.equal(result, flow.log_prob(x_next, mean_each, std_each, **EACH))


# --------------------------------------------------------------------------------------------------
# time


def test_time_grid_is_bagels(official):
    tensors, _ = official
    grids = {key: value for key, value in tensors.items() if key.startswith("grid.")}
    assert len(grids) == 6
    for key, expected in grids.items():
        _, shift, count = key.replace("grid.shift", "grid|").replace(".n", "|").split("|")
        grid = flow.time_grid(int(count), float(shift))
        assert grid.dtype == torch.float32 and torch.equal(grid, expected), key


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.591, 2.035, 2.294, 3.0])
def test_time_grid_falls_from_exactly_one_to_exactly_zero(shift):
    grid = flow.time_grid(50, shift)
    assert grid[0] == 1 and grid[-1] == 0 and bool((grid[1:] < grid[:-1]).all())


def test_time_grid_refuses_nonsense():
    with pytest.raises(ValueError, match="num_timesteps=1: .*at least 2"):
        flow.time_grid(1, 3.0)
    with pytest.raises(ValueError, match="timestep_shift=0: .*above 0"):
        flow.time_grid(10, 0)


@pytest.mark.parametrize("shift, mean", [(1.0, 0.500), (3.0, 0.714), (4.0, 0.761)])
def test_training_times_are_logit_normal_and_shifted(shift, mean):
    times = flow.sample_timesteps(400_000, shift, torch.Generator().manual_seed(1))
    assert times.shape == (400_000,) and times.dtype == torch.float32
    assert abs(times.mean().item() - mean) < 2e-3
    probability = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95])
    quantiles = flow.shift_time(
        torch.sigmoid(torch.distributions.Normal(0, 1).icdf(probability)), shift
    )
    below = (times[:, None] <= quantiles).float().mean(0)
    torch.testing.assert_close(below, probability, rtol=0, atol=5e-3)


# --------------------------------------------------------------------------------------------------
# the SDE step


def test_euler_steps_are_bagels_bit_for_bit(official):
    tensors, _ = official
    grid = flow.time_grid(6, 3.0)
    x = tensors["sampling.x"][0]
    for i in range(5):
        assert torch.equal(grid[i], tensors["sampling.t"][i])
        x = flow.euler_step(x, tensors["sampling.v"][i], grid[i], t_next=grid[i + 1])
        assert torch.equal(x, tensors["sampling.x"][i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_noise_is_the_ode_bit_for_bit(dtype):
    x, v = packed(2, dtype=dtype)
    grid = flow.time_grid(9, 3.0)
    for t, t_next in zip(grid[:-1], grid[1:]):
        noise = torch.randn_like(x)
        x_next, mean, std = flow.sde_step(x, v, t, t_next=t_next, noise_level=0.0, noise=noise)
        euler = flow.euler_step(x, v, t, t_next=t_next)
        assert torch.equal(x_next, euler) and torch.equal(mean, euler) and std == 0


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.3])
def test_flow_step_equals_flow_grpo_and_the_other_time_convention(noise_level):
    x, v = packed(2)
    grid = flow.time_grid(11, 3.0).double()
    for t, t_next in zip(grid[1:-1], grid[2:]):
        mean, std = flow.transition(x, v, t, t_next=t_next, noise_level=noise_level)
        # Flow-GRPO's sd3_sde_with_logprob.py, dt < 0
        s, dt = noise_level * (t / (1 - t)).sqrt(), t_next - t
        reference = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
        torch.testing.assert_close(mean, reference, rtol=0, atol=1e-13)
        torch.testing.assert_close(std, s * (-dt).sqrt(), rtol=0, atol=1e-14)
        u, w = 1 - t, -v  # convention B: u = 0 is noise, u = 1 is data, w = data - noise
        s_b = noise_level * ((1 - u) / u).sqrt()
        other = x + (w + s_b**2 / 2 * (u * w - x) / (1 - u)) * (t - t_next)
        torch.testing.assert_close(mean, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_first_step_has_std_equal_to_the_noise_level(steps):
    grid = flow.time_grid(steps + 1, 3.0)
    x, v = packed(2, dtype=torch.float32)
    mean, std = flow.transition(x, v, grid[0], t_next=grid[1], noise_level=0.7)
    assert abs(std.item() - 0.7) < 1e-6
    expected = x - (v + 0.7**2 / (2 * (1 - grid[1])) * x) * (1 - grid[1])
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
    # the rule acts token by token
    mixed = flow.sigma(torch.tensor([1.0, 0.5]), torch.tensor([0.9, 0.4]), 0.7)
    torch.testing.assert_close(mixed, torch.tensor([0.7 / math.sqrt(0.1), 0.7]))


def gaussian_velocity(x, t, mean=2.0, std=0.5):
    """E[noise - data | x_t] for data ~ N(mean, std^2)."""
    variance = (1 - t) ** 2 * std**2 + t**2
    off = x - (1 - t) * mean
    return t / variance * off - (mean + (1 - t) * std**2 / variance * off)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_flow_sde_keeps_the_marginals(noise_level):
    generator = torch.Generator().manual_seed(0)
    grid = flow.time_grid(501, 1.0)
    x = torch.randn(40_000, 1, generator=generator)
    x = (x - x.mean()) / x.std()
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:]), start=1):
        v, noise = gaussian_velocity(x, t), torch.randn(x.shape, generator=generator)
        x, _, _ = flow.sde_step(x, v, t, t_next=t_next, noise_level=noise_level, noise=noise)
        if i % 50 == 0:
            mean, std = 2.0 * (1 - t_next), math.sqrt((1 - t_next) ** 2 * 0.25 + t_next**2)
            assert abs(x.mean() - mean) < 0.02, (i, x.mean(), mean)
            assert abs(x.std() / std - 1) < 0.02, (i, x.std(), std)


# --------------------------------------------------------------------------------------------------
# log-probability


def image_means(values):
    """Plain loop: the mean over all numbers of each image."""
    return torch.stack([part.mean() for part in values.split(SIZES)])


def test_log_prob_is_the_normal_density():
    x, v, noise = packed(3)
    each = torch.linspace(0.3, 0.9, 9), torch.linspace(0.2, 0.85, 9)[:, None]
    for t, t_next in ((1.0, 0.9), (0.5, 0.4), each):
        x_next, mean, std = flow.sde_step(x, v, t, t_next=t_next, noise_level=0.7, noise=noise)
        expected = image_means(torch.distributions.Normal(mean, std).log_prob(x_next))
        result = flow.log_prob(x_next, mean, std, **EACH)
        assert result.dtype == torch.float64 and (result - expected).abs().max() < 1e-12


def test_the_weighted_flow_error_is_the_likelihood_of_a_picture():
    """For normal data its exact velocity gives the exact log-density, up to the same constant."""
    std, nodes = 0.7, 20_000
    u = (torch.arange(nodes, dtype=torch.float64)[:, None] + 0.5) / nodes  # (nodes, 1)
    t, slope = 1 - u.square(), 2 * u  # more nodes at the noisy end; dt = slope du

    def bound(x0):
        total = torch.zeros((), dtype=torch.float64)
        for noise in (-1.0, 1.0):  # two points that have the mean and the square of a normal
            data, noise = torch.full_like(t, x0), torch.full_like(t, noise)
            x = flow.interpolate(data, noise, t)
            v = (t - (1 - t) * std**2) / ((1 - t).square() * std**2 + t.square()) * x  # E[e - x0|x]
            of = dict(image_of_token=torch.arange(nodes), images=nodes)
            score = flow.forward_log_prob(v, flow.velocity(data, noise), **of)  # (nodes,)
            total += ((1 - t) / t * slope).squeeze(1) @ score / nodes / 2
        return total

    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), std)
    one, other = torch.tensor([0.2, 1.5], dtype=torch.float64)
    expected = normal.log_prob(one) - normal.log_prob(other)
    result = bound(0.2) - bound(1.5)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=0)


def test_velocity_mse():
    v, target = packed(2)
    torch.testing.assert_close(flow.velocity_mse(v, target), ((v - target) ** 2).mean())
    result = flow.velocity_mse(v, target, **EACH)
    torch.testing.assert_close(result, image_means((v - target) ** 2))


def test_steps_without_noise_have_no_density():
    x, v = packed(2)
    mean, std = flow.transition(x, v, 0.5, t_next=0.4, noise_level=0.0)
    with pytest.raises(ValueError, match="needs steps with noise"):
        flow.log_prob(mean, mean, std, **EACH)


def test_bfloat16_inputs_are_computed_in_float32():
    x, v, noise, target = packed(4, dtype=torch.bfloat16)
    wide = [tensor.float() for tensor in (x, v, noise, target)]
    t = torch.tensor(0.6, dtype=torch.bfloat16)  # even the time may come in bfloat16
    result = flow.sde_step(x, v, t, t_next=0.5, noise_level=0.7, noise=noise)
    reference = flow.sde_step(*wide[:2], t.float(), t_next=0.5, noise_level=0.7, noise=wide[2])
    for a, b in zip(result, reference):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    x_next, mean, std = result
    results = (
        flow.log_prob(x_next.bfloat16(), mean, std, **EACH),
        flow.velocity_mse(v, target),
        flow.interpolate(x, noise, t),
        flow.velocity(x, noise),
        flow.guide(v, x, None, guidance=Guidance(4.0)),
        flow.guide(v, None, None, guidance=Guidance()),
    )
    assert all(result.dtype == torch.float32 for result in results)


# --------------------------------------------------------------------------------------------------
# guidance


def slow_guide(v, v_text, v_image, guidance):
    """BAGEL's rule, number by number, for one image or a batch coupled as in the official code."""
    text_scale, image_scale, renorm = guidance.text_scale, guidance.image_scale, guidance.renorm
    if text_scale <= 1:
        return v
    full, text, image = v.tolist(), v_text.tolist(), v_image.tolist()

    def length(rows):
        return math.sqrt(sum(number**2 for row in rows for number in row))

    def shrunk(guided):  # to the length of the unguided velocity, of a token or of all
        scaled = []
        for row, unguided in zip(guided, full):
            of, to = (guided, full) if renorm == "global" else ([row], [unguided])
            factor = min(max(length(to) / (length(of) + 1e-8), guidance.renorm_min), 1.0)
            scaled.append([g * factor for g in row])
        return scaled

    guided = [[b + text_scale * (a - b) for a, b in zip(*rows)] for rows in zip(full, text)]
    if renorm == "text_channel":
        guided = shrunk(guided)
    if image_scale > 1:
        guided = [[c + image_scale * (g - c) for g, c in zip(*rows)] for rows in zip(guided, image)]
    if renorm != "text_channel":
        guided = shrunk(guided)
    return torch.tensor(guided, dtype=v.dtype)


@pytest.mark.parametrize("renorm", flow.RENORMS)
@pytest.mark.parametrize("renorm_min", [0.0, 0.6])
@pytest.mark.parametrize("scales", [(4.0, 1.0), (4.0, 2.0), (3.0, 0.5), (1.0, 2.0)])
def test_guidance_equals_the_slow_rule(renorm, renorm_min, scales):
    v, v_text, v_image = packed(3)
    guidance = Guidance(*scales, renorm, renorm_min)
    expected = slow_guide(v, v_text, v_image, guidance)
    result = flow.guide(v, v_text, v_image, guidance=guidance)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_guidance_equals_the_official_code(official):
    tensors, settings = official
    assert len(settings) == 11
    v, v_text, v_image = (tensors["guide." + name] for name in ("v0", "v_cfg_text", "v_cfg_img"))
    for i, setting in enumerate(settings):
        guidance = Guidance(*(setting[key] for key in ("text", "img", "type", "rmin")))
        result = flow.guide(v, v_text, v_image, guidance=guidance)
        expected = tensors[f"guide.v{i}"]
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5, msg=str(setting))


def test_image_scale_alone_does_nothing():
    v, v_text, v_image = packed(3)
    for text_scale in (0.5, 1.0):
        guidance = Guidance(text_scale, 2.0)
        assert torch.equal(flow.guide(v, v_text, v_image, guidance=guidance), v)
        assert torch.equal(flow.guide(v, None, None, guidance=guidance), v)


def test_global_renorm_per_image_equals_separate_calls():
    v, v_text, v_image = packed(3)
    guidance = Guidance(4.0, 2.0)
    together = flow.guide(v, v_text, v_image, guidance=guidance, **EACH)
    split = zip(v.split(SIZES), v_text.split(SIZES), v_image.split(SIZES))
    parts = [flow.guide(*rows, guidance=guidance) for rows in split]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-13, atol=1e-13)
    # the official behaviour mixes the images of a batch
    coupled = flow.guide(v, v_text, v_image, guidance=guidance)
    assert (together - coupled).abs().max() > 0.01


@pytest.mark.parametrize("image_of_token", [None, IMAGE_OF_TOKEN])
@pytest.mark.parametrize("renorm", flow.RENORMS)
def test_guidance_has_a_gradient_even_where_the_velocity_is_zero(renorm, image_of_token):
    v = torch.zeros(9, 4, requires_grad=True)
    v_text = torch.ones(9, 4)
    each = dict(image_of_token=image_of_token, images=3)
    guided = flow.guide(v, v_text, None, guidance=Guidance(4.0, 1.0, renorm), **each)
    (gradient,) = torch.autograd.grad(guided.sum(), v)
    assert bool(guided.isfinite().all() & gradient.isfinite().all())


def test_guidance_needs_no_more_than_its_scales_and_knows_its_words():
    v, v_text, v_image = packed(3)
    guidance = Guidance(4.0)
    without, with_it = (flow.guide(v, v_text, x, guidance=guidance) for x in (None, v_image))
    torch.testing.assert_close(without, with_it)
    with pytest.raises(ValueError, match="'local' is unknown; use one of global, channel"):
        Guidance(4.0, 2.0, renorm="local")


def test_guidance_interval():
    grid = flow.time_grid(50, 3.0)
    # counted in the official code
    assert int(flow.guidance_active(grid[:-1], (0.4, 1.0)).sum()) == 41
    edges = [bool(flow.guidance_active(t, (0.4, 0.9))) for t in (0.4, 0.400001, 0.9, 0.900001)]
    assert edges == [False, True, True, False]
    # float32 of 0.4 is a little above 0.4
    assert not flow.guidance_active(flow.time_grid(6, 1.0)[3], (0.4, 1.0))


@pytest.mark.parametrize("known", [1, 2, 3])
def test_extrapolation_is_the_polynomial(known):
    """numpy.polyfit's, through as many points as it has numbers; exact for such velocities."""
    times = [0.9, 0.7, 0.55][:known]
    result = torch.randn(known, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = flow.extrapolate(times, list(result), torch.tensor(0.4))
    fitted = np.polyfit(times, result.numpy(), known - 1)  # (known, 5)
    expected = sum(fitted[i] * 0.4 ** (known - 1 - i) for i in range(known))
    np.testing.assert_allclose(got, expected)
