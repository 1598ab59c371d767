"""
The first stage of the data pipeline: which pictures a sample is made of.

    pools         characters/ objects/ scenes/, folders of pictures, searched in depth
    task          drawn in the proportions of Re-Align-410K (iccot.TASKS)
    references    drawn from the pools that the task needs: a scene to edit and a subject to add to
                  it, two objects, up to `most` subjects and the scene where they meet, ...

A sample is named by a hash of its task and its references, so each combination comes once. All is
drawn with one generator: the same pools and the same seed give the same samples. Left out: choosing
pictures that go well together, and finding near duplicates within a pool.

    draw_references(pools_of("pictures"), count=1000, most=4, seed=0)
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from iccot import TASKS
from runtime.config import UserError
from runtime.files import is_hidden

POOLS = ("characters", "objects", "scenes")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def pools_of(folder):
    """{kind: [paths relative to `folder`]}; UserError for a pool that is missing or empty."""
    found = {}
    for kind in POOLS:
        pool = Path(folder) / kind
        if not folder or not pool.is_dir():
            raise UserError(
                f"the pool {pool} is missing; --pools must hold characters/, objects/ and "
                "scenes/ with pictures"
            )
        paths = [path.relative_to(folder) for path in pool.rglob("*")]
        paths = [path for path in paths if path.suffix.lower() in SUFFIXES and not is_hidden(path)]
        if not paths:
            raise UserError(f"the pool {pool} holds no {', '.join(SUFFIXES)} picture")
        for path in paths:
            if str(path).encode("utf-8", "replace").decode() != str(path):  # it cannot be written
                raise UserError(f"the name {path.name!a} in {pool} is not UTF-8 text; rename it")
        found[kind] = sorted(map(str, paths))
    return found


class Lots:
    """Pictures of the pools, drawn with one generator."""

    def __init__(self, pools, rng):
        self.pools, self.rng = pools, rng

    def picture(self, kind):
        """Any picture of a pool."""
        return self.pools[kind][int(self.rng.integers(len(self.pools[kind])))]

    def subject(self):
        """A character or an object, as often the one as the other."""
        return self.picture("characters" if self.rng.random() < 0.5 else "objects")

    def references(self, task, most):
        """The references of a sample of this task, in order, `most` of them at the most."""
        if task in ("add", "replace"):
            return [self.picture("scenes"), self.subject()]
        if task == "attribute":
            return [self.picture("objects"), self.picture("objects")]
        if task == "scene":
            return [self.subject(), self.picture("scenes")]
        if task == "subject":
            return [self.subject()]
        if task == "subject_composition":
            return [self.subject() for _ in range(int(self.rng.integers(2, most + 1)))]
        subjects = [self.subject() for _ in range(int(self.rng.integers(1, most)))]
        return [*subjects, self.picture("scenes")]  # scene_composition


def draw_references(pools, count, most, *, seed):
    """{key: {"key", "task", "references"}} of `count` different samples.

    pools: of `pools_of`, which "references" are paths of; most: references of one sample.
    UserError where the pools have too few pictures.
    """
    records, rng = {}, np.random.default_rng(seed)
    lots, shares = Lots(pools, rng), np.array(list(TASKS.values())) / sum(TASKS.values())
    attempts = 0
    while len(records) < count:
        attempts += 1
        if attempts > 50 * count:
            raise UserError(
                f"the pools have too few pictures for {count} different samples; "
                f"use --count={len(records)}"
            )
        task = str(rng.choice(list(TASKS), p=shares))
        references = lots.references(task, most)
        if len(set(references)) < len(references):
            continue
        key = f"{task}-{hashlib.sha256(json.dumps([task, references]).encode()).hexdigest()[:16]}"
        records.setdefault(key, {"key": key, "task": task, "references": references})
    return records
