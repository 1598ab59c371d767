"""
Open questions of the paper, asked of a trained model in the toy world, which knows the truth.

    steering      does the picture follow a plan in which a person changed one fact: a place, the
                  scene, a colour? References and instruction stay, and speak against it
    captions      can a wrong caption be told from a right one, also when it is drawn well?

"Follows" means that the exact judge gives the picture more PF by the edited truth than by the old.
For captions, `draws` plans of each held-out prompt are sampled at temperature 1 and painted. A plan
is right when its caption is the true one. Four scores that need no truth are asked to rank right
plans above wrong ones:

    picture        cosine of the picture and the plan's caption: what the reward of stage 2 sees
    instruction    cosine of the caption and the instruction as texts: the same CLIP, no picture
    likelihood     mean log-probability of the plan's tokens given the prompt: the model's own word
    votes          share of the prompt's other plans that have the same caption: self-consistency

    AUC = P(score of a right plan > score of a wrong one), ties count a half

1 is always, 0.5 is chance; over all plans, and over those "drawn well": with a picture score of at
least the median of the right plans. Questions that need training are options of grpo.py.
Left out: spoilt and further references (RESULTS.md has the figures); real pictures, which have no
exact judge.

    python -m studies.questions --config toy --question captions
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from engine import Engine, Thinking
from iccot import ICCoT, render
from reward import cosine
from runtime import processes
from runtime.config import exit_on_user_error, parse
from runtime.pretrained import load_model
from sequence import Sequence
from studies.metrics import MAX_PLAN_TOKENS, HeldOut, mean
from toy.judge import judge
from toy.prepare import toy_clip
from toy.tasks import caption, one_fact_changed


@dataclass(frozen=True)
class Config:
    question: Literal["steering", "captions"] = "captions"
    checkpoint: str = "out/toy-sft"  # folder of a run or of a model
    num_samples: int = 200  # prompts
    draws: int = 4  # plans sampled for each prompt of "captions"
    metric: str = "out/toy-clip-metric"  # folder of the toy CLIP that measures
    seed: int = 0  # of the noise
    data_seed: int = 0  # of the prompts
    threads: int = 0  # CPU threads; 0 measures

    def __post_init__(self):
        if self.num_samples < 1 or self.draws < 2:
            raise ValueError(
                f"num_samples={self.num_samples}, draws={self.draws}: expected at least 1 and 2"
            )

    def held_out(self):
        """The toy world's held-out prompts, and how they are planned and painted."""
        return HeldOut(count=self.num_samples, seed=self.seed, data_seed=self.data_seed)


SMOKE = dict(checkpoint="out/smoke-sft", num_samples=8, draws=2, metric="out/smoke-clip-metric")
PRESETS = {"toy": {}, "smoke": SMOKE}


# --------------------------------------------------------------------------------------------------
# plans that a person has edited


def edited(samples, fact, seed):
    """[(sample, its truth with another place, scene or colour)], where the caption shows it."""
    pairs = []
    for i, sample in enumerate(samples):
        truth = one_fact_changed(sample.truth, fact, np.random.default_rng([seed, i]))
        if caption(truth) != sample.plan.caption:
            pairs.append((sample, truth))
    return pairs


def steering(engine, config):
    """Print how often pictures follow an edited plan, and how often they would without the edit.

    Returns {fact: (number of plans, share that follows, share without the edit)}.
    """
    held_out, table = config.held_out(), {}
    samples = held_out.samples()
    print(f"{'':10s}{'n':>6s}{'follows':>10s}{'unedited':>10s}")
    for fact in ("place", "scene", "colour"):
        pairs = edited(samples, fact, config.seed)
        follow = share_that_follows(engine, held_out, pairs, [caption(truth) for _, truth in pairs])
        true = [sample.plan.caption for sample, _ in pairs]
        unedited = share_that_follows(engine, held_out, pairs, true)
        table[fact] = len(pairs), follow, unedited
        print(f"{fact:10s}{len(pairs):6d}{follow:10.3f}{unedited:10.3f}", flush=True)
    return table


