"""The bookkeeping of a run: what may change, what is counted, what is refused before it starts."""

import dataclasses
import gc
import json
import signal
import subprocess
import weakref

import pytest
import torch

import evaluate
import grpo
import sample
import sft
import toy.prepare
from engine import Engine, Result
from model import SMOKE, ModelConfig, UnifiedModel
from runtime import loop, pretrained, processes
from runtime.config import UserError, parse
from runtime.state import TrainingState
from studies import metrics
from toy.prepare import prepare
from toy.tokenizer import train_tokenizer

SFT = dataclasses.replace(sft.Config(config="smoke", **sft.PRESETS["smoke"]), threads=1)
GRPO = dataclasses.replace(grpo.Config(config="smoke", **grpo.PRESETS["smoke"]), threads=1)


def strict(text):
    """The value of a JSON text; ValueError for NaN and the infinities, which are no JSON."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


BOUNDS_MEMORY = dict(pictures_at_once=3, eval_batch=2, checkpointing=True)  # but for the last bits


@pytest.mark.parametrize(
    "base, change", [(GRPO, BOUNDS_MEMORY), (SFT, dict(workers=2, tokens_per_pack=900))]
)
def test_what_bounds_memory_alone_may_change_and_the_refusal_says_so(tmp_path, base, change):
    config = dataclasses.replace(base, out=str(tmp_path / "run"))
    loop.start(config, {})
    for name, value in change.items():
        loop.start(dataclasses.replace(config, **{name: value}), {})
    with pytest.raises(UserError, match="now lr=0.5.*what may change") as refused:
        loop.start(dataclasses.replace(config, lr=0.5), {})
    assert all(name in str(refused.value) for name in change)


@pytest.mark.parametrize("module, base", [(grpo, GRPO), (sft, SFT)])
def test_a_run_goes_on_after_options_came_and_went(tmp_path, module, base):
    """By the code of before it had what its preset says of an option that came; one that went
    counts if it had another value than the one that is left."""
    config, preset = dataclasses.replace(base, out=str(tmp_path / "run")), module.PRESETS["smoke"]
    loop.start(config, preset)
    path = tmp_path / "run/config.json"
    about = json.loads(path.read_text())
    del about["options"]["picture_side"]
    about["options"] |= {"rid": True, "keep": 7, "scale": 1}
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match="was made with picture_side=32, now picture_side=64"):
        loop.start(dataclasses.replace(config, picture_side=64), preset)
    loop.start(config, preset)
    about["options"]["rid"] = False
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match="made with rid=False, an option that is gone .*e5ac0e4"):
        loop.start(config, preset)


# --------------------------------------------------------------------------------------------------
# stage 1 before stage 2


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(init="out/typo"), "out/typo"),
        (dict(init="out/smoke-stf"), "smoke-stf"),
        (dict(clip="ViT-L-14:openai", init="out/full-sft"), "out/full-sft"),
    ],
)
def test_only_a_toy_trains_stage_1_and_under_its_own_name(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError, match=words):
        prepare(dataclasses.replace(GRPO, **change))
    assert not list((tmp_path / "out").iterdir())  # nothing was trained, no CLIP either


@pytest.mark.parametrize("preset", ["smoke", "full"])
def test_a_mistyped_init_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, capsys, preset):
    """Or the folder would belong to the mistake: the right --init would be refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    words = ["--config", preset, "--init", "out/smoke-stf", "--threads", "1"]
    with pytest.raises(SystemExit) as stopped:
        grpo.train(parse(grpo.Config, grpo.PRESETS, words))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    assert "out/smoke-stf" in error and "python sft.py" in error
    assert not list((tmp_path / "out").iterdir())


def test_full_trains_no_stage_1_whatever_its_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(grpo.Config(config="full"), clip="clip")
    with pytest.raises(FileNotFoundError, match="out/full-sft"):
        prepare(config)


