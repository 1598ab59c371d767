"""
Rectified flow: noise becomes latents along straight lines, and every step has a probability.

Time runs as in BAGEL, everywhere in this repository: t = 0 is the clean latent x0, t = 1 is
Gaussian noise, sampling goes from t to t' < t; dt = t - t'.

    path         x_t = (1 - t) x0 + t noise
    velocity     v   = noise - x0                                what the network predicts
    estimates    x0_hat = x - t v,   noise_hat = x + (1 - t) v   of both ends, by x and v
    ODE step     x'  = x - v dt                                  (Euler)
    cache        v(t) = polynomial through v at the last passes of the model   (`extrapolate`)
    SDE step     x'  ~ Normal(mean, std^2): take back some of the old noise, put in as much new
                 mean = x - v dt - s^2 dt / (2 t) noise_hat      std = s sqrt(dt)
                 s = a sqrt(t / (1 - t))                                       (Flow-GRPO)
    With a = 0 it is the Euler step, bit for bit. It keeps the marginals of the ODE as the steps get
    smaller.
    log-prob     mean over all numbers of an image of log Normal(x'; mean, std)
                 (a sum would overflow the ratio)

A finished picture x0 has a likelihood without any steps of a sampler: the forward process noises
it again. With SNR = ((1 - t) / t)^2, the bound of a diffusion model is, up to a constant,

    log p(x0) >= 1/2 int d(log SNR)/dt E |noise - noise_hat|^2 dt
               = - int w(t) E |v - (noise - x0)|^2 dt            w(t) = (1 - t) / t
    since d(log SNR)/dt = -2 / (t (1 - t)) and noise - noise_hat = (1 - t) (noise - x0 - v)

`forward_log_prob` estimates it at drawn (t, noise), with w = 1 as stage 1 has: the times are drawn
where a picture is decided, whereas the bound's own weight counts its last, invisible digits most.
Any weight that is above zero has its best model where the bound has it. The difference of two
models is what counts; at the same (t, noise) most of the estimate's chance cancels in it.

Latents are packed, without padding: N tokens of I images, C values each; image_of_token (N,) says
whose each is. A time (t, t_next) is a number, a 0-dim tensor, or one value a token, (N,) or (N, 1).
All arithmetic is in float32 whatever comes in (bfloat16 is too coarse for log-probs), or in float64
if the latents are float64. Letters: sequence.py.
Left out: higher-order solvers, distillation, other noise schedules (Flow-CPS, DanceGRPO).
Run: python -m pytest tests/test_flow.py
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE_LEVEL = 0.7  # a of the equations (Flow-GRPO)
RENORMS = ("global", "channel", "text_channel")

Time = float | Tensor


@dataclass(frozen=True)
class Guidance:
    """How far `guide` moves a velocity away from those of the poorer contexts. A scale of 1 is off.

    renorm       how the guided velocity is shrunk to the length of the unguided one:
      "global"       one length for the whole tensor, or one an image where `guide` knows the images
                     (the official code always does the former, so a batch of images couples)
      "channel"      one a token
      "text_channel" one a token, and before the image term
    renorm_min   the least factor that it may be shrunk by; 1: not at all
    """

    text_scale: float = 1.0
    image_scale: float = 1.0  # as in the official code, does nothing where text_scale is off
    renorm: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self):
        if self.renorm not in RENORMS:
            raise ValueError(
                f"guidance renormalisation {self.renorm!r} is unknown; "
                f"use one of {', '.join(RENORMS)}"
            )


def _float(*tensors):
    """The same tensors in float32, or all in float64 if one of them already is."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    return [x.to(dtype) for x in tensors]


def _time(t, like):
    """A time as a tensor that broadcasts over (N, C): () or (N, 1), of the dtype of `like`.

    A number becomes a tensor *before* any arithmetic, so that a rollout (one t for all) and an
    update (one t a token) round in the same way and the likelihood ratio before the first update is
    exactly 1.
    """
    t = torch.as_tensor(t, dtype=like.dtype, device=like.device)
    return t[:, None] if t.dim() == 1 else t  # (N,) -> (N, 1)


# --------------------------------------------------------------------------------------------------
# training: path and target


