"""
The benchmarks of the paper (section 7): pictures for OmniContext and DreamOmni2Bench, and a judge of their protocol.

    PF, SC    two questions to an MLLM for each picture, each 0 to 10: does it follow the instruction; are the subjects
              those of the references.  Overall = sqrt(PF * SC) a sample; a task is the mean of its samples, the
              benchmark the mean of its tasks (OmniContext's calculate_statistics.py)

Pictures go where the official scorer looks for them, so that the official scripts run on them unchanged:

    {result_dir}/{model_name}/fullset/{task_type}/{key}.png          1024 x 1024
    {result_dir}/{model_name}/{judge}/{task_type}/score.jsonl        a line a sample, with the official field names

Our judge differs from the official scorer where that one is at fault: it asks each question once (there: three times,
the last answer counts), and an answer that cannot be read is null and counted (there: a random number). Its prompts
say the same in other words: numbers are comparable with the published ones only in so far as judge and prompts are;
the table says which judge gave them. Pictures that are missing are counted, not skipped in silence. Left out: the
other metrics of DreamOmni2's own paper (success ratios by Gemini, Doubao and people).

    python evaluate.py --config full --bench omnicontext OmniGen2/OmniContext --checkpoint out/full-grpo --generate_only
"""

import io
import json
import math
import os
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import iccot
from engine import Sampler, make_prompt, paint, picture, think
from runtime import files, processes
from runtime.config import UserError
from studies.endpoint import Endpoint, Refused, in_parallel
from studies.judge import ask_score, for_judge
from vision import open_image

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
PUBLISHED = {  # Overall, as published; "-": not in the sources at hand
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


# ---------------------------------------------------------------------------------------------------------------------
# reading the benchmarks


def read_omnicontext(path):
    """Cases from a parquet file, a folder of them, or a data set on Hugging Face."""
    import pyarrow.parquet as parquet
    from pyarrow import ArrowInvalid

    folder = Path(path)
    if not folder.exists():
        folder = download(path)
    files = (
        [folder]
        if folder.is_file()
        else sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    )
    if not files:
        raise UserError(
            f"{folder} holds no parquet file; expected OmniContext's layout, data/train-*.parquet"
        )
    cases, wanted = [], ["key", "task_type", "instruction", "input_images"]
    for file in files:
        try:
            table = parquet.ParquetFile(file)
        except (ArrowInvalid, OSError) as error:
            raise UserError(
                f"{file} cannot be read as parquet ({str(error)[:100]}); copy it again"
            ) from None
        missing = [name for name in wanted if name not in table.schema_arrow.names]
        if missing:
            raise UserError(
                f"{file} has no column {', '.join(missing)}; expected {', '.join(wanted)}"
            )
        for batch in table.iter_batches(16):
            for row in batch.to_pylist():
                pictures = [
                    io.BytesIO(image["bytes"]) if image.get("bytes") else folder / image["path"]
                    for image in row["input_images"]
                ]
                cases.append(
                    Case(
                        str(row["key"]),
                        row["task_type"],
                        row["instruction"],
                        row.get("instruction_language") or "en",
                        tuple(
                            open_image(image, f"an input image of {row['key']}")
                            for image in pictures
                        ),
                        row.get("caption") or "",
                    )
                )
    return cases


def download(name):
    """A data set of Hugging Face as a folder, from the cache or the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(
                name,
                repo_type="dataset",
                allow_patterns=["*.parquet", "*.txt", "*.png", "*.jpg", "*.jpeg", "*.webp"],
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"benchmark not found: {name} is no folder here, and the Hugging Face hub does not give it "
            f"({str(error).splitlines()[0]})"
        ) from None


def read_dreamomni2(path):
    """Cases from DreamOmni2Bench's folders: {editing,generation}_benchmark/CATEGORY/NUMBER with instruction.txt."""
    folder = Path(path) if Path(path).exists() else download(path)
    found = sorted(folder.glob("*_benchmark/*/*/instruction.txt"))
    if not found:
        raise UserError(
            f"{folder} holds no */*/*/instruction.txt; expected DreamOmni2Bench's layout, "
            f"editing_benchmark/add/1/instruction.txt"
        )
    cases = []
    for text in found:
        category, group = text.parent.parent.name, text.parent.parent.parent.name
        task = "generation" if group.startswith("generation") else category.split("_")[0].lower()
        if task not in DREAMOMNI2_TASKS:
            raise UserError(
                f"{text.parent.parent}: the category {category} is none of {', '.join(DREAMOMNI2_TASKS)}"
            )
        names = [
            name
            for name in sorted(text.parent.iterdir())
            if name.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
        ]
        inputs = [
            name
            for name in names
            if not name.stem.lower().startswith(("res", "target", "output", "gt"))
        ]
        if not inputs:
            raise UserError(f"{text.parent} holds no reference picture")
        cases.append(
            Case(
                f"{category}-{text.parent.name}",
                task,
                text.read_text().strip(),
                "en",
                tuple(map(open_image, inputs)),
            )
        )
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def picture_path(config, case):
    return Path(config.result_dir) / config.model_name / "fullset" / case.task / f"{case.key}.png"


def is_whole(path):
    """Whether a picture is there and opens."""
    if not path.is_file():
        return False
    try:
        open_image(path)
    except ValueError:
        return False
    return True


@torch.no_grad()
def paint_cases(model, tokenizer, cases, config):
    """Paint what is missing, one case at a time, with its plan beside it; a killed run goes on where it was."""
    layout, side = model.config.layout(tokenizer), 1024
    largest = model.config.latent_side * model.config.token_pixels
    grid = (min(side, largest) // model.config.token_pixels,) * 2
    sampler = Sampler(
        config.num_timesteps,
        config.timestep_shift,
        config.text_guidance,
        config.image_guidance,
        (config.guidance_low, 1.0),
        config.renorm,
    )
    left = [case for case in cases if not is_whole(picture_path(config, case))]
    for case in tqdm(left, disable=None, desc="paint"):
        prompts, plan, text = (
            [make_prompt(model, tokenizer, case.references, case.instruction)],
            None,
            "",
        )
        if config.use_plan:
            generators = [
                processes.generator(config.seed, int.from_bytes(case.key.encode()[:6]), 1)
            ]
            (plan,), _ = think(model, layout, prompts, 1, config.max_plan_tokens, 0.0, generators)
            text = tokenizer.decode(plan)
        generators = [processes.generator(config.seed, int.from_bytes(case.key.encode()[:6]), 2)]
        image = picture(
            model, paint(model, layout, prompts, [[plan]], [grid], sampler, generators), grid
        )
        path = picture_path(config, case)
        path.parent.mkdir(parents=True, exist_ok=True)
        read, problems = iccot.salvage(text, len(case.references)) if text else (None, [])
        about = {
            "text": text,
            "plan": json.loads(iccot.to_json(read)) if read else None,
            "problems": problems,
        }
        files.write_text(path.with_suffix(".json"), json.dumps(about, ensure_ascii=False) + "\n")
        hidden = path.with_suffix(".tmp")
        image.resize(
            (side, side), Image.Resampling.NEAREST if largest <= 64 else Image.Resampling.LANCZOS
        ).save(hidden, "PNG")
        os.replace(hidden, path)
    print(
        f"{len(left)} pictures painted, {len(cases)} in {Path(config.result_dir) / config.model_name / 'fullset'}"
    )


def judge_cases(cases, config):
    """Scores of all pictures, kept line by line; returns them all, the ones of before included."""
    folder = Path(config.result_dir) / config.model_name / config.judge_model.replace("/", "_")
    judge = Endpoint(config.judge_url, config.judge_model, folder / "replies", config.key_variable)
    paths = {task: folder / task / "score.jsonl" for task in {case.task for case in cases}}
    done = {}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            lines = path.read_text().splitlines()
            done |= {(row["task_type"], row["key"]): row for row in map(json.loads, lines)}
    left = [
        case
        for case in cases
        if (case.task, case.key) not in done and is_whole(picture_path(config, case))
    ]
    with tqdm(total=len(left), disable=None, desc="judge") as bar:
        for case, row in in_parallel(
            partial(judge_case, judge, config), left, config.judge_workers, bar
        ):
            with open(paths[case.task], "a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            done[case.task, case.key] = row
    return [done[key] for case in cases if (key := (case.task, case.key)) in done]


def judge_case(judge, config, case):
    """One line of score.jsonl, with the official scorer's names."""
    from vision import to_png

    path = picture_path(config, case)
    pictures = [*map(for_judge, case.references), to_png(open_image(path))]
    row = {
        "key": case.key,
        "task_type": case.task,
        "instruction": case.instruction,
        "instruction_language": case.language,
        "output_image_path": str(path),
    }
    for name in ("PF", "SC"):
        try:
            row[f"{name}_score"], row[f"{name}_score_reason"] = ask_score(
                judge, name, case.instruction, pictures, "scene" in case.task
            )
        except Refused as error:
            row[f"{name}_score"], row[f"{name}_score_reason"] = None, f"refused: {error}"
    return row


# ---------------------------------------------------------------------------------------------------------------------
# the table


def statistics(rows, tasks, language="en"):
    """{task: {PF, SC, Overall, n, null}} and their mean under "average"; a sample without both scores is null."""
    table = {}
    for task in tasks:
        mine = [
            row
            for row in rows
            if row["task_type"] == task and row["instruction_language"] == language
        ]
        scored = [
            (row["PF_score"], row["SC_score"])
            for row in mine
            if row["PF_score"] is not None and row["SC_score"] is not None
        ]
        if mine:
            mean = lambda values: sum(values) / len(values) if values else math.nan
            table[task] = {
                "PF": mean([pf for pf, _ in scored]),
                "SC": mean([sc for _, sc in scored]),
                "Overall": mean([math.sqrt(pf * sc) for pf, sc in scored]),
                "n": len(scored),
                "null": len(mine) - len(scored),
            }
    if table:
        table["average"] = {
            name: sum(row[name] for row in table.values()) / len(table)
            for name in ("PF", "SC", "Overall")
        }
        table["average"] |= {
            name: sum(row[name] for row in table.values() if name in row) for name in ("n", "null")
        }
    return table


def print_statistics(table, cases, tasks, config):
    """Ours, task by task, and the published rows beside it."""
    print(f"judge: {config.judge_model} at {config.judge_url}, {date.today()}")
    print(f"{'':24s}{'PF':>8s}{'SC':>8s}{'Overall':>9s}{'n':>6s}{'null':>6s}")
    for task, row in table.items():
        print(
            f"{task:24s}{row['PF']:8.2f}{row['SC']:8.2f}{row['Overall']:9.2f}{row['n']:6d}{row['null']:6d}"
        )
    missing = len(cases) - sum(
        row["n"] + row["null"] for name, row in table.items() if name != "average"
    )
    if missing:
        print(
            f"{missing} of {len(cases)} cases have no picture or another language and are not in these means"
        )
    print(
        "\nOverall, published; given by GPT-4.1 with the official prompts: numbers of another judge are not comparable"
    )
    columns = [*tasks, "average"] if config.bench == "omnicontext" else list(tasks)
    print(
        f"{'':24s}"
        + "".join(
            f"{name.replace('character', 'char').replace('object', 'obj')[:13]:>15s}"
            for name in columns
        )
    )
    ours = {f"{config.model_name} (ours)": [table.get(name, {}).get("Overall") for name in columns]}
    for name, values in {**PUBLISHED[config.bench], **ours}.items():
        print(
            f"{name:24s}"
            + "".join(f"{'-' if value is None else f'{value:.2f}':>15s}" for value in values)
        )


def save_sheets(cases, config, rows=8, side=192):
    """A picture sheet a task: references and the result of its first cases."""
    for task in sorted({case.task for case in cases}):
        mine = [
            case for case in cases if case.task == task and is_whole(picture_path(config, case))
        ][:rows]
        if not mine:
            continue
        columns = max(len(case.references) for case in mine) + 1
        sheet = Image.new("RGB", (columns * (side + 6) + 6, len(mine) * (side + 6) + 6), "white")
        for row, case in enumerate(mine):
            pictures = [
                *case.references,
                *[None] * (columns - 1 - len(case.references)),
                open_image(picture_path(config, case)),
            ]
            for column, image in enumerate(pictures):
                if image is not None:
                    image = image.copy()
                    image.thumbnail((side, side))
                    sheet.paste(image, (6 + column * (side + 6), 6 + row * (side + 6)))
        sheet.save(Path(config.result_dir) / config.model_name / f"{task}.png")


def clip_out(cases, config, clip):
    """Mean 100 * cosine of pictures and true captions, over the cases that have one; None if there are none."""
    pairs = [
        (open_image(picture_path(config, case)), case.caption)
        for case in cases
        if case.caption and is_whole(picture_path(config, case))
    ]
    return float(clip.clip_out(*map(list, zip(*pairs))).mean()) if pairs else None


def bench(config, load_model, metric):
    """Paint, judge and tabulate. load_model() -> (model, tokenizer); metric() -> the CLIP of CLIP_out."""
    read, tasks = {
        "omnicontext": (read_omnicontext, OMNICONTEXT_TASKS),
        "dreamomni2": (read_dreamomni2, DREAMOMNI2_TASKS),
    }[config.bench]
    cases = read(config.bench_path)
    files.check_writable(Path(config.result_dir) / config.model_name)
    if any(not is_whole(picture_path(config, case)) for case in cases):
        paint_cases(*load_model(), cases, config)
    save_sheets(cases, config)
    if config.clip_out:
        score = clip_out(cases, config, metric())
        print(
            f"CLIP_out {score:.2f}"
            if score is not None
            else "CLIP_out: this benchmark has no ground-truth captions"
        )
    if config.generate_only:
        return {}
    table = statistics(judge_cases(cases, config), tasks)
    print_statistics(table, cases, tasks, config)
    files.write_text(
        Path(config.result_dir) / config.model_name / f"{config.bench}.json",
        json.dumps(table, indent=1) + "\n",
    )
    return table
