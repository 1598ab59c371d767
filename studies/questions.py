"""
Open questions of the paper, asked of a trained model in the toy world, which knows the truth.

    noise         references under pixel noise: how far do PF, SC and captions hold?
    mismatch      a reference of another prompt in place of the last; the first two exchanged
    references    one to four references as in training, and what `sft.py --max_references 5` adds:
                  four subjects without a reference for the scene, and five references
    steering      does the picture follow a plan in which a person changed one fact: a place, the
                  scene, a colour? References and instruction stay, and speak against it
    captions      can a wrong caption be told from a right one, also when it is drawn well?

"Follows" means that the exact judge gives the picture more PF by the edited truth than by the old.
For the last one, `draws` plans of each held-out prompt are sampled at temperature 1 and painted. A
plan is right when its caption is the true one. Four scores that need no truth are asked to rank
right plans above wrong ones:

    picture        cosine of the picture and the plan's caption: what the reward of stage 2 sees
    instruction    cosine of the caption and the instruction as texts: the same CLIP, no picture
    likelihood     mean log-probability of the plan's tokens given the prompt: the model's own word
    votes          share of the prompt's other plans that have the same caption: self-consistency

    AUC = P(score of a right plan > score of a wrong one), ties count a half

1 is always, 0.5 is chance; over all plans, and over those "drawn well": with a picture score of at
least the median of the right plans. Questions that need training are options of grpo.py.

Left out: real pictures; they have no exact judge.

    python -m studies.questions --config toy --question captions
"""

from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Literal

import numpy as np
import torch
from PIL import Image

from engine import Engine, Sampler, Thinking
from iccot import ICCoT, render
from reward import cosine
from runtime import processes
from runtime.config import exit_on_user_error, parse
from runtime.pretrained import load_model
from sequence import Sequence
from studies.metrics import COLUMNS, MAX_PLAN_TOKENS, HeldOut, mean, measure
from toy.judge import judge
from toy.prepare import metric_clip
from toy.tasks import Drawn, caption, one_fact_changed

LEVELS = (0.0, 0.05, 0.1, 0.2, 0.4)  # standard deviations of the noise, of pixels in [0, 1]


@dataclass(frozen=True)
class Config:
    question: Literal["noise", "mismatch", "references", "steering", "captions"] = "captions"
    checkpoint: str = "out/toy-sft"  # folder of a run or of a model
    num_samples: int = 200  # prompts; for "references", of each number of references
    draws: int = 4  # plans sampled for each prompt of "captions"
    num_timesteps: int = 7  # grid points of the sampler
    timestep_shift: float = 10.0
    metric_name: str = "toy"  # open_clip architecture of the CLIP that measures
    metric: str = "out/toy-clip-metric"  # its weights: a tag, a .safetensors file, a folder
    clip_steps: int = 300  # training steps of the toy CLIP, if it is missing
    seed: int = 0  # of the noise, in references and in pictures
    data_seed: int = 0  # of the prompts
    threads: int = 0  # CPU threads; 0 measures

    def __post_init__(self):
        if self.num_samples < 1 or self.draws < 2:
            raise ValueError(
                f"num_samples={self.num_samples}, draws={self.draws}: expected at least 1 and 2"
            )
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps={self.num_timesteps}: expected at least 2 grid points, "
                "noise and picture"
            )

    def held_out(self):
        """The toy world's held-out prompts, and how they are planned and painted."""
        return HeldOut(
            count=self.num_samples,
            sampler=Sampler(self.num_timesteps, self.timestep_shift),
            seed=self.seed,
            data_seed=self.data_seed,
        )


PRESETS = {
    "toy": {},
    "smoke": dict(
        checkpoint="out/smoke-sft",
        num_samples=8,
        draws=2,
        metric="out/smoke-clip-metric",
        clip_steps=20,
    ),
}


# --------------------------------------------------------------------------------------------------
# prompts that are not as they should be


def noisy(one, level, seed):
    """The sample with Gaussian noise on every pixel of its references.

    level: its standard deviation, of pixels in [0, 1]. seed: of numpy's generator.
    """
    rng = np.random.default_rng(seed)

    def spoilt(image):
        pixels = np.asarray(image) / 255 + level * rng.standard_normal((*image.size[::-1], 3))
        return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))

    return replace(one, references=tuple(map(spoilt, one.references)))


