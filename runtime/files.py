"""
Files that appear whole or not at all, and JSON that is read with a clear word where it is torn.

    with published("out/run/table.json") as hidden:     write a file, or make a folder, at `hidden`:
        hidden.write_text(text)                         it takes its name when the block ends

The name is given by a rename, so nobody ever reads half of a file. A process that is killed inside
the block leaves what stood under the name untouched, and beside it a hidden file or folder
(.name.tmp) that the next attempt replaces. A folder cannot be renamed over another one: the older
one steps aside first (.name.old) and is deleted after; killed just between, the name is free.

Not a concept of the paper. Left out: locks between processes; one of them writes, or each its own.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from runtime.config import UserError


def hidden_path(path, unique=""):
    """Where to write what `publish` is to give the name `path`: a hidden sibling of it.

    unique: tells writers apart that may write the same path at the same time (threads).
    """
    path = Path(path)
    return path.with_name(f".{path.name}{unique}.tmp")


@contextmanager
def published(path, unique=""):
    """Yields the hidden path to write to; after an error nothing is published and nothing is left.

    The hidden path does not exist yet, the folder around it must. unique: see `hidden_path`.
    """
    hidden = hidden_path(path, unique)
    remove(hidden)
    try:
        yield hidden
        publish(hidden, path)
    finally:
        remove(hidden)


def publish(hidden, path):
    """Give a finished hidden file or folder its name; what had that name before is replaced."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    remove(old)
    if path.is_dir():
        os.replace(path, old)
    os.replace(hidden, path)
    remove(old)


def remove(path):
    """Delete a file or a folder, if there is one."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file whole or not at all."""
    with published(path) as hidden:
        hidden.write_text(text)


def to_json(value, indent=None):
    """JSON text of objects, lists and numbers; null for what is not finite, which JSON lacks."""

    def known(x):
        if isinstance(x, dict):
            return {key: known(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [known(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(known(value), indent=indent, allow_nan=False)


def read_json(path):
    """The object in a JSON file that this project wrote; UserError if it is torn."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is torn ({error}); delete its folder to start again") from None


def check_writable(folder):
    """Make `folder` if it is missing; UserError if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {folder} ({error.strerror}); choose another with --out"
        ) from None


def read_lines(path):
    """The JSON objects of a file that `append_line` wrote, [] where there is none.

    A last line without its end was not written: it is cut off, so that the next one starts afresh.
    Lines end at a newline only, whatever else text may hold. UserError for a line that is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    found = []
    for number, line in enumerate(whole.split(b"\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is no JSON ({error})") from None
    return found


def append_line(path, record):
    """Add a JSON object as a line to a file, and wait until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
