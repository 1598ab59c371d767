"""
The paper's benchmarks, OmniContext and DreamOmni2Bench: pictures, and a judge of their protocol.

    PF, SC     two questions to an MLLM for each picture, each 0 to 10: does it follow the
               instruction; are the subjects those of the references
    Overall    sqrt(PF * SC) of a sample; a task is the mean of its samples, the benchmark the mean
               of its tasks (OmniContext's calculate_statistics.py)

Pictures go where the official scorer looks for them, each with what the model wrote beside it:

    {out}/fullset/{task_type}/{key}.png      1024 x 1024
    {out}/fullset/{task_type}/{key}.json     the text, the plan, its problems
    {out}/{judge}/{task_type}/score.jsonl    a line a sample, the official names

Our judge (endpoint.py) asks each question once (the official one: three times, the last answer
counts), and an answer that cannot be read is null and counted (there: a random number). A killed
run goes on where it was: whole pictures are not painted again, nor scores asked for again.
Left out: the other metrics of DreamOmni2's own paper (success ratios by Gemini, Doubao and people);
the published numbers are in docs/DATA.md.

    python evaluate.py --config full --bench omnicontext OmniGen2/OmniContext --generate_only
"""

import io
import json
import math
import re
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from engine import Request
from runtime import files
from runtime.config import UserError, to_dict
from studies.endpoint import (
    Access,
    Endpoint,
    Fault,
    Refused,
    ask_score,
    commonest,
    in_parallel,
    to_send,
)
from studies.metrics import mean
from vision import open_image, to_png

SIDE = 1024  # pixels of a picture on disk
JUDGING = 16  # questions at a time
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SCORED = ("key", "task_type", "instruction_language", "PF_score", "SC_score")  # of a line of scores
SETTINGS = (  # of evaluate.py, which a picture depends on
    "checkpoint bench_path use_plan max_plan_tokens num_timesteps seed timestep_shift "
    "text_guidance image_guidance cache_interval"
).split()

# the name of a true picture: "res", "0_result", "edit-res2", "imgres"; not "dress", "forest"
ANSWER = re.compile(r"(?i)(?<![a-z])(?:res|target|output|answer|gt(?![a-z]))|res(?![a-z])")

OMNICONTEXT_TASKS = (
    "single_character",
    "single_object",
    "multi_character",
    "multi_object",
    "multi_character_object",
    "scene_character",
    "scene_object",
    "scene_character_object",
)
DREAMOMNI2_TASKS = ("add", "replace", "global", "local", "generation")


@dataclass(frozen=True)
class Case:
    """One prompt of a benchmark. references: PIL pictures."""

    key: str
    task: str
    instruction: str
    language: str
    references: tuple


# --------------------------------------------------------------------------------------------------
# the whole


def run_benchmark(config, load_engine):
    """Paint, judge and tabulate. Returns `statistics`, or {} with config.generate_only.

    config: an evaluate.Config. load_engine(config) -> Engine is called if a picture is missing.
    UserError for data that are missing or torn.
    """
    read, tasks = read_dreamomni2, DREAMOMNI2_TASKS
    if config.bench == "omnicontext":
        read, tasks = read_omnicontext, OMNICONTEXT_TASKS
    cases, folder = read(config.bench_path), config.folder
    files.check_writable(folder)
    check_settings(folder / "settings.json", config)
    left = [case for case in cases if not is_painted(case, folder)]
    if left:
        paint_cases(load_engine(config), left, config)
    print(f"{len(left)} pictures painted, {len(cases)} in {folder / 'fullset'}")
    if config.generate_only:
        return {}
    table = statistics(judge_cases(cases, config), tasks)
    print_statistics(table, cases, config)
    files.write_text(folder / f"{config.bench}.json", files.to_json(table, indent=1) + "\n")
    return table


