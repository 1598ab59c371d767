"""
The rollout of GRPO: what the groups of a step sample, and which process samples what.

    prompt | branch a plan | leaf a picture      (in all guidance contexts)

The prompt of a group is computed once into a KV cache, plans are decoded as its branches, pictures
are painted behind them. `likelihood` decides what the update scores of a picture (flow.py):

    sde        the steps of a window of the denoising, which are stochastic; each of them keeps
               x_k,  x_{k+1} ~ Normal(mean(x_k, v), std^2),  log p(x_{k+1} | x_k)
    forward    the finished picture x0. All steps are the sampler's own, none is kept. S times t and
               noises, the same for all members of a group, say where x0 is noised again:
               (1 - t) x0 + t noise, whose velocity should be noise - x0

`tree.plant` packs the same tree for the update. What is random depends on the seed, the number of
the group's sample, and the member alone (the window on the step), so a step comes out the same
however it is shared out.
Members stand group by group, plan by plan. `config` is grpo.Config, of which `Options` says what
matters here. Letters: sequence.py. Left out: trees that fork within the denoising.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

import flow
import iccot
from engine import Branch, Group, Sampler, Thinking, draw_noise
from runtime.processes import dealt, generator, joined, rank, share, size

LISTS = ("prompts", "plans", "captions", "images")  # of a Rollout
PLANS, WINDOW, NOISES, STARTS, SCORES = 1, 2, 3, 4, 5  # purposes of a group's random numbers


# --------------------------------------------------------------------------------------------------
# what this process does


@dataclass(frozen=True)
class Share:
    """The groups of a step that this process works on, and which of their members.

    Processes 0 to ranks - 1 share their groups, and so on; each has as many members of every one.
    """

    ranks: int  # processes to a group
    part: int  # of this process among them
    config: object  # the grpo.Config of this part: its group_size are the members here

    @property
    def first(self):
        """The first member here."""
        return self.part * self.config.group_size

    def numbers(self, step, references):
        """Numbers of this step's samples whose groups this process works on; those of the first
        update come first.

        references(number): how many a sample has. They decide how long a group takes, so those of
        an update are dealt by them, and where that leaves several to a process it begins with its
        longest.
        """
        each, own = self.config.prompts_per_step // self.config.updates, []
        for update in range(step * self.config.updates, (step + 1) * self.config.updates):
            some = range(update * each, (update + 1) * each)
            own += dealt(some, references, size() // self.ranks)[rank() // self.ranks]
        return own

    def whole_groups(self, e, u, valid):
        """Results of reward.embed_groups, gathered from the processes that share a group."""
        if self.config.rid:  # otherwise the one plan of a group is on all its processes
            u, valid = joined(u, self.ranks, 1), joined(valid, self.ranks, 1)
        return joined(e, self.ranks, 1), u, valid

    def own_members(self, images, plans):
        """Of one number a picture (P * G,) and one a plan (P * J,), those of the members here."""
        members = self.config.group_size
        images = images.view(-1, self.ranks, members)[:, self.part].flatten()
        if self.config.rid:
            plans = plans.view(-1, self.ranks, self.config.plans_per_group)[:, self.part].flatten()
        return images, plans


def share_of(config, among=None):
    """The Share of this process: whole groups, or if there are too few, members of them.

    As few processes to a group as make all of them work alike; each needs two members at least, and
    whole plans. UserError if nothing divides. among: so many processes, not those there are.
    """
    prompts, parts, ranks, among = config.prompts_per_step, config.updates, 1, among or size()
    if prompts % (among * parts):
        for ranks in range(2, among + 1):
            members, rest = divmod(config.group_size, ranks)
            if among % ranks or prompts * ranks % (among * parts) or rest:
                continue
            if members >= 2 and members % config.images_per_cot == 0:
                break
        else:  # cannot be shared
            share(prompts, "prompts a step", "prompts_per_step", parts=parts, among=among)
    members = config.group_size // ranks
    return Share(ranks, rank() % ranks, replace(config, group_size=members))


# --------------------------------------------------------------------------------------------------
# rollout


@dataclass(frozen=True)
class Options:
    """The options of grpo.py that say what is sampled, and how it is packed."""

    prompts_per_step: int = 16  # groups; 512 pictures an update (Flow-GRPO: 384 to 576)
    updates: int = 1  # optimiser steps an iteration, each on its share of the groups
    group_size: int = 32  # members of a group (paper)
    rid: bool = True  # every member writes its own plan; false: one plan a group
    images_per_cot: int = 1  # pictures of each plan; above 1 they compete with each other only
    cot_temperature: float = 1.0  # of the plans
    max_plan_tokens: int = 256
    picture_side: int = 1024  # pixels of the square pictures, before the codec's resize rule
    num_timesteps: int = 17  # grid points; one more than denoising steps
    timestep_shift: float = 3.0
    same_start: bool = False  # all members of a group start from the same noise
    likelihood: Literal["sde", "forward"] = "forward"  # of steps taken, of the finished picture
    scored_times: int = 3  # forward: times at which a picture is noised again
    scored_shift: float = 3.0  # forward: their time shift; logit-normal as in stage 1
    sde: Literal["flow", "cps"] = "flow"  # sde: how a step is made stochastic (flow.py)
    noise_level: float = 0.7  # sde: a of the equations (Flow-GRPO); for cps 0.8
    window: int = 3  # sde: stochastic steps of a rollout, which are the trained ones
    window_end: float = 0.5  # sde: the window lies in this first share of the steps, never the last
    text_guidance: float = 1.0  # of rollouts and updates alike; 1: off
    image_guidance: float = 1.0
    train_text: bool = False  # policy gradient on the plans too, with their mean reward
    # memory, not the result
    groups_at_once: int = 1  # rolled out in the same passes
    pictures_at_once: int = 4  # of each of them painted in the same passes
    tokens_per_pack: int = 37_888  # in one pass of an update, at most: nine pictures of 1024 pixels

    def __post_init__(self):
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
        if self.likelihood == "sde" and (self.window < 1 or last_window_start(self) < 0):
            raise ValueError(
                f"window={self.window} does not fit into the first window_end={self.window_end} of "
                f"{self.num_timesteps - 1} denoising steps"
            )
        if self.group_size % self.images_per_cot or (self.images_per_cot > 1 and not self.rid):
            raise ValueError(
                f"images_per_cot={self.images_per_cot} must divide group_size={self.group_size}, "
                f"with rid on"
            )
        if self.likelihood == "sde" and self.noise_level <= 0:
            raise ValueError(f"noise_level={self.noise_level}: steps without noise have no density")
        if self.scored_times < 1 or self.scored_shift <= 0:
            raise ValueError(
                f"scored_times={self.scored_times}, scored_shift={self.scored_shift}: at least one "
                f"time, and a shift above 0"
            )

    @property
    def scores(self):
        """S, noised pictures that the update scores of each member."""
        return self.window if self.likelihood == "sde" else self.scored_times

    @property
    def plans_per_group(self):
        return self.group_size // self.images_per_cot if self.rid else 1

    @property
    def pictures_per_plan(self):
        return self.group_size // self.plans_per_group

    @property
    def sampler(self):
        guidance = self.text_guidance, self.image_guidance
        return Sampler(self.num_timesteps, self.timestep_shift, *guidance)

    @property
    def thinking(self):
        return Thinking(self.max_plan_tokens, self.cot_temperature)

    @property
    def transition(self):
        return flow.Sde(self.sde, self.noise_level)


@dataclass
class Scored:
    """Some noised pictures, and what their velocities are scored by."""

    x: torch.Tensor  # (I, T, C)
    target: torch.Tensor  # (I, T, C) sde: x after the step; forward: the velocity it should have
    t: torch.Tensor  # (I,)
    t_next: torch.Tensor  # (I,) sde: after the step


@dataclass
class Steps:
    """sde: the stochastic steps of all pictures."""

    x: torch.Tensor  # (S, P * G, T, C) before each
    x_next: torch.Tensor  # (S, P * G, T, C) after it
    times: torch.Tensor  # (S + 1,) flow times of the window
    log_prob: torch.Tensor  # (P * G, S) as the rollout saw them

    def of(self, rows, steps):
        """Scored of these pictures (I,) of the rollout, each at a step (I,)."""
        x, x_next = self.x[steps, rows], self.x_next[steps, rows]  # (I, T, C)
        return Scored(x, x_next, self.times[steps], self.times[steps + 1])

    @staticmethod
    def joined(parts):
        x, x_next = (torch.cat([getattr(one, n) for one in parts], 1) for n in ("x", "x_next"))
        return Steps(x, x_next, parts[0].times, torch.cat([one.log_prob for one in parts]))


@dataclass
class Finished:
    """forward: finished pictures, and where they are noised again."""

    x0: torch.Tensor  # (P * G, T, C)
    noise: torch.Tensor  # (P, S, T, C)
    times: torch.Tensor  # (P, S)

    def of(self, rows, steps):
        """Scored of these pictures (I,) of the rollout, each at a time (I,)."""
        groups = rows // (len(self.x0) // len(self.times))  # (I,), of G rows each
        x0, noise, t = self.x0[rows], self.noise[groups, steps], self.times[groups, steps]
        x = flow.interpolate(x0.flatten(1), noise.flatten(1), t).view_as(x0)  # (I, T, C)
        return Scored(x, flow.velocity(x0, noise), t, t)

    @staticmethod
    def joined(parts):
        return Finished(
            *(torch.cat(of_all) for of_all in zip(*(vars(one).values() for one in parts)))
        )


@dataclass
class Rollout:
    """What some groups sampled, on the host."""

    prompts: list  # P engine.Prompt
    plans: list  # P * J token ids
    captions: list  # P * J, read from the plans; "" where one does not parse
    images: list  # P * G PIL
    ended: torch.Tensor  # (P * J,) bool: the plan was finished in time
    pictures: Steps | Finished
    grid: tuple  # (h, w) tokens of a picture

    @property
    def valid(self):
        """(P * J,) bool: the plan parses."""
        return torch.tensor([bool(caption) for caption in self.captions])

    @property
    def plan_lengths(self):
        """(P * J,) tokens of each plan with its eos."""
        return torch.tensor([len(plan) + 1 for plan in self.plans])

    @property
    def written(self):
        """(P * J,) of them, those that the model wrote: not the eos of a plan that was cut off."""
        return self.plan_lengths - (~self.ended).long()


def roll_out(engine, samples, numbers, *, config, step, first=0):
    """A group of pictures for each sample under the current weights, `groups_at_once`.

    numbers: of the samples. What is random in a group depends on its number, the window on `step`.
    first: member of each group, of which `group_size` are rolled out here, the rest elsewhere.
    """
    how = dict(config=config, step=step, first=first)
    parts = [
        roll_out_together(engine, samples[some], numbers[some], **how)
        for some in chunks(len(samples), config.groups_at_once)
    ]
    lists = [sum((getattr(part, name) for part in parts), []) for name in LISTS]
    ended = torch.cat([part.ended for part in parts])  # (P * J,)
    pictures = type(parts[0].pictures).joined([part.pictures for part in parts])
    return Rollout(*lists, ended, pictures, parts[0].grid)


def roll_out_together(engine, samples, numbers, *, config, step, first):
    """Roll out these groups in the same forward passes."""
    many, plans_each = config.group_size, config.plans_per_group
    how = dict(config=config, first=first)
    prompts = [engine.prompt(one.references, one.instruction) for one in samples]
    prefix = engine.prefill(prompts)
    plans, ended = engine.think(
        prompts,
        config.thinking,
        count=plans_each,
        generators=sum(generators(PLANS, numbers, plans_each, same=not config.rid, **how), []),
        prefix=prefix,
    )
    references = [len(one.references) for one in samples for _ in range(plans_each)]
    grid = engine.model.config.picture_grid(config.picture_side, config.picture_side)
    starts = generators(STARTS, numbers, many, same=config.same_start, **how)
    of_group = [plans[i : i + plans_each] for i in range(0, len(plans), plans_each)]
    groups = [
        group_of(engine, prompt, of_group[i], starts=starts[i], grid=grid)
        for i, prompt in enumerate(prompts)
    ]
    window = draw_window(config, step) if config.likelihood == "sde" else None
    noises = generators(NOISES, numbers, many, **how)
    final, pictures = paint_groups(
        engine, groups, noises, window=window, prefix=prefix, config=config
    )
    if window is None:
        scores = [generator(config.seed, number, SCORES) for number in numbers]
        pictures = noised_again(final.cpu(), scores, config)
    captions = [caption_of(engine.tokenizer.decode(plan), n) for plan, n in zip(plans, references)]
    del prefix  # the codec needs memory too
    images = engine.pictures(final, [grid] * len(final))
    return Rollout(prompts, plans, captions, images, torch.tensor(ended), pictures, grid)


def generators(purpose, numbers, count, *, config, first=0, same=False):
    """For each group a list of `count` generators, one a plan or member; same: all alike.

    first: member of each group at which they begin.
    """
    begin = first // (config.group_size // count)  # in plans, if these are of plans
    which = [0 if same else begin + i for i in range(count)]
    return [[generator(config.seed, number, purpose, i) for i in which] for number in numbers]


def group_of(engine, prompt, plans, *, starts, grid):
    """The Group of a prompt: a branch a member, with its plan and the noise it starts from.

    starts: a generator for each member; members stand plan by plan.
    """
    branches = [
        Branch(plans[member * len(plans) // len(starts)], (engine.start(grid, start),))
        for member, start in enumerate(starts)
    ]
    return Group(prompt, grid, tuple(branches))


def chunks(count, size):
    """Slices of at most `size` that cover range(count)."""
    return [slice(i, i + size) for i in range(0, count, size)]


def caption_of(text, references):
    """The caption of a plan that parses, or ""."""
    return iccot.parse(text).caption if iccot.is_valid(text, references) else ""


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
    random = generator(config.seed, step, WINDOW)
    first = int(torch.randint(last_window_start(config) + 1, (), generator=random))
    grid = flow.time_grid(config.num_timesteps, config.timestep_shift)
    return Window(first, grid[first : first + config.window + 1])


def noised_again(x0, generators, config):
    """Finished of pictures (P * G, T, C); generators: one a group, alike for all its members."""
    shape = (config.scored_times, *x0.shape[1:])
    times = [
        flow.sample_timesteps(config.scored_times, config.scored_shift, one) for one in generators
    ]  # (S,) each
    noise = [torch.randn(shape, generator=one) for one in generators]  # (S, T, C) each
    return Finished(x0, torch.stack(noise), torch.stack(times))


def paint_groups(engine, groups, noises, *, window, prefix, config):
    """(final latents (P * G, T, C) of all groups' members, their Steps; None without a window).

    `pictures_at_once` of each group. groups: each branch holds one member's plan and start; noises:
    generators of the SDE's noise, for each group, for each member.
    """
    finals, taken = [], []
    for some in chunks(config.group_size, config.pictures_at_once):
        part = [replace(group, branches=group.branches[some]) for group in groups]
        drawn = sum((of_group[some] for of_group in noises), [])
        how = dict(window=window, prefix=prefix, config=config)
        x, steps = paint_members(engine, part, drawn, **how)
        finals.append(x)
        taken.append(steps)
    final = torch.cat(finals, 1).flatten(0, 1)  # (P * G, T, C)
    if window is None:
        return final, None

    def of_all(i):  # of all chunks: (S, P * G, ...) of their (P, members, ...), step by step
        steps = zip(*([step[i] for step in of_part] for of_part in taken))
        return torch.stack([torch.cat(parts, 1).flatten(0, 1) for parts in steps]).cpu()

    x, x_next, log_prob = map(of_all, range(3))
    return final, Steps(x, x_next, window.times, log_prob.T)


def paint_members(engine, groups, noises, *, window, prefix, config):
    """Paint all branches of these groups together; the steps of the window, if any, are stochastic.

    Returns x (P, members, T, C), and of each stochastic step (x, x_next, log_prob) likewise.
    """
    tokens, count = groups[0].grid[0] * groups[0].grid[1], len(groups[0].branches)
    members, kept = len(groups) * count, []
    image_of_token = torch.arange(members, device=engine.device).repeat_interleave(tokens)

    def sde_or_ode(k, x, v, *, t, t_next):
        if not window.first <= k < window.first + config.window:
            return flow.euler_step(x, v, t, t_next=t_next)
        noise = draw_noise([tokens] * members, x.shape[1], noises)  # (members * T, C)
        step = flow.sde_step(x, v, t, t_next=t_next, sde=config.transition, noise=noise)
        x_next, mean, std = step
        log_prob = flow.log_prob(x_next, mean, std, image_of_token=image_of_token, images=members)
        whose = len(groups), count
        pictures = (one.view(*whose, tokens, -1) for one in (x, x_next))
        kept.append((*pictures, log_prob.view(whose)))
        return x_next

    step = sde_or_ode if window else None
    x = engine.paint(groups, config.sampler, step=step, prefix=prefix)
    return x.view(len(groups), count, tokens, -1), kept
