"""
Stage 1, supervised fine-tuning (SFT): write the IC-CoT, then paint what it says.

    L     = ce_weight * L_cot + L_img
    L_cot = mean over plan tokens of  - log p(r_i | prompt, r_<i)        the prompt carries no loss
    L_img = mean over latent values of  (v_theta(x_t, t, prompt, plan) - (noise - x_0))^2
            with x_t = (1 - t) x_0 + t noise

One sample is one document; its noised copies, at different times, are leaves that nobody sees, so
that one prompt and one plan serve them all:

    pictures | instruction | plan (carries L_cot) | {noised copy} ...

A share of the samples has no plan (the paper's SFT mixes both, so that the model can still draw
directly), and conditions are dropped as in BAGEL (docs/BAGEL.md §13.3), so that guidance has its
contexts: all text, the latents or the ViT tokens of a reference. What is dropped, the noise and its
times depend on (seed, sample) alone.

A step takes `samples_per_step` samples and packs them into sequences of at most `tokens_per_pack`
tokens, without padding; both means run over the whole step, however it is packed. All processes
wait for the one with the largest pack, in every pass. So `Dealer` deals the samples of a step by
the tokens that their pictures will take, which are known before they are read, and `fill` places
the longest first.

    numbers -> Examples (loader workers: decode, resize) -> fill -> pack_of (codec, noise) -> a pass

With `train` gen or lora the expert that writes is frozen, and L = L_img: L_cot could reach the
painter only where plans see the latents of references, and is logged alone. So such a stage teaches
to paint by a plan; to write one is learned with train=all.

Letters: sequence.py. Left out: tricks of large batches (the number of processes changes no mean),
dealing samples of several steps at once (a step's samples are part of the recipe).

    python sft.py --config toy             draws the toy world, trains on a CPU; smoke: in seconds
    python sft.py --config full --init BAGEL-7B-MoT --data shards     fine-tunes it (README.md)
Run the same command again to resume. Then look at out/toy-sft/curves.png, or at sample.py.
"""

import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image

import flow
import iccot
from data import open_source, stream
from engine import Engine, Sampler, Thinking, is_text
from kernels.attention import describe_backend
from model import MODELS, ModelConfig, UnifiedModel
from runtime import accountant, loop, processes, sharding
from runtime.config import UserError, exit_on_user_error, parse
from runtime.lora import load_trained, trained_parameters
from runtime.pretrained import shape_of
from runtime.quantised import count
from runtime.state import TrainingState, new_average, newest_step
from sequence import Packed, Sequence
from studies.curves import save_story, save_strip
from studies.metrics import HeldOut, measured_together
from toy import world
from toy.prepare import metric_clip_of_all, painter_of, toy_tokenizer
from vision import resize, to_tensor

WORDS = 400  # tokens of an instruction and a plan with four references, generously
WORDS_OF_ONE = 60  # more, for each reference beyond four
EVAL_SAMPLES = 64  # prompts of the measurements at eval_every

# --------------------------------------------------------------------------------------------------
# options


