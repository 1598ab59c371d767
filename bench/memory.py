"""
What stands on a GPU in training, and what an update adds, computed without one. Not a concept
of the paper. walk.py has every phase of every command.

Weights, gradients, moments and caches are counts times bytes. Activations are not guessed: the real
forward pass runs on PyTorch's meta device, which has shapes and no memory, and what autograd keeps
for the backward pass is added up (tests/test_memory.py does the same with real tensors). Attention
and norms, which are kernels of their own on a GPU, keep there what those keep.

    always      float32 shards, gradients, two moments, reference (kl_beta), average
    update      + one block gathered and its gradient, + the prompt's graph, + one pack of members

Letters: sequence.py. Left out: fragmentation, communication buffers, CUDA itself; keep a tenth of
the card for them.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import rollouts
import tree
from engine import Prompt
from model import RMSNorm, UnifiedModel
from runtime.config import UserError
from runtime.lora import add_lora, trained_parameters
from runtime.quantised import BYTES, quantised_layers
from sequence import Layout
from vision import Reference


@dataclass(frozen=True)
class Case:
    """A step's shapes: prompt of `references` pictures of `side` pixels, one group at a time."""

    references: int = 4
    side: int = 1024
    words: int = 60
    plan: int = 150


# --------------------------------------------------------------------------------------------------
# what autograd keeps


class kept_bytes:
    """`with kept_bytes() as kept: forward` -> kept.total: bytes that autograd keeps.

    Each storage counts once, those of `parameters` not at all.
    """

    def __init__(self, parameters=()):
        self.seen = {p.untyped_storage()._cdata for p in parameters}
        self.storages = []  # alive, so that no address is given twice
        self.total = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.storages.append(storage)
            self.total += storage.nbytes()
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *rest):
        self.hooks.__exit__(*rest)


class FusedNorm(torch.autograd.Function):
    """F.rms_norm as a GPU has it: one kernel, which keeps its input and a number a row for the
    backward pass. Elsewhere PyTorch takes it apart, and keeps float32 copies."""

    @staticmethod
    def forward(ctx, weight, eps, x):
        """weight (W,), x (..., W) -> (..., W); on the meta device the shape."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x) if x.is_meta else F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, gradient):
        """The shapes of the gradients."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(weight), None, torch.empty_like(x)


def fuse_norms(model):
    """Let the norms of a model keep what they keep on a GPU. Returns the model."""
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            norm.forward = functools.partial(FusedNorm.apply, norm.weight, norm.eps)
    return model


def on_meta(packed):
    """A pack without memory."""
    tensors = {k: v for k, v in vars(packed).items() if isinstance(v, torch.Tensor)}
    made = ("order", "inverse")  # by the pack itself
    return replace(packed, **{k: v.to("meta") for k, v in tensors.items() if k not in made})


def by_layers(measure, shape):
    """measure(shape) -> bytes, of a shape with many layers, from one and from two of them.

    Every layer after the first adds the same.
    """
    one, two = (measure(replace(shape, num_hidden_layers=layers)) for layers in (1, 2))
    return one + (shape.num_hidden_layers - 1) * (two - one)


