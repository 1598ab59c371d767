"""Samples on disk: written and read back, in an order that can be resumed at any place, and every
kind of damage named."""

import dataclasses
import gc
import io
import json
import multiprocessing
import os
import signal
import subprocess
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import curate
import data
import iccot
import sft
from data import ShardWriter, Source
from runtime import files, loop
from runtime.config import UserError
from studies.metrics import HeldOut
from toy.tasks import Drawn, draw_sample
from vision import to_png


def record_of(sample):
    return {
        "key": sample.key,
        "task": sample.task,
        "instruction": sample.instruction,
        "plan": iccot.to_record(sample.plan),
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
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"samples-00000{i}.tar" for i in range(3)]
    source = Source(folder)
    assert len(source) == 23
    assert all(same(source.sample(i), sample) for i, sample in enumerate(samples))
    assert data.record_of(source.entries[3])["scores"] == {"clip": 0.3}
    assert same(Source(folder / "samples-000001.tar").sample(0), samples[10])
    with tarfile.open(folder / "samples-000000.tar") as tar:  # WebDataset's names
        names = tar.getnames()
    suffixes = ["json", *(f"ref_{i}.png" for i in range(1, len(samples[0].references) + 1))]
    expected = [f"{samples[0].key}.{suffix}" for suffix in [*suffixes, "target.png"]]
    assert names[: len(expected)] == expected


def test_references_are_counted_without_reading(folder, monkeypatch):
    source = Source(folder, seed=1, buffer=5)
    expected = [len(source[i].references) for i in range(50)]  # of three epochs
    monkeypatch.setattr(data, "member", None)
    assert [Source(folder, seed=1, buffer=5).references(i) for i in range(50)] == expected


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
    assert len(source) == 4
    assert all(same(source.sample(i), sample) for i, sample in enumerate(samples[:4]))
    places = range(9)  # of three epochs
    assert [source.references(i) for i in places] == [len(source[i].references) for i in places]
    (tmp_path / "records.jsonl").write_text("\n".join([*lines, "{", "[]", "7"]) + "\n")
    assert sorted(map(Source(tmp_path).references, range(7)))[:3] == [0, 0, 0]