@dataclass(frozen=True)
class Config(loop.Options):
    MAY_CHANGE: ClassVar[tuple] = (*loop.Options.MAY_CHANGE, "workers")

    config: str = ""  # name of the preset
    model: Literal["toy", "smoke", "small", "rehearsal", "full"] = "full"  # shape of fresh weights
    init: str = ""  # checkpoint to start from: a folder, or owner/name; "": fresh weights
    # what the model sees of a sample
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
    # optimisation
    samples_per_step: int = 512  # samples of one optimiser step
    steps: int = 100_000
    lr: float = 5e-6  # peak, after warmup (paper: 5e-6)
    warmup: int = 2000  # steps of linear warmup (BAGEL)
    decay: float = 0.0  # last share of the steps over which the rate falls linearly to zero
    beta2: float = 0.95  # AdamW (BAGEL)
    average: float = 0.9999  # decay of the moving average of the weights, which is saved (BAGEL)
    ce_weight: float = 1.0  # weight of the text loss beside the image loss, with train=all
    # machine; more in runtime/loop.py
    tokens_per_pack: int = 45_056  # at most in one pass: bounds the memory, not the result
    workers: int = 0  # processes that read samples ahead, beside each that trains
    # run
    out: str = "out/full-sft"
    save_every: int = 2000  # steps between training states, and strips of the same eight prompts
    sample_timesteps: int = 50  # grid points of the strips' sampler
    sample_shift: float = 3.0  # its time shift
    sample_plan_tokens: int = 256  # of their plans, at most

    def __post_init__(self):
        super().__post_init__()
        loop.positive(
            samples_per_step=self.samples_per_step,
            tokens_per_pack=self.tokens_per_pack,
            noise_copies=self.noise_copies,
            timestep_shift=self.timestep_shift,
        )
        loop.not_negative(
            lr=self.lr,
            warmup=self.warmup,
            workers=self.workers,
            ce_weight=self.ce_weight,
            pretraining_steps=self.pretraining_steps,
        )
        loop.shares(
            plan_dropout=self.plan_dropout,
            text_dropout=self.text_dropout,
            vae_dropout=self.vae_dropout,
            vit_dropout=self.vit_dropout,
            decay=self.decay,
            painter_errors=self.painter_errors,
            filter_targets=self.filter_targets,
        )
        loop.decays(average=self.average, beta2=self.beta2)
        if self.train != "all" and not self.init:
            raise ValueError(
                f"train={self.train} keeps most weights as they are, and without a checkpoint they "
                f"are fresh ones: name one with --init, or use --train all"
            )

    @property
    def held_out(self):
        """Prompts of the strips, painted without guidance; measurements have more."""
        return HeldOut(
            data=self.data,
            count=8,
            max_references=self.max_references,
            side=self.picture_side,
            sampler=Sampler(self.sample_timesteps, self.sample_shift, guidance_interval=(0.0, 1.0)),
            thinking=Thinking(self.sample_plan_tokens),
            batch=self.eval_batch,
        )


# fmt: off
TOY = dict(
    data="toy", text_dropout=0.0, vae_dropout=0.0, vit_dropout=0.0, decay=0.5, timestep_shift=5.0,
    checkpointing=False, precision="float32", picture_side=world.SIZE, sample_timesteps=7,
    sample_shift=10.0, sample_plan_tokens=72, eval_batch=50, plan_dropout=0.1,
    metric="out/toy-clip-metric", painter_errors=0.45,
)
PRESETS = {
    "toy": TOY | dict(
        model="toy", samples_per_step=14, ce_weight=0.3, steps=2000, pretraining_steps=1500,
        lr=4e-3, warmup=100, average=0.99, beta2=0.98, out="out/toy-sft", save_every=250,
    ),
    "smoke": TOY | dict(
        model="smoke", samples_per_step=8, tokens_per_pack=2048, steps=60, lr=6e-3, warmup=5,
        average=0.9, out="out/smoke-sft", save_every=30, metric="out/smoke-clip-metric",
    ),
    "small": TOY | dict(  # one data-centre GPU; not run yet
        model="small", picture_side=64, samples_per_step=96, noise_copies=2, ce_weight=0.3,
        workers=4, steps=12_000, pretraining_steps=9000, lr=6e-4, warmup=500, average=0.999,
        beta2=0.98, precision="bfloat16", out="out/small-sft", save_every=1000,
    ),
    "rehearsal": dict(  # the recipe of full on thin weights, 512 x 512
        model="rehearsal", data="toy", picture_side=512, samples_per_step=4, steps=20, lr=1e-3,
        warmup=5, average=0.9, precision="float32", out="out/rehearsal-sft", save_every=10,
        sample_timesteps=5, metric="out/smoke-clip-metric",
    ),
    "full": dict(workers=4),
}
# fmt: on

# --------------------------------------------------------------------------------------------------
# one sample as the model sees it


@dataclass(frozen=True)
class Example:
    """One sample as the model trains on it; its pictures are still pixels, 8 bits each. What is
    larger, patches, latents and noise in float32, is made pack by pack."""

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


