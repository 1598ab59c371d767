"""
A small open_clip CLIP for the toy world, so that reward and metric need no download.

It is trained with the contrastive loss on pairs of a picture and its caption, and with captions
that have exactly one wrong fact: a picture that is nearly right is what the reward must tell from
one that is right. With e the unit vectors of the B pictures, u those of the B right captions and
then of the wrong ones, and s the learned scale:

    logits = s e u^T                                                    (B, B + wrong)
    loss   = (CE(logits, diagonal) + CE(logits[:, :B]^T, diagonal)) / 2

The pictures carry noise or blur now and then: the reward meets imperfect ones and must stay
smooth. Training takes the captions' tokens and text features by faster ways than open_clip's, with
the same values.

    clip.json           {"model": arguments of open_clip.CLIP, "preprocess": size, mean, std and
                        resize_mode, "training": the ToyClipSettings}
    clip.safetensors    the weights

A folder is published whole. Left out: several processes, a GPU, resuming; it takes minutes.

    train_toy_clip("out/toy-clip", ToyClipSettings(steps=400));   reward.Clip("out/toy-clip")
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from runtime.files import published
from toy import world
from toy.tasks import draw_sample, wrong_captions

CONTEXT_LENGTH = 44  # tokens: they hold any caption of the toy world


@dataclass(frozen=True)
class ToyClipSettings:
    """How a toy CLIP is trained; the defaults are those of the reward's."""

    seed: int = 0
    steps: int = 250  # batches of fresh samples of the train split
    batch_size: int = 128
    wrong: int = 3  # captions with one wrong fact, a picture
    patch_size: int = 16  # of the picture tower
    width: int = 192  # of the picture tower
    learning_rate: float = 2e-3


def train_metric_clip(folder, steps: int) -> None:
    """The toys' CLIP of CLIP_out, unless it is there: seed and tower differ from the reward's."""
    if not (Path(folder) / "clip.json").is_file():
        train_toy_clip(folder, ToyClipSettings(seed=1, steps=steps, patch_size=8, width=128))