def test_an_epoch_has_every_sample_once_and_no_two_the_same_order(folder):
    source = Source(folder, seed=1, buffer=5)
    orders = [[source.number(23 * epoch + i) for i in range(23)] for epoch in range(3)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    # as it always was: a run that was begun before reads on where it stopped
    assert orders[0][:12] == [4, 0, 1, 2, 3, 8, 5, 6, 9, 7, 12, 13]


# --------------------------------------------------------------------------------------------------
# the order at any size


def tasks_in_order(count):
    """The tasks of `count` samples sorted by task, in the paper's proportions."""
    shares = np.array(list(iccot.TASKS.values())) / sum(iccot.TASKS.values())
    bounds = np.floor(np.cumsum([0, *shares]) * count + 0.5).astype(int)
    return [task for task, n in zip(sorted(iccot.TASKS), np.diff(bounds)) for _ in range(n)]


@pytest.fixture
def sorted_by_task(tmp_path, monkeypatch):
    """A function of (count, shards) -> a Source of samples sorted by task, without any picture."""

    def make(count, shards, seed=0, split="all"):
        entries = [(f"{task}-{i:06d}", {}) for i, task in enumerate(tasks_in_order(count))]
        index, folder = {}, tmp_path / f"{count}-{shards}"
        folder.mkdir(exist_ok=True)
        for i, part in enumerate(np.array_split(np.arange(count), shards)):
            path = folder / f"samples-{i:06d}.tar"
            path.touch()
            index[path] = [entries[number] for number in part]
        monkeypatch.setattr(data, "index_of", index.get)
        return Source(folder, seed, split)

    return make


@pytest.mark.parametrize("shards", [1, 60])
def test_every_step_has_the_mixture_of_the_whole(sorted_by_task, shards):
    source = sorted_by_task(60_000, shards, seed=3)
    tasks = np.array([entry.key.rsplit("-", 1)[0] for entry in source.entries])
    mixture = max(Counter(tasks).values()) / 60_000
    shares = []
    for epoch in range(2):
        order = data.order(60_000, 3, epoch, 1000)
        steps = [tasks[order[start : start + 512]] for start in range(0, 60_000 - 512, 512)]
        shares += [max(Counter(step).values()) / 512 for step in steps]
    # 512 drawn independently would stray by 0.02, one standard deviation
    assert max(shares) < mixture + 0.08 and np.mean(shares) < mixture + 0.02


def test_a_large_epoch_is_ordered_fast_and_read_forward():
    begun = time.process_time()
    order = data.order(410_000, 0, 0, 1000)
    assert time.process_time() - begun < 2
    assert np.array_equal(np.sort(order), np.arange(410_000))
    unshuffled = data.order(10_000, 0, 0, 1)
    forward = unshuffled[data.LANES :] - unshuffled[: -data.LANES] == 1
    assert forward.mean() > 0.98


def test_curated_shards_have_tasks_mixed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "a.png").write_bytes(to_png(draw_sample("train", 0).target))
    plan = {"out_caption": "A moon.", "relations": [{"relation_1": "It is from image_1."}]}
    record = {"instruction": "Draw image 1.", "plan": plan, "scores": dict(clip=0.3, PF=10, SC=10)}
    record |= {"references": ["a.png"], "target": "../a.png"}
    keys = [f"{task}-{i:03d}" for i, task in enumerate(tasks_in_order(70))]
    records = {key: record | {"key": key, "task": key[:-4]} for key in keys}
    config = curate.Config(out=str(tmp_path / "out"), pools=str(tmp_path))
    curate.write_shards(records, config)
    tasks = [entry.key[:-4] for entry in Source(tmp_path / "out/shards").entries]
    assert sorted(tasks) == tasks_in_order(70)
    assert sum(a != b for a, b in zip(tasks, tasks[1:])) > 30  # 6 if sorted


# --------------------------------------------------------------------------------------------------
# the held-out share


def keys_of(source):
    return [entry.key for entry in source.entries]


def test_training_never_sees_what_is_held_out(sorted_by_task):
    whole, train, held = (
        keys_of(sorted_by_task(5000, 5, split=split)) for split in ("all", "train", "held_out")
    )
    assert sorted(train + held) == sorted(whole) and not set(train) & set(held)
    assert 0.01 < len(held) / 5000 < 0.03
    half = whole[::2]
    assert data.held_out_keys(half) == set(held) & set(half)  # in any company
    assert keys_of(sorted_by_task(5000, 50, split="held_out")) == held  # in any shards


def test_the_commands_split_what_is_on_disk(folder, samples, capsys):
    train, held = data.open_source(str(folder), 0, 4), HeldOut(str(folder), 5).samples()
    assert (
        "has 1 held out (one sample in 50; all: evaluate.py --split all); 5 were asked for"
        in capsys.readouterr().err
    )
    assert len(train) == 22 and len(held) == 1 and held[0].key not in keys_of(train)
    assert {*keys_of(train), held[0].key} == {sample.key for sample in samples}
    assert len(HeldOut(str(folder), 30, split="all").samples()) == 23
    assert "has 23 samples; 30 were asked for" in capsys.readouterr().err
    with pytest.raises(UserError, match="split=all is for samples on disk"):
        HeldOut(count=1, split="all")
    lines = [json.dumps({"key": sample.key}) for sample in samples]
    (folder / "records.jsonl").write_text("\n".join(lines))
    assert keys_of(Source(folder, split="held_out")) == [held[0].key]  # in any layout


