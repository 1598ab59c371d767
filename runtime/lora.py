"""
LoRA (arXiv 2106.09685): train a small change of the generation expert in place of the expert.

    y = W x + (alpha / rank) B A x      W frozen;  A (rank, in) random, B (out, rank) zero:
                                        at first nothing changes

    add_lora(model, rank, alpha)        before sharding; reset_lora(model, seed) once it has memory
    trained_parameters(model, "lora")   what is trained; "gen" and "all" need no adapters
    merged_weight(weights, name, scale) for the exported model, in BAGEL's layout like any other

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
from runtime.sharding import shard, whole

# {what is trained: parts of the names}; "gen" is the generation expert with its ways in and out
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
def merged_weight(weights, name, scale):
    """The weight `name` of {name: tensor} as it acts: with an adapter W + scale B A, whole.

    scale: alpha / rank. One weight at a time, so that no second copy of the model is made.
    """
    layer = name.removesuffix(".weight")
    if f"{layer}.lora_b" not in weights:
        return weights[name]
    w, b, a = (whole(weights[key]) for key in (name, f"{layer}.lora_b", f"{layer}.lora_a"))
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
