"""Every test file imports the project's modules from the root, on one thread, offline."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidia0"):  # no GPU: Triton kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from runtime import processes  # noqa: E402

torch.set_num_threads(1)

# files with the longest chains come first, so that two processes end at about the same time
LONG = ["test_run", "test_commands", "test_road", "test_curate", "test_options", "test_accountant"]


def pytest_collection_modifyitems(items):
    """In the order of LONG, then as they were."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def say_it_again():
    """A warning comes once a process; each test counts as one."""
    processes.warn.cache_clear()


@pytest.fixture
def world_of_one():
    """A process group of one process, as a run on one GPU has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def loop_bounds_in_the_interpreter(monkeypatch):
    """Triton 3.6 makes a loop's bounds int(array of one number), which NumPy 2.5 refuses."""
    from kernels.triton_attention import interpreted

    if not interpreted():
        return
    from triton.runtime import interpreter as I

    patch = I._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        # the scope, which set it, takes it away again
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(I, "_patch_lang_tensor", patch_lang_tensor)
