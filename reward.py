"""
CLIP-L2, the surrogate reward of Re-Align (arXiv 2601.05124): does the picture show what its own plan said?

    e = E(x) / |E(x)|      CLIP's embedding of the picture x
    u = T(c) / |T(c)|      CLIP's embedding of c, the text of <out_caption> that the sample itself wrote
    clip_cos   s = e . u
    clip_l2    r = -|e - u| = -sqrt(2 - 2 s)      the same ranking; no task reward model, no labels
    CLIP_out   100 s, with the true caption       the metric of the paper's ablation, from another CLIP

Any open_clip model can be the judge. For the toy world there is `train_toy_clip`: a small open_clip CLIP, trained on
pairs of the toy world with the usual contrastive loss and with captions that have exactly one wrong fact, because a
picture that is nearly right is what the reward must tell from one that is right.
A reward never invents a number: what cannot be loaded or scored raises. Captions longer than the CLIP can read are
counted in `truncated`. Left out: gradients through the reward, other reward models.

    clip = Clip("ViT-L-14", "openai");   clip.score(pictures, captions)                                    # (N,)
    train_toy_clip("out/toy-clip", seed=0, steps=400);   Clip("toy", "out/toy-clip")
"""

import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

# pictures or captions that go through the CLIP at once; bounds the memory, not the result
BATCH = 64


class Clip:
    """A frozen CLIP. Embeddings are unit vectors in float32, without gradients; `truncated` counts captions cut."""

    def __init__(
        self, name: str, pretrained: str, device: str = "cpu", cache_dir: str | None = None
    ):
        """name: an open_clip architecture, e.g. "ViT-B-32"; pretrained: a tag of it ("openai", ...), or a local
        .safetensors file in open_clip's layout (for OpenAI's weights write name="ViT-B-32-quickgelu"), or a folder
        written by `train_toy_clip` (the name is then free). cache_dir: where downloads go.

        ValueError / FileNotFoundError: unknown name or tag, missing or unsuitable file; OSError: download failed.
        """
        if Path(pretrained).is_dir():
            self.model, preprocess = _load_toy(Path(pretrained))
            self.tokenizer = open_clip.SimpleTokenizer()
        else:
            self.model = _load_open_clip(name, pretrained, cache_dir)
            preprocess = self.model.visual.preprocess_cfg
            self.tokenizer = open_clip.get_tokenizer(name, cache_dir=cache_dir)
        self.model.to(device).float().eval().requires_grad_(False)
        self.device, self.preprocess, self.truncated = device, preprocess, 0

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image] | torch.Tensor) -> torch.Tensor:
        """PIL pictures of any size and mode, or floats (N, 3, H, W) in [-1, 1] -> unit vectors (N, D)."""
        features = []
        for start in range(0, len(images), BATCH):
            batch = _pixels(images[start : start + BATCH], self.preprocess, self.device)
            features.append(self.model.encode_image(batch))
        return _unit(features, "picture")

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        """N captions -> unit vectors (N, D). Those over the CLIP's context length are cut and counted."""
        for index, caption in enumerate(captions):
            if not caption.strip():
                raise ValueError(
                    f"caption {index} is empty: there is nothing to compare the picture with"
                )
        length, features = self.model.context_length, []
        for start in range(0, len(captions), BATCH):
            # (N, length)
            tokens = self.tokenizer(captions[start : start + BATCH], context_length=length)
            longer = self.tokenizer(captions[start : start + BATCH], context_length=length + 1)[
                :, :length
            ]
            # cutting moves the end token, else both agree
            self.truncated += int((tokens != longer).any(1).sum())
            features.append(self.model.encode_text(tokens.to(self.device)))
        return _unit(features, "caption")

    def score(self, images, captions: list[str], kind: str = "clip_l2") -> torch.Tensor:
        """The reward of picture i under its own caption i, (N,).

        images: as in `embed_images`; kind: "clip_l2" (from -2 to 0) or "clip_cos" (from -1 to 1).
        """
        if len(images) != len(captions):
            raise ValueError(
                f"{len(images)} pictures and {len(captions)} captions: each picture needs its own"
            )
        return compare(self.embed_images(images), self.embed_captions(captions), kind)

    def clip_out(self, images, captions: list[str]) -> torch.Tensor:
        """100 * cosine, (N,): the paper's CLIP_out when the captions are the true ones."""
        return 100 * self.score(images, captions, "clip_cos")


