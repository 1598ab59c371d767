"""Samples on disk: written and read back, in an order that can be resumed at any place, and every
kind of damage named."""

import dataclasses
import io
import json
import tarfile

import pytest
import torch

import data
import iccot
import sft
from data import ShardWriter, Source
from runtime import loop
from runtime.config import UserError
from toy.tasks import draw_sample
from vision import to_png


def record_of(sample):
    return {
        "key": sample.key,
        "task": sample.task,
        "instruction": sample.instruction,
        "plan": json.loads(iccot.to_json(sample.plan)),
        "scores": {"clip": 0.3},
        "provenance": {"model": "toy"},
    }


@pytest.fixture
def samples():
    return [draw_sample("train", i) for i in range(23)]


@pytest.fixture
def folder(tmp_path, samples):
    with ShardWriter(tmp_path / "shards", size=10) as writer:
        for sample in samples:
            writer.write(
                record_of(sample),
                [to_png(image) for image in sample.references],
                to_png(sample.target),
            )
    return tmp_path / "shards"


def same(a, b):
    def content(sample):
        pixels = [image.tobytes() for image in (*sample.references, sample.target)]
        return sample.key, sample.task, sample.instruction, sample.plan, pixels

    return content(a) == content(b)


def test_round_trip(folder, samples):
    assert sorted(path.name for path in folder.iterdir()) == [
        f"samples-00000{i}.tar" for i in range(3)
    ]
    source = Source(folder)
    assert len(source) == 23 and all(same(source.sample(i), one) for i, one in enumerate(samples))
    assert source.record(3)["scores"] == {"clip": 0.3}
    assert same(Source(folder / "samples-000001.tar").sample(0), samples[10])


def test_any_tar_reader_finds_webdatasets_names(folder, samples):
    with tarfile.open(folder / "samples-000000.tar") as tar:
        names = tar.getnames()
    first = samples[0]
    expected = [
        f"{first.key}.json",
        *(f"{first.key}.ref_{i}.png" for i in range(1, len(first.references) + 1)),
        f"{first.key}.target.png",
    ]
    assert names[: len(expected)] == expected


def test_plain_folder(tmp_path, samples):
    lines = []
    for sample in samples[:4]:
        pictures = [*sample.references, sample.target]
        paths = [f"pictures/{sample.key}-{i}.png" for i in range(len(pictures))]
        (tmp_path / "pictures").mkdir(exist_ok=True)
        for image, path in zip(pictures, paths):
            image.save(tmp_path / path)
        lines.append(
            json.dumps(record_of(sample) | {"references": paths[:-1], "target": paths[-1]})
        )
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    source = Source(tmp_path)
    assert len(source) == 4 and all(
        same(source.sample(i), one) for i, one in enumerate(samples[:4])
    )


def test_an_epoch_has_every_sample_once_and_no_two_the_same_order(folder):
    source = Source(folder, seed=1, buffer=5)
    orders = [source.order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] == source.order(0).tolist()  # left the cache and came back
    assert orders[0] == Source(folder, seed=1, buffer=5).order(0).tolist()
    for start in range(0, 23, 5):  # a stretch of the buffer comes from neighbours on disk
        assert len({number // 10 for number in orders[0][start : start + 5]}) <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_can_be_resumed_and_shared(folder, workers):
    source = Source(folder, buffer=5)
    whole = [sample.key for sample in data.stream(source, range(60))]
    assert [sample.key for sample in data.stream(source, range(17, 60), workers)] == whole[17:]
    ranks = [
        [sample.key for sample in data.stream(source, range(rank, 60, 2), workers)]
        for rank in range(2)
    ]
    assert [key for pair in zip(*ranks) for key in pair] == whole


def damaged(folder, change):
    """A copy of one shard whose files went through `change`."""
    with tarfile.open(folder / "samples-000000.tar") as tar:
        files = {entry.name: tar.extractfile(entry).read() for entry in tar}
    change(files)
    bad = folder / "bad"
    bad.mkdir(exist_ok=True)
    with tarfile.open(bad / "x.tar", "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return bad


def edit(key, **fields):
    def change(files):
        files[f"{key}.json"] = json.dumps(json.loads(files[f"{key}.json"]) | fields).encode()

    return change


KEY = "train-0-00000000"  # its prompt has one reference


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda files: files.update({f"{KEY}.target.png": files[f"{KEY}.target.png"][:60]}),
            "cannot be read as a picture",
        ),
        (lambda files: files.pop(f"{KEY}.target.png"), "no target picture"),
        (lambda files: files.update({f"{KEY}.json": b"{"}), "Expecting"),
        (lambda files: files.pop(f"{KEY}.json"), "'json' is missing"),
        (
            lambda files: files.update({f"{KEY}.ref_3.png": files[f"{KEY}.target.png"]}),
            "references are numbered [1, 3]",
        ),
        (edit(KEY, plan={"out_caption": "A city.", "relations": []}), "relation_1"),
        (edit(KEY, instruction="The thing of image 7."), "names image 7"),
        (edit(KEY, instruction=" "), "its instruction has 1 characters"),
        (
            edit(
                KEY,
                plan={
                    "out_caption": "A red " * 90,
                    "relations": [{"relation_1": "It is from image_1."}],
                },
            ),
            "CLIP tokens",
        ),
    ],
)
def test_damage_is_named(folder, capsys, change, words):
    bad = damaged(folder, change)
    with pytest.raises(SystemExit) as stopped:
        data.main(["--check", str(bad)])
    out = capsys.readouterr().out
    assert (
        stopped.value.code == 1 and words in out and KEY in out and "10 samples, 1 problems" in out
    )


def test_a_good_folder_passes_and_is_shown(folder, capsys, tmp_path):
    data.main(["--check", str(folder)])
    assert "23 samples, 0 problems" in capsys.readouterr().out
    data.main(["--show", str(folder), "--count", "5", "--out", str(tmp_path / "sheet.png")])
    assert "5 samples" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()


def test_no_samples(tmp_path, folder):
    with pytest.raises(UserError, match="no samples at"):
        Source(tmp_path / "nothing")
    (folder / "torn.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match="torn.tar cannot be read as a tar file"):
        Source(folder)


def test_sft_trains_on_shards(folder, tmp_path):
    config = dataclasses.replace(
        sft.Config(config="smoke", **sft.PRESETS["smoke"]),
        data=str(folder),
        steps=2,
        samples_per_step=4,
        threads=1,
    )
    sft.train(dataclasses.replace(config, out=str(tmp_path / "a")))
    sft.train(dataclasses.replace(config, out=str(tmp_path / "b"), workers=1))
    a, b = (loop.read_log(tmp_path / name) for name in "ab")
    assert len(a) == 2 and [line["mse"] for line in a] == [line["mse"] for line in b]
    assert torch.isfinite(torch.tensor([line["ce"] for line in a])).all()
