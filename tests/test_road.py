"""
The road to `full`, driven: preset `rehearsal` has its recipe and its shapes, and thin weights.

By the commands of a user: both stages, strips, held-out metrics, table, export, sampling. Pictures
are of 64 pixels here, by hand of 512; the FLUX codec, the eye's patches of 14, condition dropout,
guidance in three contexts and members split by step are those of the large runs. Then on two
processes whose packs differ, with LoRA, from a folder of shards.
"""

import json

import pytest
import torch
from forked import run
from PIL import Image
from safetensors.torch import load_file
from test_shards import record_of

from data import ShardWriter
from model import REHEARSAL, ModelConfig, UnifiedModel
from runtime import loop
from runtime.pretrained import load_model, save_model
from toy.tasks import Drawn
from toy.tokenizer import train_tokenizer
from vision import to_png

TINY = "--config rehearsal --threads 1 --eval_every 2 --steps 2 --save_every 2".split()


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The folder of both stages on one process; then stage 1 and 2 on two, from shards."""
    folder = tmp_path_factory.mktemp("road")
    shape = ModelConfig(**REHEARSAL | dict(image_shortest=64, vit_shortest=56))
    tokenizer = train_tokenizer(folder / "tokenizer", shape.vocab_size)
    save_model(UnifiedModel(shape).initialise(0), tokenizer, folder / "fresh")
    clips = ["--clip", folder / "clip-r", "--metric", folder / "clip-m"]
    small = [*TINY, "--metric", folder / "clip-m"]
    small += ["--sample_plan_tokens", 24]  # the model is untrained: it writes to the end
    run(
        *["sft.py", *small, "--picture_side", 64, "--init", folder / "fresh"],
        *["--out", folder / "sft"],
    )
    grpo = [*TINY, *clips, "--picture_side", 64, "--max_plan_tokens", 24, "--eval_samples", 2]
    one = ["--tokens_per_pack", 120, "--init", folder / "sft"]
    run("grpo.py", *grpo, *one, "--out", folder / "grpo")
    source = Drawn("train", 0, 4, 2)
    with ShardWriter(folder / "shards", size=10) as writer:
        for i in range(40):
            sample = source[i]
            pictures = [to_png(image) for image in sample.references]
            writer.write(record_of(sample), pictures, to_png(sample.target))
    data = ["--data", folder / "shards"]
    uneven = ["--vit_dropout", 0.6, "--vae_dropout", 0.6]
    run(
        *["sft.py", *small, *data, *uneven, "--picture_side", 64],
        *["--init", folder / "sft", "--out", folder / "sft-2"],
        processes=2,
    )
    # a group on each process, split by score, adapters alone
    two = ["--train", "lora", "--lora_rank", 4, "--prompts_per_step", 2, "--updates", 1]
    run(
        *["grpo.py", *grpo, *data, *two, "--eval_data", folder / "shards"],
        *["--init", folder / "sft-2", "--out", folder / "grpo-2"],
        processes=2,
    )
    return folder


@pytest.mark.parametrize("stage", ["sft", "grpo", "sft-2", "grpo-2"])
def test_every_stage_ends_with_a_log_and_a_model_that_opens(road, stage):
    lines = loop.read_log(road / stage)
    assert [line["step"] for line in lines] == [0, 1]
    numbers = [value for line in lines for value in line.values()]
    assert all(isinstance(value, int | float) for value in numbers)  # nothing that is not finite
    assert "held_out_CLIP_out" in lines[1]
    assert ("held_out_PF" in lines[1]) == (not stage.endswith("2"))
    model, tokenizer = load_model(road / stage, "cpu", torch.float32)
    assert model.config.codec == "flux" and model.config.vit_patch == 14
    assert (road / stage / "model" / "ae.safetensors").is_file()
    model.config.layout(tokenizer)
    with Image.open(road / stage / "samples" / "000002.png") as strip:
        assert strip.size[0] > 0


@pytest.mark.parametrize("stage, held_out", [("grpo", 2), ("grpo-2", 1)])  # one of 40 on disk
def test_stage_2_ends_with_a_table(road, stage, held_out):
    lines = loop.read_log(road / stage)
    assert all(line["trained_tokens"] > 0 for line in lines)
    table = json.loads((road / stage / "table.json").read_text())
    assert set(table) == {"SFT", "SFT + GRPO"} and table["SFT"]["n"] == held_out


def test_the_same_codec_everywhere(road):
    """It is frozen: drawn once for a fresh model, then handed on from stage to stage."""
    first, *others = (
        load_file(road / stage / "model" / "ae.safetensors")
        for stage in ("sft", "grpo", "sft-2", "grpo-2")
    )
    assert all(torch.equal(first[name], one[name]) for one in others for name in first)


def test_the_end_of_the_road_is_a_picture_and_a_row(road):
    words = ["--config", "rehearsal", "--checkpoint", road / "grpo", "--max_plan_tokens", 24]
    Image.new("RGB", (64, 96), (200, 30, 30)).save(road / "a.png")
    ask = ["--ref", road / "a.png", "--prompt", "Put it at the left.", "--num_timesteps", 3]
    run("sample.py", *words, *ask, "--out", road / "picture.png")
    with Image.open(road / "picture.png") as picture:
        assert picture.size == (64, 96)
    about = json.loads((road / "picture.json").read_text())
    assert about["prompt"] == "Put it at the left."
    small = ["--side", 64, "--num_samples", 2, "--num_timesteps", 3]
    measure = ["--metric", road / "clip-m", "--threads", 1, "--json"]
    row = json.loads(run("evaluate.py", *words, *small, *measure).strip().splitlines()[-1])
    assert row["n"] == 2 and row["PF"] is not None and row["CLIP_out"] is not None
