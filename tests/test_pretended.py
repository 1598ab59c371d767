"""The stages on a GPU that is not there (pretended.py): no tensor is left in the wrong place."""

import dataclasses

import numpy as np
import pretended
import pytest
import torch

import grpo
import iccot
import sft
from engine import Engine, Request, Sampler, Thinking, is_text
from kernels import attention
from kernels.triton_attention import interpreted
from model import SMOKE, ModelConfig, UnifiedModel
from runtime import loop, processes
from runtime.pretrained import load_model, save_model
from toy.clip import ToyClipSettings, train_toy_clip
from toy.tasks import draw_sample
from toy.tokenizer import train_tokenizer


def test_the_pretence_refuses_what_a_gpu_refuses(monkeypatch):
    with pretended.gpu(monkeypatch):
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device.type == "cuda" and there.cpu().device.type == "cpu"
        for mixture in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: there.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
                mixture()
        here.copy_(2 * there)
        assert here.tolist() == [2, 2, 2] and there[torch.tensor([0])].tolist() == [1]
        assert (there * torch.tensor(2.0)).sum().item() == 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model of random weights and a CLIP of one training step."""
    folder = tmp_path_factory.mktemp("made")
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    tokenizer = train_tokenizer(folder / "tokenizer", model.config.vocab_size)
    save_model(model, tokenizer, folder / "sft/model")
    train_toy_clip(folder / "clip", ToyClipSettings(steps=1))
    return folder


def on_both(monkeypatch, do):
    """What `do(name of the place)` returns on the CPU, and on the pretended GPU."""
    here = do("cpu")
    with pretended.gpu(monkeypatch), monkeypatch.context() as patch:
        patch.setenv("REALIGN_ATTENTION", "sdpa")  # the kernels' interpreter takes minutes
        return here, do("gpu")


def same_run(one, other):
    """The logs of two runs agree."""
    for line, again in zip(loop.read_log(one), loop.read_log(other), strict=True):
        line, again = (
            {key: value for key, value in values.items() if "seconds" not in key}
            for values in (line, again)
        )
        assert again == pytest.approx(line, rel=1e-4, abs=1e-4, nan_ok=True)


RUN = dict(threads=1, steps=2, save_every=9, eval_every=1)
FLUX = dict(codec="flux", codec_factor=8, latent_channels=16, latent_side=4, vae_channels=32)
FLUX |= dict(vae_blocks=1, image_shortest=32)


@pytest.mark.parametrize("options", [dict(average=0.9), dict(train="lora", checkpointing=True)])
def test_stage_1(made, tmp_path, monkeypatch, options):
    """With measurements, strips, a resumption and the export."""
    options = options | RUN | dict(init=str(made / "sft"), metric=str(made / "clip"))
    options |= dict(sample_plan_tokens=3, sample_timesteps=3)
    options |= dict(samples_per_step=4, tokens_per_pack=450, noise_copies=2)
    monkeypatch.setattr(sft, "EVAL_SAMPLES", 1)

    def train(place):
        how = sft.PRESETS["smoke"] | options | dict(out=str(tmp_path / place))
        config = sft.Config(config="smoke", **how)
        sft.train(dataclasses.replace(config, steps=1))
        sft.train(config)
        return tmp_path / place

    same_run(*on_both(monkeypatch, train))


GUIDED = dict(likelihood="sde", window=1, text_guidance=2.0, image_guidance=1.5)
FORWARD = dict(train_text=True, cot_temperature=1.0, average=0.9, updates=2)
PARTS = dict(train="lora", lora_rank=4, images_per_cot=2, pictures_at_once=3)
PARTS |= dict(tokens_per_pack=300, checkpointing=True)


@pytest.mark.parametrize("options", [GUIDED, FORWARD, PARTS])
def test_stage_2(made, tmp_path, monkeypatch, options):
    """With the table, strips and the export. Plans are drawn, and others taken that can be read."""
    options = options | RUN | dict(init=str(made / "sft"), clip=str(made / "clip"), eval_every=0)
    options |= dict(metric=str(made / "clip"), prompts_per_step=2, max_plan_tokens=5, steps=1)
    options |= dict(eval_samples=1, eval_timesteps=3, num_timesteps=4, window_end=1.0)
    drawn = Engine.think

    def think(self, prompts, thinking, *, count=1, **how):
        drawn(self, prompts, thinking, count=count, **how)
        texts = []
        for prompt in prompts:
            relations = tuple("It is there." for item in prompt.items if not is_text(item))
            captions = [f"A {word} ball." for word in ("red", "blue", "green", "big")[:count]]
            texts += [iccot.render(iccot.ICCoT(caption, relations)) for caption in captions]
        return [self.tokenizer.encode(text) for text in texts], [True] * len(texts)

    monkeypatch.setattr(Engine, "think", think)

    def train(place):
        how = grpo.PRESETS["smoke"] | options | dict(out=str(tmp_path / place))
        grpo.train(grpo.Config(config="smoke", **how))
        return tmp_path / place

    runs = on_both(monkeypatch, train)
    same_run(*runs)
    assert loop.read_log(runs[1])[0]["grad_norm"] > 0


def test_the_codec_of_bagel(made, tmp_path, monkeypatch):
    """Stage 1 and pictures of a model with FLUX's codec, guided, some steps without a pass."""
    _, tokenizer = load_model(made / "sft")
    fresh = UnifiedModel(ModelConfig(**SMOKE | FLUX)).initialise(0)
    save_model(fresh, tokenizer, tmp_path / "flux")
    options = RUN | dict(init=str(tmp_path / "flux"), metric=str(made / "clip"), steps=1)
    options |= dict(sample_plan_tokens=3, sample_timesteps=3, samples_per_step=4, eval_every=0)
    request = Request(draw_sample("train", 0).references, "Draw a ball.", (2, 3))
    sampler = Sampler(6, 3.0, 2.0, 1.5, cache_interval=2)

    def train(place):
        how = sft.PRESETS["smoke"] | options | dict(out=str(tmp_path / place))
        sft.train(sft.Config(config="smoke", **how))
        return tmp_path / place

    def paint(place):
        engine = Engine(*load_model(tmp_path / "cpu", processes.device()))
        how = dict(sampler=sampler, thinking=Thinking(5, 1.0, 0.9), batch=1, seeds=[(0,), (1,)])
        found = engine.generate([request, request], **how)
        assert engine.device == processes.device()
        return [one.text for one in found], np.stack([np.asarray(one.image) for one in found])

    same_run(*on_both(monkeypatch, train))
    (texts, pictures), (again, painted) = on_both(monkeypatch, paint)
    assert texts == again and np.abs(pictures.astype(int) - painted).max() <= 1


@pytest.mark.skipif(not interpreted(), reason="no Triton, or a GPU that is there")
def test_the_kernels_run_there(made, monkeypatch, loop_bounds_in_the_interpreter):
    """Stage 1's gradients of a sample, with Triton's kernels in its interpreter."""
    engine = Engine(*load_model(made / "sft"))
    config = sft.Config(config="smoke", **sft.PRESETS["smoke"])
    sample = draw_sample("train", 2)
    one = sft.make_example(sample, 2, engine.tokenizer, engine.model.config, config)

    def gradients():
        found = Engine(*load_model(made / "sft", processes.device()))
        means = sft.backward(found, [one], config)
        return means, {name: p.grad.cpu() for name, p in found.model.named_parameters()}

    means, wanted = gradients()
    with pretended.gpu(monkeypatch):
        assert attention.choose_backend("cuda", torch.float32, 16)[0] == "triton"
        again, found = gradients()
    assert again == pytest.approx(means, rel=1e-4)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)
