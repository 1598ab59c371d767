"""
Options: a frozen dataclass, named presets that say only what differs, and a command line parser.

    @dataclass(frozen=True)
    class Config:
        steps: int = 200  # optimiser steps                  <- the comment is the help text
        lr: float = 1e-6  # learning rate
        refs: tuple[str, ...] = ()  # reference images: --refs a.png --refs b.png

    PRESETS = {"toy": dict(steps=20, lr=1e-4), "full": {}}   # the first one is the default
    config = parse(Config, PRESETS)                          # --config=toy --steps=5

Grammar: --key=value or --key value; "-" in a key is "_"; exact names; a key may be given once,
except for tuples. Types: int, float, str, bool (true false yes no 1 0, or the bare --key), Literal,
tuple[T, ...], T | None ("none"). A mistake prints one line on stderr and exits with status 2;
--help prints one column a preset.

Not a concept of the paper. Left out: files of settings, nested options, abbreviations, help texts
of more than one line.
"""

import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import sys
import types
import typing
from contextlib import contextmanager

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class UserError(ValueError):
    """A mistake of the person at the keyboard; its text is one sentence that says what to do."""


@contextmanager
def exit_on_user_error(*kinds: type[Exception]):
    """A block, or with @ a function, in which a user's mistake ends the process with one line on
    stderr and exit status 2.

    A mistake is a UserError, an OSError about a named file, a full disk or with a text of our own,
    and whatever `kinds` lists. Everything else is a bug and keeps its traceback.
    """
    try:
        yield
    except (UserError, OSError, *kinds) as error:
        if isinstance(error, OSError) and error.errno is not None:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # the system may name no file
            if error.filename is None and not full:  # a broken pipe: not ours to judge
                raise
            message = f"{error.filename or 'a file'}: {error.strerror}"
            message += "; make room and repeat the command" * full
        else:
            message = " ".join(str(error).split())  # one line
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def parse(Config: type, presets: dict[str, dict], argv: list[str] | None = None):
    """A Config from the command line. Exits with 0 after --help, with 2 after a mistake.

    Config: frozen dataclass; its __post_init__ may raise ValueError for an impossible combination.
    A field named `config`, if there is one, receives the preset's name. presets: name -> {field:
    value}; the first is the default. Prints the preset and what was changed in it (rank 0 only).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a letter that the terminal lacks shall end no run
        sys.stdout.reconfigure(errors="backslashreplace")
    with exit_on_user_error():
        hints = typing.get_type_hints(Config)
        fields = {field.name: field for field in dataclasses.fields(Config) if field.init}
        kinds = {name: hints[name] for name in fields}
        if "--help" in argv or "-h" in argv:
            print(_help(Config, presets, fields, kinds))
            sys.exit(0)
        given = _read(argv, kinds)
        preset = given.pop("config", next(iter(presets)))
        if preset not in presets:
            hint = _did_you_mean(preset, presets)
            raise UserError(f"unknown preset {preset!r}{hint} (presets: {', '.join(presets)})")
        values = {**presets[preset], **given, **({"config": preset} if "config" in kinds else {})}
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise UserError(f"--{name} is required (see --help)")
        try:
            config = Config(**values)
        except ValueError as error:  # the sentence of __post_init__
            raise UserError(str(error)) from error
    if os.environ.get("RANK", "0") == "0":
        changed = "".join(f" {key}={_show(value)}" for key, value in given.items())
        print(f"config: {preset}{changed}", flush=True)
    return config


def with_path(argv: list[str], flags: tuple[str, ...], words: int, *, option: str) -> list[str]:
    """`--flag … PATH` written as `--flag … --option PATH`, for the first of `flags` that has one.
    PATH is the word after the flag and its `words` values."""
    for i, word in enumerate(argv):
        place = i + 1 + words
        path = argv[place] if place < len(argv) else "--"
        if word in flags and not path.startswith("--") and path.lower() not in BOOLEANS:
            return [*argv[:place], option, *argv[place:]]
    return argv


def to_dict(config) -> dict:
    """The resolved options, ready for JSON."""
    values = dataclasses.asdict(config).items()
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values}


# --------------------------------------------------------------------------------------------------
# the command line


def _read(argv: list[str], kinds: dict[str, type]) -> dict:
    """{key: value} of the options in argv, of the types in `kinds`; "config" is the preset."""
    kinds = {**kinds, "config": str}
    given, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(
                f"unexpected argument {word!r}; options are written --key=value (see --help)"
            )
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in kinds:
            raise UserError(f"unknown option --{key}{_did_you_mean(key, kinds, '--')} (see --help)")
        following = words[0] if words else "--"
        if not equals and kinds[key] is bool and following.lower() not in BOOLEANS:
            text = "true"
        elif not equals and following.startswith("--"):
            raise UserError(f"--{key} needs a value: --{key}=<{_name(kinds[key])}>")
        elif not equals:
            text = words.pop(0)
        value = _convert(key, text, kinds[key])
        if typing.get_origin(kinds[key]) is tuple:
            given[key] = given.get(key, ()) + value
        elif key in given:
            raise UserError(f"--{key} is given twice")
        else:
            given[key] = value
    return given


def _convert(key: str, text: str, kind):
    """`text` as a value of type `kind`; UserError when it is none. A tuple gets one item."""
    if typing.get_origin(kind) is tuple:
        return (_convert(key, text, typing.get_args(kind)[0]),)
    if _optional(kind) is not None and text.lower() == "none":
        return None
    plain = _optional(kind) or kind
    literal = typing.get_origin(plain) is typing.Literal
    if plain is str or (literal and text in typing.get_args(plain)):
        return text
    if plain is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if plain in (int, float):
        try:
            value = plain(text)
        except ValueError:
            value = math.nan
        if not math.isnan(value):
            return value
    raise UserError(f"--{key}={text}: expected {_name(kind)}")


def _optional(kind):
    """T for T | None, otherwise None."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return None
    return next(part for part in typing.get_args(kind) if part is not type(None))


def _name(kind) -> str:
    if typing.get_origin(kind) is tuple:
        return f"{_name(typing.get_args(kind)[0])}, repeatable"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return f"{_name(_optional(kind))} or none" if _optional(kind) is not None else kind.__name__


def _did_you_mean(word: str, words, prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


# --------------------------------------------------------------------------------------------------
# help


def _show(value) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, tuple):
        return ",".join(map(_show, value)) or "()"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value) or '""'


def _help(Config: type, presets: dict[str, dict], fields: dict, kinds: dict[str, type]) -> str:
    """The first paragraph of the script's docstring, and a table with one column a preset."""
    module = sys.modules.get(Config.__module__)
    head = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0] if module else ""
    meanings = _comments(Config)
    which = f"which column applies; {next(iter(presets))} if not given"
    rows = [("option", "type", *presets, "meaning"), ("--config", "preset", *presets, which)]
    for name, field in fields.items():
        if name != "config":
            values = [_show(preset.get(name, field.default)) for preset in presets.values()]
            rows.append((f"--{name}", _name(kinds[name]), *values, meanings.get(name, "")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [head, ""] if head else []
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return "\n".join(lines)


def _comments(Config: type) -> dict[str, str]:
    """{field: the comment behind it} of the class and those it inherits from, from their source."""
    comments = {}
    for part in reversed(Config.__mro__[:-1]):
        try:
            lines = inspect.getsource(part).splitlines()
        except (OSError, TypeError):  # a class typed at a prompt has no source: no help texts
            continue
        for line in lines:
            if match := re.match(r" +(\w+): .*?  # (.*)", line):
                comments[match[1]] = match[2]
    return comments
