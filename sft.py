"""
Stage 1, supervised fine-tuning: write the in-context chain of thought, then paint what it says (paper section 4).

    L = ce_weight * L_cot + mse_weight * L_img
    L_cot = mean over plan tokens of  - log p(r_i | prompt, r_<i)                        the prompt carries no loss
    L_img = mean over latents of      | v_theta(x_t, t, prompt, plan) - (noise - x_0) |^2,   x_t = (1 - t) x_0 + t noise

A step takes `samples_per_step` samples and packs them into sequences of at most `tokens_per_pack` tokens, without
padding; both means run over the whole step, however it is packed. A share of the samples has no plan (paper: SFT mixes
both, so that the model can still draw directly), and conditions are dropped as in BAGEL (§13.3), for guidance. One
sample carries `noise_copies` noised copies of its target, at different times and mutually invisible: its prompt and
plan are computed once for all of them.

Left out: more than one process.

    python sft.py --config toy             draws the toy world, trains on a CPU, writes out/toy-sft
    python sft.py --config smoke           the same in seconds
    python sft.py --config full --init BAGEL-7B-MoT        fine-tunes a checkpoint; the model's shape comes from it
Run the same command again to resume. Then look: python sample.py --checkpoint out/toy-sft --ref a.png --prompt "…"
"""

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
import flow
import iccot
import run
from config import UserError, exit_on_user_error, parse
from kernels.attention import describe_backend
from model import MODELS, ModelConfig, UnifiedModel
from pretrained import find_model, load_config, load_tokenizer, load_weights, save_model
from sample import Prompt
from sequence import Sequence
from vision import transform


@dataclass(frozen=True)
class Config(ModelConfig):
    config: str = ""  # name of the preset
    init: str = ""  # checkpoint to start from: a folder, or owner/name on Hugging Face; "": fresh weights
    # data
    max_references: int = 4  # pictures in a prompt, at most
    samples_per_step: int = 512  # samples of one optimiser step
    tokens_per_pack: int = 36_864  # at most in one forward and backward pass: bounds the memory, not the result (BAGEL)
    noise_copies: int = 1  # noised copies of each target, sharing prompt and plan
    plan_dropout: float = 0.2  # share of samples without IC-CoT (unpublished in the paper)
    text_dropout: float = 0.1  # share of samples that lose instruction and plan (BAGEL's fine-tuning recipe)
    vae_dropout: float = 0.3  # share of references that lose their latents
    vit_dropout: float = 0.3  # share of references that lose their ViT tokens
    # optimisation
    steps: int = 100_000
    lr: float = 5e-6  # peak, after warmup (paper: 5e-6)
    warmup: int = 2000  # steps of linear warmup (BAGEL)
    decay: float = 0.0  # last share of the steps over which the rate falls linearly to zero
    weight_decay: float = 0.0
    beta2: float = 0.95  # AdamW (BAGEL)
    max_grad_norm: float = 1.0
    average: float = 0.9999  # decay of the moving average of the weights, which is what is saved (BAGEL)
    ce_weight: float = 1.0  # weight of the text loss
    mse_weight: float = 1.0  # weight of the image loss
    timestep_shift: float = 1.0  # above 1: more noise in training (flow.shift_time)
    checkpointing: bool = True  # recompute each block in the backward pass: less memory, a third more time
    # run
    out: str = "out/full-sft"
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures which of one and two is faster
    save_every: int = 2000  # steps between training states
    sample_every: int = 2000  # steps between pictures of held-out prompts
    sample_timesteps: int = 50  # grid points of those pictures
    sample_shift: float = 3.0  # time shift of those pictures


TOY = dict(text_dropout=0.0, vae_dropout=0.0, vit_dropout=0.0, decay=0.5, timestep_shift=5.0, checkpointing=False,
           sample_timesteps=7, sample_shift=10.0)  # fmt: skip
