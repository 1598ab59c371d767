"""
The paper's benchmarks, OmniContext and DreamOmni2Bench: pictures, and a judge of their protocol.

    PF, SC     two questions to an MLLM for each picture, each 0 to 10: does it follow the
               instruction; are the subjects those of the references
    Overall    sqrt(PF * SC) of a sample; a task is the mean of its samples, the benchmark the mean
               of its tasks (OmniContext's calculate_statistics.py)

Pictures go where the official scorer looks for them, so that the official scripts run on them
unchanged, each with what the model wrote beside it:

    {result_dir}/{model_name}/fullset/{task_type}/{key}.png      1024 x 1024
    {result_dir}/{model_name}/fullset/{task_type}/{key}.json     the text, the plan, its problems
    {result_dir}/{model_name}/{judge}/{task_type}/score.jsonl    a line a sample, the official names

Our judge (judge.py) differs from the official scorer where that one is at fault: it asks each
question once (there: three times, the last answer counts), and an answer that cannot be read is
null and counted (there: a random number). Numbers are comparable with the published ones only in so
far as judge and prompts are; the table says which judge gave them. Pictures that are missing are
counted, not skipped in silence. A killed run goes on where it was: whole pictures are not painted
again, and scores are not asked for again.

Left out: the other metrics of DreamOmni2's own paper (success ratios by Gemini, Doubao and people).

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

import iccot
from engine import Request
from runtime import files
from runtime.config import UserError
from studies.endpoint import Access, Endpoint, Fault, Refused, commonest, in_parallel, to_send
from studies.judge import ask_score
from vision import open_image, to_png

SIDE = 1024  # pixels of a picture on disk

# the name of a true picture: "res", "0_result", "edit-res2", "imgres"; not "dress", "forest"
ANSWER = re.compile(r"(?i)(?<![a-z])(?:res|target|output|answer|gt(?![a-z]))|res(?![a-z])")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

SCORED = ("key", "task_type", "instruction_language", "PF_score", "SC_score")  # of a line of scores

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

# fmt: off
PUBLISHED = {  # Overall of the tasks in order, OmniContext's average last; None: not in our sources
    "omnicontext": {
        "BAGEL": (5.48, 7.03, 5.17, 6.64, 6.24, 4.07, 5.71, 5.47, 5.73),
        "OmniGen2": (8.05, 7.58, 7.11, 7.13, 7.45, 6.38, 6.71, 7.04, 7.18),
        "Qwen-Image-Edit-2509": (8.35, 9.13, 7.65, 8.85, 7.90, 5.16, 7.75, 6.73, 7.69),
        "GPT-4o": (8.90, 9.01, 9.07, 8.95, 8.54, 8.90, 8.44, 8.60, 8.80),
        "Re-Align (paper)": (8.25, None, 8.25, None, None, 8.21, None, None, 8.21),
    },
    "dreamomni2": {
        "OmniGen2": (7.52, 5.60, 6.88, 2.99, 4.99),
        "Echo-4o": (8.51, 4.51, 5.16, 2.41, 6.59),
        "DreamOmni2": (6.87, 7.05, 7.76, 5.44, 6.56),
        "Re-Align (paper)": (9.27, 8.61, 7.85, 6.35, 7.24),
    },
}
# fmt: on


@dataclass(frozen=True)
class Case:
    """One prompt of a benchmark. references: PIL pictures."""

    key: str
    task: str
    instruction: str
    language: str
    references: tuple
    caption: str = ""  # of the true picture, where the benchmark has one


# --------------------------------------------------------------------------------------------------
# the whole


def run_benchmark(config, load_engine, metric):
    """Paint, judge and tabulate. Returns `statistics`, or {} with config.generate_only.

    config: an evaluate.Config. load_engine() -> Engine and metric() -> the Clip of CLIP_out are
    called only where they are needed. UserError for benchmark data that are missing or torn.
    """
    read, tasks = {
        "omnicontext": (read_omnicontext, OMNICONTEXT_TASKS),
        "dreamomni2": (read_dreamomni2, DREAMOMNI2_TASKS),
    }[config.bench]
    cases, folder = read(config.bench_path), model_folder(config)
    files.check_writable(folder)
    check_settings(folder / "settings.json", config)
    if any(not is_whole(picture_path(config, case)) for case in cases):
        paint_missing(load_engine(), cases, config)
    save_sheets(cases, config)
    if config.clip_out:
        score = clip_out(cases, config, metric())
        words = "CLIP_out: this benchmark has no ground-truth captions"
        print(words if score is None else f"CLIP_out {score:.2f}")
    if config.generate_only:
        return {}
    table = statistics(judge_cases(cases, config), tasks)
    print_statistics(table, cases, config)
    print_published(table, tasks, config)
    files.write_text(folder / f"{config.bench}.json", files.to_json(table, indent=1) + "\n")
    return table


# what pictures depend on; a folder of pictures belongs to one of each
SETTINGS = (
    "checkpoint",
    "bench_path",
    "use_plan",
    "max_plan_tokens",
    "num_timesteps",
    "seed",
    "timestep_shift",
    "text_guidance",
    "image_guidance",
    "guidance_low",
    "renorm",
    "cache_interval",
)


def check_settings(path, config):
    """Record what the pictures depend on; UserError if those that are there were made otherwise.

    What a record lacks, from before there was such an option, stood at its default.
    """
    settings = {name: getattr(config, name) for name in SETTINGS}
    defaults = {name: getattr(type(config), name) for name in SETTINGS}
    before = defaults | files.read_json(path) if path.is_file() else settings
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"the pictures in {path.parent} were made with {name}={before.get(name)}, now "
                f"{name}={value}; choose another --model_name or --result_dir, or delete them"
            )
    files.write_text(path, json.dumps(settings, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------
# reading the benchmarks


def read_omnicontext(path):
    """Cases from a parquet file, a folder of them, or a data set on Hugging Face."""
    folder = Path(path)
    if not folder.exists():
        folder = download(path)
    found = sorted([*folder.glob("[!.]*.parquet"), *folder.glob("data/[!.]*.parquet")])
    if folder.is_file():
        found = [folder]
    if not found:
        raise UserError(
            f"{folder} holds no parquet file; expected OmniContext's layout, data/train-*.parquet"
        )
    base = folder.parent if folder.is_file() else folder
    return [omnicontext_case(row, base) for file in found for row in parquet_rows(file)]


def parquet_rows(path, columns=("key", "task_type", "instruction", "input_images")):
    """The rows of a parquet file, as dictionaries; UserError if it is torn or lacks a column."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            raise UserError(
                f"{path} has no column {', '.join(missing)}; expected {', '.join(columns)}"
            )
        for batch in table.iter_batches(16):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet ({str(error)[:100]}); copy it again"
        ) from None


