"""
The toy world's image model, which errs, and the filter behind it.

The paper's targets are painted by an image model that does not always show what the plan says; a
filter drops those that CLIP finds worst (the last steps of its data pipeline). What is left is what
stage 2 is there to remove: stage 1 learns to paint a wrong fact as often as its targets do, and
which one the noise decides. So do the toy's targets in stage 1, here:

    errors    share of the targets with one wrong fact: a colour, a place, a thing that is missing,
              or another scene; drawn from the sample's own number
    dropped   share of the targets of a task that are dropped, those whose CLIP cosine with their
              caption is lowest. Where the limit lies is measured on the first samples; a position
              whose sample is below it shows another one, drawn anew
    first     position of the first sample that is painted so. Those before it are right, as if the
              base model had learned from real pictures (wrong ones from the beginning on delay what
              is learned first, copying)

Prompt, plan and truth of a sample stay what they were. The judge, the CLIPs' training, stage 2's
prompts and the held-out split have no painter: they are always right.

Left out: blur, artefacts, errors that depend on what is asked.

    source = Painted(Drawn("train", 0, 4), Painter(errors=0.45));   source[position]
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from iccot import TASKS, Sample
from reward import Clip, cosine
from toy.tasks import Drawn, one_fact_changed
from toy.world import Truth, draw, pick, split_of

FACTS = ("colour", "place", "missing", "scene")
ERRING = 1000  # purpose of its random numbers, beside those of the splits
FIRST = 700  # samples that say where the filter's limits lie
APART = 2**32  # between the numbers of a sample and of its substitute


@dataclass(frozen=True)
class Painter:
    """How the targets of stage 1 are painted, and which of them are kept."""

    errors: float = 0.0
    dropped: float = 0.0
    clip: Clip | None = None  # of the filter; on the CPU, where samples are read
    first: int = 0  # position of the first sample that it paints

    def __post_init__(self):
        if not 0 <= self.errors <= 1 or not 0 <= self.dropped < 1:
            raise ValueError(
                f"painter_errors={self.errors}, filter_targets={self.dropped}: expected shares, "
                f"from 0 to 1, and less than 1"
            )


def painted(truth: Truth, rng: np.random.Generator, errors: float) -> Truth:
    """What the painter shows where `truth` is asked: itself, or with a share `errors` one fact less
    right, that is still of the same split.
    """
    if rng.random() >= errors:
        return truth
    while True:
        shown = one_fact_changed(truth, pick(rng, FACTS), rng)
        if shown != truth and splits_of(shown) <= splits_of(truth):
            return shown


def splits_of(truth: Truth) -> set[str]:
    """The splits that the scene and the subjects of a truth belong to."""
    identities = (truth.scene, *(thing.subject for thing in truth.things))
    return {split_of(identity) for identity in identities}


class Painted(torch.utils.data.Dataset):
    """The samples of the toy world with the painter's targets."""

    def __init__(self, source: Drawn, painter: Painter):
        self.source, self.painter, self.lowest = source, painter, {}
        if painter.dropped:
            self.lowest = self._limits()

    def __getitem__(self, position: int) -> Sample:
        if position < self.painter.first:
            return self.source[position]
        for number in itertools.count(int(position), APART):
            sample = self._painted(number)
            if not self.lowest or self._cosine(sample) >= self.lowest[sample.task]:
                return sample

    def references(self, position: int) -> int:
        """How many a sample has, or had before it was dropped."""
        return self.source.references(position)

    def _painted(self, number):
        sample = self.source[number]
        rng = np.random.default_rng((self.source.seed, ERRING, number))
        shown = painted(sample.truth, rng, self.painter.errors)
        if shown == sample.truth:
            return sample
        target = Image.fromarray(draw(shown))
        size = sample.target.size
        return replace(sample, target=target.resize(size, Image.Resampling.NEAREST))

    def _cosine(self, sample):
        clip = self.painter.clip
        of_both = clip.embed_images([sample.target]), clip.embed_captions([sample.plan.caption])
        return float(cosine(*of_both))

    def _limits(self):
        """{task: the cosine below which a target is dropped}."""
        cosines = {task: [] for task in TASKS}
        for number in range(FIRST):
            sample = self._painted(number)
            cosines[sample.task].append(self._cosine(sample))
        return {task: float(np.quantile(cosines[task], self.painter.dropped)) for task in TASKS}