def interpolate(data: Tensor, noise: Tensor, t: Time) -> Tensor:
    """The point x_t on the straight line from data (t = 0) to noise (t = 1). All (N, C)."""
    data, noise = _float(data, noise)
    t = _time(t, data)
    return (1 - t) * data + t * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The regression target dx_t/dt = noise - data, the same at every t. All (N, C)."""
    data, noise = _float(data, noise)
    return noise - data


def estimates(x: Tensor, v: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """What x_t and v say about both ends of the line: (data, noise), (N, C) each. Exact if v is.

    The data estimate of the last step is what a reward should look at: no fresh SDE noise is in it.
    """
    x, v = _float(x, v)
    t = _time(t, x)
    return x - t * v, x + (1 - t) * v


def velocity_mse(
    v: Tensor, target: Tensor, image_of_token: Tensor | None = None, *, images: int | None = None
) -> Tensor:
    """Mean squared error: the flow loss, and the KL in velocity form (target: the reference's v).

    (N, C), (N, C) -> one number for all tokens alike, or (I,) one an image with image_of_token.
    """
    v, target = _float(v, target)
    error = (v - target).square()
    return error.mean() if image_of_token is None else image_mean(error, image_of_token, images)


# --------------------------------------------------------------------------------------------------
# time


def shift_time(t: Time, shift: float) -> Time:
    """Move times towards the noise: s t / (1 + (s - 1) t). 0 and 1 stay; shift 1 moves nothing."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(
    count: int, shift: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Training times, one an image: sigmoid of a standard normal, shifted (BAGEL). (count,)."""
    device = "cpu" if generator is None else generator.device
    return shift_time(torch.sigmoid(torch.randn(count, generator=generator, device=device)), shift)


def time_grid(num_timesteps: int, shift: float) -> Tensor:
    """The times of a sampler, from 1 down to 0, exactly as in BAGEL. (num_timesteps,) on the CPU.

    `num_timesteps` counts grid points: a grid of 50 means 49 evaluations of the model, the last
    from grid[-2] to 0. ValueError: fewer than 2 points, or a shift of 0 or less.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps={num_timesteps}: expected at least 2 grid points (1 step)")
    if not 0 < shift < math.inf:
        raise ValueError(f"timestep_shift={shift}: expected a number above 0 (1 means no shift)")
    grid = shift_time(torch.linspace(1, 0, num_timesteps, dtype=torch.float32), shift)
    # a shift such as 2.294 rounds to 0.9999999, where the SDE's noise level would explode
    grid[0] = 1
    return grid


# --------------------------------------------------------------------------------------------------
# one step of a sampler


def euler_step(x: Tensor, v: Tensor, t: Time, *, t_next: Time) -> Tensor:
    """One ODE step from t to t_next < t. All (N, C)."""
    x, v = _float(x, v)
    return x - v * (_time(t, x) - _time(t_next, x))


def extrapolate(times: list, velocities: list, t: Time) -> Tensor:
    """The velocity (N, C) at t by the polynomial through those at some earlier times.

    One of them is kept as it is, two give a line, three a parabola: the Taylor series of TaylorSeer
    (arXiv 2503.06923), with differences for derivatives. There of the features in every layer.
    """
    times, t = torch.as_tensor([*times, t], dtype=torch.float64).split([len(times), 1])
    total = 0
    for i, velocity in enumerate(velocities):
        others = torch.cat([times[:i], times[i + 1 :]])
        total = total + float(((t - others) / (times[i] - others)).prod()) * velocity
    return total


def sigma(t: Tensor, t_next: Tensor, noise_level: float) -> Tensor:
    """Flow-GRPO's diffusion coefficient a sqrt(t / (1 - t)), for t and t_next of one shape.

    At t = 1 it is infinite; there the (1 - t) is taken at the next grid point (Flow-GRPO's rule),
    which makes the std of the first step exactly a, however many steps there are.
    """
    return noise_level * torch.sqrt(t / (1 - torch.where(t == 1, t_next, t)))


def transition(
    x: Tensor, v: Tensor, t: Time, *, t_next: Time, noise_level: float = NOISE_LEVEL
) -> tuple[Tensor, Tensor]:
    """The distribution of the next latents: mean (N, C) and std, () or (N, 1) like t.

    Needs 1 >= t > t_next >= 0. noise_level: the a of the equations.
    Source: Flow-GRPO's sd3_sde_with_logprob.py, written as Euler plus a correction.
    """
    x, v = _float(x, v)
    t, t_next = _time(t, x), _time(t_next, x)
    euler, noise_estimate = euler_step(x, v, t, t_next=t_next), estimates(x, v, t)[1]
    step, s = t - t_next, sigma(t, t_next, noise_level)
    return euler - s.square() * step / (2 * t) * noise_estimate, s * step.sqrt()


def sde_step(
    x: Tensor, v: Tensor, t: Time, *, t_next: Time, noise: Tensor, noise_level: float = NOISE_LEVEL
) -> tuple[Tensor, Tensor, Tensor]:
    """One SDE step with standard normal noise (N, C): (x_next, mean, std), see `transition`.

    If the latents are stored in another dtype, round them first and take the log-prob of what is
    stored: rounding afterwards can put more noise into the ratio than the clip range.
    """
    mean, std = transition(x, v, t, t_next=t_next, noise_level=noise_level)
    return mean + std * noise.to(mean), mean, std


# --------------------------------------------------------------------------------------------------
# per image


def image_sum(values: Tensor, image_of_token: Tensor, images: int) -> Tensor:
    """Sum one value a token over the tokens of each image. (N,) -> (I,), in the dtype of values.

    Added up in float64: a GPU adds in any order, and in float32 the same numbers would not always
    give the same sum.
    """
    wide = torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no float64
    total = torch.zeros(images, dtype=wide, device=values.device)  # (I,)
    return total.index_add(0, image_of_token, values.to(wide)).to(values.dtype)  # (I,)


def image_mean(values: Tensor, image_of_token: Tensor, images: int) -> Tensor:
    """Mean over all numbers of each image. (N, C) -> (I,). Every image must own a token."""
    count = torch.bincount(image_of_token, minlength=images)  # (I,) tokens
    return image_sum(values.mean(-1), image_of_token, images) / count


def log_prob(
    x_next: Tensor, mean: Tensor, std: Tensor, *, image_of_token: Tensor, images: int
) -> Tensor:
    """Log density of the step that was taken, mean over the numbers of each image. (N, C) -> (I,).

    ValueError: a step without noise.
    """
    x_next, mean, std = _float(x_next, mean, torch.as_tensor(std))
    if not bool((std > 0).all()):
        raise ValueError(
            "a log-probability needs steps with noise, but the standard deviation is 0"
        )
    exponent = -(x_next - mean).square() / (2 * std.square())  # (N, C)
    density = exponent - std.log() - 0.5 * math.log(2 * math.pi)
    return image_mean(density, image_of_token, images)


def forward_log_prob(v: Tensor, target: Tensor, *, image_of_token: Tensor, images: int) -> Tensor:
    """Minus the flow error of finished pictures that were noised again. (N, C) -> (I,).

    v: the velocity at (1 - t) x0 + t e; target: e - x0. A mean over the numbers of each image, like
    `log_prob`. Source: the objective of advantage weighted matching; DiffusionNFT (2509.16117) and
    arXiv 2602.04663 train with it too.
    """
    return -velocity_mse(v, target, image_of_token, images=images)


# --------------------------------------------------------------------------------------------------
# guidance


def guidance_active(t: Time, interval: tuple[float, float]) -> Tensor:
    """Whether guidance is on at time t (one or a grid): low < t <= high, in float32 as in BAGEL."""
    t = torch.as_tensor(t, dtype=torch.float32)
    return (t > interval[0]) & (t <= interval[1])


def guide(
    v: Tensor,
    v_text: Tensor | None,
    v_image: Tensor | None,
    *,
    guidance: Guidance,
    image_of_token: Tensor | None = None,
    images: int | None = None,
) -> Tensor:
    """Classifier-free guidance with three contexts, text first and image around it (BAGEL).

    v (N, C)       velocity in the full context; v_text with the text left out; v_image with the
                   images left out (None where its scale is 1 or less, since it is not needed)
    image_of_token (N,) and images: with them "global" renormalisation is one length an image
    Returns the guided velocity (N, C). As in the official code, text_scale <= 1 returns v: image
    guidance alone does nothing.
    """
    text_scale, image_scale = guidance.text_scale, guidance.image_scale
    if text_scale <= 1:
        return _float(v)[0]
    v, v_text, v_image = _float(v, v_text, v if image_scale <= 1 else v_image)

    def shrink(guided):  # scale down, never up, towards the length of the unguided velocity
        wanted = _length(v, guidance.renorm, image_of_token, images=images)
        length = _length(guided, guidance.renorm, image_of_token, images=images)
        return guided * (wanted / (length + 1e-8)).clamp(guidance.renorm_min, 1)

    guided = v_text + text_scale * (v - v_text)
    if guidance.renorm == "text_channel":
        guided = shrink(guided)
    if image_scale > 1:
        guided = v_image + image_scale * (guided - v_image)
    return guided if guidance.renorm == "text_channel" else shrink(guided)


def _length(x, renorm, image_of_token, *, images):
    """Euclidean length: of each token (N, 1), of the whole tensor (), or of its image (N, 1)."""
    if renorm != "global":
        return x.norm(dim=-1, keepdim=True)  # (N, 1)
    if image_of_token is None:
        return x.norm()
    squares = image_sum(x.square().sum(-1), image_of_token, images)  # (I,)
    # the floor only keeps the gradient of the square root finite for a model that predicts zero
    return squares.clamp_min(1e-30).sqrt()[image_of_token, None]  # (I,) -> (N, 1)
