"""
Stage 2, reasoning-generation alignment (RGA): GRPO, so that pictures match their plans.

For each prompt a group of G members is sampled. With RID, reasoning-induced diversity, every member
writes its own plan; without it one plan serves the group (`images_per_cot`). A member's reward
compares its picture with its own caption, CLIP-L2 (reward.py):

    r_i      = -|| CLIP(picture_i) - CLIP(caption_i) ||_2    no plan that parses: the group's lowest
    A_i      = (r_i - mean r) / max(std r, std_floor)        over the group, clamped; all equal: 0
    ratio_ik = exp(log p_new - log p_old)                    of score k of member i
    L        = mean_ik max(-A_i ratio_ik, -A_i clip(ratio_ik, 1 - eps, 1 + eps))
               + kl_beta mean |v - v_stage1|^2               (+ the same surrogate over the tokens
                                                             of the plans, with `train_text`)

At ratio 1 the gradient is that of -mean A_i log p_new: the policy gradient. What a score is,
`likelihood` says (flow.py); both are means over the T C values of a picture, and
eps = clip_kappa / sqrt(T C).

    sde        the paper's: a window of S steps of the denoising is stochastic, and a score is
               log p(x_{k+1} | x_k),  x_{k+1} ~ Normal(mean(x_k, v), std^2)
    forward    the finished picture x0 is noised again at S times t, with noise and times that its
               group shares: (1 - t) x0 + t noise, whose velocity should be noise - x0. A score is
               minus the squared error of the velocity; all steps are the sampler's own

One iteration, in the order of this file: `roll_out`, rewards, `advantages`, `update` by
`objective`, over the tree that was sampled (tree.py): prompt | branch a plan | leaf a scored
picture. What is random in a group depends on the seed, the number of its sample and the member
alone (the window on the step), so a step comes out the same however groups are shared out. A group
is never spread over processes: `prompts_per_step` is a multiple of their number.

Plan tokens get no policy gradient unless `train_text` asks for it: the caption is the target of the
reward, and easy captions would win. (With train=all the expert that writes moves all the same, by
the gradient of the pictures through the plans' keys and values.) The KL needs no second model:
weights are exchanged for what they were. Differences from the paper: docs/PAPER.md.
Letters: sequence.py. Left out: trees that fork within the denoising, replay, entropy bonuses.

    python grpo.py --config toy        trains what it needs first; the same command again resumes
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch

import flow
import iccot
import tree
from data import open_source
from engine import Branch, Engine, Group, Sampler, Thinking, draw_noise
from kernels.attention import describe_backend
from reward import Clip, group_rewards, reward_statistics
from runtime import accountant, loop, processes, sharding
from runtime.config import exit_on_user_error, parse
from runtime.lora import load_trained, trained_parameters
from runtime.pretrained import shape_of
from runtime.state import TrainingState, new_average, newest_step
from studies.curves import save_story, save_strip
from studies.metrics import HeldOut, compare_checkpoints, measured_together
from toy import world
from toy.prepare import find_stage_1, metric_clip_of_all, prepare
from tree import Rollout

SCORED_TIMES = 3  # at which a finished picture is noised again
MAX_ADVANTAGE = 5.0
TEXT_CLIP_RANGE = 0.2
PLANS, WINDOW, NOISES, STARTS, SCORES = 1, 2, 3, 4, 5  # purposes of a group's random numbers

# --------------------------------------------------------------------------------------------------
# options


@dataclass(frozen=True)
class Config(loop.Options):
    # fmt: off
    MAY_CHANGE: ClassVar[tuple] = (
        *loop.Options.MAY_CHANGE, "eval_data", "eval_samples", "pictures_at_once",
    )
    # fmt: on

    config: str = ""  # name of the preset; stage 1 is trained with the same one
    init: str = "out/full-sft"  # checkpoint of stage 1; the model's shape comes from it
    # rollout
    prompts_per_step: int = 16  # groups; 512 pictures an update (Flow-GRPO: 384 to 576)
    updates: int = 1  # optimiser steps an iteration, each on its share of the groups
    group_size: int = 32  # members of a group (paper)
    images_per_cot: int = 1  # pictures of each plan; 1: RID; 0: one plan a group, without RID
    cot_temperature: float = 1.0  # of the plans
    max_plan_tokens: int = 256
    num_timesteps: int = 17  # grid points; one more than denoising steps
    timestep_shift: float = 3.0
    likelihood: Literal["sde", "forward"] = "forward"  # of steps taken, of the finished picture
    scored_shift: float = 3.0  # forward: time shift of the scored times, logit-normal as in stage 1
    window: int = 3  # sde: stochastic steps of a rollout, which are the trained ones
    window_end: float = 0.5  # sde: the window lies in this first share of the steps, never the last
    text_guidance: float = 1.0  # of rollouts and updates alike; 1: off
    image_guidance: float = 1.0
    # objective
    std_floor: float = 0.003  # of the rewards of a group
    clip_kappa: float = 0.025  # clip range times sqrt(T C)
    kl_beta: float = 0.3  # weight of the KL to the stage 1 model
    train_text: bool = False  # policy gradient on the plans too, with their mean reward
    # optimisation
    steps: int = 200  # iterations of rollout and update (paper)
    lr: float = 1e-5  # between R3's 5e-6 and UniGRPO's 3e-5
    average: float = 0.9  # decay of the moving average of the weights, which is saved; 0: off
    # memory, not the result
    pictures_at_once: int = 4  # painted in the same passes: of one group, or of several whole ones
    tokens_per_pack: int = 37_888  # in one pass of an update, at most: nine pictures of 1024 pixels
    # run; more, and the machine, in runtime/loop.py
    clip: str = "ViT-L-14:openai"  # the reward's CLIP: architecture:weights, or a folder (toys)
    eval_data: str = ""  # prompts of strips and tables, held out: toy, or samples on disk; "": data
    eval_samples: int = 200  # how many
    eval_timesteps: int = 50
    out: str = "out/full-grpo"

    def __post_init__(self):
        super().__post_init__()
        loop.positive(
            prompts_per_step=self.prompts_per_step,
            updates=self.updates,
            pictures_at_once=self.pictures_at_once,
            tokens_per_pack=self.tokens_per_pack,
            eval_samples=self.eval_samples,
            scored_shift=self.scored_shift,
        )
        loop.not_negative(
            images_per_cot=self.images_per_cot,
            lr=self.lr,
            kl_beta=self.kl_beta,
            std_floor=self.std_floor,
        )
        loop.decays(average=self.average)
        _ = self.sampler, self.thinking  # they check their own values
        if self.prompts_per_step % self.updates:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} must be a multiple of "
                f"updates={self.updates}"
            )
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: advantages compare the members of a group; "
                f"use at least 2"
            )
        if self.group_size % self.pictures_per_plan:
            raise ValueError(
                f"images_per_cot={self.images_per_cot} must divide group_size={self.group_size}"
            )
        if self.likelihood == "sde" and (self.window < 1 or last_window_start(self) < 0):
            raise ValueError(
                f"window={self.window} does not fit into the first window_end={self.window_end} of "
                f"{self.num_timesteps - 1} denoising steps"
            )
        if self.train_text and (self.cot_temperature != 1 or self.train != "all"):
            raise ValueError(
                "train_text needs cot_temperature=1, the distribution whose gradient it takes, "
                "and train=all"
            )

    @property
    def scores(self):
        """S, noised pictures that the update scores of each member."""
        return self.window if self.likelihood == "sde" else SCORED_TIMES

    @property
    def pictures_per_plan(self):
        return self.images_per_cot or self.group_size

    @property
    def plans_per_group(self):
        """J: with RID as many as members, without it one."""
        return self.group_size // self.pictures_per_plan

    @property
    def sampler(self):
        return Sampler(
            self.num_timesteps, self.timestep_shift, self.text_guidance, self.image_guidance
        )

    @property
    def thinking(self):
        return Thinking(self.max_plan_tokens, self.cot_temperature)

    @property
    def held_out(self):
        """Prompts of the final table and of the strips, with the guidance of the rollouts."""
        return HeldOut(
            data=self.eval_data or self.data,
            count=self.eval_samples,
            max_references=self.max_references,
            side=self.picture_side,
            sampler=replace(self.sampler, num_timesteps=self.eval_timesteps),
            thinking=Thinking(self.max_plan_tokens),
            batch=self.eval_batch,
        )


# fmt: off
TOY = dict(
    data="toy", clip="out/toy-clip-reward", metric="out/toy-clip-metric", scored_shift=5.0,
    average=0.0, num_timesteps=7, timestep_shift=10.0, lr=2e-4, std_floor=0.02, eval_timesteps=7,
    max_plan_tokens=72, picture_side=world.SIZE, pictures_at_once=1000, tokens_per_pack=8192,
    checkpointing=False, precision="float32", eval_batch=50,
)
SMOKE = dict(clip="out/smoke-clip-reward", metric="out/smoke-clip-metric")
PRESETS = {
    "toy": TOY | dict(
        init="out/toy-sft", group_size=8, steps=20, out="out/toy-grpo", save_every=5,
    ),
    "smoke": TOY | SMOKE | dict(
        init="out/smoke-sft", prompts_per_step=8, group_size=4, cot_temperature=0.1, steps=2,
        eval_samples=16, out="out/smoke-grpo", save_every=1,
    ),
    "small": TOY | dict(  # one data-centre GPU, after sft.py --config small
        init="out/small-sft", picture_side=64, group_size=24, lr=1e-4, precision="bfloat16",
        out="out/small-grpo",
    ),
    "rehearsal": SMOKE | dict(  # the shapes of full on thin weights, 512 x 512; guided
        data="toy", init="out/rehearsal-sft", picture_side=512, prompts_per_step=4, group_size=4,
        num_timesteps=5, text_guidance=4.0, image_guidance=2.0, steps=2, eval_samples=4,
        eval_timesteps=5, precision="float32", save_every=1, out="out/rehearsal-grpo",
    ),
    "full": dict(),  # the efficient recipe
    "paper": dict(  # published: group_size, steps, lr, 50 steps; window and guidance ours
        likelihood="sde", lr=1e-6, kl_beta=0.0, average=0.0, num_timesteps=51, window=25,
        window_end=1.0, text_guidance=4.0, image_guidance=2.0, clip_kappa=0.05,
        out="out/paper-grpo",
    ),
}
# fmt: on

# --------------------------------------------------------------------------------------------------
# rollout


def roll_out(engine, samples, numbers, config, step):
    """The Rollout of a group for each sample, under the current weights.

    numbers: of the samples, which the random numbers of their groups depend on.
    """
    grid = engine.model.config.picture_grid(config.picture_side, config.picture_side)
    scored = (config.scores, len(samples), config.group_size)  # (S, P, G)
    tokens, channels = grid[0] * grid[1], engine.model.config.token_channels
    rollout = Rollout(
        prompts=[engine.prompt(sample.references, sample.instruction) for sample in samples],
        plans=[],
        captions=[],
        ended=[],
        images=[],
        grid=grid,
        x=torch.empty(*scored, tokens, channels),
        target=torch.empty(*scored, tokens, channels),
        t=torch.empty(scored[:2]),
        t_next=torch.empty(scored[:2]),
        log_prob=torch.empty(*scored[1:], config.scores),
    )
    groups_at_once = max(1, config.pictures_at_once // config.group_size)
    for first in range(0, len(samples), groups_at_once):
        groups = slice(first, first + groups_at_once)
        references = [len(sample.references) for sample in samples[groups]]
        roll_out_together(engine, rollout, groups, numbers[groups], references, config, step)
    return rollout


def roll_out_together(engine, rollout, groups, numbers, references, config, step):
    """Fill in these groups (a slice) of a rollout, in the same forward passes.

    references: how many each group's prompt has.
    """
    prompts = rollout.prompts[groups]
    prefix = engine.prefill(prompts)
    plans, ended = engine.think(
        prompts,
        config.thinking,
        count=config.plans_per_group,
        generators=[
            processes.generator(config.seed, number, PLANS, plan)
            for number in numbers
            for plan in range(config.plans_per_group)
        ],
        prefix=prefix,
    )
    final = paint_groups(engine, rollout, groups, numbers, plans, prefix, config, step)
    del prefix  # the codec needs memory too
    rollout.plans += plans
    rollout.ended += ended
    for plan, text in enumerate(map(engine.tokenizer.decode, plans)):
        valid = iccot.is_valid(text, references[plan // config.plans_per_group])
        rollout.captions.append(iccot.parse(text).caption if valid else "")
    rollout.images += engine.pictures(final, [rollout.grid] * len(final))


def paint_groups(engine, rollout, groups, numbers, plans, prefix, config, step):
    """The final latents (P * G, T, C) of these groups, on the device; fills in what is scored.

    plans: token ids, J of each group.
    """
    window = draw_window(config, step) if config.likelihood == "sde" else None
    members_at_once = min(config.group_size, config.pictures_at_once)
    parts = []  # (P, members, T, C) each
    for first in range(0, config.group_size, members_at_once):
        members = range(first, min(first + members_at_once, config.group_size))
        asked = []  # a Group of each prompt, with the branches of these members
        for group, number in enumerate(numbers):
            branches = []
            for member in members:
                start = engine.start(
                    rollout.grid, processes.generator(config.seed, number, STARTS, member)
                )
                plan = plans[group * config.plans_per_group + member // config.pictures_per_plan]
                branches.append(Branch(plan, (start,)))
            asked.append(Group(rollout.prompts[groups][group], rollout.grid, tuple(branches)))
        step_of_window = None
        if window is not None:
            step_of_window = sde_in_window(
                engine, rollout, groups, numbers, members, window, config
            )
        x = engine.paint(asked, config.sampler, step=step_of_window, prefix=prefix)
        parts.append(x.view(len(numbers), len(members), *rollout.x.shape[3:]))
    final = torch.cat(parts, 1)  # (P, G, T, C)
    if window is None:
        noise_again(rollout, groups, numbers, final.cpu(), config)
    else:
        rollout.t[:, groups] = window.times[:-1, None]
        rollout.t_next[:, groups] = window.times[1:, None]
    return final.flatten(0, 1)


def sde_in_window(engine, rollout, groups, numbers, members, window, config):
    """A step for `engine.paint`: stochastic inside the window, where it is kept for the update."""
    pictures = len(numbers) * len(members)
    tokens, channels = rollout.x.shape[3:]
    image_of_token = torch.arange(pictures, device=engine.device).repeat_interleave(tokens)
    noises = [
        processes.generator(config.seed, number, NOISES, member)
        for number in numbers
        for member in members
    ]
    columns = slice(members.start, members.stop)

    def step(k, x, v, *, t, t_next):
        if not window.first <= k < window.first + config.window:
            return flow.euler_step(x, v, t, t_next=t_next)
        noise = draw_noise([tokens] * pictures, channels, noises)  # (P * members * T, C)
        x_next, mean, std = flow.sde_step(x, v, t, t_next=t_next, noise=noise)
        log_prob = flow.log_prob(
            x_next, mean, std, image_of_token=image_of_token, images=pictures
        )  # (P * members,)
        shape, score = (len(numbers), len(members), tokens, channels), k - window.first
        rollout.x[score, groups, columns] = x.view(shape).cpu()
        rollout.target[score, groups, columns] = x_next.view(shape).cpu()
        rollout.log_prob[groups, columns, score] = log_prob.view(shape[:2]).cpu()
        return x_next

    return step


@dataclass(frozen=True)
class Window:
    """The stochastic steps first ... first + S - 1 of an iteration; times (S + 1,)."""

    first: int
    times: torch.Tensor


def last_window_start(config):
    """Last step at which the window may begin: it ends by `window_end`, before the last step."""
    steps = config.num_timesteps - 1
    return min(int(steps * config.window_end), steps - 1) - config.window


def draw_window(config, step):
    """The window of iteration `step`."""
    random = processes.generator(config.seed, step, WINDOW)
    first = int(torch.randint(last_window_start(config) + 1, (), generator=random))
    grid = flow.time_grid(config.num_timesteps, config.timestep_shift)
    return Window(first, grid[first : first + config.window + 1])


def noise_again(rollout, groups, numbers, x0, config):
    """forward: noise finished pictures x0 (P, G, T, C) at times and noises of their group."""
    x, target, t = rollout.x[:, groups], rollout.target[:, groups], rollout.t[:, groups]
    for group, number in enumerate(numbers):
        random = processes.generator(config.seed, number, SCORES)
        times = flow.sample_timesteps(SCORED_TIMES, config.scored_shift, random)  # (S,)
        noise = torch.randn(SCORED_TIMES, *x0.shape[2:], generator=random)  # (S, T, C)
        for score in range(SCORED_TIMES):
            x[score, group] = flow.interpolate(x0[group], noise[score], times[score])
            target[score, group] = flow.velocity(x0[group], noise[score])
        t[:, group] = times
    rollout.t_next[:, groups] = t


# --------------------------------------------------------------------------------------------------
# advantages


def group_advantage(reward, std_floor):
    """(P, G) -> (P, G): normalised within the group; exactly 0 where all of a group are equal."""
    equal = (reward == reward[:, :1]).all(1, keepdim=True)
    centred = reward - reward.mean(1, keepdim=True)
    std = reward.std(1, correction=0, keepdim=True)  # (P, 1)
    advantage = (centred / std.clamp_min(std_floor)).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
    return advantage.masked_fill(equal, 0)


def advantages(reward, config):
    """Rewards (P, G) -> advantages of the pictures (P * G,) and of the plans (P * J,).

    With several pictures a plan, pictures are compared with those of the same plan, so that an easy
    caption is no merit of theirs; plans are compared by their mean rewards (Dual-GRPO, 2601.10332).
    """
    rivals = reward  # (P, G)
    if config.pictures_per_plan > 1:
        rivals = reward.view(-1, config.pictures_per_plan)  # (P * J, pictures)
    of_plan = reward.view(len(reward), config.plans_per_group, -1).mean(2)  # (P, J)
    return (
        group_advantage(rivals, config.std_floor).flatten(),
        group_advantage(of_plan, config.std_floor).flatten(),
    )


# --------------------------------------------------------------------------------------------------
# objective


@dataclass
class Objective:
    """L of a batch and its parts."""

    total: torch.Tensor  # (), what is differentiated
    surrogate: torch.Tensor  # (), of the pictures alone
    kl: torch.Tensor  # (), mean over the batch
    ratio: torch.Tensor  # (I,)


def objective(new, old, anchor, *, advantage, scale, clip_range, kl_beta):
    """L of a batch of I scored pictures: a pure function of tensors.

    new, old, anchor: tree.Policy of the present weights, of those that sampled, and of the stage 1
    model (None without kl_beta). advantage (I,): A of the member of each; scale: 1 / (pictures *
    scores) of the optimiser step.
    """
    ratio = (new.log_prob - old.log_prob).exp()  # (I,)
    surrogate = clipped(ratio, advantage.to(ratio), clip_range).sum() * scale
    kl = torch.zeros((), device=new.v.device)
    if anchor is not None:
        kl = flow.velocity_mse(new.v, anchor.v)
    total = surrogate + kl_beta * kl * ratio.numel() * scale
    return Objective(total, surrogate, kl, ratio)


def clipped(ratio, advantage, clip_range):
    """The clipped surrogate loss of each ratio, to be averaged."""
    near = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * near)


def text_objective(new, old, batch, plan_advantage, scale):
    """With `train_text`: the surrogate over the plan tokens of a batch.

    scale: 1 / plan tokens of the optimiser step.
    """
    ratio, advantage = (new.text - old.text).exp(), plan_advantage[batch.token_plans].to(new.text)
    surrogate = clipped(ratio, advantage, TEXT_CLIP_RANGE)  # (labels,)
    return scale * (surrogate * batch.token_counts.to(surrogate)).sum()


# --------------------------------------------------------------------------------------------------
# update


@dataclass
class Learner:
    """The model behind the engine, and what its optimiser steps need."""

    engine: Engine
    state: TrainingState  # trained parameters, optimiser, average
    anchor: dict | None  # {name: value} of the trained weights in stage 1, for the KL


def update(learner, rollout, advantage, plan_advantage, config):
    """All optimiser steps of one iteration, each on its share of the groups.

    advantage (P * G,) of the pictures, plan_advantage (P * J,). The graph of a group is cut at the
    keys and values of its prompt (tree.py), so that a group of any size fits. p_old of the first
    optimiser step is what its own passes say before anything moves. Returns the numbers for the
    log, and whether all gradients were finite.
    """
    model, size = learner.engine.model, processes.size()
    groups = len(rollout.prompts)
    groups_of_step = groups // config.updates
    trees = [tree.plant(learner.engine.layout, rollout, group, config) for group in range(groups)]
    # all processes make as many passes: one with fewer batches repeats its last with weight 0
    passes = processes.reduced([len(planted.batches) for planted in trees], "max")
    old = [[] for _ in trees]  # of each group the Policy of each batch, before weights move
    for group in range(groups_of_step, groups):
        policies = tree.policies(model, trees[group], config)
        old[group] = [policy.detached() for policy in policies]
    values = math.prod(rollout.x.shape[3:])  # T C, of a picture
    clip_range = config.clip_kappa / values**0.5
    scale = 1 / (groups_of_step * config.group_size * config.scores)
    plan_tokens = rollout.written.view(config.updates, -1).sum(1).tolist()  # of each optimiser step
    objectives, norms = [], []  # of each optimiser step; all finite ones were made
    for number, text_tokens in enumerate(processes.reduced(plan_tokens)):
        objectives.append([])
        for group in range(number * groups_of_step, (number + 1) * groups_of_step):
            batches, anchors = trees[group].batches, None
            if learner.anchor is not None:  # before any graph is built: weights are exchanged
                with sharding.exchanged(model, learner.anchor):
                    anchors = tree.policies(model, trees[group], config)
            prompt, leaves = tree.cut_prompt(model, trees[group])
            for i in range(int(passes[group])):
                batch = batches[min(i, len(batches) - 1)]
                new = tree.policy(model, leaves, batch, config)
                if i >= len(batches):
                    new.zero().backward()
                    continue
                if i == len(old[group]):  # of the first optimiser step
                    old[group].append(new.detached())
                part = objective(
                    new,
                    old[group][i],
                    anchors and anchors[i],
                    advantage=advantage[batch.members],
                    scale=scale,
                    clip_range=clip_range,
                    kl_beta=config.kl_beta,
                )
                total = part.total
                if config.train_text:
                    total = total + text_objective(
                        new, old[group][i], batch, plan_advantage, size / text_tokens
                    )
                total.backward()
                objectives[-1].append(part)
            tree.backward_through(prompt, leaves)
        norms.append(sharding.step_if_finite(learner.state.optimizer, loop.MAX_GRAD_NORM))
    return summary(rollout, old, objectives, norms, clip_range, config)


def summary(rollout, old, objectives, norms, clip_range, config):
    """The logged numbers of an update, and whether all gradients were finite."""
    every = [part for step in objectives for part in step]
    ratio = torch.cat([part.ratio.detach() for part in objectives[-1]])
    health = {
        "loss": sum(part.surrogate.item() for part in every) / len(norms),
        "kl": sum(part.kl.item() for part in every) / len(every),
        "ratio_last": ratio.mean().item(),
        "clip_high": (ratio > 1 + clip_range).float().mean().item(),
        "clip_low": (ratio < 1 - clip_range).float().mean().item(),
        "clip_range": clip_range,
        "grad_norm": sum(norm for norm, _ in norms) / len(norms),
    }
    if config.likelihood == "sde":
        before = torch.cat([policy.log_prob for group in old for policy in group])  # (P * G * S,)
        seen = rollout.log_prob.flatten()  # (P * G * S,)
        health["mismatch"] = (before.cpu() - seen).abs().mean().item()
        health["mismatch_clip"] = health["mismatch"] / clip_range
    return health, all(finite for _, finite in norms)


# --------------------------------------------------------------------------------------------------
# the stage


def build(config):
    """The Learner that starts from the checkpoint of stage 1, sharded over the processes."""
    model, tokenizer = load_trained(config)
    trained = trained_parameters(model, config.train)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    anchor = new_average(trained) if config.kl_beta else None
    state = TrainingState(trained, optimizer, new_average(trained) if config.average else {})
    return Learner(Engine(model, tokenizer), state, anchor)


def own_numbers(step, references, config):
    """Numbers of a step's samples whose groups this process works on, those of its first update
    first.

    references(number): how many a sample has. They decide how long a group takes, so those of an
    update are dealt by them, and where that leaves several to a process it begins with its longest.
    """
    numbers, of_update = [], config.prompts_per_step // config.updates
    for update_number in range(step * config.updates, (step + 1) * config.updates):
        of_all = range(update_number * of_update, (update_number + 1) * of_update)
        numbers += processes.dealt(of_all, references, processes.size())[processes.rank()]
    return numbers


class Meter(NamedTuple):
    """Where an iteration is: wall seconds, tokens that went through the blocks, with gradients."""

    seconds: float
    tokens: int
    trained: int


def meter(model):
    return Meter(time.perf_counter(), model.tokens, model.trained_tokens)


def begin(config):
    """What the run needs, made if it is missing: its folder, samples, Learner, the CLIPs of reward
    and metric."""
    with exit_on_user_error(ValueError):
        processes.launch()
        with processes.first_alone():
            find_stage_1(config)  # or the folder would belong to a mistyped --init
        processes.share(
            config.prompts_per_step, "prompts a step", "prompts_per_step", parts=config.updates
        )
        source = open_source(  # before there is a folder
            config.data, config.seed + 1, config.max_references, scale=config.scale
        )
        folder = loop.start(config, PRESETS.get(config.config, {}))
        loop.last_step(folder, newest_step(folder), config)
        prepare(config)
        learner = build(config)
        with processes.first_alone():
            clip = Clip(config.clip, processes.device())
        metric = metric_clip_of_all(config) if config.eval_every else None
    return folder, source, learner, clip, metric


@exit_on_user_error()
def train(config):
    """The whole stage: prepares, resumes, trains, and compares stage 2 with stage 1, held out."""
    begun = time.perf_counter()
    if config.memory:
        default = PRESETS.get(config.config, {}).get("init", Config.init)
        accountant.dry_run(
            accountant.walk_grpo, config, shape_of(config.init, config.config, default)
        )
        return
    folder, source, learner, clip, metric = begin(config)
    engine, model = learner.engine, learner.engine.model
    run = loop.Run(folder, config, learner.state, desc="grpo")
    pictures = config.prompts_per_step * config.group_size
    processes.say(
        f"grpo: {config.prompts_per_step} prompts x {config.group_size} members = {pictures} "
        f"pictures a step on {processes.size()} processes, {config.pictures_per_plan} to a plan, "
        f"{describe_backend()}, step {run.first} of {config.steps}"
    )
    for step in run.steps():
        numbers, truncated = own_numbers(step, source.references, config), clip.truncated
        started = meter(model)
        samples = [source[number] for number in numbers]
        with sharding.gathered(model):
            rollout = roll_out(engine, samples, numbers, config, step)
        rolled_out = meter(model)
        reward = group_rewards(
            clip, rollout.images, rollout.captions, groups=len(samples)
        )  # (P, G)
        advantage, plan_advantage = advantages(reward, config)  # (P * G,), (P * J,)
        rewarded = meter(model)
        health, finite = update(learner, rollout, advantage, plan_advantage, config)
        updated = meter(model)
        words = [len(caption.split()) for caption in rollout.captions if caption]
        values = {
            "step": step,
            **reward_statistics(reward, config.plans_per_group),
            "parse_failures": 1 - len(words) / len(rollout.captions),
            "caption_words": sum(words) / max(1, len(words)),
            "truncated": clip.truncated - truncated,
            **health,
            "skipped": float(not finite),
            "rollout_seconds": rolled_out.seconds - started.seconds,
            "reward_seconds": rewarded.seconds - rolled_out.seconds,
            "update_seconds": updated.seconds - rewarded.seconds,
            "rollout_tokens": rolled_out.tokens - started.tokens,
            "update_tokens": updated.tokens - rewarded.tokens,
            "trained_tokens": updated.trained - rewarded.trained,
        }
        if run.measurement_is_due(step):
            values |= measured_together(engine, config.held_out, metric)
        run.end_step(step, values, finite=finite, decay=config.average, samples=numbers)
        if run.state_is_due(step):
            save_strip(folder, step + 1, engine, held_out=config.held_out)
    processes.say(f"grpo: {loop.seconds(begun)} in this command{run.pace()}")
    run.export(engine)
    save_story(folder)
    del engine, model, learner, run, clip, metric  # the table needs the memory
    if not config.export:
        compare(config, folder, begun)


def compare(config, folder, begun):
    """The table of stage 1 and stage 2, and the grid; all processes paint their share."""
    metric, score = metric_clip_of_all(config), None
    if processes.is_main():
        score = Clip(config.clip).score
    compare_checkpoints(
        {"SFT": config.init, "SFT + GRPO": folder},
        config.held_out,
        metric,
        folder=folder,
        held_as=(config.precision, config.weights),
        score=score,
    )
    written = f"model in {folder}/model, pictures in {folder}/grid.png, curves.png"
    processes.say(f"grpo: {loop.seconds(begun)} with the table; {written}")


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
    processes.finish()
