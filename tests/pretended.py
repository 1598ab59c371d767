"""
A GPU that is not there: tensors of the CPU that say they are on `cuda:0`, and refuse what it would.

    with pretended.gpu(monkeypatch):
        model.to("cuda")(x)                RuntimeError where x was left on the CPU

An operator that mixes tensors of both places is refused, as PyTorch does: but for numbers (0-d
tensors of the CPU), and indices into a tensor of the GPU. So whole commands can be driven, and a
forgotten `.to(device)` is found without a GPU. Values are those of the CPU, by the kernels it has
for single operators: what PyTorch composes by itself may round otherwise.

To PyTorch's own C++ such a tensor is one of the device `meta`, whose operators all come here; its
memory is the tensor that it holds.
Left out: kernels of our own (tests/test_attention.py), streams, several GPUs.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from runtime import processes

GPU, META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)  # from one place to the other
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
INDEXED += (aten._index_put_impl_.default,)


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; what it holds is the tensor of the CPU."""

    @staticmethod
    def __new__(cls, held):
        """As large and of the same type."""
        how = dict(strides=held.stride(), storage_offset=held.storage_offset())
        how |= dict(dtype=held.dtype, layout=held.layout, device=META)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **how)

    def __init__(self, held):
        self.held = held

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        return self.held.tolist()

    def __repr__(self):
        return f"OnGPU({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


def held(x):
    return x.held if isinstance(x, OnGPU) else x


def on_gpu(x):
    return OnGPU(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x


def run(operator, args, kwargs):
    """The operator on what its tensors hold; its result is where PyTorch would have it."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    place = META if any(isinstance(x, OnGPU) for x in tensors) else torch.device("cpu")
    if place == META and operator not in COPIES:
        indexed = operator in INDEXED and isinstance(args[0], OnGPU)
        refuse_mixtures(operator, [args[0], *args[2:3]] if indexed else tensors)
    if operator is aten.copy_.default:
        place = META if isinstance(args[0], OnGPU) else torch.device("cpu")
    if kwargs.get("device") is not None:
        place = torch.device(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = operator(*tree_map(held, args), **tree_map(held, kwargs))
    if place != META:
        return out
    return return_and_correct_aliasing(operator, args, kwargs, tree_map(on_gpu, out))


def refuse_mixtures(operator, tensors):
    """RuntimeError for tensors of both places, numbers apart."""
    tensors = [x for x in tensors if x.dim() or isinstance(x, OnGPU)]
    if len({isinstance(x, OnGPU) for x in tensors}) > 1:
        raise RuntimeError(f"{operator}: tensors on cuda:0 and cpu: {[x.shape for x in tensors]}")


def as_meta(x):
    """The place that PyTorch's C++ shall take for the GPU."""
    is_gpu = isinstance(x, torch.device | str) and str(x).partition(":")[0] == "cuda"
    return META if is_gpu else x


class Operators(TorchDispatchMode):
    """Runs what no tensor of the GPU is part of yet: what is made there, or copied to it."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Says meta to PyTorch where the project says cuda."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        args, kwargs = tree_map(as_meta, args), tree_map(as_meta, kwargs)
        # two that would be tensors of the meta device before anything comes here
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            return function(*args, **kwargs | {"device": "cpu"}).to(META)
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1], dtype=torch.long)
        return function(*args, **kwargs)


@contextmanager
def gpu(monkeypatch):
    """Inside, this process computes on the pretended GPU, an H100."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(processes.device, "__code__", (lambda: torch.device("cuda", 0)).__code__)
        # PyTorch 2.14 asks the driver whether the step of an optimiser is being recorded
        name = "_accelerator_graph_capture_health_check"
        patch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
        with Functions(), Operators():
            yield