def omnicontext_case(row, folder):
    """A Case from a row of OmniContext; its pictures are in the row, or files in `folder`.

    UserError for a row that is none, in any field.
    """
    key, images = row["key"], row["input_images"]
    key = str(key) if isinstance(key, int) else key
    files.check_name(key, "a key of the benchmark")
    images = images if isinstance(images, list) else [images]
    name = f"an input image of {key}"
    if row["task_type"] not in OMNICONTEXT_TASKS or not isinstance(row["instruction"], str):
        raise UserError(
            f"row {key} has the task {row['task_type']!r} and the instruction "
            f"{row['instruction']!r}; expected a text, and one of {', '.join(OMNICONTEXT_TASKS)}"
        )
    return Case(
        key=key,
        task=row["task_type"],
        instruction=row["instruction"],
        language=row.get("instruction_language") or "en",
        references=tuple(open_image(source_of(image, folder, name), name) for image in images),
        caption=row.get("caption") or "",
    )


def source_of(image, folder, name):
    """What to open for a picture: {bytes, path} as datasets writes it, bytes, or a path."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (bytes, bytearray)):
        return io.BytesIO(image)
    if isinstance(image, str) and image:
        return folder / image
    raise UserError(f"{name} is {image!r}; expected {{bytes, path}}, bytes of a picture or a path")


def read_dreamomni2(path):
    """Cases from DreamOmni2Bench's folders, or from that data set on Hugging Face.

    A case is a folder {editing,generation}_benchmark/CATEGORY/NUMBER: instruction.txt, references
    (the picture to edit first), and the true picture, which is left alone.
    """
    folder = Path(path) if Path(path).exists() else download(path)
    found = sorted(folder.glob("*_benchmark/*/*/instruction.txt"))
    if not found:
        raise UserError(
            f"{folder} holds no */*/*/instruction.txt; expected DreamOmni2Bench's layout, "
            f"editing_benchmark/add/1/instruction.txt"
        )
    return [dreamomni2_case(text.parent) for text in found]


def dreamomni2_case(folder):
    """A Case from its folder; UserError for an unknown category and for missing references."""
    category, group = folder.parent.name, folder.parent.parent.name
    task = "generation" if group.startswith("generation") else category.split("_")[0].lower()
    if task not in DREAMOMNI2_TASKS:
        raise UserError(
            f"{folder.parent}: the category {category} is none of {', '.join(DREAMOMNI2_TASKS)}"
        )
    pictures = [
        path
        for path in sorted(folder.iterdir(), key=in_order)
        if path.suffix.lower() in SUFFIXES and not files.is_hidden(path.name)
    ]
    references = [path for path in pictures if not ANSWER.search(path.stem)]
    if not references:
        raise UserError(
            f"{folder} holds no reference picture, of {len(pictures)}; those named "
            f"*res*, *target*, *output* or *gt* are answers"
        )
    return Case(
        key=f"{category}-{folder.name}",
        task=task,
        instruction=files.read_text(folder / "instruction.txt").strip(),
        language="en",
        references=tuple(map(open_image, references)),
    )


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


def model_folder(config):
    """Where the pictures and scores of this model go."""
    return Path(config.result_dir) / config.model_name


def picture_path(config, case):
    """Where the picture of a case goes."""
    return model_folder(config) / "fullset" / case.task / f"{case.key}.png"


def is_whole(path):
    """Whether a picture is there and opens."""
    if not path.is_file():
        return False
    try:
        open_image(path)
    except ValueError:
        return False
    return True


def painted(cases, config):
    """Those of the cases whose picture is there."""
    return [case for case in cases if is_whole(picture_path(config, case))]


def paint_missing(engine, cases, config):
    """Paint what is missing, one case at a time (memory), each on disk as soon as it is done."""
    model = engine.model.config
    side = min(SIDE, model.latent_side * model.token_pixels)  # the largest that the model can paint
    grid = (side // model.token_pixels,) * 2
    left = [case for case in cases if not is_whole(picture_path(config, case))]
    for case in tqdm(left, disable=None, desc="paint"):
        request = Request(case.references, case.instruction, grid)
        seed = (config.seed, int.from_bytes(case.key.encode()))
        (result,) = engine.generate(
            [request], sampler=config.sampler, thinking=config.thinking, batch=1, seeds=[seed]
        )
        save_result(picture_path(config, case), result)
    print(f"{len(left)} pictures painted, {len(cases)} in {model_folder(config) / 'fullset'}")


def save_result(path, result):
    """The picture at `path`, SIDE pixels each way, and beside it what the model wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = json.loads(iccot.to_json(result.plan)) if result.plan else None
    about = {"text": result.text, "plan": plan, "problems": result.problems}
    files.write_text(path.with_suffix(".json"), json.dumps(about, ensure_ascii=False) + "\n")
    tiny = max(result.image.size) <= 64  # of the toy world: its pixels stay squares
    how = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    with files.published(path) as hidden:
        result.image.resize((SIDE, SIDE), how).save(hidden, "PNG")


