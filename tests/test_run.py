"""One process and several: the same losses and gradients, states that any number can read."""

import os
import subprocess
import sys
from pathlib import Path

import faults
import forked
import pytest
import torch
import worker
from safetensors.torch import load_file

from runtime import loop, processes
from runtime.config import UserError
from runtime.lora import TRAINED

ROOT = Path(__file__).resolve().parents[1]


def torchrun(*words, processes=2, timeout=300, code=0):
    """Start processes by torchrun, on a port of its own; killed when the time is over."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *map(str, words),
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRITON_INTERPRET="")
    done = subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=timeout, cwd=ROOT
    )
    assert (done.returncode == 0) == (code == 0), done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The work of tests/worker.py by one process, by two, and the rest of it by one again."""
    folder = tmp_path_factory.mktemp("worlds")
    (folder / "tokenizer-run").mkdir()
    worker.train(folder, "first", steps=3)
    os.rename(folder / "first" / "model", folder / "init")
    worker.work(folder)
    torchrun("tests/worker.py", folder)
    worker.train(folder, "handed-on-by-2")
    return folder


def weights(folder):
    return load_file(folder / "model" / "ema.safetensors")


def close(a, b, tolerance):
    """Relative to a tensor's size, or to a thousandth of the largest (some are only rounding)."""
    assert a.keys() == b.keys()
    largest = max(tensor.float().norm() for tensor in a.values())
    for name in a:
        error = (a[name] - b[name]).float().norm() / a[name].float().norm().clamp_min(
            1e-3 * largest
        )
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("what", ["sft", "uneven"])
def test_stage_1_has_the_same_losses_and_gradients(worlds, what):
    """Also where one process has no ViT token and no label, the other no latents of a reference."""
    one, two = (load_file(worlds / f"{what}-{world}.safetensors") for world in (1, 2))
    assert not torch.equal(one.pop("passes"), passes := two.pop("passes"))  # cut otherwise
    assert what == "sft" or not torch.equal(*passes)  # the process with fewer repeats one
    torch.testing.assert_close(two["means"], one["means"], rtol=1e-5, atol=0)
    close(two, one, 1e-4)


@pytest.mark.parametrize("train", ["gen", "lora"])
def test_stage_1_of_a_part_has_the_same_gradients(worlds, train):
    """Where one process has no label, the other no latents of a reference."""
    one, two = (load_file(worlds / f"sft-{train}-{world}.safetensors") for world in (1, 2))
    one.pop("passes"), two.pop("passes")
    assert all(any(part in name for part in TRAINED[train]) for name in one if name != "means")
    close(two, one, 1e-4)


@pytest.mark.parametrize("what", ["narrow", "narrow-lora"])
def test_bfloat16_computes_nearly_the_same(worlds, what):
    """Two processes in bfloat16 that recompute their blocks, one in float32."""
    one, two = (load_file(worlds / f"{what}-{world}.safetensors") for world in (1, 2))
    one.pop("passes"), two.pop("passes")
    torch.testing.assert_close(two["means"], one["means"], rtol=1e-2, atol=0)
    close(one, two, 0.1)


STAGE_2 = ["all", "gen", "lora", "text", "forward", "forward-narrow", "plans"]
STAGE_2 += ["bare-all", "bare-gen", "bare-lora"]


@pytest.mark.parametrize("what", STAGE_2)
def test_stage_2_has_the_same_gradients(worlds, what):
    """Of whatever is trained; bare: no prompt of one process has a picture."""
    one, two = (load_file(worlds / f"grpo-{what}-{world}.safetensors") for world in (1, 2))
    one.pop("passes")
    assert not torch.equal(*two.pop("passes"))  # the process with fewer repeats its last one
    assert max(gradient.norm() for gradient in one.values()) > 0
    close(one, two, 1e-3)


