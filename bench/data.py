"""
How fast samples come from disk: tar shards of 1024 px, against decoding alone.

    python -m bench data

24 samples of the toy world, enlarged to 1024 x 1024 and made noisy (a smooth picture would be a
small PNG), are written to shards in a temporary folder. The rivals: Pillow decodes all pictures
from memory; data.stream reads the same samples with no, one and two worker processes. Time is wall
time, since workers spend their own. Beside it stands, computed, what a training step at 7B consumes
on each GPU.
Left out: disks that are slow or far away (the files were just written), the resize, the codec.
"""

import io
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from bench.timing import IMAGE, VIT, as_keys, best_of
from data import Source, stream
from runtime.shards import ShardWriter
from toy.tasks import draw_sample
from vision import to_png

COUNT = 24  # samples
SHARD = 8  # samples of a shard


def bench_data(config):
    """Prints and returns samples a second {way to read them: samples/s}."""
    with tempfile.TemporaryDirectory() as folder:
        write_samples(folder, np.random.default_rng(config.seed))
        source = Source(folder)
        pictures = sum(len(source.sample(i).references) + 1 for i in range(COUNT))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        rivals = {
            "decoding alone": partial(decode, encoded_pictures(folder)),
            "loader, no worker": partial(read, source, 0),
            "loader, 1 worker": partial(read, source, 1),
            "loader, 2 workers": partial(read, source, 2),
        }
        best = best_of(config.repeats, rivals, time.perf_counter)
    print(f"{COUNT} samples of 1024 px, {pictures} pictures, {size / COUNT / 1e6:.1f} MB a sample")
    for name, seconds in best.items():
        print(f"  {name:20s}{COUNT / seconds:8.1f} samples/s{pictures / seconds:8.1f} pictures/s")
    print_need(COUNT / best["loader, 1 worker"])
    return as_keys({name: COUNT / seconds for name, seconds in best.items()}, 2)


def write_samples(folder, rng):
    """Shards of COUNT toy samples whose pictures have 1024 x 1024 pixels and noise."""
    with ShardWriter(folder, SHARD) as writer:
        for i in range(COUNT):
            one = draw_sample("train", i)
            relations = [{f"relation_{j}": r} for j, r in enumerate(one.plan.relations, 1)]
            record = {
                "key": one.key,
                "task": one.task,
                "instruction": one.instruction,
                "plan": {"out_caption": one.plan.caption, "relations": relations},
            }
            references = [to_png(enlarged(image, rng)) for image in one.references]
            writer.write(record, references, to_png(enlarged(one.target, rng)))


def enlarged(image, rng):
    """A toy picture of 1024 x 1024 pixels with noise of 24 levels."""
    large = np.asarray(image.resize((1024, 1024), Image.Resampling.BICUBIC))
    return Image.fromarray((large * 0.9 + rng.integers(0, 24, (1024, 1024, 3))).astype(np.uint8))


def encoded_pictures(folder):
    """The bytes of all pictures in the shards of a folder."""
    found = []
    for shard in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(shard) as tar:
            pictures = [entry for entry in tar if not entry.name.endswith(".json")]
            found += [tar.extractfile(entry).read() for entry in pictures]
    return found


def decode(encoded):
    """Decode pictures, given as bytes."""
    for content in encoded:
        Image.open(io.BytesIO(content)).convert("RGB").load()


def read(source, workers):
    """Read all samples of a source in order."""
    for _ in stream(source, range(COUNT), workers):
        pass


def print_need(fed):
    """What a step at 7B consumes, beside the samples a second that one worker feeds."""
    # of a sample: 2.7 pictures on average, its references seen twice
    tokens = 2.7 * (IMAGE + VIT + 4) + IMAGE + 300
    need = 0.4 * 989e12 / (6 * 6.5e9 * tokens)
    print(
        f"a step at 7B consumes {need:.2f} samples/s on each GPU (40 % of 989 TFLOP/s, "
        f"{tokens:,.0f} tokens a sample): one worker feeds {fed / need:.0f} GPUs"
    )
