"""
The tree of GRPO's update: what a group sampled, packed so that one pass scores all of it.

    prompt | branch a plan | leaf a noised picture that is scored   (in all guidance contexts)

`plant` packs a group of a rollout (grpo.py), `policy` says what the present weights make of it. A
group may be too large for one pass, so its tree is cut at the prompt (Packed.cut): one pack of the
prompt, and batches of noised pictures with their plans that need the prompt's keys and values, each
within `tokens_per_pack`; a member that is too large alone is split by score. Gradients add up over
batches and flow back through the prompt once, so neither the cut nor the packing changes them:

    kv = prompt(theta);   for each batch:  L(theta, kv) -> d/dtheta, d/dkv;   kv.backward(sum d/dkv)

Members stand group by group, plan by plan, their scores in order. `config` is grpo.Config.
Letters: sequence.py.
"""

from dataclasses import dataclass, replace

import torch

import flow
from engine import Branch, Group, Noised, guided, lay_out
from runtime import sharding
from runtime.processes import device
from sequence import Packed


@dataclass
class Rollout:
    """What P groups sampled, on the host. Members stand plan by plan."""

    prompts: list  # P engine.Prompt
    plans: list  # P * J token ids
    captions: list  # P * J, read from the plans; "" where one does not parse
    ended: list  # P * J bool: the plan was finished in time
    images: list  # P * G PIL
    grid: tuple  # (h, w) tokens of a picture
    x: torch.Tensor  # (S, P, G, T, C) the noised pictures that are scored
    target: torch.Tensor  # (S, P, G, T, C) sde: x after the step; forward: its right velocity
    t: torch.Tensor  # (S, P) their times
    t_next: torch.Tensor  # (S, P) sde: after the step
    log_prob: torch.Tensor  # (P, G, S) sde: the scores as the rollout saw them

    @property
    def plan_lengths(self):
        """(P * J,) tokens of each plan with its eos."""
        return torch.tensor([len(plan) + 1 for plan in self.plans])

    @property
    def written(self):
        """(P * J,) of them, those that the model wrote: not the eos of a plan that was cut off."""
        return self.plan_lengths - (~torch.tensor(self.ended)).long()


@dataclass
class Batch:
    """Some scored pictures of one group with their plans, in a pack that lacks the prompt.

    I pictures, member by member, score by score, each in all guidance contexts; Z = I * T tokens of
    theirs in one context.
    """

    packed: Packed
    rows: dict  # of each guidance context (engine.lay_out)
    members: torch.Tensor  # (I,) of the rollout: whose picture it is, group * G + member
    x: torch.Tensor  # (Z, C) the noised pictures
    target: torch.Tensor  # (Z, C) what they are scored by (Rollout)
    t: torch.Tensor  # (Z,) their times
    t_next: torch.Tensor  # (Z,) sde: after the step
    image_of_token: torch.Tensor  # (Z,) which of the I pictures
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


@dataclass
class Policy:
    """What the weights say of one batch."""

    log_prob: torch.Tensor  # (I,) of the steps that were taken, or of the finished pictures
    text: torch.Tensor | None  # (labels,) log-probabilities of the plan tokens, with `train_text`
    v: torch.Tensor | None  # (Z, C)

    def detached(self):
        """What the objective needs of it as p_old."""
        return Policy(
            self.log_prob.detach(), None if self.text is None else self.text.detach(), None
        )

    def zero(self):
        """A loss that counts nothing, and gives the same weights a gradient."""
        return self.log_prob.sum() * 0 + (0 if self.text is None else self.text.sum() * 0)


# --------------------------------------------------------------------------------------------------
# packing


def plant(layout, rollout, group, config):
    """The Tree of group number `group`, each batch within `tokens_per_pack`."""
    plans = rollout.plans[group * config.plans_per_group :][: config.plans_per_group]
    pictures = split_members([len(plan) + 2 for plan in plans], rollout.grid, config)
    prompt, batches = rollout.prompts[group], []
    for of_batch in pictures:
        # the prompt's content is laid out once, in the first
        given = prompt.hollow() if batches else prompt
        prompt_pack, batch = cut_batch(layout, rollout, group, of_batch, given, config)
        if not batches:
            first = prompt_pack
        batches.append(batch)
    return Tree(first, batches)