PRESETS = {
    "toy": MODELS["toy"] | TOY | dict(
        samples_per_step=8, noise_copies=3, plan_dropout=0.1, steps=2200, lr=4e-3, warmup=100, average=0.99,
        beta2=0.98, out="out/toy-sft", save_every=200, sample_every=500,
    ),
    "smoke": MODELS["smoke"] | TOY | dict(
        samples_per_step=16, tokens_per_pack=2048, steps=20, lr=2e-3, warmup=5, average=0.9, out="out/smoke-sft",
        save_every=10, sample_every=20,
    ),
    "small": MODELS["small"] | TOY | dict(
        samples_per_step=128, noise_copies=4, steps=20_000, lr=3e-4, warmup=500, decay=0.3, average=0.999,
        timestep_shift=2.0, out="out/small-sft", save_every=1000, sample_every=1000,
    ),
    "full": dict(),
}  # fmt: skip


def model_config(config):
    """The shape of the model: the options, or with `init` that of the checkpoint, which no option may contradict."""
    names = [field.name for field in fields(ModelConfig)]
    options = ModelConfig(**{name: getattr(config, name) for name in names})
    if not config.init:
        return options
    found = load_config(find_model(config.init))
    preset = replace(ModelConfig(), **{k: v for k, v in PRESETS.get(config.config, {}).items() if k in names})
    for name in names:
        if getattr(options, name) not in (getattr(preset, name), getattr(found, name)):
            raise UserError(f"--{name}={getattr(options, name)}: the model's shape comes from {config.init}, which has "
                            f"{name}={getattr(found, name)}; leave the option out")  # fmt: skip
    return found


def learning_rate(step, config):
    """Linear warmup, constant, linear decay over the last `decay` of the run."""
    left = (config.steps - step) / max(1, config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup), left if config.decay else 1.0)


@dataclass
class Example:
    """One sample as the model trains on it: prompt, plan (None: paint directly), and noised copies of the target."""

    prompt: Prompt
    plan: list | None
    noised: list  # (x_t (n, C), t) of each copy
    grid: tuple  # (h, w) tokens of the target
    target: torch.Tensor  # velocities (copies * n, C)

    def __len__(self):
        return len(self.prompt) + (len(self.plan) + 2 if self.plan is not None else 0) + sum(len(x) + 2 for x, _ in self.noised)

    def write(self, sequence):
        with sequence.document():
            self.prompt.write(sequence)
            if self.plan is not None:
                sequence.text(self.plan, loss=True)
            for x_t, t in self.noised:
                sequence.noise(x_t, self.grid, t)


def encode(model, tokenizer, one, config, generator):
    """data.Sample -> Example. What is dropped, the noise and its times come from the generator."""
    chance = lambda probability: float(torch.rand((), generator=generator)) < probability
    without_text, without_plan = chance(config.text_dropout), chance(config.plan_dropout)
    items = []
    for image in one.references:
        reference = model.read(image)
        if chance(config.vae_dropout):
            reference = replace(reference, latents=None)
        if chance(config.vit_dropout):
            reference = replace(reference, patches=None)
        items.append(reference)
    plan = None if without_text or without_plan else tokenizer.encode(iccot.render(one.plan))
    items += [] if without_text else [tokenizer.encode(one.instruction)]
    clean, grid = model.encode(transform(one.target, model.config.image_rule))  # (n, C)
    noised, targets = [], []
    for t in flow.sample_timesteps(config.noise_copies, config.timestep_shift, generator).tolist():
        noise = torch.randn(clean.shape, generator=generator)
        noised.append((flow.interpolate(clean, noise, t), t))
        targets.append(flow.velocity(clean, noise))
    return Example(Prompt(tuple(items)), plan, noised, grid, torch.cat(targets))


def pack(layout, examples, tokens_per_pack):
    """Fill packs with whole examples in order: a list of (packed sequence, velocities of its noised tokens (M, C))."""
    packs, room = [], 0
    for example in examples:
        if len(example) > tokens_per_pack:
            raise UserError(f"a sample takes {len(example)} tokens, more than tokens_per_pack={tokens_per_pack}; raise it, or "
                            f"allow fewer references")  # fmt: skip
        if len(example) > room:
            packs.append((Sequence(layout), []))
            room = tokens_per_pack
        example.write(packs[-1][0])
        packs[-1][1].append(example.target)
        room -= len(example)
    return [(sequence.pack(), torch.cat(targets)) for sequence, targets in packs]


