"""
Frozen weights in 8 or 4 bits, for a model that is too large for a card otherwise.

    model, tokenizer = load_quantised(path, device, dtype, kind="nf4")
    count(model.parameters())           values, whatever they are held as

The linear layers of both experts, nine tenths of BAGEL's weights, become those of bitsandbytes:

    int8    LLM.int8 (arXiv 2208.07339): a scale a row; on a GPU activations too are rounded to 8
            bits, but for features above 6 (and, on a CPU, in evaluation mode alone)
    nf4     4 bits by the quantiles of a normal distribution (QLoRA, arXiv 2305.14314), a scale for
            each 64 values

Embeddings, the head, the eye and the codec stay as they are. The whole model passes through the
host's memory in `dtype` (7B: 29 GB), the device never holds it. Adapters may be trained beside such
weights (runtime/lora.py); they are merged into those of the checkpoint, for a small change of a
rounded weight would be lost where it is rounded again.

Not a concept of the paper. Left out: 8-bit states of the optimiser, weights rounded on disk.
It needs bitsandbytes: pip install bitsandbytes
"""

import logging

import torch
import torch.nn as nn

from runtime.config import UserError
from runtime.pretrained import load_model

BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # of one value, with its part of a scale


def load_quantised(path, device, dtype, *, kind):
    """(model, tokenizer) as `load_model`; kind: "int8", "nf4", or "full", as it is.

    UserError without bitsandbytes.
    """
    if kind == "full":
        return load_model(path, device, dtype)
    library(kind)  # before 7B are read
    model, tokenizer = load_model(path, "cpu", dtype)
    quantise(model, kind)
    if model.config.codec == "flux":  # no part of the module
        model.codec.weights.to(device)
    return model.to(device), tokenizer


def library(kind):
    """bitsandbytes; UserError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(f"--weights {kind} needs bitsandbytes: pip install bitsandbytes") from None
    # LLM.int8 says at every call that it works in float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def count(parameters):
    """Number of values in some parameters; two of 4 bits share a byte."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in parameters)


def quantised_layers(model):
    """(module, name of a layer of it, the layer) of all that `quantise` replaces."""
    for block in model.blocks:
        for expert in (block.und, block.gen):
            for name, layer in list(expert.named_children()):
                if isinstance(layer, nn.Linear):
                    yield expert, name, layer


@torch.no_grad()
def quantise(model, kind):
    """Replace the experts' linear layers; they are rounded when the model goes to a device."""
    bnb = library(kind)
    for expert, name, layer in quantised_layers(model):
        sizes, weight = (layer.in_features, layer.out_features), layer.weight.detach()
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*sizes, layer.bias is not None, False, threshold=6.0)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            made.register_forward_hook(let_go)
        else:
            made = bnb.nn.Linear4bit(
                *sizes, layer.bias is not None, weight.dtype, quant_type="nf4", device="meta"
            )
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        made.bias = layer.bias
        setattr(expert, name, made)


def let_go(layer, inputs, y):
    """Of a layer of 8 bits: let autograd forget its input, which is for a gradient of its weight,
    and which bitsandbytes keeps where recomputing blocks (checkpointing) would not free it."""
    for name in ("tensors", "A"):  # of its kernel on a GPU, of that on a CPU
        if hasattr(y.grad_fn, name):
            setattr(y.grad_fn, name, (None, None, None) if name == "tensors" else None)
