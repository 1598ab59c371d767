"""
The unified transformer: one decoder that reads pictures and text, writes text, and predicts flow
velocities.

BAGEL's Mixture of Transformers (arXiv 2505.14683; docs/BAGEL.md §1-6). Every weight of a layer
exists twice: the understanding expert works on text and ViT tokens, the generation expert on latent
tokens, clean or noised. A token's kind chooses its expert; attention is joint over all tokens of
the packed sequence. For a token x with expert e:

    n = RMSNorm_e(x);  q, k, v = W_e n;  q, k = RoPE(RMSNorm_e(q)), RoPE(RMSNorm_e(k))
    x = x + O_e attention(q, k, v)
    x = x + down_e(silu(gate_e(m)) * up_e(m)),  m = RMSNorm_e(x)
    RMSNorm(x) = weight * x / sqrt(mean(x^2) + eps)     in float32, then cast back; BAGEL's code
                                                        casts before the weight, a rounding more

In:   text     embedding table
      ViT      connector(eye(patches)) + sin-cos position
      latents  W_in(latent) + time(t) + sin-cos position        t = 0 for clean latents
Out:  und     lm_head(RMSNorm(x)) -> logits of the next token
      gen     W_out(RMSNorm(x))   -> velocity of each noised latent token

The residual stream is kept sorted by expert, [text | ViT | latents], so that each expert works on
one slice; q, k and v are brought into sequence order for attention only. With a Cache, a pack of
some rows of a sequence writes their keys and values into their slots and attends to the whole cache
(prefill, decoding, denoising). Letters: sequence.py.

Left out: dropout, biases other than q, k, v, and the official code's separate training and
inference paths.

    python model.py --config full --count     the parameter table of BAGEL-7B-MoT, on no memory
"""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn import RMSNorm
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from runtime.config import parse
from sequence import Layout, Packed
from vision import Eye, FluxCodec, Reference, Resized, ResizeRule, SpaceToDepth, patchify, resize

