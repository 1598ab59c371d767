"""
Stage 2, reasoning-generation alignment: GRPO on the denoising steps, so that pictures match plans (paper section 5).

For each prompt a group of G members is sampled. With RID, reasoning-induced diversity, every member writes its own
plan; without it one plan serves the group. A member's reward compares its picture with its own caption:

    r_i = - || CLIP(picture_i) - CLIP(caption_i) ||_2                   an unparsable plan: the lowest r of its group
    A_i = (r_i - mean r) / max(std r, std_floor), clamped               over the group; equal rewards give exactly 0
    ratio_ik = p_new(x_{k+1} | x_k) / p_old(x_{k+1} | x_k)              for each step k of the SDE window (flow.log_prob)
    L = mean_ik max(-A_i ratio_ik, -A_i clip(ratio_ik, 1 - eps, 1 + eps)) + kl_beta KL(policy | stage 1 model)

Only a window of steps is stochastic, drawn anew every iteration; the others are ODE steps. Log-probabilities are means
over the D values of a picture, so eps = clip_kappa / sqrt(D) keeps its meaning at any resolution: the policy's mean may
move by about clip_kappa standard deviations.

Rollout and update run over the same tree: prompt | branch a plan | leaf a step x_k, and all guidance contexts beside
it. The prompt is computed once. In the update the tree is cut there: the prompt's keys and values become leaves of the
graph, the members pass in packs of `tokens_per_pack`, each adding to the gradients of those leaves, and one backward
pass of the prompt ends it:

    kv = prompt(theta);   for each pack:  loss(theta, kv) -> d/dtheta, d/dkv;   kv.backward(sum d/dkv)      exact

p_old is evaluated by the packs of the update before its first optimiser step, so the first ratio is exactly 1; its
distance to the rollout's own log-probability (KV cache, other shapes of matrix products) is logged as `mismatch`.

Differences from the paper: its SDE, clip, window and KL are unpublished; these are Flow-GRPO's (arXiv 2505.05470), with
the window of MixGRPO. Plan tokens get no policy gradient unless `train_text` asks for it: the caption is the target of
the reward, and easy captions would win.
Left out: more than one process, denoising trees, replay.

    python grpo.py --config toy            trains the CLIPs and stage 1 first if they are missing; ends with a table
Run the same command again to resume.
"""

import copy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import data
import evaluate
import flow
import iccot
import run
from config import exit_on_user_error, parse
from kernels.attention import describe_backend
from pretrained import load_model, save_model
from reward import Clip, compare, train_toy_clip
from sample import Sampler, guided, lay_out, make_prompt, paint, picture, prefill, think

# P groups (prompts) of a step   G members of a group   J plans of a group   S steps of the window   T tokens of a picture


