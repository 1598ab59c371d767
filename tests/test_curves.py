"""Curves of training: what is averaged, smoothed and counted, and what a missing log says."""

import json

import pytest
from PIL import Image

from runtime.config import UserError
from studies import curves


def run(folder, rewards, **held_out):
    """A run folder of two prompts x 4 members; its last step was measured."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(prompts_per_step=2, group_size=4)))
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
    (tmp_path / "sft" / "config.json").write_text("{}")  # stage 1
    with pytest.raises(UserError, match="use --over steps or seconds"):
        curves.points(folder, "pictures")
