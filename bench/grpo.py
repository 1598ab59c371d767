"""
Stage 2 over the tree of a group, against the loop that knows no tree.

    python -m bench grpo

    rollout   naive   for each member: read the prompt, write a plan; read the prompt again, paint
              tree    engine.py, as grpo.roll_out calls it: one prefill, all members in every pass
    update    naive   for each member and step: a pack of prompt, plan and one noised picture
              tree    grpo.update: the prompt once, members in packs of `tokens_per_pack`

for a group of the toy, and for one of a model of middle size with four references. Tokens that the
model computed and bytes that autograd keeps at a time stand beside the CPU seconds.
The naive update takes the policy gradient of the pictures alone, so the plans are not trained here.
Letters: sequence.py. Left out: rewards, several processes, rollouts with guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import flow
import grpo
import tree
from bench.model import MID, random_engine, random_reference, random_words
from bench.timing import best_of
from engine import Branch, Engine, Group, Prompt, Thinking
from model import TOY, ModelConfig
from runtime.accountant import kept_bytes
from runtime.state import TrainingState
from sequence import Sequence
from vision import Reference

WORDS = 512  # of the vocabularies that random words are drawn from


@dataclass(frozen=True)
class Case:
    """A group to measure. prompt: draws one with a generator; side: pixels of a picture."""

    shape: ModelConfig
    prompt: Callable
    plan_tokens: int
    side: int
    group_size: int


@dataclass
class Contest:
    """What the rivals of a case work on."""

    engine: Engine
    config: grpo.Config
    rollout: tree.Rollout  # of one group, for the updates, with latents drawn at random
    prompt: Prompt
    reward: torch.Tensor  # (1, G)
    generator: torch.Generator


def toy_prompt(generator):
    """Two references and 20 words for the toy's model."""
    shape = ModelConfig(**TOY)
    side, values = shape.latent_side, 3 * shape.vit_patch**2

    def picture():
        latents = torch.randn(side**2, shape.token_channels, generator=generator)
        patches = torch.randn(4, values, generator=generator)
        return Reference(latents, (side, side), patches, (2, 2))

    return Prompt((picture(), picture(), random_words(20, WORDS, generator)))


def mid_prompt(generator):
    """Four references and 40 words for the model of middle size."""
    references = [random_reference(generator) for _ in range(4)]
    return Prompt((*references, random_words(40, WORDS, generator)))


CASES = {
    "toy": Case(ModelConfig(**TOY), toy_prompt, plan_tokens=50, side=32, group_size=16),
    "mid, 4 references": Case(MID, mid_prompt, plan_tokens=60, side=112, group_size=8),
}


def bench_grpo(config):
    """Prints all figures; returns how many times faster the tree is."""
    generator, result = torch.Generator().manual_seed(config.seed), {}
    for name, case in CASES.items():
        contest = prepare(case, config.seed, generator)
        print(
            f"{name}: prompt {len(contest.prompt)} tokens, {case.group_size} members, "
            f"plans of {case.plan_tokens}, {contest.config.window} trained steps"
        )
        for phase, faster in measure(contest, config.repeats).items():
            result[f"{name.split(',')[0]}_{phase}_speedup"] = round(faster, 2)
    return result


def measure(contest, repeats):
    """Prints a line a phase; returns {phase: how many times faster the tree is}."""
    model, tokens, result = contest.engine.model, {}, {}
    alone, together = kept_for_backward(contest)

    def count_tokens(name, rival):
        before = model.tokens
        rival(contest)
        tokens[name] = model.tokens - before

    rivals = {
        "rollout, naive": naive_rollout,
        "rollout, tree": tree_rollout,
        "update, naive": naive_update,
        "update, tree": tree_update,
    }
    calls = {name: partial(count_tokens, name, rival) for name, rival in rivals.items()}
    best = best_of(repeats, calls)
    for phase in ("rollout", "update"):
        naive, shared = f"{phase}, naive", f"{phase}, tree"
        result[phase] = best[naive] / best[shared]
        print(
            f"  {phase:8s} naive {best[naive]:7.2f} s  tree {best[shared]:7.2f} s  "
            f"{result[phase]:5.1f} times faster; tokens {tokens[naive]:,} and {tokens[shared]:,}"
        )
    print(f"  kept for backward {alone / 1e6:.1f} and {together / 1e6:.1f} MB")
    return result


# --------------------------------------------------------------------------------------------------
# a group