@dataclass(frozen=True)
class Drops:
    """What a sample loses, and the generator that its times and noise come from."""

    text: bool
    plan: bool
    kept: list  # of each reference: (its latents, its ViT tokens)
    generator: torch.Generator


def drops(config, number, references):
    """The Drops of sample `number`, which has so many references."""
    generator = processes.generator(config.seed, number)

    def chance(probability):
        return float(torch.rand((), generator=generator)) < probability

    text, plan = chance(config.text_dropout), chance(config.plan_dropout)
    kept = [
        (not chance(config.vae_dropout), not chance(config.vit_dropout)) for _ in range(references)
    ]
    return Drops(text, plan, kept, generator)


class Examples:
    """The Examples of a source, by the numbers of the samples: a source for `data.stream`, whose
    workers then decode and resize. shape: of the model."""

    def __init__(self, source, tokenizer, shape, config):
        self.source, self.tokenizer, self.shape, self.config = source, tokenizer, shape, config

    def __getitem__(self, number):
        return make_example(self.source[number], number, self.tokenizer, self.shape, self.config)


def make_example(sample, number, tokenizer, shape, config):
    """iccot.Sample -> Example. What is dropped depends on (seed, number); shape: of the model."""
    if len(sample.references) > 1 and not config.in_context:
        sample = replace(sample, references=(), instruction=sample.plan.caption)
    lost = drops(config, number, len(sample.references))
    prompt, pictures = [], 0
    for item in iccot.arranged(sample.references, sample.instruction):
        if not isinstance(item, str):
            vae, vit = lost.kept[pictures]
            prompt.append(shape.resized(item, vae=vae, vit=vit))
            pictures += 1
        elif not lost.text:
            prompt.append(tokenizer.encode(item))
    plan = None
    if not lost.text and not lost.plan:
        plan = tokenizer.encode(iccot.render(sample.plan))
    height, width = shape.picture_grid(*sample.target.size)
    texts = sum(len(ids) + 2 for ids in (*prompt, plan) if is_text(ids))
    references = sum(shape.tokens_of(item) for item in prompt if not is_text(item))
    noised = config.noise_copies * height * width
    return Example(
        number=number,
        prompt=tuple(prompt),
        plan=plan,
        target=resize(sample.target, shape.image_rule),
        tokens=texts + references + noised + 2 * config.noise_copies,
        noised=noised,
    )


# --------------------------------------------------------------------------------------------------
# packs


class Dealer:
    """Which samples of a step each process takes: as many as the others, and about as many tokens.

    Lengths are those of references of the largest size: how many there are, and what of them is
    dropped, is known before anything is read. Every process finds the same.
    """

    def __init__(self, config, shape, source):
        """shape: of the model; source.references(position): how many a sample has."""
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
        latents, patches = picture_tokens(self.shape)
        kept = drops(self.config, number, references).kept
        return sum(vae * latents + vit * patches for vae, vit in kept)


def picture_tokens(shape):
    """Tokens of a picture of the largest size, markers included: latents, and ViT tokens."""
    return shape.latent_side**2 + 2, shape.vit_side**2 + 2


def check_budget(shape, config):
    """UserError unless a pack holds the largest sample that there may be at this resolution.

    Found out before the first step, not at the first sample with all references.
    """
    latents, patches = picture_tokens(shape)
    needed = config.max_references * (latents + patches) + config.noise_copies * latents
    needed += WORDS + WORDS_OF_ONE * max(0, config.max_references - 4)
    if needed > config.tokens_per_pack:
        raise UserError(
            f"tokens_per_pack={config.tokens_per_pack}: a sample with max_references="
            f"{config.max_references} may take {needed} tokens; raise tokens_per_pack to "
            f"that, or lower max_references"
        )