def mismatched(samples):
    """Each sample with its last reference from the next sample whose last one has the same size."""
    found = []
    for i, one in enumerate(samples):
        others = samples[i + 1 :] + samples[:i]
        sizes = [other.references[-1].size for other in others]
        if one.references[-1].size in sizes:
            other = others[sizes.index(one.references[-1].size)]
            found.append(replace(one, references=(*one.references[:-1], other.references[-1])))
    return found


def exchanged(samples):
    """(those with two references or more as they are, the same with the first two exchanged)."""
    some = [one for one in samples if len(one.references) > 1]
    swapped = []
    for one in some:
        first, second, *rest = one.references
        swapped.append(replace(one, references=(second, first, *rest)))
    return some, swapped


def numbered(config):
    """{number of references: `num_samples` held-out samples}, four at most, and then more."""
    known, more = (Drawn("held_out", config.data_seed, most) for most in (4, 5))

    def drawn(source, fits):
        return list(islice(filter(fits, map(source.__getitem__, count())), config.num_samples))

    def has(number, task=None):
        return lambda one: len(one.references) == number and task in (None, one.task)

    found = {f"{n} references": drawn(known, has(n)) for n in (1, 2, 3, 4)}
    found["4 references, no scene"] = drawn(more, has(4, "subject_composition"))
    found["5 references"] = drawn(more, has(5))
    return found


def rows_of(config):
    """{name of the row: samples} of the questions that compare prompts."""
    if config.question == "references":
        return numbered(config)
    samples = config.held_out().samples()
    if config.question == "noise":
        return {
            f"noise {level}": [noisy(one, level, [config.seed, i]) for i, one in enumerate(samples)]
            for level in LEVELS
        }
    several, swapped = exchanged(samples)
    return {
        "as given": samples,
        "last reference of another prompt": mismatched(samples),
        "two or more references, as given": several,
        "first two exchanged": swapped,
    }


def compare_prompts(engine, clip, config):
    """Print PF, SC and the rest for each kind of prompt. Returns {name: `metrics.measure`}."""
    held, table = config.held_out(), {}
    print(f"{'':34s}{'n':>6s}" + "".join(f"{name:>12s}" for name in COLUMNS))
    for name, samples in rows_of(config).items():
        table[name] = row = measure(samples, held.paint(engine, samples), clip)
        cells = "".join(f"{row[key]:12.3f}" for key in COLUMNS)
        print(f"{name:34s}{len(samples):6d}{cells}", flush=True)
    return table


# --------------------------------------------------------------------------------------------------
# plans that a person has edited


def edited(samples, fact, seed):
    """[(sample, its truth with another place, scene or colour)], where the caption shows it."""
    pairs = []
    for i, one in enumerate(samples):
        truth = one_fact_changed(one.truth, fact, np.random.default_rng([seed, i]))
        if caption(truth) != one.plan.caption:
            pairs.append((one, truth))
    return pairs


def steering(engine, clip, config):
    """Print how often pictures follow an edited plan, and how often they would without the edit.

    clip: not needed. Returns {fact: (number of plans, share that follows, share without the edit)}.
    """
    held, table = config.held_out(), {}
    samples = held.samples()
    print(f"{'':10s}{'n':>6s}{'follows':>10s}{'unedited':>10s}")
    for fact in ("place", "scene", "colour"):
        pairs = edited(samples, fact, config.seed)
        words = [caption(truth) for _, truth in pairs], [one.plan.caption for one, _ in pairs]
        shares = [follows(engine, held, pairs, captions=some) for some in words]
        table[fact] = len(pairs), *shares
        print(f"{fact:10s}{len(pairs):6d}{shares[0]:10.3f}{shares[1]:10.3f}", flush=True)
    return table


def follows(engine, held, pairs, *, captions):
    """Share of `edited` pairs whose picture of the plan with this caption is nearer the edit."""
    requests = [
        replace(engine.request(one, held.side), plan=render(ICCoT(words, one.plan.relations)))
        for (one, _), words in zip(pairs, captions)
    ]
    seeds = [(held.seed, i) for i in range(len(pairs))]
    how = dict(sampler=held.sampler, thinking=None, batch=held.batch, seeds=seeds)
    results = zip(engine.generate(requests, **how), pairs)
    return mean([judge(x.image, t).pf > judge(x.image, one.truth).pf for x, (one, t) in results])