MAX_LOGITS = 2**26  # computed at a time in the text loss: 268 MB in float32
MLP_ROWS = {"cuda": 8192, "cpu": 512}  # computed at a time where no gradient is asked for


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; it travels with the checkpoint. The defaults are BAGEL-7B-MoT's.

    docs/BAGEL.md §1.1.
    """

    hidden_size: int = 3584
    intermediate_size: int = 18944  # width of the MLP
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 152064
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    vit_hidden_size: int = 1152
    vit_intermediate_size: int = 4304
    vit_num_layers: int = 26  # layers built; vit_config.json says one more (docs/BAGEL.md §2)
    vit_num_heads: int = 16
    vit_patch: int = 14  # pixels
    vit_side: int = 70  # side of the ViT position table, in patches
    vit_shortest: int = 224  # pixels, resize rule of the eye
    vit_longest: int = 0  # pixels; 0: what the position table holds
    codec: str = "flux"  # latents <-> pixels: "flux", or the lossless "space_to_depth" of the toys
    codec_factor: int = 8  # pixels per latent, each way
    latent_channels: int = 16
    latent_patch: int = 2  # latents per token, each way
    latent_side: int = 64  # side of the latent position table, in tokens
    image_shortest: int = 512  # pixels, resize rule of the codec
    image_longest: int = 0  # pixels; 0: what the position table holds
    vae_channels: int = 128  # of the FLUX autoencoder, at full resolution
    vae_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of its channels, at each resolution
    vae_blocks: int = 2  # residual blocks a resolution
    vae_scale: float = 0.3611  # latents = scale * (z - shift)
    vae_shift: float = 0.1159
    position_scale: float = 1.0  # highest frequency of the sin-cos tables, radians a token
    position_theta: float = 1e4  # highest over lowest frequency of the sin-cos tables

    def __post_init__(self):
        if self.codec not in ("flux", "space_to_depth"):
            raise ValueError(f"codec={self.codec!r}: expected flux or space_to_depth")
        pixels = 2 ** (len(self.vae_multipliers) - 1)
        if self.codec == "flux" and self.codec_factor != pixels:
            raise ValueError(
                f"codec_factor={self.codec_factor}: vae_multipliers make {pixels} pixels a latent"
            )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_attention_heads {heads} and "
                f"num_key_value_heads {kv_heads}: each must be a multiple of the next"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 (sin-cos position tables)"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def token_channels(self) -> int:
        """Values of one latent token, C."""
        return self.latent_patch**2 * self.latent_channels

    @property
    def token_pixels(self) -> int:
        """Side of the square of pixels behind one latent token."""
        return self.codec_factor * self.latent_patch

    @property
    def image_rule(self) -> ResizeRule:
        """Resize rule of the codec (docs/BAGEL.md §9)."""
        longest = self.image_longest or self.latent_side * self.token_pixels
        return ResizeRule(longest, self.image_shortest, self.token_pixels)

    @property
    def vit_rule(self) -> ResizeRule:
        """Resize rule of the eye."""
        longest = self.vit_longest or self.vit_side * self.vit_patch
        return ResizeRule(longest, self.vit_shortest, self.vit_patch)

    def picture_grid(self, width: int, height: int) -> tuple[int, int]:
        """(h, w) tokens of a picture of this size in pixels, after the codec's resize."""
        width, height = self.image_rule.size(width, height)
        return height // self.token_pixels, width // self.token_pixels

    def resized(
        self, image: Image.Image, as_inferencer: bool = False, *, vae: bool = True, vit: bool = True
    ) -> Resized:
        """PIL RGB -> Resized. Each encoder resizes the picture by its own rule in training.

        vae, vit: whether it has latents, and patches; what it lacks is None and costs nothing.

        BAGEL's inferencer resizes for the codec first and shows the eye the result, so small
        pictures get more ViT tokens than in training (docs/BAGEL.md §9, §16.7); `as_inferencer`
        does the same.
        """
        if as_inferencer:
            image = resize(image, self.image_rule)
        return Resized(
            resize(image, self.image_rule) if vae else None,
            resize(image, self.vit_rule) if vit else None,
        )

    def tokens_of(self, picture: Resized) -> int:
        """Tokens of a reference in a packed sequence, markers included."""
        halves = (picture.for_codec, self.token_pixels), (picture.for_eye, self.vit_patch)
        return sum(
            (image.width // side) * (image.height // side) + 2 for image, side in halves if image
        )

    def position_table(self, side: int) -> Tensor:
        """The sin-cos table (side * side, W) of this model, see `sincos_table`."""
        return sincos_table(side, self.hidden_size, self.position_scale, self.position_theta)

    def layout(self, tokenizer) -> Layout:
        """Special token ids and table sides for the sequence builder.

        ValueError: the tokenizer lacks one of BAGEL's four, or has it beyond the embeddings.
        """
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
        for name, token in zip(names, ids):
            if token is None or token == tokenizer.unk_token_id or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"the tokenizer has no special token {name} inside {self.vocab_size} embeddings"
                )
        return Layout(*ids, self.latent_side, self.vit_side)


# fmt: off
TOY = dict(
    hidden_size=160, intermediate_size=480, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=640, rope_theta=1e4,
    vit_hidden_size=192, vit_intermediate_size=576, vit_num_layers=2, vit_num_heads=4,
    vit_patch=16, vit_side=2, vit_shortest=16,
    codec="space_to_depth", codec_factor=2, latent_channels=12, latent_patch=2, latent_side=8,
    image_shortest=16, position_scale=math.pi, position_theta=16.0,
)

SMOKE = TOY | dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=1,
    vit_hidden_size=64, vit_intermediate_size=192, vit_num_layers=1, vit_num_heads=2,
)

SMALL = TOY | dict(  # 98M parameters, pictures of 64 x 64
    hidden_size=640, intermediate_size=1920, num_hidden_layers=10, num_attention_heads=10,
    vit_hidden_size=256, vit_intermediate_size=768, vit_num_layers=4, vit_side=4, latent_side=16,
)

REHEARSAL = dict(  # BAGEL's but for the widths and depths: the same grids, eye, codec and resizes
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=310,  # a plan of the toy world has some 100 tokens
    vit_hidden_size=64, vit_intermediate_size=128, vit_num_layers=2, vit_num_heads=2,
    vae_channels=32, vae_multipliers=(1, 1, 2, 2), vae_blocks=1,
)
# fmt: on

MODELS = {"toy": TOY, "smoke": SMOKE, "small": SMALL, "rehearsal": REHEARSAL, "full": {}}


