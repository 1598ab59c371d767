"""A real SLURM of two virtual nodes on this machine: srun, the batch script, a job that is stopped.

Skipped where SLURM and munge are not installed (Debian: slurmctld slurmd slurm-client munge
slurm-wlm-basic-plugins) or where this is not root. .ci/run installs them.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime import loop, state

ROOT = Path(__file__).resolve().parents[1]
HERE = all(map(shutil.which, ("slurmctld", "slurmd", "srun", "munged"))) and os.geteuid() == 0
pytestmark = pytest.mark.skipif(not HERE, reason="needs root and SLURM's daemons")
OPTIONS = "--config smoke --samples_per_step 4 --steps 60 --save_every 1000".split()
SRUN = ["srun", "-N2", "-n2", "--ntasks-per-node=1"]
SMALLER = {  # launch/slurm.sh for this cluster, on stage 1
    "--nodes=8": "--nodes=2",
    "--ntasks-per-node=8": "--ntasks-per-node=1",
    "--gpus-per-node=8": "--comment=x",
    "--cpus-per-task=12": "--comment=x",
    "--output=slurm-%j.log": "--comment=x",
    " python ": f" {sys.executable} ",
    "${SCRIPT:-grpo.py}": str(ROOT / "sft.py"),
    '--config "${CONFIG:-full}"': "",
}


def wait_for(what, condition, seconds=60):
    begun = time.time()
    while not condition():
        assert time.time() - begun < seconds, f"{what} took longer than {seconds} s"
        time.sleep(0.3)


def output(command, environment):
    """What a command prints, whatever its status."""
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment of a two-node cluster; its daemons are stopped at the end."""
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for name in ("spool-n1", "spool-n2", "state"):
        (folder / name).mkdir()
    (folder / "cgroup.conf").touch()
    base = 17_000 + os.getpid() % 1000 * 4
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={base}
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={base + 1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={base + 2} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES State=UP
""")
    environment = dict(
        os.environ,
        MASTER_ADDR="127.0.0.1",
        SLURM_CONF=str(folder / "slurm.conf"),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TRITON_INTERPRET="",
    )
    os.makedirs("/run/munge", exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    if subprocess.run(["pgrep", "munged"], capture_output=True).returncode:
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "munged"], check=True)
    daemons = [subprocess.Popen(["slurmctld", "-D", "-f", folder / "slurm.conf"], env=environment)]
    daemons += [
        subprocess.Popen(["slurmd", "-D", "-f", folder / "slurm.conf", "-N", node], env=environment)
        for node in ("n1", "n2")
    ]
    idle = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
    try:
        wait_for("SLURM's start", lambda: output(idle, environment).strip() == "2")
        yield environment, folder
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def weights(folder):
    return load_file(folder / "model" / "ema.safetensors")


def test_srun_reports_the_stop_although_it_ends_the_slower_task(cluster):
    """The first task that leaves makes --kill-on-bad-exit terminate the other, 4 s from its end."""
    environment, _ = cluster
    slow = "os.environ['SLURM_PROCID'] == '0' and atexit.register(time.sleep, 9)"
    fast = "os.environ['SLURM_PROCID'] == '1' and time.sleep(5)"  # until the other has begun, too
    code = f"import atexit, os, time; from runtime import loop; {slow}; {fast}; loop.stop_here(1)"
    command = [*SRUN, "--kill-on-bad-exit=1", sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == loop.REQUEUE, done.stdout + done.stderr


def test_srun_starts_two_tasks_and_a_batch_script_survives_its_time_limit(cluster):
    """srun over two nodes; then launch/slurm.sh, which is signalled in the middle, requeued, and
    ends with the same bits."""
    environment, folder = cluster
    command = [*SRUN, sys.executable, str(ROOT / "sft.py"), *OPTIONS, "--out", "whole"]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 on each of 2 processes" in done.stdout and done.stdout.count("sft: model in") == 1

    script = (ROOT / "launch/slurm.sh").read_text()
    for line, ours in SMALLER.items():
        script = script.replace(line, ours)
    (folder / "job.sh").write_text(script)
    command = ["sbatch", "--parsable", "--output", str(folder / "job.log"), "job.sh"]
    command += [*OPTIONS, "--out", "stopped"]
    made = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    job, log = made.stdout.strip(), folder / "stopped" / "metrics.jsonl"

    def text():
        return (folder / "job.log").read_text()

    def has_begun():
        return log.is_file() and len(log.read_text().splitlines()) > 5

    wait_for("the first steps", has_begun, 120)
    subprocess.run(["scancel", "--signal=USR1", job], env=environment, check=True)
    wait_for("the stop", lambda: "stopped by a signal" in text(), 60)
    step = state.newest_step(folder / "stopped")
    assert 5 < step < 60
    asked = ["squeue", "--noheader", "--format=%T"]
    wait_for("the requeue", lambda: output(asked, environment).strip() == "PENDING")
    time.sleep(3)  # what a job is given in the second of its end, SLURM takes to be revoked
    subprocess.run(["scontrol", "release", job], env=environment)
    # a requeued job waits two minutes otherwise
    begin = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
    subprocess.run(begin, env=environment, capture_output=True)

    def finished():
        subprocess.run(begin, env=environment, capture_output=True)
        return "sft: model in" in text()

    wait_for("the second go", finished, 240)
    wait_for("the job's end", lambda: not output(["squeue", "--noheader"], environment))
    assert f"step {step} of 60" in text()
    a, b = weights(folder / "whole"), weights(folder / "stopped")
    assert all(torch.equal(a[name], b[name]) for name in a)
