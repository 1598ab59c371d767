"""
One sample as stage 1 trains on it: prompt, plan, and noised copies of the target in one document.

    pictures | instruction | plan (carries L_cot) | {noised copy: x_t = (1 - t) x_0 + t noise} ...

A document is a tree without forks; the noised copies are leaves that nobody sees, at different
times, so that one prompt and one plan serve them all. Conditions are dropped as in BAGEL
(docs/BAGEL.md §13.3), so that guidance has its contexts: all text, the latents or the ViT tokens of
a reference; and a share of the samples has no plan, so that the model can still draw directly.
What is dropped, the noise and its times depend on (seed, sample) alone.

All processes wait for the one with the largest pack, in every pass. So `Dealer` deals the samples
of a step by the tokens that their pictures will take, which are known before they are read, and
`pack` fills sequences of at most `tokens_per_pack` tokens with whole examples, the longest first,
without padding. Neither changes a mean over the step.
Stage 2's trees, which do fork, are in tree.py. Letters: sequence.py.
Left out: dealing samples of several steps at once (a step's samples are part of the recipe).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

import flow
import iccot
from engine import Prompt
from runtime import processes
from runtime.config import UserError
from sequence import Packed, Sequence
from vision import transform

WORDS = 400  # tokens of an instruction and a plan with four references, generously
WORDS_OF_ONE = 60  # more, for each reference beyond four


@dataclass(frozen=True)
class Options:
    """The options of sft.py that say what the model sees of a sample."""

    max_references: int = 4  # pictures in a prompt, at most
    tokens_per_pack: int = 45_056  # at most in one pass: bounds the memory, not the result
    noise_copies: int = 1  # noised copies of each target, sharing prompt and plan
    in_context: bool = True  # false: several references become text to image with the caption
    plan_dropout: float = 0.2  # share without IC-CoT of samples with text (unpublished)
    text_dropout: float = 0.1  # share of samples that lose instruction and plan (BAGEL)
    vae_dropout: float = 0.3  # share of references that lose their latents
    vit_dropout: float = 0.3  # share of references that lose their ViT tokens
    timestep_shift: float = 1.0  # above 1: more noise in training (flow.shift_time)
    painter_errors: float = 0.0  # share of the toy's targets with one wrong fact (toy/painter.py)
    filter_targets: float = 0.0  # share of them that are dropped, those CLIP finds worst
    pretraining_steps: int = 0  # first steps, whose toy targets are right, as a base model's are


def most_tokens(shape, config):
    """Tokens that a sample may take at this resolution."""
    latents, patches = picture_tokens(shape)
    pictures = config.max_references * (latents + patches) + config.noise_copies * latents
    return pictures + WORDS + WORDS_OF_ONE * max(0, config.max_references - 4)


def picture_tokens(shape):
    """Tokens of a picture of the largest size, markers included: latents, and ViT tokens."""
    return shape.latent_side**2 + 2, shape.vit_side**2 + 2


def check_budget(shape, config):
    """UserError unless a pack holds the largest sample that there may be at this resolution.

    Found out before the first step, not at the first sample with all references. shape: of the
    model.
    """
    needed = most_tokens(shape, config)
    if needed > config.tokens_per_pack:
        raise UserError(
            f"tokens_per_pack={config.tokens_per_pack}: a sample with max_references="
            f"{config.max_references} may take {needed} tokens; raise tokens_per_pack to "
            f"that, or lower max_references"
        )


@dataclass
class Example:
    """One sample as the model trains on it."""

    prompt: Prompt
    plan: list | None  # token ids; None: paint directly
    noised: list  # (x_t (T, C), t) of each copy of the target
    grid: tuple  # (h, w) tokens of the target
    target: torch.Tensor  # (copies * T, C) velocities

    def __len__(self):
        """Tokens in a pack, markers included."""
        text = len(self.plan) + 2 if self.plan is not None else 0
        return len(self.prompt) + text + sum(len(x) + 2 for x, _ in self.noised)

    def write(self, sequence):
        with sequence.document():
            self.prompt.write(sequence)
            if self.plan is not None:
                sequence.text(self.plan, loss=True)
            for x_t, t in self.noised:
                sequence.noise(x_t, self.grid, t)


def drops(config, references, generator):
    """What a sample with so many references loses: its text, its plan; and of each reference
    whether latents and ViT tokens are kept."""

    def chance(probability):
        return float(torch.rand((), generator=generator)) < probability

    without_text, without_plan = chance(config.text_dropout), chance(config.plan_dropout)
    kept = [
        (not chance(config.vae_dropout), not chance(config.vit_dropout)) for _ in range(references)
    ]
    return without_text, without_plan, kept


class Dealer:
    """Which samples of a step each process takes: as many as the others, and about as many tokens.

    Lengths are those of references of the largest size: how many there are, and what of them is
    dropped, is known before anything is read. Every process finds the same.
    """

    def __init__(self, config, shape, source):
        """config: of sft.py; shape: of the model; source.references(position): of a sample."""
        self.config, self.shape, self.source = config, shape, source
        self.shares = lru_cache(64)(self._shares)

    def own(self, step):
        """Numbers of the samples that this process takes in a step, in order."""
        return self.shares(step, processes.size())[processes.rank()]

    def ahead(self, step):
        """The numbers of this process from a step to the last one, each found when asked for."""
        for later in range(step, self.config.steps):
            yield from self.own(later)

    def _shares(self, step, size):
        each = self.config.samples_per_step
        shares = processes.dealt(range(step * each, (step + 1) * each), self.tokens, size)
        return [sorted(own) for own in shares]  # as they lie on disk

    def tokens(self, number):
        """What the references of a sample will take, if they are of the largest size."""
        references = self.source.references(number)
        if references > 1 and not self.config.in_context:
            references = 0
        drawn = processes.generator(self.config.seed, number)
        _, _, kept = drops(self.config, references, drawn)
        latents, patches = picture_tokens(self.shape)
        return sum(vae * latents + vit * patches for vae, vit in kept)


def make_example(engine, one, config, *, generator):
    """iccot.Sample -> Example. What is dropped, the noise and its times come from the generator."""
    model, tokenizer = engine.model, engine.tokenizer
    if len(one.references) > 1 and not config.in_context:
        one = replace(one, references=(), instruction=one.plan.caption)
    without_text, without_plan, kept = drops(config, len(one.references), generator)
    items, kept = [], iter(kept)
    for item in iccot.arranged(one.references, one.instruction):
        if not isinstance(item, str):
            vae, vit = next(kept)
            items.append(model.encode_reference(item, vae=vae, vit=vit))
        elif not without_text:
            items.append(tokenizer.encode(item))
    no_plan = without_text or without_plan
    plan = None if no_plan else tokenizer.encode(iccot.render(one.plan))
    clean, grid = model.to_latents(transform(one.target, model.config.image_rule))  # (T, C)
    noised, targets = [], []
    for t in flow.sample_timesteps(config.noise_copies, config.timestep_shift, generator).tolist():
        noise = torch.randn(clean.shape, generator=generator)  # (T, C)
        noised.append((flow.interpolate(clean, noise, t), t))
        targets.append(flow.velocity(clean, noise))
    return Example(Prompt(tuple(items)), plan, noised, grid, torch.cat(targets))


@dataclass
class Pack:
    """Whole examples in one sequence, and the velocities (M, C) of its noised tokens."""

    packed: Packed
    target: torch.Tensor


def pack(layout, examples, tokens_per_pack):
    """Fill packs with whole examples: a list of Pack."""
    chosen = fill([len(one) for one in examples], tokens_per_pack)
    return [pack_of(layout, [examples[number] for number in numbers]) for numbers in chosen]


def fill(lengths, tokens_per_pack):
    """Packs of examples of these lengths: a list of their numbers each.

    The longest are placed first, each into the first pack that has room for it; within a pack the
    order stays. UserError for one that is longer than a pack.
    """
    chosen, room = [], []  # of each pack: numbers of examples, tokens left
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        if length > tokens_per_pack:
            raise UserError(
                f"a sample takes {length} tokens, more than "
                f"tokens_per_pack={tokens_per_pack}; raise it, or allow fewer references"
            )
        place = next((i for i, left in enumerate(room) if length <= left), len(room))
        if place == len(room):
            chosen.append([])
            room.append(tokens_per_pack)
        chosen[place].append(number)
        room[place] -= length
    return [sorted(some) for some in chosen]


def pack_of(layout, examples):
    """The Pack of these examples."""
    sequence = Sequence(layout)
    for example in examples:
        example.write(sequence)
    return Pack(sequence.pack(), torch.cat([example.target for example in examples]))  # (M, C)
