"""Curves of training and its strips: what is averaged, counted, and laid side by side."""

import json

import pytest
from PIL import Image

from runtime.config import UserError
from studies import curves


def run(folder, rewards, **held_out):
    """A run folder of two prompts x 4 members; its last step was measured."""
    folder.mkdir(parents=True)
    options = dict(prompts_per_step=2, group_size=4)
    (folder / "config.json").write_text(json.dumps({"options": options}))
    lines = [
        dict(step=i, reward=r, kl=0.1, rollout_seconds=2.0, update_seconds=1.0)
        for i, r in enumerate(rewards)
    ]
    lines[-1] |= {f"held_out_{column}": value for column, value in held_out.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.mark.parametrize("over, at", [("steps", 1), ("pictures", 8), ("seconds", 3)])
def test_what_stands_at_the_bottom(tmp_path, over, at):
    folder = run(tmp_path / "run", [-1.0, -0.5, -0.25])
    assert [x for x, _ in curves.points(folder, over)] == [at, 2 * at, 3 * at]


def test_steps_are_smoothed_and_measurements_are_not(tmp_path):
    folder = run(tmp_path / "run", [0.0] * 5 + [1.0], PF=7.0, Overall=6.0)
    lines = curves.points(folder, "steps")
    assert curves.curve(lines, "reward")[-2:] == [(5, 0.0), (6, pytest.approx(0.2))]
    assert curves.curve(lines, "held_out_PF") == [(6, 7.0)]


def test_a_long_run_is_smoothed_over_a_twentieth(tmp_path):
    lines = curves.points(run(tmp_path / "run", [0.0] * 199 + [1.0]), "steps")
    assert curves.curve(lines, "reward")[-1] == (200, pytest.approx(0.1))


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
    sheet = Image.open(tmp_path / "run/lapse.png")
    assert sheet.width == 5 * cell + curves.PAD
    middles = [sheet.getpixel((i * cell + cell // 2, sheet.height // 2)) for i in range(5)]
    assert middles == [(9, 9, 9), (9, 9, 9), *colours.values()]
    assert Image.open(tmp_path / "run/lapse.webp").n_frames == 3


def test_of_many_strips_some_are_shown():
    assert curves.some(3, 8) == [0, 1, 2]
    assert curves.some(100, 4) == [0, 33, 66, 99]


def test_a_run_without_a_step_has_no_story(tmp_path):
    curves.save_story(tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_of_a_name_are_averaged(tmp_path, capsys):
    one, two = (run(tmp_path / n, [0.0, x], PF=x, SC=2 * x) for n, x in (("a", 6.0), ("b", 8.0)))
    other = run(tmp_path / "c", [1.0, 1.0], PF=3.0)
    named = curves.named_runs(f"both={one},{two} {other}")
    assert named == {"both": [one, two], "c": [other]}
    curves.print_held_out(named, "pictures")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("both: pictures 16  PF 7.000  SC 14.000") and "PF 3.000" in second
    curves.save_curves(named, tmp_path / "curves.png", "pictures")
    assert Image.open(tmp_path / "curves.png").width > 500


def test_means_are_of_points_that_belong_together():
    often, rarely = [(5, 1.0), (10, 2.0), (15, 3.0), (20, 4.0)], [(10, 6.0), (20, 8.0)]
    assert curves.aligned([often, rarely]) == [((10, 2.0), (10, 6.0)), ((20, 4.0), (20, 8.0))]
    seconds = [(11.0, 6.0), (21.0, 8.0)]
    assert curves.aligned([often, seconds])[0] == ((5, 1.0), (11.0, 6.0))


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no metrics.jsonl"):
        curves.points(str(tmp_path), "steps")
    folder = run(tmp_path / "sft", [0.0])
    (tmp_path / "sft" / "config.json").write_text('{"options": {}}')  # stage 1
    with pytest.raises(UserError, match="use --over steps or seconds"):
        curves.points(folder, "pictures")