def train_toy_clip(folder, settings: ToyClipSettings, log=print) -> Path:
    """Train a CLIP on the toy world; returns the folder with clip.json and clip.safetensors.

    A complete folder is returned at once. ValueError if it holds a CLIP that was trained otherwise,
    or something else. log: prints progress, a line at a time.
    """
    folder = Path(folder)
    if _is_trained(folder, settings):
        return folder
    vision = dict(image_size=world.SIZE, patch_size=settings.patch_size, width=settings.width)
    config = dict(
        embed_dim=64,
        init_logit_scale=math.log(20),
        vision_cfg=dict(**vision, layers=3, head_width=64),
        text_cfg=dict(context_length=CONTEXT_LENGTH, width=64, heads=2, layers=2),
    )
    with published(folder) as hidden:
        hidden.mkdir(parents=True)  # before the work: an unwritable place is found out now
        # the caller's random numbers stay as they were; it may have no use for gradients
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(settings.seed)
            model = open_clip.CLIP(**config)
            _train(model, settings, lambda line: log(f"{folder.name}: {line}"))
        preprocess = dict(size=world.SIZE, mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash")
        written = dict(model=config, preprocess=preprocess, training=asdict(settings))
        (hidden / "clip.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        save_file(model.state_dict(), hidden / "clip.safetensors")
    return folder


def _is_trained(folder: Path, settings: ToyClipSettings) -> bool:
    """Whether the folder holds the CLIP of these settings; ValueError if it holds anything else."""
    if (folder / "clip.json").is_file() and (folder / "clip.safetensors").is_file():
        written = json.loads((folder / "clip.json").read_text(encoding="utf-8")).get("training")
        if written != asdict(settings):
            raise ValueError(
                f"{folder} holds a CLIP trained with {written}, not with {asdict(settings)}; "
                "delete the folder or choose another one"
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is not a toy CLIP; delete it or choose another folder"
        )
    return False


# --------------------------------------------------------------------------------------------------
# training


def _train(model: torch.nn.Module, settings: ToyClipSettings, log) -> None:
    """Train in place; the learning rate rises over 20 steps and falls along a cosine."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.05), dict(params=others, weight_decay=0.0)],
        betas=(0.9, 0.98),
        fused=True,
    )
    rng = np.random.default_rng(settings.seed)
    for step in range(settings.steps):
        rate = settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
        rate *= min(1, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pictures, captions = _pairs(step, settings, rng)
        loss, right = _loss(model, _augment(pictures), captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        done = step + 1
        if done % 50 == 0 or done == settings.steps:
            words = f"loss {loss:.3f}  right caption first {right:.0%} of the batch"
            log(f"{done}/{settings.steps}  {words}")


def _pairs(step: int, settings: ToyClipSettings, rng) -> tuple[torch.Tensor, list[str]]:
    """Pictures (B, 3, 32, 32) in [-1, 1]; B right captions, then `wrong` for each picture."""
    count = settings.batch_size
    samples = [draw_sample("train", step * count + i, settings.seed) for i in range(count)]
    # (B, 32, 32, 3)
    pictures = torch.from_numpy(np.stack([np.asarray(sample.target) for sample in samples]))
    right = [sample.plan.caption for sample in samples]
    wrong = [wrong_captions(sample.truth, rng, settings.wrong) for sample in samples]
    pictures = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, 32, 32)
    return pictures, right + sum(wrong, [])


def _augment(pictures: torch.Tensor) -> torch.Tensor:
    """Noise in 30 % and a 3 x 3 blur in 15 % of the pictures, (B, 3, 32, 32) in [-1, 1]."""
    count = len(pictures)
    noise = 0.3 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.3)
    pictures = pictures + noise * torch.randn_like(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.where(torch.rand(count, 1, 1, 1) < 0.15, blurred, pictures).clamp(-1, 1)


def _loss(model, pictures: torch.Tensor, captions: list[str]) -> tuple[torch.Tensor, float]:
    """The loss at the top of this file; and how often the right caption came first."""
    e = model.encode_image(pictures, normalize=True)  # (B, E)
    u = _encode_text(model, _tokens(captions, model.context_length))  # (B + wrong, E)
    logits = model.logit_scale.exp() * e @ u.T  # (B, B + wrong)
    answer = torch.arange(len(e))
    loss = (F.cross_entropy(logits, answer) + F.cross_entropy(logits[:, : len(e)].T, answer)) / 2
    return loss, (logits.argmax(1) == answer).float().mean().item()


# --------------------------------------------------------------------------------------------------
# text, faster than open_clip


def _encode_text(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """`model.encode_text(tokens, normalize=True)` without computing the padding.

    tokens (n, t) -> (n, E). The padding is the larger half of most captions.
    """
    lengths = tokens.argmax(1) + 1  # (n,): the end token has the highest number
    order, features = lengths.argsort(), []
    for part in order.chunk(4):  # captions of similar length together
        longest = int(lengths[part].max())
        # (part, longest, width)
        x = model.token_embedding(tokens[part, :longest]) + model.positional_embedding[:longest]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:longest, :longest]))
        ends = x[torch.arange(len(part)), lengths[part] - 1]  # (part, width)
        features.append(ends @ model.text_projection)  # (part, E)
    return F.normalize(torch.cat(features)[order.argsort()], dim=-1)  # (n, E)


@cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@cache
def _word(word: str) -> tuple[int, ...]:
    """The tokens of one word: those of the toy world are few, so looking them up is faster."""
    return tuple(_tokenizer().encode(word))


def _tokens(captions: list[str], length: int) -> torch.Tensor:
    """open_clip's tokens of n captions, (n, length). ValueError if a caption has more."""
    rows = torch.zeros(len(captions), length, dtype=torch.long)
    start, end = _tokenizer().all_special_ids
    for row, caption in zip(rows, captions):
        ids = [start, *(token for word in caption.split() for token in _word(word)), end]
        if len(ids) > length:
            raise ValueError(
                f"the caption {caption!r} has {len(ids)} tokens, the toy CLIP reads {length}"
            )
        row[: len(ids)] = torch.tensor(ids)
    return rows