def test_workers_outlive_a_signal_to_all_processes(folder):
    """Of torchrun or SLURM: the process that trains saves, and its workers end with the stream."""
    ours = {process.pid for process in multiprocessing.active_children()}
    samples = data.stream(Source(folder), range(60), 2)
    first = [next(samples) for _ in range(2)]  # one of each worker
    workers = [p for p in multiprocessing.active_children() if p.pid not in ours]
    assert len(workers) == 2
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    assert len([*first, *samples]) == 60
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_samples_with_too_many_references_are_left_out(folder, samples, capsys):
    """In training and in measuring: the memory was promised for max_references."""
    limited = Source(folder, limit=1)
    few = [sample for sample in samples if len(sample.references) == 1]
    assert f"{23 - len(few)} of 23 samples of {folder} have more than" in capsys.readouterr().err
    assert len(limited) == len(few) < 23
    assert all(same(limited.sample(i), sample) for i, sample in enumerate(few))
    source = data.open_source(str(folder), 0, 2)
    assert max(len(source[position].references) for position in range(40)) == 2
    with pytest.raises(UserError, match="all 1 samples of .* have more than max_references=0"):
        HeldOut(str(folder), 1, max_references=0).samples()


def test_few_samples_are_split_too(tmp_path, samples, capsys):
    def source(count, split):
        lines = [json.dumps({"key": one.key}) + "\n" for one in samples[:count]]
        (tmp_path / "records.jsonl").write_text("".join(lines))
        return keys_of(Source(tmp_path, split=split))

    for count in (2, 3):
        assert len(source(count, "train")) == count - 1 and len(source(count, "held_out")) == 1
    assert capsys.readouterr().err == ""
    assert source(1, "train") == source(1, "held_out") == [samples[0].key]
    assert capsys.readouterr().err.count("warning") == 1


# --------------------------------------------------------------------------------------------------
# the index


def test_headers_are_scanned_once(folder, samples, monkeypatch):
    scanned, scan = [], data.scan
    monkeypatch.setattr(data, "scan", lambda shard: scanned.append(shard.name) or scan(shard))
    first = Source(folder)
    assert len(scanned) == 3 and len(list(folder.glob("*.index.json"))) == 3
    again = Source(folder)
    assert len(scanned) == 3 and again.entries == first.entries
    assert all(same(again.sample(i), sample) for i, sample in enumerate(samples))
    shard, other = folder / "samples-000000.tar", folder / "samples-000001.tar"
    os.utime(shard)  # touched: no longer known
    assert Source(folder).entries == first.entries and scanned[3:] == [shard.name]
    shard.write_bytes(other.read_bytes())
    assert keys_of(Source(shard)) == [sample.key for sample in samples[10:20]]


def test_a_folder_that_cannot_be_written_is_scanned(folder, monkeypatch, capsys):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "write_text", refuse)
    assert len(Source(folder)) == len(Source(folder)) == 23
    assert not list(folder.glob("*.index.json")) and capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------
# resuming, workers, broken samples


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


def without_target(*keys):
    def change(files):
        for key in keys:
            files.pop(f"{key}.target.png")

    return change


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_skipped(folder, capfd, workers):
    good = Source(folder / "samples-000000.tar", seed=1)
    bad = Source(damaged(folder, without_target(KEY)), seed=1)
    expected = [good[place].key for place in range(61)]
    for place in range(59, -1, -1):  # the next position stands in for it
        if expected[place] == KEY:
            expected[place] = expected[place + 1]
    assert [one.key for one in data.stream(bad, range(20), workers)] == expected[:20]
    assert [one.key for one in data.stream(bad, range(20, 60), workers)] == expected[20:60]
    skipped = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert len(skipped) == 1 if workers == 0 else 1 <= len(skipped) <= 4  # once in a process
    assert all("skipped (1 so far): " in line and KEY in line for line in skipped)
    assert all("'target' is missing" in line for line in skipped)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_samples_stop_the_run(folder, samples, monkeypatch, workers):
    # how long PyTorch waits for each worker of a stream that was given up
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    keys = [one.key for one in samples[:10]]
    bad = Source(damaged(folder, without_target(*keys[:4])))
    with pytest.raises(
        UserError, match="21 of the last .*, most often: 'target' is missing"
    ) as error:
        for _ in data.stream(bad, range(1000), workers):
            pass
    assert "\n" not in str(error.value) and len(bad.skipped) == (0 if workers else 4)
    nothing = Source(damaged(folder, without_target(*keys)))
    with pytest.raises(UserError, match="21 of the last 21 samples cannot be read"):
        next(data.stream(nothing, range(1000), workers))
    del error
    gc.collect()  # the streams end here, while the wait is short