def test_conditions_dropped_on_one_process_alone(tmp_path):
    """By the command line of a run: in step 3 one process has a pack without ViT tokens."""
    words = "--config smoke --vit_dropout 0.3 --samples_per_step 4 --tokens_per_pack 300"
    words = [*words.split(), "--steps", 4, "--threads", 1, "--out", tmp_path / "run"]
    forked.run("sft.py", *words, processes=2)
    assert [line["step"] for line in loop.read_log(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize("world", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(worlds, world):
    whole, half = weights(worlds / f"whole-{world}"), weights(worlds / f"half-{world}")
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert [line["step"] for line in loop.read_log(worlds / f"half-{world}")] == list(range(6))


def test_adapters_of_stage_1_go_on_bit_for_bit_on_two_processes(worlds):
    whole, half = weights(worlds / "whole-part"), weights(worlds / "half-part")
    init = load_file(worlds / "init" / "ema.safetensors")
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    moved = {name for name in init if not torch.equal(init[name], whole[name])}
    assert moved and all("moe_gen" in name for name in moved)  # the adapters, merged


@pytest.mark.parametrize("world", [1, 2])
def test_another_number_of_processes_goes_on(worlds, world):
    """Begun by `world` processes, finished by the other number: the same but for rounding."""
    close(weights(worlds / f"handed-on-by-{world}"), weights(worlds / "whole-1"), 2e-3)


def test_stage_2_runs_on_two_processes(worlds):
    lines = loop.read_log(worlds / "grpo")
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line["mismatch_clip"] < 0.1 for line in lines)
    init, after = weights(worlds / "whole-2"), weights(worlds / "grpo")
    moved = {name for name in init if not torch.equal(init[name], after[name])}
    assert moved and all("moe_gen" in name for name in moved)  # the adapters, merged


def test_placement():
    alone = (0, 0, 1, None)
    assert processes.placement({}) == alone
    by_torchrun = dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="h", MASTER_PORT="1")
    assert processes.placement(by_torchrun) == (3, 1, 4, "tcp://h:1")
    with pytest.raises(UserError, match="RANK is set, but WORLD_SIZE not: start .* torchrun"):
        processes.placement(by_torchrun | {"WORLD_SIZE": ""})
    batch_shell = dict(SLURM_JOB_ID="7", SLURM_NTASKS="8", SLURM_PROCID="0")
    assert processes.placement(batch_shell | {"SLURM_STEP_NUM_TASKS": ""}) == alone
    task = batch_shell | dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="5")
    task |= dict(SLURM_LOCALID="1", SLURM_STEP_NODELIST="gpu[003-004,010]")
    assert processes.placement(task) == (5, 1, 8, "tcp://gpu003:20700")
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS is set, but SLURM_LOCALID not"):
        processes.placement(task | {"SLURM_LOCALID": ""})


def test_each_process_takes_its_own_gpu_or_the_only_visible_one():
    assert [processes.gpu_of(rank, 8) for rank in range(8)] == list(range(8))
    assert [processes.gpu_of(rank, 1) for rank in range(8)] == [0] * 8  # --gpus-per-task=1
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: 2 are visible"):
        processes.gpu_of(2, 2)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[001-004,010]", "gpu001"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("a,b", "a"),
        ("node7", "node7"),
        ("n[5,7-9],m1", "n5"),
    ],
)
def test_first_host_of_a_list(nodes, first):
    assert processes.first_host(nodes) == first


def test_work_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 5)
    with pytest.raises(
        UserError,
        match="48 prompts cannot be shared evenly by 5 processes; use --prompts_per_step=45 or 50",
    ):
        processes.share(48, "prompts", "prompts_per_step")
    with pytest.raises(
        UserError, match="5 processes in 2 updates; use --prompts_per_step=40 or 50"
    ):
        processes.share(48, "prompts", "prompts_per_step", parts=2)
    assert processes.share(40, "prompts", "prompts_per_step", parts=2) == 8


class Forked(forked.Command):
    """Two processes with what tests/faults.py asks of torchrun, which ends the others too."""

    def __init__(self, folder):
        super().__init__(*faults.command(folder), processes=2)

    def communicate(self, timeout):
        self.returncode, out, err = self.wait(timeout)
        return (out + err).encode(), b""


def test_killed_processes_change_nothing(monkeypatch):
    """The short form of tests/faults.py."""
    monkeypatch.setattr(faults, "start", Forked)
    monkeypatch.setattr(faults, "workers", lambda launcher: launcher.pids)
    counts = faults.main(faults.Config(rounds=1, hang=False))
    assert (
        counts["kills"] == 1 and counts["finished runs"] >= 1 and counts["torn states chosen"] == 0
    )
