"""Curves of training and its strips: what is averaged, counted, and laid side by side."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from runtime.config import UserError
from studies import curves


def run(folder, rewards, **held_out):
    """A run folder; its last step was measured."""
    folder.mkdir(parents=True)
    lines = [dict(step=i, reward=reward, kl=0.1) for i, reward in enumerate(rewards)]
    lines[-1] |= {f"held_out_{column}": value for column, value in held_out.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.mark.parametrize("steps, expected", [(6, 1 / 5), (200, 1 / 10)])
def test_curves_are_smoothed_over_five_steps_or_a_twentieth(tmp_path, steps, expected):
    lines = curves.log_of(run(tmp_path / "run", [0.0] * (steps - 1) + [1.0], PF=7.0))
    smoothed = curves.smoothed(curves.values_of(lines, "reward"))
    assert len(smoothed) == steps
    assert smoothed[steps - 1] == 0 and smoothed[steps] == pytest.approx(expected)
    assert curves.values_of(lines, "held_out_PF") == {steps: 7.0}


def test_the_strips_of_a_run_become_a_sheet_and_an_animation(tmp_path, monkeypatch):
    """Beside what all strips show their last columns stand; one of other prompts is left out."""
    folder = run(tmp_path / "run", [0.0, 1.0])
    (tmp_path / "run/samples").mkdir()
    cell, colours = curves.SIDE + curves.PAD, {5: (255, 0, 0), 10: (0, 255, 0), 20: (0, 0, 255)}
    for step, colour in colours.items():
        strip = Image.new("RGB", (3 * cell + curves.PAD, cell + curves.PAD), (9, 9, 9))
        strip.paste(colour, (2 * cell + curves.PAD, 0, 3 * cell, cell))
        strip.save(tmp_path / f"run/samples/{step:06d}.png")
    Image.new("RGB", (99, 99)).save(tmp_path / "run/samples/000007.png")
    monkeypatch.setattr(curves, "save_curves", lambda named, path: path.touch())
    curves.save_story(folder)
    assert (tmp_path / "run/curves.png").is_file()
    with Image.open(tmp_path / "run/lapse.png") as sheet:
        assert sheet.width == 5 * cell + curves.PAD
        middles = [sheet.getpixel((i * cell + cell // 2, sheet.height // 2)) for i in range(5)]
    assert middles == [(9, 9, 9), (9, 9, 9), *colours.values()]
    with Image.open(tmp_path / "run/lapse.webp") as moving:
        assert moving.n_frames == 3


def test_a_lapse_keeps_the_pictures_of_its_strips():
    """Cut out of strips of two prompts, one of which has a reference less, and laid out again."""
    colours = [
        [(90, 0, 0), (0, 90, 0), (0, 0, 90), (90, 90, 0)],
        [(9, 0, 0), None, (0, 9, 0), (0, 0, 9)],
    ]
    rows = [
        [
            curves.Cell((Image.new("RGB", (128, 128), colour),)) if colour else curves.Cell()
            for colour in row
        ]
        for row in colours
    ]
    strip = curves.sheet_of(rows)
    lapse = curves.lapse([("step 1", strip), ("step 2", strip)])
    cell = curves.SIDE + curves.PAD
    for y, row in enumerate(colours):
        for x, colour in enumerate([*row, row[-1]]):
            middle = (x * cell + cell // 2, lapse.height - (2 - y) * cell + cell // 2)
            assert lapse.getpixel(middle) == (colour or (255, 255, 255))


def test_of_many_strips_some_are_shown():
    assert curves.evenly(3, 8) == [0, 1, 2]
    assert curves.evenly(100, 4) == [0, 33, 66, 99]


def test_a_run_without_a_step_has_no_story(tmp_path):
    curves.save_story(tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_of_a_name_are_averaged(tmp_path):
    one, two = (run(tmp_path / n, [0.0, x], PF=x, SC=2 * x) for n, x in (("a", 6.0), ("b", 8.0)))
    other = run(tmp_path / "c", [1.0, 1.0], PF=3.0)
    named = curves.named_runs(f"both={one},{two} {other}")
    assert named == {"both": [one, two], "c": [other]}
    axis, runs = Figure().subplots(), [curves.log_of(folder) for folder in (one, two)]
    curves.draw(axis, runs, "held_out_PF", "both", "-")
    assert [list(line.get_ydata()) for line in axis.lines] == [[7.0], [6.0], [8.0]]
    curves.save_curves(named, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as drawn:
        assert drawn.width > 500


def test_means_are_over_the_steps_that_all_runs_have():
    often, rarely = {5: 1.0, 10: 2.0, 15: 3.0, 20: 4.0}, {10: 6.0, 20: 8.0}
    assert curves.mean_of([often, rarely]) == {10: 4.0, 20: 6.0}


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no metrics.jsonl"):
        curves.log_of(str(tmp_path))
