"""
Samples: what one is, how it lies on disk, and in which order samples are read. One of them:

    {"key": "scene-80a6ba8df6a26127", "task": "scene",
     "instruction": "Draw a yellow ball (image 1) at the bottom left, in the scene of image 2.",
     "plan": {"out_caption": "A desert with a yellow ball at the bottom left.",
              "relations": [{"relation_1": "The ball is from image_1."},
                            {"relation_2": "The scene is consistent with image_2."}]},
     "scores": {"clip": 0.08366, "PF": 10.0, "SC": 10.0},
     "provenance": {"references": ["objects/005.png", "scenes/000.png"], "chat_model": "toy",
                    "image_model": "toy", "judge_model": "toy"}}

    scene-80a6ba8df6a26127.json    .ref_1.png    .ref_2.png    .target.png      one name, four files

That is the record and its pictures; scores and provenance are free. curate.py writes it, sft.py and
grpo.py read it.

    tar shard   samples-000000.tar holds the files of its samples one after the other
                (WebDataset's layout: any of its tools can read it)
    folder      records.jsonl, one record a line, with "references": [paths] and "target": path

A source is a list that never ends: position p is sample order[p mod n] of epoch p // n. The order
of an epoch permutes the shards, and then the samples within stretches of `buffer` neighbours, so
that a disk reads almost in sequence. It depends on (seed, epoch) alone: a run is resumed at any
sample, ranks and workers take positions, nothing is stored.

Left out: streaming from object stores (mount them), captions in other files, video.

    python data.py --show              draws out/samples.png: pictures, instruction, plan, judgement
    python data.py --show PATH         the same for samples on disk
    python data.py --check PATH        every record: pictures, relations, references, lengths
"""

import io
import json
import math
import sys
import tarfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from open_clip import SimpleTokenizer
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import iccot
from iccot import TASKS, Sample
from runtime import files
from runtime.config import UserError, exit_on_user_error, parse, with_path
from toy.judge import judge
from toy.tasks import Drawn, check_request, draw_sample
from toy.world import SIZE
from vision import open_image

LONGEST = 2000  # characters of an instruction; longer ones are a mistake of whoever made them


class ShardWriter:
    """Writes samples into tar shards of `size`; one appears under its name when it is complete."""

    def __init__(self, folder, size: int = 1000, prefix: str = "samples"):
        self.folder, self.size, self.prefix = Path(folder), size, prefix
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tar, self.count, self.number = None, 0, 0

    @property
    def path(self) -> Path:
        """Where the present shard will be."""
        return self.folder / f"{self.prefix}-{self.number:06d}.tar"

    def write(self, record: dict, references: list[bytes], target: bytes) -> None:
        """record: as above, without pictures; references: PNG bytes of each; target: PNG bytes."""
        if self.tar is None:
            self.tar = tarfile.open(files.hidden_path(self.path), "w")
        contents = {"json": json.dumps(record, ensure_ascii=False).encode()}
        contents |= {f"ref_{i}.png": reference for i, reference in enumerate(references, 1)}
        contents |= {"target.png": target}
        for suffix, content in contents.items():
            entry = tarfile.TarInfo(f"{record['key']}.{suffix}")
            entry.size = len(content)
            self.tar.addfile(entry, io.BytesIO(content))
        self.count += 1
        if self.count == self.size:
            self.close()

    def close(self) -> None:
        """Publish the shard that is being written, if there is one."""
        if self.tar is not None:
            self.tar.close()
            files.publish(files.hidden_path(self.path), self.path)
            self.tar, self.count, self.number = None, 0, self.number + 1

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        self.close()


# --------------------------------------------------------------------------------------------------
# reading


def index_of(shard) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """[(key, {suffix: (offset, size)})] of a tar shard in order, from a scan of its headers."""
    entries = {}
    try:
        with tarfile.open(shard) as tar:
            for entry in tar:
                if entry.isfile():
                    name, _, suffix = Path(entry.name).name.partition(".")
                    key = str(Path(entry.name).with_name(name))
                    entries.setdefault(key, {})[suffix] = (entry.offset_data, entry.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard} cannot be read as a tar file ({error}); copy it again or leave it out"
        ) from None
    return list(entries.items())


def lines_of(part: Path) -> list[tuple[str, str]]:
    """[("line NUMBER", line)] of a records.jsonl, without empty ones."""
    lines = enumerate(part.read_text().splitlines(), 1)
    return [(f"line {number}", line) for number, line in lines if line.strip()]


