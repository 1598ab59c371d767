"""
Samples: what one is, how it lies on disk, and in which order samples are read. One of them:

    {"key": "scene-80a6ba8df6a26127", "task": "scene",
     "instruction": "Draw a yellow ball (image 1) at the bottom left, in the scene of image 2.",
     "plan": {"out_caption": "A desert with a yellow ball at the bottom left.",
              "relations": [{"relation_1": "The ball is from image_1."},
                            {"relation_2": "The scene is consistent with image_2."}]}}

That is its record (what else stands in it is free); then its pictures, in one of two layouts:

    tar shards  samples-000000.tar: of each sample KEY.json, KEY.ref_1.png, ..., KEY.target.png, one
                file after the other (WebDataset's layout). Where they are is kept beside it, in
                samples-000000.index.json, by the first who reads the shard
    folder      records.jsonl, one record a line, with "references": [paths] and "target": path

A source is a list that never ends: position p is sample order[p mod n] of epoch p // n. For the
order of an epoch, what is on disk is cut into LANES equal stretches; each is read forward from a
place drawn at random, a sample of each in turn, and `buffer` neighbours of what results are
shuffled. So a step has the mixture of the whole, even of shards that are sorted by task, and a disk
reads almost in sequence. The order depends on (seed, epoch) alone: a run is resumed at any sample,
and nothing is stored for it.

A sample is held out if a hash of its key is in the lowest HELD_OUT of its range (of a few, the
lowest one): training never sees it, measurements see nothing else. A sample that cannot be read is
skipped and named, and the next position stands in for it; of the last WINDOW reads, and of the
samples among them, at most a share of BROKEN may be like that.

Left out: streaming from object stores (mount them), captions in other files, video.

    python data.py --show              draws out/samples.png: pictures, instruction and plan
    python data.py --show PATH         the same for samples on disk
    python data.py --check PATH        every record: pictures, relations, references, lengths
"""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import tarfile
import threading
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from open_clip import SimpleTokenizer
from tqdm import tqdm

import iccot
from iccot import Sample
from runtime import files, processes
from runtime.config import UserError, exit_on_user_error, parse, with_path
from studies.pictures import save_samples
from toy.painter import Painted
from toy.tasks import Drawn, check_request
from vision import open_image

LONGEST = 2000  # characters of an instruction; longer ones are a mistake of whoever made them
LANES = 64  # places of the disk that are read in turn
HELD_OUT = 1 / 50  # share of the keys that no training sees
WINDOW, BROKEN = 200, 0.1  # reading stops if more than this share of the last reads failed
# workers wait for the signals that Linux tells the sender of; elsewhere they are as Python has them
START = "fork" if sys.platform == "linux" else None
FAULTS = (ValueError, KeyError, TypeError, OSError)  # what reading a broken sample raises

clip_tokenizer = functools.cache(SimpleTokenizer)  # which takes a second to read


# --------------------------------------------------------------------------------------------------
# tar shards


class ShardWriter:
    """Writes samples into tar shards of `size`; one appears under its name when it is complete."""

    def __init__(self, folder, size: int = 1000):
        self.folder, self.size = Path(folder), size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tar, self.count, self.number = None, 0, 0

    def write(self, record: dict, references: list[bytes], target: bytes) -> None:
        """references, target: bytes of PNG files. UserError for a key that cannot name files."""
        key = record["key"]
        files.check_name(key, "the key of a sample")
        if "." in key:  # there its suffix would begin
            raise UserError(f"the key {key!r} has a dot; in a tar shard it cannot have one")
        if self.tar is None:
            self.path = self.folder / f"samples-{self.number:06d}.tar"
            self.tar = tarfile.open(files.hidden_path(self.path), "w")
        contents = {"json": json.dumps(record, ensure_ascii=False).encode()}
        contents |= {f"ref_{i}.png": reference for i, reference in enumerate(references, 1)}
        for suffix, content in {**contents, "target.png": target}.items():
            entry = tarfile.TarInfo(f"{key}.{suffix}")
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


def index_of(shard: Path) -> list[tuple[str, dict]]:
    """[(key, {suffix: [offset, size]})] of a tar shard in order. UserError if it is not whole.

    From the index beside it, if that agrees with the shard's name, size and time; else from its
    headers, and the index is written, where that is possible.
    """
    path = shard.with_suffix(".index.json")
    try:
        about = shard.stat()
        tar = {"tar": shard.name, "size": about.st_size, "mtime_ns": about.st_mtime_ns}
        with suppress(OSError, ValueError, KeyError):  # missing or torn
            index = files.object_of(path.read_bytes())
            if tar.items() <= index.items():
                return list(index["samples"].items())
        samples = scan(shard)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard} cannot be read as a tar file ({error}); copy it again or leave it out"
        ) from None
    with suppress(OSError):  # a folder that cannot be written goes without
        files.write_text(path, json.dumps(tar | {"samples": samples}))
    return list(samples.items())


