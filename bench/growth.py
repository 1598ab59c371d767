"""
How time grows with documents, members and references, for a model of middle size on a CPU.

    python -m bench growth

    documents    a training pass, forward and backward, of 1, 2 and 4 edits in one pack. They see
                 nothing of each other, so the work is proportional to their number.
    members      rollout and update of a group of 8 and of 16 with four references. What they share,
                 the prompt, is computed once, so twice the members cost less than twice the time.
    references   prefill of a prompt with one to four. Beside the time: its tokens, which the
                 weights cost, and its pairs of a query and a key that it may see, which attention
                 costs. Time should grow no faster than the pairs.

CPU seconds on one thread, best of `repeats` alternating rounds. Letters: sequence.py.
Left out: longer plans and larger pictures, several threads.
"""

from dataclasses import replace
from functools import partial

import torch

from bench.grpo import CASES, prepare, tree_rollout, tree_update
from bench.model import MID, edits, random_engine, random_reference, random_words, training
from bench.timing import best_of
from engine import Prompt
from sequence import Sequence

DOCUMENTS, MEMBERS, REFERENCES = (1, 2, 4), (8, 16), (1, 2, 3, 4)


def bench_growth(config):
    """Prints the seconds of all cases; returns how many times the first ones the others take."""
    generator = torch.Generator().manual_seed(config.seed)
    engine = random_engine(MID, config.seed, generator)
    result = {}
    parts = of_documents(engine, generator), of_members(config.seed), of_references(engine)
    for rivals, notes in parts:
        seconds = best_of(config.repeats, rivals)
        for name, found in grown(seconds).items():
            note = notes.get(name, "")
            print(f"{name:28s}{seconds[name]:8.3f} s{found:7.2f} times{note}", flush=True)
            result[name.replace(" ", "_")] = round(found, 2)
    return result


def grown(seconds):
    """{name: seconds over those of the first of its kind}; a name is a kind and a number."""
    first = {}
    for name, value in seconds.items():
        first.setdefault(name.rsplit(" ", 1)[0], value)
    return {name: value / first[name.rsplit(" ", 1)[0]] for name, value in seconds.items()}


def of_documents(engine, generator):
    """({name: function}, nothing): a training pass of so many documents."""
    rivals = {}
    for count in DOCUMENTS:
        packed = edits(engine.layout, generator, count=count)
        passes = training(engine.model, packed, generator)
        rivals[f"documents {count}"] = passes["train forward + backward"]
    return rivals, {}


def of_members(seed):
    """({name: function}, nothing): rollout and update of a group of so many."""
    rollouts, updates = {}, {}
    for count in MEMBERS:
        case = replace(CASES["mid, 4 references"], group_size=count)
        contest = prepare(case, seed, torch.Generator().manual_seed(seed))
        rollouts[f"rollout, members {count}"] = partial(tree_rollout, contest)
        updates[f"update, members {count}"] = partial(tree_update, contest)
    return rollouts | updates, {}


def of_references(engine):
    """({name: function}, {name: tokens and pairs beside the first's}): prefill of so many."""
    rivals, sizes = {}, {}
    for count in REFERENCES:
        generator = torch.Generator().manual_seed(count)
        references = [random_reference(generator) for _ in range(count)]
        prompt = Prompt((*references, random_words(40, MID.vocab_size, generator)))
        sequence = Sequence(engine.layout)
        with sequence.document():
            prompt.write(sequence)
        name = f"prefill, references {count}"
        rivals[name] = partial(engine.prefill, [prompt])
        sizes[name] = len(prompt), int(sequence.pack().mask.dense().sum())
    (tokens, pairs), *_ = sizes.values()
    notes = {
        name: f"; tokens {n / tokens:.2f}, visible pairs {seen / pairs:.2f} times"
        for name, (n, seen) in sizes.items()
    }
    return rivals, notes
