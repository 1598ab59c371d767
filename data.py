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
                (WebDataset's layout: any of its tools can read it); where they are in it is kept
                in samples-000000.index.json, written by the first who reads the shard
    folder      records.jsonl, one record a line, with "references": [paths] and "target": path

A source is a list that never ends: position p is sample order[p mod n] of epoch p // n. For the
order of an epoch, what is on disk is cut into LANES equal stretches; each is read forward from a
place drawn at random, a sample of each in turn, and `buffer` neighbours of what results are
shuffled. So a step has the mixture of the whole, even of shards that are sorted by task, and a disk
reads almost in sequence. The order depends on (seed, epoch) alone: a run is resumed at any sample,
ranks and workers take positions, nothing is stored.

A sample is held out if a hash of its key is in the lowest HELD_OUT of its range (of a few, the
lowest one): `open_source` never trains on it, studies/metrics.py measures on nothing else. A sample
that cannot be read is skipped and named on stderr, the next position stands in for it; of the last
WINDOW reads, and of the samples among them, at most a share of BROKEN may be like that.

Left out: streaming from object stores (mount them), captions in other files, video.

    python data.py --show              draws out/samples.png: pictures, instruction, plan, judgement
    python data.py --show PATH         the same for samples on disk
    python data.py --check PATH        every record: pictures, relations, references, lengths
"""

import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from open_clip import SimpleTokenizer
from tqdm import tqdm

import iccot
from iccot import TASKS, Sample
from runtime import files, processes
from runtime.config import UserError, exit_on_user_error, parse, with_path
from runtime.shards import index_of
from studies.pictures import save_samples
from toy.painter import Painted, Painter
from toy.tasks import Drawn, check_request, draw_sample
from vision import open_image

LONGEST = 2000  # characters of an instruction; longer ones are a mistake of whoever made them
LANES = 64  # places of the disk that are read in turn
HELD_OUT = 1 / 50  # share of the keys that no training sees
WINDOW, BROKEN = 200, 0.1  # reading stops if more than this share of the last reads failed
# workers inherit how this process treats signals; elsewhere they start as Python has it
START = "fork" if sys.platform == "linux" else None
FAULTS = (ValueError, KeyError, TypeError, OSError)  # what reading a broken sample raises
# a file system that is away for a moment, and seconds until it is asked again
AWAY = {getattr(errno, name, None) for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN")} - {None}
PAUSES = (1, 2, 4, 8, 16, 32)


# --------------------------------------------------------------------------------------------------
# reading


def parts_of(path: Path) -> list[Path]:
    """The tar shards at `path`, or its records.jsonl. UserError: there are none."""
    lines = path / "records.jsonl"
    if path.suffix == ".tar" and path.is_file():
        return [path]
    if lines.is_file():
        return [lines]
    shards = [one for one in path.glob("*.tar") if not files.is_hidden(one.name)]
    if shards:
        return sorted(shards)
    raise UserError(
        f"no samples at {path}: expected a .tar file, a folder of them, "
        "or a folder with records.jsonl"
    )


def make_indexes(path: Path) -> None:
    """Scan the shards at `path` that have no index, each process its share. All take part."""
    for part in parts_of(path)[processes.rank() :: processes.size()]:
        with suppress(UserError):  # which all processes will find when they read it
            if part.suffix == ".tar":
                index_of(part)
    processes.barrier()


def lines_of(part: Path) -> list[tuple[str, bytes]]:
    """[("line NUMBER", line)] of a records.jsonl but for blank ones and a last one that is torn."""
    lines = [(f"line {number}", line) for number, line in files.lines_of(part)]
    if lines and not files.is_ended(part):
        try:
            files.object_of(lines[-1][1])
        except ValueError:
            processes.warn(f"{part}, {lines.pop()[0]}: the last one is torn and left out")
    return lines


def hash_of(key: str, purpose: str = "held out") -> float:
    """A number in [0, 1) for a key, evenly spread, the same on every machine and in any company."""
    content = f"{purpose} {key}".encode(errors="surrogatepass")  # names in a tar may be any bytes
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out_keys(keys) -> set[str]:
    """Those of the keys whose hash is below HELD_OUT; of a few keys the lowest, if none is.

    Of several keys one is left, in the same way. One alone is held out, and trained on too.
    """
    hashes = {key: hash_of(key) for key in keys}
    ranked = sorted(hashes, key=hashes.get)
    count = max(1, sum(value < HELD_OUT for value in hashes.values()))
    return set(ranked[: min(count, max(1, len(ranked) - 1))])


def references_of(part: Path, key: str, content) -> int:
    """How many a sample has, by the index of its shard or by its line, which may be wrong in other
    ways. 0 where a line is torn."""
    if part.suffix == ".tar":
        return sum(name.startswith("ref_") for name in content)
    try:
        return len(files.object_of(content)["references"])
    except FAULTS:
        return 0


class Source(torch.utils.data.Dataset):
    """The samples at `path`: a tar shard, a folder of tar shards, or one with records.jsonl.

    split: all, or train or held_out, which share no sample (but for a single one).
    """

    def __init__(self, path, seed: int = 0, split: str = "all", *, buffer=1000, limit=math.inf):
        """UserError: there are none. limit: of references; samples with more are left out."""
        self.path, self.seed, self.buffer = Path(path), seed, buffer
        self.entries = []  # (part, key, where its files are or its line)
        for part in parts_of(self.path):
            found = index_of(part) if part.suffix == ".tar" else lines_of(part)
            self.entries += [(part, *entry) for entry in found]
        if not self.entries:
            raise UserError(f"{path} holds no samples")
        if split != "all":
            self._keep(split)
        if limit < math.inf:
            self._leave_out(limit)
        self.orders = {}  # of the last two epochs that were asked for
        self.recent = deque(maxlen=WINDOW)  # (number, what was wrong or "") of the last ones read
        self.broken = multiprocessing.RawArray("b", len(self))  # 1: skipped; shared with workers

    def _keep(self, split):
        """Forget the samples of the other split."""
        keys = [self.key(number) for number in range(len(self))]
        chosen = held_out_keys(keys)
        if len(chosen) == len(set(keys)):
            processes.warn(
                f"{self.path}: one key for all ({len(self)}), so what is trained on is held out too"
            )
            return
        wanted = {"train": False, "held_out": True}[split]
        pairs = zip(self.entries, keys)
        self.entries = [entry for entry, key in pairs if (key in chosen) == wanted]

    def _leave_out(self, limit):
        """Forget the samples with more references, by what is known before they are read."""
        before = len(self)
        self.entries = [one for one in self.entries if references_of(*one) <= limit]
        if not self.entries:
            raise UserError(
                f"all {before} samples of {self.path} have more than max_references={limit} "
                f"references; raise --max_references"
            )
        if len(self) < before:
            processes.warn(
                f"{before - len(self)} of {before} samples of {self.path} have more than "
                f"max_references={limit} references and are left out"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def key(self, number: int) -> str:
        """The key of a sample: the name of its files, or in its record; of a torn one its line."""
        part, key, content = self.entries[number]
        if part.suffix == ".tar":
            return key.rpartition("/")[2]
        try:
            return str(files.object_of(content)["key"])
        except FAULTS:
            return content.decode(errors="replace")

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the order of an epoch: a sample of each lane in turn, neighbours shuffled."""
        if epoch not in self.orders:
            if len(self.orders) == 2:
                del self.orders[next(iter(self.orders))]
            self.orders[epoch] = self._shuffled(epoch)
        return self.orders[epoch]

    def _shuffled(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        lanes = np.array_split(np.arange(len(self)), min(LANES, len(self)))
        rounds = np.full((len(lanes[0]), len(lanes)), -1)  # the first lane is a longest
        for i, lane in enumerate(lanes):
            rounds[: len(lane), i] = np.roll(lane, rng.integers(len(lane)))
        order = rounds[rounds >= 0]  # (n,), round by round
        for start in range(0, len(order), self.buffer):
            rng.shuffle(order[start : start + self.buffer])
        return order

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position of the endless list, or the next one that can be read.

        UserError if too many of those that were read cannot be.
        """
        for place in itertools.count(int(position)):
            epoch, rest = divmod(place, len(self))
            sample = self._sample_or_skip(int(self.order(epoch)[rest]))
            if sample is not None:
                return sample

    def first(self, count: int) -> list[Sample]:
        """At most `count` samples that can be read, by the hash of their keys: however they lie on
        disk, the same ones. UserError if there are none."""
        numbers = sorted(range(len(self)), key=lambda number: hash_of(self.key(number)))
        found = (one for one in map(self._sample_or_skip, numbers) if one is not None)
        samples = list(itertools.islice(found, count))
        if count and not samples:
            raise UserError(f"none of the {len(self)} samples of {self.path} can be read")
        return samples

    @property
    def skipped(self) -> int:
        """Samples that were skipped so far, by this process and its workers."""
        return bytes(self.broken).count(1)

    def _sample_or_skip(self, number):
        """A sample; None if it cannot be read, which is said once. UserError for too many."""
        try:
            sample = self._load(number)
        except FAULTS as error:
            self.recent.append((number, in_one_line(error)))
        else:
            self.recent.append((number, ""))
            return sample
        if not self.broken[number]:
            self.broken[number] = 1
            what = f"{self.name(number)}: {self.recent[-1][1]}"
            print(f"skipped ({self.skipped} so far): {what}", file=sys.stderr, flush=True)
        reasons = Counter(reason for _, reason in self.recent if reason)
        read = dict(self.recent)  # of few samples each comes again and again
        share = sum(map(bool, read.values())) / len(read)
        if reasons.total() > BROKEN * WINDOW and share > BROKEN:
            raise UserError(
                f"{self.path}: {reasons.total()} of the last {len(self.recent)} samples cannot be "
                f"read, most often: {reasons.most_common(1)[0][0]}; "
                f"python data.py --check {self.path} lists all that is wrong"
            )

    def sample(self, number: int) -> Sample:
        """Sample `number` in the order on disk. UserError names what is wrong with it."""
        try:
            return self._load(number)
        except FAULTS as error:
            raise UserError(
                f"{self.name(number)}: {in_one_line(error)}; "
                f"python data.py --check {self.path} lists all that is wrong"
            ) from None

    def name(self, number: int) -> str:
        """Where a sample is, for messages."""
        part, key, _ = self.entries[number]
        return in_one_line(f"{part}, sample {key}")

    def _load(self, number):
        """Sample `number`; one of FAULTS if it is broken."""
        part, _, content = self.entries[number]
        read = self._tar_record if part.suffix == ".tar" else self._line_record
        record, pictures = read(part, content)
        for name in ("key", "task", "instruction"):
            if not isinstance(record[name], str):
                raise TypeError(f"its {name} is {record[name]!r}; expected a text")
        iccot.arranged(pictures[:-1], record["instruction"])  # ValueError: <image> too often
        plan = iccot.from_json(json.dumps(record["plan"]), len(pictures) - 1)
        return Sample(
            key=str(record["key"]),
            task=record["task"],
            references=tuple(pictures[:-1]),
            instruction=record["instruction"],
            plan=plan,
            target=pictures[-1],
        )

    def references(self, position: int) -> int:
        """How many the sample at a position has; nothing is read for it."""
        epoch, rest = divmod(position, len(self))
        return references_of(*self.entries[self.order(epoch)[rest]])

    def record(self, number: int) -> dict:
        """The record of a sample, without its pictures."""
        part, _, content = self.entries[number]
        return self._json(part, content) if part.suffix == ".tar" else files.object_of(content)

    def _json(self, part, places):
        try:
            return files.object_of(read_bytes(part, *places["json"]))
        except ValueError as error:
            raise ValueError(f"its member json cannot be read: {error}") from None

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
        contents = {name: io.BytesIO(read_bytes(part, *places[name])) for name in suffixes}
        return record, [open_image(content, name) for name, content in contents.items()]

    def _line_record(self, part, line):
        """(record, pictures) of a sample, the target last."""
        record = files.object_of(line)
        references, target = record["references"], record["target"]
        paths = [*references, target] if isinstance(references, list) else [None]
        if not all(isinstance(path, str) for path in paths):
            raise TypeError(
                f"its references are {references!r}, its target {target!r}; expected a list of "
                "paths and a path"
            )
        places = [part.parent / path for path in paths]
        return record, [open_image(io.BytesIO(read_bytes(path)), str(path)) for path in places]


def read_bytes(path: Path, begin: int = 0, size: int = -1) -> bytes:
    """A part of a file. While the file system is AWAY it is asked again, for about a minute; then
    OSError."""
    for pause in (*PAUSES, None):
        try:
            with open(path, "rb") as file:
                file.seek(begin)
                return file.read(size)
        except OSError as error:
            if pause is None or error.errno not in AWAY:
                raise
            print(f"{path}: {error.strerror}; again in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def in_one_line(error: Exception | str) -> str:
    """What is wrong with a sample, without line breaks and what no terminal can show."""
    text = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(text.encode(errors="backslashreplace").decode().split())


def open_source(
    path: str, seed: int, max_references: int, *, scale: int = 1, painter: Painter | None = None
):
    """What --data names, to train on: "toy" draws samples, else the train split of those there.

    painter: of the toy's targets, if they are not to be right. All processes take part.
    """
    if path == "toy":
        drawn = Drawn("train", seed, max_references, scale)
        return drawn if painter is None else Painted(drawn, painter)
    make_indexes(Path(path))
    return Source(path, seed, "train", limit=max_references)


class Answers(torch.utils.data.Dataset):
    """A source that hands over a UserError in place of a sample: a worker would wrap it in more."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, position):
        try:
            return self.source[position]
        except UserError as error:
            return error


def stream(source, positions, workers: int = 0, *, ahead: int = 32):
    """An iterator of what `source` has at these positions, in order; `workers` processes read so
    many `ahead`."""
    loader = torch.utils.data.DataLoader(
        Answers(source),
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        prefetch_factor=math.ceil(ahead / workers) if workers else None,
        collate_fn=as_it_is,
        pin_memory=bool(workers) and torch.cuda.is_available(),  # for its thread, which receives
        worker_init_fn=outlive_the_signal,
        multiprocessing_context=START if workers else None,
    )
    return samples_of(iter(loader))


def outlive_the_signal(worker):
    """A worker of a loader goes on when all processes of a job are asked to end: the one that
    trains still saves its state, and ends its workers itself. On Linux; elsewhere nothing."""
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent):
    """End this process when its parent, and nobody else, asks for it, or is there no more."""
    while os.getppid() == parent:
        asked = signal.sigtimedwait({signal.SIGTERM}, 2)
        if asked and asked.si_pid == parent:
            break
    os._exit(0)


def as_it_is(sample):
    """No batch is made of samples."""
    return sample


def samples_of(answers):
    """The samples among the answers of a loader, until a UserError comes."""
    for answer in answers:
        if isinstance(answer, UserError):
            raise answer
        yield answer


# --------------------------------------------------------------------------------------------------
# checking


@functools.cache
def clip_tokenizer() -> SimpleTokenizer:
    """CLIP's; reading its vocabulary takes longer than reading a sample."""
    return SimpleTokenizer()


def problems_of(source: Source, number: int, context_length: int = 77) -> list[str]:
    """What is wrong with a sample, one sentence each; an empty list if nothing is."""
    try:
        sample = source.sample(number)
    except UserError as error:
        return [str(error).split("; python data.py")[0]]
    count, found = len(sample.references), []
    if not sample.references:
        found.append("it has no reference")
    if not sample.instruction.strip() or len(sample.instruction) > LONGEST:
        found.append(f"its instruction has {len(sample.instruction)} characters")
    for image, _, certain in iccot.image_numbers(sample.instruction):
        if certain and not 1 <= image <= count:
            found.append(f"its instruction names image {image}, it has {count} references")
    tokens = len(clip_tokenizer().encode(sample.plan.caption)) + 2
    if tokens > context_length:
        found.append(f"its caption has {tokens} CLIP tokens, CLIP reads {context_length}")
    return [f"{source.name(number)}: {what}" for what in found]


def check(path: str) -> None:
    """Print what is wrong with the samples at `path`; exit status 1 if anything is."""
    source = Source(path)
    bar = tqdm(range(len(source)), disable=None, desc="check")
    problems = [problem for number in bar for problem in problems_of(source, number)]
    keys = Counter(source.key(number) for number in range(len(source)))
    problems += [f"{path}: {n} samples have the key {key}" for key, n in keys.items() if n > 1]
    for problem in problems:
        print(problem)
    print(f"{path}: {len(source)} samples, {len(problems)} problems")
    if problems:
        sys.exit(1)


# --------------------------------------------------------------------------------------------------
# the command


@dataclass(frozen=True)
class Config:
    """What to do with which samples."""

    show: bool = False  # draw a sheet of samples
    check: bool = False  # read every sample at `path`, list what is wrong; then status 1
    path: str = ""  # samples on disk; "": the toy world (--show PATH)
    split: str = "train"  # of the toy world: train or held_out; on disk all samples
    index: int = 0  # number of the first sample to look at
    count: int = 21  # samples to show, evenly of the seven tasks
    seed: int = 0  # of the samples
    max_references: int = 4  # most reference images of a sample, 2 to 10
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
    save_samples(out, samples)
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
