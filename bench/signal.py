"""
How much of stage 2's gradient is signal: cosines between gradients of independent groups.

A gradient of some groups is a mean of what all prompts would say and of chance. Of two sets of
groups that have nothing in common chance has nothing in common either, so

    E cos(g, g') = |signal|^2 / (|signal|^2 + |chance|^2)     0: chance alone; 1: no chance

For each way to compare members within a group (RID and its relatives) and each likelihood, `SETS`
sets of groups are rolled out from the stage 1 model in `init`, rewarded, and their gradients taken
without an update; printed is the mean cosine of all pairs with its standard error, for the
generation expert and for the rest, and the spread of the rewards within groups, between plans and
between pictures of one plan. A measurement of the toy preset's recipe, not of a speed.

    python -m bench signal --init out/toy-sft
"""

import itertools
from dataclasses import replace

import torch

import grpo
from objective import advantages
from reward import Clip, group_rewards, reward_statistics, source_of
from rollouts import roll_out
from runtime.lora import TRAINED
from toy.prepare import train_clips
from toy.tasks import Drawn

SETS, PROMPTS, MEMBERS = 6, 8, 8
WAYS = {
    "no RID": dict(rid=False),
    "RID": dict(),
    "4 plans x 2": dict(images_per_cot=2),
    "2 plans x 4": dict(images_per_cot=4),
    "RID, train_text": dict(train_text=True),
}


class Recorder(torch.optim.SGD):
    """An optimiser that keeps the gradients of its step and changes nothing."""

    def __init__(self, parameters):
        super().__init__(parameters.values(), 0.0)
        self.names, self.found = list(parameters), {}

    def step(self):
        values = [p.grad for group in self.param_groups for p in group["params"]]
        pairs = zip(self.names, values, strict=True)
        self.found = {name: g.flatten().clone() for name, g in pairs if g is not None}


def bench_signal(config):
    """Prints a line for each way and likelihood; returns {line: cosine of generation experts}."""
    sizes = dict(prompts_per_step=PROMPTS, group_size=MEMBERS, updates=1, kl_beta=0.0, steps=SETS)
    preset = grpo.PRESETS["toy"] | sizes | dict(init=config.init, seed=config.seed)
    plain = grpo.Config(config="toy", **preset | dict(train_text=False, std_floor=1e-6))
    train_clips(plain)
    learner, clip = grpo.build(plain), Clip(source_of(plain.clip_name, plain.clip))
    found = {}
    print(
        f"{SETS} sets of {PROMPTS} groups of {MEMBERS}, from {config.init}: mean cosine ± its error"
    )
    for likelihood, (name, change) in itertools.product(("forward", "sde"), WAYS.items()):
        line = f"{likelihood}, {name}"
        found[line] = one_way(
            learner, clip, replace(plain, likelihood=likelihood, **change), line=line
        )
    return found


def one_way(learner, clip, config, *, line):
    """Prints a line; returns the cosine of the generation expert's gradients."""
    gradients, statistics = [], []
    for step in range(SETS):
        gradient, seen = of_a_set(learner, clip, config, step=step)
        gradients.append(gradient)
        statistics.append(seen)
    gen, rest = map(cosines, zip(*gradients))
    spread = {k: sum(one[k] for one in statistics) / SETS for k in statistics[0]}
    print(
        f"{line:26s} gen {gen[0]:+.3f} ± {gen[1]:.3f}  rest {rest[0]:+.3f} ± {rest[1]:.3f}  "
        f"std {spread['reward_std']:.3f}, between plans {spread['reward_std_between']:.3f}, "
        f"within {spread['reward_std_within']:.3f}",
        flush=True,
    )
    return round(gen[0], 4)


def of_a_set(learner, clip, config, *, step):
    """(gradient of the generation expert, of the rest) of one set of groups, and its statistics."""
    numbers = range(step * PROMPTS, (step + 1) * PROMPTS)
    source = Drawn("train", config.seed + 1, config.max_references)
    samples = [source[number] for number in numbers]
    rollout = roll_out(learner.engine, samples, list(numbers), config=config, step=step)
    reward = group_rewards(clip, rollout.images, rollout.captions, groups=PROMPTS)  # (P, G)
    recorder = Recorder(learner.state.parameters)
    one = grpo.Learner(learner.engine, replace(learner.state, optimizer=recorder), None)
    grpo.update(one, rollout, advantages(reward, config), config=config)
    is_gen = {name: any(part in name for part in TRAINED["gen"]) for name in recorder.found}
    parts = [
        torch.cat([g for name, g in recorder.found.items() if is_gen[name] == wanted])
        for wanted in (True, False)
    ]
    return parts, reward_statistics(reward, config.plans_per_group)


def cosines(vectors):
    """(mean, its standard error) of the cosines of all pairs; pairs count as independent."""
    units = torch.stack([vector / vector.norm() for vector in vectors])  # (sets, values)
    pairs = torch.triu_indices(len(units), len(units), 1)  # (2, pairs)
    values = (units @ units.T)[pairs[0], pairs[1]]  # (pairs,)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
