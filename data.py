"""
Samples: on disk, as curate.py writes them and sft.py and grpo.py read them, and in order.

    tar shard   samples-000000.tar holds for each sample  KEY.json  KEY.ref_1.png ... KEY.ref_n.png  KEY.target.png
                (WebDataset's layout: any of its tools can read it)
    folder      records.jsonl, one record a line, with "references": [paths] and "target": path beside it
    record      {"key", "task", "instruction", "plan": {"out_caption", "relations"}, "scores": {}, "provenance": {}}

A source is a list that never ends: position p is sample order[p mod n] of epoch p // n. The order of an epoch permutes
the shards, and then the samples within stretches of `buffer` neighbours, so that a disk reads almost in sequence. It
depends on (seed, epoch) alone: a run is resumed at any sample, ranks and workers take positions, nothing is stored.

Left out: streaming from object stores (mount them), captions in other files, video.

    python data.py --show                     draws out/samples.png: references, target, instruction, IC-CoT, judgement
    python data.py --show PATH                the same for samples on disk
    python data.py --check PATH               every record: pictures open, relations match references, lengths
"""

import io
import json
import math
import os
import sys
import tarfile
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import iccot
from iccot import TASKS, Sample
from runtime.config import UserError, exit_on_user_error, parse, with_path
from toy.judge import judge
from toy.tasks import Drawn, check_request, draw_sample
from toy.world import SIZE
from vision import open_image

LONGEST = 2000  # characters of an instruction; longer ones are a mistake of whoever made them


class ShardWriter:
    """Writes samples into tar shards of `size` samples; a shard appears under its name when it is complete."""

    def __init__(self, folder, size=1000, prefix="samples"):
        self.folder, self.size, self.prefix = Path(folder), size, prefix
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tar, self.count, self.number = None, 0, 0

    def write(self, record, references, target):
        """record: as above, without pictures; references: PNG bytes of each; target: PNG bytes."""
        if self.tar is None:
            self.name = self.folder / f"{self.prefix}-{self.number:06d}.tar"
            self.tar = tarfile.open(self.name.with_suffix(".partial"), "w")
        files = {"json": json.dumps(record, ensure_ascii=False).encode()}
        files |= {f"ref_{i}.png": reference for i, reference in enumerate(references, 1)} | {
            "target.png": target
        }
        for suffix, content in files.items():
            entry = tarfile.TarInfo(f"{record['key']}.{suffix}")
            entry.size = len(content)
            self.tar.addfile(entry, io.BytesIO(content))
        self.count += 1
        if self.count == self.size:
            self.close()

    def close(self):
        """Publish the shard that is being written, if there is one."""
        if self.tar is not None:
            self.tar.close()
            os.replace(self.name.with_suffix(".partial"), self.name)
            self.tar, self.count, self.number = None, 0, self.number + 1

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.close()


# ---------------------------------------------------------------------------------------------------------------------
# reading


def index_of(shard):
    """[(key, {suffix: (offset, size)})] of a tar shard in order, from a scan of its headers."""
    entries = {}
    try:
        with tarfile.open(shard) as tar:
            for entry in tar:
                if entry.isfile():
                    key, _, suffix = Path(entry.name).name.partition(".")
                    entries.setdefault(str(Path(entry.name).with_name(key)), {})[suffix] = (
                        entry.offset_data,
                        entry.size,
                    )
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard} cannot be read as a tar file ({error}); copy it again or leave it out"
        ) from None
    return list(entries.items())


