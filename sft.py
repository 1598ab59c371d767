"""
Stage 1, supervised fine-tuning (SFT): write the IC-CoT, then paint what it says.

    L     = ce_weight * L_cot + mse_weight * L_img
    L_cot = mean over plan tokens of  - log p(r_i | prompt, r_<i)        the prompt carries no loss
    L_img = mean over latent values of  (v_theta(x_t, t, prompt, plan) - (noise - x_0))^2
            with x_t = (1 - t) x_0 + t noise

A step takes `samples_per_step` samples and packs them into sequences of at most `tokens_per_pack`
tokens, without padding; both means run over the whole step, however it is packed. A share of the
samples has no plan (the paper's SFT mixes both, so that the model can still draw directly), and
conditions are dropped as in BAGEL (docs/BAGEL.md §13.3), for guidance. One sample carries
`noise_copies` noised copies of its target, at different times and mutually invisible: its prompt
and plan are computed once for all of them.

With `train` gen or lora the expert that writes is frozen, and L = mse_weight * L_img: L_cot could
reach the painter only where plans see the latents of references, and is logged alone. So such a
stage teaches to paint by a plan; to write one is learned with train=all.

Letters: sequence.py. Left out: tricks of large batches (the number of processes changes no mean).

    python sft.py --config toy             draws the toy world, trains on a CPU; smoke: in seconds
    python sft.py --config full --init BAGEL-7B-MoT --data shards     fine-tunes it (README.md)
Run the same command again to resume. Then look at out/toy-sft/curves.png, or at sample.py.
"""

import sys
import time
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F

import example
from data import open_source, stream
from engine import Engine, Sampler, Thinking
from kernels.attention import describe_backend
from model import MODELS, ModelConfig, UnifiedModel
from runtime import accountant, loop, processes, sharding
from runtime.config import exit_on_user_error, parse
from runtime.lora import load_trained, trained_parameters
from runtime.pretrained import shape_of, shape_with
from runtime.quantised import count
from runtime.state import TrainingState, new_average, newest_step
from studies.curves import save_story, save_strip
from studies.metrics import HeldOut, measured_together
from toy import world
from toy.prepare import metric_clip_of_all, painter_of, toy_tokenizer


@dataclass(frozen=True)
class Config(loop.Options, example.Options, ModelConfig):
    config: str = ""  # name of the preset
    init: str = ""  # checkpoint to start from: a folder, or owner/name; "": fresh weights
    # data; more in example.py
    workers: int = 0  # processes that read samples ahead, beside each that trains
    samples_per_step: int = 512  # samples of one optimiser step
    # optimisation
    steps: int = 100_000
    lr: float = 5e-6  # peak, after warmup (paper: 5e-6)
    warmup: int = 2000  # steps of linear warmup (BAGEL)
    decay: float = 0.0  # last share of the steps over which the rate falls linearly to zero
    weight_decay: float = 0.0
    beta2: float = 0.95  # AdamW (BAGEL)
    average: float = 0.9999  # decay of the moving average of the weights, which is saved (BAGEL)
    ce_weight: float = 1.0  # weight of the text loss, with train=all
    mse_weight: float = 1.0  # weight of the image loss
    # run; more, and the machine, in runtime/loop.py
    out: str = "out/full-sft"
    save_every: int = 2000  # steps between training states
    sample_every: int = 2000  # steps between pictures of the same eight prompts
    sample_side: int = 1024  # pixels of those pictures
    sample_timesteps: int = 50  # grid points of their sampler
    sample_shift: float = 3.0  # its time shift
    sample_plan_tokens: int = 256  # of their plans, at most
    eval_samples: int = 64  # prompts of the measurements at eval_every

    def __post_init__(self):
        super().__post_init__()
        if self.train != "all" and not self.init:
            raise ValueError(
                f"train={self.train} keeps most weights as they are, and without a checkpoint they "
                f"are fresh ones: name one with --init, or use --train all"
            )

    @property
    def held_out(self):
        """Prompts of the strips, painted without guidance; measurements have more."""
        sampler = Sampler(self.sample_timesteps, self.sample_shift, guidance_interval=(0.0, 1.0))
        return HeldOut(
            data=self.data,
            count=8,
            max_references=self.max_references,
            side=self.sample_side,
            sampler=sampler,
            thinking=Thinking(self.sample_plan_tokens),
            batch=self.eval_batch,
        )


