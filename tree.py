"""
The tree of GRPO's update: what a group sampled, packed so that one pass scores all of it.

    prompt | branch a plan | leaf a noised picture that is scored   (in all contexts)

`plant` packs a group of a rollout (rollouts.py), `policy` says what the present weights make of it.
A group may be too large for one pass, so its tree is cut at the prompt (Packed.cut): one pack of
the prompt, and batches of noised pictures with their plans that need the prompt's keys and values,
each within `tokens_per_pack`; a member that is too large alone is split by step. Gradients add up
over batches and flow back through the prompt once (grpo.py), so neither the cut nor the packing
changes them:

    kv = prompt(theta);   for each batch:  L(theta, kv) -> d/dtheta, d/dkv;   kv.backward(sum d/dkv)

Members stand group by group, plan by plan, their steps in order. `config` is grpo.Config.
Letters: sequence.py.
"""

from dataclasses import dataclass, field, replace

import torch

import flow
from engine import Branch, Group, Noised, guided, lay_out
from runtime.processes import device
from sequence import Packed


@dataclass
class Batch:
    """Some noised pictures of one group with their plans, in a pack that lacks the prompt.

    I pictures, member by member, step by step, each in all guidance contexts; Z = I * T tokens of
    theirs in one context.
    """

    packed: Packed
    rows: dict  # of each guidance context (engine.lay_out)
    members: torch.Tensor  # (I,) of the rollout: whose picture it is
    steps: torch.Tensor  # (I,) which of its S scores it is for
    x: torch.Tensor  # (Z, C) the pictures
    target: torch.Tensor  # (Z, C) what they are scored by (rollouts.Scored)
    t: torch.Tensor  # (Z,) their times
    t_next: torch.Tensor  # (Z,) sde: after the step
    image_of_token: torch.Tensor  # (Z,) which of the I pictures
    step_size: torch.Tensor  # (I,) sde: t - t' of that step
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
    per_group = config.plans_per_group
    plans = rollout.plans[group * per_group : (group + 1) * per_group]
    batches = split_members([len(plan) + 2 for plan in plans], rollout, config)
    prompt = rollout.prompts[group]
    cuts = [  # the prompt's content is laid out once, in the first
        cut_batch(layout, rollout, group, pictures=some, prompt=one, config=config)
        for some, one in zip(batches, [prompt, *[prompt.hollow()] * len(batches)])
    ]
    return Tree(cuts[0][0], [batch for _, batch in cuts])


def split_members(plan_tokens, rollout, config):
    """The noised pictures of a group, (member, step), in lists of at most `tokens_per_pack` tokens.

    A member is split only if it alone, with its plan, is larger than that. A step is never split:
    guidance mixes its contexts. One that is larger has a list of its own.
    plan_tokens: of each plan, J; they count once in each list.
    """
    window, contexts = range(config.scores), len(config.sampler.contexts)
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


def cut_batch(layout, rollout, group, *, pictures, prompt, config):
    """(pack of the prompt, Batch) of these noised pictures of a group, (member, step) in order."""
    per_plan = config.pictures_per_plan
    members, steps = torch.tensor(pictures).unbind(1)  # (I,) each
    rows = members + group * config.group_size  # (I,) of the rollout
    scored = rollout.pictures.of(rows, steps)
    plans = list(dict.fromkeys(member // per_plan for member, _ in pictures))
    noised = {plan: [] for plan in plans}
    for (member, _), x, t in zip(pictures, scored.x, scored.t):
        noised[member // per_plan].append(Noised(x, t))
    texts = rollout.plans[group * config.plans_per_group :]
    branches = [Branch(texts[plan], tuple(noised[plan])) for plan in plans]
    whole = Group(prompt, rollout.grid, tuple(branches))
    packed, context_rows = lay_out(layout, [whole], config.sampler.contexts, loss=config.train_text)
    prompt_pack, rest = packed.cut()
    image_of_token = torch.arange(len(rows)).repeat_interleave(scored.x.shape[1])  # (Z,)
    of_rollout = torch.tensor(plans) + group * config.plans_per_group  # (plans,)
    lengths = rollout.plan_lengths[of_rollout]  # (plans,)
    token_plans = of_rollout.repeat_interleave(lengths)  # (labels,)
    place = torch.cat([torch.arange(int(length)) for length in lengths])  # (labels,) in its plan
    # a plan whose pictures are in several batches counts where the first of them is, whose row is
    # plan * per_plan
    here = torch.isin(token_plans * per_plan, rows[steps == 0])
    batch = Batch(
        rest,
        context_rows,
        rows,
        steps,
        scored.x.flatten(0, 1),  # (Z, C)
        scored.target.flatten(0, 1),  # (Z, C)
        scored.t[image_of_token],
        scored.t_next[image_of_token],
        image_of_token,
        scored.t - scored.t_next,
        token_plans,
        (place < rollout.written[token_plans]) & here,
    )
    return prompt_pack, batch


@dataclass
class Policy:
    """What the weights say of one batch."""

    log_prob: torch.Tensor  # (I,) of the steps that were taken, or of the finished pictures
    text: torch.Tensor | None  # (labels,) log-probabilities of the plan tokens, with `train_text`
    mean: torch.Tensor | None  # (Z, C) sde: of the transitions
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
    und, gen = model(batch.packed, prefix=prefix, losses=True)
    images = len(batch.members)
    v = guided(
        model.velocity(batch.packed, gen),
        batch.rows,
        batch.t,
        sampler=config.sampler,
        image_of_token=batch.image_of_token,
        images=images,
    )
    of = dict(image_of_token=batch.image_of_token, images=images)
    if config.likelihood == "forward":
        log_prob, mean, std = flow.forward_log_prob(v, batch.target, **of), None, None
    else:
        mean, std = flow.transition(batch.x, v, batch.t, t_next=batch.t_next, sde=config.transition)
        log_prob, std = flow.log_prob(batch.target, mean, std, **of), std.expand(len(v), 1)
    text = -model.cross_entropy(und, batch.packed) if config.train_text else None
    return Policy(log_prob, text, mean, std, v)