def share_that_follows(engine, held_out, pairs, captions):
    """Share of `edited` pairs whose picture of the plan with this caption is nearer the edit."""
    requests = []
    for (sample, _), words in zip(pairs, captions):
        plan = render(ICCoT(words, sample.plan.relations))
        requests.append(replace(engine.request(sample, held_out.side), plan=plan))
    results = engine.generate(
        requests,
        sampler=held_out.sampler,
        thinking=None,
        batch=held_out.batch,
        seeds=[(held_out.seed, i) for i in range(len(pairs))],
    )
    return mean(
        [
            judge(result.image, truth).pf > judge(result.image, sample.truth).pf
            for result, (sample, truth) in zip(results, pairs)
        ]
    )


# --------------------------------------------------------------------------------------------------
# captions that are wrong


@torch.no_grad()
def likelihoods(engine, samples, texts, batch=50):
    """(number of texts,) mean log-probability of each text's tokens as the plan of its sample.

    Its eos counts too. batch: texts at a time, bounds the memory.
    """
    means = []
    for first in range(0, len(samples), batch):
        sequence, lengths = Sequence(engine.layout), []
        for sample, text in zip(samples[first : first + batch], texts[first : first + batch]):
            plan = engine.tokenizer.encode(text)
            lengths.append(len(plan) + 1)
            with sequence.document():
                engine.prompt(sample.references, sample.instruction).write(sequence)
                sequence.text(plan, loss=True)
        packed = sequence.pack()
        und, _ = engine.model(packed)
        losses = engine.model.cross_entropy(und, packed).split(lengths)  # of each plan's tokens
        means += [-part.mean() for part in losses]
    return torch.stack(means)  # (number of texts,)


def votes(captions, draws):
    """(number of captions,) share of the prompt's other plans that have the same caption.

    captions: prompt by prompt, `draws` of each.
    """
    groups = [captions[i : i + draws] for i in range(0, len(captions), draws)]
    return torch.tensor([(group.count(x) - 1) / (draws - 1) for group in groups for x in group])


def auc(score, right):
    """P(score of a right plan > that of a wrong one); nan where one kind is missing.

    score: floats, one a plan; right: whether that plan is right.
    """
    difference = score[right][:, None] - score[~right][None, :]  # (right plans, wrong plans)
    return ((difference > 0).float() + (difference == 0).float() / 2).mean().item()


def captions(engine, clip, config):
    """Print how well each score tells right plans from wrong ones.

    Returns {score: (AUC, AUC of those drawn well)}, or {} where no plan parses.
    """
    held_out = replace(config.held_out(), thinking=Thinking(MAX_PLAN_TOKENS, temperature=1.0))
    samples = [sample for sample in held_out.samples() for _ in range(config.draws)]
    results = held_out.paint(engine, samples)
    written = [result.plan.caption if result.valid else "" for result in results]
    keep = [i for i, words in enumerate(written) if words]
    if not keep:
        print(f"none of {len(written)} plans parses: train the model first")
        return {}
    right = torch.tensor([written[i] == samples[i].plan.caption for i in keep])
    texts = clip.embed_captions([written[i] for i in keep])  # (B, E)
    asked = clip.embed_captions([samples[i].instruction for i in keep])  # (B, E)
    pictures = clip.embed_images([results[i].image for i in keep])  # (B, E)
    plans = [results[i].text for i in keep]
    scores = {
        "picture": cosine(pictures, texts),
        "instruction": cosine(texts, asked),
        "likelihood": likelihoods(engine, [samples[i] for i in keep], plans),
        "votes": votes(written, config.draws)[keep],
    }  # (number of plans,) each
    well = scores["picture"] >= scores["picture"][right].median() if right.any() else right
    print(
        f"{len(keep)} plans that parse: {int(right.sum())} right, {int((~right).sum())} wrong; "
        f"drawn well: {int((right & well).sum())} and {int((~right & well).sum())}"
    )
    print(f"{'AUC':12s} {'all plans':>12s} {'drawn well':>12s}")
    table = {}
    for name, score in scores.items():
        table[name] = auc(score, right), auc(score[well], right[well])
        print(f"{name:12s} {table[name][0]:12.3f} {table[name][1]:12.3f}")
    return table


def main(config):
    """Print the table of one question and return it."""
    with exit_on_user_error(ValueError):
        engine = Engine(*load_model(config.checkpoint))
        clip = toy_clip(config.metric, 300)
    processes.choose_threads(config.threads)
    if config.question == "steering":
        return steering(engine, config)
    return captions(engine, clip, config)


if __name__ == "__main__":
    main(parse(Config, PRESETS))