# fmt: off
TOY = dict(
    data="toy", text_dropout=0.0, vae_dropout=0.0, vit_dropout=0.0, decay=0.5, timestep_shift=5.0,
    checkpointing=False, precision="float32", sum_every_pass=False, sample_side=world.SIZE,
    sample_timesteps=7, sample_shift=10.0, sample_plan_tokens=72, eval_batch=50, plan_dropout=0.1,
    metric_name="toy", metric="out/toy-clip-metric", clip_steps=300, painter_errors=0.45,
)
PRESETS = {
    "toy": MODELS["toy"] | TOY | dict(
        samples_per_step=14, ce_weight=0.3, steps=2000, pretraining_steps=1500, lr=4e-3, warmup=100,
        average=0.99, beta2=0.98, out="out/toy-sft", save_every=200, sample_every=500,
    ),
    "smoke": MODELS["smoke"] | TOY | dict(
        samples_per_step=8, tokens_per_pack=2048, steps=60, lr=6e-3, warmup=5, average=0.9,
        out="out/smoke-sft", save_every=20, sample_every=60,
        metric="out/smoke-clip-metric", clip_steps=20, eval_samples=16,
    ),
    "small": MODELS["small"] | TOY | dict(  # one data-centre GPU; not run yet
        scale=2, sample_side=64, samples_per_step=96, noise_copies=2, ce_weight=0.3, workers=4,
        steps=12_000, pretraining_steps=9000, lr=6e-4, warmup=500, average=0.999, beta2=0.98,
        precision="bfloat16", out="out/small-sft", save_every=1000, sample_every=1000,
    ),
    "rehearsal": MODELS["rehearsal"] | dict(  # the recipe of full on thin weights, 512 x 512
        data="toy", scale=16, samples_per_step=4, steps=20, lr=1e-3, warmup=5, average=0.9,
        precision="float32", out="out/rehearsal-sft", save_every=10, sample_every=10,
        sample_side=512, sample_timesteps=5, eval_samples=4, metric_name="toy",
        metric="out/smoke-clip-metric", clip_steps=20,
    ),
    "full": dict(workers=4),
}
# fmt: on


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
    than another repeats its last one with weight 0, so that all make the same number of passes.
    A pack's pixels are made ready while a GPU still works.
    """
    model, where, means = engine.model, engine.device, 0
    labels, latents = processes.reduced(
        [sum(one.labels for one in examples), sum(one.noised for one in examples)]
    )
    filled = example.fill([one.tokens for one in examples], config.tokens_per_pack)
    packs = [[examples[number] for number in numbers] for numbers in filled]
    passes = int(processes.reduced([len(packs)], "max")[0])
    pack = example.pack_of(engine, packs[0], config)
    for i in range(passes):
        sharding.sum_gradients(model, config.sum_every_pass or i == passes - 1)
        ce, mse = losses(model, pack.packed.to(where), pack.target.to(where))
        ce = ce if config.train == "all" else ce.detach()
        weight = float(i < len(packs))
        loss = config.ce_weight * ce / max(1, labels) + config.mse_weight * mse / latents
        (loss * weight * processes.size()).backward()
        parts = torch.stack([ce.detach() / max(1, labels), mse.detach() / latents])  # (2,)
        means = means + weight * parts.double()
        if i + 1 < len(packs):
            pack = example.pack_of(engine, packs[i + 1], config)
    return processes.reduced(means.tolist())


def learning_rate(step, config):
    """Linear warmup, constant, linear decay over the last `decay` of the run."""
    left = (config.steps - step) / max(1, config.decay * config.steps)
    rising = (step + 1) / max(1, config.warmup)
    return config.lr * min(1.0, rising, left if config.decay else 1.0)


# --------------------------------------------------------------------------------------------------
# the stage


def iteration(engine, optimizer, examples, *, run, step):
    """A step on Examples, read here: the log's line, if it was finite."""
    begun, config, examples = time.perf_counter(), run.config, list(examples)
    ce, mse = backward(engine, examples, config)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    norm, finite = sharding.step_if_finite(optimizer, config.max_grad_norm)
    tokens, spent = sum(one.tokens for one in examples), time.perf_counter() - begun
    # fmt: off
    return {
        "step": step, "ce": ce, "mse": mse, "grad_norm": norm, "skipped": float(not finite),
        "lr": group["lr"], "tokens": tokens, "seconds": spent,
    }, finite
    # fmt: on


