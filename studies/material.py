"""
What curate.py begins with: pictures of pools, or samples of somebody else.

    pools      characters/ objects/ scenes/, folders of pictures, searched in depth. Tasks come in
               the proportions of Re-Align-410K (iccot.TASKS), and each draws its references: a
               scene to edit and a subject to add, subjects and the scene where they meet, ...
    triples    (references, instruction, target), everything but the IC-CoT: pictures are kept, and
               only plans and scores are asked for

A sample is named by a hash of what it is made of; the same pools or triples and the same seed give
the same samples. Triples are read, under any of the names in FIELDS, from

    FILE.json, FILE.jsonl     an object, a list of them, or one a line; paths of pictures are meant
                              from the file's folder, or from the nearest folder above it that fits
    FOLDER                    all such files in it, in depth; and folders that hold instruction.txt
                              (or prompt.txt), a picture called target or output, and references
    MACRO (arXiv 2603.25319)  data/filter/TASK/train/{1-3,4-5,6-7,>=8}/*.json, whose paths begin
                              with data/: give --from the folder that holds data/

Folders called eval are left out: they are benchmarks, MACRO's too. "<image 2>" becomes "image 2",
as everywhere else. Left out: near duplicates in a pool, parquet and tar files, several targets.

    draw_references(pools_of("pictures"), count=1000, most=4, seed=0)
    read_triples("Macro", count=1000, most=10)
"""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import LONGEST, hash_of
from iccot import TASKS
from runtime import files
from runtime.config import UserError

POOLS = ("characters", "objects", "scenes")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

FIELDS = {
    "references": ("references", "input_images", "reference_images"),
    "instruction": ("instruction", "prompt"),
    "target": ("target", "output_image", "target_image"),
}
TASK = "composition"  # of a sample that names none
MARK = re.compile(r"<\s*image[ _]?(\d{1,2})\s*>", re.IGNORECASE)


def key_of(task, content):
    """The name of a sample: its task and a hash of what it is made of, as JSON."""
    return f"{task}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


# --------------------------------------------------------------------------------------------------
# pools


def pools_of(folder):
    """{kind: [paths relative to `folder`]}; UserError for a pool that is missing or empty."""
    pools = {}
    for kind in POOLS:
        paths = (Path(folder) / kind).rglob("*")
        paths = [str(path.relative_to(folder)) for path in paths if is_picture(path)]
        if not folder or not paths:
            raise UserError(
                f"the pool {Path(folder) / kind} is missing or holds no {', '.join(SUFFIXES)} "
                "picture; --pools must hold characters/, objects/ and scenes/"
            )
        pools[kind] = sorted(paths)
    return pools


def is_picture(path):
    """Whether the name of a file is that of a picture."""
    return path.suffix.lower() in SUFFIXES and not files.is_hidden(path.name)


def draw_references(pools, count, most, *, seed):
    """{key: {"key", "task", "references"}} of `count` different samples, from one generator.

    pools: of `pools_of`, which "references" are paths of; most: references of one sample.
    UserError where the pools have too few pictures.
    """
    records, rng = {}, np.random.default_rng(seed)
    shares = np.array(list(TASKS.values())) / sum(TASKS.values())
    for _ in range(50 * count):
        task = str(rng.choice(list(TASKS), p=shares))
        references = references_for(task, pools, most, rng)
        if len(set(references)) == len(references):
            key = key_of(task, json.dumps([task, references]))
            records.setdefault(key, {"key": key, "task": task, "references": references})
        if len(records) == count:
            return records
    raise UserError(
        f"the pools have too few pictures for {count} different samples; use --count={len(records)}"
    )


def references_for(task, pools, most, rng):
    """The references of a sample of this task, in order, `most` of them at the most."""

    def picture(kind):
        return pools[kind][int(rng.integers(len(pools[kind])))]

    def subject():
        return picture("characters" if rng.random() < 0.5 else "objects")

    if task in ("add", "replace"):
        return [picture("scenes"), subject()]
    if task == "attribute":
        return [picture("objects"), picture("objects")]
    if task == "scene":
        return [subject(), picture("scenes")]
    if task == "subject":
        return [subject()]
    if task == "subject_composition":
        return [subject() for _ in range(int(rng.integers(2, most + 1)))]
    return [*(subject() for _ in range(int(rng.integers(1, most)))), picture("scenes")]


# --------------------------------------------------------------------------------------------------
# triples


