"""
Data that exists: samples of somebody else, which have everything but the IC-CoT.

    (references, instruction, target)    ->    a record of curate.py, which asks for the plan alone

So Re-Align data costs text: pictures are kept. What is read, under any of the names in FIELDS:

    FILE.json, FILE.jsonl     an object, a list of them, or one a line; paths of pictures are meant
                              from the file's folder, or from the nearest folder above it that fits
    FOLDER                    all such files in it, in depth; and folders that hold instruction.txt
                              (or prompt.txt), a picture called target or output, and references,
                              which are the other pictures in the order of their numbers
    MACRO (arXiv 2603.25319)  data/filter/TASK/train/{1-3,4-5,6-7,>=8}/*.json, of one sample each
                              {"task", "idx", "prompt", "input_images", "output_image"}, whose paths
                              begin with data/: give --from the folder that holds data/, or data/,
                              or any folder in data/filter. Only the index is searched, not data/raw

Folders called eval are left out: they are benchmarks, MACRO's too. "<image 2>" becomes "image 2",
as everywhere else. A sample that cannot be used is dropped with its reason, and counted. Of more
samples than are asked for those with the lowest hash are taken: the same ones next time, and a
mixture of all tasks. Left out: parquet and tar files, pictures inside of JSON, several targets.

    records = read_triples("Macro", count=1000, most=10)
"""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import iccot
from data import LONGEST, hash_of
from runtime import files
from runtime.config import UserError
from studies.pools import SUFFIXES

FIELDS = {
    "references": ("references", "input_images", "reference_images"),
    "instruction": ("instruction", "prompt"),
    "target": ("target", "output_image", "target_image"),
}
TASK = "composition"  # of a sample that names none

MARK = re.compile(r"<\s*image[ _]?(\d{1,2})\s*>", re.IGNORECASE)


def folder_of(path):
    """The folder that the paths in the records are meant from."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def read_triples(path, count, most):
    """{key: {"key", "task", "references", "instruction", "target"}} of at most `count` samples.

    references: paths from `folder_of(path)`; target: an absolute path. most: references of one
    sample. One that cannot be used has "dropped" in their place. UserError where there is none.
    """
    path, found = Path(path), {}
    if not path.exists():
        raise UserError(f"--from {path}: there is no such file or folder")
    for where, sample in _samples(path):
        content = json.dumps([os.path.relpath(where, folder_of(path)), sample], sort_keys=True)
        task = re.sub(r"\W+", "_", str(sample.get("task") or TASK)).strip("_").lower()
        key = f"{task}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        found.setdefault(key, (task, where, sample))
    if not found:
        names = "; ".join(" or ".join(names) for names in FIELDS.values())
        raise UserError(
            f"--from {path} holds no samples; expected JSON with the fields {names}, or folders "
            "with instruction.txt, reference pictures and a target picture"
        )
    chosen = sorted(found, key=lambda key: hash_of(key, "triples"))[:count]
    how = dict(root=folder_of(path).resolve(), most=most)
    records = {key: _record(key, found[key], **how) for key in chosen}
    why = Counter(record["dropped"] for record in records.values() if "dropped" in record)
    if why.total() == len(records):
        raise UserError(
            f"--from {path}: none of {len(records)} samples can be used, most often: "
            f"{why.most_common(1)[0][0]}"
        )
    print(f"{path}: {len(found)} samples, {len(records)} taken, {why.total()} of them dropped")
    return records


# --------------------------------------------------------------------------------------------------
# finding samples


def _samples(path):
    """(folder that paths are meant from, {field: value} as found) of all samples at `path`."""
    if path.is_file():
        yield from _of_file(path)
        return
    index = next((one for one in (path / "data/filter", path / "filter") if one.is_dir()), path)
    wanted = (".json", ".jsonl", "instruction.txt", "prompt.txt")
    for file in tqdm(sorted(index.rglob("*")), disable=None, desc="read", leave=False):
        inside = file.relative_to(index)
        of_a_benchmark = "eval" in inside.parts[:-1]
        if of_a_benchmark or files.is_hidden(inside) or not file.name.endswith(wanted):
            continue
        yield from _of_folder(file) if file.suffix == ".txt" else _of_file(file)


def _of_file(file):
    """The samples of a JSON file; what has none of a sample's fields is left out."""
    whole = file.read_bytes()
    for text in whole.split(b"\n") if file.suffix == ".jsonl" else [whole]:
        if not text.strip():
            continue
        try:
            found = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield file.parent, {"broken": f"{file.name}, {error}"}
            continue
        for one in found if isinstance(found, list) else [found]:
            if isinstance(one, dict):
                yield from _of_object(one, file.parent)


def _of_object(one, folder):
    """The sample that an object is, if it has an instruction and another field of FIELDS."""
    names = {field: next((name for name in FIELDS[field] if name in one), "") for field in FIELDS}
    sample = {field: one[name] for field, name in names.items() if name}
    if "instruction" in sample and len(sample) > 1:
        yield folder, sample | {"task": one.get("task")}


def _of_folder(file):
    """The sample of a folder with a text and pictures; none where there are no pictures."""
    pictures = [one for one in file.parent.iterdir() if one.suffix.lower() in SUFFIXES]
    pictures = [one for one in pictures if not files.is_hidden(one.name)]
    pictures.sort(key=lambda one: files.by_number(one.stem))
    targets = [one.name for one in pictures if re.search("target|output", one.stem, re.IGNORECASE)]
    if pictures:
        yield (
            file.parent,
            {
                "references": [one.name for one in pictures if one.name not in targets],
                "instruction": file.read_text(encoding="utf-8-sig", errors="replace"),
                "target": targets[0] if len(targets) == 1 else None,
            },
        )


# --------------------------------------------------------------------------------------------------
# one sample


def _record(key, found, *, root, most):
    """The record of a sample; with "dropped" if it cannot be used."""
    task, where, sample = found
    record = {"key": key, "task": task}
    try:
        return record | _checked(sample, where, root=root, most=most)
    except ValueError as error:
        return record | {"references": [], "dropped": str(error)}


def _checked(sample, where, *, root, most):
    """The three fields of a record; ValueError says what is wrong with them."""
    if "broken" in sample:
        raise ValueError(f"no JSON: {sample['broken']}")
    words, target = sample["instruction"], sample.get("target")
    names = sample.get("references")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"no list of references: {names!r}")
    if not isinstance(words, str) or not words.strip():
        raise ValueError(f"no instruction: {words!r}")
    if not isinstance(target, str):
        raise ValueError(f"no target picture, or several: {target!r}")
    if not 1 <= len(names) <= most:
        raise ValueError(f"not 1 to --max_references={most} references: it has {len(names)}")
    instruction = " ".join(MARK.sub(r"image \1", words).split())
    if len(instruction) > LONGEST:
        raise ValueError(f"too long an instruction: {len(instruction)} characters")
    try:
        iccot.check_instruction(instruction, len(names))
    except ValueError as error:
        raise ValueError(f"an image that is not given: {error}") from None
    references, target = [_found(name, where) for name in names], _found(target, where)
    if target in references:
        raise ValueError(f"the target is one of the references: {target.name}")
    return {
        "references": [os.path.relpath(one, root) for one in references],
        "instruction": instruction,
        "target": str(target),
    }


def _found(name, where):
    """The path of a picture that a file in the folder `where` names."""
    for folder in (where.resolve(), *where.resolve().parents):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"a picture is missing: {name}")
