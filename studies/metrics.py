"""
What a checkpoint can do: held-out prompts, planned, painted and measured. The paper's metrics.

    PF, SC      prompt following and subject consistency, 0 to 10, by the exact judge of the toy
                world (toy/judge.py); real pictures need an MLLM (studies/benchmarks.py)
    Overall     sqrt(PF * SC) a sample, then the mean (OmniContext)
    CLIP_out    100 * cosine of the CLIP embeddings of the picture and the *true* caption, by a CLIP
                that is not the reward's
    CLIP_plan   the same with the caption that the model wrote: what stage 2 rewards
    format_ok   share of plans that parse;   caption_ok   share of captions that are exactly right

Plans are greedy and pictures start from noise that depends on `seed` and the sample's number alone,
so two checkpoints are compared on the same prompts and the same noise. `HeldOut` is what
evaluate.py, a training run (strips, `eval_every`, the final table) and the ablation measure on.

Left out: confidence intervals (the ablation repeats training instead), FID.
"""

import gc
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

import data
import iccot
from engine import Engine, Sampler, Thinking
from iccot import TASKS
from reward import cosine
from runtime.config import UserError
from runtime.files import to_json, write_text
from runtime.processes import barrier, device, is_main, rank, reduced, size, warn
from runtime.quantised import load_quantised
from runtime.sharding import gathered
from studies.pictures import save_grid
from toy import world
from toy.judge import judge
from toy.tasks import Drawn, check_request