def check_settings(path, config):
    """Record what the pictures depend on; UserError if those that are there were made otherwise."""
    options = to_dict(config)
    settings = {name: options[name] for name in SETTINGS}
    before = files.read_json(path) if path.is_file() else settings
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise UserError(
                f"the pictures in {path.parent} were made with {name}={before[name]}, now "
                f"{name}={value}; choose another --out, or delete them"
            )
    files.write_text(path, json.dumps(settings, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------
# reading the benchmarks


def read_omnicontext(path):
    """Cases from a parquet file, a folder of them, or a data set on Hugging Face."""
    from pyarrow import ArrowException, parquet

    folder = Path(path) if Path(path).exists() else download(path)
    tables = [folder] if folder.is_file() else sorted(folder.glob("[!.]*.parquet"))
    tables = tables or sorted(folder.glob("data/[!.]*.parquet"))
    if not tables:
        raise UserError(
            f"{folder} holds no parquet file; expected OmniContext's layout, data/train-*.parquet"
        )
    cases = []
    for table in tables:
        try:
            rows = parquet.read_table(table).to_pylist()
        except (ArrowException, OSError) as error:
            raise UserError(
                f"{table} cannot be read as parquet ({str(error)[:100]}); copy it again"
            ) from None
        home = folder.parent if folder.is_file() else folder
        cases += [omnicontext_case(row, home) for row in rows]
    return cases


def omnicontext_case(row, folder):
    """A Case from a row of OmniContext; its pictures are in the row, or files in `folder`."""
    key, task, images = str(row.get("key", "")), row.get("task_type"), row.get("input_images")
    files.check_name(key, "a key of the benchmark")
    if not images:
        raise UserError(f"row {key} has no input_images; expected OmniContext's layout")
    if task not in OMNICONTEXT_TASKS or not isinstance(row.get("instruction"), str):
        raise UserError(
            f"row {key} has the task {task!r} and the instruction {row.get('instruction')!r}; "
            f"expected a text, and one of {', '.join(OMNICONTEXT_TASKS)}"
        )
    references = []
    for image in images:
        if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
            raise UserError(f"an input image of {key} has neither bytes nor a path")
        source = io.BytesIO(image["bytes"]) if image.get("bytes") else folder / image["path"]
        references.append(open_image(source, f"an input image of {key}"))
    language = row.get("instruction_language") or "en"
    return Case(key, task, row["instruction"], language, tuple(references))


def read_dreamomni2(path):
    """Cases from DreamOmni2Bench's folders, or from that data set on Hugging Face.

    A case is a folder {editing,generation}_benchmark/CATEGORY/NUMBER: instruction.txt, references
    (the picture to edit first), and the true picture, which is left alone.
    """
    folder = Path(path) if Path(path).exists() else download(path)
    texts = sorted(folder.glob("*_benchmark/*/*/instruction.txt"))
    if not texts:
        raise UserError(
            f"{folder} holds no */*/*/instruction.txt; expected DreamOmni2Bench's layout, "
            f"editing_benchmark/add/1/instruction.txt"
        )
    return [dreamomni2_case(text.parent) for text in texts]


def dreamomni2_case(folder):
    """A Case from its folder; UserError for an unknown category and for missing references."""
    category, group = folder.parent.name, folder.parent.parent.name
    task = "generation" if group.startswith("generation") else category.split("_")[0].lower()
    if task not in DREAMOMNI2_TASKS:
        raise UserError(
            f"{folder.parent}: the category {category} is none of {', '.join(DREAMOMNI2_TASKS)}"
        )
    references = [
        path
        for path in sorted(folder.iterdir(), key=in_order)
        if path.suffix.lower() in SUFFIXES
        and not files.is_hidden(path.name)
        and not ANSWER.search(path.stem)
    ]
    if not references:
        raise UserError(
            f"{folder} holds no reference picture; those named *res*, *target*, *output* or *gt* "
            f"are answers"
        )
    text = files.read_text(folder / "instruction.txt").strip()
    return Case(f"{category}-{folder.name}", task, text, "en", tuple(map(open_image, references)))


def in_order(path):
    """Sorts the pictures of a case: what is to be edited, then references, 2 before 10."""
    is_source = path.stem.lower().startswith(("src", "source"))
    return not is_source, files.by_number(path.stem)


def download(name):
    """A data set of Hugging Face as a folder, from the cache or the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.parquet", "*.txt", *(f"*{suffix}" for suffix in SUFFIXES)]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"benchmark not found: {name} is no folder here, and the Hugging Face hub does not "
            f"give it ({str(error).splitlines()[0]})"
        ) from None


# --------------------------------------------------------------------------------------------------
# pictures


def picture_path(folder, case):
    """Where the picture of a case goes."""
    return folder / "fullset" / case.task / f"{case.key}.png"


def is_painted(case, folder):
    """Whether the picture of a case is there and opens."""
    try:
        open_image(picture_path(folder, case))
    except (OSError, ValueError):
        return False
    return True


def paint_cases(engine, cases, config):
    """Paint one case at a time (memory), each on disk as soon as it is done."""
    shape = engine.model.config
    side = min(SIDE, shape.latent_side * shape.token_pixels)  # the largest that the model can paint
    for case in tqdm(cases, disable=None, desc="paint"):
        (result,) = engine.generate(
            [Request(case.references, case.instruction, (side // shape.token_pixels,) * 2)],
            sampler=config.sampler,
            thinking=config.thinking,
            batch=1,
            seeds=[(config.seed, int.from_bytes(case.key.encode()))],
        )
        save_result(picture_path(config.folder, case), result)


def save_result(path, result):
    """The picture at `path`, SIDE pixels each way, and beside it what the model wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = json.dumps(result.record(), ensure_ascii=False)
    files.write_text(path.with_suffix(".json"), about + "\n")
    tiny = max(result.image.size) <= 64  # of the toy world: its pixels stay squares
    filtered = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    with files.published(path) as hidden:
        result.image.resize((SIDE, SIDE), filtered).save(hidden, "PNG")


# --------------------------------------------------------------------------------------------------
# scores


def judge_cases(cases, config):
    """Scores of all pictures, kept line by line; returns them all, the ones of before included.

    A case without an answer is null and is asked again next time, unless the judge declined.
    """
    folder = config.folder / config.judge_model.replace("/", "_")
    judge = Endpoint(Access(config.judge_url, config.judge_model), folder / "replies")
    scored, failed = {}, []  # {(task, key): row}; why
    for task in {case.task for case in cases}:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for row in files.read_lines(folder / task / "score.jsonl", *SCORED):
            scored[task, row["key"]] = row
    left = [case for case in cases if (case.task, case.key) not in scored]
    patient = bool(scored)  # what failed in an earlier run may fail again
    ask = partial(judge_case, judge, config.folder)
    with tqdm(total=len(left), disable=None, desc="judge") as bar:
        for case, scores in in_parallel(ask, left, JUDGING, bar=bar, patient=patient):
            row = {  # with the official scorer's names
                "key": case.key,
                "task_type": case.task,
                "instruction": case.instruction,
                "instruction_language": case.language,
                "output_image_path": str(picture_path(config.folder, case)),
            }
            scored[case.task, case.key] = row
            if isinstance(scores, Fault):
                failed.append(str(scores))
                row |= dict.fromkeys(("PF_score", "SC_score"))
                row |= dict.fromkeys(("PF_score_reason", "SC_score_reason"), str(scores))
            else:
                row |= scores
            if not isinstance(scores, Fault) or isinstance(scores, Refused):
                files.append_line(folder / case.task / "score.jsonl", row)
    if failed:
        why = f"no score for {len(failed)} of {len(left)} pictures, most often: {commonest(failed)}"
        if len(failed) == len(scored):
            raise UserError(why)
        print(f"{why}; repeat the command to ask again")
    return [scored[case.task, case.key] for case in cases]


def judge_case(judge, folder, case):
    """The scores of a case, as its line has them; a Fault where the judge gives none."""
    pictures = [to_send(image) for image in case.references]
    pictures.append(to_png(open_image(picture_path(folder, case))))
    scores = {}
    for name in ("PF", "SC"):
        score, reason = ask_score(
            judge, name, case.instruction, pictures=pictures, scene="scene" in case.task
        )
        scores |= {f"{name}_score": score, f"{name}_score_reason": reason}
    return scores


# --------------------------------------------------------------------------------------------------
# the table


def statistics(rows, tasks, language="en"):
    """{task: {PF, SC, Overall, n, null}} and their mean under "average".

    rows: lines of score.jsonl. A sample without both scores is null and in no mean; `n` and `null`
    of the average are sums. A task without samples is left out.
    """
    table = {}
    for task in tasks:
        mine = [r for r in rows if (r["task_type"], r["instruction_language"]) == (task, language)]
        pairs = [(row["PF_score"], row["SC_score"]) for row in mine]
        scored = [pair for pair in pairs if None not in pair]
        if mine:
            table[task] = {
                "PF": mean([pf for pf, _ in scored]),
                "SC": mean([sc for _, sc in scored]),
                "Overall": mean([math.sqrt(pf * sc) for pf, sc in scored]),
                "n": len(scored),
                "null": len(mine) - len(scored),
            }
    per_task = list(table.values())
    average = {name: mean([row[name] for row in per_task]) for name in ("PF", "SC", "Overall")}
    counts = {name: sum(row[name] for row in per_task) for name in ("n", "null")}
    return table | {"average": average | counts}


def print_statistics(table, cases, config):
    """Our scores, task by task, and how many cases are not in them."""
    print(f"judge: {config.judge_model} at {config.judge_url}, {date.today()}")
    print(f"{'':24s}{'PF':>8s}{'SC':>8s}{'Overall':>9s}{'n':>6s}{'null':>6s}")
    for task, row in table.items():
        scores = f"{row['PF']:8.2f}{row['SC']:8.2f}{row['Overall']:9.2f}"
        print(f"{task:24s}{scores}{row['n']:6d}{row['null']:6d}")
    if missing := len(cases) - table["average"]["n"] - table["average"]["null"]:
        print(f"{missing} of {len(cases)} cases are of another language, not in these means")
    print("published numbers: docs/DATA.md; those of another judge are not comparable")
