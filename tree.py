"""
The tree of GRPO: what a group is sampled along, and what its update passes through again.

    prompt | branch a plan | leaf a noised picture x_k of the SDE window   (in all contexts)

`roll_out` samples it: the prompt is computed once into a KV cache, plans are decoded as branches,
pictures painted with a window of stochastic steps (flow.py), each of which keeps

    x_k,  x_{k+1} ~ Normal(mean(x_k, v), std^2),  log p(x_{k+1} | x_k)    a mean over its values

`plant` packs the same tree for the update, `policy` says what the present weights make of it. A
group may be too large for one pass, so its tree is cut at the prompt (Packed.cut): one pack of the
prompt, and batches of noised pictures with their plans that need the prompt's keys and values, each
within `tokens_per_pack`; a member that is too large alone is split by step. Gradients add up over
batches and flow back through the prompt once (grpo.py), so neither the cut nor the packing changes
them:

    kv = prompt(theta);   for each batch:  L(theta, kv) -> d/dtheta, d/dkv;   kv.backward(sum d/dkv)

Members stand group by group, plan by plan, their steps in order. `config` is grpo.Config, of which
`Options` says what matters here. Letters: sequence.py.
Left out: trees that fork within the denoising.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

import flow
import iccot
from engine import Branch, Group, Noised, Sampler, Thinking, draw_noise, guided, lay_out
from runtime.processes import device, generator, joined, rank, share, size
from sequence import Packed

PLANS, WINDOW, NOISES, STARTS = 1, 2, 3, 4  # purposes of the random numbers of a group


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

    def numbers(self, step):
        """Of the samples of a step whose groups are here; the first are for the first update."""
        begin, end = (at * self.config.prompts_per_step for at in (step, step + 1))
        return list(range(begin + rank() // self.ranks, end, size() // self.ranks))

    def whole_groups(self, e, u, valid):
        """What reward.embed_groups gave of the members here, of all members."""
        if self.config.rid:  # otherwise the one plan of a group is on all its processes
            u, valid = joined(u, self.ranks, 1), joined(valid, self.ranks, 1)
        return joined(e, self.ranks, 1), u, valid

    def own_members(self, images, plans):
        """Those here of numbers of all pictures (P * G,) and plans (P * J,)."""
        members = self.config.group_size
        images = images.view(-1, self.ranks, members)[:, self.part].flatten()
        if self.config.rid:
            plans = plans.view(-1, self.ranks, self.config.plans_per_group)[:, self.part].flatten()
        return images, plans


def share_of(config):
    """The Share of this process: whole groups, or if there are too few, members of them.

    As few processes to a group as make all of them work alike; each needs two members at least, and
    whole plans. UserError if nothing divides.
    """
    prompts, parts, ranks = config.prompts_per_step, config.updates, 1
    if prompts % (size() * parts):
        for ranks in range(2, size() + 1):
            members, rest = divmod(config.group_size, ranks)
            if size() % ranks or prompts * ranks % (size() * parts) or rest:
                continue
            if members >= 2 and members % config.images_per_cot == 0:
                break
        else:
            share(prompts, "prompts a step", "prompts_per_step", parts=parts)  # cannot be shared
    members = config.group_size // ranks
    return Share(ranks, rank() % ranks, replace(config, group_size=members))


# --------------------------------------------------------------------------------------------------
# rollout


@dataclass(frozen=True)
class Options:
    """The options of grpo.py that say what is sampled, and how it is packed."""

    prompts_per_step: int = 16  # groups; 256 pictures an update (Flow-GRPO: 384 to 576)
    updates: int = 2  # optimiser steps an iteration, each on its share of the groups
    group_size: int = 32  # members of a group (paper)
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
    train_text: bool = False  # policy gradient on the plans too, with their mean reward
    # memory, not the result
    groups_at_once: int = 1  # rolled out together, and
    pictures_at_once: int = 4  # of their members painted together: both bound memory alone
    tokens_per_pack: int = 36_864  # of plans and pictures in one pass: bounds memory alone

    def __post_init__(self):
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
        if self.window < 1 or last_window_start(self) < 0:
            raise ValueError(
                f"window={self.window} does not fit into the first window_end={self.window_end} of "
                f"{self.num_timesteps - 1} denoising steps"
            )
        if self.group_size % self.images_per_cot or (self.images_per_cot > 1 and not self.rid):
            raise ValueError(
                f"images_per_cot={self.images_per_cot} must divide group_size={self.group_size}, "
                f"with rid on"
            )

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
    def transition(self):
        return flow.Sde(self.sde, self.noise_level)


@dataclass
class Rollout:
    """What some groups sampled, on the host."""

    prompts: list  # P engine.Prompt
    plans: list  # P * J token ids
    captions: list  # P * J, read from the plans; "" where one does not parse
    images: list  # P * G PIL
    ended: torch.Tensor  # (P * J,) bool: the plan was finished in time
    log_prob: torch.Tensor  # (P * G, S) as the rollout saw them
    x: torch.Tensor  # (S, P * G, T, C) before each stochastic step
    x_next: torch.Tensor  # (S, P * G, T, C) after it
    times: torch.Tensor  # (S + 1,) flow times of the window
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
    joined = {"times": parts[0].times, "grid": parts[0].grid}
    for name in ("prompts", "plans", "captions", "images"):
        joined[name] = sum((getattr(part, name) for part in parts), [])
    for name, dim in (("ended", 0), ("log_prob", 0), ("x", 1), ("x_next", 1)):
        joined[name] = torch.cat([getattr(part, name) for part in parts], dim)
    return Rollout(**joined)


def roll_out_together(engine, samples, numbers, *, config, step, first):
    """Roll out these groups in the same forward passes."""
    many, each = config.group_size, config.plans_per_group

    def generators(purpose, count, same=False):
        """Of each group, one for each of its plans or members."""
        begin = first // (many // count)  # in plans, if these are of plans
        which = [0 if same else begin + i for i in range(count)]
        return [[generator(config.seed, number, purpose, i) for i in which] for number in numbers]

    prompts = [engine.prompt(one.references, one.instruction) for one in samples]
    prefix = engine.prefill(prompts)
    plans, ended = engine.think(
        prompts,
        Thinking(config.max_plan_tokens, config.cot_temperature),
        count=each,
        generators=sum(generators(PLANS, each, not config.rid), []),
        prefix=prefix,
    )
    references = [len(one.references) for one in samples for _ in range(each)]
    grid = engine.model.config.picture_grid(config.picture_side, config.picture_side)
    starts = generators(STARTS, many, config.same_start)
    groups = [
        group_of(engine, prompt, plans[i * each : (i + 1) * each], starts=starts[i], grid=grid)
        for i, prompt in enumerate(prompts)
    ]
    window = draw_window(config, step)
    painted = paint_groups(
        engine, groups, generators(NOISES, many), window=window, prefix=prefix, config=config
    )
    return Rollout(
        prompts,
        plans,
        [caption_of(engine.tokenizer.decode(plan), n) for plan, n in zip(plans, references)],
        engine.pictures(painted.final, [grid] * len(painted.final)),
        torch.tensor(ended),
        painted.log_prob.cpu(),
        painted.x.cpu(),
        painted.x_next.cpu(),
        window.times,
        grid,
    )


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


@dataclass
class Painted:
    """Pictures of some members of some groups, and their stochastic steps.

    final (P, members, T, C), log_prob (P, members, S), x and x_next (S, P, members, T, C); after
    `joined` P and members are one dimension.
    """

    final: torch.Tensor
    log_prob: torch.Tensor
    x: torch.Tensor
    x_next: torch.Tensor

    @staticmethod
    def joined(parts):
        final = torch.cat([part.final for part in parts], 1).flatten(0, 1)  # (P * G, T, C)
        log_prob = torch.cat([part.log_prob for part in parts], 1).flatten(0, 1)  # (P * G, S)
        x = torch.cat([part.x for part in parts], 2).flatten(1, 2)  # (S, P * G, T, C)
        x_next = torch.cat([part.x_next for part in parts], 2).flatten(1, 2)  # (S, P * G, T, C)
        return Painted(final, log_prob, x, x_next)


def paint_groups(engine, groups, noises, *, window, prefix, config):
    """Paint the members of all groups, `pictures_at_once` of each.

    groups: each branch holds one member's plan and start; noises: generators of the SDE's noise,
    for each group, for each member.
    """
    parts = []
    for some in chunks(config.group_size, config.pictures_at_once):
        part = [replace(group, branches=group.branches[some]) for group in groups]
        drawn = sum((of_group[some] for of_group in noises), [])
        parts.append(
            paint_members(engine, part, drawn, window=window, prefix=prefix, config=config)
        )
    return Painted.joined(parts)


def paint_members(engine, groups, noises, *, window, prefix, config):
    """Paint all branches of these groups together; the steps of the window are stochastic."""
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
        kept.append((x, x_next, log_prob))
        return x_next

    x = engine.paint(groups, config.sampler, step=sde_or_ode, prefix=prefix)
    before, after, log_prob = (torch.stack(values) for values in zip(*kept))  # (S, ...) each
    shape = (len(groups), count, tokens, x.shape[1])
    return Painted(
        x.view(shape),  # (P, members, T, C)
        log_prob.view(-1, *shape[:2]).permute(1, 2, 0),  # (P, members, S)
        before.view(-1, *shape),  # (S, P, members, T, C)
        after.view(-1, *shape),
    )


# --------------------------------------------------------------------------------------------------
# the tree again, for the update


@dataclass
class Batch:
    """Some noised pictures of one group with their plans, in a pack that lacks the prompt.

    I pictures, member by member, step by step, each in all guidance contexts; Z = I * T tokens of
    theirs in one context.
    """

    packed: Packed
    rows: dict  # of each guidance context (engine.lay_out)
    members: torch.Tensor  # (I,) of the rollout: whose picture it is
    steps: torch.Tensor  # (I,) of the window: which step it takes
    x: torch.Tensor  # (Z, C) before the steps
    x_next: torch.Tensor  # (Z, C) after them
    t: torch.Tensor  # (Z,) their times
    t_next: torch.Tensor  # (Z,)
    image_of_token: torch.Tensor  # (Z,) which of the I pictures
    step_size: torch.Tensor  # (I,) t - t' of that step
    token_plans: torch.Tensor  # (labels,) of the rollout: whose plan a token is of
    token_counts: torch.Tensor  # (labels,) bool: the model wrote it, and it counts in this batch

    def to(self, where):
        """The same batch on a device."""
        tensors = {k: v.to(where) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        rows = {name: index.to(where) for name, index in self.rows.items()}
        return replace(self, **tensors, packed=self.packed.to(where), rows=rows)


@dataclass
class Tree:
    """A group's tree, cut at the prompt."""

    prompt: Packed
    batches: list  # Batch; they need the prompt's keys and values
    old: list = field(default_factory=list)  # Policy of each batch before the update


