"""
Stage 2, reasoning-generation alignment (RGA): GRPO, so that pictures match their plans.

For each prompt a group of G members is sampled. With RID, reasoning-induced diversity, every member
writes its own plan; without it one plan serves the group. A member's reward compares its picture
with its own caption, CLIP-L2 (reward.py):

    r_i = -|| CLIP(picture_i) - CLIP(caption_i) ||_2       bad form: the lowest r of its group
    A_i = (r_i - mean r) / std r                           over the group
    L   = mean_ik max(-A_i ratio_ik, -A_i clip(ratio_ik, 1 - eps, 1 + eps)) + kl_beta KL

objective.py has L in full. Its ratio is p_new / p_old of score k of member i; `--likelihood`
decides what is scored (rollouts.py). sde, the paper's: the steps of a window of stochastic ones;
forward: the finished picture, at times and noises that its group shares.

One iteration: `roll_out`, `rewards_of`, `advantages`, `update`, which takes the gradient of
`objective` (L), over the tree that was sampled (tree.py): prompt | branch a plan | leaf a score.
The prompt is computed once; the update cuts the tree there, so that a group of any size fits,
without changing the gradient. p_old is evaluated by the packs of the update, so the first ratio is
exactly 1; its distance to what an sde rollout saw is `mismatch`. A group is spread over processes
only where there are too few groups (rollouts.share_of).

Plan tokens get no policy gradient unless `train_text` asks for it: the caption is the target of the
reward, and easy captions would win. (With train=all the expert that writes moves all the same, by
the gradient of the pictures through the plans' keys and values.) The KL needs no second model:
weights are exchanged for what they were. Differences from the paper: README.md.
Letters: sequence.py. Left out: denoising trees, replay.

    python grpo.py --config toy        trains what it needs first; the same command again resumes
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

import rollouts
import tree
from data import open_source
from engine import Engine, Thinking
from kernels.attention import describe_backend
from objective import Actions, advantages, objective
from reward import Clip, embed_groups, reward_statistics, rewards_of, source_of
from runtime import accountant, loop, processes, sharding
from runtime.config import exit_on_user_error, parse
from runtime.lora import load_trained, trained_parameters
from runtime.pretrained import shape_of
from runtime.state import TrainingState, new_average, newest_step
from studies.curves import save_story, save_strip
from studies.metrics import HeldOut, compare_checkpoints, measured_together
from toy import world
from toy.prepare import find_stage_1, metric_clip_of_all, prepare


@dataclass(frozen=True)
class Config(loop.Options, rollouts.Options):
    config: str = ""  # name of the preset; stage 1 is trained with the same one
    # data; the rollout's options are in rollouts.py
    init: str = "out/full-sft"  # checkpoint of stage 1; the model's shape comes from it
    max_references: int = 4
    # objective
    std: Literal["group", "global"] = "group"  # what advantages are divided by
    std_floor: float = 0.003  # of the rewards of a group
    max_advantage: float = 5.0
    clip_kappa: float = 0.025  # clip range times sqrt(T C)
    guard: bool = False  # GRPO-Guard's ratio: centred, alike at all steps (2510.22319)
    kl: Literal["velocity", "latent"] = "velocity"  # |v - v_ref|^2, or that of the transitions
    kl_beta: float = 0.3  # weight of the KL to the stage 1 model
    text_clip_range: float = 0.2
    text_weight: float = 1.0
    # optimisation
    steps: int = 200  # iterations of rollout and update (paper)
    lr: float = 1e-5  # between R3's 5e-6 and UniGRPO's 3e-5
    average: float = 0.9  # decay of the moving average of the weights, which is saved; 0: off
    # run; more, and the machine, in runtime/loop.py
    clip_name: str = "ViT-L-14"  # open_clip architecture of the reward's CLIP; toys: toy
    clip: str = "openai"  # its weights: an open_clip tag, a .safetensors file, or a folder
    eval_data: str = ""  # prompts of strips and tables, held out: toy, or samples on disk; "": data
    eval_samples: int = 200  # how many
    eval_timesteps: int = 50
    eval_plan_tokens: int = 256
    target: float | None = None  # exit with status 1 unless Overall rises by this much, held out
    out: str = "out/full-grpo"
    save_every: int = 20  # steps between training states
    sample_every: int = 20

    def __post_init__(self):
        super().__post_init__()
        if self.train_text and (self.cot_temperature != 1 or self.train != "all"):
            raise ValueError(
                "train_text needs cot_temperature=1, the distribution whose gradient it takes, "
                "and train=all"
            )
        if self.target is not None and (self.eval_data or self.data) != "toy":
            raise ValueError(
                f"target={self.target} is of Overall, which needs the toy world's exact judge; "
                f"eval_data={self.eval_data or self.data} has none"
            )
        if self.likelihood == "forward" and (self.guard or self.kl == "latent"):
            raise ValueError(
                "likelihood=forward has no steps that guard or kl=latent could compare; "
                "use likelihood=sde, or guard=false and kl=velocity"
            )

    @property
    def held_out(self):
        """Prompts of the final table and of the strips, with the guidance of the rollouts."""
        sampler = replace(self.sampler, num_timesteps=self.eval_timesteps)
        return HeldOut(
            data=self.eval_data or self.data,
            count=self.eval_samples,
            max_references=self.max_references,
            side=self.picture_side,
            sampler=sampler,
            thinking=Thinking(self.eval_plan_tokens),
            batch=self.eval_batch,
        )


# fmt: off
TOY = dict(
    data="toy", clip_name="toy", clip="out/toy-clip-reward", clip_steps=300, metric_name="toy",
    metric="out/toy-clip-metric", scored_shift=5.0, average=0.0, num_timesteps=7,
    timestep_shift=10.0, lr=2e-4, std_floor=0.02, eval_timesteps=7, eval_plan_tokens=72,
    picture_side=world.SIZE, groups_at_once=8, pictures_at_once=1000, tokens_per_pack=8192,
    checkpointing=False, precision="float32", sum_every_pass=False, eval_batch=50,
)
SMOKE = dict(clip="out/smoke-clip-reward", metric="out/smoke-clip-metric", clip_steps=20)
PRESETS = {
    "toy": TOY | dict(
        init="out/toy-sft", group_size=8, max_plan_tokens=72, steps=20, groups_at_once=16,
        out="out/toy-grpo", save_every=10, sample_every=5,
    ),
    "smoke": TOY | SMOKE | dict(
        init="out/smoke-sft", prompts_per_step=8, group_size=4, cot_temperature=0.1,
        max_plan_tokens=72, steps=2, eval_samples=16, out="out/smoke-grpo", save_every=1,
        sample_every=2,
    ),
    "small": TOY | dict(  # one data-centre GPU, after sft.py --config small
        init="out/small-sft", scale=2, picture_side=64, group_size=24, max_plan_tokens=72, lr=1e-4,
        groups_at_once=16, precision="bfloat16", out="out/small-grpo",
    ),
    "rehearsal": SMOKE | dict(  # the shapes of full on thin weights, 512 x 512; guided
        data="toy", init="out/rehearsal-sft", scale=16, picture_side=512, prompts_per_step=4,
        group_size=4, num_timesteps=5, text_guidance=4.0, image_guidance=2.0, steps=2,
        eval_samples=4, eval_timesteps=5, clip_name="toy", metric_name="toy", precision="float32",
        save_every=1, sample_every=2, out="out/rehearsal-grpo",
    ),
    "full": dict(),  # the efficient recipe
    "paper": dict(  # published: group_size, steps, lr, 50 steps; window and guidance ours
        likelihood="sde", lr=1e-6, kl_beta=0.0, average=0.0, num_timesteps=51, window=25,
        window_end=1.0, text_guidance=4.0, image_guidance=2.0, clip_kappa=0.05,
        out="out/paper-grpo",
    ),
}
# fmt: on


# --------------------------------------------------------------------------------------------------
# update


@dataclass
class Learner:
    """The model behind the engine, and what its optimiser steps need."""

    engine: Engine
    state: TrainingState  # trained parameters, optimiser, average
    anchor: dict | None  # {name: value} of the trained weights in stage 1, for the KL


def update(learner, rollout, advantage, *, config):
    """All optimiser steps of one iteration, each on its share of the groups.

    advantage: of pictures and of plans, as `advantages` gives them, here. Returns the numbers for
    the log, and if all gradients were finite.
    """
    model, layout = learner.engine.model, learner.engine.layout
    groups = len(rollout.prompts)
    each = groups // config.updates  # groups of an optimiser step
    trees = [tree.plant(layout, rollout, group, config=config) for group in range(groups)]
    passes = [int(n) for n in processes.reduced([len(one.batches) for one in trees], "max")]
    if later := trees[each:]:  # p_old; the first optimiser step gets it from its own passes
        with sharding.gathered(model):
            for one in later:
                prefix = model.keys_and_values(one.prompt.to(processes.device()))
                found = [tree.policy(model, prefix, batch, config=config) for batch in one.batches]
                one.old = [policy.detached(config.guard) for policy in found]
    health, norms = [], []
    values = math.prod(rollout.grid) * model.config.token_channels  # of a picture
    clip_range = config.clip_kappa / values**0.5
    scales = dict(clip_range=clip_range, scale=1 / (each * config.group_size * config.scores))
    words = rollout.written.view(config.updates, -1).sum(1).tolist()  # plan tokens of each step
    for number, text_tokens in enumerate(processes.reduced(words)):
        scales["text_scale"] = config.text_weight * processes.size() / text_tokens
        mine, done = range(number * each, (number + 1) * each), []
        for group in mine:
            actions = [actions_of(batch, advantage, scales) for batch in trees[group].batches]
            how = dict(passes=passes[group], last=group == mine[-1], config=config)
            done += group_backward(learner, trees[group], actions, **how)
        norms.append(sharding.step_if_finite(learner.state.optimizer, config.max_grad_norm))
        health.append(done)
    found = summary(health, [norm for norm, _ in norms], clip_range)
    if config.likelihood == "sde":
        old = torch.cat([policy.log_prob for one in trees for policy in one.old])  # (P * G * S,)
        seen = rollout.pictures.log_prob.flatten()  # (P * G * S,)
        found["mismatch"] = mismatch = (old.cpu() - seen).abs().mean().item()
        found["mismatch_clip"] = mismatch / clip_range
    return found, all(stepped for _, stepped in norms)


def actions_of(batch, advantage, scales):
    """Actions of a batch. advantage: as for `update`; scales: the numbers of the optimiser step."""
    images, plans = advantage
    return Actions(
        advantage=images[batch.members],  # (I,)
        image_of_token=batch.image_of_token,
        step_size=batch.step_size,
        text_advantage=plans[batch.token_plans],
        text_counts=batch.token_counts,
        **scales,
    )


def group_backward(learner, group, actions, *, passes, last, config):
    """Gradients of one group, the graph cut at the prompt's keys and values. Fills `group.old`.

    group: its tree.Tree; passes: of all processes alike, one with fewer batches repeats its last
    one with weight 0; last: of this optimiser step. Returns the Objective of each batch, detached.
    """
    model, anchor = learner.engine.model, learner.anchor
    prompt, anchors, done = group.prompt.to(processes.device()), [None] * len(group.batches), []
    if anchor is not None:  # before any graph is built, since the weights are exchanged
        with sharding.exchanged(model, anchor), sharding.gathered(model):
            prefix = model.keys_and_values(prompt)
            anchors = [tree.policy(model, prefix, batch, config=config) for batch in group.batches]
    sharding.sum_gradients(model, config.sum_every_pass)
    prefix = model.keys_and_values(prompt)
    leaves = [tuple(x.detach().requires_grad_(x.requires_grad) for x in pair) for pair in prefix]
    for i in range(passes):
        at = min(i, len(group.batches) - 1)
        new = tree.policy(model, leaves, group.batches[at], config=config)
        if i > at:
            nothing = [x.sum() * 0 for x in (new.log_prob, new.text) if x is not None]
            sum(nothing).backward()
            continue
        if i == len(group.old):  # of the first optimiser step, p_old is this very pass
            group.old.append(new.detached(config.guard))
        found = objective(new, group.old[i], anchors[i], actions=actions[i], config=config)
        found.total.backward()
        done.append(found.detached())
    # the chain rule through the prompt, once: keys and values, and their gradients of all batches
    pairs = [pair for layer in zip(prefix, leaves) for pair in zip(*layer)]
    reached = [(x, leaf.grad) for x, leaf in pairs if leaf.grad is not None]
    sharding.sum_gradients(model, config.sum_every_pass or last)
    if reached:
        torch.autograd.backward(*zip(*reached))
    return done


def summary(health, norms, clip_range):
    """The logged numbers of one iteration. health: for each optimiser step its Objectives."""
    first, last = (torch.cat([x.ratio for x in step]) for step in (health[0], health[-1]))
    every = [one for step in health for one in step]
    # fmt: off
    return {
        "loss": sum(one.images.item() for one in every) / len(norms),
        "kl": sum(one.kl.item() for one in every) / len(every),
        "ratio_first_min": first.min().item(), "ratio_first_mean": first.mean().item(),
        "ratio_first_max": first.max().item(), "ratio_last": last.mean().item(),
        "clip_high": (last > 1 + clip_range).float().mean().item(),
        "clip_low": (last < 1 - clip_range).float().mean().item(), "clip_range": clip_range,
        "grad_norm": sum(norms) / len(norms),
    }
    # fmt: on


# --------------------------------------------------------------------------------------------------
# the stage


def iteration(learner, clip, source, *, numbers, config, step):
    """One rollout and its update: the log's line, whether all was finite.

    numbers: of the samples whose groups are here (rollouts.Share.numbers).
    """
    # of share.config G and J count the members and plans here, of config those of a group
    model, share = learner.engine.model, rollouts.share_of(config)
    clock, truncated = [], clip.truncated

    def lap():
        clock.append((time.perf_counter(), model.tokens, model.trained_tokens))

    lap()
    samples = [source[i] for i in numbers]
    how = dict(config=share.config, first=share.first)
    with sharding.gathered(model):
        rollout = rollouts.roll_out(learner.engine, samples, numbers, step=step, **how)
    lap()
    embedded = embed_groups(clip, rollout.images, rollout.captions, groups=len(samples))
    reward = rewards_of(*share.whole_groups(*embedded))  # (P, G)
    advantage = share.own_members(*advantages(reward, config))
    lap()
    health, finite = update(learner, rollout, advantage, config=share.config)
    lap()
    words = [len(caption.split()) for caption in rollout.captions if caption]
    spent, tokens, trained = ([b - a for a, b in zip(x, x[1:])] for x in zip(*clock))
    # fmt: off
    return {
        "step": step, **reward_statistics(reward, config.plans_per_group),
        "parse_failures": (~rollout.valid).float().mean().item(),
        "caption_words": sum(words) / max(1, len(words)),
        "truncated": clip.truncated - truncated, **health, "skipped": float(not finite),
        "rollout_seconds": spent[0], "reward_seconds": spent[1], "update_seconds": spent[2],
        "rollout_tokens": tokens[0], "update_tokens": tokens[2], "trained_tokens": trained[2],
    }, finite
    # fmt: on


def build(config):
    """The Learner that starts from the checkpoint of stage 1, sharded over the processes."""
    model, tokenizer = load_trained(config)
    trained = trained_parameters(model, config.train)
    rates = dict(lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = torch.optim.AdamW(trained.values(), **rates, fused=True)
    anchor = new_average(trained) if config.kl_beta else None
    state = TrainingState(trained, optimizer, new_average(trained) if config.average else {})
    return Learner(Engine(model, tokenizer), state, anchor)


@exit_on_user_error()
def train(config):
    """The whole stage: prepares, resumes, trains, and compares stage 2 with stage 1, held out."""
    begun = time.perf_counter()
    if config.memory:
        default = PRESETS.get(config.config, {}).get("init", Config.init)
        shape = shape_of(config.init, config.config, default)
        accountant.dry_run(accountant.walk_grpo, config, shape)
        return
    with exit_on_user_error(ValueError):
        processes.launch(config.timeout_minutes)
        with processes.first_alone():
            find_stage_1(config)  # or the folder would belong to a mistyped --init
        share = rollouts.share_of(config)  # before there is a folder, for the same reason
        folder, prompts, seed = loop.start(config), config.prompts_per_step, config.seed + 1
        loop.last_step(folder, newest_step(folder), config)
        prepare(config)
        source = open_source(config.data, seed, config.max_references, scale=config.scale)
        learner = build(config)
        with processes.first_alone():
            clip = Clip(source_of(config.clip_name, config.clip), processes.device())
        asked = config.metric_name, config.metric, config.clip_steps
        metric = metric_clip_of_all(*asked) if config.eval_every else None
    run = loop.Run(folder, config, learner.state, desc="grpo")
    processes.say(
        f"grpo: {prompts} prompts x {config.group_size} members = {prompts * config.group_size} "
        f"pictures a step on {processes.size()} processes, {share.ranks} to a group, "
        f"RID {'on' if config.rid else 'off'}, {describe_backend()}, "
        f"step {run.first} of {config.steps}"
    )
    for step in run.steps():
        numbers = share.numbers(step, source.references)
        how = dict(numbers=numbers, config=config, step=step)
        values, finite = iteration(learner, clip, source, **how)
        if run.measurement_is_due(step):
            values |= measured_together(learner.engine, config.held_out, metric)
        run.end_step(step, values, finite=finite, decay=config.average, made_of=numbers)
        if run.strip_is_due(step):
            save_strip(folder, step + 1, learner.engine, held_out=config.held_out)
    run.finish()
    processes.say(f"grpo: {loop.seconds(begun)} in this command{run.pace(learner.engine.model)}")
    run.export(learner.engine)
    save_story(folder)
    del learner, run, clip, metric  # the table needs the memory
    if not config.export:
        finish(config, folder, begun)


def finish(config, folder, begun):
    """The table of stage 1 and stage 2, and the grid; exit status 1 if the target is missed.

    All processes paint their share of the prompts.
    """
    metric = metric_clip_of_all(config.metric_name, config.metric, config.clip_steps)
    score = None
    if processes.is_main():
        score = Clip(source_of(config.clip_name, config.clip)).score
    both = {"SFT": config.init, "SFT + GRPO": folder}
    how = dict(folder=folder, held_as=(config.precision, config.weights), score=score)
    rows = compare_checkpoints(both, config.held_out, metric, **how)
    gain = rows["SFT + GRPO"]["Overall"] - rows["SFT"]["Overall"]
    found = f"model in {folder}/model, pictures in {folder}/grid.png, curves.png"
    processes.say(f"grpo: {loop.seconds(begun)} with the table; {found}")
    if config.target is not None and gain < config.target:
        if processes.is_main():
            print(f"Overall rose by {gain:.3f}, less than target={config.target}", file=sys.stderr)
        processes.finish()
        sys.exit(1)


if __name__ == "__main__":
    train(parse(Config, PRESETS, sys.argv[1:]))
    processes.finish()
