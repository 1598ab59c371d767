"""
CLIP-L2, the surrogate reward of Re-Align (arXiv 2601.05124): does the picture show what its own
plan said?

    e = E(x) / |E(x)|      CLIP's embedding of the picture x
    u = T(c) / |T(c)|      CLIP's embedding of c, the text of <out_caption> that the sample wrote
    clip_l2    r = -|e - u| = -sqrt(2 - 2 e . u)    no task reward model, no labels
    CLIP_out   100 e . u, with the true caption     the metric of the paper's ablation, another CLIP

Any open_clip model can be the judge, with published weights or as a CLIP of one's own: a folder of

    clip.json           {"model": the arguments of open_clip.CLIP, "preprocess": its size, mean, std
                        and resize_mode}
    clip.safetensors    the weights

A reward never invents a number: what cannot be loaded or scored raises. A picture whose plan cannot
be read has the lowest reward of its group. Captions longer than the CLIP can read are counted in
`truncated`. Letters: sequence.py. Left out: gradients through the reward, other reward models.

    clip = Clip("ViT-L-14:openai")
    rewards = group_rewards(clip, pictures, captions, groups=P)                          # (P, G)
"""

import json
import logging
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

LOWEST = -2.0  # of any two unit vectors
BATCH = 64  # pictures or captions at once; bounds the memory, not the result


def clip_l2(e: Tensor, u: Tensor) -> Tensor:
    """The reward of unit vectors e of pictures and u of captions: (..., E), broadcast -> (...)."""
    return -(e - u).norm(dim=-1)


def cosine(e: Tensor, u: Tensor) -> Tensor:
    """The cosine of the same."""
    return (e * u).sum(-1)


class Clip:
    """A frozen CLIP. Embeddings are unit vectors in float32, without gradients.

    truncated: how many captions were cut so far.
    """

    def __init__(self, source: str, device: str = "cpu"):
        """Load "architecture:weights" of open_clip, or the folder of a CLIP of one's own.

        The weights are a tag ("ViT-L-14:openai") or a .safetensors file in open_clip's layout
        ("ViT-B-32-quickgelu:file.safetensors" for OpenAI's, or with their open_clip_config.json
        beside it).
        ValueError, FileNotFoundError: unknown name or tag, missing or unsuitable file; OSError: a
        download failed.
        """
        name, colon, weights = source.partition(":")
        if Path(source).is_dir() or not colon:
            self.model, preprocess = _load_folder(Path(source))
            self.tokenizer = open_clip.SimpleTokenizer()
        else:
            self.model = _load_open_clip(name, weights)
            preprocess = self.model.visual.preprocess_cfg
            self.tokenizer = open_clip.get_tokenizer(name)
        self.model.to(device).float().eval().requires_grad_(False)
        # resize, crop the middle and normalise as the CLIP was trained
        self.preprocess = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
        self.device, self.truncated = device, 0

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """PIL pictures of any size and mode -> (B, E)."""
        features = []
        for start in range(0, len(images), BATCH):
            batch = [self.preprocess(image) for image in images[start : start + BATCH]]
            features.append(self.model.encode_image(torch.stack(batch).to(self.device)))
        return _unit(features, "picture")

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> Tensor:
        """Captions -> (B, E). Those that are longer than the CLIP can read are cut and counted."""
        if "" in map(str.strip, captions):
            raise ValueError("a caption is empty: there is nothing to compare the picture with")
        length, features = self.model.context_length, []
        for start in range(0, len(captions), BATCH):
            batch = captions[start : start + BATCH]
            tokens = self.tokenizer(batch, context_length=length)  # (n, length)
            longer = self.tokenizer(batch, context_length=length + 1)[:, :length]  # (n, length)
            # cutting moves the end token, else both agree
            self.truncated += int((tokens != longer).any(1).sum())
            features.append(self.model.encode_text(tokens.to(self.device)))
        return _unit(features, "caption")

    def score(self, images: list[Image.Image], captions: list[str]) -> Tensor:
        """The reward of each picture under its own caption, (B,)."""
        return clip_l2(self.embed_images(images), self.embed_captions(captions))

    def clip_out(self, images: list[Image.Image], captions: list[str]) -> Tensor:
        """100 * cosine, (B,): the paper's CLIP_out when the captions are the true ones."""
        return 100 * cosine(self.embed_images(images), self.embed_captions(captions))