class Source(torch.utils.data.Dataset):
    """The samples at `path`: a tar shard, a folder of tar shards, or a folder with records.jsonl."""

    def __init__(self, path, seed=0, buffer=1000):
        self.path, self.seed, self.buffer = Path(path), seed, buffer
        lines = self.path / "records.jsonl"
        if self.path.suffix == ".tar" and self.path.is_file():
            self.parts = [self.path]
        elif lines.is_file():
            self.parts = [lines]
        elif self.path.is_dir() and list(self.path.glob("*.tar")):
            self.parts = sorted(self.path.glob("*.tar"))
        else:
            raise UserError(
                f"no samples at {path}: expected a .tar file, a folder of them, or a folder with records.jsonl"
            )
        self.entries = [(part, *entry) for part in self.parts for entry in self._index(part)]
        self.starts = [
            i
            for i, entry in enumerate(self.entries)
            if i == 0 or entry[0] != self.entries[i - 1][0]
        ]
        if not self.entries:
            raise UserError(f"{path} holds no samples")

    def _index(self, part):
        if part.suffix == ".tar":
            return index_of(part)
        return [
            (f"line {number}", line)
            for number, line in enumerate(part.read_text().splitlines(), 1)
            if line.strip()
        ]

    def __len__(self):
        return len(self.entries)

    @lru_cache(maxsize=2)
    def order(self, epoch):
        """(n,) the order of an epoch: shards permuted, then samples within stretches of `buffer`."""
        rng = np.random.default_rng((self.seed, epoch))
        parts = np.split(np.arange(len(self)), self.starts[1:])
        order = np.concatenate([parts[i] for i in rng.permutation(len(parts))])
        for start in range(0, len(order), self.buffer):
            rng.shuffle(order[start : start + self.buffer])
        return order

    def __getitem__(self, position):
        """The sample at a position of the endless list."""
        epoch, place = divmod(int(position), len(self))
        return self.sample(int(self.order(epoch)[place]))

    def sample(self, number):
        """Sample `number` in the order on disk. UserError names what is wrong with it."""
        part, key, content = self.entries[number]
        try:
            record, pictures = (
                self._tar_record(part, content)
                if part.suffix == ".tar"
                else self._line_record(part, content)
            )
            plan = iccot.from_json(json.dumps(record["plan"]), len(pictures) - 1)
            return Sample(
                str(record["key"]),
                str(record["task"]),
                tuple(pictures[:-1]),
                record["instruction"],
                plan,
                pictures[-1],
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{part}, sample {key}: {what}; python data.py --check {self.path} lists all that is wrong"
            ) from None

    def record(self, number):
        """The record of a sample, without its pictures."""
        part, _, content = self.entries[number]
        return self._json(part, content) if part.suffix == ".tar" else json.loads(content)

    def _json(self, part, files):
        return json.loads(self._read(part, files["json"]))

    def _read(self, part, place):
        with open(part, "rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def _tar_record(self, part, files):
        record, numbers = (
            self._json(part, files),
            sorted(int(name[4:].split(".")[0]) for name in files if name.startswith("ref_")),
        )
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"its references are numbered {numbers}")
        suffixes = [name for i in numbers for name in files if name.startswith(f"ref_{i}.")]
        suffixes += [name for name in files if name.startswith("target.")]
        if len(suffixes) != len(numbers) + 1:
            raise ValueError("it has no target picture, or several")
        return record, [
            open_image(io.BytesIO(self._read(part, files[name])), name) for name in suffixes
        ]

    def _line_record(self, part, line):
        record = json.loads(line)
        return record, [
            open_image(part.parent / path) for path in (*record["references"], record["target"])
        ]


def problems_of(source, number, context_length=77):
    """What is wrong with a sample, one sentence each; an empty list if nothing is."""
    from open_clip import SimpleTokenizer

    try:
        sample = source.sample(number)
    except UserError as error:
        return [str(error).split("; python data.py")[0]]
    where = f"{source.entries[number][0]}, sample {source.entries[number][1]}"
    found = []
    if not sample.references:
        found.append("it has no reference")
    if not sample.instruction.strip() or len(sample.instruction) > LONGEST:
        found.append(f"its instruction has {len(sample.instruction)} characters")
    for image, _ in iccot.image_numbers(sample.instruction):
        if not 1 <= image <= len(sample.references):
            found.append(
                f"its instruction names image {image}, it has {len(sample.references)} references"
            )
    tokens = len(SimpleTokenizer().encode(sample.plan.caption)) + 2
    if tokens > context_length:
        found.append(f"its caption has {tokens} CLIP tokens, CLIP reads {context_length}")
    return [f"{where}: {what}" for what in found]


def open_source(path, seed, max_references, scale=1):
    """The samples that --data names: "toy" draws them, anything else is a path."""
    return Drawn("train", seed, max_references, scale) if path == "toy" else Source(path, seed)


def stream(source, positions, workers=0):
    """The samples at these positions, in order; `workers` processes read ahead."""
    loader = torch.utils.data.DataLoader(
        source,
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        collate_fn=lambda sample: sample,
    )
    return iter(loader)


# ---------------------------------------------------------------------------------------------------------------------
# looking at it


