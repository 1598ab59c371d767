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

Left out: model-specific tricks of large batches (nothing here depends on the number of processes).

    python sft.py --config toy             draws the toy world, trains on a CPU, writes out/toy-sft
    python sft.py --config smoke           the same in seconds
    python sft.py --config full --init BAGEL-7B-MoT        fine-tunes a checkpoint; the model's shape comes from it
Run the same command again to resume. Then look: python sample.py --checkpoint out/toy-sft --ref a.png --prompt "…"
"""

import sys
import time
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import flow
import iccot
from data import open_source, stream
from engine import Prompt
from kernels.attention import describe_backend
from model import MODELS, ModelConfig, UnifiedModel
from runtime import loop, processes, sharding, state
from runtime.config import UserError, exit_on_user_error, parse
from runtime.pretrained import find_model, load_config, load_tokenizer, load_weights, save_model
from sequence import Sequence
from studies import metrics
from toy import world
from toy.prepare import toy_tokenizer
from vision import transform


@dataclass(frozen=True)
class Config(ModelConfig):
    config: str = ""  # name of the preset
    init: str = ""  # checkpoint to start from: a folder, or owner/name; "": fresh weights
    # data
    data: str = "toy"  # "toy" draws them; or a tar shard, a folder of them or of records.jsonl
    scale: int = 1  # of the toy world: pixels for each of its own, each way
    workers: int = 0  # processes that read samples ahead
    max_references: int = 4  # pictures in a prompt, at most
    samples_per_step: int = 512  # samples of one optimiser step
    tokens_per_pack: int = 36_864  # at most in one pass (BAGEL): bounds the memory, not the result
    noise_copies: int = 1  # noised copies of each target, sharing prompt and plan
    in_context: bool = True  # false: several references become text to image with the caption
    plan_dropout: float = 0.2  # share of samples without IC-CoT (unpublished in the paper)
    text_dropout: float = 0.1  # share of samples that lose instruction and plan (BAGEL)
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
    average: float = 0.9999  # decay of the moving average of the weights, which is saved (BAGEL)
    ce_weight: float = 1.0  # weight of the text loss
    mse_weight: float = 1.0  # weight of the image loss
    timestep_shift: float = 1.0  # above 1: more noise in training (flow.shift_time)
    # machine
    checkpointing: bool = True  # recompute each block backward: less memory, a third more time
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the arithmetic alone
    sum_every_pass: bool = True  # sum gradients every pass (a shard stays) or once a step
    replicas: int = 1  # copies of the model, each sharded over its part of the processes
    timeout_minutes: float = 30.0  # a process that waits longer than this for another ends the job
    # run
    out: str = "out/full-sft"
    seed: int = 0
    threads: int = 0  # CPU threads; 0 measures which of one and two is faster
    save_every: int = 2000  # steps between training states
    keep: int = 2  # training states that stay
    export: bool = False  # write the newest state as `out`/model (BAGEL's layout) and stop
    async_save: bool = False  # write states while training goes on; one more copy on the host
    sample_every: int = 2000  # steps between pictures of the same eight prompts
    sample_side: int = 1024  # pixels of those pictures
    sample_timesteps: int = 50  # grid points of their sampler
    sample_shift: float = 3.0  # its time shift


# fmt: off
TOY = dict(text_dropout=0.0, vae_dropout=0.0, vit_dropout=0.0, decay=0.5, timestep_shift=5.0, checkpointing=False,
           precision="float32", sum_every_pass=False, sample_side=world.SIZE, sample_timesteps=7, sample_shift=10.0)


PRESETS = {
    "toy": MODELS["toy"] | TOY | dict(
        samples_per_step=14, plan_dropout=0.1, ce_weight=0.3, steps=2000, lr=4e-3, warmup=100, average=0.99,
        beta2=0.98, out="out/toy-sft", save_every=200, sample_every=500,
    ),
    "smoke": MODELS["smoke"] | TOY | dict(
        samples_per_step=16, tokens_per_pack=2048, steps=20, lr=2e-3, warmup=5, average=0.9, out="out/smoke-sft",
        save_every=10, sample_every=20,
    ),
    "small": MODELS["small"] | TOY | dict(  # one data-centre GPU; not run yet
        scale=2, sample_side=64, samples_per_step=96, noise_copies=2, plan_dropout=0.1, ce_weight=0.3, workers=4,
        steps=12_000, lr=6e-4, warmup=500, average=0.999, beta2=0.98, precision="bfloat16", out="out/small-sft",
        save_every=1000, sample_every=1000,
    ),
    "full": dict(),
}
# fmt: on


def model_config(config):
    """The shape of the model: the options, or with `init` that of the checkpoint, which no option may contradict."""
    names = [field.name for field in fields(ModelConfig)]
    options = ModelConfig(**{name: getattr(config, name) for name in names})
    if not config.init:
        return options
    found = load_config(find_model(config.init))
    preset = replace(
        ModelConfig(), **{k: v for k, v in PRESETS.get(config.config, {}).items() if k in names}
    )
    for name in names:
        if getattr(options, name) not in (getattr(preset, name), getattr(found, name)):
            raise UserError(
                f"--{name}={getattr(options, name)}: the model's shape comes from {config.init}, which has "
                f"{name}={getattr(found, name)}; leave the option out"
            )
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
        return (
            len(self.prompt)
            + (len(self.plan) + 2 if self.plan is not None else 0)
            + sum(len(x) + 2 for x, _ in self.noised)
        )

    def write(self, sequence):
        with sequence.document():
            self.prompt.write(sequence)
            if self.plan is not None:
                sequence.text(self.plan, loss=True)
            for x_t, t in self.noised:
                sequence.noise(x_t, self.grid, t)


def encode(model, tokenizer, one, config, generator):
    """data.Sample -> Example. What is dropped, the noise and its times come from the generator."""
    if len(one.references) > config.max_references:
        raise UserError(
            f"sample {one.key} has {len(one.references)} references, max_references={config.max_references}; raise it"
        )
    if len(one.references) > 1 and not config.in_context:
        one = replace(one, references=(), instruction=one.plan.caption)
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
            raise UserError(
                f"a sample takes {len(example)} tokens, more than tokens_per_pack={tokens_per_pack}; raise it, or "
                f"allow fewer references"
            )
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
    ce = (
        model.cross_entropy(und, packed).sum()
        if len(packed.labels)
        else model.lm_head(und[:1]).sum() * 0
    )
    return ce, F.mse_loss(
        model.velocity(packed, gen).float(), target, reduction="sum"
    ) / target.shape[-1]


def backward(model, packs, config):
    """Gradients of one step over all packs of all processes. Returns the mean losses: cross entropy, velocity error.

    Sharding averages gradients over the processes, hence the factor. A process with fewer packs than another repeats
    its last one with weight 0, so that all make the same number of passes.
    """
    counts = [
        sum(len(packed.labels) for packed, _ in packs),
        sum(len(target) for _, target in packs),
    ]
    labels, latents = processes.reduced(counts)
    passes = int(processes.reduced([len(packs)], "max")[0])
    means = torch.zeros(2, dtype=torch.float64)
    for i in range(passes):
        packed, target = packs[min(i, len(packs) - 1)]
        sharding.sum_gradients(model, config.sum_every_pass or i == passes - 1)
        ce, mse = losses(model, packed.to(processes.device()), target.to(processes.device()))
        weight = float(i < len(packs))
        loss = config.ce_weight * ce / max(1, labels) + config.mse_weight * mse / latents
        (loss * weight * processes.size()).backward()
        means += weight * torch.stack([ce.detach() / max(1, labels), mse.detach() / latents]).cpu()
    return processes.reduced(means.tolist())


def build(config, folder):
    """(model, tokenizer) to start from: the checkpoint `init`, or fresh weights; sharded over the processes."""
    shape = model_config(config)
    shard = lambda model: sharding.shard(model, config.precision, config.replicas)
    if config.init:
        model = load_weights(find_model(config.init), shape, processes.device(), prepare=shard)
        tokenizer = load_tokenizer(find_model(config.init))
    else:
        model = shard(UnifiedModel(shape).initialise(config.seed).to(processes.device()))
        tokenizer = toy_tokenizer(folder, shape.vocab_size)
    model.checkpointing = config.checkpointing
    return model, tokenizer


@exit_on_user_error()
def train(config):
    """The whole stage: resumes, trains, and writes the averaged model to `out`/model."""
    with exit_on_user_error(ValueError):
        processes.launch(config.timeout_minutes)
        folder = loop.start(config)
        each = processes.share(config.samples_per_step, "samples a step", "samples_per_step")
        step = state.newest_step(folder)
        steps = loop.last_step(folder, step, config)
        if (folder / "model").is_dir() and step >= config.steps:
            processes.say(f"{folder}/model is finished ({step} steps); raise --steps to train on")
            return
        source = open_source(config.data, config.seed, config.max_references, config.scale)
        model, tokenizer = build(config, folder)
        layout = model.config.layout(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        config.lr,
        (0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    parameters = dict(model.named_parameters())
    average = state.new_average(parameters)
    if step:
        state.load_state(folder, step, parameters, optimizer, average)
    loop.cut_log(folder, step)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    processes.say(
        f"sft: {millions:.1f}M parameters, {config.samples_per_step} samples a step, {each} on each of {processes.size()} "
        f"processes, {torch.get_num_threads()} CPU threads, {describe_backend()}, step {step} of {config.steps}"
    )
    begun, stop, saver, bad = (
        time.perf_counter(),
        loop.Stop(),
        state.Saver(folder, config.keep, config.async_save),
        0,
    )
    positions = [i for later in range(step, steps) for i in sample_indices(config, later)]
    samples, first = stream(source, positions, config.workers), step
    bar = tqdm(
        range(step, steps),
        initial=step,
        total=config.steps,
        desc="sft",
        disable=None if processes.is_main() else True,
    )
    for step in bar:
        values, finite = iteration(model, optimizer, layout, tokenizer, samples, config, step)
        bad = 0 if finite else bad + 1
        if bad == loop.BAD_STEPS:
            loop.give_up(folder, step, {"values": values, "samples": sample_indices(config, step)})
        if finite:
            state.update_average(average, parameters, min(config.average, (step + 1) / (step + 10)))
        values = processes.merged(values)
        loop.log(folder, values)
        bar.set_postfix(ce=f"{values['ce']:.3f}", mse=f"{values['mse']:.3f}")
        saver.poll()
        last, wanted = step + 1 == config.steps, stop.wanted()
        if (step + 1) % config.save_every == 0 or last or wanted:
            saver.save(step + 1, state.pack_state(parameters, optimizer, average))
        if wanted and not last:
            saver.wait()
            loop.stop_here(step + 1)
        if (step + 1) % config.sample_every == 0 or last:
            with sharding.exchanged(model, average):
                metrics.save_strip(
                    folder,
                    step + 1,
                    model,
                    layout,
                    tokenizer,
                    config,
                    config.data,
                    side=config.sample_side,
                    shift=config.sample_shift,
                    num_timesteps=config.sample_timesteps,
                )
    saver.wait()
    weights = sharding.whole_weights(average, getattr(torch, config.precision))
    if processes.is_main():
        save_model(model, tokenizer, folder / "model", weights)
    processes.say(f"sft: {loop.seconds(begun)}{loop.pace(folder, first, model, config.precision)}")
    processes.say(f"sft: model in {folder}/model, pictures in {folder}/samples")


def sample_indices(config, step):
    """Numbers of the samples that this process takes in a step."""
    return list(
        range(
            step * config.samples_per_step + processes.rank(),
            (step + 1) * config.samples_per_step,
            processes.size(),
        )
    )


def iteration(model, optimizer, layout, tokenizer, samples, config, step):
    """One optimiser step on the next samples. Returns the line of the log, and whether the gradient was finite."""
    begun = time.perf_counter()
    examples = [
        encode(model, tokenizer, next(samples), config, processes.generator(config.seed, i))
        for i in sample_indices(config, step)
    ]
    packs = pack(layout, examples, config.tokens_per_pack)
    ce, mse = backward(model, packs, config)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    norm, finite = sharding.step_if_finite(optimizer, config.max_grad_norm)
    return {
        "step": step,
        "ce": ce,
        "mse": mse,
        "grad_norm": norm,
        "skipped": float(not finite),
        "lr": group["lr"],
        "tokens": sum(len(packed) for packed, _ in packs),
        "seconds": time.perf_counter() - begun,
    }, finite


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