def save_sheets(cases, config, rows=8, *, side=192, pad=6):
    """A picture sheet a task: references and the result of its first cases."""
    cell = side + pad
    for task in sorted({case.task for case in cases}):
        shown = painted([case for case in cases if case.task == task], config)[:rows]
        if not shown:
            continue
        columns = max(len(case.references) for case in shown) + 1
        sheet = Image.new("RGB", (columns * cell + pad, len(shown) * cell + pad), "white")
        for row, case in enumerate(shown):
            pictures = dict(enumerate(case.references))
            pictures[columns - 1] = open_image(picture_path(config, case))
            for column, image in pictures.items():
                image = image.copy()
                image.thumbnail((side, side))
                sheet.paste(image, (pad + column * cell, pad + row * cell))
        with files.published(model_folder(config) / f"{task}.png") as hidden:
            sheet.save(hidden, "PNG")


# --------------------------------------------------------------------------------------------------
# scores


def clip_out(cases, config, clip):
    """Mean CLIP_out of pictures and true captions, over the cases that have one; None: none has."""
    known = painted([case for case in cases if case.caption], config)
    if not known:
        return None
    pictures = [open_image(picture_path(config, case)) for case in known]
    return float(clip.clip_out(pictures, [case.caption for case in known]).mean())


def judge_cases(cases, config):
    """Scores of all pictures, kept line by line; returns them all, the ones of before included.

    A case without an answer is null and is asked again next time, unless the judge declined.
    """
    folder = model_folder(config) / config.judge_model.replace("/", "_")
    access = Access(config.judge_url, config.judge_model, config.key_variable)
    judge = Endpoint(access, folder / "replies")
    paths = {task: folder / task / "score.jsonl" for task in {case.task for case in cases}}
    done = {}  # {(task, key): row}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        done |= {(row["task_type"], row["key"]): row for row in files.read_lines(path, *SCORED)}
    left = painted([case for case in cases if (case.task, case.key) not in done], config)
    ask, failed = partial(judge_case, judge, config), []
    how = dict(patient=bool(done))  # what failed in an earlier run may fail again
    with tqdm(total=len(left), disable=None, desc="judge") as bar:
        for case, scores in in_parallel(ask, left, config.judge_workers, bar=bar, **how):
            row = score_row(config, case, scores)
            done[case.task, case.key] = row
            if isinstance(scores, Fault):
                failed.append(str(scores))
            if not isinstance(scores, Fault) or isinstance(scores, Refused):
                files.append_line(paths[case.task], row)
    if failed:
        why = f"no score for {len(failed)} of {len(left)} pictures, most often: {commonest(failed)}"
        if len(failed) == len(done):
            raise UserError(why)
        print(f"{why}; repeat the command to ask again")
    return [done[key] for case in cases if (key := (case.task, case.key)) in done]