@dataclass(frozen=True)
class Config:
    show: bool = False  # draw a sheet of samples
    check: bool = False  # read every sample at `path`, list what is wrong; then status 1
    path: str = ""  # samples on disk; "": the toy world (--show PATH)
    split: str = "train"  # train or held_out
    index: int = 0  # number of the first sample to look at
    count: int = 21  # samples to show, evenly of the seven tasks
    seed: int = 0  # of the samples
    max_references: int = 4  # most reference images of a sample, 2 to 9
    out: str = "out/samples.png"  # where the sheet goes

    def __post_init__(self):
        if self.count < 1 or self.index < 0 or self.seed < 0:
            raise ValueError(
                f"count={self.count}, index={self.index}, seed={self.seed}: "
                "count must be positive, index and seed not negative"
            )
        if Path(self.out).suffix.lower() != ".png":
            raise ValueError(
                f"out={self.out}: the sheet is a PNG file; give a name that ends in .png"
            )
        if self.check and not self.path:
            raise ValueError(
                "check needs samples on disk: --check PATH; those of the toy world are drawn and right"
            )
        check_request(self.split, self.max_references)


PRESETS = {"toy": {}}


def picture_sheet(samples: list[Sample], side: int = 128) -> Image.Image:
    """One row a sample: references, target, and in words task, judgement, instruction and IC-CoT."""
    cell = side + 8
    columns = max(len(sample.references) for sample in samples)
    sheet = Image.new("RGB", (cell * (columns + 1) + 640, cell * len(samples) + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, sample in enumerate(samples):
        top = 8 + row * cell
        for column, image in enumerate(sample.references):
            sheet.paste(fitted(image, side), (8 + column * cell, top))
        left = 8 + columns * cell
        pen.rectangle((left - 4, top - 4, left + cell - 5, top + cell - 5), fill=(40, 40, 40))
        sheet.paste(fitted(sample.target, side), (left, top))
        verdict = judge(sample.target, sample.truth) if sample.truth else None
        judged = (
            f"   (target: PF {verdict.pf:.1f}, SC {verdict.sc:.1f})"
            if verdict
            else f"   {sample.key}"
        )
        lines = [
            sample.task + judged,
            *textwrap.wrap(sample.instruction, 92),
            *textwrap.wrap("> " + sample.plan.caption, 92),
            *(f"> {i}: {relation}" for i, relation in enumerate(sample.plan.relations, 1)),
        ]
        for i, line in enumerate(lines[: side // 15]):
            colour = (
                (150, 150, 150) if i == 0 else (0, 90, 60) if line.startswith(">") else (0, 0, 0)
            )
            pen.text((left + cell + 8, top + 15 * i), line, fill=colour, font=font)
    return sheet


def fitted(image: Image.Image, side: int) -> Image.Image:
    """A toy picture enlarged four times, so that subjects keep their size beside scenes; any other fitted."""
    if max(image.size) <= SIZE:
        return image.resize(
            (image.width * side // SIZE, image.height * side // SIZE), Image.Resampling.NEAREST
        )
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _first_of_each_task(config: Config) -> list[Sample]:
    """`count` toy samples from `index` on, evenly of the seven tasks."""
    shown: dict[str, list[Sample]] = {task: [] for task in TASKS}
    index = config.index
    while sum(map(len, shown.values())) < config.count:
        sample = draw_sample(config.split, index, config.seed, config.max_references)
        if len(shown[sample.task]) < math.ceil(config.count / len(TASKS)):
            shown[sample.task].append(sample)
        index += 1
    return [sample for group in shown.values() for sample in group]


def _check_all(path: str) -> None:
    """Print what is wrong with the samples at `path`; exit status 1 if anything is."""
    from tqdm import tqdm

    source = Source(path)
    bar = tqdm(range(len(source)), disable=None, desc="check")
    problems = [problem for number in bar for problem in problems_of(source, number)]
    for problem in problems:
        print(problem)
    print(f"{path}: {len(source)} samples, {len(problems)} problems")
    if problems:
        sys.exit(1)


def arguments(argv: list[str]) -> list[str]:
    """`--show PATH` and `--check PATH` in the parser's words."""
    return with_path(argv, ("--show", "--check"), 0, "--path")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, arguments(sys.argv[1:] if argv is None else argv))
    if not config.show and not config.check:
        parse(Config, PRESETS, ["--help"])
    with exit_on_user_error():
        if config.check:
            _check_all(config.path)
        if config.show:
            if config.path:
                source = Source(config.path, config.seed)
                samples = [
                    source.sample(i)
                    for i in range(config.index, min(len(source), config.index + config.count))
                ]
                if not samples:
                    raise UserError(
                        f"--index={config.index}: {config.path} holds {len(source)} samples"
                    )
            else:
                samples = _first_of_each_task(config)
            out = Path(config.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            picture_sheet(samples).save(out)
            print(
                f"wrote {out}: {len(samples)} samples of {config.path or f'the {config.split} split'}"
            )


if __name__ == "__main__":
    main()
