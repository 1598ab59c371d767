"""
LoRA (arXiv 2106.09685): train a small change of the generation expert in place of the expert.

    y = W x + (alpha / rank) B A x         W frozen;  A (rank, in) random, B (out, rank) zero: at first nothing changes

Only A and B are trained, so their gradients, moments and reference (zero again) cost little; in the exported model they
are merged into W, which is then in BAGEL's layout like any other. Both matrices live in the module that they change, so
that sharding and checkpointing need to know nothing of them.
Left out: adapters of the understanding expert, dropout.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; its own weight keeps its name."""

    def __init__(self, linear, rank, alpha):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        self.lora_a = nn.Parameter(torch.zeros(rank, linear.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
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
    """The start: A random and the same on every process, B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.zero_()
        if name.endswith("lora_a"):
            whole = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            if hasattr(parameter, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(
                    whole.to(parameter.device), parameter.device_mesh, parameter.placements
                )
            parameter.copy_(whole)


@torch.no_grad()
def merge_lora(weights, rank, alpha):
    """{name: tensor} with adapters -> without: W + (alpha / rank) B A."""
    merged = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name, b in weights.items():
        if name.endswith(".lora_b"):
            layer = name.removesuffix(".lora_b")
            merged[f"{layer}.weight"] = weights[f"{layer}.weight"] + alpha / rank * (
                b @ weights[f"{layer}.lora_a"]
            )
    return merged


def trained_parameters(model, what):
    """{name: parameter} of what stage 2 changes; the others are frozen."""
    gen = (".gen.", "norm_gen", "latent_in", "latent_out", "time_embedder")
    parts = {"all": ("",), "gen": gen, "lora": (".lora_",)}[what]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
