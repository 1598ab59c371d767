"""
Tar shards: how they are written, and where in them each sample is.

    samples-000000.tar          for each sample  KEY.json  KEY.ref_1.png ... KEY.target.png
                                (WebDataset's layout: any of its tools can read it)
    samples-000000.index.json   {tar, size, mtime_ns, samples: {KEY: {suffix: (offset, size)}}}

The index is valid while name, size and time of the tar agree. It is written by whoever reads the
shard first, so that headers are scanned once and not by each rank.

A shard appears under its name when it is complete. Not a concept of the paper.
Left out: compression (pictures are compressed already), object stores (mount them).
"""

import io
import json
import os
import socket
import tarfile
from pathlib import Path

from runtime import files
from runtime.config import UserError


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


def index_of(shard) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """[(key, {suffix: (offset, size)})] of a tar shard in order.

    From the index beside it, if that agrees with its name, size and time; else from a scan of its
    headers, and the index is written, where that is possible. UserError if it is no whole tar file.
    """
    shard = Path(shard)
    path = shard.with_suffix(".index.json")
    try:
        about = shard.stat()
        tar = {"tar": shard.name, "size": about.st_size, "mtime_ns": about.st_mtime_ns}
        kept = _kept_index(path)
        if kept is not None and all(kept.get(name) == value for name, value in tar.items()):
            return [(key, _places(found)) for key, found in kept["samples"].items()]
        entries = _scanned(shard)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard} cannot be read as a tar file ({error}); copy it again or leave it out"
        ) from None
    if kept is not None or not path.exists():
        _keep_index(path, tar | {"samples": entries})
    return list(entries.items())


def _places(found):
    return {suffix: tuple(place) for suffix, place in found.items()}


def _scanned(shard):
    """{key: {suffix: (offset, size)}} from the headers of a tar file."""
    entries = {}
    with tarfile.open(shard) as tar:
        for entry in tar:
            if entry.isfile():
                name, _, suffix = Path(entry.name).name.partition(".")
                key = str(Path(entry.name).with_name(name))
                entries.setdefault(key, {})[suffix] = (entry.offset_data, entry.size)
    return entries


def _kept_index(path):
    """The index in a file; None if there is none, or what is there is not one of ours."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and {"tar", "samples"} <= kept.keys() else None


def _keep_index(path, index):
    """Write an index; a folder that cannot be written goes without. Processes may do it at once."""
    try:
        with files.published(path, f"-{socket.gethostname()}-{os.getpid()}") as hidden:
            hidden.write_text(json.dumps(index))
    except OSError:
        pass