def folder_of(path):
    """The folder that the paths in the records are meant from."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def read_triples(path, count, most):
    """{key: {"key", "task", "references", "instruction", "target"}} of at most `count` samples.

    Of more samples those with the lowest hash. references: paths from `folder_of(path)`; target: an
    absolute path. most: references of one sample. One that cannot be used has "dropped" in their
    place. UserError where there is none.
    """
    path, samples = Path(path), {}
    if not path.exists():
        raise UserError(f"--from {path}: there is no such file or folder")
    for folder, sample in find_samples(path):
        content = json.dumps([os.path.relpath(folder, folder_of(path)), sample], sort_keys=True)
        task = re.sub(r"\W+", "_", str(sample.get("task") or TASK)).strip("_").lower()
        samples.setdefault(key_of(task, content), (task, folder, sample))
    if not samples:
        names = "; ".join(" or ".join(names) for names in FIELDS.values())
        raise UserError(
            f"--from {path} holds no samples; expected JSON with the fields {names}, or folders "
            "with instruction.txt, reference pictures and a target picture"
        )
    records, root = {}, folder_of(path).resolve()
    for key in sorted(samples, key=lambda key: hash_of(key, "triples"))[:count]:
        task, folder, sample = samples[key]
        try:
            fields = checked(sample, folder, root, most)
        except ValueError as error:
            fields = {"references": [], "dropped": str(error)}
        records[key] = {"key": key, "task": task, **fields}
    why = Counter(record["dropped"] for record in records.values() if "dropped" in record)
    if why.total() == len(records):
        raise UserError(
            f"--from {path}: none of {len(records)} samples can be used, most often: "
            f"{why.most_common(1)[0][0]}"
        )
    print(f"{path}: {len(samples)} samples, {len(records)} taken, {why.total()} of them dropped")
    return records


def find_samples(path):
    """(folder that paths are meant from, {field: value} as found) of all samples at `path`."""
    if path.is_file():
        yield from samples_of_file(path)
        return
    # of MACRO its index alone is searched, not its pictures
    index = path / "data/filter" if (path / "data/filter").is_dir() else path
    for file in tqdm(sorted(index.rglob("*")), disable=None, desc="read", leave=False):
        inside = file.relative_to(index)
        if "eval" in inside.parts[:-1] or files.is_hidden(inside):
            continue
        if file.suffix in (".json", ".jsonl"):
            yield from samples_of_file(file)
        elif file.name in ("instruction.txt", "prompt.txt"):
            yield file.parent, sample_of_folder(file)


def samples_of_file(file):
    """The samples of a JSON file: objects with an instruction and another field of FIELDS."""
    content = file.read_bytes()
    for text in content.split(b"\n") if file.suffix == ".jsonl" else [content]:
        if not text.strip():
            continue
        try:
            value = json.loads(text.decode("utf-8-sig"))
        except ValueError as error:
            yield file.parent, {"broken": f"no JSON: {file.name}, {error}"}
            continue
        items = value if isinstance(value, list) else [value]
        for item in (item for item in items if isinstance(item, dict)):
            sample = {}
            for field, names in FIELDS.items():
                values = [item[name] for name in names if name in item]
                if values:
                    sample[field] = values[0]
            if "instruction" in sample and len(sample) > 1:
                yield file.parent, sample | {"task": item.get("task")}


def sample_of_folder(file):
    """The sample of a folder: its text, its pictures by their numbers, one of them the target."""
    try:
        words = files.read_text(file)
    except UserError as error:
        return {"broken": str(error)}
    names = [path.name for path in file.parent.iterdir() if is_picture(path)]
    targets = [name for name in names if re.search("target|output", Path(name).stem.lower())]
    references = [name for name in names if name not in targets]
    return {
        "references": sorted(references, key=lambda name: files.by_number(Path(name).stem)),
        "instruction": words,
        "target": targets[0] if len(targets) == 1 else None,
    }


def checked(sample, folder, root, most):
    """The three fields of a record; ValueError says what is wrong with them."""
    if "broken" in sample:
        raise ValueError(sample["broken"])
    words, target, names = sample["instruction"], sample.get("target"), sample.get("references")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"no list of references: {names!r}")
    if not isinstance(words, str) or not 0 < len(words.strip()) <= LONGEST:
        raise ValueError(f"no instruction of 1 to {LONGEST} characters: {str(words)[:80]!r}")
    if not isinstance(target, str):
        raise ValueError(f"no target picture, or several: {target!r}")
    if not 1 <= len(names) <= most:
        raise ValueError(f"not 1 to --max_references={most} references: it has {len(names)}")
    *references, target = [find_picture(name, folder.resolve()) for name in [*names, target]]
    if target in references:
        raise ValueError(f"the target is one of the references: {target.name}")
    return {
        "references": [os.path.relpath(path, root) for path in references],
        "instruction": " ".join(MARK.sub(r"image \1", words).split()),
        "target": str(target),
    }


def find_picture(name, folder):
    """The path of a picture that a file in this folder names."""
    for place in (folder, *folder.parents):
        if (place / name).is_file():
            return place / name
    raise ValueError(f"a picture is missing: {name}")