def judge_case(judge, config, case):
    """{"PF", "SC": (score, reasoning)}; a Fault where the judge gives none."""
    result = to_png(open_image(picture_path(config, case)))
    how = dict(pictures=[*map(to_send, case.references), result], scene="scene" in case.task)
    return {name: ask_score(judge, name, case.instruction, **how) for name in ("PF", "SC")}


def score_row(config, case, scores):
    """One line of score.jsonl, with the official scorer's names; null after a Fault."""
    row = {
        "key": case.key,
        "task_type": case.task,
        "instruction": case.instruction,
        "instruction_language": case.language,
        "output_image_path": str(picture_path(config, case)),
    }
    for name in ("PF", "SC"):
        score, reason = (None, str(scores)) if isinstance(scores, Fault) else scores[name]
        row |= {f"{name}_score": score, f"{name}_score_reason": reason}
    return row


# --------------------------------------------------------------------------------------------------
# the table


def statistics(rows, tasks, language="en"):
    """{task: {PF, SC, Overall, n, null}} and their mean under "average".

    rows: lines of score.jsonl. A sample without both scores is null and in no mean; `n` and `null`
    of the average are sums. A task without samples is left out.
    """
    table = {}
    for task in tasks:
        mine = [
            (row["PF_score"], row["SC_score"])
            for row in rows
            if row["task_type"] == task and row["instruction_language"] == language
        ]
        scored = [pair for pair in mine if None not in pair]
        if mine:
            table[task] = {
                "PF": _mean([pf for pf, _ in scored]),
                "SC": _mean([sc for _, sc in scored]),
                "Overall": _mean([math.sqrt(pf * sc) for pf, sc in scored]),
                "n": len(scored),
                "null": len(mine) - len(scored),
            }
    if table:
        found = list(table.values())
        table["average"] = {
            **{name: _mean([row[name] for row in found]) for name in ("PF", "SC", "Overall")},
            **{name: sum(row[name] for row in found) for name in ("n", "null")},
        }
    return table


def _mean(values):
    return sum(values) / len(values) if values else math.nan


def print_statistics(table, cases, config):
    """Our scores, task by task, and how many cases are not in them."""
    print(f"judge: {config.judge_model} at {config.judge_url}, {date.today()}")
    print(f"{'':24s}{'PF':>8s}{'SC':>8s}{'Overall':>9s}{'n':>6s}{'null':>6s}")
    for task, row in table.items():
        scores = f"{row['PF']:8.2f}{row['SC']:8.2f}{row['Overall']:9.2f}"
        print(f"{task:24s}{scores}{row['n']:6d}{row['null']:6d}")
    average = table.get("average", {"n": 0, "null": 0})
    missing = len(cases) - average["n"] - average["null"]
    if missing:
        print(
            f"{missing} of {len(cases)} cases have no picture or another language "
            "and are not in these means"
        )


def print_published(table, tasks, config):
    """The published rows, and ours below them."""
    print(
        "\nOverall, published; given by GPT-4.1 with the official prompts: "
        "numbers of another judge are not comparable"
    )
    columns = [*tasks, "average"] if config.bench == "omnicontext" else list(tasks)
    short = [name.replace("character", "char").replace("object", "obj")[:13] for name in columns]
    print(f"{'':24s}" + "".join(f"{name:>15s}" for name in short))
    ours = {f"{config.model_name} (ours)": [table.get(name, {}).get("Overall") for name in columns]}
    for name, values in {**PUBLISHED[config.bench], **ours}.items():
        cells = ("-" if value is None else f"{value:.2f}" for value in values)
        print(f"{name:24s}" + "".join(f"{cell:>15s}" for cell in cells))
