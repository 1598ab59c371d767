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

Our judge (judge.py) asks each question once (the official one: three times, the last answer
counts), and an answer that cannot be read is null and counted (there: a random number). Numbers are
comparable with the published ones only as far as judge and prompts are. A killed run goes on where
it was: whole pictures are not painted again, and scores are not asked for again.

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

from engine import Request
from runtime import files
from runtime.config import UserError
from studies.endpoint import Access, Endpoint, Fault, Refused, commonest, in_parallel, to_send
from studies.judge import ask_score
from studies.metrics import mean
from studies.pictures import save_path
from vision import open_image, to_png

SIDE = 1024  # pixels of a picture on disk
JUDGING = 16  # questions at a time
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SCORED = ("key", "task_type", "instruction_language", "PF_score", "SC_score")  # of a line of scores
COLUMNS = ("key", "task_type", "instruction", "input_images")  # of OmniContext's parquet

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


def run_benchmark(config, load_engine, load_clip):
    """Paint, judge and tabulate. Returns `statistics`, or {} with config.generate_only.

    config: an evaluate.Config. load_engine(config) -> Engine and load_clip(config) -> the Clip of
    CLIP_out are called only where they are needed. UserError for data that are missing or torn.
    """
    read, tasks = read_dreamomni2, DREAMOMNI2_TASKS
    if config.bench == "omnicontext":
        read, tasks = read_omnicontext, OMNICONTEXT_TASKS
    cases, folder = read(config.bench_path), config.folder
    files.check_writable(folder)
    check_settings(folder / "settings.json", config)
    left = [case for case in cases if not is_whole(picture_path(folder, case))]
    if left:
        paint_cases(load_engine(config), left, config)
    print(f"{len(left)} pictures painted, {len(cases)} in {folder / 'fullset'}")
    save_sheets(cases, folder)
    known = painted([case for case in cases if case.caption], folder)
    if known:
        pictures = [open_image(picture_path(folder, case)) for case in known]
        scores = load_clip(config).clip_out(pictures, [case.caption for case in known])
        print(f"CLIP_out {float(scores.mean()):.2f}")
    if config.generate_only:
        return {}
    table = statistics(judge_cases(cases, config), tasks)
    print_statistics(table, cases, config)
    print_published(table, tasks, config)
    files.write_text(folder / f"{config.bench}.json", files.to_json(table, indent=1) + "\n")
    return table


def check_settings(path, config):
    """Record what the pictures depend on; UserError if those that are there were made otherwise."""
    settings = {
        "checkpoint": config.checkpoint,
        "bench_path": config.bench_path,
        "use_plan": config.use_plan,
        "max_plan_tokens": config.max_plan_tokens,
        "num_timesteps": config.num_timesteps,
        "seed": config.seed,
        "timestep_shift": config.timestep_shift,
        "text_guidance": config.text_guidance,
        "image_guidance": config.image_guidance,
        "guidance_low": config.sampler.guidance_interval[0],
        "renorm": config.sampler.renorm,
        "cache_interval": config.cache_interval,
    }
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
    found = sorted([*folder.glob("[!.]*.parquet"), *folder.glob("data/[!.]*.parquet")])
    if folder.is_file():
        folder, found = folder.parent, [folder]
    if not found:
        raise UserError(
            f"{folder} holds no parquet file; expected OmniContext's layout, data/train-*.parquet"
        )
    cases = []
    for file in found:
        try:
            rows = parquet.read_table(file).to_pylist()
        except (ArrowException, OSError) as error:
            raise UserError(
                f"{file} cannot be read as parquet ({str(error)[:100]}); copy it again"
            ) from None
        cases += [omnicontext_case(row, folder) for row in rows]
    return cases


def omnicontext_case(row, folder):
    """A Case from a row of OmniContext; its pictures are in the row, or files in `folder`.

    UserError for a row that is none, in any field.
    """
    if missing := [name for name in COLUMNS if name not in row]:
        raise UserError(f"{folder}: a row has no {', '.join(missing)}; expected OmniContext's")
    key, images = row["key"], row["input_images"]
    key = str(key) if isinstance(key, int) else key
    files.check_name(key, "a key of the benchmark")
    if row["task_type"] not in OMNICONTEXT_TASKS or not isinstance(row["instruction"], str):
        raise UserError(
            f"row {key} has the task {row['task_type']!r} and the instruction "
            f"{row['instruction']!r}; expected a text, and one of {', '.join(OMNICONTEXT_TASKS)}"
        )
    references = []
    for image in images if isinstance(images, list) else [images]:
        if isinstance(image, dict):  # as the library datasets writes it
            image = image.get("bytes") or image.get("path")
        if not isinstance(image, (bytes, str)) or not image:
            raise UserError(f"an input image of {key} is {image!r}; expected a picture or a path")
        source = io.BytesIO(image) if isinstance(image, bytes) else folder / image
        references.append(open_image(source, f"an input image of {key}"))
    language, caption = row.get("instruction_language") or "en", row.get("caption") or ""
    return Case(key, row["task_type"], row["instruction"], language, tuple(references), caption)


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
    key, pictures = f"{category}-{folder.name}", tuple(map(open_image, references))
    return Case(key, task, text, "en", pictures)


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


