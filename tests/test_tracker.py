"""TensorBoard and W&B get the values of metrics.jsonl; neither is needed, nothing is sent."""

import sys
import types

import pytest

from runtime.config import UserError
from runtime.tracker import Tracker


def test_nothing_is_needed_without_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker("", tmp_path, 0, options={})
    tracker.log(0, {"step": 0, "ce": 1.0})
    tracker.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {kind}"):
        Tracker(kind, tmp_path, 0, options={})


def test_wandb_is_offline_and_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    began, logged = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **how: began.append(how) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for first in (0, 3):
        tracker = Tracker("wandb", tmp_path, first, options={"lr": 1.0})
        tracker.log(first, {"step": first, "ce": 0.5})
        tracker.close()
    assert logged == [(0, {"ce": 0.5}), "end", (3, {"ce": 0.5}), "end"]
    assert began[0]["mode"] == "offline" and began[0]["config"] == {"lr": 1.0}
    assert began[0]["id"] == began[1]["id"] and began[1]["resume"] == "allow"


def test_tensorboard_events_can_be_read_again(tmp_path):
    """Where it is installed. A resumed run replaces the steps that are done again."""
    pytest.importorskip("tensorboard", reason="tensorboard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((0, 1.0), (2, 5.0)):
        tracker = Tracker("tensorboard", tmp_path, first, options={})
        for step in range(first, first + 3):
            tracker.log(step, {"step": step, "ce": value + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("ce")] == [
        (0, 1.0),
        (1, 2.0),
        (2, 7.0),
        (3, 8.0),
        (4, 9.0),
    ]
