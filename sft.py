"""
Stage 1, supervised fine-tuning: write the in-context chain of thought, then paint what it says (paper section 4).

    L = ce_weight * L_cot + mse_weight * L_img
    L_cot = mean over plan tokens of  - log p(r_i | prompt, r_<i)                        the prompt carries no loss
    L_img = mean over latents of      | v_theta(x_t, t, prompt, plan) - (noise - x_0) |^2,   x_t = (1 - t) x_0 + t noise

A step packs `samples_per_step` samples into one sequence without padding. A share of them has no plan (paper: SFT mixes
both, so that the model can still draw directly). One sample carries `noise_copies` noised copies of its target, at
different times and mutually invisible: its prompt and plan are computed once for all of them.

Left out: more than one process, gradient accumulation.

    python sft.py --config toy             draws the toy world, trains on a CPU, writes out/toy-sft
    python sft.py --config smoke           the same in seconds
Run the same command again to resume. Then look: python sample.py --checkpoint out/toy-sft --ref a.png --prompt "…"
"""

import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
import flow
import iccot
import run
from config import exit_on_user_error, parse
from kernels.attention import describe_backend
from model import MODELS, ModelConfig, UnifiedModel
from pretrained import load_tokenizer, save_model
from sample import Prompt
from sequence import Sequence
from vision import to_tensor


@dataclass(frozen=True)
class Config(ModelConfig):
    # data
    max_references: int = 4  # pictures in a prompt, at most
    samples_per_step: int = 512  # samples packed into one optimiser step
    noise_copies: int = 1  # noised copies of each target, sharing prompt and plan
    plan_dropout: float = 0.2  # share of samples without IC-CoT (unpublished in the paper)
    condition_dropout: float = 0.1  # share of samples that lose all text, and of those that lose all pictures
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
    timestep_shift: float = 1.0  # above 1: more noise, in training and in sampling (flow.shift_time)
    # run
    out: str = "out/full-sft"
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures which of one and two is faster
    save_every: int = 2000  # steps between training states
    sample_every: int = 2000  # steps between pictures of held-out prompts


PRESETS = {
    "toy": dict(
        MODELS["toy"], samples_per_step=8, noise_copies=3, plan_dropout=0.1, condition_dropout=0.0, steps=2200, lr=4e-3,
        warmup=100, decay=0.5, average=0.99, timestep_shift=5.0, beta2=0.98, out="out/toy-sft", save_every=200,
        sample_every=500,
    ),
    "smoke": dict(
        MODELS["smoke"], samples_per_step=16, noise_copies=1, condition_dropout=0.0, steps=20, lr=2e-3, warmup=5,
        decay=0.5, average=0.9, timestep_shift=5.0, out="out/smoke-sft", save_every=10, sample_every=20,
    ),
    "small": dict(
        MODELS["small"], samples_per_step=128, noise_copies=4, steps=20_000, lr=3e-4, warmup=500, decay=0.3,
        average=0.999, timestep_shift=2.0, out="out/small-sft", save_every=1000, sample_every=1000,
    ),
    "full": dict(),
}  # fmt: skip


def model_config(config):
    """The part of the options that is the shape of the model."""
    return ModelConfig(**{field.name: getattr(config, field.name) for field in fields(ModelConfig)})


def learning_rate(step, config):
    """Linear warmup, constant, linear decay over the last `decay` of the run."""
    left = (config.steps - step) / max(1, config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup), left if config.decay else 1.0)


