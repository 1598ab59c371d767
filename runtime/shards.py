"""
Tar shards: how they are written, and where in them each sample is.

    samples-000000.tar          for each sample  KEY.json  KEY.ref_1.png ... KEY.target.png
                                (WebDataset's layout: any of its tools can read it)
    samples-000000.index.json   {tar, size, mtime_ns, samples: {KEY: {suffix: (offset, size)}}}

The index is valid while name, size and time of the tar agree. It is written by whoever reads the
shard first, so that headers are scanned once and not by each rank. Files that a system left in the
tar beside the samples (._* and __MACOSX of a Mac) are none of them.

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

# what bytes that are no tar header, or no index of ours, may raise
BROKEN_HEADER = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


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
        """record: as above, without pictures; references: PNG bytes of each; target: PNG bytes.

        UserError for a key that cannot name files, or that has a dot: there its suffix would begin.
        """
        files.check_name(record["key"], "the key of a sample")
        if "." in record["key"]:
            raise UserError(
                f"the key {record['key']!r} has a dot; in a tar shard it cannot have one"
            )
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
    """{key: {suffix: (offset, size)}} from the headers of a tar file; TarError if one is broken."""
    entries, last = {}, "its beginning"
    with tarfile.open(shard, "r:") as tar:  # compressed, no place in it could be read
        try:
            for entry in tar:
                if entry.size < 0:
                    raise ValueError("a size below 0")
                if entry.isfile() and not files.is_hidden(entry.name):
                    name, _, suffix = Path(entry.name).name.partition(".")
                    key = str(Path(entry.name).with_name(name))
                    entries.setdefault(key, {})[suffix] = (entry.offset_data, entry.size)
                last = f"its member {entry.name}"
            tar.fileobj.seek(
                tar.offset
            )  # where the list of members ended: at zeros, if it is whole
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("no end")
        except (tarfile.TarError, *BROKEN_HEADER):
            raise tarfile.ReadError(f"it is cut off or broken after {last}") from None
    return entries


def _kept_index(path):
    """The index in a file; None if there is none, or what is there is not one of ours."""
    try:
        kept = files.object_of(path.read_bytes())
        places = [place for found in kept["samples"].values() for place in found.values()]
        whole = all(type(start) is type(size) is int for start, size in places)
    except (OSError, *BROKEN_HEADER):
        return None
    return kept if whole and "tar" in kept else None


def _keep_index(path, index):
    """Write an index; a folder that cannot be written goes without. Processes may do it at once."""
    try:
        with files.published(path, f"-{socket.gethostname()}-{os.getpid()}") as hidden:
            hidden.write_text(json.dumps(index), encoding="utf-8")
    except OSError:
        pass
