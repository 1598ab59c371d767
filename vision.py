"""
Pixels in and pixels out: how a picture becomes tokens, and how latents become a picture.

A reference picture is shown to the model twice (docs/BAGEL.md §3, §9): as clean latents, so that it
can be copied, and through an eye, so that it can be understood. Each encoder has its own resize
rule:

    s = min(longest / max(w, h), 1);  s = max(s, shortest / min(w, h));  sides snap to the stride,
    the whole picture shrinks once more if it has too many pixels (linearly, as the official code
    does) or a side is still too long

    eye    SigLIP with NaViT packing: patches (row, column, channel) -> linear + learned position
           -> pre-LN transformer that attends within each picture -> LayerNorm. No class token, no
           pooling.
    codec  encode(image) -> latents and decode(latents) -> image; frozen, no part of the trained
           model. FluxCodec is BAGEL's, the FLUX.1 autoencoder: 16 channels, 8 x 8 pixels a latent.
           SpaceToDepth is the toys' one: lossless, f x f pixels become one latent of 3 f f
           channels, in [-1, 1].

Images are float (3, h, w) in [-1, 1]. Latents (c, h, w) enter the transformer as p x p patches in
raster order, each laid out (patch row, patch column, channel): C = p p c. Letters: sequence.py.

Left out: training the autoencoder, video, the unused 2-D RoPE of the official eye.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.mask import Mask

# what PIL raises for a broken picture, of one format or another
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, LookupError, TypeError, EOFError)
BROKEN += (struct.error, Image.DecompressionBombError)

MAX_PIXELS = 14 * 14 * 9 * 1024  # BAGEL's ImageTransform default


@dataclass(frozen=True)
class ResizeRule:
    """In pixels: longest and shortest side, what both sides are multiples of (docs/BAGEL.md §9)."""

    longest: int
    shortest: int
    stride: int
    max_pixels: int = MAX_PIXELS

    def size(self, width: int, height: int, images: int = 1) -> tuple[int, int]:
        """(width, height) after the resize, for one of `images` pictures of a sample."""

        def snap(side):
            return max(self.stride, int(round(side / self.stride) * self.stride))

        def apply(w, h, scale):
            return snap(round(w * scale)), snap(round(h * scale))

        scale = max(min(self.longest / max(width, height), 1.0), self.shortest / min(width, height))
        width, height = apply(width, height, scale)
        if width * height > self.max_pixels / images:
            width, height = apply(width, height, self.max_pixels / images / (width * height))
        if max(width, height) > self.longest:
            width, height = apply(width, height, self.longest / max(width, height))
        return width, height


@dataclass(frozen=True)
class Resized:
    """A reference picture at the sizes of both encoders: PIL RGB, or both as tensors. A half that
    is None was dropped as a condition."""

    for_codec: Image.Image | Tensor | None
    for_eye: Image.Image | Tensor | None

    def as_tensors(self) -> "Resized":
        """The same pixels as float (3, h, w) in [-1, 1]."""
        return Resized(
            None if self.for_codec is None else to_tensor(self.for_codec),
            None if self.for_eye is None else to_tensor(self.for_eye),
        )


@dataclass(frozen=True)
class Reference:
    """One reference picture as tokens. A half that is None was dropped as a condition."""

    latents: Tensor | None  # (h * w, C)
    latent_grid: tuple[int, int] | None  # (h, w)
    patches: Tensor | None  # (h * w, R), of a grid of its own
    patch_grid: tuple[int, int] | None  # (h, w)

    def __len__(self) -> int:
        """Tokens in a packed sequence, markers included."""
        return sum(len(part) + 2 for part in (self.latents, self.patches) if part is not None)


def open_image(path, name: str | None = None) -> Image.Image:
    """A PIL RGB picture from a file of any size and mode.

    EXIF rotation is applied, of an animation it is the first frame, transparency becomes white.
    path: or an open binary file, which errors call `name`. FileNotFoundError, ValueError.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"picture not found: {path}") from None
    except BROKEN as error:
        raise ValueError(
            f"{name or path} cannot be read as a picture ({error}); expected a PNG, JPEG or WebP"
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> RGB, transparent pixels white (the official code's pil_img2rgb)."""
    # more than 8 bits of grey, which PIL would cut off at 255
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        most, white = float(values.max()), 65535.0
        if image.mode == "F" and most <= 2:  # to 1; a little more is light that is too bright
            white = 1.0
        elif image.mode in ("I", "F"):  # any range: the least usual one that holds it
            white = next(top for top in (255.0, 65535.0, most) if most <= top)
        image = Image.fromarray((values.clip(0, white) / white * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[3])
        return white
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> float (3, h, w) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # (h, w, 3)
    return pixels.permute(2, 0, 1).float().div_(255).sub_(0.5).div_(0.5)  # (3, h, w)


def to_pil(image: Tensor) -> Image.Image:
    """Float (3, h, w) in [-1, 1] -> PIL RGB; truncated to uint8, as in the official code."""
    pixels = (image.float() * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())  # (h, w, 3)


def to_png(image: Image.Image) -> bytes:
    """PIL -> PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def resize(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """PIL RGB at the size that `rule` gives it, bicubic with antialiasing."""
    size = rule.size(*image.size)
    return image if size == image.size else image.resize(size, Image.BICUBIC)


def patchify(image: Tensor, patch: int) -> Tensor:
    """(c, h, w) -> (h / p * w / p, p * p * c), raster order, each patch (row, column, channel)."""
    channels, height, width = image.shape
    # (c, h / p, p, w / p, p)
    x = image.reshape(channels, height // patch, patch, width // patch, patch)
    # (h / p * w / p, p * p * c)
    return x.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Inverse of patchify: (h * w, p * p * c) -> (c, h * p, w * p)."""
    height, width = grid
    x = tokens.reshape(height, width, patch, patch, -1)  # (h, w, p, p, c)
    # (c, h * p, w * p)
    return x.permute(4, 0, 2, 1, 3).reshape(-1, height * patch, width * patch)


# --------------------------------------------------------------------------------------------------
# codecs


class SpaceToDepth:
    """Lossless codec of the toys: (3, h, w) <-> (3 f f, h / f, w / f). It has no weights."""

    def __init__(self, factor: int):
        self.factor = factor

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents; they have no spread, so the noise adds nothing."""
        return F.pixel_unshuffle(image, self.factor)  # (3 f f, h / f, w / f)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of one image, or (B, ...) of several."""
        return F.pixel_shuffle(latents, self.factor)  # (..., 3, h, w)


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3(channels, out_channels):
    """A 3 x 3 convolution that keeps the size."""
    return nn.Conv2d(channels, out_channels, 3, padding=1)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); x through a 1 x 1 where the channels change."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), conv3(channels, out_channels)
        self.norm2, self.conv2 = group_norm(out_channels), conv3(out_channels, out_channels)
        self.nin_shortcut = None
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (1, c, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class PixelAttention(nn.Module):
    """Single-head self-attention over all places of a feature map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        # (1, 1, h * w, c)
        q, k, v = (proj(h).flatten(2).transpose(1, 2)[:, None] for proj in (self.q, self.k, self.v))
        # (1, c, h, w)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


def middle(channels):
    """The lowest resolution of both halves; names as in the official file."""
    return nn.ModuleDict(
        {
            "block_1": ResidualBlock(channels, channels),
            "attn_1": PixelAttention(channels),
            "block_2": ResidualBlock(channels, channels),
        }
    )


def level(channels, out_channels, blocks):
    """Residual blocks at one resolution."""
    widths = [channels] + [out_channels] * blocks
    return nn.ModuleDict({"block": nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))})


def apply(blocks, h):
    """All blocks, one after another."""
    for block in blocks:
        h = block(h)
    return h


class FluxEncoder(nn.Module):
    """Image (1, 3, h, w) -> mean and log-variance of its latents, (1, 2 z, h / f, w / f)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.vae_channels * m for m in (1, *config.vae_multipliers)]
        pairs = zip(widths[:-1], widths[1:])
        self.conv_in = conv3(3, widths[0])
        self.down = nn.ModuleList(level(a, b, config.vae_blocks) for a, b in pairs)
        for stage, width in zip(self.down[:-1], widths[1:]):
            stage["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3(widths[-1], 2 * config.latent_channels)

    def forward(self, x):
        h = self.conv_in(x)
        for stage in self.down:
            h = apply(stage["block"], h)
            if "downsample" in stage:
                # (1, c, h, w) -> (1, c, h / 2, w / 2)
                h = stage["downsample"]["conv"](F.pad(h, (0, 1, 0, 1)))
        h = apply(self.mid.values(), h)
        return self.conv_out(F.silu(self.norm_out(h)))


class FluxDecoder(nn.Module):
    """Latents (B, z, h, w) -> images (B, 3, f h, f w).

    `up` is stored by resolution: its last level is applied first.
    """

    def __init__(self, config):
        super().__init__()
        multipliers = config.vae_multipliers
        widths = [config.vae_channels * m for m in (*multipliers, multipliers[-1])]
        pairs = zip(widths[:-1], widths[1:])
        self.conv_in = conv3(config.latent_channels, widths[-1])
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList(level(b, a, config.vae_blocks + 1) for a, b in pairs)
        for stage, width in zip(self.up[1:], widths[1:]):
            stage["upsample"] = nn.ModuleDict({"conv": conv3(width, width)})
        self.norm_out, self.conv_out = group_norm(widths[0]), conv3(widths[0], 3)

    def forward(self, z):
        h = apply(self.mid.values(), self.conv_in(z))
        for stage in reversed(self.up):
            h = apply(stage["block"], h)
            if "upsample" in stage:
                # nearest: (1, c, h, w) -> (1, c, 2 h, 2 w)
                h = stage["upsample"]["conv"](F.interpolate(h, scale_factor=2.0))
        return self.conv_out(F.silu(self.norm_out(h)))


class FluxCodec:
    """The FLUX.1 autoencoder: (3, h, w) in [-1, 1] <-> (z, h / f, w / f) with f = 2^(levels - 1).

    latents = scale * (mean + std * noise - shift). It is no nn.Module, so that its frozen weights
    are neither trained nor averaged nor saved with the model; `weights` holds them under the names
    of ae.safetensors. Always float32.
    """

    def __init__(self, config):
        parts = {"encoder": FluxEncoder(config), "decoder": FluxDecoder(config)}
        self.weights = nn.ModuleDict(parts).requires_grad_(False).float()
        self.scale, self.shift = config.vae_scale, config.vae_shift

    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights, fan-in scaled: the same on all processes and whenever a run goes on."""
        for name, parameter in self.weights.named_parameters():
            if parameter.ndim < 2:
                nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
            else:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.weights["encoder"].conv_in.weight.device

    @torch.no_grad()
    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mean latents, or with `noise` (z, h, w), standard normal, a sample of them."""
        moments = self.weights["encoder"](image.float()[None].to(self.device))[0]  # (2 z, h, w)
        mean, log_variance = moments.to(image.device).chunk(2)  # (z, h, w) each
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return self.scale * (z - self.shift)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, z, h, w) -> the images (B, 3, f h, f w); or one, without B."""
        z = (latents.float() / self.scale + self.shift).to(self.device)
        images = self.weights["decoder"](z if z.ndim == 4 else z[None])
        return images.view(*latents.shape[:-3], *images.shape[1:]).to(latents.device)


# --------------------------------------------------------------------------------------------------
# the eye


class EyeLayer(nn.Module):
    """Pre-LN transformer layer with full attention inside each picture."""

    def __init__(self, config, eps=1e-6):
        super().__init__()
        width, self.num_heads = config.vit_hidden_size, config.vit_num_heads
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, config.vit_intermediate_size)
        self.fc2 = nn.Linear(config.vit_intermediate_size, width)

    def forward(self, x, mask):
        h = self.layer_norm1(x)  # (V, W)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(h).unflatten(-1, (self.num_heads, -1)) for proj in projections)  # (V, H, D)
        x = x + self.out_proj(attention(q, k, v, mask).flatten(1))  # (V, W)
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class Eye(nn.Module):
    """SigLIP NaViT (docs/BAGEL.md §7); W, H and D are its own. config: model.ModelConfig."""

    def __init__(self, config):
        super().__init__()
        width = config.vit_hidden_size
        self.patch_embedding = nn.Linear(3 * config.vit_patch**2, width)
        self.position_embedding = nn.Embedding(config.vit_side**2, width)
        self.layers = nn.ModuleList(EyeLayer(config) for _ in range(config.vit_num_layers))
        self.post_layernorm = nn.LayerNorm(width, 1e-6)

    def forward(self, patches, position_ids, lengths, checkpointing=False):
        """Patches (V, R), position ids (V,), tokens of each picture -> features (V, W)."""
        counts = torch.tensor(lengths)  # (pictures,)
        ends = counts.cumsum(0).repeat_interleave(counts).to(patches.device)  # (V,)
        mask = Mask(ends, ends)  # a forest of one-run documents: every picture sees itself
        x = self.patch_embedding(patches) + self.position_embedding(position_ids)  # (V, W)
        for layer in self.layers:
            recompute = checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, x, mask, use_reentrant=False) if recompute else layer(x, mask)
        return self.post_layernorm(x)
