"""The sheet of samples that `python data.py --show` draws of the toy world."""

import pytest
from PIL import Image

import data


def test_show_writes_a_sheet(tmp_path, capsys):
    out = tmp_path / "new" / "sheet.png"
    data.main(["--show", "--count=7", "--split=held_out", f"--out={out}"])
    with Image.open(out) as sheet:
        assert sheet.width > 700 and sheet.height == 7 * 136 + 8
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--split=test", "split 'test' does not exist"),
        ("--count=0", "count must be positive"),
        ("--max_references=12", "outside 2 to 10"),
        ("--out=a.doc", "ends in .png"),
        ("--cuont=3", "did you mean --count"),
    ],
)
def test_show_mistakes(argument, message, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main(["--show", argument])
    assert stop.value.code == 2 and message in capsys.readouterr().err