def is_whole(path):
    """Whether a picture is there and opens."""
    try:
        open_image(path)
    except (OSError, ValueError):
        return False
    return True


def painted(cases, folder):
    """Those of the cases whose picture is there."""
    return [case for case in cases if is_whole(picture_path(folder, case))]


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


def save_sheets(cases, folder, most=8):
    """A picture sheet a task: result and references of its first cases."""
    for task in sorted({case.task for case in cases}):
        shown = painted([case for case in cases if case.task == task], folder)[:most]
        rows = {c.key: [open_image(picture_path(folder, c)), *c.references] for c in shown}
        if rows:
            references = range(1, max(map(len, rows.values())))
            titles = ["result", *(f"reference {i}" for i in references)]
            save_path(folder / f"{task}.png", titles, rows)


# --------------------------------------------------------------------------------------------------
# scores


def judge_cases(cases, config):
    """Scores of all pictures, kept line by line; returns them all, the ones of before included.

    A case without an answer is null and is asked again next time, unless the judge declined.
    """
    folder = config.folder / config.judge_model.replace("/", "_")
    judge = Endpoint(Access(config.judge_url, config.judge_model), folder / "replies")
    paths = {task: folder / task / "score.jsonl" for task in {case.task for case in cases}}
    scored = {}  # {(task, key): row}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        for row in files.read_lines(path, *SCORED):
            scored[row["task_type"], row["key"]] = row
    left = [case for case in cases if (case.task, case.key) not in scored]
    left, ask, failed = painted(left, config.folder), partial(judge_case, judge, config.folder), []
    patient = bool(scored)  # what failed in an earlier run may fail again
    with tqdm(total=len(left), disable=None, desc="judge") as bar:
        for case, scores in in_parallel(ask, left, JUDGING, bar=bar, patient=patient):
            row = score_row(config.folder, case, scores)
            scored[case.task, case.key] = row
            if isinstance(scores, Fault):
                failed.append(str(scores))
            if not isinstance(scores, Fault) or isinstance(scores, Refused):
                files.append_line(paths[case.task], row)
    if failed:
        why = f"no score for {len(failed)} of {len(left)} pictures, most often: {commonest(failed)}"
        if len(failed) == len(scored):
            raise UserError(why)
        print(f"{why}; repeat the command to ask again")
    return [scored[key] for case in cases if (key := (case.task, case.key)) in scored]


def judge_case(judge, folder, case):
    """{"PF", "SC": (score, reasoning)}; a Fault where the judge gives none."""
    pictures = [to_send(image) for image in case.references]
    pictures.append(to_png(open_image(picture_path(folder, case))))
    scene, ask = "scene" in case.task, partial(ask_score, judge)
    return {c: ask(c, case.instruction, pictures=pictures, scene=scene) for c in ("PF", "SC")}


def score_row(folder, case, scores):
    """One line of score.jsonl, with the official scorer's names; null after a Fault."""
    row = {
        "key": case.key,
        "task_type": case.task,
        "instruction": case.instruction,
        "instruction_language": case.language,
        "output_image_path": str(picture_path(folder, case)),
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
    if table:
        tasks = list(table.values())
        average = {name: mean([row[name] for row in tasks]) for name in ("PF", "SC", "Overall")}
        table["average"] = average | {n: sum(row[n] for row in tasks) for n in ("n", "null")}
    return table


def print_statistics(table, cases, config):
    """Our scores, task by task, and how many cases are not in them."""
    print(f"judge: {config.judge_model} at {config.judge_url}, {date.today()}")
    print(f"{'':24s}{'PF':>8s}{'SC':>8s}{'Overall':>9s}{'n':>6s}{'null':>6s}")
    for task, row in table.items():
        scores = f"{row['PF']:8.2f}{row['SC']:8.2f}{row['Overall']:9.2f}"
        print(f"{task:24s}{scores}{row['n']:6d}{row['null']:6d}")
    average = table.get("average", {"n": 0, "null": 0})
    if missing := len(cases) - average["n"] - average["null"]:
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
    ours = [table.get(name, {}).get("Overall") for name in columns]
    for name, values in {**PUBLISHED[config.bench], f"{config.folder.name} (ours)": ours}.items():
        cells = ("-" if value is None else f"{value:.2f}" for value in values)
        print(f"{name:24s}" + "".join(f"{cell:>15s}" for cell in cells))