def prepare(case, seed, generator):
    """The Contest of a case: a new model, a prompt, plans, latents and rewards drawn at random."""
    engine = random_engine(case.shape, seed, torch.Generator().manual_seed(0))
    options = dict(
        max_plan_tokens=case.plan_tokens,
        picture_side=case.side,
        group_size=case.group_size,
        window=2,
        prompts_per_step=1,
        tokens_per_pack=4096,
        updates=1,
        likelihood="sde",
        train_text=False,
        kl_beta=0.0,
    )
    config = grpo.Config(config="toy", **grpo.PRESETS["toy"] | options)
    prompt, size = case.prompt(generator), case.group_size
    plans = [random_words(case.plan_tokens, WORDS, generator) for _ in range(size)]
    grid = case.shape.picture_grid(case.side, case.side)
    sizes = (config.window, 1, size, grid[0] * grid[1], case.shape.token_channels)
    x = torch.randn(sizes, generator=generator)  # (S, P, G, T, C)
    times = flow.time_grid(config.num_timesteps, config.timestep_shift)[1 : config.window + 2]
    rollout = tree.Rollout(
        prompts=[prompt],
        plans=plans,
        captions=["x"] * size,
        ended=[True] * size,
        images=[],
        grid=grid,
        x=x,
        target=x + 0.1 * torch.randn(sizes, generator=generator),
        t=times[:-1, None],  # (S, P)
        t_next=times[1:, None],
        log_prob=torch.zeros(1, size, config.window),
    )
    reward = torch.randn(1, size, generator=generator)
    return Contest(engine, config, rollout, prompt, reward, generator)


# --------------------------------------------------------------------------------------------------
# rollouts


def naive_rollout(contest):
    """One member at a time: the prompt is read anew for its plan and for its picture."""
    engine, generator, prompt = contest.engine, contest.generator, contest.prompt
    thinking = Thinking(contest.config.max_plan_tokens, 1.0)
    for _ in range(contest.config.group_size):
        plans, _ = engine.think([prompt], thinking, generators=[generator])
        branch = Branch(plans[0], (engine.start(contest.rollout.grid, generator),))
        engine.paint([Group(prompt, contest.rollout.grid, (branch,))], contest.config.sampler)


def tree_rollout(contest):
    """All members of the group together, as grpo.roll_out does it."""
    engine, generator, size = contest.engine, contest.generator, contest.config.group_size
    prompts, thinking = [contest.prompt], Thinking(contest.config.max_plan_tokens, 1.0)
    prefix, generators = engine.prefill(prompts), [generator] * size
    plans, _ = engine.think(prompts, thinking, count=size, generators=generators, prefix=prefix)
    branches = [Branch(plan, (engine.start(contest.rollout.grid, generator),)) for plan in plans]
    group = Group(contest.prompt, contest.rollout.grid, tuple(branches))
    engine.paint([group], contest.config.sampler, prefix=prefix)


# --------------------------------------------------------------------------------------------------
# updates


def naive_pack(contest, member, k):
    """The pack of prompt, plan and one noised picture of a member."""
    rollout, sequence = contest.rollout, Sequence(contest.engine.layout)
    with sequence.document():
        contest.prompt.write(sequence)
        sequence.text(rollout.plans[member])
        sequence.noise(rollout.x[k, 0, member], rollout.grid, rollout.t[k, 0])
    return sequence.pack()


def naive_update(contest):
    """One member and one step at a time."""
    model, rollout, config = contest.engine.model, contest.rollout, contest.config
    image_of_token = torch.zeros(rollout.x.shape[3], dtype=torch.long)  # (T,)
    for member in range(config.group_size):
        for k in range(config.window):
            packed = naive_pack(contest, member, k)
            v = model.velocity(packed, model(packed)[1])  # (T, C)
            t, t_next = rollout.t[k, 0], rollout.t_next[k, 0]
            x, x_next = rollout.x[k, 0, member], rollout.target[k, 0, member]  # (T, C)
            mean, std = flow.transition(x, v, t, t_next=t_next)
            log_prob = flow.log_prob(x_next, mean, std, image_of_token=image_of_token, images=1)
            ratio = (log_prob - log_prob.detach()).exp().sum()
            (-contest.reward[0, member] * ratio).backward()
    model.zero_grad()


def tree_update(contest):
    """grpo.update, with an optimiser that changes nothing."""
    parameters = dict(contest.engine.model.named_parameters())
    state = TrainingState(parameters, torch.optim.SGD(parameters.values(), 0.0), {})
    learner = grpo.Learner(contest.engine, state, None)
    advantage, plan_advantage = grpo.advantages(contest.reward, contest.config)
    grpo.update(learner, contest.rollout, advantage, plan_advantage, contest.config)


def kept_for_backward(contest):
    """Bytes that autograd keeps at a time: for one member and step; for a pack with its prompt."""
    model, config = contest.engine.model, contest.config
    packed = naive_pack(contest, 0, 0)
    with kept_bytes(model.parameters()) as alone:
        model.velocity(packed, model(packed)[1])
    group = tree.plant(contest.engine.layout, contest.rollout, 0, config)
    with kept_bytes(model.parameters()) as together:
        tree.policy(model, model.keys_and_values(group.prompt), group.batches[0], config)
    return alone.total, together.total
