"""The reward against float64, its order, its failures, and the toy CLIP's cache."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

import reward
from toy import clip as toy_clip
from toy.clip import ToyClipSettings
from toy.tasks import draw_sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with torch.no_grad():  # curate.py needs no gradients, but maybe a CLIP
        return train(tmp_path_factory.mktemp("clip") / "toy")


SMALL = ToyClipSettings(seed=3, steps=2, batch_size=6, wrong=2, width=64)


def train(folder, settings=SMALL):
    return toy_clip.train_toy_clip(folder, settings, log=lambda line: None)


@pytest.fixture(scope="module")
def clip(folder):
    return reward.Clip(str(folder))


@pytest.fixture(scope="module")
def pairs():
    samples = [draw_sample("held_out", index) for index in range(12)]
    return [sample.target for sample in samples], [sample.plan.caption for sample in samples]


# --------------------------------------------------------------------------------------------------
# the score


def test_score_equals_float64(clip, pairs):
    images, captions = pairs
    pixels = np.stack([np.array(image) for image in images]).transpose(0, 3, 1, 2)  # (B, 3, h, w)
    with torch.no_grad():  # open_clip's own encoders and tokens, then numpy in float64
        # mean = std = 0.5 is the range [-1, 1]
        e = clip.model.encode_image(torch.from_numpy(pixels) / 127.5 - 1).double().numpy()
        u = clip.model.encode_text(open_clip.tokenize(captions, 44)).double().numpy()
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    scores, cosine = clip.score(images, captions), (e * u).sum(1)
    np.testing.assert_allclose(scores.numpy(), -np.linalg.norm(e - u, axis=1), atol=1e-6)
    np.testing.assert_allclose(clip.clip_out(images, captions).numpy(), 100 * cosine, atol=1e-4)
    torch.testing.assert_close(clip.embed_images(images).norm(dim=1), torch.ones(12))
    assert not scores.requires_grad and not clip.model.training


def test_each_picture_is_scored_against_its_own_caption(clip, pairs, monkeypatch):
    """Whatever its company, its mode, and the size of a batch."""
    images, captions = pairs
    scores = clip.score(images, captions)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(reward, "BATCH", 5)
    moved = clip.score([images[i].convert("RGBA") for i in order], [captions[i] for i in order])
    torch.testing.assert_close(moved, scores[order], atol=1e-6, rtol=0)
    shifted = clip.score(images, captions[1:] + captions[:1])
    assert (shifted - scores).abs().max() > 1e-3


def test_truncation_is_counted(clip):
    clip.truncated = 0
    fits = " ".join(["ball"] * 42)  # 42 + start + end = 44
    toy = max((draw_sample("train", i).plan.caption for i in range(300)), key=len)
    clip.embed_captions([fits, "a ball", toy])
    assert clip.truncated == 0
    clip.embed_captions([fits + " ball", "a ball", fits + " ball" * 9])
    assert clip.truncated == 2
    longer, cut = clip.embed_captions([fits + " ball" * 9, fits])
    torch.testing.assert_close(longer, cut, atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------
# what cannot be scored raises


def test_a_reward_is_never_invented(clip, pairs, monkeypatch):
    images, _ = pairs
    with pytest.raises(ValueError, match="caption is empty"):
        clip.embed_captions(["a ball", " \n"])
    monkeypatch.setattr(clip.model, "encode_image", lambda x: torch.full((len(x), 64), math.nan))
    with pytest.raises(ValueError, match="embedding of a picture is not finite"):
        clip.embed_images(images)


def test_loading_mistakes_give_one_clear_sentence(tmp_path, caplog):
    for name in ("w.safetensors", "w.pt"):
        (tmp_path / name).write_bytes(b"no weights")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    tags = r"expected a .safetensors file, or a tag of ViT-B-32 \(openai,"
    unfit = "safetensors does not hold weights of CLIP ViT-S-32-alt"
    for error, sentence, source in [
        (ValueError, "no architecture 'ViT-Z-9'", "ViT-Z-9:openai"),
        (FileNotFoundError, "out/gone is no CLIP: .*python grpo.py", "out/gone"),
        (FileNotFoundError, "'opnai': " + tags, "ViT-B-32:opnai"),
        (FileNotFoundError, "w.pt': " + tags, f"ViT-B-32:{tmp_path / 'w.pt'}"),
        (FileNotFoundError, "nowhere.safetensors': " + tags, "ViT-B-32:nowhere.safetensors"),
        (ValueError, f"w.{unfit}", f"ViT-S-32-alt:{tmp_path / 'w.safetensors'}"),
        (ValueError, f"other.{unfit}", f"ViT-S-32-alt:{tmp_path / 'other.safetensors'}"),
        (FileNotFoundError, "is no CLIP: clip.json is missing", str(tmp_path)),
    ]:
        with pytest.raises(error, match=sentence) as caught:
            reward.Clip(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert caplog.text == ""  # open_clip's own complaints do not come on top


def test_damaged_toy_clips(tmp_path, folder):
    written = json.loads((folder / "clip.json").read_text())
    weights = (folder / "clip.safetensors").read_bytes()
    for text, content in [
        ("{", weights),
        ("{}", weights),
        (json.dumps(written), weights[:1000]),
        (json.dumps({**written, "model": {**written["model"], "embed_dim": 32}}), weights),
    ]:
        (tmp_path / "clip.json").write_text(text)
        (tmp_path / "clip.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged; delete the folder to train again"):
            reward.Clip(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# other CLIPs


def test_a_local_file_of_a_real_architecture(tmp_path, pairs):
    """A random ViT-S-32 in open_clip's layout."""
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("ViT-S-32-alt")
    model.eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    clip = reward.Clip(f"ViT-S-32-alt:{tmp_path / 'w.safetensors'}")
    images = [image.resize(size) for image, size in zip(pairs[0], ((300, 420), (60, 45)))]
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in images])
        expected = model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(clip.embed_images(images), expected)
    assert clip.embed_captions(["a ball"]).shape == expected[:1].shape


