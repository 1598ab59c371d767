"""
A small open_clip CLIP for the toy world, so that reward and metric need no download.

It is trained on pairs of the toy world with the usual contrastive loss and with captions that have exactly one wrong
fact, because a picture that is nearly right is what the reward must tell from one that is right.

    train_toy_clip("out/toy-clip", seed=0, steps=400);   reward.Clip("toy", "out/toy-clip")
"""

import json
import math
import os
import shutil
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from toy import tasks, world
from toy.tasks import draw_sample

# ---------------------------------------------------------------------------------------------------------------------
# the toy CLIP


def train_toy_clip(
    folder: str | Path,
    seed: int = 0,
    steps: int = 250,
    batch_size: int = 128,
    wrong: int = 3,
    patch_size: int = 16,
    width: int = 192,
    learning_rate: float = 2e-3,
    log=print,
) -> Path:
    """Train a small open_clip CLIP on pairs of the toy world; returns the folder with clip.json and clip.safetensors.

    A complete folder is returned at once, and nothing appears under its name before it is complete. ValueError if it
    holds a CLIP that was trained otherwise. steps: batches of `batch_size` fresh samples of the train split;
    wrong: captions with one wrong fact, a picture; patch_size and width: the picture tower; log: prints progress.
    """
    folder = Path(folder)
    settings = dict(
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        wrong=wrong,
        patch_size=patch_size,
        width=width,
        learning_rate=learning_rate,
    )
    if (folder / "clip.json").is_file() and (folder / "clip.safetensors").is_file():
        found = json.loads((folder / "clip.json").read_text()).get("training")
        if found != settings:
            raise ValueError(
                f"{folder} holds a CLIP trained with {found}, not with {settings}; "
                "delete the folder or choose another one"
            )
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is not a toy CLIP; delete it or choose another folder"
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)  # before the work: an unwritable place is found out now
    config = _toy_config(patch_size, width)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
        _train(model, settings, lambda line: log(f"{folder.name}: {line}"))
    size = config["vision_cfg"]["image_size"]
    preprocess = dict(size=size, mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash")
    text = json.dumps(dict(model=config, preprocess=preprocess, training=settings), indent=1)
    (partial / "clip.json").write_text(text + "\n")
    save_file(model.state_dict(), partial / "clip.safetensors")
    os.replace(partial, folder)
    return folder


def _toy_config(patch_size: int, width: int) -> dict:
    """Arguments of open_clip.CLIP. 44 tokens hold any caption of the toy world."""
    return dict(
        embed_dim=64,
        init_logit_scale=math.log(20),
        vision_cfg=dict(
            image_size=world.SIZE, patch_size=patch_size, width=width, layers=3, head_width=64
        ),
        text_cfg=dict(context_length=44, width=64, heads=2, layers=2),
    )


def _train(model: torch.nn.Module, settings: dict, log) -> None:
    """Contrastive training in place; the learning rate rises over 20 steps and falls along a cosine."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.05), dict(params=others, weight_decay=0.0)],
        betas=(0.9, 0.98),
        fused=True,
    )
    rng = np.random.default_rng(settings["seed"])
    for step in range(settings["steps"]):
        rate = settings["learning_rate"] * (1 + math.cos(math.pi * step / settings["steps"])) / 2
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
        if (step + 1) % 50 == 0 or step + 1 == settings["steps"]:
            log(
                f"{step + 1}/{settings['steps']}  loss {loss:.3f}  right caption first {right:.0%} of the batch"
            )


def _pairs(step: int, settings: dict, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """Pictures (B, 3, 32, 32) in [-1, 1]; B right captions, then B * wrong captions with one wrong fact each."""
    count = settings["batch_size"]
    samples = [draw_sample("train", step * count + i, settings["seed"]) for i in range(count)]
    # (B, 32, 32, 3)
    pictures = torch.from_numpy(np.stack([np.asarray(sample.target) for sample in samples]))
    wrong = [
        caption
        for sample in samples
        for caption in tasks.wrong_captions(sample.truth, rng, settings["wrong"])
    ]
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, [
        sample.plan.caption for sample in samples
    ] + wrong


def _augment(pictures: torch.Tensor) -> torch.Tensor:
    """Noise in 30 % and a 3 x 3 blur in 15 % of the pictures: the reward meets imperfect ones and must stay smooth."""
    count = len(pictures)
    noise = 0.3 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.3)
    pictures = pictures + noise * torch.randn_like(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.where(torch.rand(count, 1, 1, 1) < 0.15, blurred, pictures).clamp(-1, 1)


def _loss(
    model: torch.nn.Module, pictures: torch.Tensor, captions: list[str]
) -> tuple[torch.Tensor, float]:
    """Symmetric contrastive loss, wrong captions on the text side only; and how often the right caption came first."""
    e = model.encode_image(pictures, normalize=True)  # (B, D)
    u = _encode_text(model, _tokens(captions, model.context_length))  # (B + wrong, D)
    logits = model.logit_scale.exp() * e @ u.T  # (B, B + wrong)
    answer = torch.arange(len(e))
    loss = (F.cross_entropy(logits, answer) + F.cross_entropy(logits[:, : len(e)].T, answer)) / 2
    return loss, (logits.argmax(1) == answer).float().mean().item()


def _encode_text(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """`model.encode_text(tokens, normalize=True)` without computing the padding, the larger half of most captions."""
    lengths = tokens.argmax(1) + 1  # the end token has the highest number
    order, features = lengths.argsort(), []
    for part in order.chunk(4):  # captions of similar length together
        longest = int(lengths[part].max())
        x = model.token_embedding(tokens[part, :longest]) + model.positional_embedding[:longest]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:longest, :longest]))
        features.append(x[torch.arange(len(part)), lengths[part] - 1] @ model.text_projection)
    return F.normalize(torch.cat(features)[order.argsort()], dim=-1)


@lru_cache(maxsize=1)
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@cache
def _word(word: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(word))


def _tokens(captions: list[str], length: int) -> torch.Tensor:
    """open_clip's tokens (N, length), word by word: the words of the toy world are few, so looking up is faster."""
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


def train_metric_clip(folder, steps):
    """The toys' CLIP of CLIP_out, unless it is there: another seed and picture tower than the reward's."""
    if not (Path(folder) / "clip.json").is_file():
        train_toy_clip(folder, seed=1, steps=steps, patch_size=8, width=128)