@dataclass(frozen=True)
class Config:
    config: str = ""  # name of the preset; stage 1 is trained with the same one
    # data
    init: str = "out/full-sft"  # checkpoint of stage 1; the model's shape comes from it
    max_references: int = 4
    prompts_per_step: int = 8  # groups
    group_size: int = 32  # members of a group (paper)
    # rollout
    rid: bool = True  # every member writes its own plan; false: one plan a group
    images_per_cot: int = 1  # pictures of each plan; above 1, pictures compete with those of the same plan only
    cot_temperature: float = 1.0  # of the plans
    max_plan_tokens: int = 256
    num_timesteps: int = 17  # grid points; one more than denoising steps
    timestep_shift: float = 3.0
    sde: Literal["flow", "cps"] = "flow"  # how a step is made stochastic (flow.py)
    noise_level: float = 0.7  # a of the SDE (Flow-GRPO); for cps 0.8
    window: int = 3  # stochastic steps of a rollout, which are the trained ones
    window_end: float = 0.5  # the window lies in this first share of the steps; the last step is never in it
    text_guidance: float = 1.0  # of rollouts and updates alike; 1: off
    image_guidance: float = 1.0
    # objective
    reward: Literal["clip_l2", "clip_cos"] = "clip_l2"
    cross_score: bool = False  # reward a picture with the mean over all captions of its group (a variance study)
    std: Literal["group", "global"] = "group"  # what advantages are divided by
    std_floor: float = 0.003  # of the rewards of a group
    max_advantage: float = 5.0
    clip_kappa: float = 0.025  # clip range times sqrt(D)
    guard: bool = False  # GRPO-Guard's ratio: centred, and equal in size at all steps (arXiv 2510.22319)
    kl: Literal["velocity", "latent"] = "velocity"  # |v - v_ref|^2, or the divergence of the two transitions
    kl_beta: float = 0.0  # weight of the KL to the stage 1 model
    train_text: bool = False  # policy gradient on the plans too, with their mean reward (for study)
    text_clip_range: float = 0.2
    text_weight: float = 1.0
    # optimisation
    steps: int = 200  # iterations of rollout and update (paper)
    updates: int = 2  # optimiser steps an iteration, each on its share of the groups
    tokens_per_pack: int = 36_864  # of members in one forward and backward pass: bounds the memory, not the result
    train: Literal["all", "gen"] = "all"  # gen: the generation expert and the latent layers only
    lr: float = 1e-5
    max_grad_norm: float = 1.0
    average: float = 0.0  # decay of the moving average of the weights; 0: off
    # run
    clip_name: str = "ViT-L-14"  # open_clip architecture of the reward's CLIP; toys: toy
    clip: str = "openai"  # its weights: an open_clip tag, a .safetensors file, or the folder of a toy CLIP
    metric_name: str = "ViT-B-32"  # the same for the CLIP that measures CLIP_out
    metric: str = "openai"
    clip_steps: int = 0  # training steps of the two toy CLIPs, if they are missing
    eval_samples: int = 200  # held-out prompts of the final table
    eval_timesteps: int = 50
    target: float | None = None  # exit with status 1 unless Overall rises by this much, held out
    out: str = "out/full-grpo"
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures which of one and two is faster
    save_every: int = 20
    sample_every: int = 20

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: advantages compare the members of a group; use at least 2")
        if self.prompts_per_step % self.updates:
            raise ValueError(f"prompts_per_step={self.prompts_per_step} must be a multiple of updates={self.updates}")
        if not 1 <= self.window <= last_start(self) + self.window:
            raise ValueError(f"window={self.window} does not fit into the first window_end={self.window_end} of "
                             f"{self.num_timesteps - 1} denoising steps")  # fmt: skip
        if self.group_size % self.images_per_cot or (self.images_per_cot > 1 and not self.rid):
            raise ValueError(f"images_per_cot={self.images_per_cot} must divide group_size={self.group_size}, with rid on")
        if self.train_text and (self.cot_temperature != 1 or self.train != "all"):
            raise ValueError("train_text needs cot_temperature=1, the distribution whose gradient it takes, and train=all")

    @property
    def plans_per_group(self):
        return self.group_size // self.images_per_cot if self.rid else 1

    @property
    def sampler(self):
        return Sampler(self.num_timesteps, self.timestep_shift, self.text_guidance, self.image_guidance)


TOY = dict(clip_name="toy", metric_name="toy", tokens_per_pack=8192, num_timesteps=7, timestep_shift=10.0, lr=3e-4,
           eval_timesteps=7)  # fmt: skip
PRESETS = {
    "toy": TOY | dict(
        init="out/toy-sft", group_size=16, max_plan_tokens=72, window=2, steps=40, clip="out/toy-clip-reward",
        metric="out/toy-clip-metric", clip_steps=300, out="out/toy-grpo", save_every=10,
    ),
    "smoke": TOY | dict(
        init="out/smoke-sft", prompts_per_step=2, group_size=4, max_plan_tokens=40, window=2, steps=2, clip_steps=20,
        clip="out/smoke-clip-reward", metric="out/smoke-clip-metric", eval_samples=16, out="out/smoke-grpo",
        save_every=1, sample_every=2,
    ),
    "full": dict(),
}  # fmt: skip


def last_start(config):
    """Last step at which the window may begin."""
    steps = config.num_timesteps - 1
    return min(int(steps * config.window_end), steps - 1) - config.window


# ---------------------------------------------------------------------------------------------------------------------
# rollout


@dataclass
class Rollout:
    """What one iteration sampled. Members are ordered group by group, plan by plan; tokens member by member."""

    prompts: list  # P
    plans: list  # for each group the token ids of its J plans
    ended: torch.Tensor  # (P * J,) bool: the plan was finished in time
    captions: list  # read from the plans, P * J; "" where unparsable
    valid: torch.Tensor  # (P * J,) bool: the plan parses
    x: torch.Tensor  # (S, tokens, C) before each stochastic step
    x_next: torch.Tensor  # (S, tokens, C) after it
    times: torch.Tensor  # (S + 1,) flow times of the window
    log_prob: torch.Tensor  # (P * G, S) as the rollout saw them
    images: list  # PIL, P * G
    grid: tuple  # (h, w) tokens of a picture


