"""
What a GPU may wait for: the host, for one group of the preset `full`; and in stage 1 other GPUs.

    python -m bench packing
    python -m bench packing --gpus 64

    think      the pack in which the plans are decoded
    paint      the packs in which the members are painted, `pictures_at_once`
    update     the tree of the group (tree.plant), in packs of `tokens_per_pack`
    lists      tile lists of the masks of all these (kernels/tiles.py): made where the masks are, so
               a GPU makes them by itself
    pictures   decoded pixels to PIL, and back to what the reward's CLIP reads
    tokens     the plans' tokens, drawn from logits over the vocabulary (engine.choose): where the
               logits are, so this is what it would take if a GPU left it to the host

Four references of 1024 pixels, a prompt of 36,062 tokens, plans of 150. CPU seconds, best of
`repeats`; nothing of the model is computed.

In stage 1 all GPUs wait in each pass for the largest pack of them all. The share of those tokens
that a GPU computes itself is counted for samples of one to four references of 1024 pixels: dealt by
their length (example.Dealer), and taken in turn.

Letters: sequence.py. Left out: reading references from shards (`python -m bench data`), launches of
kernels.
"""

from functools import partial
from itertools import zip_longest

import numpy as np
import torch

import example
import grpo
import rollouts
import sft
import tree
from bench import memory
from bench.attention import HEAD_DIM, HEADS, KEY_HEADS, build_lists
from bench.timing import best_of
from engine import Branch, Group, Noised, choose, draw_noise, draw_uniform, lay_out
from model import ModelConfig
from runtime.processes import generator
from sequence import Sequence
from vision import to_pil

PLAN = 150  # tokens


def bench_packing(config):
    """Prints and returns {part: CPU seconds a group}."""
    host = Host(grpo.Config(config="full", **grpo.PRESETS["full"]), ModelConfig(), config.seed)
    parts = {
        "think": host.think,
        "paint": host.paint,
        "update": host.update,
        "lists": partial(host.lists, host.masks()),
        "pictures": host.pictures,
        "tokens": host.tokens,
    }
    seconds = best_of(config.repeats, parts)
    members, updates = host.config.group_size, len(host.update().batches)
    print(f"{members} members, {updates} packs in the update; seconds of one CPU thread a group")
    for name, value in seconds.items():
        print(f"{name:10s}{value:8.3f}")
    print(f"{'all but tokens':10s}{sum(seconds.values()) - seconds['tokens']:10.3f}")
    return seconds | shares_of_stage_1(config.gpus)


class OneToFour:
    """A source of samples of one to four references."""

    def references(self, position):
        return int(np.random.default_rng(position).integers(1, 5))


def shares_of_stage_1(gpus, steps=10):
    """Prints and returns {how samples are shared out: mean share of the tokens waited for that a
    GPU computes}, of the preset `full`."""
    config, shape = sft.Config(config="full", **sft.PRESETS["full"]), ModelConfig()
    dealer, found = example.Dealer(config, shape, OneToFour()), {"dealt": [], "in turn": []}
    each = config.samples_per_step
    for step in range(steps):
        numbers = range(step * each, (step + 1) * each)
        ways = dealer.shares(step, gpus), [numbers[rank::gpus] for rank in range(gpus)]
        for shares, one in zip(ways, found.values()):
            one.append(share_computed([[length(dealer, n) for n in own] for own in shares]))
    means = {name: sum(values) / steps for name, values in found.items()}
    print(f"stage 1 on {gpus} GPUs, share of the tokens waited for that a GPU computes itself")
    for name, value in means.items():
        print(f"{name:10s}{value:8.3f}")
    return means


def length(dealer, number):
    """Tokens of a sample: its references, the target, and texts, of which no dealer knows."""
    latents, _ = example.picture_tokens(dealer.shape)
    words = int(np.random.default_rng((1, number)).integers(30, 340))
    return dealer.tokens(number) + dealer.config.noise_copies * latents + words


def share_computed(lengths):
    """lengths: of each GPU's samples -> the share, if all wait for the largest pack of a pass."""
    budget = sft.Config().tokens_per_pack
    packs = [[sum(own[i] for i in some) for some in example.fill(own, budget)] for own in lengths]
    waited = sum(map(max, zip_longest(*packs, fillvalue=0)))
    return sum(map(sum, packs)) / (waited * len(packs))


class Host:
    """A group of `full` without weights: prompt, plans and latents of any content."""

    def __init__(self, config, shape, seed):
        self.config, self.generator = config, generator(seed)
        self.layout, self.prompt, n = memory.a_prompt(shape, memory.Case())
        self.grid = shape.picture_grid(config.picture_side, config.picture_side)
        members, plans = config.group_size, config.plans_per_group
        self.plans, ended = [[4] * (PLAN - 2)] * plans, torch.ones(plans, dtype=torch.bool)
        x0 = torch.randn(members, n, shape.token_channels, generator=self.generator)  # (G, T, C)
        finished = rollouts.noised_again(x0, [self.generator], config)
        captions = [""] * plans
        self.rollout = rollouts.Rollout(
            [self.prompt], self.plans, captions, [], ended, finished, self.grid
        )
        self.logits = torch.randn(plans, shape.vocab_size, generator=self.generator)
        self.uniform = draw_uniform(PLAN, [self.generator] * plans)  # (plans, PLAN)
        side = config.picture_side
        self.decoded = torch.rand(3, side, side, generator=self.generator) * 2 - 1

    def think(self):
        sequence = Sequence(self.layout)
        with sequence.document():
            self.prompt.hollow().write(sequence)
            for _ in self.plans:
                with sequence.branch():
                    sequence.reserve(self.config.max_plan_tokens)
        return sequence.pack()

    def paint(self):
        tokens, channels = self.rollout.pictures.x0.shape[1:]
        noise = draw_noise([tokens] * len(self.plans), channels, [self.generator] * len(self.plans))
        branches = [
            Branch(plan, (Noised(x, 1.0),)) for plan, x in zip(self.plans, noise.split(tokens))
        ]
        groups = [
            Group(self.prompt.hollow(), self.grid, tuple(branches[some]))
            for some in rollouts.chunks(len(branches), self.config.pictures_at_once)
        ]
        return [lay_out(self.layout, [one], self.config.sampler.contexts)[0] for one in groups]

    def update(self):
        return tree.plant(self.layout, self.rollout, 0, config=self.config)

    def masks(self):
        """Of all passes of a group but those of single tokens."""
        planted = self.update()
        rest = [batch.packed for batch in planted.batches]
        painted = [packed.select(packed.rows_of("noised")) for packed in self.paint()]
        return [packed.mask for packed in (planted.prompt, *rest, *painted)]

    def lists(self, masks):
        for mask in masks:
            sizes = (mask.q_hi, HEADS), (mask.k_hi, KEY_HEADS)
            build_lists(
                mask,
                *(
                    torch.empty(len(rows), heads, HEAD_DIM, dtype=torch.bfloat16, device="meta")
                    for rows, heads in sizes
                ),
            )

    def pictures(self):
        for _ in self.plans:
            torch.from_numpy(np.array(to_pil(self.decoded)))

    def tokens(self):
        for step in range(PLAN):
            choose(self.logits, self.config.thinking, self.uniform[:, step])