def plant(layout, rollout, group, *, config):
    """The Tree of group number `group`, each batch within `tokens_per_pack`."""
    each = config.plans_per_group
    plans = rollout.plans[group * each : (group + 1) * each]
    batches = split_members([len(plan) + 2 for plan in plans], rollout, config)
    cuts = [cut_batch(layout, rollout, group, pictures=some, config=config) for some in batches]
    return Tree(cuts[0][0], [batch for _, batch in cuts])


def split_members(plan_tokens, rollout, config):
    """The noised pictures of a group, (member, step), in lists of at most `tokens_per_pack` tokens.

    A member is split only if it alone, with its plan, is larger than that. A step is never split:
    guidance mixes its contexts. One that is larger has a list of its own.
    plan_tokens: of each plan, J; they count once in each list.
    """
    window, contexts = range(len(rollout.x)), len(config.sampler.contexts)
    tokens_of_step = contexts * (rollout.grid[0] * rollout.grid[1] + 2)
    found, room = [], 0
    for member in range(config.group_size):
        plan = member // config.pictures_per_plan
        fits = plan_tokens[plan] + len(window) * tokens_of_step <= config.tokens_per_pack
        for steps in [window] if fits else [[step] for step in window]:
            is_new = not found or found[-1][-1][0] // config.pictures_per_plan != plan
            images = len(steps) * tokens_of_step
            tokens = images + plan_tokens[plan] * is_new
            if tokens > room:
                found.append([])
                room, tokens = config.tokens_per_pack, images + plan_tokens[plan]
            found[-1] += [(member, step) for step in steps]
            room -= tokens
    return found


