"""
The most bytes that a piece of a run holds at once, found on the meta device. Not a concept of the
paper.

    with live_bytes() as live: ...         live.peak: of the tensors that were made inside
    forward_bytes(shape, packed, ...)      a pass of the model without gradients
    codec_bytes(shape, side)               a picture through the encoder, through the decoder
    clip_bytes(name)                       a batch of pictures through an open_clip model

The meta device has shapes and no memory: the real code runs, and each storage counts from the
moment it is made until nobody holds it. A pass is measured with one and with two layers, since
every further layer adds the same. Letters: sequence.py.
Left out: work spaces of cuDNN and cuBLAS; the parts of a compiled kernel.
"""

import functools
import logging
import weakref
from dataclasses import replace

import open_clip
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.memory import by_layers, fuse_norms, on_meta
from model import Cache, UnifiedModel
from reward import BATCH


class live_bytes(TorchDispatchMode):
    """`with live_bytes() as live: ...` -> live.peak: most bytes of the storages made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}  # {address of a storage: bytes that it counts}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tensors_of((args, kwargs or {})):  # made outside: counts nothing
            self._meet(tensor, 0)
        made = function(*args, **(kwargs or {}))
        for tensor in tensors_of(made):
            self._meet(tensor, tensor.untyped_storage().nbytes())
        return made

    def _meet(self, tensor, size):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, storage._cdata)

    def _leave(self, address):
        self.now -= self.known.pop(address)


def tensors_of(values):
    """All tensors in nested tuples, lists and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def forward_bytes(shape, packed, *, slots=0, prefix_rows=0, dtype=torch.bfloat16):
    """Most bytes beside weights, cache and prefix in a pass without gradients.

    slots: of the KV cache, 0 for none; prefix_rows: keys of a prompt that the pack attends to.
    """
    packed = on_meta(packed)
    if prefix_rows:
        packed.key_order = torch.empty(prefix_rows + len(packed), dtype=torch.long, device="meta")

    @torch.no_grad()
    def measure(shape):
        with torch.device("meta"):
            model = fuse_norms(UnifiedModel(shape).to(dtype))
            size = (prefix_rows, shape.num_key_value_heads, shape.head_dim)
            pairs = [[torch.empty(size, dtype=dtype) for _ in "kv"] for _ in model.blocks]
        cache, prefix = Cache(model, slots) if slots else None, pairs if prefix_rows else None
        with live_bytes() as live:
            _, gen = model(packed, cache, prefix)
            if len(packed.noised):
                model.velocity(packed, gen)
        return live.peak

    return by_layers(measure, shape)


@functools.cache
def codec_bytes(shape, side):
    """(encoding, decoding): most bytes of a square picture, with the picture itself."""
    if shape.codec != "flux":
        return 12 * side**2, 12 * side**2
    with torch.device("meta"):
        codec = UnifiedModel(replace(shape, num_hidden_layers=1)).codec
        grid = side // shape.codec_factor
        picture, latents = (
            torch.empty(3, side, side),
            torch.empty(shape.latent_channels, grid, grid),
        )
    with live_bytes() as encoding:
        codec.encode(picture)
    with live_bytes() as decoding:
        codec.decode(latents)
    return encoding.peak + 4 * picture.numel(), decoding.peak + 4 * latents.numel()


@functools.cache
def clip_bytes(name):
    """(its weights, most bytes beside them) of an open_clip model that embeds pictures; float32.

    (0, 0) for a name that open_clip does not know, as the toys'.
    """
    if open_clip.get_model_config(name) is None:
        return 0, 0
    logging.disable(logging.CRITICAL)  # it says that it has no weights
    try:
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta")
    finally:
        logging.disable(logging.NOTSET)
    side = model.visual.image_size
    side = side if isinstance(side, int) else side[0]
    with torch.no_grad(), live_bytes() as live:
        model.encode_image(torch.empty(BATCH, 3, side, side, device="meta"))
    weights = 4 * sum(p.numel() for p in model.parameters())
    return weights, live.peak + 4 * BATCH * 3 * side**2