def test_a_name_on_the_hub_is_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "llm_config.json").write_text("{}")
    fetched, trained = [], []

    def download(name):
        fetched.append(name)
        return tmp_path / "hub"

    monkeypatch.setattr(pretrained, "download", download)
    monkeypatch.setattr(toy.prepare, "train_clips", trained.append)
    monkeypatch.setattr(toy.prepare, "run_stage_1", lambda config: pytest.fail("trained"))
    prepare(dataclasses.replace(GRPO, init="owner/name"))
    assert fetched == ["owner/name"] and len(trained) == 1


def test_a_toy_trains_its_own_stage_1_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = []

    def run_stage_1(config):
        trained.append(config.init)
        folder = tmp_path / config.init / "model"
        folder.mkdir(parents=True)
        (folder / "llm_config.json").write_text("{}")

    monkeypatch.setattr(toy.prepare, "train_clips", lambda config: None)
    monkeypatch.setattr(toy.prepare, "run_stage_1", run_stage_1)
    prepare(GRPO)
    prepare(GRPO)
    assert trained == ["out/smoke-sft"]


def test_stage_1_has_the_seed_and_the_samples_of_stage_2(monkeypatch):
    asked = []

    def run(command, env):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(toy.prepare.subprocess, "run", run)
    toy.prepare.run_stage_1(dataclasses.replace(GRPO, seed=7, max_references=5))
    pairs = list(zip(asked, asked[1:]))
    assert {("--seed", "7"), ("--max_references", "5"), ("--picture_side", "32")} <= set(pairs)


# --------------------------------------------------------------------------------------------------
# a run


@pytest.fixture
def run(tmp_path):
    """(make, engine, folder): `make(**options)` begins the run of a fresh smoke model."""
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    engine = Engine(model, train_tokenizer(tmp_path / "tokenizer", model.config.vocab_size))
    parameters = dict(model.named_parameters())
    state = TrainingState(parameters, torch.optim.SGD(parameters.values(), 0.1), {})

    def make(**options):
        config = dataclasses.replace(SFT, out=str(tmp_path / "run"), **options)
        one = loop.Run(loop.start(config, {}), config, state, desc="test")
        one.steps()
        return one

    return make, engine, tmp_path / "run"


def test_rounding_that_decides_what_is_clipped_is_said_once(run, capsys):
    make, *_ = run
    one = make(save_every=100)
    for step, mismatch in enumerate((0.01, 0.2, 0.3)):
        values = {"step": step, "mismatch_clip": mismatch}
        one.end_step(step, values, finite=True, decay=0.0, samples=[])
    said = capsys.readouterr()
    assert said.err.count("warning") == 1 and "warning" not in said.out
    (line,) = [line for line in said.err.splitlines() if "warning" in line]
    assert "mismatch_clip" in line and "clip range" in line


def test_a_job_log_has_a_line_a_step(run, capsys):
    make, *_ = run
    one = make(save_every=100)
    values = {"step": 0, "ce": 0.52341, "mse": 0.25, "seconds": 1.5, "lr": 1e-3}
    one.end_step(0, values, finite=True, decay=0.0, samples=[])
    total = one.config.steps
    assert f"test: step 1 of {total}, ce 0.5234 mse 0.25, 1.5 s\n" in capsys.readouterr().out


def test_states_are_saved_by_time_too(run):
    make, _, folder = run
    one = make(save_every=100)
    for step, minutes in enumerate((9, 11, 1)):  # since the last
        one.saved_at -= 60 * minutes - 60 * (step == 1) * 9
        one.end_step(step, {"step": step}, finite=True, decay=0.0, samples=[])
        assert (folder / f"state-{step + 1:06d}").is_dir() == (step == 1)


