"""
The forward passes that training and sampling are made of, for a model of middle size on a CPU.

    python -m bench model

A pack of two edits of about 770 tokens each: a reference (256 latents, 256 ViT tokens), 60 words, a
noised target (196). Then sampling for one such prompt: prefill, 10 denoising steps without and with
guidance, 64 greedy tokens; the prefill is taken off what contains it. How they compare with the
official code side by side on one machine: RESULTS.md.
Left out: the eye on pictures and the codec (patches and latents are given), several threads.
"""

from functools import partial

import torch
import torch.nn.functional as F

from bench.timing import best_of
from engine import Branch, Engine, Group, Prompt, Sampler, Thinking
from model import ModelConfig, UnifiedModel
from sequence import Sequence
from vision import Reference

# fmt: off
MID = ModelConfig(  # the codec is not used: latents are given
    hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, vocab_size=4096, vit_hidden_size=192, vit_intermediate_size=768,
    vit_num_layers=4, vit_num_heads=4, vit_side=16, codec="space_to_depth", latent_side=16,
)
# fmt: on

GRID = (14, 14)  # tokens of the painted picture


class Markers:
    """What an engine asks of a tokenizer: ids of the four special tokens, here 0 to 3."""

    unk_token_id = None
    names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

    def convert_tokens_to_ids(self, name):
        return self.names.index(name)


def random_engine(shape, seed, generator):
    """An Engine of a new model whose velocities are not zero. shape: ModelConfig."""
    model = UnifiedModel(shape).initialise(seed)
    torch.nn.init.normal_(model.latent_out.weight, std=0.02, generator=generator)
    return Engine(model, Markers())


def random_reference(generator, side=16):
    """A picture of side x side latents and as many ViT patches of MID, drawn at random."""
    patches = torch.randn(side * side, 3 * MID.vit_patch**2, generator=generator)
    latents = torch.randn(side * side, MID.token_channels, generator=generator)
    return Reference(latents, (side, side), patches, (side, side))


def random_words(count, vocabulary, generator):
    """Token ids drawn at random; the first four of a vocabulary are markers."""
    return torch.randint(4, vocabulary, (count,), generator=generator).tolist()


def bench_model(config):
    """Prints and returns CPU seconds {pass: seconds}."""
    g = torch.Generator().manual_seed(config.seed)
    engine = random_engine(MID, config.seed, g)
    prompt = random_prompt(g)
    packed = edits(engine.layout, g, count=2)
    rivals = training(engine.model, packed, g) | sampling(engine, prompt, g)
    ours = best_of(config.repeats, rivals)
    for name in ("10 steps", "10 steps, guidance", "64 greedy tokens"):
        ours[name] -= ours["prefill"]
    print(
        f"{len(packed)} tokens, {sum(p.numel() for p in engine.model.parameters()) / 1e6:.1f}M "
        f"parameters, {config.threads} thread"
    )
    print("CPU seconds")
    for name, seconds in ours.items():
        print(f"{name:28s}{seconds:8.3f}")
    return {name: round(seconds, 4) for name, seconds in ours.items()}


def random_prompt(generator, words=40):
    """A reference and an instruction of the MID model."""
    reference = random_reference(generator)
    return Prompt((reference, random_words(words, MID.vocab_size, generator)))


def edits(layout, generator, *, count):
    """The pack of some samples, whose last 20 words and whose target carry the loss."""
    sequence = Sequence(layout)
    for _ in range(count):
        with sequence.document():
            random_prompt(generator).write(sequence)
            sequence.text(random_words(20, MID.vocab_size, generator), loss=True)
            x = torch.randn(GRID[0] * GRID[1], MID.token_channels, generator=generator)
            sequence.noise(x, GRID, 0.5)
    return sequence.pack()


def training(model, packed, generator):
    """{name: function}: the loss of a pack, without and with its gradient."""
    target = torch.randn(len(packed.noised), MID.token_channels, generator=generator)

    def loss():
        packed.mask.cache.clear()  # a training step has a new pack and schedules its attention anew
        und, gen = model(packed, losses=True)
        text = model.cross_entropy(und, packed).mean()
        return text + F.mse_loss(model.velocity(packed, gen), target)

    def backward():
        loss().backward()
        model.zero_grad()

    return {"train forward": torch.no_grad()(loss), "train forward + backward": backward}


def sampling(engine, prompt, generator):
    """{name: function}: what makes a plan and a picture for one prompt."""

    def steps(text_guidance, image_guidance):
        sampler = Sampler(11, 3.0, text_guidance, image_guidance, guidance_interval=(0.0, 1.0))
        start = engine.start(GRID, generator)
        engine.paint([Group(prompt, GRID, (Branch(None, (start,)),))], sampler)

    return {
        "prefill": partial(engine.think, [prompt], Thinking(1)),
        "10 steps": partial(steps, 1.0, 1.0),
        "10 steps, guidance": partial(steps, 4.0, 1.5),
        "64 greedy tokens": partial(engine.think, [prompt], Thinking(64)),
    }
