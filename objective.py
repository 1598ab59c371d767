"""
The objective of GRPO, in the order of its equations: advantages, ratio, clipped surrogate, KL.

    A_i      = (r_i - mean r) / max(std r, std_floor)           over the group, clamped; equal: 0
    ratio_ik = exp(log p_new - log p_old) of score k of member i
    L        = mean_ik max(-A_i ratio_ik, -A_i clip(ratio_ik, 1 - eps, 1 + eps))
               + kl_beta KL                                     (+ text_weight L_text, train_text)
    KL       = mean |v - v_stage1|^2                            kl=velocity: without the weight that
                                                                it has in the KL of a step
               mean |mean - mean_stage1|^2 / (2 std^2)          kl=latent: of an SDE step

Pure functions of tensors, but for std=global, which asks all processes. At ratio 1 the gradient is
that of -mean A_i log p_new: the policy gradient. What a score is, rollouts.py says: the density of
an SDE step, or minus the flow error of a finished picture; both are means over a picture's values,
so that eps = clip_kappa / sqrt(T C) has the same meaning at any resolution. L_text is the same
surrogate over the tokens of the plans, with the plans' own advantages. `guard` takes another ratio
(`likelihood_ratio`) and divides each term by its step t - t'.

`config` is grpo.Config. Letters: sequence.py. Left out: asymmetric clip ranges, entropy bonuses.
Run: python -m pytest tests/test_grpo.py
"""

from dataclasses import dataclass

import torch

import flow
from runtime import processes

# --------------------------------------------------------------------------------------------------
# advantages


def group_advantage(reward, std_floor, max_advantage, *, std=None):
    """(P, G) -> (P, G): normalised within the group; exactly 0 where all of a group are equal.

    std: divide by this number in place of each group's own standard deviation.
    """
    equal = (reward == reward[:, :1]).all(1, keepdim=True)
    centred = reward - reward.mean(1, keepdim=True)
    std = reward.std(1, correction=0, keepdim=True) if std is None else std
    found = (centred / std.clamp_min(std_floor)).clamp(-max_advantage, max_advantage)
    return found.masked_fill(equal, 0)


def advantages(reward, config):
    """Rewards (P, G) -> advantages of the pictures (P * G,) and of the plans (P * J,).

    With several pictures a plan, pictures are compared with those of the same plan, so that an easy
    caption is no merit of theirs; plans are compared by their mean rewards (Dual-GRPO, 2601.10332).
    """
    limits = config.std_floor, config.max_advantage
    std = processes.spread(reward) if config.std == "global" else None
    several = config.images_per_cot > 1
    rivals = reward.view(-1, config.images_per_cot) if several else reward  # (P * J, pictures)
    of_plan = reward.view(len(reward), config.plans_per_group, -1).mean(2)  # (P, J)
    images, plans = group_advantage(rivals, *limits, std=std), group_advantage(of_plan, *limits)
    return images.flatten(), plans.flatten()


# --------------------------------------------------------------------------------------------------
# the objective, in the order of the equations


@dataclass
class Actions:
    """What was done in a batch and what it was worth: the constants of the objective."""

    advantage: torch.Tensor  # (I,) A of the member of each noised picture
    image_of_token: torch.Tensor  # (Z,) which of the I pictures
    step_size: torch.Tensor  # (I,) sde: t - t' of the step that each takes
    text_advantage: torch.Tensor  # (labels,) A of the plan that each token belongs to
    text_counts: torch.Tensor  # (labels,) bool: the model wrote this token, and it counts here
    clip_range: float  # eps
    scale: float  # 1 / (pictures * scores) of the optimiser step
    text_scale: float  # text_weight / plan tokens of the optimiser step


@dataclass
class Objective:
    """L of a batch and its parts."""

    total: torch.Tensor  # (), what is differentiated
    images: torch.Tensor  # (), the clipped surrogate alone
    kl: torch.Tensor  # (), mean over the batch
    ratio: torch.Tensor  # (I,)

    def detached(self):
        return Objective(*(x.detach() for x in vars(self).values()))


def objective(new, old, anchor, *, actions, config):
    """L of a batch: a pure function of tensors.

    new, old, anchor: tree.Policy of the present weights, of those that sampled, and of the stage 1
    model (None without kl_beta).
    """
    ratio = likelihood_ratio(new, old, actions.image_of_token, guard=config.guard)  # (I,)
    loss = clipped(ratio, actions.advantage.to(ratio), actions.clip_range)  # (I,)
    if config.guard:
        loss = loss / actions.step_size.to(loss)
    loss = loss.sum() * actions.scale
    kl = divergence(new, anchor, actions.image_of_token, kind=config.kl)
    total = loss + config.kl_beta * kl * ratio.numel() * actions.scale
    if config.train_text:
        text_ratio, advantage = (new.text - old.text).exp(), actions.text_advantage.to(new.text)
        text = clipped(text_ratio, advantage, config.text_clip_range)  # (labels,)
        total = total + actions.text_scale * (text * actions.text_counts.to(text)).sum()
    return Objective(total, loss, kl, ratio)


def likelihood_ratio(new, old, image_of_token, *, guard):
    """(I,): p_new / p_old of the steps taken. With `guard`, GRPO-Guard's normalised ratio.

    A change of the mean by dm shifts the log-ratio by -|dm|^2 / (2 std^2) on average, and its
    spread grows as std falls: guard adds the shift back and multiplies by std (arXiv 2510.22319).
    """
    log_ratio = new.log_prob - old.log_prob
    if guard:
        of = dict(image_of_token=image_of_token.to(log_ratio.device), images=log_ratio.numel())
        shift = flow.kl_divergence(new.mean, old.mean, old.std, **of)  # (I,)
        std = flow.image_mean(old.std, *of.values())  # (I,)
        log_ratio = (log_ratio + shift) * std
    return log_ratio.exp()


def clipped(ratio, advantage, clip_range):
    """The clipped surrogate loss of each ratio, to be averaged."""
    near = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * near)


def divergence(new, anchor, image_of_token, *, kind):
    """KL of the policy to the stage 1 model, a mean over the batch; 0 without an anchor."""
    if anchor is None:
        return torch.zeros((), device=new.v.device)
    if kind == "velocity":
        return flow.velocity_mse(new.v, anchor.v)
    of = dict(image_of_token=image_of_token.to(new.v.device), images=new.log_prob.numel())
    return flow.kl_divergence(new.mean, anchor.mean, new.std, **of).mean()
