"""
Four open questions of the paper, asked of a trained model in the toy world, where the truth is known (section 8).

    noise        references under pixel noise: how far do PF, SC and captions hold?
    mismatch     a reference of another prompt in place of the last one; the first two references exchanged
    references   one to four references as in training, and what `sft.py --max_references 5` adds: four subjects without
                 a reference for the scene, and five references
    captions     can a wrong caption be told from a right one, also when it is drawn well?

For the last one, `draws` plans of each held-out prompt are sampled at temperature 1 and painted. A plan is right when
its caption is the true one. Four scores that need no truth are asked to rank right plans above wrong ones:

    picture      cosine of the picture and the plan's caption (CLIP_plan)        what the reward of stage 2 sees
    instruction  cosine of the caption and the instruction, both as text         the same CLIP, no picture
    likelihood   mean log-probability of the plan's tokens given the prompt      the model's own word
    votes        share of the prompt's other plans that have the same caption    self-consistency

    AUC = P(score of a right plan > score of a wrong one), ties count a half     1: always; 0.5: chance

over all plans, and over those "drawn well": with a picture score of at least the median of the right plans.
Questions that need training are options of grpo.py: see RESULTS.md. Left out: real pictures; they have no exact judge.

    python questions.py --config toy --question captions
"""

from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Literal

import numpy as np
import torch
from PIL import Image

from engine import generate, make_prompt
from reward import compare
from runtime import processes
from runtime.config import exit_on_user_error, parse
from runtime.pretrained import load_model
from sequence import Sequence
from studies.metrics import measure, test_samples
from toy.prepare import metric_clip
from toy.tasks import Drawn

LEVELS = (0.0, 0.05, 0.1, 0.2, 0.4)  # standard deviations of the noise, of pixels in [0, 1]


COLUMNS = ("PF", "SC", "Overall", "CLIP_out", "CLIP_plan", "format_ok", "caption_ok")


@dataclass(frozen=True)
class Config:
    question: Literal["noise", "mismatch", "references", "captions"] = "captions"
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
                f"num_timesteps={self.num_timesteps}: expected at least 2 grid points, noise and picture"
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


# ---------------------------------------------------------------------------------------------------------------------
# prompts that are not as they should be


def noisy(one, level, seed):
    """The sample with Gaussian noise on every pixel of its references."""
    rng = np.random.default_rng(seed)
    spoil = lambda image: (
        np.asarray(image) / 255 + level * rng.standard_normal((*image.size[::-1], 3))
    )
    pictures = [
        Image.fromarray((255 * spoil(image).clip(0, 1)).round().astype(np.uint8))
        for image in one.references
    ]
    return replace(one, references=tuple(pictures))


def mismatched(samples):
    """Each sample with its last reference from the next sample whose last reference has the same size."""
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
    return some, [
        replace(one, references=(one.references[1], one.references[0], *one.references[2:]))
        for one in some
    ]


def numbered(config):
    """{number of references: `num_samples` held-out samples}: four at the most, as in training, and then more."""
    known, more = (Drawn("held_out", config.data_seed, most) for most in (4, 5))
    drawn = lambda source, fits: list(
        islice(filter(fits, map(source.__getitem__, count())), config.num_samples)
    )
    found = {
        f"{n} references": drawn(known, lambda one: len(one.references) == n) for n in (1, 2, 3, 4)
    }
    four = lambda one: one.task == "subject_composition" and len(one.references) == 4
    return found | {
        "4 references, no scene": drawn(more, four),
        "5 references": drawn(more, lambda one: len(one.references) == 5),
    }


def rows_of(config):
    """{name of the row: samples} of the questions that compare prompts."""
    if config.question == "references":
        return numbered(config)
    samples = test_samples("toy", config.num_samples, 4, config.data_seed)
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


# ---------------------------------------------------------------------------------------------------------------------
# captions that are wrong


@torch.no_grad()
def likelihoods(model, layout, tokenizer, samples, texts, batch=50):
    """(n,) mean log-probability of each text's tokens, its eos included, as the plan of its sample."""
    found = []
    for first in range(0, len(samples), batch):
        sequence, lengths = Sequence(layout), []
        for one, text in zip(samples[first : first + batch], texts[first : first + batch]):
            plan = tokenizer.encode(text)
            lengths.append(len(plan) + 1)
            with sequence.document():
                make_prompt(model, tokenizer, one.references, one.instruction).write(sequence)
                sequence.text(plan, loss=True)
        packed = sequence.pack()
        und, _ = model(packed)
        found += [-part.mean() for part in model.cross_entropy(und, packed).split(lengths)]
    return torch.stack(found)


def votes(captions, draws):
    """(n,) share of the other plans of the prompt with the same caption; plans stand prompt by prompt."""
    groups = [captions[i : i + draws] for i in range(0, len(captions), draws)]
    return torch.tensor([(group.count(one) - 1) / (draws - 1) for group in groups for one in group])


def auc(score, right):
    """P(score of a right plan > that of a wrong one); nan where one kind is missing."""
    difference = score[right][:, None] - score[~right][None, :]
    return ((difference > 0).float() + (difference == 0).float() / 2).mean().item()


def captions(model, tokenizer, clip, config):
    """Print how well each score tells right plans from wrong ones. Returns {score: (AUC, AUC of those drawn well)}."""
    layout = model.config.layout(tokenizer)
    samples = [
        one
        for one in test_samples("toy", config.num_samples, 4, config.data_seed)
        for _ in range(config.draws)
    ]
    results = generate(
        model,
        layout,
        tokenizer,
        samples,
        config.seed,
        config.timestep_shift,
        config.num_timesteps,
        temperature=1.0,
    )
    written = [result.plan.caption if result.valid else "" for result in results]
    keep = [i for i, caption in enumerate(written) if caption]
    if not keep:
        print(f"none of {len(written)} plans parses: train the model first")
        return {}
    right = torch.tensor([written[i] == samples[i].plan.caption for i in keep])
    embedded = clip.embed_captions([written[i] for i in keep])
    asked = clip.embed_captions([samples[i].instruction for i in keep])
    scores = {
        "picture": compare(
            clip.embed_images([results[i].image for i in keep]), embedded, "clip_cos"
        ),
        "instruction": compare(embedded, asked, "clip_cos"),
        "likelihood": likelihoods(
            model, layout, tokenizer, [samples[i] for i in keep], [results[i].text for i in keep]
        ),
        "votes": votes(written, config.draws)[keep],
    }
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
    with exit_on_user_error(ValueError):
        model, tokenizer = load_model(config.checkpoint)
        clip = metric_clip(config.metric_name, config.metric, config.clip_steps)
    processes.choose_threads(config.threads)
    if config.question == "captions":
        return captions(model, tokenizer, clip, config)
    layout, table = model.config.layout(tokenizer), {}
    print(f"{'':34s}{'n':>6s}" + "".join(f"{name:>12s}" for name in COLUMNS))
    for name, samples in rows_of(config).items():
        results = generate(
            model,
            layout,
            tokenizer,
            samples,
            config.seed,
            config.timestep_shift,
            config.num_timesteps,
        )
        table[name] = row = measure(samples, results, clip)
        print(
            f"{name:34s}{len(samples):6d}" + "".join(f"{row[key]:12.3f}" for key in COLUMNS),
            flush=True,
        )
    return table


if __name__ == "__main__":
    main(parse(Config, PRESETS))