def split_members(plan_tokens, grid, config):
    """(member, score) of a group, in lists of at most `tokens_per_pack` tokens.

    A member is split only if it alone, with its plan, is larger than that. A picture is never
    split: guidance mixes its contexts. One that is larger has a list of its own.
    plan_tokens: of each plan, J; they count once in each list.
    """
    scores = range(config.scores)
    picture_tokens = len(config.sampler.contexts) * (grid[0] * grid[1] + 2)
    lists, room = [], 0
    for member in range(config.group_size):
        plan = member // config.pictures_per_plan
        fits = plan_tokens[plan] + len(scores) * picture_tokens <= config.tokens_per_pack
        for together in [scores] if fits else [[score] for score in scores]:
            is_new = not lists or lists[-1][-1][0] // config.pictures_per_plan != plan
            images = len(together) * picture_tokens
            tokens = images + plan_tokens[plan] * is_new
            if tokens > room:
                lists.append([])
                room, tokens = config.tokens_per_pack, images + plan_tokens[plan]
            lists[-1] += [(member, score) for score in together]
            room -= tokens
    return lists


def cut_batch(layout, rollout, group, pictures, prompt, config):
    """(pack of the prompt, Batch) of these scored pictures of a group, (member, score) in order."""
    per_plan, first_plan = config.pictures_per_plan, group * config.plans_per_group
    members, scores = torch.tensor(pictures).unbind(1)  # (I,) each
    x, target = rollout.x[scores, group, members], rollout.target[scores, group, members]
    t, t_next = rollout.t[scores, group], rollout.t_next[scores, group]  # (I,) each
    noised = {}  # of each plan of this batch
    for i, (member, _) in enumerate(pictures):
        noised.setdefault(member // per_plan, []).append(Noised(x[i], t[i]))
    branches = [
        Branch(rollout.plans[first_plan + plan], tuple(leaves)) for plan, leaves in noised.items()
    ]
    whole = Group(prompt, rollout.grid, tuple(branches))
    packed, rows = lay_out(layout, [whole], config.sampler.contexts, loss=config.train_text)
    prompt_pack, rest = packed.cut()
    image_of_token = torch.arange(len(pictures)).repeat_interleave(x.shape[1])  # (Z,)
    plans = torch.tensor(list(noised))  # those of this batch, of the group
    lengths = rollout.plan_lengths[first_plan + plans]
    token_plans = (first_plan + plans).repeat_interleave(lengths)  # (labels,)
    place = torch.cat([torch.arange(int(length)) for length in lengths])  # (labels,) in its plan
    # a plan whose pictures are in several batches counts where its very first picture is
    begun = plans[torch.isin(plans * per_plan, members[scores == 0])]
    here = torch.isin(token_plans, first_plan + begun)
    batch = Batch(
        packed=rest,
        rows=rows,
        members=group * config.group_size + members,
        x=x.flatten(0, 1),  # (Z, C)
        target=target.flatten(0, 1),  # (Z, C)
        t=t[image_of_token],
        t_next=t_next[image_of_token],
        image_of_token=image_of_token,
        token_plans=token_plans,
        token_counts=(place < rollout.written[token_plans]) & here,
    )
    return prompt_pack, batch


# --------------------------------------------------------------------------------------------------
# computing


def policy(model, prefix, batch, config):
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
    if config.likelihood == "forward":
        log_prob = flow.forward_log_prob(
            v, batch.target, image_of_token=batch.image_of_token, images=images
        )
    else:
        mean, std = flow.transition(batch.x, v, batch.t, t_next=batch.t_next)
        log_prob = flow.log_prob(
            batch.target, mean, std, image_of_token=batch.image_of_token, images=images
        )
    text = -model.cross_entropy(und, batch.packed) if config.train_text else None
    return Policy(log_prob, text, v)


def policies(model, tree, config):
    """The Policy of each batch of a tree, without gradients."""
    with sharding.gathered(model):
        prefix = model.keys_and_values(tree.prompt.to(device()))
        return [policy(model, prefix, batch, config) for batch in tree.batches]


def cut_prompt(model, tree):
    """The prompt's keys and values, [(keys, values)] of each layer, and the same cut off its graph:
    what batches are computed with, whose gradients are collected there."""
    prompt = model.keys_and_values(tree.prompt.to(device()))
    leaves = [
        (
            keys.detach().requires_grad_(keys.requires_grad),
            values.detach().requires_grad_(values.requires_grad),
        )
        for keys, values in prompt
    ]
    return prompt, leaves


def backward_through(prompt, leaves):
    """The chain rule through the prompt, once, with what all batches left in the leaves."""
    tensors, gradients = [], []
    for layer, cut_off in zip(prompt, leaves):
        for tensor, leaf in zip(layer, cut_off):
            if leaf.grad is not None:
                tensors.append(tensor)
                gradients.append(leaf.grad)
    if tensors:
        torch.autograd.backward(tensors, gradients)