def activations(shape, packed, checkpointing, *, keys=False, prefix_rows=0, dtype=torch.bfloat16):
    """(bytes kept for the backward pass of a pack, bytes of one block while it is computed again).

    shape: of the model; keys: the pack is a prompt, whose keys and values alone are wanted;
    prefix_rows: keys of a prompt that the pack attends to.
    """
    packed = on_meta(packed)
    if prefix_rows:
        packed.key_order = torch.empty(prefix_rows + len(packed), dtype=torch.long, device="meta")

    def leaf(*size):
        return torch.empty(size, dtype=dtype, device="meta").requires_grad_()

    def built(shape):
        """A model, and for each layer the keys and values of the prompt."""
        with torch.device("meta"):
            model = fuse_norms(UnifiedModel(shape).to(dtype))
        model.checkpointing = checkpointing
        size = (prefix_rows, shape.num_key_value_heads, shape.head_dim)
        return model, [(leaf(*size), leaf(*size)) for _ in model.blocks] if prefix_rows else None

    def of_pass(shape):
        model, prefix = built(shape)
        with kept_bytes(model.parameters()) as whole:
            if keys:
                model.keys_and_values(packed)
            else:
                model(packed, prefix=prefix, losses=True)
        return whole.total

    whole = by_layers(of_pass, shape)
    if not checkpointing:
        return whole, 0
    model, prefix = built(replace(shape, num_hidden_layers=1))
    latents = len(packed.latent_index)
    und = leaf(len(packed) - latents, shape.hidden_size)  # (U, W)
    gen = leaf(latents, shape.hidden_size)  # (L, W)
    cos = torch.empty(len(packed), 1, shape.head_dim, dtype=dtype, device="meta")
    with kept_bytes(model.parameters()) as block:
        model.blocks[0](und, gen, packed, (cos, cos), None, prefix[0] if prefix else None)
    return whole + turn_bytes(shape, packed, cos.itemsize), block.total


def turn_bytes(shape, packed, width):
    """Bytes of RoPE's cos and sin (N, 1, D): checkpoint holds them where no hook sees them."""
    return 2 * len(packed) * shape.head_dim * width


# --------------------------------------------------------------------------------------------------
# a step


def a_prompt(shape, case):
    """(layout, Prompt of empty references and words, latent tokens of a picture)."""
    layout = Layout(0, 1, 2, 3, shape.latent_side, shape.vit_side)
    h, w = shape.picture_grid(case.side, case.side)
    width, height = shape.vit_rule.size(case.side, case.side)
    rows, columns = height // shape.vit_patch, width // shape.vit_patch
    latents = torch.empty(h * w, shape.token_channels)
    patches = torch.empty(rows * columns, 3 * shape.vit_patch**2)
    reference = Reference(latents, (h, w), patches, (rows, columns))
    return layout, Prompt((*[reference] * case.references, [4] * case.words)), h * w


