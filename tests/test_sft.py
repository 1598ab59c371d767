"""Stage 1: packing changes nothing, dropped conditions leave positions, a checkpoint its shape."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import grpo
import sft
from engine import Engine, is_text
from model import MODELS, ModelConfig, UnifiedModel
from runtime import loop, lora, processes
from runtime.config import UserError, parse
from runtime.pretrained import load_model, save_model
from toy import world
from toy.tasks import Drawn, draw_sample
from toy.tokenizer import train_tokenizer

CONFIG = sft.Config(config="smoke", **sft.PRESETS["smoke"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    model = UnifiedModel(ModelConfig(**MODELS[CONFIG.model])).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    tokenizer = train_tokenizer(folder / "tokenizer", model.config.vocab_size)
    save_model(model, tokenizer, folder / "model")
    return Engine(model, tokenizer), folder


def examples_of(toy, count=6, **options):
    return [made(toy, draw_from_train(i), i, **options) for i in range(count)]


def made(toy, sample, number, **options):
    """The Example of a sample."""
    config, shape = dataclasses.replace(CONFIG, **options), toy[0].model.config
    return sft.make_example(sample, number, toy[0].tokenizer, shape, config)


def pack(toy, examples, **options):
    return sft.pack_of(toy[0], examples, dataclasses.replace(CONFIG, **options))


def gradients(engine, examples, **options):
    engine.model.zero_grad()
    means = sft.backward(engine, examples, dataclasses.replace(CONFIG, **options))
    found = {name: p.grad.clone() for name, p in engine.model.named_parameters()}
    engine.model.zero_grad()
    return means, found


def test_losses_and_gradients_do_not_depend_on_the_packing(toy):
    how = dict(plan_dropout=0.3, noise_copies=2)
    examples = examples_of(toy, **how)
    assert {one.plan is None for one in examples} == {True, False}
    longest = max(one.tokens for one in examples)
    budgets = 10**9, 2 * longest, longest
    packs = [len(sft.fill([one.tokens for one in examples], budget)) for budget in budgets]
    assert 1 == packs[0] < packs[1] < packs[2]
    wanted, expected = gradients(toy[0], examples, **how, tokens_per_pack=budgets[0])
    for budget in budgets[1:]:
        means, found = gradients(toy[0], examples, **how, tokens_per_pack=budget)
        assert means == pytest.approx(wanted, rel=1e-5)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_an_example_knows_what_it_will_take(toy):
    for options in (
        {},
        dict(vae_dropout=1.0),
        dict(vit_dropout=1.0),
        dict(plan_dropout=1.0),
        dict(text_dropout=1.0),
        dict(noise_copies=2),
    ):
        for one in examples_of(toy, **options):
            found = pack(toy, [one], **options)
            assert len(found.packed) == one.tokens
            assert len(found.packed.labels) == one.labels
            assert len(found.target) == len(found.packed.noised) == one.noised


def test_a_sample_over_the_budget_is_named(toy):
    with pytest.raises(UserError, match="tokens_per_pack=50"):
        gradients(toy[0], examples_of(toy), tokens_per_pack=50)


def test_a_budget_that_cannot_hold_four_references_is_refused_at_the_start():
    """`full` once had 36,864 tokens a pack, and met its first four references in the middle."""
    full, seven_b = sft.Config(config="full"), ModelConfig()
    sft.check_budget(seven_b, full)
    with pytest.raises(UserError, match="tokens_per_pack=36864.*may take 40498 tokens"):
        sft.check_budget(seven_b, dataclasses.replace(full, tokens_per_pack=36_864))


def test_randomness_belongs_to_the_sample_not_to_the_step(toy):
    """Nor to the pack, nor to how often it is made."""
    latents, times = [], []
    for count in (1, 2, 2):
        packed = pack(toy, examples_of(toy, count)).packed
        latents.append(packed.latents[packed.noised])  # (M, C)
        times.append(packed.timesteps[packed.image_of_latent[packed.noised]])  # (M,)
    alone = len(latents[0])
    assert torch.equal(latents[1], latents[2]) and torch.equal(latents[0], latents[1][:alone])
    assert torch.equal(times[0], times[1][:alone]) and times[1][0] != times[1][alone]


def test_dropped_conditions(toy):
    """A dropped picture leaves two positions, dropped text nothing (docs/BAGEL.md §4)."""
    without_text, without_eye = dict(text_dropout=1.0), dict(vit_dropout=1.0)
    variants = [examples_of(toy, **options) for options in ({}, without_text, without_eye)]
    for i, (full, no_text, no_eye) in enumerate(zip(*variants)):
        references = len(draw_sample("train", i).references)
        packs = [pack(toy, [one]).packed for one in (full, no_text, no_eye)]
        texts = len(full.prompt[-1]) + 2 + (0 if full.plan is None else len(full.plan) + 2)
        at = [int(packed.positions[packed.latent_index[packed.noised[0]]]) for packed in packs]
        assert at == [2 * references + texts, 2 * references, 2 * references + texts]
        assert no_text.plan is None and len(packs[2].vit_index) == 0 and len(packs[0].vit_index) > 0


def test_training_starts_from_a_checkpoint(toy, tmp_path, capsys):
    """One step from `init`: the first loss is that of the checkpoint, not of fresh weights."""
    where = dict(init=str(toy[1] / "model"), out=str(tmp_path / "run"))
    config = dataclasses.replace(CONFIG, **where, steps=1, threads=1, painter_errors=0.0)
    sft.train(config)
    means, _ = gradients(toy[0], examples_of(toy, config.samples_per_step))
    line = loop.read_log(tmp_path / "run")[0]
    assert [line["ce"], line["mse"]] == pytest.approx(means, rel=1e-5)
    assert (tmp_path / "run/model/ema.safetensors").is_file()


# --------------------------------------------------------------------------------------------------
# a part of the weights


@pytest.mark.parametrize("train", ["gen", "lora"])
def test_fresh_weights_are_trained_whole(capsys, train):
    with pytest.raises(SystemExit) as refused:
        parse(sft.Config, sft.PRESETS, ["--config", "smoke", "--train", train])
    (line,) = capsys.readouterr().err.splitlines()
    assert refused.value.code == 2 and f"train={train}" in line and "--init" in line


@pytest.mark.parametrize("train", ["all", "gen"])
def test_the_text_loss_trains_the_writer_alone(toy, train):
    """Through the latents of references it would reach the painter of a frozen writer too."""
    model = toy[0].model
    examples = examples_of(toy, vae_dropout=0.0, plan_dropout=0.0, text_dropout=0.0)
    means, found = [], []
    try:
        trained = lora.trained_parameters(model, train)
        for ce_weight in (1.0, 0.0):
            config = dataclasses.replace(CONFIG, train=train, init="-", ce_weight=ce_weight)
            means.append(sft.backward(toy[0], examples, config))
            found.append([p.grad.clone() for p in trained.values()])
            model.zero_grad()
    finally:
        lora.trained_parameters(model, "all")
    assert means[0] == means[1] and means[0][0] > 0  # it is logged
    assert all(map(torch.equal, *found)) == (train == "gen")


def part(toy, out, train, **options):
    """The Config of a short run from the checkpoint that trains a part of its weights."""
    few = dict(
        samples_per_step=4, sample_plan_tokens=4, sample_timesteps=2, save_every=1, threads=1
    )
    start = dict(init=str(toy[1] / "model"), out=str(out), train=train, lora_rank=4, steps=2)
    return dataclasses.replace(CONFIG, **few | start | options)


def weights(folder):
    model, _ = load_model(folder)
    return dict(model.named_parameters())


def moved_only_the_painter(toy, out, train):
    """Whether the exported model of a run differs from the checkpoint in what it trains alone."""
    before, after = weights(toy[1]), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    names = {"gen": lora.TRAINED["gen"], "lora": (".gen.",)}[train]
    return moved and all(any(part in name for part in names) for name in moved)


@pytest.mark.parametrize("train", ["gen", "lora"])
def test_a_part_is_trained_resumed_and_exported(toy, tmp_path, train):
    sft.train(part(toy, tmp_path / "whole", train))
    sft.train(part(toy, tmp_path / "half", train, steps=1))
    sft.train(part(toy, tmp_path / "half", train))
    whole, half = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert moved_only_the_painter(toy, tmp_path / "whole", train)
    stored = FileSystemReader(tmp_path / "whole/state-000002").read_metadata().state_dict_metadata
    averaged = [key for key in stored if key.startswith("average.")]
    assert averaged and all(any(part in key for part in lora.TRAINED[train]) for key in averaged)


@pytest.mark.parametrize("train", ["gen", "lora"])
def test_a_part_is_trained_in_a_world_of_one(world_of_one, toy, tmp_path, train):
    """As on one GPU: in bfloat16, with the frozen weights out of the sharding."""
    config = part(toy, tmp_path / "run", train, precision="bfloat16", steps=1)
    sft.train(config)
    (narrow,) = loop.read_log(tmp_path / "run")
    sft.train(dataclasses.replace(config, precision="float32", out=str(tmp_path / "wide")))
    (wide,) = loop.read_log(tmp_path / "wide")
    for name in ("ce", "mse", "grad_norm"):
        assert narrow[name] == pytest.approx(wide[name], rel=0.05) and narrow[name] != wide[name]
    assert moved_only_the_painter(toy, tmp_path / "wide", train)


def test_the_longest_are_packed_first_and_keep_their_order_within_a_pack():
    """In the order they come these would take three packs."""
    assert sft.fill([3, 8, 5, 2, 2], 10) == [[1, 3], [0, 2, 4]]


def test_a_signal_ends_the_run_after_its_step(toy, tmp_path, monkeypatch, capsys):
    """The state is saved, and the next go makes the same model."""
    config = dataclasses.replace(
        CONFIG,
        samples_per_step=4,
        tokens_per_pack=300,
        sample_plan_tokens=4,
        sample_timesteps=2,
        steps=2,
        threads=1,
        save_every=9,
    )
    sft.train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(loop.Stop, "wanted", lambda self: True)
        sft.train(dataclasses.replace(config, out=str(tmp_path / "half")))
    assert stopped.value.code == loop.REQUEUE
    assert "stopped by a signal after step 1;" in capsys.readouterr().out
    sft.train(dataclasses.replace(config, out=str(tmp_path / "half")))
    whole, half = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(whole[name], half[name]) for name in whole)


@pytest.mark.parametrize("stage", [sft, grpo])
def test_full_has_no_samples_of_its_own(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage.processes, "launch", lambda *_: None)
    monkeypatch.setattr(grpo, "find_stage_1", lambda _: None)
    with pytest.raises(SystemExit) as refused:
        stage.train(parse(stage.Config, stage.PRESETS, ["--config", "full", "--out", "here"]))
    assert refused.value.code == 2 and not (tmp_path / "here").exists()
    assert "no samples of its own: name yours with --data" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [sft, grpo])
def test_a_mistyped_path_of_data_leaves_no_folder(stage, tmp_path, monkeypatch, capsys):
    """Its config.json would refuse the right command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo, "find_stage_1", lambda _: None)
    words = ["--config", "smoke", "--data", "shrads", "--out", "here", "--painter_errors", "0"]
    words = words[: 8 if stage is sft else 6]
    with pytest.raises(SystemExit) as refused:
        stage.train(parse(stage.Config, stage.PRESETS, words))
    assert refused.value.code == 2 and not (tmp_path / "here").exists()
    assert "no samples at shrads" in capsys.readouterr().err