def group_rewards(
    clip: Clip, images: list[Image.Image], captions: list[str], *, groups: int
) -> Tensor:
    """The rewards of all groups of a step, (P, G) on the CPU.

    A picture whose plan does not parse gets the lowest reward of its group; in a group without any
    plan all get the lowest that there is.
    images: P * G pictures; captions: of P * J plans, "" where one did not parse; plan j of a group
    has the pictures from j G / J on.
    """
    e = clip.embed_images(images)  # (P * G, E)
    valid = torch.tensor([bool(caption) for caption in captions], device=e.device)  # (P * J,)
    u = e.new_zeros(len(captions), e.shape[1])  # (P * J, E), 0 where there is no caption
    if valid.any():
        u[valid] = clip.embed_captions([caption for caption in captions if caption])
    pictures = len(images) // len(captions)  # of a plan
    scores = clip_l2(e, u.repeat_interleave(pictures, 0)).view(groups, -1)  # (P, G)
    valid = valid.repeat_interleave(pictures).view(groups, -1)  # (P, G)
    lowest = scores.masked_fill(~valid, float("inf")).amin(1, keepdim=True)  # (P, 1)
    lowest = lowest.masked_fill(lowest.isinf(), LOWEST)  # a group without any plan
    return torch.where(valid, scores, lowest).cpu()


def reward_statistics(reward: Tensor, plans: int) -> dict[str, float]:
    """What the log says of rewards (P, G), `plans` plans a group: spread is what GRPO learns from.

    reward_std within groups; of it, between the mean rewards of plans and within those of a plan.
    """
    of_plan = reward.view(len(reward), plans, -1)  # (P, J, pictures)
    return {
        "reward": reward.mean().item(),
        "reward_std": reward.std(1, correction=0).mean().item(),
        "reward_std_between": of_plan.mean(2).std(1, correction=0).mean().item(),
        "reward_std_within": of_plan.std(2, correction=0).mean().item(),
        "dead_groups": (reward == reward[:, :1]).all(1).float().mean().item(),
    }


def _unit(features: list[Tensor], what: str) -> Tensor:
    """Batches of embeddings (n, E) -> all as unit vectors (B, E); ValueError if not finite."""
    features = torch.cat(features).float()  # (B, E)
    if not torch.isfinite(features).all():
        raise ValueError(f"the CLIP embedding of a {what} is not finite: the weights are broken")
    return F.normalize(features, dim=-1)


# --------------------------------------------------------------------------------------------------
# loading


def _load_open_clip(name: str, weights: str) -> torch.nn.Module:
    """An open_clip model with its weights and the activation those weights were trained with."""
    if open_clip.get_model_config(name) is None:
        raise ValueError(f"open_clip has no architecture {name!r}; see open_clip.list_models()")
    tag = open_clip.get_pretrained_cfg(name, weights)
    if not tag and not (weights.endswith(".safetensors") and Path(weights).is_file()):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise FileNotFoundError(
            f"CLIP weights {weights!r}: expected a .safetensors file, or a tag of {name} ({tags})"
        )
    quick = tag.get("quick_gelu", False) if tag else _quick_gelu(name, Path(weights))
    logging.disable(logging.CRITICAL)  # open_clip also logs what it raises; one message is enough
    try:
        # OpenAI's, DFN's and MetaCLIP's weights need QuickGELU; with the plain GELU of "ViT-B-32"
        # the scores are wrong
        return open_clip.create_model(name, weights, force_quick_gelu=quick)
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if tag:
            raise OSError(
                f"CLIP {name}:{weights} could not be fetched; download its .safetensors file "
                f"elsewhere and give the path: {reason}"
            ) from error
        raise ValueError(f"{weights} does not hold weights of CLIP {name}: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)


def _quick_gelu(name: str, weights: Path) -> bool:
    """Whether weights in a local file were trained with QuickGELU; they look the same without it.

    open_clip_config.json beside them says so, else their architecture's name. ValueError where that
    can mean both: scores with the wrong activation would only look right.
    """
    beside = weights.with_name("open_clip_config.json")
    if beside.is_file():
        try:
            return bool(json.loads(beside.read_bytes())["model_cfg"].get("quick_gelu"))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{beside} describes no CLIP ({error}); copy it again") from None
    quick = open_clip.get_model_config(name).get("quick_gelu", False)
    if not quick and open_clip.get_model_config(f"{name}-quickgelu"):
        raise ValueError(
            f"{weights} does not say which activation it was trained with: write {name}-quickgelu "
            f"for weights of OpenAI, DFN or MetaCLIP; for others copy the open_clip_config.json of "
            f"their repository beside them"
        )
    return quick


def _load_folder(folder: Path) -> tuple[torch.nn.Module, dict]:
    """(model, preprocess) of a CLIP of one's own."""
    for name in ("clip.json", "clip.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no CLIP: {name} is missing; expected a folder with clip.json and "
                f"clip.safetensors (python grpo.py --config toy trains one), or architecture:tag"
            )
    try:
        written = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
        model = open_clip.CLIP(**written["model"])
        model.load_state_dict(load_file(folder / "clip.safetensors"))
    except (json.JSONDecodeError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the CLIP in {folder} is damaged; delete the folder to train again: {reason}"
        ) from error
    return model, written["preprocess"]