def packs(shape, case, config):
    """(pack of the prompt, the largest pack of members), of a group cut by tree.plant."""
    layout, prompt, n = a_prompt(shape, case)
    member = config.scores * len(config.sampler.contexts) * (n + 2)
    few = min(config.group_size, 2 + config.tokens_per_pack // member)  # more than fit
    few = -(-few // config.images_per_cot) * config.images_per_cot
    few = replace(config, group_size=few)
    plans = [[4] * (case.plan - 2)] * few.plans_per_group
    ended, grid = torch.ones(len(plans), dtype=torch.bool), shape.picture_grid(case.side, case.side)
    pictures = empty_pictures(few, (n, shape.token_channels))
    captions = [""] * len(plans)
    rollout = rollouts.Rollout([prompt], plans, captions, [], ended, pictures, grid)
    planted = tree.plant(layout, rollout, 0, config=few)
    return planted.prompt, max((batch.packed for batch in planted.batches), key=len)


def empty_pictures(config, sizes):
    """What a rollout of one group would have scored; takes no memory. sizes: (T, C)."""
    nothing = torch.zeros(1).expand(config.scores, config.group_size, *sizes)  # (S, G, T, C)
    if config.likelihood == "forward":
        times = torch.full((1, config.scores), 0.5)
        return rollouts.Finished(nothing[0], nothing[:, :1].transpose(0, 1), times)
    times = torch.linspace(0.9, 0.5, config.scores + 1)
    return rollouts.Steps(nothing, nothing, times, torch.zeros(config.group_size, config.scores))


@dataclass(frozen=True)
class Graphs:
    """Tokens of the two packs of an update, and bytes that autograd keeps of them."""

    prompt_tokens: int
    member_tokens: int
    prompt: int
    members: int
    block: int  # the larger one of them while it is computed again


def plain(config):
    """The config with nothing but what decides the packs of an update and their passes.

    What was computed for it need not be computed again for one that trains other weights.
    """
    names = ("likelihood", "scored_times", "window", "tokens_per_pack", "text_guidance")
    names += ("image_guidance", "images_per_cot", "num_timesteps", "window_end", "group_size")
    names += ("rid", "checkpointing", "precision")
    return type(config)(**{name: getattr(config, name) for name in names})


@functools.cache
def graphs(shape, case, config):
    """The Graphs of a config that is `plain`."""
    shared, members = packs(shape, case, config)
    how = dict(dtype=getattr(torch, config.precision))
    prompt = activations(shape, shared, config.checkpointing, keys=True, **how)
    rest = activations(shape, members, config.checkpointing, prefix_rows=len(shared), **how)
    return Graphs(len(shared), len(members), prompt[0], rest[0], max(prompt[1], rest[1]))


def values_of(module, trained=False):
    """Number of values in the parameters of a module, or in the trained ones of them."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def value_bytes(config):
    """Bytes of one value in the arithmetic of a run."""
    return 2 if config.precision == "bfloat16" else 4


def token_bytes(shape, width):
    """Bytes of the keys and values of one token, in all layers; `width` bytes a value."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * width


def always(config, model, shards):
    """{what: bytes} that stand on each GPU between the steps.

    model: on the meta device; what is trained requires a gradient. CLIP and codec: walk.py.
    """
    trained = values_of(model, trained=True)
    frozen = held_bytes(model, values_of(model) - trained, value_bytes(config), kind=config.weights)
    return {
        "weights, frozen": frozen / (shards if config.weights == "full" else 1),
        "weights, trained": 4 * trained / shards,
        "gradients": 4 * trained / (shards if config.sum_every_pass else 1),
        "moments": 8 * trained / shards,
        "average": 4 * trained / shards * (config.average > 0),
        "reference": 4 * trained / shards * (getattr(config, "kl_beta", 0) > 0),
    }


def values_gathered(config, module):
    """Number of values that are copied to gather a module: where a GPU keeps whole weights, frozen
    ones are used as they are held (runtime/sharding.py)."""
    return values_of(module, trained=shards_of(config) == 1 or config.weights != "full")


def held_bytes(model, values, width, *, kind):
    """Bytes of so many values of a model, `width` each; kind: "full", or what the experts among
    them are rounded to (runtime/quantised.py)."""
    if kind == "full":
        return width * values
    narrow = sum(layer.weight.numel() for *_, layer in quantised_layers(model))
    return width * (values - narrow) + BYTES[kind] * narrow


def gathered_bytes(config, model):
    """Bytes of two gathered blocks, of what is no block, and of their gradients, in an update."""
    width = value_bytes(config)
    units = (*model.blocks, *model.eye.layers)  # sharded by themselves; the rest is the root

    def block_and_root(count):
        return count(model.blocks[0]), count(model) - sum(map(count, units))

    block, root = block_and_root(lambda part: values_gathered(config, part))
    block_trained, root_trained = block_and_root(lambda part: values_of(part, trained=True))
    return width * (2 * block + root) + (width + 4) * block_trained + width * root_trained


def of_update(config, model, case):
    """{what: bytes} that one update pass adds: the pack of a prompt, and a pack of its members."""
    found = graphs(model.config, case, plain(config))
    return {
        "gathered blocks and root": gathered_bytes(config, model),
        # and its keys and values as leaves, and their gradients
        "prompt's graph": found.prompt
        + 3 * token_bytes(model.config, value_bytes(config)) * found.prompt_tokens,
        "members' graph": found.members,
        "one block again": found.block,
    }


@functools.cache
def model_of(shape, train, lora_rank):
    """The model on the meta device; what is trained requires a gradient."""
    with torch.device("meta"):
        model = UnifiedModel(shape)
    if train == "lora":
        add_lora(model, lora_rank, 1.0)
    trained_parameters(model, train)  # marks them
    return model


def shards_of(config):
    """Over how many GPUs a weight is sharded; UserError if `replicas` does not divide them."""
    if config.gpus % config.replicas:
        raise UserError(f"replicas={config.replicas} does not divide {config.gpus} GPUs")
    return config.gpus // config.replicas