def test_states_by_time_take_a_twentieth_of_it_at_most(run, monkeypatch):
    make, _, folder = run
    one, now = make(save_every=100, steps=9), [1000.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    save, one.saved_at, saved = loop.save_state, now[0], []

    def slowly(*words):
        save(*words)
        now[0] += 60  # seconds

    monkeypatch.setattr(loop, "save_state", slowly)
    for step, passed in enumerate((601, 601, 500, 601, 601)):
        now[0] += passed
        one.end_step(step, {"step": step}, finite=True, decay=0.0, samples=[])
        saved.append((folder / f"state-{step + 1:06d}").is_dir())
    assert saved == [True, False, False, True, False]  # SAVING times 60 seconds after the first


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04K\x01.", b"\x80\x04}\x94."])
def test_metadata_of_garbage_is_a_torn_state_in_one_line(run, content):
    make, _, folder = run
    one = make(save_every=1)
    one.end_step(0, {"step": 0}, finite=True, decay=0.0, samples=[])
    (folder / "state-000001/.metadata").write_bytes(content)
    with pytest.raises(UserError, match="state-000001 is torn .*; delete it to continue") as torn:
        one.state.load(folder, 1)
    assert "\n" not in str(torn.value)


def test_a_signal_saves_what_is_not_saved_yet(run, capsys):
    make, _, folder = run
    one = make(save_every=100)
    one.stop.flag = True
    with pytest.raises(SystemExit) as stopped:
        one.end_step(0, {"step": 0}, finite=True, decay=0.0, samples=[])
    assert stopped.value.code == loop.REQUEUE and (folder / "state-000001").is_dir()
    assert "after step 1;" in capsys.readouterr().out


def test_what_is_not_finite_is_null_on_disk(run, capsys):
    make, _, folder = run
    one = make(save_every=100)
    for step in range(loop.BAD_STEPS - 1):
        values = {"step": step, "ce": float("nan"), "grad_norm": float("inf"), "n": 1}
        one.end_step(step, values, finite=False, decay=0.0, samples=[])
    lines = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "ce": None, "grad_norm": None, "n": 1}
    with pytest.raises(UserError, match="without a finite gradient"):
        one.end_step(2, values, finite=False, decay=0.0, samples=[7])
    (bad,) = folder.glob("bad-step-*.json")
    assert strict(bad.read_text())["values"]["ce"] is None