MAX_PLAN_TOKENS = 72  # the longest plan of the toy world has 52
COLUMNS = ("PF", "SC", "Overall", "CLIP_out", "CLIP_plan", "format_ok", "caption_ok")
IN_GRID = 8  # prompts in the grid of pictures


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts, and how they are planned and painted."""

    data: str = "toy"  # the toy world, or samples on disk
    count: int = 200
    max_references: int = 4
    side: int = world.SIZE  # pixels of the square pictures, before the codec's resize rule
    sampler: Sampler = Sampler(7, 10.0, guidance_interval=(0.0, 1.0))
    thinking: Thinking | None = Thinking(MAX_PLAN_TOKENS)  # None: straight from the prompt
    batch: int = 50  # prompts at a time: bounds the memory, not the result
    seed: int = 0  # of the noise
    split: str = "held_out"  # of samples on disk, by a hash of the key (data.py); or all

    def __post_init__(self):
        if self.data == "toy":
            check_request("held_out", self.max_references)
            if self.split != "held_out":
                raise UserError(f"split={self.split} is for samples on disk, not the toy world")

    def samples(self):
        """The prompts, as samples: `count`, or as many as there are on disk."""
        if self.data == "toy":
            scale = max(1, self.side // world.SIZE)
            source = Drawn("held_out", 0, self.max_references, scale)
            return [source[i] for i in range(self.count)]
        source = opened(self.data, self.split, self.max_references)
        if len(source) < self.count:
            part = f"one sample in {round(1 / data.HELD_OUT)}; all: evaluate.py --split all"
            which = f"held out ({part})" if self.split == "held_out" else "samples"
            warn(f"{self.data} has {len(source)} {which}; {self.count} were asked for")
        return source.first(self.count)

    def paint(self, engine: Engine, samples, numbers=None):
        """An engine.Result for each sample. Warns if its plan would be cut off.

        numbers: of the samples among all prompts, which their noise depends on; 0, 1, ... if None.
        """
        if self.thinking is not None:
            self.check_length([len(engine.tokenizer.encode(iccot.render(s.plan))) for s in samples])
        return engine.generate(
            [engine.request(sample, self.side) for sample in samples],
            sampler=self.sampler,
            thinking=self.thinking,
            batch=self.batch,
            seeds=[(self.seed, number) for number in numbers or range(len(samples))],
        )

    def check_length(self, plans):
        """Warn if plans of so many tokens would be cut off."""
        if max(plans, default=0) >= self.thinking.max_tokens:
            warn(
                f"plans of these prompts take up to {max(plans)} tokens, and only "
                f"{self.thinking.max_tokens} may be written: raise --sample_plan_tokens (sft.py) "
                "or --max_plan_tokens (elsewhere)"
            )


@lru_cache(2)
def opened(path, split, limit):
    """The data.Source, opened once: of 400,000 samples the indexes alone take 20 s."""
    return data.Source(path, split=split, limit=limit)


# --------------------------------------------------------------------------------------------------
# measuring


def measure(samples, results, clip):
    """A row of the table: means over samples; PF and SC where the truth is known (toy world)."""
    row = {name: value for name, (value, _) in means(samples, results, clip).items()}
    return row | {"n": len(samples)}


def means(samples, results, clip):
    """{column: (its mean, number of samples that it is over)}."""
    pairs = list(zip(samples, results))
    verdicts = [judge(result.image, sample.truth) for sample, result in pairs if sample.truth]
    pictures = clip.embed_images([result.image for result in results])  # (B, E)
    planned = [i for i, r in enumerate(results) if r.plan is not None and r.plan.caption.strip()]
    written = [results[i].plan.caption for i in planned]
    right = [r.plan is not None and r.plan.caption == s.plan.caption for s, r in pairs]
    return {
        "PF": (mean([verdict.pf for verdict in verdicts]), len(verdicts)),
        "SC": (mean([verdict.sc for verdict in verdicts]), len(verdicts)),
        "Overall": (mean([verdict.overall for verdict in verdicts]), len(verdicts)),
        "CLIP_out": (agreement(clip, pictures, [s.plan.caption for s in samples]), len(samples)),
        "CLIP_plan": (agreement(clip, pictures[planned], written), len(planned)),
        "format_ok": (mean([result.valid for result in results]), len(samples)),
        "caption_ok": (mean(right), len(samples)),
        "plan_ok": (mean([r.plan == s.plan for s, r in pairs]), len(samples)),
    }


def mean(values):
    """Their mean; nan where there are none."""
    return sum(values) / len(values) if values else math.nan


def agreement(clip, pictures, captions):
    """Mean of 100 * cosine of picture embeddings (B, E) and their captions; nan for none."""
    if not captions:
        return math.nan
    return 100 * float(cosine(pictures, clip.embed_captions(captions)).mean())


def measure_shared(engine, held_out, samples, clip, shown=0):
    """(row of the table over all samples, {number: Result} of what this process painted).

    All processes take part and get the same row: each paints its share of the samples, and the
    first one also the first `shown`.
    """
    mine = range(rank(), len(samples), size())
    numbers = sorted({*mine, *range(min(shown, len(samples)) if is_main() else 0)})
    asked = [samples[number] for number in numbers]
    results = dict(zip(numbers, held_out.paint(engine, asked, numbers)))
    own = means([samples[i] for i in mine], [results[i] for i in mine], clip) if mine else {}
    columns = (*COLUMNS, "plan_ok")
    parts = [own.get(column, (0.0, 0)) for column in columns]
    totals = reduced([value * count if count else 0.0 for value, count in parts])
    counts = reduced([count for _, count in parts])
    row = {c: total / n if n else math.nan for c, total, n in zip(columns, totals, counts)}
    return row | {"n": len(samples)}, results


def measured_together(engine, held_out, clip):
    """`measure_shared` during training, for the log: {held_out_COLUMN: mean}, without nan."""
    with gathered(engine.model):
        row, _ = measure_shared(engine, held_out, held_out.samples(), clip)
    return {f"held_out_{column}": row[column] for column in COLUMNS if not math.isnan(row[column])}


def compare_checkpoints(checkpoints, held_out, clip, *, folder, held_as, score=None):
    """Table and grid of several checkpoints, {name: path}, on the same prompts from the same noise.

    All processes take part. Prints the table, writes table.json and grid.png (pictures of all, side
    by side) into `folder`, and returns the rows {name: measure(...)}. Whatever nobody holds any
    more is freed first: cycles keep a model that was trained.
    held_as: the weights' precision on a GPU (a CPU takes float32), and what the experts are rounded
    to, as load_quantised has it. score(pictures, captions): the reward that stage 2 trained with;
    it stands in the grid.
    """
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a GPU
    precision, weights = held_as
    dtype = torch.float32 if device().type == "cpu" else getattr(torch, precision)
    barrier()  # the first process has written the last checkpoint
    samples, rows, painted, rewards = held_out.samples(), {}, {}, {}
    for name, path in checkpoints.items():
        engine = Engine(*load_quantised(path, device(), dtype, kind=weights))
        rows[name], results = measure_shared(engine, held_out, samples, clip, IN_GRID)
        del engine  # before the next is read
        if is_main():
            painted[name] = [results[i] for i in range(len(samples[:IN_GRID]))]
            rewards[name] = rewards_of_plans(painted[name], score)
    if is_main():
        save_grid(Path(folder) / "grid.png", samples[:IN_GRID], painted, rewards=rewards)
        write_text(Path(folder) / "table.json", to_json(rows, indent=1) + "\n")
        print_table(rows)
    return rows


def rewards_of_plans(results, score):
    """The reward of each picture with the caption of its own plan; None where there is none."""
    planned = [result for result in results if result.valid]
    if score is None or not planned:
        return [None] * len(results)
    captions = [result.plan.caption for result in planned]
    rewards = iter(score([result.image for result in planned], captions).tolist())
    return [next(rewards) if result.valid else None for result in results]


def by_task(samples, results):
    """{task: (PF, SC, Overall, how many)} of the samples whose truth is known."""
    table = {}
    for task in TASKS:
        pairs = [(s, r) for s, r in zip(samples, results) if s.truth and s.task == task]
        verdicts = [judge(result.image, sample.truth) for sample, result in pairs]
        if verdicts:
            pf, sc = mean([v.pf for v in verdicts]), mean([v.sc for v in verdicts])
            table[task] = pf, sc, mean([v.overall for v in verdicts]), len(verdicts)
    return table


def print_table(rows):
    """rows: {name: measure(...)}."""
    print(f"{'':16s}" + "".join(f"{key:>12s}" for key in COLUMNS))
    for name, row in rows.items():
        print(f"{name:16s}" + "".join(f"{row[key]:12.3f}" for key in COLUMNS))
