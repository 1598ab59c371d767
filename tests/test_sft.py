"""Stage 1: packing changes nothing, dropped conditions leave their positions, a checkpoint brings its own shape."""

import dataclasses

import pytest
import torch

import sft
from model import ModelConfig, UnifiedModel
from runtime import loop, processes
from runtime.config import UserError
from runtime.pretrained import save_model
from toy.tasks import draw_sample
from toy.tokenizer import train_tokenizer

CONFIG = sft.Config(config="smoke", **sft.PRESETS["smoke"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    model = UnifiedModel(sft.model_config(CONFIG)).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    tokenizer = train_tokenizer(folder / "tokenizer", model.config.vocab_size)
    save_model(model, tokenizer, folder / "model")
    return model, model.config.layout(tokenizer), tokenizer, folder


def encode(toy, count=6, **options):
    config = dataclasses.replace(CONFIG, **options)
    return [
        sft.encode(toy[0], toy[2], draw_sample("train", i), config, processes.generator(0, i))
        for i in range(count)
    ]


def gradients(model, packs):
    model.zero_grad()
    means = sft.backward(model, packs, CONFIG)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return means, found


def test_losses_and_gradients_do_not_depend_on_the_packing(toy):
    model, layout, *_ = toy
    examples = encode(toy, plan_dropout=0.3, noise_copies=2)
    assert any(example.plan is None for example in examples) and any(
        example.plan for example in examples
    )
    longest = max(map(len, examples))
    packings = [sft.pack(layout, examples, budget) for budget in (10**9, 2 * longest, longest)]
    assert (
        [len(packs) for packs in packings][0] == 1
        and len(packings[1]) > 1
        and len(packings[2]) > len(packings[1])
    )
    (ce, mse), expected = gradients(model, packings[0])
    for packs in packings[1:]:
        assert all(len(packed) <= 2 * longest for packed, _ in packs)
        means, found = gradients(model, packs)
        assert means == pytest.approx([ce, mse], rel=1e-5)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_an_example_knows_its_length(toy):
    for options in (
        {},
        dict(vae_dropout=1.0),
        dict(vit_dropout=1.0),
        dict(plan_dropout=1.0),
        dict(text_dropout=1.0),
    ):
        for example in encode(toy, **options):
            ((packed, target),) = sft.pack(toy[1], [example], 10**9)
            assert len(packed) == len(example) and len(target) == len(packed.noised)


def test_a_sample_over_the_budget_is_named(toy):
    examples = encode(toy)
    with pytest.raises(UserError, match="tokens_per_pack=50"):
        sft.pack(toy[1], examples, 50)


def test_randomness_belongs_to_the_sample_not_to_the_step(toy):
    first, again = encode(toy, 6), encode(toy, 3)
    for a, b in zip(first, again):
        assert all(torch.equal(x, y) and s == t for (x, s), (y, t) in zip(a.noised, b.noised))
    assert not torch.equal(first[0].noised[0][0], first[1].noised[0][0])


def test_dropped_conditions(toy):
    """Dropped pictures leave two positions each; dropped text takes the plan along and leaves nothing (docs/BAGEL.md §4)."""
    for i, (full, no_text, no_eye) in enumerate(
        zip(encode(toy), encode(toy, text_dropout=1.0), encode(toy, vit_dropout=1.0))
    ):
        references = len(draw_sample("train", i).references)
        packs = [sft.pack(toy[1], [example], 10**9)[0][0] for example in (full, no_text, no_eye)]
        texts = len(full.prompt.items[-1]) + 2 + (0 if full.plan is None else len(full.plan) + 2)
        at = [int(packed.positions[packed.latent_index[packed.noised[0]]]) for packed in packs]
        assert at == [2 * references + texts, 2 * references, 2 * references + texts]
        assert no_text.plan is None and len(packs[2].vit_index) == 0 and len(packs[0].vit_index) > 0


def test_a_checkpoint_brings_its_shape(toy):
    folder = str(toy[3] / "model")
    full = sft.Config(config="full", init=folder)
    assert sft.model_config(full) == toy[0].config
    with pytest.raises(UserError, match="--intermediate_size=96"):
        sft.model_config(dataclasses.replace(full, intermediate_size=96))
    assert sft.model_config(CONFIG) == ModelConfig(**sft.MODELS["smoke"])


def test_training_starts_from_a_checkpoint(toy, tmp_path, capsys):
    """One step from `init`: the first loss is that of the checkpoint, not of fresh weights."""
    config = dataclasses.replace(
        CONFIG, init=str(toy[3] / "model"), out=str(tmp_path / "run"), steps=1, threads=1
    )
    sft.train(config)
    indices = range(config.samples_per_step)
    examples = [
        sft.encode(toy[0], toy[2], draw_sample("train", i), config, processes.generator(0, i))
        for i in indices
    ]
    means, _ = gradients(toy[0], sft.pack(toy[1], examples, config.tokens_per_pack))
    line = loop.read_log(tmp_path / "run")[0]
    assert [line["ce"], line["mse"]] == pytest.approx(means, rel=1e-5)
    assert (tmp_path / "run/model/ema.safetensors").is_file()