def pack_samples(model, layout, tokenizer, samples, config, generator):
    """One packed sequence for a step, and the velocity each noised token shall have (M, C).

    samples: data.Sample. The order within a document: pictures, instruction, plan (with loss), noised targets.
    """
    sequence, targets = Sequence(layout), []
    for one in samples:
        without_plan, without_text, without_pictures = (
            torch.rand(3, generator=generator)
            < torch.tensor([config.plan_dropout, config.condition_dropout, config.condition_dropout])
        ).tolist()
        items = [] if without_pictures else [model.read(image) for image in one.references]
        items += [] if without_text else [tokenizer.encode(one.instruction)]
        clean, grid = model.encode(to_tensor(one.target))  # (n, C)
        with sequence.document():
            Prompt(tuple(items)).write(sequence)
            if not without_plan and not without_text:
                sequence.text(tokenizer.encode(iccot.render(one.plan)), loss=True)
            for t in flow.sample_timesteps(config.noise_copies, config.timestep_shift, generator).tolist():
                noise = torch.randn(clean.shape, generator=generator)
                sequence.noise(flow.interpolate(clean, noise, t), grid, t)
                targets.append(flow.velocity(clean, noise))
    return sequence.pack(), torch.cat(targets)


def losses(model, packed, target):
    """(cross entropy of the plan tokens, mean squared error of the velocities), each a mean over the pack."""
    und, gen = model(packed)
    logits = model.lm_head(und[packed.label_rows]).float()  # (labels, vocabulary)
    ce = F.cross_entropy(logits, packed.labels) if len(packed.labels) else logits.sum()
    return ce, F.mse_loss(model.velocity(packed, gen).float(), target)


def train(config):
    """The whole stage: resumes, trains, and writes the averaged model to `out`/model."""
    with exit_on_user_error(ValueError):
        folder = run.start(config)
        step, state = run.load_state(folder)
        model = UnifiedModel(model_config(config)).initialise(config.seed)
    if (folder / "model").is_dir() and step >= config.steps:
        print(f"{folder}/model is finished ({step} steps); raise --steps to train on")
        return
    tokenizer = toy_tokenizer(folder, config)
    layout = model.config.layout(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, config.beta2), weight_decay=config.weight_decay,
                                  fused=True)  # fmt: skip
    average = run.new_average(model)
    if state is not None:
        run.unpack_state(state, model, optimizer, average)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"sft: {millions:.1f}M parameters, {torch.get_num_threads()} CPU threads, {describe_backend()}, step {step} of {config.steps}")
    begun = time.perf_counter()
    for step in tqdm(range(step, config.steps), initial=step, total=config.steps, disable=None, desc="sft"):
        begun_step = time.perf_counter()
        first = step * config.samples_per_step
        samples = [data.draw_sample("train", first + i, config.seed, config.max_references) for i in range(config.samples_per_step)]
        packed, target = pack_samples(model, layout, tokenizer, samples, config, run.generator(config.seed, step))
        ce, mse = losses(model, packed, target)
        (config.ce_weight * ce + config.mse_weight * mse).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        run.update_average(average, model, min(config.average, (step + 1) / (step + 10)))
        run.log(folder, {"step": step, "ce": ce.item(), "mse": mse.item(), "grad_norm": norm.item(), "lr": group["lr"],
                         "tokens": len(packed), "seconds": time.perf_counter() - begun_step})  # fmt: skip
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            run.save_state(folder, step + 1, run.pack_state(model, optimizer, average))
        if (step + 1) % config.sample_every == 0 and step + 1 < config.steps:
            strip(folder, step + 1, model, average, layout, tokenizer, config)
    save_model(model, tokenizer, folder / "model", average)
    strip(folder, config.steps, model, average, layout, tokenizer, config)
    print(f"sft: done in {run.seconds(begun)}; model in {folder}/model, pictures in {folder}/samples")


def toy_tokenizer(folder, config):
    """The tokenizer of the run, trained once on toy texts."""
    path = Path(folder) / "tokenizer"
    return load_tokenizer(path) if path.is_dir() else data.train_tokenizer(path, config.vocab_size)


def strip(folder, step, model, average, layout, tokenizer, config):
    """Pictures of the same held-out prompts from the same noise, by the averaged weights, in `samples`."""
    run.swap_average(model, average)
    evaluate.save_strip(folder / "samples" / f"{step:06d}.png", model, layout, tokenizer, config.max_references)
    run.swap_average(model, average)


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
