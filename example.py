"""
One sample as stage 1 trains on it: prompt, plan, and noised copies of the target in one document.

    pictures | instruction | plan (carries L_cot) | {noised copy: x_t = (1 - t) x_0 + t noise} ...

A document is a chain of prompt and plan; the noised copies are leaves at its end that nobody sees,
at different times, so that one prompt and one plan serve them all. Conditions are dropped as in
BAGEL (docs/BAGEL.md §13.3), so that guidance has its contexts: all text, the latents or the ViT
tokens of a reference; and a share of the samples has no plan, so that the model can still draw
directly.
What is dropped, the noise and its times depend on (seed, sample) alone.

All processes wait for the one with the largest pack, in every pass. So `Dealer` deals the samples
of a step by the tokens that their pictures will take, which are known before they are read, and
`fill` puts whole examples into sequences of at most `tokens_per_pack` tokens, the longest first,
without padding. Neither changes a mean over the step.

    numbers -> Examples (loader workers: decode, resize) -> fill -> pack_of (codec, noise) -> a pass

A step's examples are kept as they come, with the pixels of their pictures, 8 bits each. What is
larger, patches, latents and noise in float32, is made pack by pack, before the pass that needs it.
Stage 2's trees, which do fork, are in tree.py. Letters: sequence.py.
Left out: dealing samples of several steps at once (a step's samples are part of the recipe).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from PIL import Image

import flow
import iccot
from engine import is_text
from runtime import processes
from runtime.config import UserError
from sequence import Packed, Sequence
from vision import resize, to_tensor

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


@dataclass(frozen=True)
class Example:
    """One sample as the model trains on it; its pictures are still pixels."""

    number: int  # of the sample: with the seed, what is drawn for it
    prompt: tuple  # in order: token ids, and vision.Resized
    plan: list | None  # token ids; None: paint directly
    target: Image.Image | torch.Tensor  # at the size that the codec takes
    tokens: int  # in a pack, markers included
    noised: int  # of them latents of the target's copies

    @property
    def labels(self):
        """Tokens that carry L_cot: the plan's, and its end."""
        return 0 if self.plan is None else len(self.plan) + 1

    def as_tensors(self):
        """The same Example with its pixels as floats."""
        prompt = tuple(item if is_text(item) else item.as_tensors() for item in self.prompt)
        return replace(self, prompt=prompt, target=to_tensor(self.target))


def drops(config, number, references):
    """What sample `number` with so many references loses: (its text, its plan); of each reference
    whether (latents, ViT tokens) are kept; and the generator that its times and noise come from."""
    drawn = processes.generator(config.seed, number)

    def chance(probability):
        return float(torch.rand((), generator=drawn)) < probability

    lost = chance(config.text_dropout), chance(config.plan_dropout)
    kept = [
        (not chance(config.vae_dropout), not chance(config.vit_dropout)) for _ in range(references)
    ]
    return lost, kept, drawn


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
        _, kept, _ = drops(self.config, number, references)
        latents, patches = picture_tokens(self.shape)
        return sum(vae * latents + vit * patches for vae, vit in kept)


class Examples:
    """The Examples of a source, by the numbers of the samples: a source for `data.stream`, whose
    workers then decode and resize. shape: of the model."""

    def __init__(self, source, tokenizer, shape, config):
        self.source, self.tokenizer, self.shape, self.config = source, tokenizer, shape, config

    def __getitem__(self, number):
        one = self.source[number]
        return make_example(one, number, self.tokenizer, shape=self.shape, config=self.config)


def make_example(one, number, tokenizer, *, shape, config):
    """iccot.Sample -> Example. What is dropped depends on (seed, number); shape: of the model."""
    if len(one.references) > 1 and not config.in_context:
        one = replace(one, references=(), instruction=one.plan.caption)
    (without_text, without_plan), kept, _ = drops(config, number, len(one.references))
    prompt, kept = [], iter(kept)
    for item in iccot.arranged(one.references, one.instruction):
        if not isinstance(item, str):
            vae, vit = next(kept)
            prompt.append(shape.resized(item, vae=vae, vit=vit))
        elif not without_text:
            prompt.append(tokenizer.encode(item))
    no_plan = without_text or without_plan
    plan = None if no_plan else tokenizer.encode(iccot.render(one.plan))
    height, width = shape.picture_grid(*one.target.size)
    texts = sum(len(ids) + 2 for ids in (*prompt, plan) if is_text(ids))
    pictures = sum(shape.tokens_of(item) for item in prompt if not is_text(item))
    noised = config.noise_copies * height * width
    return Example(
        number=number,
        prompt=tuple(prompt),
        plan=plan,
        target=resize(one.target, shape.image_rule),
        tokens=texts + pictures + noised + 2 * config.noise_copies,
        noised=noised,
    )


@dataclass
class Pack:
    """Whole examples in one sequence, and the velocities (M, C) of its noised tokens."""

    packed: Packed
    target: torch.Tensor


def pack_of(engine, examples, config):
    """The Pack of these examples. Latents and velocities are where the model is, the rest is not.

    What needs no GPU comes first: the first copy to it waits until it has done all it was given.
    """
    sequence, examples = Sequence(engine.layout), [one.as_tensors() for one in examples]
    velocities = [v for one in examples for v in write(one, sequence, engine, config=config)]
    return Pack(sequence.pack(), torch.cat(velocities))  # (M, C)


def write(one, sequence, engine, *, config):
    """Append an Example, as tensors, to a sequence. Returns the velocities (T, C) of its copies."""
    model, where, velocities = engine.model, engine.device, []
    references = sum(not is_text(item) for item in one.prompt)
    with sequence.document():
        for item in one.prompt:
            if is_text(item):
                sequence.text(item)
            else:
                sequence.image(model.encode(item, device=where))
        if one.plan is not None:
            sequence.text(one.plan, loss=True)
        clean, grid = model.to_latents(one.target.to(where))  # (T, C)
        *_, drawn = drops(config, one.number, references)
        times = flow.sample_timesteps(config.noise_copies, config.timestep_shift, drawn)
        for t in times.tolist():
            noise = torch.randn(clean.shape, generator=drawn).to(where)  # (T, C)
            sequence.noise(flow.interpolate(clean, noise, t), grid, t)
            velocities.append(flow.velocity(clean, noise))
    return velocities


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