def test_a_system_without_sigusr1(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.delattr(signal, "SIGUSR1")
    try:
        assert not loop.Stop().wanted()
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------------------
# the final table


def test_toys_paint_fifty_prompts_at_once_and_larger_models_one():
    for module in (sft, grpo):
        assert module.Config().held_out.batch == 1
        assert module.Config(**module.PRESETS["toy"]).held_out.batch == 50
    assert parse(grpo.Config, grpo.PRESETS, ["--eval_batch", "3"]).held_out.batch == 3


@pytest.mark.parametrize(
    "module, option, value, words",
    [
        *[(stage, "eval_batch", 0, "a number above 0") for stage in (sft, grpo)],
        *[(stage, "save_every", 0, "a number above 0") for stage in (sft, grpo)],
        (sft, "workers", -1, "0 or more"),
        *[(stage, "lr", -1.0, "0 or more") for stage in (sft, grpo)],
        *[(stage, "average", 2.0, "0 or more, and below 1") for stage in (sft, grpo)],
        (sft, "plan_dropout", 2.0, "a share from 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(capsys, module, option, value, words):
    """Before anything is written: the folder of a run would keep the mistake."""
    with pytest.raises(SystemExit) as refused:
        parse(module.Config, module.PRESETS, ["--config", "smoke", f"--{option}", str(value)])
    (line,) = capsys.readouterr().err.splitlines()
    assert refused.value.code == 2 and f"{option}={value}: expected {words}" in line


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch=0"):
        evaluate.Config(batch=0)


@pytest.fixture
def tables(monkeypatch):
    """compare_checkpoints with nothing painted: the types of the weights that it loads."""
    asked = []

    def load(path, where, dtype, *, kind):
        asked.append((dtype, kind))
        return path, None

    monkeypatch.setattr(metrics, "load_quantised", load)
    monkeypatch.setattr(metrics, "Engine", lambda *parts: parts)
    monkeypatch.setattr(metrics, "save_grid", lambda *_, **__: None)
    row = dict.fromkeys(metrics.COLUMNS, (float("nan"), 0))
    monkeypatch.setattr(metrics, "means", lambda *_: row)
    held = metrics.HeldOut(count=1)
    monkeypatch.setattr(metrics.HeldOut, "paint", lambda *_: [Result("", None, [], False, None)])
    return held, asked


@pytest.mark.parametrize(
    "where, precision, dtype",
    [
        ("cpu", "float32", torch.float32),
        ("cpu", "bfloat16", torch.float32),  # slower there, and no smaller than what trained
        ("cuda", "bfloat16", torch.bfloat16),
        ("cuda", "float32", torch.float32),
    ],
)
def test_the_final_table_is_in_the_runs_precision(
    tables, tmp_path, monkeypatch, where, precision, dtype
):
    held, asked = tables
    monkeypatch.setattr(metrics, "device", lambda: torch.device(where))
    how = dict(folder=tmp_path, held_as=(precision, "nf4"))
    metrics.compare_checkpoints({"a": "x"}, held, None, **how)
    assert asked == [(dtype, "nf4")]
    assert strict((tmp_path / "table.json").read_text())["a"]["PF"] is None


def test_the_final_table_comes_after_the_training_state_is_gone(tables, tmp_path, monkeypatch):
    """A cycle, as sharded modules make them, keeps memory until it is collected."""

    class State:
        pass

    held, alive, state = tables[0], [], State()
    state.me, seen = state, weakref.ref(state)

    def load(path, where, dtype, *, kind):
        alive.append(seen())
        return path, None

    monkeypatch.setattr(metrics, "load_quantised", load)
    how = dict(folder=tmp_path, held_as=("float32", "full"))
    gc.disable()
    try:
        del state
        metrics.compare_checkpoints({"a": "x"}, held, None, **how)
    finally:
        gc.enable()
    assert alive == [None]


# --------------------------------------------------------------------------------------------------
# processes and devices


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "0"}, "RANK is set, but LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        (dict.fromkeys(["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"], "x"), "MASTER_ADDR"),
        (dict.fromkeys(processes.TORCHRUN, "x"), "'x'"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_LOCALID"),
    ],
)
def test_half_a_launcher_is_one_line(environment, words, tmp_path, monkeypatch, capsys):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        sft.train(dataclasses.replace(SFT, out="run"))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and words in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def machine(monkeypatch, *, cuda=0, mps=False):
    """What this machine seems to have."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    "has, name", [(dict(cuda=2, mps=True), "cuda"), (dict(mps=True), "mps"), (dict(), "cpu")]
)
def test_the_best_device_is_found(monkeypatch, has, name):
    machine(monkeypatch, **has)
    dtype = torch.float32 if name == "cpu" else torch.bfloat16
    assert processes.placed("auto", "auto") == (torch.device(name), dtype)
    assert processes.placed("auto", "float32") == (torch.device(name), torch.float32)
    assert processes.placed("cpu", "auto") == (torch.device("cpu"), torch.float32)
    for module in (sample, evaluate):
        assert module.Config().device == "auto"


@pytest.mark.parametrize(
    "name, words",
    [
        ("gpu", "expected auto, cuda, mps or cpu"),
        ("cuda", "here there is cpu"),
        ("mps", "here there is cpu"),
        ("cpu:x", "expected auto"),
    ],
)
def test_devices_that_are_not_there(name, words, monkeypatch):
    machine(monkeypatch)
    with pytest.raises(UserError, match=words):
        processes.placed(name, "auto")


@pytest.mark.parametrize("name", ["cuda:2", "cuda:one", "cuda:"])
def test_a_device_number_that_is_not_there(name, monkeypatch):
    machine(monkeypatch, cuda=2)
    with pytest.raises(UserError, match=f"--device={name}"):
        processes.placed(name, "auto")
    assert processes.placed("cuda:1", "auto")[0] == torch.device("cuda:1")
