"""Files that appear whole or not at all, and lines that a crash may tear."""

import pytest

from runtime import files
from runtime.config import UserError


def test_a_file_or_folder_appears_whole_or_not_at_all(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), files.published(tmp_path / "a.txt") as hidden:
        hidden.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    for text in ("first", "second"):
        with files.published(tmp_path / "folder") as hidden:
            hidden.mkdir()
            (hidden / "b.txt").write_text(text)
    assert (tmp_path / "folder" / "b.txt").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder"]


def test_a_torn_last_line_is_cut_off_and_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert files.read_lines(path) == []
    records = [{"text": "a\u2028b"}, {"text": "c\x85d"}, {"text": "\u00e9"}]
    for record in records:
        files.append_line(path, record)
    with open(path, "a") as file:
        file.write('{"text": "tor')
    assert files.read_lines(path) == records
    files.append_line(path, {"text": "again"})
    assert files.read_lines(path) == [*records, {"text": "again"}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\nno json\n{"b": 2}\n')
    with pytest.raises(UserError, match="lines.jsonl, line 2"):
        files.read_lines(tmp_path / "lines.jsonl")