def test_a_finished_run_writes_its_newest_state_again(toy, tmp_path):
    """A model that an earlier --export left behind is not taken for the finished one."""
    config = part(toy, tmp_path / "run", "all", steps=1)
    sft.train(config)
    early = weights(tmp_path / "run")
    shutil.copytree(tmp_path / "run/model", tmp_path / "early")
    sft.train(dataclasses.replace(config, steps=2))
    late = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    shutil.copytree(tmp_path / "early", tmp_path / "run/model")
    sft.train(dataclasses.replace(config, steps=2))
    again = weights(tmp_path / "run")
    assert all(torch.equal(late[name], again[name]) for name in late)
    assert any(not torch.equal(late[name], early[name]) for name in late)


def test_a_dealer_knows_what_references_will_take(toy):
    """Of pictures of the largest size."""
    how = dict(vae_dropout=0.5, vit_dropout=0.5, text_dropout=1.0)
    engine = toy[0]
    for options in (dict(how, in_context=flag) for flag in (True, False)):
        config = dataclasses.replace(CONFIG, **options)
        dealer = sft.Dealer(config, engine.model.config, Drawn("train", 0, 4))
        for number in range(20):
            one = draw_from_train(number)
            large = tuple(image.resize((world.SIZE, world.SIZE)) for image in one.references)
            found = made(toy, dataclasses.replace(one, references=large), number, **options)
            pictures = [item for item in found.prompt if not is_text(item)]
            assert dealer.tokens(number) == sum(map(engine.model.config.tokens_of, pictures))