def scan(shard: Path) -> dict[str, dict]:
    """{key: {suffix: [offset, size]}} from the headers of a tar file; TarError if one is broken."""
    samples = {}
    with tarfile.open(shard, "r:") as tar:  # compressed, no place in it could be read
        for entry in tar:
            if entry.isfile() and not files.is_hidden(entry.name):  # not what a Mac leaves
                name, _, suffix = Path(entry.name).name.partition(".")
                key = str(Path(entry.name).with_name(name))
                samples.setdefault(key, {})[suffix] = [entry.offset_data, entry.size]
        # where the list of members ended stand zeros, if it is whole
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it is cut off or broken at byte {tar.offset:,}")
    return samples


# --------------------------------------------------------------------------------------------------
# one sample on disk


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample on disk, and what is known of it before it is read."""

    part: Path  # the tar shard, or records.jsonl
    name: str  # of its files in the shard, or its line
    key: str
    # of json, ref_1.png, ..., target.png: [offset, size] in the shard; the line itself, a path
    places: dict[str, list[int] | bytes | str]

    @property
    def references(self) -> int:
        """How many it has."""
        return sum(name.startswith("ref_") for name in self.places)


def parts_of(path: Path) -> list[Path]:
    """The tar shards at `path`, or its records.jsonl. UserError: there are none."""
    lines = path / "records.jsonl"
    shards = [path] if path.is_file() else sorted(path.glob("*.tar"))
    parts = [lines] if lines.is_file() else [part for part in shards if part.name[0] != "."]
    if not parts:
        raise UserError(
            f"no samples at {path}: expected a .tar file, a folder of them, "
            "or a folder with records.jsonl"
        )
    return parts


def entries_of(part: Path) -> list[Entry]:
    """The samples of a tar shard or of a records.jsonl, in order."""
    entries = []
    if part.name != "records.jsonl":
        for name, places in index_of(part):
            entries.append(Entry(part, name, name.rpartition("/")[2], places))
        return entries
    for number, line in files.lines_of(part):
        try:
            record = files.object_of(line)
        except ValueError:
            record = {}
        references = record.get("references")
        paths = references if isinstance(references, list) else []
        places = {f"ref_{i}": str(path) for i, path in enumerate(paths, 1)}
        places |= {"json": line, "target": str(record.get("target"))}
        entries.append(Entry(part, f"line {number}", str(record.get("key", number)), places))
    return entries


def member(entry: Entry, name: str) -> bytes:
    """A file of a sample: json, ref_1, ref_2, ... or target. KeyError or OSError if it is missing,
    ValueError if there are several."""
    places = [place for file, place in entry.places.items() if file.partition(".")[0] == name]
    if not places:
        raise KeyError(name)
    if len(places) > 1:
        raise ValueError(f"it has {len(places)} files called {name}")
    place = places[0]
    if isinstance(place, bytes):
        return place
    if isinstance(place, str):
        return (entry.part.parent / place).read_bytes()
    with open(entry.part, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def record_of(entry: Entry) -> dict:
    """The record of a sample, without its pictures; one of FAULTS if it cannot be read."""
    return files.object_of(member(entry, "json"))


def load(entry: Entry) -> Sample:
    """A sample from the disk; one of FAULTS if it is broken."""
    record = record_of(entry)
    names = [f"ref_{i}" for i in range(1, entry.references + 1)] + ["target"]
    pictures = [open_image(io.BytesIO(member(entry, name)), name) for name in names]
    for name in ("key", "task", "instruction"):
        if not isinstance(record[name], str):
            raise TypeError(f"its {name} is {record[name]!r}; expected a text")
    iccot.arranged(pictures[:-1], record["instruction"])  # ValueError: <image> too often
    return Sample(
        key=record["key"],
        task=record["task"],
        references=tuple(pictures[:-1]),
        instruction=record["instruction"],
        plan=iccot.from_json(json.dumps(record["plan"]), len(pictures) - 1),
        target=pictures[-1],
    )


# --------------------------------------------------------------------------------------------------
# which samples, and in which order


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


@functools.lru_cache(4)
def order(count: int, seed: int, epoch: int, buffer: int) -> np.ndarray:
    """(count,) the order of an epoch: a sample of each lane in turn, neighbours shuffled."""
    rng = np.random.default_rng((seed, epoch))
    lanes = np.array_split(np.arange(count), min(LANES, count))
    rounds = np.full((len(lanes[0]), len(lanes)), -1)  # the first lane is a longest
    for i, lane in enumerate(lanes):
        rounds[: len(lane), i] = np.roll(lane, rng.integers(len(lane)))
    numbers = rounds[rounds >= 0]  # (count,), round by round
    for start in range(0, count, buffer):
        rng.shuffle(numbers[start : start + buffer])
    return numbers


class Source(torch.utils.data.Dataset):
    """The samples at `path`: a tar shard, a folder of tar shards, or one with records.jsonl.

    split: all, or train or held_out, which share no sample (but for a single one). limit: of
    references; samples with more are left out. UserError: there are none.
    """

    def __init__(self, path, seed: int = 0, split: str = "all", *, buffer=1000, limit=math.inf):
        self.path, self.seed, self.buffer = Path(path), seed, buffer
        entries = [entry for part in parts_of(self.path) for entry in entries_of(part)]
        if not entries:
            raise UserError(f"{path} holds no samples")
        if split != "all":
            held_out = held_out_keys(entry.key for entry in entries)
            part = [entry for entry in entries if (entry.key in held_out) == (split == "held_out")]
            if not part:
                processes.warn(f"{path}: one key for all, so what is trained on is held out too")
            entries = part or entries
        self.entries = [entry for entry in entries if entry.references <= limit]
        text = f"{len(entries)} samples of {path} have more than max_references={limit} references"
        if not self.entries:
            raise UserError(f"all {text}; raise --max_references")
        if len(self) < len(entries):
            processes.warn(f"{len(entries) - len(self)} of {text} and are left out")
        self.recent = deque(maxlen=WINDOW)  # (number, what was wrong or "") of the last ones read
        self.skipped = set()  # numbers of samples that this process could not read

    def __len__(self) -> int:
        return len(self.entries)

    def number(self, position: int) -> int:
        """Which sample on disk stands at a position of the endless list."""
        epoch, place = divmod(int(position), len(self))
        return int(order(len(self), self.seed, epoch, self.buffer)[place])

    def references(self, position: int) -> int:
        """How many the sample at a position has; nothing is read for it."""
        return self.entries[self.number(position)].references

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position of the endless list, or the next one that can be read.

        UserError if too many of those that were read cannot be.
        """
        while (sample := self._sample_or_none(self.number(position))) is None:
            position += 1
        return sample

    def first(self, count: int) -> list[Sample]:
        """At most `count` samples that can be read, by the hash of their keys: however they lie on
        disk, the same ones. UserError if there are none."""
        numbers = sorted(range(len(self)), key=lambda number: hash_of(self.entries[number].key))
        readable = filter(None, map(self._sample_or_none, numbers))
        samples = list(itertools.islice(readable, count))
        if count and not samples:
            raise UserError(f"none of the {len(self)} samples of {self.path} can be read")
        return samples

    def _sample_or_none(self, number):
        """A sample; None if it cannot be read, which is said once. UserError for too many."""
        sample, reason = self.try_to_read(number)
        self.recent.append((number, reason))
        if not reason:
            return sample
        if number not in self.skipped:
            self.skipped.add(number)
            what = f"skipped ({len(self.skipped)} so far): {self.name(number)}: {reason}"
            print(what, file=sys.stderr, flush=True)
        reasons = [reason for _, reason in self.recent if reason]
        last = dict(self.recent)  # of few samples each comes again and again
        broken = sum(reason != "" for reason in last.values())
        if len(reasons) > BROKEN * WINDOW and broken > BROKEN * len(last):
            raise UserError(
                f"{self.path}: {len(reasons)} of the last {len(self.recent)} samples cannot be "
                f"read, most often: {Counter(reasons).most_common(1)[0][0]}; "
                f"python data.py --check {self.path} lists all that is wrong"
            )

    def try_to_read(self, number: int) -> tuple[Sample | None, str]:
        """Sample `number` in the order on disk and "", or None and what is wrong, in one line."""
        try:
            return load(self.entries[number]), ""
        except KeyError as error:
            return None, f"{error} is missing"
        except FAULTS as error:
            return None, " ".join(str(error).split())

    def sample(self, number: int) -> Sample:
        """Sample `number` in the order on disk. UserError names what is wrong with it."""
        sample, reason = self.try_to_read(number)
        if reason:
            raise UserError(f"{self.name(number)}: {reason}")
        return sample

    def name(self, number: int) -> str:
        """Where a sample is, for messages."""
        return f"{self.entries[number].part}, sample {self.entries[number].name}"


