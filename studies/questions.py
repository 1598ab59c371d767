"""
Can a wrong caption be told from a right one, also when it is drawn well?

A question that the paper leaves open, asked of a trained model in the toy world, which knows the
truth. `draws` plans of each held-out prompt are sampled at temperature 1 and painted. A plan is
right when its caption is the true one. Four scores that need no truth are asked to rank right plans
above wrong ones:

    picture        cosine of the picture and the plan's caption: what the reward of stage 2 sees
    instruction    cosine of the caption and the instruction as texts: the same CLIP, no picture
    likelihood     mean log-probability of the plan's tokens given the prompt: the model's own word
    votes          share of the prompt's other plans that have the same caption: self-consistency

    AUC = P(score of a right plan > score of a wrong one), ties count a half

1 is always, 0.5 is chance; over all plans, and over those "drawn well": with a picture score of at
least the median of the right plans. Left out: the other questions, whose answers are in RESULTS.md;
real pictures, which have no exact judge.

    python -m studies.questions --config toy
"""

from dataclasses import dataclass

import torch

from engine import Engine, Thinking
from reward import cosine
from runtime import processes
from runtime.config import exit_on_user_error, parse
from runtime.pretrained import load_model
from sequence import Sequence
from studies.metrics import MAX_PLAN_TOKENS, HeldOut
from toy.prepare import toy_clip


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/toy-sft"  # folder of a run or of a model
    num_samples: int = 200  # prompts
    draws: int = 4  # plans sampled for each prompt
    metric: str = "out/toy-clip-metric"  # folder of the toy CLIP that measures
    seed: int = 0  # of the noise
    threads: int = 0  # CPU threads; 0: PyTorch's own number

    def __post_init__(self):
        if self.num_samples < 1 or self.draws < 2:
            raise ValueError(
                f"num_samples={self.num_samples}, draws={self.draws}: expected at least 1 and 2"
            )


SMOKE = dict(checkpoint="out/smoke-sft", num_samples=8, draws=2, metric="out/smoke-clip-metric")
PRESETS = {"toy": {}, "smoke": SMOKE}


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
    thinking = Thinking(MAX_PLAN_TOKENS, temperature=1.0)
    held_out = HeldOut(count=config.num_samples, thinking=thinking, seed=config.seed)
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
    """Print the table and return it, see `captions`."""
    with exit_on_user_error(ValueError):
        engine = Engine(*load_model(config.checkpoint))
        clip = toy_clip(config.metric, 300)
    processes.choose_threads(config.threads)
    return captions(engine, clip, config)


if __name__ == "__main__":
    main(parse(Config, PRESETS))
