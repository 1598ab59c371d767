"""
LoRA (arXiv 2106.09685): train a small change of the generation expert in place of the expert.

    y = W x + (alpha / rank) B A x      W frozen;  A (rank, in) random, B (out, rank) zero:
                                        at first nothing changes

    add_lora(model, rank, alpha)        before sharding; reset_lora(model, seed) once it has memory
    trained_parameters(model, "lora")   what stage 2 trains; "gen" and "all" need no adapters
    merge_lora(weights, rank, alpha)    for the exported model, in BAGEL's layout like any other

Only A and B are trained, so their gradients, moments and reference (zero again) cost little. Both
matrices live in the module that they change, so that sharding and checkpointing need to know
nothing of them.

Not a concept of the paper. Left out: adapters of the understanding expert, dropout.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import distribute_tensor

from runtime.pretrained import find_model, load_config, load_tokenizer, load_weights
from runtime.processes import device
from runtime.sharding import shard

# {what stage 2 trains: parts of the names}; "gen" is the generation expert with its ways in and out
TRAINED = {
    "all": ("",),
    "gen": (".gen.", "norm_gen", "latent_in", "latent_out", "time_embedder"),
    "lora": (".lora_",),
}


class LoraLinear(nn.Linear):
    """A linear layer with an adapter, zero at first; its own weight keeps its name.

    Takes over the parameters of `linear`, and its device and type for the adapter's.
    """

    def __init__(self, linear, rank, alpha):
        width_in, width_out = linear.in_features, linear.out_features
        super().__init__(width_in, width_out, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(linear.weight.new_zeros(rank, width_in))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(width_out, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def add_lora(model, rank, alpha):
    """Give every linear layer of the generation expert an adapter."""
    for block in model.blocks:
        for name, child in list(block.gen.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block.gen, name, LoraLinear(child, rank, alpha))


@torch.no_grad()
def reset_lora(model, seed):
    """The start: A random and the same on every process, B zero. For sharded models too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.zero_()
        if name.endswith("lora_a"):
            whole = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            if hasattr(parameter, "device_mesh"):
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = distribute_tensor(whole.to(parameter.device), mesh, placements)
            parameter.copy_(whole)


@torch.no_grad()
def merge_lora(weights, rank, alpha):
    """{name: tensor} with adapters -> without: W + (alpha / rank) B A."""
    merged = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name, b in weights.items():
        if name.endswith(".lora_b"):
            layer = name.removesuffix(".lora_b")
            change = alpha / rank * (b @ weights[f"{layer}.lora_a"])  # (out, in)
            merged[f"{layer}.weight"] = weights[f"{layer}.weight"] + change
    return merged


def trained_parameters(model, what):
    """{name: parameter} of what stage 2 changes; the others are frozen.

    what: "all", "gen" (the generation expert, latents in and out, time) or "lora" (its adapters).
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED[what]))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_trained(config):
    """(model, tokenizer) of the checkpoint `config.init` for stage 2, sharded over the processes.

    What `config.train` does not train is frozen and kept in `config.precision`.
    """
    folder, narrow = find_model(config.init), getattr(torch, config.precision)

    def prepare(model):
        if config.train == "lora":
            add_lora(model, config.lora_rank, config.lora_alpha)
        trained_parameters(model, config.train)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(narrow)
        shard(model, config.precision, config.replicas)

    model = load_weights(folder, load_config(folder), device(), prepare=prepare)
    reset_lora(model, config.seed)
    model.checkpointing = config.checkpointing
    return model, load_tokenizer(folder)