class Source(torch.utils.data.Dataset):
    """The samples at `path`: a tar shard, a folder of tar shards, or one with records.jsonl."""

    def __init__(self, path, seed: int = 0, buffer: int = 1000):
        """UserError: there are none."""
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
                f"no samples at {path}: expected a .tar file, a folder of them, "
                "or a folder with records.jsonl"
            )
        self.entries = []  # (part, key, where its files are or its line)
        self.starts = []  # number of the first sample of each part
        for part in self.parts:
            found = index_of(part) if part.suffix == ".tar" else lines_of(part)
            self.starts += [len(self.entries)] if found else []
            self.entries += [(part, *entry) for entry in found]
        if not self.entries:
            raise UserError(f"{path} holds no samples")
        self.orders = {}  # of the last two epochs that were asked for

    def __len__(self) -> int:
        return len(self.entries)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the order of an epoch: shards permuted, then samples within stretches of buffer."""
        if epoch not in self.orders:
            if len(self.orders) == 2:
                del self.orders[next(iter(self.orders))]
            self.orders[epoch] = self._shuffled(epoch)
        return self.orders[epoch]

    def _shuffled(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        parts = np.split(np.arange(len(self)), self.starts[1:])
        order = np.concatenate([parts[i] for i in rng.permutation(len(parts))])
        for start in range(0, len(order), self.buffer):
            rng.shuffle(order[start : start + self.buffer])
        return order

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position of the endless list."""
        epoch, place = divmod(int(position), len(self))
        return self.sample(int(self.order(epoch)[place]))

    def sample(self, number: int) -> Sample:
        """Sample `number` in the order on disk. UserError names what is wrong with it."""
        part, key, content = self.entries[number]
        read = self._tar_record if part.suffix == ".tar" else self._line_record
        try:
            record, pictures = read(part, content)
            plan = iccot.from_json(json.dumps(record["plan"]), len(pictures) - 1)
            return Sample(
                key=str(record["key"]),
                task=str(record["task"]),
                references=tuple(pictures[:-1]),
                instruction=record["instruction"],
                plan=plan,
                target=pictures[-1],
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{part}, sample {key}: {what}; "
                f"python data.py --check {self.path} lists all that is wrong"
            ) from None

    def record(self, number: int) -> dict:
        """The record of a sample, without its pictures."""
        part, _, content = self.entries[number]
        return self._json(part, content) if part.suffix == ".tar" else json.loads(content)

    def _json(self, part, places):
        return json.loads(self._read(part, places["json"]))

    def _read(self, part, place):
        with open(part, "rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def _tar_record(self, part, places):
        """(record, pictures) of a sample, the target last; places: {suffix: (offset, size)}."""
        record = self._json(part, places)
        numbers = sorted(int(name[4:].split(".")[0]) for name in places if name.startswith("ref_"))
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"its references are numbered {numbers}")
        suffixes = [name for i in numbers for name in places if name.startswith(f"ref_{i}.")]
        suffixes += [name for name in places if name.startswith("target.")]
        if len(suffixes) != len(numbers) + 1:
            raise ValueError("it has no target picture, or several")
        contents = {name: io.BytesIO(self._read(part, places[name])) for name in suffixes}
        return record, [open_image(content, name) for name, content in contents.items()]

    def _line_record(self, part, line):
        """(record, pictures) of a sample, the target last."""
        record = json.loads(line)
        paths = (*record["references"], record["target"])
        return record, [open_image(part.parent / path) for path in paths]


def open_source(path: str, seed: int, max_references: int, *, scale: int = 1):
    """The samples that --data names: "toy" draws them, anything else is a path."""
    return Drawn("train", seed, max_references, scale) if path == "toy" else Source(path, seed)


def stream(source, positions, workers: int = 0):
    """An iterator of the samples at these positions, in order; `workers` processes read ahead."""
    loader = torch.utils.data.DataLoader(
        source,
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        collate_fn=lambda sample: sample,
    )
    return iter(loader)


# --------------------------------------------------------------------------------------------------
# checking


def problems_of(source: Source, number: int, context_length: int = 77) -> list[str]:
    """What is wrong with a sample, one sentence each; an empty list if nothing is."""
    try:
        sample = source.sample(number)
    except UserError as error:
        return [str(error).split("; python data.py")[0]]
    where = f"{source.entries[number][0]}, sample {source.entries[number][1]}"
    count, found = len(sample.references), []
    if not sample.references:
        found.append("it has no reference")
    if not sample.instruction.strip() or len(sample.instruction) > LONGEST:
        found.append(f"its instruction has {len(sample.instruction)} characters")
    for image, _ in iccot.image_numbers(sample.instruction):
        if not 1 <= image <= count:
            found.append(f"its instruction names image {image}, it has {count} references")
    tokens = len(SimpleTokenizer().encode(sample.plan.caption)) + 2
    if tokens > context_length:
        found.append(f"its caption has {tokens} CLIP tokens, CLIP reads {context_length}")
    return [f"{where}: {what}" for what in found]