def cut_batch(layout, rollout, group, *, pictures, config):
    """(pack of the prompt, Batch) of these noised pictures of a group, (member, step) in order."""
    each = config.pictures_per_plan
    members, steps = torch.tensor(pictures).unbind(1)  # (I,) each
    rows = members + group * config.group_size  # (I,) of the rollout
    x, x_next = (
        values[steps, rows]  # (S, P * G, T, C) -> (I, T, C)
        for values in (rollout.x, rollout.x_next)
    )
    plans = list(dict.fromkeys(member // each for member, _ in pictures))
    noised = {plan: [] for plan in plans}
    for (member, step), canvas in zip(pictures, x):
        noised[member // each].append(Noised(canvas, rollout.times[step]))
    texts = rollout.plans[group * config.plans_per_group :]
    branches = [Branch(texts[plan], tuple(noised[plan])) for plan in plans]
    whole = Group(rollout.prompts[group], rollout.grid, tuple(branches))
    packed, context_rows = lay_out(layout, [whole], config.sampler.contexts, loss=config.train_text)
    prompt, rest = packed.cut()
    t, t_next = rollout.times[steps], rollout.times[steps + 1]  # (I,)
    image_of_token = torch.arange(len(rows)).repeat_interleave(x.shape[1])  # (Z,)
    of_rollout = torch.tensor(plans) + group * config.plans_per_group  # (plans,)
    lengths = rollout.plan_lengths[of_rollout]  # (plans,)
    token_plans = of_rollout.repeat_interleave(lengths)  # (labels,)
    place = torch.cat([torch.arange(int(length)) for length in lengths])  # (labels,) in its plan
    # a plan whose pictures are in several batches counts where the first of them is
    here = torch.isin(token_plans * each, rows[steps == 0])
    batch = Batch(
        rest,
        context_rows,
        rows,
        steps,
        x.flatten(0, 1),  # (Z, C)
        x_next.flatten(0, 1),  # (Z, C)
        t[image_of_token],
        t_next[image_of_token],
        image_of_token,
        t - t_next,
        token_plans,
        (place < rollout.written[token_plans]) & here,
    )
    return prompt, batch


@dataclass
class Policy:
    """What the weights say of one batch."""

    log_prob: torch.Tensor  # (I,) of the steps that were taken
    text: torch.Tensor | None  # (labels,) log-probabilities of the plan tokens, with `train_text`
    mean: torch.Tensor | None  # (Z, C) of the transitions
    std: torch.Tensor | None  # (Z, 1)
    v: torch.Tensor | None  # (Z, C)

    def detached(self, guard):
        """What the objective needs of it as p_old; guard: GRPO-Guard's ratio needs more."""
        kept = ("log_prob", "text", "mean", "std") if guard else ("log_prob", "text")
        values = {name: None for name in vars(self)}
        for name in kept:
            value = getattr(self, name)
            values[name] = None if value is None else value.detach()
        return Policy(**values)


def policy(model, prefix, batch, *, config):
    """The Policy of a batch, given the prompt's keys and values of each layer."""
    batch = batch.to(device())
    und, gen = model(batch.packed, prefix=prefix)
    images = len(batch.members)
    v = guided(
        model.velocity(batch.packed, gen),
        batch.rows,
        batch.t,
        sampler=config.sampler,
        image_of_token=batch.image_of_token,
        images=images,
    )
    mean, std = flow.transition(batch.x, v, batch.t, t_next=batch.t_next, sde=config.transition)
    log_prob = flow.log_prob(
        batch.x_next, mean, std, image_of_token=batch.image_of_token, images=images
    )
    text = -model.cross_entropy(und, batch.packed) if config.train_text else None
    return Policy(log_prob, text, mean, std.expand(len(v), 1), v)
