"""
Every speed that this project quotes, measured beside its rival in one run. Not a concept of the paper.

    python bench.py model          one thread of a CPU: training, prefill, denoising, decoding of a mid-size model

A figure is the best of `repeats` rounds; the rounds of rivals alternate, so that a noisy machine is noisy for all of
them. On a CPU it is CPU time, not wall time. Nothing here is a test: a test that measures time fails by chance.
Left out: figures that were not measured here, unless they are named as such.
"""

import json
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config import exit_on_user_error, parse
from model import ModelConfig, UnifiedModel
from sample import Prompt, Sampler, paint, think
from sequence import Layout, Sequence
from vision import Reference


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # rounds; the best one counts
    threads: int = 1
    seed: int = 0
    json: bool = False  # end with one line of JSON


PRESETS = {"default": {}}


def best_of(repeats, **rivals):
    """{name: least CPU seconds} of functions without arguments, in alternating rounds."""
    best = {name: float("inf") for name in rivals}
    for _ in range(repeats + 1):  # the first round warms up, and counts if it happens to be the best
        for name, function in rivals.items():
            begun = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - begun)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# model: the same forward passes that training and sampling make

MID = ModelConfig(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=4096, vit_hidden_size=192, vit_intermediate_size=768, vit_num_layers=4, vit_num_heads=4, vit_side=16,
    codec="space_to_depth", latent_side=16,
)  # fmt: skip  # the codec is not used: latents are given
OFFICIAL = {  # CPU seconds of the official code on the same case, one thread of another machine
    "train forward": 0.38, "train forward + backward": 0.86, "prefill": 0.10, "10 steps": 0.55,
    "10 steps, guidance": 1.53, "64 greedy tokens": 0.42,
}  # fmt: skip


def random_reference(generator, side=16):
    patches = torch.randn(side * side, 3 * MID.vit_patch**2, generator=generator)
    return Reference(torch.randn(side * side, MID.token_channels, generator=generator), (side, side), patches, (side, side))


def bench_model(config):
    """A pack of two edits of about 770 tokens each: reference (256 latents, 256 ViT), 60 words, noised target (196)."""
    g = torch.Generator().manual_seed(config.seed)
    model = UnifiedModel(MID).initialise(config.seed)
    torch.nn.init.normal_(model.latent_out.weight, std=0.02, generator=g)
    layout = Layout(0, 1, 2, 3, MID.latent_side, MID.vit_side)
    words = lambda n: torch.randint(4, MID.vocab_size, (n,), generator=g).tolist()
    prompt = Prompt((random_reference(g), words(40)))
    sequence = Sequence(layout)
    for _ in range(2):
        with sequence.document():
            Prompt((random_reference(g), words(40))).write(sequence)
            sequence.text(words(20), loss=True)
            sequence.noise(torch.randn(196, MID.token_channels, generator=g), (14, 14), 0.5)
    packed = sequence.pack()
    target = torch.randn(len(packed.noised), MID.token_channels, generator=g)

    def loss():
        packed.mask.cache.clear()  # a training step has a new pack and plans its attention anew
        und, gen = model(packed)
        return model.cross_entropy(und, packed).mean() + F.mse_loss(model.velocity(packed, gen), target)

    def forward():
        with torch.no_grad():
            loss()

    def backward():
        loss().backward()
        model.zero_grad()

    def steps(*scales):
        paint(model, layout, [prompt], [[None]], [(14, 14)], Sampler(11, 3.0, *scales, guidance_interval=(0.0, 1.0)), g)

    prefill = lambda: think(model, layout, [prompt], 1, 1, 0.0)
    rivals = {"train forward": forward, "train forward + backward": backward, "prefill": prefill,
              "10 steps": lambda: steps(1.0, 1.0), "10 steps, guidance": lambda: steps(4.0, 1.5),
              "64 greedy tokens": lambda: think(model, layout, [prompt], 1, 64, 0.0)}  # fmt: skip
    ours = best_of(config.repeats, **rivals)
    for name in ("10 steps", "10 steps, guidance", "64 greedy tokens"):  # the official figures have the prefill apart
        ours[name] -= ours["prefill"]
    print(f"{len(packed)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {config.threads} thread")
    print(f"{'CPU seconds':28s}{'ours':>8s}{'official*':>11s}{'ratio':>8s}")
    for name, seconds in ours.items():
        print(f"{name:28s}{seconds:8.3f}{OFFICIAL[name]:11.2f}{seconds / OFFICIAL[name]:8.2f}")
    print("* of the official code, on another machine; a ratio between machines is a hint, not a measurement")
    return {name.replace(",", "").replace(" ", "_"): round(seconds, 4) for name, seconds in ours.items()}


BENCHES = {"model": bench_model}


def main(argv):
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    config = parse(Config, PRESETS, argv[bool(name) :])
    with exit_on_user_error(ValueError):
        if name not in BENCHES:
            raise ValueError(f"nothing to measure is called {name!r}; say python bench.py {' or '.join(BENCHES)}")
    torch.set_num_threads(config.threads)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    result = BENCHES[name](config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