def sample_groups(model, layout, tokenizer, samples, config, step):
    """Roll out a group of pictures for each sample (data.Sample) under the current weights."""
    generator = lambda purpose: run.generator(config.seed, step, purpose)
    prompts = [make_prompt(model, tokenizer, one.references, one.instruction) for one in samples]
    prefix, each = prefill(model, layout, prompts), config.plans_per_group
    written, ended = think(model, layout, prompts, each, config.max_plan_tokens, config.cot_temperature, generator(1),
                           prefix=prefix)  # fmt: skip
    plans = [written[i : i + each] for i in range(0, len(written), each)]
    grid = model.config.picture_grid(data.SIZE, data.SIZE)
    members, n = len(prompts) * config.group_size, grid[0] * grid[1]
    image_of_token = torch.arange(members).repeat_interleave(n)
    first = int(torch.randint(last_start(config) + 1, (), generator=generator(2)))
    noise, kept = generator(3), []

    def sde_or_ode(k, x, v, t, t_next):
        if not first <= k < first + config.window:
            return flow.euler_step(x, v, t, t_next)
        x_next, mean, std = flow.sde_step(x, v, t, t_next, config.noise_level, generator=noise, kind=config.sde)
        kept.append((x, x_next, t, t_next, flow.log_prob(x_next, mean, std, image_of_token, members)))
        return x_next

    x = paint(model, layout, prompts, plans, [grid] * len(prompts), config.sampler, generator(4), sde_or_ode,
              prefix=prefix, pictures=config.group_size // each)  # fmt: skip
    captions = []
    for one, group in zip(samples, plans):
        texts = [tokenizer.decode(plan) for plan in group]
        captions += [iccot.parse(text).caption if evaluate.is_valid(text, len(one.references)) else "" for text in texts]
    befores, afters, starts, ends, log_probs = zip(*kept)
    return Rollout(
        prompts, plans, torch.tensor(ended), captions, torch.tensor([bool(caption) for caption in captions]),
        torch.stack(befores), torch.stack(afters), torch.stack([*starts, ends[-1]]), torch.stack(log_probs, 1),
        [picture(model, tokens, grid) for tokens in x.split(n)], grid,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# rewards and advantages


def rewards(clip, rollout, config):
    """(P, G): each picture against its own caption; with an unparsable plan, the lowest reward of its group."""
    groups, each = len(rollout.prompts), config.plans_per_group
    valid = rollout.valid.view(groups, each)  # (P, J)
    member_valid = valid.repeat_interleave(config.group_size // each, 1)  # (P, G)
    if not valid.any():
        return torch.zeros(member_valid.shape)
    u = clip.embed_captions([caption for caption in rollout.captions if caption])
    captions = u.new_zeros(groups * each, u.shape[1]).index_put((valid.flatten().nonzero().squeeze(1),), u)
    captions = captions.view(groups, each, -1)  # (P, J, embedding)
    e = clip.embed_images(rollout.images).view(groups, config.group_size, -1)  # (P, G, embedding)
    if config.cross_score:
        scores = compare(e[:, :, None], captions[:, None], config.reward).masked_fill(~valid[:, None], 0).sum(2)
        scores = scores / valid.sum(1, keepdim=True).clamp_min(1)
    else:
        scores = compare(e, captions.repeat_interleave(config.group_size // each, 1), config.reward)
    lowest = scores.masked_fill(~member_valid, float("inf")).amin(1, keepdim=True)
    lowest = lowest.masked_fill(lowest.isinf(), 0)  # a group without any plan: all equal
    return torch.where(member_valid, scores, lowest)


def group_advantage(reward, std_floor, max_advantage, std=None):
    """(P, G) -> (P, G): normalised within the group; exactly 0 where all rewards of a group are equal.

    std: divide by this number in place of each group's own standard deviation.
    """
    equal = (reward == reward[:, :1]).all(1, keepdim=True)
    centred = (reward - reward.mean(1, keepdim=True)).masked_fill(equal, 0)
    std = reward.std(1, correction=0, keepdim=True) if std is None else std
    return (centred / std.clamp_min(std_floor)).clamp(-max_advantage, max_advantage)


def advantages(reward, config):
    """Rewards (P, G) -> advantages of the pictures (P, G) and of the plans (P, J).

    With several pictures a plan, pictures are compared with those of the same plan, so that an easy caption is no merit
    of theirs; plans are compared by their mean rewards (Dual-GRPO, arXiv 2601.10332).
    """
    std = reward.std(correction=0) if config.std == "global" else None
    compete = reward.view(-1, config.images_per_cot) if config.images_per_cot > 1 else reward
    images = group_advantage(compete, config.std_floor, config.max_advantage, std).view_as(reward)
    plans = reward.view(len(reward), config.plans_per_group, -1).mean(2)
    return images, group_advantage(plans, config.std_floor, config.max_advantage)


# ---------------------------------------------------------------------------------------------------------------------
# update


@dataclass
class Batch:
    """Some members of one group with all their noised images, in one pack that lacks the prompt (Packed.cut)."""

    packed: object
    rows: dict  # of each guidance context, sample.lay_out
    members: torch.Tensor  # (B,) members of the step, whose pictures these are
    plans: torch.Tensor  # (b,) plans of the step, whose texts these are
    x: torch.Tensor  # (B * S * T, C) before the steps
    x_next: torch.Tensor  # (B * S * T, C) after them
    t: torch.Tensor  # (B * S * T,) their times
    t_next: torch.Tensor
    image_of_token: torch.Tensor  # (B * S * T,) which of the B * S steps


def batches(layout, rollout, group, config):
    """(pack of the prompt, batches that need its keys and values) of one group, each within `tokens_per_pack`."""
    chunks = split_members([len(plan) + 2 for plan in rollout.plans[group]], rollout, config)
    built = [make_batch(layout, rollout, group, chunk, config) for chunk in chunks]
    return built[0][0], [batch for _, batch in built]


def split_members(plan_tokens, rollout, config):
    """The members of a group, in order, in chunks of at most `tokens_per_pack` tokens (one member at the least)."""
    pictures = config.group_size // config.plans_per_group  # of a plan
    images = len(rollout.x) * len(config.sampler.contexts) * (rollout.grid[0] * rollout.grid[1] + 2)
    chunks, room = [], 0
    for member in range(config.group_size):
        plan = member // pictures
        tokens = images + plan_tokens[plan] * (not chunks or chunks[-1][-1] // pictures != plan)
        if tokens > room:
            chunks.append([])
            room, tokens = config.tokens_per_pack, images + plan_tokens[plan]
        chunks[-1].append(member)
        room -= tokens
    return chunks


def make_batch(layout, rollout, group, chunk, config):
    """(pack of the prompt, Batch) of these members of a group."""
    n, window = rollout.grid[0] * rollout.grid[1], len(rollout.x)
    pictures = config.group_size // config.plans_per_group
    members = torch.tensor(chunk) + group * config.group_size  # (B,)
    token = (members[:, None] * n + torch.arange(n))[:, None].expand(-1, window, -1).flatten()  # (B * S * T,)
    step = torch.arange(window)[None, :, None].expand(len(members), -1, n).flatten()  # (B * S * T,)
    x = rollout.x[step, token]
    plans, noised = [], []
    for member, images in zip(chunk, x.view(len(chunk), window, n, -1)):
        if member // pictures not in plans:
            plans.append(member // pictures)
            noised.append([])
        noised[-1] += [(x_t, rollout.grid, t) for x_t, t in zip(images, rollout.times)]
    packed, rows = lay_out(layout, [rollout.prompts[group]], [[rollout.plans[group][plan] for plan in plans]], [noised],
                           config.sampler.contexts, loss=config.train_text)  # fmt: skip
    shared, rest = packed.cut()
    return shared, Batch(rest, rows, members, torch.tensor(plans) + group * config.plans_per_group, x,
                         rollout.x_next[step, token], rollout.times[step], rollout.times[step + 1],
                         torch.arange(len(members) * window).repeat_interleave(n))  # fmt: skip


@dataclass
class Policy:
    """What the weights say of one batch."""

    log_prob: torch.Tensor  # (B, S) of the steps that were taken
    v: torch.Tensor  # (B * S * T, C)
    mean: torch.Tensor  # (B * S * T, C) of the transitions
    std: torch.Tensor  # (B * S * T, 1)
    text: torch.Tensor | None  # (labels,) log-probabilities of the plan tokens, with `train_text`

    def detach(self):
        return Policy(*(value if value is None else value.detach() for value in vars(self).values()))


def policy(model, context, batch, config):
    """Policy of a batch, given the prompt's keys and values."""
    und, gen = model(batch.packed, context=context)
    images = int(batch.image_of_token[-1]) + 1
    v = guided(model.velocity(batch.packed, gen), batch.rows, batch.t, config.sampler, batch.image_of_token, images)
    mean, std = flow.transition(batch.x, v, batch.t, batch.t_next, config.noise_level, config.sde)
    log_prob = flow.log_prob(batch.x_next, mean, std, batch.image_of_token, images).view(len(batch.members), -1)
    text = -model.cross_entropy(und, batch.packed) if config.train_text else None
    return Policy(log_prob, v, mean, std.expand(len(v), 1), text)


def clipped(ratio, advantage, clip_range):
    """The clipped surrogate loss of each ratio, to be averaged."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def likelihood_ratio(new, old, batch, config):
    """(B, S): p_new / p_old of the steps taken. With `guard`, GRPO-Guard's normalised ratio.

    A change of the mean by dm shifts the log-ratio by -|dm|^2 / (2 std^2) on average, and its spread grows as std
    falls: guard adds the shift back and multiplies by std.
    """
    log_ratio = new.log_prob - old.log_prob
    if config.guard:
        shift = flow.kl_divergence(new.mean, old.mean, old.std, batch.image_of_token, log_ratio.numel())  # (B * S,)
        std = flow.image_mean(old.std, batch.image_of_token, log_ratio.numel())
        log_ratio = (log_ratio + shift.view_as(log_ratio)) * std.view_as(log_ratio)
    return log_ratio.exp()


def text_loss(new, old, batch, rollout, advantage, config):
    """Clipped loss of the plan tokens of a batch, their mean over all plan tokens of an optimiser step. advantage (P * J,)."""
    lengths = torch.tensor([len(plan) + 1 for group in rollout.plans for plan in group])  # eos included
    written = lengths - (~rollout.ended).long()  # the eos of a plan that was cut off was not written by the model
    of_plan = batch.plans.repeat_interleave(lengths[batch.plans])  # (labels,)
    place = torch.cat([torch.arange(int(length)) for length in lengths[batch.plans]])  # (labels,) within its plan
    pictures = config.group_size // config.plans_per_group
    here = torch.isin(of_plan * pictures, batch.members)  # a plan in several batches counts where its first picture is
    loss = clipped((new.text - old.text).exp(), advantage[of_plan], config.text_clip_range)
    share = len(rollout.prompts) // config.updates * config.plans_per_group  # plans of an optimiser step
    first = int(batch.plans[0]) // share * share
    return (loss * (here & (place < written[of_plan]))).sum() / written[first : first + share].sum()


def update(model, reference, optimizer, layout, rollout, reward, config):
    """All optimiser steps of one iteration. Returns the health numbers."""
    groups, share = len(rollout.prompts), len(rollout.prompts) // config.updates
    trees = [batches(layout, rollout, group, config) for group in range(groups)]
    for_images, for_plans = (advantage.flatten() for advantage in advantages(reward, config))
    clip_range = config.clip_kappa / rollout.x[0, : rollout.grid[0] * rollout.grid[1]].numel() ** 0.5
    old = [[None] * len(found) for _, found in trees]
    with torch.no_grad():  # p_old; the groups of the first optimiser step get it from that step's own forward pass
        for group in range(share, groups):
            context = model.keys_and_values(trees[group][0])
            old[group] = [policy(model, context, batch, config) for batch in trees[group][1]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    health, norms = [], []
    for first in range(0, groups, share):
        scale = 1 / (share * config.group_size * config.window)
        for group in range(first, first + share):
            health += group_backward(model, reference, trees[group], old[group], rollout, for_images, for_plans, scale,
                                     clip_range, config)  # fmt: skip
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    old_log_prob = torch.cat([one.log_prob for tree in old for one in tree])
    return summary(health, norms, share * config.plans_per_group, clip_range) | {
        "mismatch": (old_log_prob - rollout.log_prob).abs().mean().item()
    }


def group_backward(model, reference, tree, old, rollout, for_images, for_plans, scale, clip_range, config):
    """Gradients of one group, the graph cut at the prompt's keys and values. Fills `old` where it is None."""
    shared, found = tree
    context = model.keys_and_values(shared)
    leaves = [tuple(x.detach().requires_grad_(x.requires_grad) for x in pair) for pair in context]
    if reference is not None:
        with torch.no_grad():
            reference_context = reference.keys_and_values(shared)
    health = []
    for i, batch in enumerate(found):
        new = policy(model, leaves, batch, config)
        old[i] = old[i] or new.detach()
        ratio = likelihood_ratio(new, old[i], batch, config)
        loss = clipped(ratio, for_images[batch.members][:, None], clip_range)  # (B, S)
        if config.guard:
            loss = loss / (rollout.times[:-1] - rollout.times[1:])
        loss, kl = loss.sum() * scale, torch.zeros(())
        if reference is not None:
            with torch.no_grad():
                anchor = policy(reference, reference_context, batch, config)
            kl = flow.velocity_mse(new.v, anchor.v) if config.kl == "velocity" else \
                flow.kl_divergence(new.mean, anchor.mean, new.std, batch.image_of_token, ratio.numel()).mean()  # fmt: skip
        total = loss + config.kl_beta * kl * ratio.numel() * scale
        if config.train_text:
            total = total + config.text_weight * text_loss(new, old[i], batch, rollout, for_plans, config)
        total.backward()
        health.append({"plans": batch.plans, "loss": loss.item(), "kl": kl.item(), "ratio": ratio.detach().flatten()})
    pairs = [(x, leaf.grad) for kept, own in zip(context, leaves) for x, leaf in zip(kept, own) if leaf.grad is not None]
    if pairs:
        torch.autograd.backward(*zip(*pairs))
    return health


def summary(health, norms, plans_per_update, clip_range):
    """The logged numbers of one update phase, from those of its batches."""
    number = [int(one["plans"][0]) // plans_per_update for one in health]  # of the optimiser step
    first = torch.cat([one["ratio"] for one, i in zip(health, number) if i == 0])
    last = torch.cat([one["ratio"] for one, i in zip(health, number) if i == number[-1]])
    return {
        "loss": sum(one["loss"] for one in health) / len(norms), "kl": sum(one["kl"] for one in health) / len(health),
        "ratio_first_min": first.min().item(), "ratio_first_mean": first.mean().item(),
        "ratio_first_max": first.max().item(), "ratio_last": last.mean().item(),
        "clip_high": (last > 1 + clip_range).float().mean().item(),
        "clip_low": (last < 1 - clip_range).float().mean().item(), "clip_range": clip_range,
        "grad_norm": sum(norms) / len(norms),
    }  # fmt: skip


def trained_parameters(model, what):
    """The parameters that stage 2 changes; the others are frozen."""
    gen = (".gen.", "norm_gen", "latent_in", "latent_out", "time_embedder")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "all" or any(part in name for part in gen))
    return [p for p in model.parameters() if p.requires_grad]


# ---------------------------------------------------------------------------------------------------------------------
# the whole stage


def prepare(config):
    """Train what stage 2 needs and is missing: two small CLIPs and the stage 1 model."""
    if config.clip_name == "toy" and not (Path(config.clip) / "clip.json").is_file():
        train_toy_clip(config.clip, seed=0, steps=config.clip_steps)
    evaluate.metric_clip(config.metric_name, config.metric, config.clip_steps)
    if not (Path(config.init) / "model").is_dir() and not (Path(config.init) / "llm_config.json").is_file():
        script = str(Path(__file__).with_name("sft.py"))
        command = [sys.executable, script, "--config", config.config, "--out", config.init]
        command += ["--threads", str(torch.get_num_threads())]
        code = subprocess.run(command).returncode
        if code:
            sys.exit(code)


def train(config):
    """The whole stage: prepares, resumes, trains, and compares stage 2 with stage 1 on held-out prompts."""
    begun = time.perf_counter()
    with exit_on_user_error(ValueError):
        folder = run.start(config)
        prepare(config)
        step, state = run.load_state(folder)
        model, tokenizer = load_model(config.init)
        clip = Clip(config.clip_name, config.clip)
    layout = model.config.layout(tokenizer)
    reference = copy.deepcopy(model).requires_grad_(False) if config.kl_beta else None
    optimizer = torch.optim.AdamW(trained_parameters(model, config.train), config.lr, (0.9, 0.95), weight_decay=0.0,
                                  fused=True)  # fmt: skip
    average = run.new_average(model)
    if state is not None:
        run.unpack_state(state, model, optimizer, average)
    pictures = config.prompts_per_step * config.group_size
    print(f"grpo: {config.prompts_per_step} prompts x {config.group_size} members = {pictures} pictures a step, "
          f"RID {'on' if config.rid else 'off'}, {describe_backend()}, step {step} of {config.steps}")  # fmt: skip
    bar = tqdm(range(step, config.steps), initial=step, total=config.steps, disable=None, desc="grpo")
    for step in bar:
        values = iteration(model, reference, optimizer, layout, tokenizer, clip, config, step)
        run.update_average(average, model, config.average)
        run.log(folder, values)
        bar.set_postfix(reward=f"{values['reward']:.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            run.save_state(folder, step + 1, run.pack_state(model, optimizer, average))
        if (step + 1) % config.sample_every == 0:
            evaluate.save_strip(folder / "samples" / f"{step + 1:06d}.png", model, layout, tokenizer,
                                config.max_references, shift=config.timestep_shift,
                                num_timesteps=config.eval_timesteps)  # fmt: skip
    save_model(model, tokenizer, folder / "model", average)
    rows = compare_stages(config, folder)
    print(f"grpo: {run.seconds(begun)} in this command; model in {folder}/model, pictures in {folder}/grid.png")
    gain = rows["SFT + GRPO"]["Overall"] - rows["SFT"]["Overall"]
    if config.target is not None and gain < config.target:
        print(f"Overall rose by {gain:.3f}, less than the target of {config.target}", file=sys.stderr)
        sys.exit(1)


def iteration(model, reference, optimizer, layout, tokenizer, clip, config, step):
    """One rollout and its updates. Returns the line of the log."""
    clock = [(time.perf_counter(), model.tokens)]
    indices = range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
    samples = [data.draw_sample("train", i, config.seed + 1, config.max_references) for i in indices]
    rollout = sample_groups(model, layout, tokenizer, samples, config, step)
    clock.append((time.perf_counter(), model.tokens))
    truncated = clip.truncated
    reward = rewards(clip, rollout, config)
    clock.append((time.perf_counter(), model.tokens))
    health = update(model, reference, optimizer, layout, rollout, reward, config)
    clock.append((time.perf_counter(), model.tokens))
    seconds, tokens = ([b - a for a, b in zip(values, values[1:])] for values in zip(*clock))
    of_plan = reward.view(len(reward), config.plans_per_group, -1)  # (P, J, pictures)
    words = [len(caption.split()) for caption in rollout.captions if caption]
    return {
        "step": step, "reward": reward.mean().item(), "reward_std": reward.std(1, correction=0).mean().item(),
        "reward_std_between": of_plan.mean(2).std(1, correction=0).mean().item(),
        "reward_std_within": of_plan.std(2, correction=0).mean().item(),
        "dead_groups": (reward == reward[:, :1]).all(1).float().mean().item(),
        "parse_failures": (~rollout.valid).float().mean().item(), "caption_words": sum(words) / max(1, len(words)),
        "truncated": clip.truncated - truncated, **health, "rollout_seconds": seconds[0],
        "reward_seconds": seconds[1], "update_seconds": seconds[2], "rollout_tokens": tokens[0],
        "update_tokens": tokens[2],
    }  # fmt: skip


def compare_stages(config, folder):
    """The table: stage 1 and stage 2 on the same held-out prompts from the same noise, and a grid of pictures."""
    metric = evaluate.metric_clip(config.metric_name, config.metric, config.clip_steps)
    samples = [data.draw_sample("held_out", i, 0, config.max_references) for i in range(config.eval_samples)]
    rows = {}
    for name, path in (("SFT", config.init), ("SFT + GRPO", folder)):
        model, tokenizer = load_model(path)
        results = evaluate.generate(model, model.config.layout(tokenizer), tokenizer, samples,
                                    shift=config.timestep_shift, num_timesteps=config.eval_timesteps)  # fmt: skip
        rows[name] = evaluate.measure(samples, results, metric)
    evaluate.save_grid(folder / "grid.png", samples[:8], results[:8])
    run.write_text(folder / "table.json", run.json.dumps(rows, indent=1) + "\n")
    evaluate.print_table(rows)
    return rows


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