def build(config, folder):
    """The Engine to start from: the checkpoint `init`, or fresh weights; sharded."""
    shape = shape_with(config, PRESETS.get(config.config, {}))
    if config.init:
        return Engine(*load_trained(config))
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
        to_come = config.init and shape_of(config.init, config.config)
        accountant.dry_run(accountant.walk_sft, config, to_come or shape_with(config, {}))
        return
    with exit_on_user_error(ValueError):
        processes.launch(config.timeout_minutes)
        each = processes.share(config.samples_per_step, "samples a step", "samples_per_step")
        folder = loop.start(config)
        step = newest_step(folder)
        loop.last_step(folder, step, config)
        if (folder / "model").is_dir() and step >= config.steps:
            processes.say(f"{folder}/model is finished ({step} steps); raise --steps to train on")
            return
        how = dict(scale=config.scale, painter=painter_of(config))
        source = open_source(config.data, config.seed, config.max_references, **how)
        engine = build(config, folder)
        if config.data != "toy":
            example.check_budget(engine.model.config, config)
        measured_by = config.metric_name, config.metric, config.clip_steps
        clip = metric_clip_of_all(*measured_by) if config.eval_every else None
    trained = trained_parameters(engine.model, config.train)
    rates = dict(lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(trained.values(), **rates, fused=True)
    state = TrainingState(trained, optimizer, new_average(trained))
    run = loop.Run(folder, config, state, desc="sft")
    measuring = replace(config.held_out, count=config.eval_samples)
    both = count(trained.values()), count(engine.model.parameters())
    processes.say(
        f"sft: trains {both[0]:,} of {both[1]:,} parameters, {config.samples_per_step} samples a "
        f"step, {each} on each of {processes.size()} processes, {torch.get_num_threads()} threads, "
        f"{describe_backend()}, step {step} of {config.steps}"
    )
    shape = engine.model.config
    dealer = example.Dealer(config, shape, source)
    made = example.Examples(source, engine.tokenizer, shape, config)
    examples = stream(made, dealer.ahead(step), config.workers, ahead=each)
    for step in run.steps():
        numbers, decay = dealer.own(step), min(config.average, (step + 1) / (step + 10))
        own = islice(examples, each)
        values, finite = iteration(engine, optimizer, own, run=run, step=step)
        if run.measurement_is_due(step):
            with sharding.exchanged(engine.model, state.average):  # of the steps before
                values |= measured_together(engine, measuring, clip)
        run.end_step(step, values, finite=finite, decay=decay, made_of=numbers)
        if run.strip_is_due(step) or step + 1 == config.steps:
            with sharding.exchanged(engine.model, state.average):
                save_strip(folder, step + 1, engine, held_out=config.held_out)
    run.finish()
    run.export(engine)
    save_story(folder)
    processes.say(f"sft: {loop.seconds(run.begun)}{run.pace(engine.model)}")
    processes.say(f"sft: model in {folder}/model, pictures in {folder}")


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
    processes.finish()
