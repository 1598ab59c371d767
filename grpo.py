"""
Stage 2, reasoning-generation alignment: GRPO on the denoising steps, so that pictures match plans (paper section 5).

For each prompt a group of G members is sampled. With RID, reasoning-induced diversity, every member writes its own
plan; without it one plan serves the group. A member's reward compares its picture with its own caption:

    r_i = - || CLIP(picture_i) - CLIP(caption_i) ||_2                   an unparsable plan: the lowest r of its group
    A_i = (r_i - mean r) / max(std r, std_floor), clamped               over the group; equal rewards give exactly 0
    ratio_ik = p_new(x_{k+1} | x_k) / p_old(x_{k+1} | x_k)              for each step k of the SDE window (flow.py)
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
the reward, and easy captions would win. The toy asks for it: its pictures hardly depend on the noise; only its plans
have a gradient that stands out from chance (LOG.md).
Whole groups stay on one process. The reference of the KL is no second model: before a group's pass, the trained weights
are exchanged for what they were (run.exchanged).
Left out: denoising trees, replay.

    python grpo.py --config toy            trains the CLIPs and stage 1 first if they are missing; ends with a table
Run the same command again to resume.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import engine
import flow
import iccot
from bench import memory
from data import open_source
from engine import Sampler, draw_noise, guided, lay_out, make_prompt, paint, picture, prefill, think
from kernels.attention import describe_backend
from model import MODELS, ModelConfig
from reward import Clip, compare
from runtime import files, loop, processes, sharding, state
from runtime.config import exit_on_user_error, parse
from runtime.lora import add_lora, merge_lora, reset_lora, trained_parameters
from runtime.pretrained import (
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    load_weights,
    save_model,
)
from studies import metrics
from toy import world
from toy.prepare import metric_clip, prepare

# P groups (prompts) of a step   G members of a group   J plans of a group   S steps of the window   T tokens a picture


@dataclass(frozen=True)
class Config:
    config: str = ""  # name of the preset; stage 1 is trained with the same one
    # data
    init: str = "out/full-sft"  # checkpoint of stage 1; the model's shape comes from it
    data: str = "toy"  # where the prompts come from: "toy" draws them; otherwise as in sft.py
    scale: int = 1  # of the toy world: pixels for each of its own, each way
    max_references: int = 4
    prompts_per_step: int = 16  # groups; 256 pictures an update (Flow-GRPO: 384 to 576)
    groups_at_once: int = 1  # rolled out together, and
    pictures_at_once: int = 8  # of their members painted together: both bound memory alone
    group_size: int = 32  # members of a group (paper)
    # rollout
    rid: bool = True  # every member writes its own plan; false: one plan a group
    images_per_cot: int = 1  # pictures of each plan; above 1 they compete with each other only
    cot_temperature: float = 1.0  # of the plans
    max_plan_tokens: int = 256
    picture_side: int = 1024  # pixels of the square pictures, before the codec's resize rule
    num_timesteps: int = 17  # grid points; one more than denoising steps
    timestep_shift: float = 3.0
    same_start: bool = False  # all members of a group start from the same noise
    sde: Literal["flow", "cps"] = "flow"  # how a step is made stochastic (flow.py)
    noise_level: float = 0.7  # a of the SDE (Flow-GRPO); for cps 0.8
    window: int = 3  # stochastic steps of a rollout, which are the trained ones
    window_end: float = 0.5  # the window lies in this first share of the steps, never in the last
    text_guidance: float = 1.0  # of rollouts and updates alike; 1: off
    image_guidance: float = 1.0
    # objective
    reward: Literal["clip_l2", "clip_cos"] = "clip_l2"
    cross_score: bool = False  # mean reward over all captions of the group (a variance study)
    std: Literal["group", "global"] = "group"  # what advantages are divided by
    std_floor: float = 0.003  # of the rewards of a group
    max_advantage: float = 5.0
    clip_kappa: float = 0.025  # clip range times sqrt(D)
    guard: bool = False  # GRPO-Guard's ratio: centred, alike at all steps (2510.22319)
    kl: Literal["velocity", "latent"] = "velocity"  # |v - v_ref|^2, or that of the transitions
    kl_beta: float = 1.5e-5  # weight of the KL to the stage 1 model (UniGRPO)
    train_text: bool = False  # policy gradient on the plans too, with their mean reward
    text_clip_range: float = 0.2
    text_weight: float = 1.0
    # optimisation
    steps: int = 200  # iterations of rollout and update (paper)
    updates: int = 2  # optimiser steps an iteration, each on its share of the groups
    tokens_per_pack: int = 36_864  # of members in one pass: bounds the memory, not the result
    train: Literal["all", "gen", "lora"] = "all"  # gen: that expert, latent layers; lora: adapters
    lora_rank: int = 64
    lora_alpha: float = 128.0  # the adapters' sum counts alpha / rank
    lr: float = 1e-5  # between R3's 5e-6 and UniGRPO's 3e-5
    max_grad_norm: float = 1.0
    average: float = 0.9  # decay of the moving average of the weights, which is saved; 0: off
    # machine
    checkpointing: bool = True  # recompute each block backward: less memory, a third more time
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the arithmetic alone
    sum_every_pass: bool = True  # sum gradients every pass (a shard stays) or once a step
    replicas: int = 1  # copies of the model, each sharded over its part of the processes
    timeout_minutes: float = 30.0  # a process that waits longer than this for another ends the job
    plan: bool = False  # print what each GPU would hold, and stop
    gpus: int = 8  # of that plan
    gpu_memory: float = 80.0  # GB of each, 10^9 bytes
    # run
    clip_name: str = "ViT-L-14"  # open_clip architecture of the reward's CLIP; toys: toy
    clip: str = "openai"  # its weights: an open_clip tag, a .safetensors file, or a folder
    metric_name: str = "ViT-B-32"  # the same for the CLIP that measures CLIP_out
    metric: str = "openai"
    clip_steps: int = 0  # training steps of the two toy CLIPs, if they are missing
    eval_data: str = "toy"  # prompts of the final table: toy (held out), or samples on disk
    eval_samples: int = 200  # how many
    eval_timesteps: int = 50
    target: float | None = None  # exit with status 1 unless Overall rises by this much, held out
    out: str = "out/full-grpo"
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures which of one and two is faster
    save_every: int = 20  # steps between training states
    keep: int = 2  # training states that stay
    export: bool = False  # write the newest state as `out`/model (BAGEL's layout) and stop
    async_save: bool = False  # write states while training goes on; one more copy on the host
    sample_every: int = 20

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: advantages compare the members of a group; use at least 2"
            )
        if self.prompts_per_step % self.updates:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} must be a multiple of updates={self.updates}"
            )
        if not 1 <= self.window <= last_start(self) + self.window:
            raise ValueError(
                f"window={self.window} does not fit into the first window_end={self.window_end} of "
                f"{self.num_timesteps - 1} denoising steps"
            )
        if self.group_size % self.images_per_cot or (self.images_per_cot > 1 and not self.rid):
            raise ValueError(
                f"images_per_cot={self.images_per_cot} must divide group_size={self.group_size}, with rid on"
            )
        if self.train_text and (self.cot_temperature != 1 or self.train != "all"):
            raise ValueError(
                "train_text needs cot_temperature=1, the distribution whose gradient it takes, and train=all"
            )

    @property
    def plans_per_group(self):
        return self.group_size // self.images_per_cot if self.rid else 1

    @property
    def sampler(self):
        return Sampler(
            self.num_timesteps, self.timestep_shift, self.text_guidance, self.image_guidance
        )


# fmt: off
TOY = dict(
    clip_name="toy", metric_name="toy", train="all", kl_beta=0.0, average=0.0, num_timesteps=7, timestep_shift=10.0,
    lr=3e-4, eval_timesteps=7, picture_side=world.SIZE, groups_at_once=8, pictures_at_once=1000, tokens_per_pack=8192,
    checkpointing=False, precision="float32", sum_every_pass=False,
)


PRESETS = {
    "toy": TOY | dict(
        init="out/toy-sft", prompts_per_step=32, group_size=4, max_plan_tokens=72, window=1, steps=30, train_text=True,
        kl_beta=20.0, lr=1e-4, std_floor=0.05, groups_at_once=32, clip="out/toy-clip-reward",
        metric="out/toy-clip-metric", clip_steps=300, out="out/toy-grpo", save_every=10,
    ),
    "smoke": TOY | dict(
        init="out/smoke-sft", prompts_per_step=2, group_size=4, max_plan_tokens=40, window=2, steps=2, clip_steps=20,
        clip="out/smoke-clip-reward", metric="out/smoke-clip-metric", eval_samples=16, out="out/smoke-grpo",
        save_every=1, sample_every=2,
    ),
    "small": TOY | dict(  # one data-centre GPU, after sft.py --config small
        init="out/small-sft", scale=2, picture_side=64, prompts_per_step=16, group_size=24, max_plan_tokens=72,
        window=2, steps=200, lr=1e-4, groups_at_once=16, precision="bfloat16", clip="out/toy-clip-reward",
        metric="out/toy-clip-metric", clip_steps=300, out="out/small-grpo",
    ),
    "full": dict(),  # the efficient recipe
    "paper": dict(  # published: group_size, steps, lr, 50 denoising steps; the rest Flow-GRPO's
        lr=1e-6, updates=1, train="all", kl_beta=0.0, average=0.0, num_timesteps=51, window=25, window_end=1.0,
        text_guidance=4.0, image_guidance=2.0, clip_kappa=0.05, out="out/paper-grpo",
    ),
}
# fmt: on


def last_start(config):
    """Last step at which the window may begin."""
    steps = config.num_timesteps - 1
    return min(int(steps * config.window_end), steps - 1) - config.window


# ---------------------------------------------------------------------------------------------------------------------
# rollout


@dataclass
class Rollout:
    """What one iteration sampled, on the host. Members stand group by group, plan by plan; tokens member by member."""

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


def sample_groups(model, layout, tokenizer, samples, numbers, config, step):
    """Roll out a group of pictures for each sample (data.Sample) under the current weights, `groups_at_once`.

    numbers: of the samples; what is random in a group depends on its number, the window on the step alone.
    """
    parts = [
        roll_out(
            model,
            layout,
            tokenizer,
            samples[i : i + config.groups_at_once],
            numbers[i : i + config.groups_at_once],
            config,
            step,
        )
        for i in range(0, len(samples), config.groups_at_once)
    ]
    joined = {}
    for name, value in vars(parts[0]).items():
        values = [getattr(part, name) for part in parts]
        if isinstance(value, list):
            joined[name] = sum(values, [])
        elif isinstance(value, torch.Tensor) and name != "times":
            joined[name] = torch.cat(values, 1 if name in ("x", "x_next") else 0)
        else:
            joined[name] = value  # the same in all parts
    return Rollout(**joined)


def roll_out(model, layout, tokenizer, samples, numbers, config, step):
    """Roll out these groups together."""
    generators = lambda purpose, many, same=False: [
        [processes.generator(config.seed, number, purpose, 0 if same else i) for i in range(many)]
        for number in numbers
    ]
    prompts = [make_prompt(model, tokenizer, one.references, one.instruction) for one in samples]
    prefix, each = prefill(model, layout, prompts), config.plans_per_group
    written, ended = think(
        model,
        layout,
        prompts,
        each,
        config.max_plan_tokens,
        config.cot_temperature,
        sum(generators(1, each), []),
        prefix=prefix,
    )
    plans = [written[i : i + each] for i in range(0, len(written), each)]
    captions = []
    for one, group in zip(samples, plans):
        texts = [tokenizer.decode(plan) for plan in group]
        captions += [
            iccot.parse(text).caption if iccot.is_valid(text, len(one.references)) else ""
            for text in texts
        ]
    grid = model.config.picture_grid(config.picture_side, config.picture_side)
    first = int(
        torch.randint(
            last_start(config) + 1, (), generator=processes.generator(config.seed, step, 2)
        )
    )
    of_member = [
        [group[i * each // config.group_size] for i in range(config.group_size)] for group in plans
    ]
    noises, starts = (
        generators(3, config.group_size),
        generators(4, config.group_size, config.same_start),
    )
    painted = []
    for some in (
        slice(i, i + config.pictures_at_once)
        for i in range(0, config.group_size, config.pictures_at_once)
    ):
        painted.append(
            paint_members(
                model,
                layout,
                prompts,
                *([rows[some] for rows in group] for group in (of_member, starts, noises)),
                grid,
                first,
                prefix,
                config,
            )
        )
    x, before, after, log_prob = (
        torch.cat(parts, dim) for parts, dim in zip(zip(*painted), (1, 2, 2, 1))
    )
    times = flow.time_grid(config.num_timesteps, config.timestep_shift)[
        first : first + config.window + 1
    ]
    images = [picture(model, tokens, grid) for tokens in x.flatten(0, 1)]
    return Rollout(
        prompts,
        plans,
        torch.tensor(ended),
        captions,
        torch.tensor([bool(caption) for caption in captions]),
        before.flatten(1, 3).cpu(),
        after.flatten(1, 3).cpu(),
        times,
        log_prob.flatten(0, 1).cpu(),
        images,
        grid,
    )


def paint_members(model, layout, prompts, plans, starts, noises, grid, first, prefix, config):
    """Paint some members of each group; the steps first ... first + window - 1 are stochastic.

    plans, and the generators of the initial (`starts`) and of the SDE's noise (`noises`): for each group, for each of
    these members. Returns x (P, members, T, C), before and after each stochastic step (S, P, members, T, C), and the
    log-probabilities of these steps (P, members, S).
    """
    n, count = grid[0] * grid[1], len(plans[0])
    members, kept, noises = len(prompts) * count, [], sum(noises, [])
    image_of_token = torch.arange(members, device=processes.device()).repeat_interleave(n)

    def sde_or_ode(k, x, v, t, t_next):
        if not first <= k < first + config.window:
            return flow.euler_step(x, v, t, t_next)
        noise = draw_noise([n] * members, x.shape[1], noises)
        x_next, mean, std = flow.sde_step(
            x, v, t, t_next, config.noise_level, noise, kind=config.sde
        )
        kept.append((x, x_next, flow.log_prob(x_next, mean, std, image_of_token, members)))
        return x_next

    x = paint(
        model,
        layout,
        prompts,
        plans,
        [grid] * len(prompts),
        config.sampler,
        sum(starts, []),
        sde_or_ode,
        prefix=prefix,
    )
    before, after, log_prob = (torch.stack(values) for values in zip(*kept))
    shape = (len(prompts), count, n, x.shape[1])
    return (
        x.view(shape),
        before.view(-1, *shape),
        after.view(-1, *shape),
        log_prob.view(-1, *shape[:2]).permute(1, 2, 0),
    )


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
    captions = u.new_zeros(groups * each, u.shape[1]).index_put(
        (valid.flatten().nonzero().squeeze(1),), u
    )
    captions = captions.view(groups, each, -1)  # (P, J, embedding)
    e = clip.embed_images(rollout.images).view(groups, config.group_size, -1)  # (P, G, embedding)
    if config.cross_score:
        scores = (
            compare(e[:, :, None], captions[:, None], config.reward)
            .masked_fill(~valid[:, None], 0)
            .sum(2)
        )
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

    def to(self, device):
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(
            self,
            **moved,
            packed=self.packed.to(device),
            rows={k: v.to(device) for k, v in self.rows.items()},
        )


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
    # (B * S * T,)
    token = (members[:, None] * n + torch.arange(n))[:, None].expand(-1, window, -1).flatten()
    step = torch.arange(window)[None, :, None].expand(len(members), -1, n).flatten()  # (B * S * T,)
    x = rollout.x[step, token]
    plans, noised = [], []
    for member, images in zip(chunk, x.view(len(chunk), window, n, -1)):
        if member // pictures not in plans:
            plans.append(member // pictures)
            noised.append([])
        noised[-1] += [(x_t, rollout.grid, t) for x_t, t in zip(images, rollout.times)]
    packed, rows = lay_out(
        layout,
        [rollout.prompts[group]],
        [[rollout.plans[group][plan] for plan in plans]],
        [noised],
        config.sampler.contexts,
        loss=config.train_text,
    )
    shared, rest = packed.cut()
    return shared, Batch(
        rest,
        rows,
        members,
        torch.tensor(plans) + group * config.plans_per_group,
        x,
        rollout.x_next[step, token],
        rollout.times[step],
        rollout.times[step + 1],
        torch.arange(len(members) * window).repeat_interleave(n),
    )


@dataclass
class Policy:
    """What the weights say of one batch."""

    log_prob: torch.Tensor  # (B, S) of the steps that were taken
    v: torch.Tensor  # (B * S * T, C)
    mean: torch.Tensor  # (B * S * T, C) of the transitions
    std: torch.Tensor  # (B * S * T, 1)
    text: torch.Tensor | None  # (labels,) log-probabilities of the plan tokens, with `train_text`

    def old(self, guard):
        """What is needed of it as p_old."""
        kept = ("log_prob", "text", "mean", "std") if guard else ("log_prob", "text")
        return Policy(
            **{
                name: value.detach() if name in kept and value is not None else None
                for name, value in vars(self).items()
            }
        )


def policy(model, context, batch, config):
    """Policy of a batch, given the prompt's keys and values."""
    batch = batch.to(processes.device())
    und, gen = model(batch.packed, context=context)
    images = int(batch.image_of_token[-1]) + 1
    v = guided(
        model.velocity(batch.packed, gen),
        batch.rows,
        batch.t,
        config.sampler,
        batch.image_of_token,
        images,
    )
    mean, std = flow.transition(batch.x, v, batch.t, batch.t_next, config.noise_level, config.sde)
    log_prob = flow.log_prob(batch.x_next, mean, std, batch.image_of_token, images).view(
        len(batch.members), -1
    )
    text = -model.cross_entropy(und, batch.packed) if config.train_text else None
    return Policy(log_prob, v, mean, std.expand(len(v), 1), text)


