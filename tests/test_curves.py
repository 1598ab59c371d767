"""Curves of training and its strips: what is averaged, counted, and laid side by side."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from runtime.config import UserError
from studies import curves, pictures

CELL = pictures.SIDE + pictures.PAD


def run(folder, rewards, **held_out):
    """A run folder; its last step was measured."""
    folder.mkdir(parents=True)
    lines = [dict(step=i, reward=reward, kl=0.1) for i, reward in enumerate(rewards)]
    lines[-1] |= {f"held_out_{column}": value for column, value in held_out.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.mark.parametrize("steps, expected", [(6, 1 / 5), (200, 1 / 10)])
def test_curves_are_smoothed_over_five_steps_or_a_twentieth(tmp_path, steps, expected):
    logged = curves.log_of(run(tmp_path / "run", [0.0] * (steps - 1) + [1.0], PF=7.0))
    smoothed = curves.smoothed(list(logged["reward"].values()))
    assert len(smoothed) == steps
    assert smoothed[-2] == 0 and smoothed[-1] == pytest.approx(expected)
    assert logged["held_out_PF"] == {steps: 7.0}


def test_the_strips_of_a_run_become_a_sheet_and_an_animation(tmp_path, monkeypatch):
    """Beside what all strips show their last columns stand; one of other prompts is left out."""
    folder = run(tmp_path / "run", [0.0, 1.0])
    (tmp_path / "run/samples").mkdir()
    colours = {5: (255, 0, 0), 10: (0, 255, 0), 20: (0, 0, 255)}
    for step, colour in colours.items():
        rows = [(9, 9, 9), None, (7, 7, 7), colour], [(8, 8, 8), (6, 6, 6), (7, 7, 7), colour]
        cells = [
            [
                pictures.Cell((Image.new("RGB", (128, 128), c),)) if c else pictures.Cell()
                for c in row
            ]
            for row in rows
        ]
        pictures.sheet_of(cells).save(tmp_path / f"run/samples/{step:06d}.png")
    Image.new("RGB", (99, 99)).save(tmp_path / "run/samples/000007.png")
    monkeypatch.setattr(curves, "save_curves", lambda named, path: path.touch())
    curves.save_story(folder)
    assert (tmp_path / "run/curves.png").is_file()
    with Image.open(tmp_path / "run/lapse.png") as sheet:
        assert sheet.width == 6 * CELL + pictures.PAD
        for y, row in enumerate(rows):
            expected = [colour or (255, 255, 255) for colour in [*row[:3], *colours.values()]]
            middle = sheet.height - (2 - y) * CELL + CELL // 2
            assert expected == [sheet.getpixel((i * CELL + CELL // 2, middle)) for i in range(6)]
    with Image.open(tmp_path / "run/lapse.webp") as moving:
        assert moving.n_frames == 3


def test_of_many_strips_a_few_are_shown():
    assert pictures.evenly(3, 8) == [0, 1, 2]
    assert pictures.evenly(100, 4) == [0, 33, 66, 99]


def test_a_run_without_a_step_has_no_story(tmp_path):
    curves.save_story(tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_of_a_name_are_averaged(tmp_path):
    """Over the steps that all of them have."""
    axis, often, rarely = Figure().subplots(), {5: 1.0, 10: 2.0, 20: 4.0}, {10: 6.0, 20: 8.0}
    curves.draw(axis, [often, rarely], "held_out_PF", "both", "-")
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    assert drawn == [([10, 20], [4, 6]), ([5, 10, 20], [1, 2, 4]), ([10, 20], [6, 8])]
    folders = [run(tmp_path / name, [0.0, 1.0], PF=3.0) for name in "abc"]
    words = f"both={folders[0]},{folders[1]} {folders[2]}"
    curves.main(curves.Config(words, str(tmp_path / "curves.png")))
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no metrics.jsonl"):
        curves.log_of(str(tmp_path))