def check(path: str) -> None:
    """Print what is wrong with the samples at `path`; exit status 1 if anything is."""
    source = Source(path)
    bar = tqdm(range(len(source)), disable=None, desc="check")
    problems = [problem for number in bar for problem in problems_of(source, number)]
    for problem in problems:
        print(problem)
    print(f"{path}: {len(source)} samples, {len(problems)} problems")
    if problems:
        sys.exit(1)


# --------------------------------------------------------------------------------------------------
# looking at them


GREY, GREEN, BLACK = (150, 150, 150), (0, 90, 60), (0, 0, 0)


def picture_sheet(samples: list[Sample], side: int = 128) -> Image.Image:
    """One row a sample: references, target, and in words task, judgement, instruction and plan."""
    cell = side + 8
    columns = max(len(sample.references) for sample in samples)
    sheet = Image.new("RGB", (cell * (columns + 1) + 640, cell * len(samples) + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    left = 8 + columns * cell
    for row, sample in enumerate(samples):
        top = 8 + row * cell
        for column, image in enumerate(sample.references):
            sheet.paste(fitted(image, side), (8 + column * cell, top))
        pen.rectangle((left - 4, top - 4, left + cell - 5, top + cell - 5), fill=(40, 40, 40))
        sheet.paste(fitted(sample.target, side), (left, top))
        for i, (line, colour) in enumerate(in_words(sample)[: side // 15]):
            pen.text((left + cell + 8, top + 15 * i), line, fill=colour, font=font)
    return sheet


def in_words(sample: Sample) -> list[tuple[str, tuple]]:
    """(line, colour): the task and how the target was judged, the instruction, the plan."""
    about = sample.key
    if sample.truth:
        verdict = judge(sample.target, sample.truth)
        about = f"(target: PF {verdict.pf:.1f}, SC {verdict.sc:.1f})"
    plan = textwrap.wrap("> " + sample.plan.caption, 92)
    plan += [f"> {i}: {relation}" for i, relation in enumerate(sample.plan.relations, 1)]
    lines = [(f"{sample.task}   {about}", GREY)]
    lines += [(line, BLACK) for line in textwrap.wrap(sample.instruction, 92)]
    return lines + [(line, GREEN) for line in plan]


def fitted(image: Image.Image, side: int) -> Image.Image:
    """A toy picture enlarged so that subjects keep their size beside scenes; any other fitted."""
    if max(image.size) <= SIZE:
        size = (image.width * side // SIZE, image.height * side // SIZE)
        return image.resize(size, Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


# --------------------------------------------------------------------------------------------------
# the command


@dataclass(frozen=True)
class Config:
    """What to do with which samples."""

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
                "check needs samples on disk: --check PATH; "
                "those of the toy world are drawn and right"
            )
        check_request(self.split, self.max_references)


PRESETS = {"toy": {}}


def samples_to_show(config: Config) -> list[Sample]:
    """`count` samples from `index` on; those of the toy world evenly of the seven tasks."""
    if config.path:
        source = Source(config.path, config.seed)
        numbers = range(config.index, min(len(source), config.index + config.count))
        if not numbers:
            raise UserError(f"--index={config.index}: {config.path} holds {len(source)} samples")
        return [source.sample(i) for i in numbers]
    shown: dict[str, list[Sample]] = {task: [] for task in TASKS}
    index, most = config.index, math.ceil(config.count / len(TASKS))
    while sum(map(len, shown.values())) < config.count:
        limit = dict(max_references=config.max_references)
        sample = draw_sample(config.split, index, config.seed, **limit)
        if len(shown[sample.task]) < most:
            shown[sample.task].append(sample)
        index += 1
    return [sample for group in shown.values() for sample in group]


def show(config: Config) -> None:
    """Draw the sheet."""
    samples, out = samples_to_show(config), Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.published(out) as hidden:
        picture_sheet(samples).save(hidden, "PNG")
    print(f"wrote {out}: {len(samples)} samples of {config.path or f'the {config.split} split'}")


def arguments(argv: list[str]) -> list[str]:
    """`--show PATH` and `--check PATH` in the parser's words."""
    return with_path(argv, ("--show", "--check"), 0, option="--path")


def main(argv: list[str] | None = None) -> None:
    """Check, show, or both."""
    config = parse(Config, PRESETS, arguments(sys.argv[1:] if argv is None else argv))
    if not config.show and not config.check:
        parse(Config, PRESETS, ["--help"])
    with exit_on_user_error():
        if config.check:
            check(config.path)
        if config.show:
            show(config)


if __name__ == "__main__":
    main()