@pytest.mark.parametrize(
    "name, tag, about, quick",
    [
        ("ViT-B-32", "openai", None, True),
        ("ViT-L-14", "metaclip_400m", None, True),
        ("ViT-H-14", "laion2b_s32b_b79k", None, False),
        # a local file
        ("ViT-B-32", "", {"model_cfg": {"quick_gelu": True}}, True),
        ("ViT-B-32", "", {"model_cfg": {}}, False),
        ("ViT-B-32-quickgelu", "", None, True),
        ("ViT-S-32-alt", "", None, False),  # no weights of it have QuickGELU
        ("ViT-B-32", "", None, "w.safetensors does not say .*: write ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "", {"model_cfg": None}, "open_clip_config.json describes no CLIP"),
    ],
)
def test_weights_get_the_activation_they_were_trained_with(
    monkeypatch, tmp_path, name, tag, about, quick
):
    asked = {}
    monkeypatch.setattr(open_clip, "create_model", lambda *names, **options: asked.update(options))
    (tmp_path / "w.safetensors").touch()
    if about is not None:
        (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    if isinstance(quick, bool):
        reward._load_open_clip(name, tag or str(tmp_path / "w.safetensors"))
        assert asked["force_quick_gelu"] is quick
    else:
        with pytest.raises(ValueError, match=quick):
            reward._load_open_clip(name, str(tmp_path / "w.safetensors"))


def test_a_failed_download_is_one_sentence(monkeypatch):
    from open_clip import factory

    def fail(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(factory, "download_pretrained", fail)
    sentence = r"CLIP ViT-B-32:openai could not be fetched; .* no network"
    with pytest.raises(OSError, match=sentence):
        reward.Clip("ViT-B-32:openai")


# --------------------------------------------------------------------------------------------------
# the toy CLIP


def test_training_is_cached_reproducible_and_leaves_the_random_state(folder, tmp_path, pairs, clip):
    before = torch.random.get_rng_state()
    again = train(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (again / "clip.safetensors").read_bytes() == (folder / "clip.safetensors").read_bytes()
    assert torch.equal(reward.Clip(str(again)).score(*pairs), clip.score(*pairs))
    stamp = (again / "clip.safetensors").stat().st_mtime_ns
    assert train(again) == again and (again / "clip.safetensors").stat().st_mtime_ns == stamp
    sentence = "holds a CLIP trained with .*'steps': 2.*delete the folder or choose another"
    with pytest.raises(ValueError, match=sentence):
        train(again, replace(SMALL, steps=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_an_interrupted_training_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_clip, "_train", stop)
        train(tmp_path / "toy")
    assert not (tmp_path / "toy").exists()
    assert (train(tmp_path / "toy") / "clip.json").is_file() and len(list(tmp_path.iterdir())) == 1


def test_folders_that_are_something_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    with pytest.raises(ValueError, match="exists and is not a toy CLIP"):
        train(tmp_path / "mine")
    with pytest.raises(NotADirectoryError):
        train(tmp_path / "mine" / "letter.txt" / "toy")


def test_training_tokens_and_text_features_are_open_clips(clip):
    captions = [draw_sample("train", i).plan.caption for i in range(20)]
    tokens = toy_clip._tokens(captions, 44)
    assert torch.equal(tokens, open_clip.tokenize(captions, 44))
    with torch.no_grad():
        expected = clip.model.encode_text(tokens, normalize=True)
        found = toy_clip._encode_text(clip.model, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_loss_is_the_contrastive_loss_by_hand(clip):
    settings = ToyClipSettings(batch_size=4, seed=0, wrong=2)
    pictures, captions = toy_clip._pairs(0, settings, np.random.default_rng(0))
    assert pictures.shape == (4, 3, 32, 32) and len(captions) == 12
    assert len(set(captions[4:6]) | {captions[0]}) == 3  # right, wrong, wrong
    with torch.no_grad():
        loss, right = toy_clip._loss(clip.model, pictures, captions)
        e = clip.model.encode_image(pictures, normalize=True).double()
        u = clip.model.encode_text(open_clip.tokenize(captions, 44), normalize=True).double()
        logits = (clip.model.logit_scale.double().exp() * e @ u.T).numpy()
    to_text = [np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)]
    columns = logits[:, :4].T  # (B, B): a row for each right caption
    to_picture = [np.log(np.exp(column).sum()) - column[i] for i, column in enumerate(columns)]
    assert abs(loss.item() - (np.mean(to_text) + np.mean(to_picture)) / 2) < 1e-4
    assert right == (logits.argmax(1) == np.arange(4)).mean()


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    settings = ToyClipSettings(seed=0, steps=12, batch_size=16, wrong=1, learning_rate=2e-3)
    vision = dict(image_size=32, patch_size=16, width=64, layers=1, head_width=32)
    text = dict(context_length=toy_clip.CONTEXT_LENGTH, width=64, heads=2, layers=1)
    model = open_clip.CLIP(32, vision_cfg=vision, text_cfg=text)
    pictures, captions = toy_clip._pairs(99, settings, np.random.default_rng(0))
    with torch.no_grad():
        before = toy_clip._loss(model, pictures, captions)[0]
        with torch.enable_grad():
            toy_clip._train(model, settings, log=lambda line: None)
        assert toy_clip._loss(model, pictures, captions)[0] < before - 0.2