def fill(lengths, tokens_per_pack):
    """Packs of examples of these lengths: a list of their numbers each.

    The longest are placed first, each into the first pack that has room for it; within a pack the
    order stays. UserError for one that is longer than a pack.
    """
    packs, room = [], []  # of each pack: numbers of examples, tokens left
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        if length > tokens_per_pack:
            raise UserError(
                f"a sample takes {length} tokens, more than "
                f"tokens_per_pack={tokens_per_pack}; raise it, or allow fewer references"
            )
        place = next((i for i, left in enumerate(room) if length <= left), len(room))
        if place == len(room):
            packs.append([])
            room.append(tokens_per_pack)
        packs[place].append(number)
        room[place] -= length
    return [sorted(numbers) for numbers in packs]


@dataclass
class Pack:
    """Whole examples in one sequence, and the velocities (M, C) of its noised tokens."""

    packed: Packed
    target: torch.Tensor


def pack_of(engine, examples, config):
    """The Pack of these examples. Latents and velocities are where the model is, the rest is not.

    What needs no GPU comes first: the first copy to it waits until it has done all it was given.
    """
    sequence, examples = Sequence(engine.layout), [example.as_tensors() for example in examples]
    velocities = []
    for example in examples:
        velocities += write(example, sequence, engine, config)
    return Pack(sequence.pack(), torch.cat(velocities))  # (M, C)


def write(example, sequence, engine, config):
    """Append an Example, as tensors, to a sequence. Returns the velocities (T, C) of its copies."""
    model, where, velocities = engine.model, engine.device, []
    references = sum(not is_text(item) for item in example.prompt)
    with sequence.document():
        for item in example.prompt:
            if is_text(item):
                sequence.text(item)
            else:
                sequence.image(model.encode(item, device=where))
        if example.plan is not None:
            sequence.text(example.plan, loss=True)
        clean, grid = model.to_latents(example.target.to(where))  # (T, C)
        generator = drops(config, example.number, references).generator
        times = flow.sample_timesteps(config.noise_copies, config.timestep_shift, generator)
        for t in times.tolist():
            noise = torch.randn(clean.shape, generator=generator).to(where)  # (T, C)
            sequence.noise(flow.interpolate(clean, noise, t), grid, t)
            velocities.append(flow.velocity(clean, noise))
    return velocities


# --------------------------------------------------------------------------------------------------
# the loss


def losses(model, packed, target):
    """(cross entropy summed over plan tokens, squared velocity error summed over latent tokens).

    The error of a token is a mean over its channels. target (M, C).
    """
    und, gen = model(packed, losses=True)
    if len(packed.labels):
        ce = model.cross_entropy(und, packed).sum()
    else:
        ce = model.lm_head(und[:1]).sum() * 0  # so that its weights have a gradient here too
    velocity = model.velocity(packed, gen).float()
    return ce, F.mse_loss(velocity, target, reduction="sum") / target.shape[-1]


def backward(engine, examples, config):
    """Gradients of one step over all Examples of all processes. Returns the means: L_cot, L_img.

    Sharding averages gradients over the processes, hence the factor. A process with fewer packs
    than another repeats its last one with weight 0, so that all make the same number of passes. A
    pack's pixels are made ready while a GPU still works.
    """
    model, where, means = engine.model, engine.device, 0
    labels, latents = processes.reduced(
        [sum(example.labels for example in examples), sum(example.noised for example in examples)]
    )
    filled = fill([example.tokens for example in examples], config.tokens_per_pack)
    packs = [[examples[number] for number in numbers] for numbers in filled]
    passes = int(processes.reduced([len(packs)], "max")[0])
    pack = pack_of(engine, packs[0], config)
    for i in range(passes):
        ce, mse = losses(model, pack.packed.to(where), pack.target.to(where))
        ce = ce if config.train == "all" else ce.detach()
        weight = float(i < len(packs))
        loss = config.ce_weight * ce / max(1, labels) + mse / latents
        (loss * weight * processes.size()).backward()
        parts = torch.stack([ce.detach() / max(1, labels), mse.detach() / latents])  # (2,)
        means = means + weight * parts.double()
        if i + 1 < len(packs):
            pack = pack_of(engine, packs[i + 1], config)
    return processes.reduced(means.tolist())


