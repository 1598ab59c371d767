"""
Samples on disk, as curate.py writes them and sft.py and grpo.py read them.

    tar shard   samples-000000.tar holds for each sample  KEY.json  KEY.ref_1.png ... KEY.ref_n.png  KEY.target.png
                (WebDataset's layout: any of its tools can read it)
    folder      records.jsonl, one record a line, with "references": [paths] and "target": path beside it
    record      {"key", "task", "instruction", "plan": {"out_caption", "relations"}, "scores": {}, "provenance": {}}

A source is a list that never ends: position p is sample order[p mod n] of epoch p // n. The order of an epoch permutes
the shards, and then the samples within stretches of `buffer` neighbours, so that a disk reads almost in sequence. It
depends on (seed, epoch) alone: a run is resumed at any sample, ranks and workers take positions, nothing is stored.

Left out: streaming from object stores (mount them), captions in other files, video.

    python data.py --show out/curated/shards          a picture sheet
    python data.py --check out/curated/shards         every record: pictures open, relations match references, lengths
"""

import io
import json
import os
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import iccot
from config import UserError
from data import Sample, draw_sample, enlarged
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


def to_png(image):
    """PIL -> PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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


class Drawn(torch.utils.data.Dataset):
    """The toy world as a source: position p is sample p of a split, `scale` times as large as it is drawn."""

    def __init__(self, split, seed, max_references, scale=1):
        self.split, self.seed, self.max_references, self.scale = split, seed, max_references, scale

    def __getitem__(self, position):
        return enlarged(
            draw_sample(self.split, int(position), self.seed, self.max_references), self.scale
        )


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