def compare(e: torch.Tensor, u: torch.Tensor, kind: str) -> torch.Tensor:
    """The reward of unit vectors e of pictures and u of captions, (..., D) and (..., D) -> (...), broadcast."""
    if kind not in ("clip_l2", "clip_cos"):
        raise ValueError(f"unknown reward {kind!r}: expected clip_l2 or clip_cos")
    return -(e - u).norm(dim=-1) if kind == "clip_l2" else (e * u).sum(-1)


def _unit(features: list[torch.Tensor], what: str) -> torch.Tensor:
    if not features:
        raise ValueError(f"there is no {what} to embed")
    features = torch.cat(features).float()
    bad = (~torch.isfinite(features).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the CLIP embedding of {what} {bad[0]} is not finite: its pixels or the weights are broken"
        )
    return F.normalize(features, dim=-1)


def _pixels(images, preprocess: dict, device: str) -> torch.Tensor:
    """Resize, crop the middle and normalise as the CLIP was trained: (N, 3, size, size)."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"pictures must be floats (N, 3, H, W) in [-1, 1], found shape {tuple(images.shape)}"
            )
        images = [image[None].to(device).float().clamp(-1, 1) / 2 + 0.5 for image in images]
    else:
        images = [
            torch.from_numpy(np.array(image.convert("RGB"))).to(device).permute(2, 0, 1)[None] / 255
            for image in images
        ]
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    resized = []
    for image in images:
        scale = max(height / image.shape[2], width / image.shape[3])
        target = (
            (height, width)
            if preprocess["resize_mode"] == "squash"
            else (
                max(height, int(image.shape[2] * scale + 1e-6)),
                max(width, int(image.shape[3] * scale + 1e-6)),
            )
        )
        if target != tuple(image.shape[2:]):
            image = F.interpolate(
                image, target, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        top, left = round((target[0] - height) / 2), round((target[1] - width) / 2)
        resized.append(image[:, :, top : top + height, left : left + width])
    mean = torch.tensor(preprocess["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(preprocess["std"], device=device).view(3, 1, 1)
    return (torch.cat(resized) - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# loading


def _load_open_clip(name: str, pretrained: str, cache_dir: str | None) -> torch.nn.Module:
    """An open_clip model with its weights and the activation those weights were trained with."""
    if open_clip.get_model_config(name) is None:
        raise ValueError(f"open_clip has no architecture {name!r}; see open_clip.list_models()")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag and not pretrained.endswith(".safetensors"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"CLIP weights {pretrained!r}: expected a .safetensors file, a folder with clip.json, "
            f"or a tag of {name} ({tags})"
        )
    if not tag and not Path(pretrained).is_file():
        raise FileNotFoundError(
            f"CLIP weights not found at {pretrained}; give a .safetensors file or a tag"
        )
    logging.disable(logging.CRITICAL)  # open_clip also logs what it raises; one message is enough
    try:
        # OpenAI's, DFN's and MetaCLIP's weights need QuickGELU; with the plain GELU of "ViT-B-32" the scores are wrong
        return open_clip.create_model(
            name,
            pretrained,
            force_quick_gelu=bool(tag and tag.get("quick_gelu")),
            cache_dir=cache_dir,
        )
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if tag:
            raise OSError(
                f"CLIP {name} ({pretrained}) could not be fetched; download its .safetensors file "
                f"elsewhere and give the path: {reason}"
            ) from error
        raise ValueError(f"{pretrained} does not hold weights of CLIP {name}: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)


def _load_toy(folder: Path) -> tuple[torch.nn.Module, dict]:
    """(model, preprocess) of a folder that `train_toy_clip` wrote."""
    for name in ("clip.json", "clip.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not a toy CLIP: {name} is missing; train one with train_toy_clip"
            )
    try:
        written = json.loads((folder / "clip.json").read_text())
        model = open_clip.CLIP(**written["model"])
        model.load_state_dict(load_file(folder / "clip.safetensors"))
    except (json.JSONDecodeError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the toy CLIP in {folder} is damaged; delete the folder to train again: {reason}"
        ) from error
    return model, written["preprocess"]