def open_source(path, seed, max_references, *, scale=1, painter=None):
    """What --data names, to train on: "toy" draws samples, else the train split of those there.

    painter: a toy.painter.Painter of the toy's targets, if they are not to be right.
    """
    if not path:
        raise UserError(
            "this preset has no samples of its own: name yours with --data (a tar shard, a folder "
            "of them or of records.jsonl), or --data toy for drawn ones"
        )
    if path == "toy":
        drawn = Drawn("train", seed, max_references, scale)
        return drawn if painter is None else Painted(drawn, painter)
    with processes.first_alone():  # it writes the indexes that are missing
        return Source(path, seed, "train", limit=max_references)


# --------------------------------------------------------------------------------------------------
# worker processes


class Answers(torch.utils.data.Dataset):
    """A source that returns a UserError in place of a sample: a worker would wrap it in more."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, position):
        try:
            return self.source[position]
        except UserError as error:
            return error


def stream(source, positions, workers: int = 0, *, ahead: int = 32):
    """What `source` has at these positions, one by one in order; `workers` processes read so many
    `ahead`."""
    loader = torch.utils.data.DataLoader(
        Answers(source),
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        prefetch_factor=math.ceil(ahead / workers) if workers else None,
        pin_memory=bool(workers) and torch.cuda.is_available(),  # for its thread, which receives
        worker_init_fn=functools.partial(outlive_the_signal, os.getpid()) if START else None,
        multiprocessing_context=START if workers else None,
    )
    for answer in loader:
        if isinstance(answer, UserError):
            raise answer
        yield answer


def outlive_the_signal(parent, worker):
    """A worker of a loader goes on when all processes of a job are asked to end: the one that
    trains still saves its state. The worker ends when that one asks it to, or is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent):
    """End this process when its parent asks for it, or is there no more."""
    while os.getppid() == parent:
        asked = signal.sigtimedwait({signal.SIGTERM}, 2)
        if asked is not None and asked.si_pid == parent:
            break
    os._exit(0)