def test_a_broken_sample_is_not_measured(folder, samples, capsys):
    held = data.held_out_keys([one.key for one in samples[:10]])
    bad = damaged(folder, without_target(*held))
    with pytest.raises(UserError, match="none of the 1 samples of"):
        HeldOut(str(bad), 3).samples()
    assert capsys.readouterr().err.count("skipped") == 1


KEY = "train-0-00000000"  # its prompt has one reference
LONG_PLAN = {"out_caption": "A red " * 90, "relations": [{"relation_1": "It is from image_1."}]}


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda files: files.update({f"{KEY}.target.png": files[f"{KEY}.target.png"][:60]}),
            "cannot be read as a picture",
        ),
        (without_target(KEY), "'target' is missing"),
        (lambda files: files.update({f"{KEY}.json": b"{"}), "Expecting"),
        (lambda files: files.pop(f"{KEY}.json"), "'json' is missing"),
        (
            lambda files: files.update({f"{KEY}.ref_3.png": files[f"{KEY}.target.png"]}),
            "'ref_2' is missing",
        ),
        (
            lambda files: files.update({f"{KEY}.target.jpg": files[f"{KEY}.target.png"]}),
            "it has 2 files called target",
        ),
        (edit(KEY, plan={"out_caption": "A city.", "relations": []}), "relation_1"),
        (edit(KEY, instruction="<image> and <image>"), "2 times <image>, but 1 references"),
        (edit(KEY, instruction=" "), "its instruction has 1 characters"),
        (edit(KEY, plan=LONG_PLAN), "CLIP tokens"),
    ],
)
def test_damage_is_named(folder, capsys, change, words):
    bad = damaged(folder, change)
    with pytest.raises(SystemExit) as stopped:
        data.main(["--check", str(bad)])
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and words in out and KEY in out
    assert "10 samples, 1 problems" in out


def test_samples_pass_and_are_shown(folder, capsys, tmp_path):
    data.main(["--check", str(folder)])
    assert "23 samples, 0 problems" in capsys.readouterr().out
    sheet = tmp_path / "new/sheet.png"
    data.main(["--show", str(folder), "--count", "5", "--out", str(sheet)])
    assert "5 samples" in capsys.readouterr().out and sheet.is_file()
    data.main(["--show", "--count=7", f"--out={sheet}"])
    with Image.open(sheet) as image:
        assert image.width > 700 and image.height == 7 * 136 + 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--show", "--count=0"], "count=0, index=0: expected 1 or more"),
        (["--show", "--max_references=12"], "outside 2 to 10"),
        (["--show", "--cuont=3"], "did you mean --count"),
        (["--check"], "expected --show, --show PATH or --check PATH"),
    ],
)
def test_mistakes_of_the_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


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


def test_workers_do_not_outlive_a_process_that_is_killed():
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        inherited = set(multiprocessing.active_children())
        samples = data.stream(Drawn("train", 0, 4), range(10**6), 2)
        next(samples)
        workers = [child.pid for child in set(multiprocessing.active_children()) - inherited]
        os.write(writing, json.dumps(workers).encode())
        time.sleep(99)
        os._exit(0)
    workers = json.loads(os.read(reading, 99))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until = time.monotonic() + 20
    while any(map(runs, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(workers) == 2 and not any(map(runs, workers))


def runs(pid):
    """Whether a process is there, and not only its name."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_two_broken_samples_of_23_do_not_end_a_run(folder, monkeypatch):
    """Read again in every epoch, they are sooner or later more than a tenth of the last 200 reads;
    but not of the samples."""
    source, broken = Source(folder), {3, 17}

    def load(number):
        if number in broken:
            raise ValueError("broken")
        return number

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(source, "name", str)
    source.entries = list(range(23))
    assert not broken & {source[position] for position in range(20_000)}
    broken.add(4)  # three of 23 are more than a tenth
    with pytest.raises(UserError, match="cannot be read"):
        [source[position] for position in range(20_000)]