# --------------------------------------------------------------------------------------------------
# captions that are wrong


@torch.no_grad()
def likelihoods(engine, samples, texts, *, batch=50):
    """(number of texts,) mean log-probability of each text's tokens as the plan of its sample.

    Its eos counts too. batch: texts at a time, bounds the memory.
    """
    found = []
    for first in range(0, len(samples), batch):
        sequence, lengths = Sequence(engine.layout), []
        for one, text in zip(samples[first : first + batch], texts[first : first + batch]):
            plan = engine.tokenizer.encode(text)
            lengths.append(len(plan) + 1)
            with sequence.document():
                engine.prompt(one.references, one.instruction).write(sequence)
                sequence.text(plan, loss=True)
        packed = sequence.pack()
        und, _ = engine.model(packed)
        losses = engine.model.cross_entropy(und, packed).split(lengths)  # of each plan's tokens
        found += [-part.mean() for part in losses]
    return torch.stack(found)  # (number of texts,)


def votes(captions, draws):
    """(number of captions,) share of the prompt's other plans that have the same caption.

    captions: prompt by prompt, `draws` of each.
    """
    groups = [captions[i : i + draws] for i in range(0, len(captions), draws)]
    return torch.tensor([(group.count(one) - 1) / (draws - 1) for group in groups for one in group])


def auc(score, right):
    """P(score of a right plan > that of a wrong one); nan where one kind is missing.

    score: floats, one a plan; right: whether that plan is right.
    """
    difference = score[right][:, None] - score[~right][None, :]  # (right plans, wrong plans)
    return ((difference > 0).float() + (difference == 0).float() / 2).mean().item()


def caption_scores(engine, clip, samples, *, results):
    """{name: (number of plans,)} of the scores that need a single plan, see above."""
    written = clip.embed_captions([result.plan.caption for result in results])  # (B, E)
    asked = clip.embed_captions([one.instruction for one in samples])  # (B, E)
    pictures = clip.embed_images([result.image for result in results])  # (B, E)
    return {
        "picture": cosine(pictures, written),
        "instruction": cosine(written, asked),
        "likelihood": likelihoods(engine, samples, [result.text for result in results]),
    }


def captions(engine, clip, config):
    """Print how well each score tells right plans from wrong ones.

    Returns {score: (AUC, AUC of those drawn well)}, or {} where no plan parses.
    """
    held = replace(config.held_out(), thinking=Thinking(MAX_PLAN_TOKENS, temperature=1.0))
    samples = [one for one in held.samples() for _ in range(config.draws)]
    results = held.paint(engine, samples)
    written = [result.plan.caption if result.valid else "" for result in results]
    keep = [i for i, caption in enumerate(written) if caption]
    if not keep:
        print(f"none of {len(written)} plans parses: train the model first")
        return {}
    right = torch.tensor([written[i] == samples[i].plan.caption for i in keep])
    scores = caption_scores(
        engine, clip, [samples[i] for i in keep], results=[results[i] for i in keep]
    )
    scores["votes"] = votes(written, config.draws)[keep]  # (number of plans,)
    well = scores["picture"] >= scores["picture"][right].median() if right.any() else right
    print(
        f"{len(keep)} plans that parse: {int(right.sum())} right, {int((~right).sum())} wrong; "
        f"drawn well: {int((right & well).sum())} and {int((~right & well).sum())}"
    )
    table = {
        name: (auc(score, right), auc(score[well], right[well])) for name, score in scores.items()
    }
    print(f"{'AUC':12s} {'all plans':>12s} {'drawn well':>12s}")
    for name, (whole, part) in table.items():
        print(f"{name:12s} {whole:12.3f} {part:12.3f}")
    return table


def main(config):
    """Print the table of one question and return it."""
    with exit_on_user_error(ValueError):
        engine = Engine(*load_model(config.checkpoint))
        clip = metric_clip(config.metric_name, config.metric, config.clip_steps)
    processes.choose_threads(config.threads)
    answers = {"captions": captions, "steering": steering}
    return answers.get(config.question, compare_prompts)(engine, clip, config)


if __name__ == "__main__":
    main(parse(Config, PRESETS))