def clipped(ratio, advantage, clip_range):
    """The clipped surrogate loss of each ratio, to be averaged."""
    return torch.maximum(
        -advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    )


def likelihood_ratio(new, old, batch, config):
    """(B, S): p_new / p_old of the steps taken. With `guard`, GRPO-Guard's normalised ratio.

    A change of the mean by dm shifts the log-ratio by -|dm|^2 / (2 std^2) on average, and its spread grows as std
    falls: guard adds the shift back and multiplies by std.
    """
    log_ratio = new.log_prob - old.log_prob
    if config.guard:
        image_of_token = batch.image_of_token.to(log_ratio.device)
        # (B * S,)
        shift = flow.kl_divergence(new.mean, old.mean, old.std, image_of_token, log_ratio.numel())
        std = flow.image_mean(old.std, image_of_token, log_ratio.numel())
        log_ratio = (log_ratio + shift.view_as(log_ratio)) * std.view_as(log_ratio)
    return log_ratio.exp()


def text_loss(new, old, batch, rollout, advantage, config):
    """Clipped loss summed over the plan tokens of a batch. advantage (P * J,)."""
    lengths = plan_lengths(rollout)
    of_plan = batch.plans.repeat_interleave(lengths[batch.plans])  # (labels,)
    # (labels,) within its plan
    place = torch.cat([torch.arange(int(length)) for length in lengths[batch.plans]])
    written = place < (lengths - (~rollout.ended).long())[of_plan]
    here = torch.isin(of_plan * (config.group_size // config.plans_per_group), batch.members)
    loss = clipped(
        (new.text - old.text).exp(), advantage[of_plan].to(new.text), config.text_clip_range
    )
    # a plan in several batches counts where its first picture is
    return (loss * (written & here).to(loss)).sum()


def plan_lengths(rollout):
    """(P * J,) tokens of each plan with its eos; the model did not write the eos of a plan that was cut off."""
    return torch.tensor([len(plan) + 1 for group in rollout.plans for plan in group])


def update(model, anchor, optimizer, layout, rollout, reward, config):
    """All optimiser steps of one iteration.

    anchor: {name: value} of the trained weights in stage 1, for the KL, or None.
    Returns the health numbers, and whether all gradients were finite.
    """
    groups, share = len(rollout.prompts), len(rollout.prompts) // config.updates
    trees = [batches(layout, rollout, group, config) for group in range(groups)]
    passes = [int(count) for count in processes.reduced([len(found) for _, found in trees], "max")]
    for_images, for_plans = (advantage.flatten() for advantage in advantages(reward, config))
    clip_range = (
        config.clip_kappa / rollout.x[0, : rollout.grid[0] * rollout.grid[1]].numel() ** 0.5
    )
    old = [[None] * len(found) for _, found in trees]
    # p_old; the groups of the first optimiser step get it from that step's own forward pass
    with sharding.gathered(model):
        for group in range(share, groups):
            context = model.keys_and_values(trees[group][0].to(processes.device()))
            old[group] = [
                policy(model, context, batch, config).old(config.guard) for batch in trees[group][1]
            ]
    words = plan_lengths(rollout) - (~rollout.ended).long()
    health, norms, finite = [], [], True
    for first in range(0, groups, share):
        plans = slice(first * config.plans_per_group, (first + share) * config.plans_per_group)
        text_scale = (
            config.text_weight * processes.size() / processes.reduced([int(words[plans].sum())])[0]
        )
        scales = 1 / (share * config.group_size * config.window), text_scale, clip_range
        for group in range(first, first + share):
            health += group_backward(
                model,
                anchor,
                trees[group],
                old[group],
                rollout,
                for_images,
                for_plans,
                scales,
                passes[group],
                group == first + share - 1,
                config,
            )
        norm, stepped = sharding.step_if_finite(optimizer, config.max_grad_norm)
        norms.append(norm)
        finite &= stepped
    old_log_prob = torch.cat([one.log_prob for tree in old for one in tree]).cpu()
    mismatch = (old_log_prob - rollout.log_prob).abs().mean().item()
    return summary(health, norms, share * config.plans_per_group, clip_range) | {
        "mismatch": mismatch
    }, finite


def group_backward(
    model, anchor, tree, old, rollout, for_images, for_plans, scales, passes, last, config
):
    """Gradients of one group, the graph cut at the prompt's keys and values. Fills `old` where it is None.

    passes: of all processes alike; one with fewer batches repeats its last one with weight 0. last: of this step.
    """
    (shared, found), (scale, text_scale, clip_range) = tree, scales
    shared, health, anchors = shared.to(processes.device()), [], [None] * len(found)
    if anchor is not None:  # before any graph is built, since the weights are exchanged
        with sharding.exchanged(model, anchor), sharding.gathered(model):
            context = model.keys_and_values(shared)
            anchors = [policy(model, context, batch, config) for batch in found]
    sharding.sum_gradients(model, config.sum_every_pass)
    context = model.keys_and_values(shared)
    leaves = [tuple(x.detach().requires_grad_(x.requires_grad) for x in pair) for pair in context]
    for i in range(passes):
        batch = found[min(i, len(found) - 1)]
        new = policy(model, leaves, batch, config)
        if i >= len(found):
            (new.log_prob.sum() * 0).backward()
            continue
        old[i] = old[i] or new.old(config.guard)
        ratio = likelihood_ratio(new, old[i], batch, config)
        loss = clipped(ratio, for_images[batch.members][:, None].to(ratio), clip_range)  # (B, S)
        if config.guard:
            loss = loss / (rollout.times[:-1] - rollout.times[1:]).to(loss)
        loss, kl = loss.sum() * scale, divergence(new, anchors[i], batch, config)
        total = loss + config.kl_beta * kl * ratio.numel() * scale
        if config.train_text:
            total = total + text_scale * text_loss(new, old[i], batch, rollout, for_plans, config)
        total.backward()
        health.append(
            {
                "plans": batch.plans,
                "loss": loss.item(),
                "kl": kl.item(),
                "ratio": ratio.detach().flatten(),
            }
        )
    pairs = [
        (x, leaf.grad)
        for kept, own in zip(context, leaves)
        for x, leaf in zip(kept, own)
        if leaf.grad is not None
    ]
    sharding.sum_gradients(model, config.sum_every_pass or last)
    if pairs:
        torch.autograd.backward(*zip(*pairs))
    return health


def divergence(new, anchor, batch, config):
    """KL of the policy to the stage 1 model, in the form asked for, a mean over the batch; 0 without an anchor."""
    if anchor is None:
        return torch.zeros((), device=new.v.device)
    if config.kl == "velocity":
        return flow.velocity_mse(new.v, anchor.v)
    image_of_token = batch.image_of_token.to(new.v.device)
    return flow.kl_divergence(
        new.mean, anchor.mean, new.std, image_of_token, new.log_prob.numel()
    ).mean()


def summary(health, norms, plans_per_update, clip_range):
    """The logged numbers of one update phase, from those of its batches."""
    number = [int(one["plans"][0]) // plans_per_update for one in health]  # of the optimiser step
    first = torch.cat([one["ratio"] for one, i in zip(health, number) if i == 0])
    last = torch.cat([one["ratio"] for one, i in zip(health, number) if i == number[-1]])
    return {
        "loss": sum(one["loss"] for one in health) / len(norms),
        "kl": sum(one["kl"] for one in health) / len(health),
        "ratio_first_min": first.min().item(),
        "ratio_first_mean": first.mean().item(),
        "ratio_first_max": first.max().item(),
        "ratio_last": last.mean().item(),
        "clip_high": (last > 1 + clip_range).float().mean().item(),
        "clip_low": (last < 1 - clip_range).float().mean().item(),
        "clip_range": clip_range,
        "grad_norm": sum(norms) / len(norms),
    }


# ---------------------------------------------------------------------------------------------------------------------
# the whole stage


def plan_shape(config):
    """The model's shape where there is no checkpoint yet: the one of that name in model.py, or BAGEL's."""
    return ModelConfig(**MODELS.get(config.config, {}))


def build(config):
    """(model, tokenizer, {name: trained parameter}) from the checkpoint of stage 1, sharded over the processes."""
    folder = find_model(config.init)

    def change(model):
        if config.train == "lora":
            add_lora(model, config.lora_rank, config.lora_alpha)
        trained_parameters(model, config.train)
        for parameter in model.parameters():
            if not parameter.requires_grad:  # what is not trained needs no float32
                parameter.data = parameter.data.to(getattr(torch, config.precision))
        sharding.shard(model, config.precision, config.replicas)

    model = load_weights(folder, load_config(folder), processes.device(), prepare=change)
    reset_lora(model, config.seed)
    model.checkpointing = config.checkpointing
    return model, load_tokenizer(folder), trained_parameters(model, config.train)


@exit_on_user_error()
def train(config):
    """The whole stage: prepares, resumes, trains, and compares stage 2 with stage 1 on held-out prompts."""
    begun = time.perf_counter()
    if config.plan:
        memory.print_plan(
            config,
            load_config(find_model(config.init))
            if Path(config.init).exists()
            else plan_shape(config),
        )
        return
    with exit_on_user_error(ValueError):
        processes.launch(config.timeout_minutes)
        folder = loop.start(config)
        each = processes.share(
            config.prompts_per_step, "prompts a step", "prompts_per_step", config.updates
        )
        step = state.newest_step(folder)
        steps = loop.last_step(folder, step, config)
        prepare(config)
        source = open_source(config.data, config.seed + 1, config.max_references, config.scale)
        model, tokenizer, trained = build(config)
        clip = Clip(config.clip_name, config.clip, processes.device())
    layout = model.config.layout(tokenizer)
    anchor = {name: p.detach().clone() for name, p in trained.items()} if config.kl_beta else None
    optimizer = torch.optim.AdamW(
        trained.values(), config.lr, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    average = state.new_average(trained) if config.average else {}
    if step:
        state.load_state(folder, step, trained, optimizer, average)
    loop.cut_log(folder, step)
    pictures = config.prompts_per_step * config.group_size
    processes.say(
        f"grpo: {config.prompts_per_step} prompts x {config.group_size} members = {pictures} pictures a step, {each} "
        f"prompts on each of {processes.size()} processes, RID {'on' if config.rid else 'off'}, {describe_backend()}, "
        f"step {step} of {config.steps}"
    )
    stop, saver, bad = loop.Stop(), state.Saver(folder, config.keep, config.async_save), 0
    first = step
    bar = tqdm(
        range(step, steps),
        initial=step,
        total=config.steps,
        desc="grpo",
        disable=None if processes.is_main() else True,
    )
    for step in bar:
        values, finite = iteration(
            model, anchor, optimizer, layout, tokenizer, clip, source, config, step
        )
        bad = 0 if finite else bad + 1
        if bad == loop.BAD_STEPS:
            loop.give_up(folder, step, {"values": values, "samples": sample_indices(config, step)})
        if average and finite:
            state.update_average(average, trained, config.average)
        values = processes.merged(values)
        loop.log(folder, values)
        bar.set_postfix(reward=f"{values['reward']:.3f}")
        saver.poll()
        last, wanted = step + 1 == config.steps, stop.wanted()
        if (step + 1) % config.save_every == 0 or last or wanted:
            saver.save(step + 1, state.pack_state(trained, optimizer, average))
        if wanted and not last:
            saver.wait()
            loop.stop_here(step + 1)
        if (step + 1) % config.sample_every == 0:
            metrics.save_strip(
                folder,
                step + 1,
                model,
                layout,
                tokenizer,
                config,
                config.eval_data,
                side=config.picture_side,
                shift=config.timestep_shift,
                num_timesteps=config.eval_timesteps,
            )
    saver.wait()
    processes.say(
        f"grpo: {loop.seconds(begun)} in this command{loop.pace(folder, first, model, config.precision)}"
    )
    export(model, average, tokenizer, folder, config)
    if processes.is_main() and not config.export:
        gain = compare_stages(config, folder)
        processes.say(
            f"grpo: {loop.seconds(begun)} with the table; model in {folder}/model, pictures in {folder}/grid.png"
        )
        if config.target is not None and gain < config.target:
            print(
                f"Overall rose by {gain:.3f}, less than the target of {config.target}",
                file=sys.stderr,
            )
            sys.exit(1)


def export(model, average, tokenizer, folder, config):
    """The finished model in BAGEL's layout: what was trained (or its average), adapters merged, and the rest."""
    everything = dict(model.named_parameters()) | average
    weights = sharding.whole_weights(
        merge_lora(everything, config.lora_rank, config.lora_alpha),
        getattr(torch, config.precision),
    )
    if processes.is_main():
        save_model(model, tokenizer, folder / "model", weights)
    processes.barrier()


def sample_indices(config, step):
    """Numbers of the samples whose groups this process rolls out; the first of them are for the first update."""
    return list(
        range(
            step * config.prompts_per_step + processes.rank(),
            (step + 1) * config.prompts_per_step,
            processes.size(),
        )
    )


def iteration(model, anchor, optimizer, layout, tokenizer, clip, source, config, step):
    """One rollout and its updates. Returns the line of the log, and whether all gradients were finite."""
    clock = [(time.perf_counter(), model.tokens)]
    indices = sample_indices(config, step)
    samples = [source[i] for i in indices]
    with sharding.gathered(model):
        rollout = sample_groups(model, layout, tokenizer, samples, indices, config, step)
    clock.append((time.perf_counter(), model.tokens))
    truncated = clip.truncated
    reward = rewards(clip, rollout, config).cpu()
    clock.append((time.perf_counter(), model.tokens))
    health, finite = update(model, anchor, optimizer, layout, rollout, reward, config)
    clock.append((time.perf_counter(), model.tokens))
    seconds, tokens = ([b - a for a, b in zip(values, values[1:])] for values in zip(*clock))
    of_plan = reward.view(len(reward), config.plans_per_group, -1)  # (P, J, pictures)
    words = [len(caption.split()) for caption in rollout.captions if caption]
    return {
        "step": step,
        "reward": reward.mean().item(),
        "reward_std": reward.std(1, correction=0).mean().item(),
        "reward_std_between": of_plan.mean(2).std(1, correction=0).mean().item(),
        "reward_std_within": of_plan.std(2, correction=0).mean().item(),
        "dead_groups": (reward == reward[:, :1]).all(1).float().mean().item(),
        "parse_failures": (~rollout.valid).float().mean().item(),
        "caption_words": sum(words) / max(1, len(words)),
        "truncated": clip.truncated - truncated,
        **health,
        "skipped": float(not finite),
        "rollout_seconds": seconds[0],
        "reward_seconds": seconds[1],
        "update_seconds": seconds[2],
        "rollout_tokens": tokens[0],
        "update_tokens": tokens[2],
    }, finite


def compare_stages(config, folder):
    """The table: stage 1 and stage 2 on the same prompts from the same noise, and a grid of pictures.

    Returns by how much Overall rose.
    """
    metric = metric_clip(config.metric_name, config.metric, config.clip_steps)
    samples = metrics.test_samples(
        config.eval_data, config.eval_samples, config.max_references, scale=config.scale
    )
    rows = {}
    for name, path in (("SFT", config.init), ("SFT + GRPO", folder)):
        model, tokenizer = load_model(path, processes.device())
        results = engine.generate(
            model,
            model.config.layout(tokenizer),
            tokenizer,
            samples,
            side=config.picture_side,
            shift=config.timestep_shift,
            num_timesteps=config.eval_timesteps,
        )
        rows[name] = metrics.measure(samples, results, metric)
    metrics.save_grid(folder / "grid.png", samples[:8], results[:8])
    files.write_text(folder / "table.json", json.dumps(rows, indent=1) + "\n")
    metrics.print_table(rows)
    return rows["SFT + GRPO"]["Overall"] - rows["SFT"]["Overall"]


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