# --------------------------------------------------------------------------------------------------
# the command: checking and showing


def problems_of(source: Source, number: int) -> list[str]:
    """What is wrong with a sample, one sentence each; an empty list if nothing is."""
    sample, reason = source.try_to_read(number)
    if reason:
        return [f"{source.name(number)}: {reason}"]
    problems = []
    if not sample.references:
        problems.append("it has no reference")
    if not sample.instruction.strip() or len(sample.instruction) > LONGEST:
        problems.append(f"its instruction has {len(sample.instruction)} characters")
    tokens = len(clip_tokenizer().encode(sample.plan.caption)) + 2
    if tokens > 77:
        problems.append(f"its caption has {tokens} CLIP tokens, CLIP reads 77")
    return [f"{source.name(number)}: {problem}" for problem in problems]


def check(path: str) -> None:
    """Print what is wrong with the samples at `path`; exit status 1 if anything is."""
    source = Source(path)
    numbers = tqdm(range(len(source)), disable=None, desc="check")
    problems = [problem for number in numbers for problem in problems_of(source, number)]
    keys = Counter(entry.key for entry in source.entries)
    problems += [f"{path}: {n} samples have the key {key}" for key, n in keys.items() if n > 1]
    print(*problems, f"{path}: {len(source)} samples, {len(problems)} problems", sep="\n")
    if problems:
        sys.exit(1)


@dataclass(frozen=True)
class Config:
    """What to do with which samples."""

    show: bool = False  # draw a sheet of samples
    check: bool = False  # read every sample at `path`, list what is wrong; then status 1
    path: str = ""  # samples on disk; "": the toy world (--show PATH)
    index: int = 0  # number of the first sample to look at
    count: int = 21  # samples to show
    max_references: int = 4  # most reference images of a sample of the toy world, 2 to 10
    out: str = "out/samples.png"  # where the sheet goes

    def __post_init__(self):
        if self.count < 1 or self.index < 0:
            raise ValueError(f"count={self.count}, index={self.index}: expected 1 or more, and 0")
        if not self.show and not (self.check and self.path):
            raise ValueError("expected --show, --show PATH or --check PATH")
        check_request("train", self.max_references)


PRESETS = {"toy": {}}


def show(config: Config) -> None:
    """Draw the sheet."""
    last = config.index + config.count
    if config.path:
        source = Source(config.path)
        samples = [source.sample(i) for i in range(config.index, min(last, len(source)))]
        if not samples:
            raise UserError(f"--index={config.index}: {config.path} holds {len(source)} samples")
    else:
        drawn = Drawn("train", 0, config.max_references, 1)
        samples = [drawn[i] for i in range(config.index, last)]
        samples.sort(key=lambda sample: sample.task)
    save_samples(Path(config.out), samples)
    print(f"wrote {config.out}: {len(samples)} samples of {config.path or 'the toy world'}")


def arguments(argv: list[str]) -> list[str]:
    """`--show PATH` and `--check PATH` in the parser's words."""
    return with_path(argv, ("--show", "--check"), 0, option="--path")


def main(argv: list[str] | None = None) -> None:
    """Check, show, or both."""
    argv = arguments(sys.argv[1:] if argv is None else argv)
    config = parse(Config, PRESETS, argv)
    with exit_on_user_error():
        if config.check:
            check(config.path)
        if config.show:
            show(config)


if __name__ == "__main__":
    main()