def learning_rate(step, config):
    """Linear warmup, constant, linear decay over the last `decay` of the run."""
    left = (config.steps - step) / max(1, config.decay * config.steps)
    rising = (step + 1) / max(1, config.warmup)
    return config.lr * min(1.0, rising, left if config.decay else 1.0)


# --------------------------------------------------------------------------------------------------
# the stage


def build(config, folder):
    """The Engine to start from: the checkpoint `init`, or fresh weights; sharded."""
    if config.init:
        return Engine(*load_trained(config))
    shape = ModelConfig(**MODELS[config.model])
    model = UnifiedModel(shape).initialise(config.seed).to(processes.device())
    if shape.codec == "flux":  # no part of the module
        model.codec.weights.to(processes.device())
    model.checkpointing = config.checkpointing
    model = sharding.shard(model, config.precision, config.replicas)
    return Engine(model, toy_tokenizer(folder, shape.vocab_size))


@exit_on_user_error()
def train(config):
    """The whole stage: resumes, trains, and writes the averaged model to `out`/model."""
    if config.memory:
        shape = ModelConfig(**MODELS[config.model])
        if config.init:
            shape = shape_of(config.init, config.config)
        if config.data != "toy":
            check_budget(shape, config)
        accountant.dry_run(accountant.walk_sft, config, shape)
        return
    with exit_on_user_error(ValueError):
        processes.launch()
        each = processes.share(config.samples_per_step, "samples a step", "samples_per_step")
        source = open_source(  # before there is a folder
            config.data,
            config.seed,
            config.max_references,
            scale=config.scale,
            painter=painter_of(config),
        )
        folder = loop.start(config, PRESETS.get(config.config, {}))
        step = newest_step(folder)
        loop.last_step(folder, step, config)
        engine = build(config, folder)
        if config.data != "toy":
            check_budget(engine.model.config, config)
        clip = metric_clip_of_all(config) if config.eval_every else None
    trained = trained_parameters(engine.model, config.train)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.lr, betas=(0.9, config.beta2), weight_decay=0.0, fused=True
    )
    state = TrainingState(trained, optimizer, new_average(trained))
    run = loop.Run(folder, config, state, desc="sft")
    measured = replace(config.held_out, count=EVAL_SAMPLES)
    processes.say(
        f"sft: trains {count(trained.values()):,} of {count(engine.model.parameters()):,} "
        f"parameters, {config.samples_per_step} samples a step, {each} on each of "
        f"{processes.size()} processes, {torch.get_num_threads()} threads, {describe_backend()}, "
        f"step {step} of {config.steps}"
    )
    shape = engine.model.config
    dealer = Dealer(config, shape, source)
    made = Examples(source, engine.tokenizer, shape, config)
    examples = stream(made, dealer.ahead(step), config.workers, ahead=each)
    for step in run.steps():
        begun, own = time.perf_counter(), list(islice(examples, each))
        ce, mse = backward(engine, own, config)
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm, finite = sharding.step_if_finite(optimizer, loop.MAX_GRAD_NORM)
        values = {
            "step": step,
            "ce": ce,
            "mse": mse,
            "grad_norm": norm,
            "skipped": float(not finite),
            "lr": rate,
            "tokens": sum(example.tokens for example in own),
            "seconds": time.perf_counter() - begun,
        }
        if run.measurement_is_due(step):
            with sharding.exchanged(engine.model, state.average):  # of the steps before
                values |= measured_together(engine, measured, clip)
        decay = min(config.average, (step + 1) / (step + 10))
        run.end_step(step, values, finite=finite, decay=decay, samples=dealer.own(step))
        if run.state_is_due(step):
            with sharding.exchanged(engine.model, state.average):
                save_strip(folder, step + 1, engine, held_out=config.held_out)
    run.export(engine)
    save_story(folder)
    processes.say(f"sft: {loop.seconds(run.begun)}{run.pace()}")
    processes.say(f"sft: model in {folder}/model, pictures in {folder}")


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
    processes.finish()