def test_samples_of_a_step_are_dealt_by_their_length(toy, monkeypatch):
    config = dataclasses.replace(CONFIG, samples_per_step=24, vae_dropout=0.3, vit_dropout=0.3)
    config = dataclasses.replace(config, steps=4)
    dealer = sft.Dealer(config, toy[0].model.config, Drawn("train", 0, 4))
    assert dealer.own(3) == list(range(72, 96))  # one process takes them as they come
    monkeypatch.setattr(processes, "size", lambda: 6)
    shares = []
    for rank in range(6):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(dealer.own(3))
        assert list(dealer.ahead(2)) == [*dealer.own(2), *shares[-1]]
    assert sorted(number for own in shares for number in own) == list(range(72, 96))
    assert {len(own) for own in shares} == {4} and shares == [sorted(own) for own in shares]

    def spread(shares):
        totals = [sum(map(dealer.tokens, own)) for own in shares]
        return max(totals) - min(totals)

    in_turn = [range(72 + rank, 96, 6) for rank in range(6)]
    assert spread(shares) < spread(in_turn) / 2


class OneToFour:
    """A source of samples of one to four references."""

    def references(self, position):
        return int(np.random.default_rng(position).integers(1, 5))


def share_computed(dealer, shares):
    """The share of the tokens waited for that a GPU computes itself, if all wait for the largest
    pack of a pass. shares: of each GPU, numbers of samples."""
    latents, _ = sft.picture_tokens(dealer.shape)
    packs = []
    for numbers in shares:
        words = [int(np.random.default_rng((1, n)).integers(30, 340)) for n in numbers]
        tokens = [dealer.tokens(n) + latents + more for n, more in zip(numbers, words)]
        filled = sft.fill(tokens, dealer.config.tokens_per_pack)
        packs.append([sum(tokens[i] for i in some) for some in filled])
    waited = sum(map(max, itertools.zip_longest(*packs, fillvalue=0)))
    return sum(map(sum, packs)) / (waited * len(packs))


