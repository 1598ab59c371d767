"""The command line: a mistake gives its sentence and status 2, a value arrives with its type."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from runtime import config

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Shape:
    layers: int = 4  # blocks


@dataclass(frozen=True)
class Config(Shape):
    config: str = ""  # filled by parse
    # a comment above a field is no help text
    group_size: int = 24  # samples per prompt
    lr: float = 1e-6  # learning rate, paper's value
    # nor is one below it
    rid: bool = True  # own IC-CoT for each # sample
    seed: int | None = 0
    out: str = "out/#1"
    refs: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    reward: Literal["clip_l2", "clip_cos"] = "clip_l2"

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: a group needs at least 2 samples")


PRESETS = {"toy": dict(group_size=4, lr=1), "full": {}}


SCRIPT = '''"""Stage."""
import sys
from dataclasses import dataclass

from runtime.config import parse


@dataclass(frozen=True)
class Config:
    steps: int = 3  # how long


print(parse(Config, {"toy": {}}).steps, "torch" in sys.modules)
'''


def parse(*argv, presets=PRESETS, kind=Config):
    return config.parse(kind, presets, list(argv))


def mistake(capsys, *argv, **options) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv, **options)
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("error: ")
    return error[len("error: ") : -1]


UNKNOWN = "unknown option --group_siez; did you mean --group_size? (see --help)"
NO_OPTION = "; options are written --key=value (see --help)"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--group_siez=8", UNKNOWN),
        ("--group-siez 8", UNKNOWN),
        ("--group=8", "unknown option --group; did you mean --group_size? (see --help)"),
        ("--zzz=8", "unknown option --zzz (see --help)"),
        ("--lr=1e-5 --lr=2e-5", "--lr is given twice"),
        ("--config=toy --config=toy", "--config is given twice"),
        ("--group_size=1", "group_size=1: a group needs at least 2 samples"),
        ("--config=toyy", "unknown preset 'toyy'; did you mean toy? (presets: toy, full)"),
        ("--config=huge", "unknown preset 'huge' (presets: toy, full)"),
        ("--group_size", "--group_size needs a value: --group_size=<int>"),
        ("--out --rid", "--out needs a value: --out=<str>"),
        ("--group_size=8.5", "--group_size=8.5: expected int"),
        ("--group_size=", "--group_size=: expected int"),
        ("--lr=nan", "--lr=nan: expected float"),
        ("--lr=none", "--lr=none: expected float"),
        ("--rid=maybe", "--rid=maybe: expected bool"),
        ("--rid maybe", f"unexpected argument 'maybe'{NO_OPTION}"),
        ("--seed=x", "--seed=x: expected int or none"),
        ("--sizes=3 --sizes=x", "--sizes=x: expected int"),
        ("--reward=clip", "--reward=clip: expected one of clip_l2, clip_cos"),
        ("toy", f"unexpected argument 'toy'{NO_OPTION}"),
        ("-o x", f"unexpected argument '-o'{NO_OPTION}"),
        ("--", f"unexpected argument '--'{NO_OPTION}"),
    ],
)
def test_mistakes(capsys, argv, message):
    assert mistake(capsys, *argv.split()) == message


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("", dict(group_size=4, lr=1, config="toy")),
        ("--config full", dict(group_size=24, lr=1e-6, config="full")),
        ("--group_size=6 --config=full", dict(group_size=6, config="full")),
        ("--lr=1", dict(lr=1.0)),
        ("--lr -1e-3", dict(lr=-1e-3)),
        ("--group-size 8", dict(group_size=8)),
        ("--layers=2", dict(layers=2)),
        ("--out=a=b", dict(out="a=b")),
        ("--out=", dict(out="")),
        ("--seed=none", dict(seed=None)),
        ("--seed 3", dict(seed=3)),
        ("--refs a.png --refs=b.png", dict(refs=("a.png", "b.png"))),
        ("--sizes=7", dict(sizes=(7,))),
        ("--reward=clip_cos", dict(reward="clip_cos")),
        ("--rid", dict(rid=True)),
        ("--rid --lr=2", dict(rid=True, lr=2.0)),
        ("--rid false --lr=2", dict(rid=False, lr=2.0)),
        ("--rid=YES", dict(rid=True)),
        ("--rid=1", dict(rid=True)),
        ("--rid=0", dict(rid=False)),
        ("--rid=no", dict(rid=False)),
    ],
)
def test_values_and_types(argv, expected):
    result = parse(*argv.split())
    for key, value in expected.items():
        assert getattr(result, key) == value
        assert type(getattr(result, key)) is type(value)


def test_required_fields_and_derived_fields(capsys):
    @dataclass(frozen=True)
    class Needs:
        prompt: str  # what to paint
        total: int = field(default=0, init=False)

    assert mistake(capsys, presets={"any": {}}, kind=Needs) == "--prompt is required (see --help)"
    assert "unknown option --total" in mistake(
        capsys, "--prompt=x", "--total=3", presets={"any": {}}, kind=Needs
    )
    assert parse("--prompt", "a b", presets={"any": {}}, kind=Needs).prompt == "a b"


def test_the_choice_is_printed_once(capsys, monkeypatch):
    parse("--group_size=6", "--refs=a", "--refs=b", "--rid=no")
    assert capsys.readouterr().out == "config: toy group_size=6 refs=a,b rid=false\n"
    monkeypatch.setenv("RANK", "1")
    parse()
    assert capsys.readouterr().out == ""


def test_to_dict_is_json_ready():
    result = config.to_dict(parse("--refs=a"))
    assert result["refs"] == ["a"] and result["sizes"] == [1, 2] and result["seed"] == 0
    assert list(result)[0] == "layers"


def test_help_has_a_column_per_preset_and_the_comments(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--lr=3", "--help")
    assert caught.value.code == 0
    out, error = capsys.readouterr()
    assert error == ""
    lines = out.splitlines()
    assert lines[0] == __doc__  # the head of this file
    rows = {line.split()[0]: " ".join(line.split()) for line in lines[2:]}
    assert rows["option"] == "option type toy full meaning"
    assert rows["--group_size"] == "--group_size int 4 24 samples per prompt"
    assert rows["--lr"] == "--lr float 1 1e-06 learning rate, paper's value"
    assert rows["--rid"] == "--rid bool true true own IC-CoT for each # sample"
    assert rows["--layers"] == "--layers int 4 4 blocks"
    assert rows["--seed"] == "--seed int or none 0 0"
    assert rows["--refs"] == "--refs str, repeatable () ()"
    assert rows["--config"].startswith("--config preset toy full which column")


def test_a_real_script_and_no_torch(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def run(*argv):
        command = [sys.executable, script, *argv]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    good, helped, bad = run("--steps=5"), run("--help"), run("--step=5")
    assert good.returncode == 0 and good.stdout == "config: toy steps=5\n5 False\n"
    assert helped.returncode == 0 and helped.stdout.startswith("Stage.\n")
    assert "how long" in helped.stdout
    assert bad.returncode == 2
    assert bad.stderr == "error: unknown option --step; did you mean --steps? (see --help)\n"


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error, line",
    [
        (config.UserError("give a\n picture"), "give a picture"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), "a.png: No such file"),
        (NO_SPACE, "a file: No space left on device; make room and repeat the command"),
        (FileNotFoundError("CLIP not found at w.safetensors"), "CLIP not found at w.safetensors"),
    ],
)
def test_user_errors_become_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as caught, config.exit_on_user_error():
        raise error
    assert caught.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "error", [ValueError("too many"), KeyError("x"), BrokenPipeError(errno.EPIPE, "Broken")]
)
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)), config.exit_on_user_error():
        raise error


def test_exit_on_user_error_takes_more_kinds_and_decorates(capsys):
    @config.exit_on_user_error(ValueError)
    def check(value):
        raise ValueError(f"{value} is wrong")

    for value in (1, 2):  # a decorated function can be called again
        with pytest.raises(SystemExit):
            check(value)
    assert capsys.readouterr().err == "error: 1 is wrong\nerror: 2 is wrong\n"


def test_a_letter_that_the_terminal_lacks_ends_no_run():
    code = "from dataclasses import make_dataclass; from runtime.config import parse; "
    code += "C = make_dataclass('C', [('prompt', str)]); "
    code += "print(parse(C, {'toy': {}}, ['--prompt', '图']).prompt)"
    environment = dict(os.environ, PYTHONIOENCODING="latin-1")
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.stdout == "config: toy prompt=\\u56fe\n\\u56fe\n", done.stderr
