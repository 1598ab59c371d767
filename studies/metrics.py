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
so two checkpoints are compared on the same prompts and the same noise. evaluate.py, the strips of a
training run, its measurements at `eval_every`, the final table and the ablation use `HeldOut`.

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


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts, and how they are planned and painted."""

    data: str = "toy"  # the toy world, or samples on disk
    count: int = 200
    max_references: int = 4
    scale: int = 1  # of the toy world
    side: int = world.SIZE  # pixels of the square pictures, before the codec's resize rule
    sampler: Sampler = Sampler(7, 10.0, guidance_interval=(0.0, 1.0))
    thinking: Thinking | None = Thinking(MAX_PLAN_TOKENS)  # None: straight from the prompt
    batch: int = 50  # prompts at a time: bounds the memory, not the result
    seed: int = 0  # of the noise
    data_seed: int = 0  # of the prompts
    split: str = "held_out"  # of samples on disk; or all

    def __post_init__(self):
        if self.data == "toy":
            check_request("held_out", self.max_references)

    def samples(self):
        """The prompts, as samples."""
        return held_out(
            self.data,
            self.count,
            max_references=self.max_references,
            seed=self.data_seed,
            scale=self.scale,
            split=self.split,
        )

    def paint(self, engine: Engine, samples, numbers=None):
        """An engine.Result for each sample. Warns if its plan would be cut off.

        numbers: of the samples among all prompts, which their noise depends on; 0, 1, ... if None.
        """
        if self.thinking is not None:
            self.check_length([len(engine.tokenizer.encode(iccot.render(s.plan))) for s in samples])
        numbers = range(len(samples)) if numbers is None else numbers
        return engine.generate(
            [engine.request(one, self.side) for one in samples],
            sampler=self.sampler,
            thinking=self.thinking,
            batch=self.batch,
            seeds=[(self.seed, number) for number in numbers],
        )

    def check_length(self, plans):
        """Warn if plans of so many tokens would be cut off."""
        if max(plans, default=0) >= self.thinking.max_tokens:
            warn(
                f"plans of these prompts take up to {max(plans)} tokens, and only "
                f"{self.thinking.max_tokens} may be written: raise --sample_plan_tokens (sft.py), "
                "--max_plan_tokens and --eval_plan_tokens (grpo.py), --max_plan_tokens (elsewhere)"
            )


def held_out(path, count, *, max_references=4, seed=0, scale=1, split="held_out"):
    """`count` samples of the toy world's held-out split ("toy"), or of samples on disk.

    Of these at most as many as there are, or with split held_out are held out, by a hash of the key
    (data.py), none with more than max_references. UserError: the toy world's, and another split.
    """
    if path == "toy" and split != "held_out":
        raise UserError(f"split={split} is for samples on disk (--data), not for the toy world")
    if path == "toy":
        source = Drawn("held_out", seed, max_references, scale)
        return [source[i] for i in range(count)]
    source = opened(path, split, max_references)
    if len(source) < count:
        share = f"one sample in {round(1 / data.HELD_OUT)}; all: evaluate.py --split all"
        which = f"held out ({share})" if split == "held_out" else "samples"
        warn(f"{path} has {len(source)} {which}; {count} were asked for")
    return source.first(count)


@lru_cache(2)
def opened(path, split, limit):
    """The data.Source, opened once: of 400,000 samples the indexes alone take 20 s."""
    return data.Source(path, split=split, limit=limit)


def measure(samples, results, clip):
    """A row of the table: means over samples; PF and SC where the truth is known (toy world)."""
    found = means(samples, results, clip)
    return {column: value for column, (value, _) in found.items()} | {"n": len(samples)}


def means(samples, results, clip):
    """{column: (its mean, number of samples that it is over)}."""
    verdicts = [
        judge(result.image, one.truth) for one, result in zip(samples, results) if one.truth
    ]
    pictures = clip.embed_images([result.image for result in results])  # (B, E)
    planned = [i for i, r in enumerate(results) if r.plan is not None and r.plan.caption.strip()]
    written = [results[i].plan.caption for i in planned]
    right = [
        r.plan is not None and r.plan.caption == s.plan.caption for s, r in zip(samples, results)
    ]
    planned_only = agreement(clip, pictures[planned], written) if planned else math.nan
    captions = [one.plan.caption for one in samples]
    return {
        "PF": (mean([verdict.pf for verdict in verdicts]), len(verdicts)),
        "SC": (mean([verdict.sc for verdict in verdicts]), len(verdicts)),
        "Overall": (mean([verdict.overall for verdict in verdicts]), len(verdicts)),
        "CLIP_out": (agreement(clip, pictures, captions), len(samples)),
        "CLIP_plan": (planned_only, len(planned)),
        "format_ok": (mean([result.valid for result in results]), len(samples)),
        "caption_ok": (mean(right), len(samples)),
        "plan_ok": (mean([r.plan == one.plan for one, r in zip(samples, results)]), len(samples)),
    }


def measured_together(engine, held_out, clip):
    """`measure` during training, for the log: {held_out_COLUMN: mean}, each process its share.

    All processes take part and get the same numbers; a column without a value is left out.
    """
    samples = held_out.samples()
    numbers = range(rank(), len(samples), size())
    mine, found = [samples[number] for number in numbers], {}
    with gathered(engine.model):
        if mine:
            found = means(mine, held_out.paint(engine, mine, numbers), clip)
    row = of_all(found)
    return {f"held_out_{c}": row[c] for c in COLUMNS if not math.isnan(row[c])}


def of_all(found):
    """{column: mean over the samples of all processes}, nan where there are none.

    found: what `means` gave for those of this process, {} if it has none.
    """
    columns = (*COLUMNS, "plan_ok")
    parts = [found.get(column, (0.0, 0)) for column in columns]
    total = reduced([value * count if count else 0.0 for value, count in parts])
    counts = reduced([count for _, count in parts])
    return {c: t / n if n else math.nan for c, t, n in zip(columns, total, counts)}


def mean(values):
    """Their mean; nan where there are none."""
    return sum(values) / len(values) if values else math.nan


def agreement(clip, pictures, captions):
    """Mean of 100 * cosine of picture embeddings (B, E) and their captions."""
    return 100 * float(cosine(pictures, clip.embed_captions(captions)).mean())


def compare_checkpoints(checkpoints, held_out, clip, *, folder, held_as, score=None):
    """Table and grid of several checkpoints, {name: path}, on the same prompts from the same noise.

    All processes take part: each loads them and paints its share of the prompts, and the first one
    also the pictures of the grid.
    held_as: the weights' precision on a GPU (a CPU takes float32), and what the experts are rounded
    to, as load_quantised has it. Whatever nobody holds any more is freed first: cycles keep a model
    that was trained. Prints the table, writes table.json and grid.png (pictures of all, side by
    side) into `folder`, and returns the rows {name: measure(...)}.
    score(pictures, captions): the reward that stage 2 trained with; it stands in the grid.
    """
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a GPU
    precision, kind = held_as
    dtype = torch.float32 if device().type == "cpu" else getattr(torch, precision)
    barrier()  # the first process has written the last checkpoint
    samples, rows, painted = held_out.samples(), {}, {}
    mine = range(rank(), len(samples), size())
    shown = range(min(8, len(samples))) if is_main() else ()  # in the grid
    numbers = sorted({*mine, *shown})
    for name, path in checkpoints.items():
        asked = [samples[number] for number in numbers]
        engine = Engine(*load_quantised(path, device(), dtype, kind=kind))
        results = held_out.paint(engine, asked, numbers)
        del engine  # before the next is read
        found = dict(zip(numbers, results))
        own = [samples[number] for number in mine], [found[number] for number in mine]
        rows[name] = of_all(means(*own, clip) if mine else {}) | {"n": len(samples)}
        painted[name] = [found[number] for number in shown]
    if is_main():
        rewards = {name: rewards_of_plans(some, score) for name, some in painted.items()}
        save_grid(Path(folder) / "grid.png", samples[:8], painted, rewards=rewards)
        write_text(Path(folder) / "table.json", to_json(rows, indent=1) + "\n")
        print_table(rows)
    return rows


def rewards_of_plans(results, score):
    """The reward of each picture with the caption of its own plan; None where there is none."""
    with_plan = [result for result in results if result.valid] if score else []
    found = {}
    if with_plan:
        captions = [result.plan.caption for result in with_plan]
        values = score([result.image for result in with_plan], captions).tolist()
        found = {id(result): value for result, value in zip(with_plan, values)}
    return [found.get(id(result)) for result in results]


def by_task(samples, results):
    """{task: (PF, SC, Overall)} and {task: count}, of samples whose truth is known."""
    table, counts = {}, {}
    for task in TASKS:
        pairs = [(s, r) for s, r in zip(samples, results) if s.truth and s.task == task]
        verdicts = [judge(result.image, one.truth) for one, result in pairs]
        if verdicts:
            counts[task] = len(verdicts)
            table[task] = tuple(
                mean([getattr(verdict, key) for verdict in verdicts])
                for key in ("pf", "sc", "overall")
            )
    return table, counts


def print_table(rows):
    """rows: {name: measure(...)}."""
    print(f"{'':16s}" + "".join(f"{key:>12s}" for key in COLUMNS))
    for name, row in rows.items():
        print(f"{name:16s}" + "".join(f"{row[key]:12.3f}" for key in COLUMNS))
