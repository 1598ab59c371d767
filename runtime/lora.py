"""
LoRA (arXiv 2106.09685): train a small change of the generation expert in place of the expert.

    y = W x + (alpha / rank) B A x      W frozen;  A (rank, in) random, B (out, rank) zero:
                                        at first nothing changes

    add_lora(model, rank, alpha)        before sharding; reset_lora(model, seed) once it has memory
    trained_parameters(model, "lora")   what is trained; "gen" and "all" need no adapters
    merged_weight(weights, name, ...)   for the exported model, in BAGEL's layout like any other

Only A and B are trained, so their gradients, moments and reference (zero again) cost little. Both
matrices live in the module that they change, so that sharding and checkpointing need to know
nothing of them. W may be rounded to 8 or 4 bits (QLoRA, runtime/quantised.py): each process then
holds all of W, adapters are sharded as ever.

Not a concept of the paper. Left out: adapters of the understanding expert, dropout.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import distribute_tensor

from runtime.pretrained import find_model, load_model
from runtime.processes import device, first_alone
from runtime.quantised import load_quantised
from runtime.sharding import shard, whole

# {what is trained: parts of the names}; "gen" is the generation expert with its ways in and out
TRAINED = {
    "all": ("",),
    "gen": (".gen.", "norm_gen", "latent_in", "latent_out", "time_embedder"),
    "lora": (".lora_",),
}


def add_lora(model, rank, alpha):
    """Give every linear layer of the generation expert an adapter."""
    for block in model.blocks:
        for child in block.gen.children():
            if isinstance(child, nn.Linear):
                add_adapter(child, rank, alpha)


def add_adapter(layer, rank, alpha):
    """Let a linear layer add B A x, zero at first; its own weight stays as it is, under its name.

    The matrices have its device, and its type unless it is rounded: then float32.
    """
    weight = layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    a = torch.zeros(rank, layer.in_features, device=weight.device, dtype=dtype)
    b = torch.zeros(layer.out_features, rank, device=weight.device, dtype=dtype)
    layer.lora_a, layer.lora_b = nn.Parameter(a), nn.Parameter(b)

    def add(layer, inputs, y):
        return y + F.linear(F.linear(inputs[0], layer.lora_a), layer.lora_b) * (alpha / rank)

    layer.register_forward_hook(add)


@torch.no_grad()
def reset_lora(model, seed):
    """The start: A random and the same on every process, B zero. For sharded models too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.zero_()
        if name.endswith("lora_a"):
            start = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            if hasattr(parameter, "device_mesh"):
                start = distribute_tensor(
                    start.to(parameter.device), parameter.device_mesh, parameter.placements
                )
            parameter.copy_(start)


@torch.no_grad()
def merged_weight(weights, name, scale, *, base):
    """The weight `name` as it acts: W, or with adapters among {name: tensor} W + scale B A, whole.

    scale: alpha / rank; base: W. One at a time, so that no second copy of the model is made.
    """
    layer = name.removesuffix(".weight")
    if f"{layer}.lora_b" not in weights:
        return base
    w, b, a = map(whole, (base, weights[f"{layer}.lora_b"], weights[f"{layer}.lora_a"]))
    return w + scale * (b @ a)  # (out, in)


def trained_parameters(model, what):
    """{name: parameter} of what training changes; the others are frozen.

    what: "all", "gen" (the generation expert, latents in and out, time) or "lora" (its adapters).
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED[what]))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_trained(config):
    """(model, tokenizer) of the checkpoint `config.init` for training, sharded over the processes.

    What `config.train` does not train is frozen and kept in `config.precision`, or rounded as
    `config.weights` says.
    """
    narrow = getattr(torch, config.precision)
    with first_alone():
        find_model(config.init)

    def prepare(model):
        if config.train == "lora":
            add_lora(model, config.lora_rank, 2 * config.lora_rank)
        trained_parameters(model, config.train)
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(narrow)
        shard(model, config.precision, config.replicas)

    if config.weights == "full":
        model, tokenizer = load_model(config.init, device(), prepare=prepare)
    else:
        model, tokenizer = load_quantised(config.init, device(), narrow, kind=config.weights)
        prepare(model)
    reset_lora(model, config.seed)
    model.checkpointing = config.checkpointing
    return model, tokenizer