class Expert(nn.Module):
    """One of the two sets of weights of a layer."""

    def __init__(self, config):
        super().__init__()
        width, eps, self.head_dim = config.hidden_size, config.rms_norm_eps, config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.input_layernorm = RMSNorm(width, eps)
        self.q_proj = nn.Linear(width, q_size)
        self.k_proj = nn.Linear(width, kv_size)
        self.v_proj = nn.Linear(width, kv_size)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, eps) for _ in range(2))
        self.o_proj = nn.Linear(q_size, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.gate_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)

    def heads(self, x, cos, sin, rows=None):
        """Queries, keys and values of x (n, W): (n, H, D), (n, K, D), (n, K, D).

        rows: those whose queries are wanted, None: all.
        """
        x = self.input_layernorm(x)
        asked = x if rows is None else take(x, rows)
        q = self.q_proj(asked).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q_cos, q_sin = (cos, sin) if rows is None else (cos[rows], sin[rows])
        return rotate(self.q_norm(q), q_cos, q_sin), rotate(self.k_norm(k), cos, sin), v

    def finish(self, x, attended):
        """Residual update from the attention output (n, H * D), then the MLP."""
        x = x + self.o_proj(attended)
        if torch.is_grad_enabled():
            return x + self._mlp(x)
        # nothing is kept for a gradient: some rows at a time, in place, bound the memory
        for part in x.split(MLP_ROWS.get(x.device.type, MLP_ROWS["cuda"])):
            part += self._mlp(part)
        return x

    def _mlp(self, x):
        """What the MLP adds to x, (n, W) -> (n, W)."""
        m = self.post_attention_layernorm(x)
        gate, up = self.gate_proj(m), self.up_proj(m)  # (n, intermediate)
        inner = F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate, True).mul_(up)
        return self.down_proj(inner)


class Block(nn.Module):
    """One layer: two experts, one attention over all tokens."""

    def __init__(self, config):
        super().__init__()
        self.und, self.gen = Expert(config), Expert(config)

    def forward(self, und, gen, packed, turn, *, both, read=None, cache=None, prefix=None):
        """und (U, W) and gen (L, W) -> the same one layer on, and the keys and values (N, K, D) of
        these rows in sequence order.

        turn: cos and sin (N, 1, D), sorted by expert, see `rope`. both: whether the generation
        expert runs; it need not where the pack has no latents. read: of these rows alone anything
        is wanted beyond keys and values, and they alone come back. cache, prefix: (keys, values) of
        this layer, (slots, K, D) and (rows before this pack, K, D), see `UnifiedModel.forward`.
        """
        cos, sin = turn
        split = len(und)
        und_rows, gen_rows = (None, None) if read is None else (read.und, read.gen)
        q, k, v = self.und.heads(und, cos[:split], sin[:split], und_rows)
        if both:
            q_gen, k_gen, v_gen = self.gen.heads(gen, cos[split:], sin[split:], gen_rows)
            q, k, v = torch.cat([q, q_gen]), torch.cat([k, k_gen]), torch.cat([v, v_gen])
        if not packed.all_text:  # from sorted by expert to the order of the sequence
            k, v = take(k, packed.inverse), take(v, packed.inverse)
        own = k, v
        if cache is not None:
            k = cache[0].index_copy_(0, packed.slots, k)
            v = cache[1].index_copy_(0, packed.slots, v)
        elif prefix is not None:
            k = take(torch.cat([prefix[0], k]), packed.key_order)
            v = take(torch.cat([prefix[1], v]), packed.key_order)
        rows = packed
        if read is not None:
            if not len(read.order):
                return und, gen, own
            rows, und, gen = read, take(und, read.und), take(gen, read.gen)
        if not rows.all_text:
            q = take(q, rows.inverse)
        attended = attention(q, k, v, rows.mask)  # (N, H, D)
        del q, k, v  # what follows needs as much memory
        if not rows.all_text:
            attended = take(attended, rows.order)
        # (U, H * D), (L, H * D)
        from_und, from_gen = attended.flatten(1).tensor_split([len(und)])
        und = self.und.finish(und, from_und)
        if both:
            gen = self.gen.finish(gen, from_gen)
        return und, gen, own


