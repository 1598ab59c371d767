"""
Files that appear whole or not at all, and text that is read with a clear word where it is torn.

    with published("out/run/table.json") as hidden:     write a file, or make a folder, at `hidden`:
        hidden.write_text(text)                         it takes its name when the block ends

The name is given by a rename, so nobody ever reads half of a file. A process that is killed inside
the block leaves what stood under the name untouched, and beside it a hidden file or folder
(.name.tmp) that the next attempt replaces. A folder cannot be renamed over another one: the older
one steps aside first (.name.old); killed just between, the name is free.

Text is UTF-8, whatever the locale; a byte order mark at its beginning is no part of it. Lines end
at a newline only: U+2028 and U+0085 stand within one.

Not a concept of the paper. Left out: locks between processes; one of them writes, or each its own.
"""

import json
import math
import os
import re
import shutil
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.config import UserError

UMASK = os.umask(0o077)  # the only way to ask for it is to set it
os.umask(UMASK)

NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")  # no hidden file, no way up or down
LONGEST_NAME = 200  # bytes; file systems take 255, of which endings need some


def hidden_path(path):
    """Where to write what `publish` is to give the name `path`: a hidden sibling of it."""
    path = Path(path)
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def published(path):
    """Yields the hidden path to write to, which does not exist yet; the folder around it must.

    After an error nothing is published and nothing is left.
    """
    hidden = hidden_path(path)
    remove(hidden)
    try:
        yield hidden
        publish(hidden, path)
    finally:
        remove(hidden)


def publish(hidden, path):
    """Give a finished hidden file or folder its name, and the mode that the umask grants (some
    libraries make files for the owner alone); what had that name before is replaced."""
    hidden, path = Path(hidden), Path(path)
    old = path.with_name(f".{path.name}.old")
    remove(old)
    for part in (hidden, *hidden.rglob("*")):
        with suppress(OSError):  # where modes cannot be changed they stay as they are
            if not part.is_symlink():
                part.chmod(part.stat().st_mode | (0o777 if part.is_dir() else 0o666) & ~UMASK)
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


def is_hidden(path):
    """Whether a system left this file beside those of people, as `._a.png` of a Mac; its path is
    relative to the folder or the archive where it was found."""
    path = Path(path)
    return path.name[:1] in ("", ".") or "__MACOSX" in path.parts


def by_number(name):
    """Sorts names as people count: ref_2 before ref_10, in small letters and capitals alike."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts]


def check_name(name, what):
    """UserError unless `name`, which comes from somebody else's data, can be the name of a file.

    what: where the name was found.
    """
    named = isinstance(name, str) and NAME.fullmatch(name)
    if not named or len(name.encode(errors="surrogatepass")) > LONGEST_NAME:
        raise UserError(
            f"{what}: {repr(name)[:60]} names files; expected a text of at most {LONGEST_NAME} "
            f"bytes without slashes that does not begin with a dot"
        )


def check_writable(folder):
    """Make `folder` if it is missing; UserError if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # two containers may be called alike
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {folder} ({error.strerror}); choose another with --out"
        ) from None


# --------------------------------------------------------------------------------------------------
# text


def write_text(path, text):
    """Write a text file whole or not at all."""
    with published(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


def read_text(path):
    """The text of a file; UserError if it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def to_json(value, indent=None):
    """JSON text of objects, lists and numbers; null for what is not finite, which JSON lacks."""

    def finite(part):
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def read_json(path):
    """The object in a JSON file that this project wrote; UserError if it is torn."""
    try:
        return object_of(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is torn ({error}); delete its folder to start again") from None


def object_of(content):
    """The object that bytes of JSON hold; ValueError says in one line what else they are."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}; expected an object, {{...}}")
    return value


def lines_of(path):
    """[(number, bytes)] of the lines of a text file that are not blank."""
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def is_ended(path):
    """Whether the last line of a text file, which is not empty, has its end."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_lines(path, *names):
    """The JSON objects of a file that `append_line` wrote, [] where there is none.

    A last line without its end was not written: it is cut off, so that the next one starts afresh.
    UserError for a line that is no object with these names.
    """
    path = Path(path)
    if not path.is_file():
        return []
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    records = []
    for number, line in lines_of(path):
        try:
            record = object_of(line)
            if missing := [name for name in names if name not in record]:
                raise ValueError(f"it has no {' and no '.join(missing)}")
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is none of ours: {error}; delete it to make it again"
            ) from None
        records.append(record)
    return records


def append_line(path, record):
    """Add a JSON object as a line to a file, and wait until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
