"""Commands as a person types them, forked from a server that has imported everything once.

    run("sft.py", "--config", "smoke")                     as `python sft.py --config smoke`
    run("sft.py", "--config", "smoke", processes=2)        as `torchrun --nproc_per_node 2 sft.py …`

A process of its own reads some ten seconds of libraries before it does anything; a fork of the
server has them, and nothing else: the server itself computes nothing. Words, environment, folder,
output and exit status are those of a command. That scripts start from nothing, by themselves and
by torchrun and srun, is shown in test_commands.py, test_run.py and test_slurm.py.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRITON_INTERPRET="")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sft", "grpo", "sample", "evaluate", "curate"])


def start_server():
    """The server starts with the first command, in the environment of all."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, PYTHONPATH=str(ROOT))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def become(words, cwd, outputs, *, environment):
    """What a forked process does: it is the script."""
    for number, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = list(words)
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Command:
    """A running command, of one process or several; if one fails, the others are ended."""

    def __init__(self, *words, cwd=ROOT, processes=1):
        start_server()
        self.words = [str(word) for word in words]
        self.folder = tempfile.TemporaryDirectory()
        outputs = [Path(self.folder.name) / name for name in ("out", "err")]
        self.outputs = [str(path) for path in outputs]
        place = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
        place |= dict(MASTER_PORT=str(free_port()))
        self.processes = []
        for rank in range(processes):
            own = dict(RANK=str(rank), LOCAL_RANK=str(rank), **place) if processes > 1 else {}
            args = self.words, str(cwd), self.outputs
            one = SERVER.Process(target=become, args=args, kwargs=dict(environment=own))
            one.start()
            self.processes.append(one)

    @property
    def pids(self):
        return [one.pid for one in self.processes]

    def poll(self):
        """The exit status, None while it runs."""
        codes = [one.exitcode for one in self.processes]
        failed = [code for code in codes if code]
        if failed:
            self.kill(signal.SIGTERM)
        return None if None in codes else (failed or [0])[0]

    def kill(self, number=signal.SIGKILL):
        for one in self.processes:
            if one.exitcode is None:
                os.kill(one.pid, number)

    def wait(self, timeout=300):
        """(exit status, what it printed, what went to stderr); killed when the time is over."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                end += 60
            time.sleep(0.02)
        texts = [Path(path).read_text() if os.path.exists(path) else "" for path in self.outputs]
        self.folder.cleanup()
        return self.poll(), *texts


def run(*words, code=0, **how):
    """What a command prints; it must end with this exit status."""
    found, out, err = Command(*words, **how).wait()
    assert found == code, f"status {found}\n{out[-3000:]}{err[-3000:]}"
    return out