class Cache:
    """Keys and values of a packed sequence, one slot a token: (layers, slots, K, D).

    Unwritten slots are zero.
    """

    def __init__(self, model: "UnifiedModel", slots: int):
        config, weight = model.config, model.embed_tokens.weight
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)

    def take_over(self, slots: Tensor, other: "Cache") -> None:
        """Put all of another cache into these slots (a prompt that two sequences share)."""
        self.keys[:, slots], self.values[:, slots] = other.keys, other.values


class TimeEmbedder(nn.Module):
    """t in [0, 1], not scaled -> 256 features, cosines first -> MLP (docs/BAGEL.md §6.3)."""

    def __init__(self, width, features=256):
        super().__init__()
        self.features = features
        self.fc1, self.fc2 = nn.Linear(features, width), nn.Linear(width, width)

    def forward(self, t):
        half = self.features // 2
        step = torch.log(torch.tensor(1e4)) / half
        frequencies = torch.exp(-torch.arange(half, device=t.device) * step)  # (features / 2,)
        angles = t.float()[:, None] * frequencies  # (n, features / 2)
        features = torch.cat([angles.cos(), angles.sin()], -1)  # (n, features)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


class Connector(nn.Module):
    """ViT features -> width of the transformer."""

    def __init__(self, vit_width, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(vit_width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class UnifiedModel(nn.Module):
    """See the module docstring. Parameter names are ours; `official_name` gives BAGEL's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm_und, self.norm_gen = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.time_embedder = TimeEmbedder(c.hidden_size)
        self.latent_in = nn.Linear(c.token_channels, c.hidden_size)
        self.latent_out = nn.Linear(c.hidden_size, c.token_channels)
        self.eye = Eye(c)
        self.connector = Connector(c.vit_hidden_size, c.hidden_size)
        self.register_buffer("latent_positions", c.position_table(c.latent_side), persistent=False)
        self.register_buffer("vit_positions", c.position_table(c.vit_side), persistent=False)
        self.codec = FluxCodec(c) if c.codec == "flux" else SpaceToDepth(c.codec_factor)
        # recompute each block and each layer of the eye in the backward pass
        self.checkpointing = False
        # sharded over several processes: every pass with gradients runs every unit, see `_run`
        self.every_unit = False
        self.tokens = 0  # that went through the blocks, for the logs
        self.trained_tokens = 0  # of them, those in passes with gradients

    def initialise(self, seed: int) -> "UnifiedModel":
        """Fresh weights: fan-in scaled normal, residual outputs smaller with depth, no velocity.

        Word embeddings are of one, as large as what the blocks add to them; at the usual 0.02 they
        are drowned for a long time. QK-norm bounds a logit by gain^2 sqrt(head_dim); the gain
        starts where the bound is 16, so that a head can single out one token among hundreds from
        the start.
        """
        generator = torch.Generator().manual_seed(seed)
        gain = (16 / self.config.head_dim**0.5) ** 0.5
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        residual = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "eye.fc2.weight")
        embeddings = {"embed_tokens.weight": 1.0, "eye.position_embedding.weight": 0.02}
        for name, parameter in self.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                nn.init.constant_(parameter, gain)
            elif parameter.ndim < 2 or name.startswith("latent_out"):
                is_gain = "norm" in name and name.endswith("weight")
                nn.init.constant_(parameter, 1.0 if is_gain else 0.0)
            else:
                std = embeddings.get(name, parameter.shape[1] ** -0.5)
                std *= depth if name.endswith(residual) else 1
                nn.init.normal_(parameter, std=std, generator=generator)
        if self.config.codec == "flux":
            self.codec.initialise(generator)
        return self

    def embed(self, packed: Packed, both: bool = True) -> tuple[Tensor, Tensor]:
        """The packed content as vectors: understanding tokens (U, W), latent tokens (L, W).

        both: also what the pack has none of goes through its layers; an empty patch for the eye.
        """
        und = self.embed_tokens(packed.text_ids)  # (X, W)
        if len(packed.vit_index):
            patches, ids = packed.vit_patches.to(und.dtype), packed.vit_position_ids
            features = self.eye(patches, ids, packed.vit_lengths, self.checkpointing)
            seen = self.connector(features) + self.vit_positions[ids].to(und.dtype)  # (V, W)
            und = torch.cat([und, seen])  # (U, W)
        elif both and self.every_unit:
            patch = und.new_zeros(1, 3 * self.config.vit_patch**2)
            place = torch.zeros(1, dtype=torch.long, device=und.device)
            und = und + 0 * self.connector(self.eye(patch, place, (1,), self.checkpointing))
        if not both:
            return und, und[:0]
        time = take(self.time_embedder(packed.timesteps), packed.image_of_latent)  # (L, W)
        place = self.latent_positions[packed.latent_position_ids].to(und.dtype)  # (L, W)
        latents = packed.latents.view(len(place), self.config.token_channels)  # (L, C), none too
        return und, self.latent_in(latents.to(und.dtype)) + time + place

    def forward(
        self,
        packed: Packed,
        cache: Cache | None = None,
        prefix: list | None = None,
        *,
        losses: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states: understanding tokens (U, W), text first, and latent tokens (L, W).

        losses: only those of labels and noised latents; the others hold anything, and the last
        layer leaves them out.

        Rows of a larger sequence (packed.slots) need the keys and values of the others: from a
        `cache`, which they also write, or, where gradients shall flow, from a `prefix`, what
        `keys_and_values` gave for the rows before.
        """
        read = packed.reading() if losses else None
        return self._run(packed, cache, prefix, read=read)[:2]

    def fill(self, packed: Packed, cache: Cache) -> None:
        """Write the keys and values of a pack into their slots of a cache."""
        self._run(packed, cache, read=packed.reading(losses=False))

    def keys_and_values(self, packed: Packed) -> list[tuple[Tensor, Tensor]]:
        """For each layer the keys and values (N, K, D) of a pack, as a `prefix` of other rows."""
        return self._run(packed, read=packed.reading(losses=False), keep=True)[2]

    def _run(self, packed, cache=None, prefix=None, *, read=None, keep=False):
        """Hidden states und (U, W) and gen (L, W), and if asked the keys and values of each layer.

        Processes that share a model must run the same units in the same order and give the same
        weights gradients, whatever their packs hold. So with `every_unit` a pack without latents
        goes through the generation experts too: of no rows, the gradient of a weight is 0.
        """
        grad = torch.is_grad_enabled()
        self.tokens += len(packed)
        self.trained_tokens += len(packed) * grad
        both = len(packed.latent_index) > 0 or (self.every_unit and grad)
        und, gen = self.embed(packed, both)
        c, places = self.config, packed.positions[packed.order]  # (N,)
        turn = rope(places, c.head_dim, c.rope_theta, dtype=und.dtype)
        kept, last = [], len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            inputs = dict(
                both=both,
                read=read if layer == last else None,
                cache=None if cache is None else (cache.keys[layer], cache.values[layer]),
                prefix=None if prefix is None else prefix[layer],
            )
            if self.checkpointing and grad:
                rows = und, gen, packed, turn
                und, gen, own = checkpoint(block, *rows, use_reentrant=False, **inputs)
            else:
                und, gen, own = block(und, gen, packed, turn, **inputs)
            if keep:
                kept.append(own)
            del own
        und, gen = self.norm_und(und), self.norm_gen(gen)
        return (und, gen, kept) if read is None else (*read.spread(und, gen), kept)

    def velocity(self, packed: Packed, gen: Tensor) -> Tensor:
        """Velocity (M, C) of the noised tokens from the hidden states of all latents (L, W)."""
        return self.latent_out(take(gen, packed.noised))

    def cross_entropy(self, und: Tensor, packed: Packed) -> Tensor:
        """Cross entropy (labels,) of the text that carries a loss, from hidden states und (U, W).

        In chunks of MAX_LOGITS, recomputed in the backward pass: never are the logits of a whole
        pack held (at 152,064 classes and 32,768 tokens they would be 20 GB in float32, and as much
        again for their gradient).
        """

        def of_chunk(rows, labels):
            return F.cross_entropy(self.lm_head(und[rows]).float(), labels, reduction="none")

        rows, labels = packed.label_rows, packed.labels
        chunk = max(1, MAX_LOGITS // self.config.vocab_size)
        if len(rows) <= chunk:
            return of_chunk(rows, labels)
        chunks = zip(rows.split(chunk), labels.split(chunk))
        losses = [checkpoint(of_chunk, *part, use_reentrant=False) for part in chunks]
        return torch.cat(losses)  # (labels,)

    def encode_reference(self, image: Image.Image, as_inferencer: bool = False) -> Reference:
        """PIL RGB -> Reference, resized as `ModelConfig.resized` says."""
        return self.encode(self.config.resized(image, as_inferencer).as_tensors())

    def encode(self, picture: Resized, device=None) -> Reference:
        """Resized, as tensors -> Reference, its latents on `device` (none: on the CPU)."""
        latents = grid = patches = patch_grid = None
        if picture.for_codec is not None:
            latents, grid = self.to_latents(picture.for_codec.to(device))
        if picture.for_eye is not None:
            patch = self.config.vit_patch
            patches = patchify(picture.for_eye, patch)
            patch_grid = tuple(side // patch for side in picture.for_eye.shape[1:])
        return Reference(latents, grid, patches, patch_grid)

    def to_latents(
        self, image: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """(3, h, w) in [-1, 1] -> latent tokens (n, C) and their grid.

        They are the mean of what the codec says, or with a generator a sample.
        """
        patch, factor = self.config.latent_patch, self.config.codec_factor
        noise = None
        if generator is not None:
            size = (self.config.latent_channels, image.shape[1] // factor, image.shape[2] // factor)
            noise = torch.randn(size, generator=generator)
        latents = self.codec.encode(image, noise)  # (c, h, w)
        return patchify(latents, patch), (latents.shape[1] // patch, latents.shape[2] // patch)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along rows: as an embedding look-up, whose gradient is much faster on a CPU."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])  # (n, ...)


def rope(positions: Tensor, head_dim: int, theta: float, *, dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, D) of position * theta^(-2 i / D) for both halves of a head, computed in
    float32; sin with the signs that `rotate` needs, minus in the first half. docs/BAGEL.md §4.
    """
    steps = torch.arange(0, head_dim, 2, device=positions.device).float()  # (D / 2,)
    frequencies = 1 / theta ** (steps / head_dim)
    angles = positions.float()[:, None] * frequencies  # (N, D / 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # (N, D / 2)
    return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head, the Qwen / Llama form: x cos + (x, halves exchanged) sin.

    x (n, H, D).
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def sincos_table(side: int, width: int, scale: float = 1.0, theta: float = 1e4) -> Tensor:
    """(side^2, W): row r * side + c is [sin(c w), cos(c w), sin(r w), cos(r w)].

    w_j = scale * theta^(-4 j / width) (docs/BAGEL.md §6.3). BAGEL's waves of 6 to 60 thousand
    tokens suit a grid of 64; on the toys' grid of 8 neighbours would look alike, so their waves are
    2 to 32 tokens long.
    """
    frequencies = scale * theta ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, W / 4)
    wave = torch.cat([angles.sin(), angles.cos()], 1)  # (side, W / 2)
    # (side^2, W): columns, then rows
    return torch.cat([wave.repeat(side, 1), wave.repeat_interleave(side, 0)], 1).float()


def parameter_table(model: UnifiedModel) -> dict[str, int]:
    """{part: values}, docs/BAGEL.md §2; both frozen position tables count, the codec does not."""
    parts = {
        "embeddings and head": ("embed_tokens", "lm_head"),
        "understanding experts": (".und.", "norm_und"),
        "generation experts": (".gen.", "norm_gen"),
        "ViT": ("eye.",),
        "connector": ("connector.",),
        "time embedder": ("time_embedder.",),
        "vae2llm": ("latent_in.",),
        "llm2vae": ("latent_out.",),
        "latent position table": ("latent_positions",),
        "ViT position table": ("vit_positions",),
    }
    table = dict.fromkeys(parts, 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for part, keys in parts.items():
            if any(key in name for key in keys):
                table[part] += tensor.numel()
    return table


@dataclass(frozen=True)
class CountConfig(ModelConfig):
    """The model whose parameters `python model.py` counts."""

    count: bool = True  # print the number of parameters of each part


if __name__ == "__main__":
    with torch.device("meta"):  # it has shapes and no memory
        table = parameter_table(UnifiedModel(parse(CountConfig, MODELS, sys.argv[1:])))
    for part, values in [*table.items(), ("total", sum(table.values()))]:
        print(f"{part:24s}{values:18,d}")