def test_the_passes_of_64_gpus_are_filled():
    """0.93 over ten steps; in turn a GPU would compute 0.60 of what it waits for."""
    config = sft.Config(config="full", **sft.PRESETS["full"])
    dealer, numbers = sft.Dealer(config, ModelConfig(), OneToFour()), range(512)
    assert share_computed(dealer, dealer.shares(0, 64)) > 0.9
    assert share_computed(dealer, [numbers[rank::64] for rank in range(64)]) < 0.7
    assert share_computed(dealer, [[0, 1], [0, 1]]) == 1


def test_pictures_stand_where_the_instruction_puts_them(toy):
    """As in sampling; without text they stand alone, and of what is dropped nothing is encoded."""
    one = next(one for one in map(draw_from_train, range(99)) if len(one.references) == 2)
    placed = dataclasses.replace(one, instruction="Put <image> beside <image>.")
    how = dict(plan_dropout=0.0, text_dropout=0.0, vae_dropout=1.0, vit_dropout=0.0)

    def items(sample, **options):
        return made(toy, sample, 0, **how | options).prompt

    assert [is_text(item) for item in items(one)] == [False, False, True]
    assert [is_text(item) for item in items(placed)] == [True, False, True, False, True]
    assert [is_text(item) for item in items(placed, text_dropout=1.0)] == [False, False]
    pictures = [item for item in items(placed) if not is_text(item)]
    assert all(one.for_codec is None and one.for_eye is not None for one in pictures)
    asked = toy[0].prompt(placed.references, placed.instruction).items
    assert [item for item in asked if is_text(item)] == [i for i in items(placed) if is_text(i)]


def draw_from_train(number):
    return draw_sample("train", number)