def losses(model, packed, target):
    """(cross entropy summed over the plan tokens, squared velocity error: mean over channels, summed over tokens)."""
    und, gen = model(packed)
    ce = model.cross_entropy(und, packed).sum() if len(packed.labels) else und.sum() * 0
    return ce, F.mse_loss(model.velocity(packed, gen).float(), target, reduction="sum") / target.shape[-1]


def backward(model, packs, config):
    """Gradients of one step over all its packs. Returns the mean losses: cross entropy, velocity error."""
    labels = max(1, sum(len(packed.labels) for packed, _ in packs))
    latents = sum(len(target) for _, target in packs)
    means = torch.zeros(2)
    for packed, target in packs:
        ce, mse = losses(model, packed, target)
        (config.ce_weight * ce / labels + config.mse_weight * mse / latents).backward()
        means += torch.stack([ce.detach() / labels, mse.detach() / latents])
    return means.tolist()


def train(config):
    """The whole stage: resumes, trains, and writes the averaged model to `out`/model."""
    with exit_on_user_error(ValueError):
        folder = run.start(config)
        shape = model_config(config)
        step, state = run.load_state(folder)
        if (folder / "model").is_dir() and step >= config.steps:
            print(f"{folder}/model is finished ({step} steps); raise --steps to train on")
            return
        if config.init:
            model = load_weights(find_model(config.init), shape)
        else:
            model = UnifiedModel(shape).initialise(config.seed)
        model.checkpointing = config.checkpointing
        tokenizer = load_tokenizer(find_model(config.init)) if config.init else toy_tokenizer(folder, shape.vocab_size)
        layout = shape.layout(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, config.beta2), weight_decay=config.weight_decay,
                                  fused=True)  # fmt: skip
    average = run.new_average(model)
    if state is not None:
        run.unpack_state(state, model, optimizer, average)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"sft: {millions:.1f}M parameters, {torch.get_num_threads()} CPU threads, {describe_backend()}, step {step} of {config.steps}")
    begun = time.perf_counter()
    bar = tqdm(range(step, config.steps), initial=step, total=config.steps, disable=None, desc="sft")
    for step in bar:
        values = iteration(model, optimizer, layout, tokenizer, config, step)
        run.update_average(average, model, min(config.average, (step + 1) / (step + 10)))
        run.log(folder, values)
        bar.set_postfix(ce=f"{values['ce']:.3f}", mse=f"{values['mse']:.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            run.save_state(folder, step + 1, run.pack_state(model, optimizer, average))
        if (step + 1) % config.sample_every == 0 and step + 1 < config.steps:
            strip(folder, step + 1, model, average, layout, tokenizer, config)
    save_model(model, tokenizer, folder / "model", average)
    strip(folder, config.steps, model, average, layout, tokenizer, config)
    print(f"sft: done in {run.seconds(begun)}; model in {folder}/model, pictures in {folder}/samples")


def iteration(model, optimizer, layout, tokenizer, config, step):
    """One optimiser step. Returns the line of the log."""
    begun = time.perf_counter()
    indices = range(step * config.samples_per_step, (step + 1) * config.samples_per_step)
    examples = [encode(model, tokenizer, data.draw_sample("train", i, config.seed, config.max_references), config,
                       run.generator(config.seed, i)) for i in indices]  # fmt: skip
    packs = pack(layout, examples, config.tokens_per_pack)
    ce, mse = backward(model, packs, config)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad()
    return {"step": step, "ce": ce, "mse": mse, "grad_norm": norm.item(), "lr": group["lr"],
            "tokens": sum(len(packed) for packed, _ in packs), "seconds": time.perf_counter() - begun}  # fmt: skip


def toy_tokenizer(folder, vocab_size):
    """The tokenizer of the run, trained once on toy texts."""
    path = Path(folder) / "tokenizer"
    return load_tokenizer(path) if path.is_dir() else data.train_tokenizer(path, vocab_size)


def strip(folder, step, model, average, layout, tokenizer, config):
    """Pictures of the same held-out prompts from the same noise, by the averaged weights, in `samples`."""
    run.swap_average(model, average)
    evaluate.save_strip(folder / "samples" / f"{step:06d}.png", model, layout, tokenizer, config.max_references,
                        shift=config.sample_shift, num_timesteps=config.sample_timesteps)  # fmt: skip
    run.swap_average(model, average)


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
