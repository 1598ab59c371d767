"""Every option acts: each is changed here, and the result changes with it.

The commands run in this process, on a model of 130,000 weights and on pictures of 16 pixels. What
is slow and not theirs is replaced by something that notes what it was asked for: the CLIPs, the
strips, the tables, writing states. A new option without a row in option_rows.py fails.

Options that bound memory or time alone are seen in how the work is cut (CUT); their log must stay
what it was. ELSEWHERE are those that need several processes, a GPU or a whole run: the test that is
named there must name the option.
"""

import ast
import collections
import contextlib
import dataclasses
import io
import itertools
import json
import re
import tempfile
import types
import zlib
from pathlib import Path

import pytest
import torch
from option_rows import BASE, ELSEWHERE, ROWS
from test_shards import record_of

import evaluate
import grpo
import iccot
import model
import sample
import sft
import toy.painter
import toy.prepare
from data import ShardWriter
from runtime import loop, pretrained, processes, state
from studies import ablation, benchmarks, metrics
from studies.endpoint import Access
from toy.tasks import draw_sample
from toy.tokenizer import train_tokenizer
from vision import to_png

MODULES = {"grpo": grpo, "sft": sft, "sample": sample, "evaluate": evaluate}
CUT = ("passes", "blocks", "saves", "read", "judged")  # how the work is done
# --------------------------------------------------------------------------------------------------
# what the commands work on


class Colours:
    """A CLIP that knows the mean colour of a picture, and gives each caption a direction."""

    truncated = 0

    def embed_images(self, images):
        pixels = [image.convert("RGB").resize((1, 1)).getpixel((0, 0)) for image in images]
        return torch.nn.functional.normalize(torch.tensor(pixels).float() - 100, dim=-1)

    def embed_captions(self, captions):
        seeds = [torch.Generator().manual_seed(zlib.crc32(one.encode())) for one in captions]
        found = torch.stack([torch.randn(3, generator=one) for one in seeds])
        return torch.nn.functional.normalize(found, dim=-1)

    def score(self, images, captions):
        return self.clip_out(images, captions)

    def clip_out(self, images, captions):
        return 100 * (self.embed_images(images) * self.embed_captions(captions)).sum(-1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two checkpoints, samples on disk, pictures, prompts and two benchmarks."""
    folder = tmp_path_factory.mktemp("options")
    tokenizer = train_tokenizer(folder / "tokenizer", model.SMOKE["vocab_size"])
    for seed, name in enumerate(("model", "other")):
        one = model.UnifiedModel(model.ModelConfig(**model.SMOKE)).initialise(seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in one.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        pretrained.save_model(one, tokenizer, folder / name)
    with ShardWriter(folder / "shards", size=10) as writer:
        for one in (draw_sample("train", i, 5) for i in range(9)):
            pictures = [to_png(image) for image in one.references]
            writer.write(record_of(one), pictures, to_png(one.target))
    one = draw_sample("train", 0)
    one.target.resize((16, 16)).save(folder / "a.png")
    one.target.resize((32, 16)).save(folder / "wide.png")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "They meet."}))
    for name, text in (("bench", "Do it."), ("bench-2", "Do something else.")):
        case = folder / name / "editing_benchmark/add/1"
        case.mkdir(parents=True)
        (case / "instruction.txt").write_text(text)
        one.target.save(case / "ref_0.png")
    return folder, tokenizer


SIMPLE = (str, int, float, Path, dict, torch.dtype, torch.device, metrics.HeldOut, Access)


def noted(patch, seen, owner, name, *, key, instead=None):
    """A call of `owner.name` is also written down: (name, what of its arguments is simple)."""
    original = getattr(owner, name) if instead is None else instead

    def call(*words, **named):
        given = [one for one in (*words, *named.values()) if isinstance(one, SIMPLE)]
        given += [config.metric for config in words if hasattr(config, "metric")]
        seen[key].append((name, given))
        return original(*words, **named)

    patch.setattr(owner, name, call)


def nothing(*_, **__):
    return None


def colours(*_, **__):
    return Colours()


def unmeasured(*_, **__):
    return {}


def two_rows(*_, **__):
    return {"SFT": {"Overall": 1.0}, "SFT + GRPO": {"Overall": 2.0}}


def judge_of(*_):
    return types.SimpleNamespace(ask=lambda question, read: read('{"score": 7}'))


def row_of_ones(*_, **__):
    return dict.fromkeys(metrics.COLUMNS, 1.0)


def tracker(*_, **__):
    return types.SimpleNamespace(log=nothing, close=nothing)


def never():
    return types.SimpleNamespace(wanted=lambda: False)


def save(tensors, checkpoint_id, **_):
    """A state on disk, without its tensors."""
    Path(checkpoint_id).mkdir()
    (Path(checkpoint_id) / ".metadata").touch()


def a_plan(text, *_):
    """A model of random weights writes none that could be read."""
    return types.SimpleNamespace(caption=f"A {text}")


# fmt: off
STAGES = [  # where, the function, under what it is noted, what it does instead
    (processes, "launch", "launched", nothing),
    (state.dcp, "save", "saves", save),
    (loop, "Tracker", "tracker", tracker),
    (loop, "save_model", "weights", nothing),
    (loop, "Stop", "stop", never),
]
OWN = {
    "sft": [
        (sft, "stream", "read", None),
        (sft, "save_strip", "strips", nothing),
        (sft, "save_story", "curves", nothing),
        (sft, "measured_together", "measured", unmeasured),
        (sft, "metric_clip_of_all", "asked", colours),
        (toy.prepare, "metric_clip_of_all", "filter", colours),
    ],
    "grpo": [
        (grpo, "prepare", "prepared", nothing),
        (grpo, "save_strip", "strips", nothing),
        (grpo, "measured_together", "measured", unmeasured),
        (grpo, "metric_clip_of_all", "asked", colours),
        (grpo, "Clip", "asked", colours),
        (grpo, "compare_checkpoints", "strips", two_rows),
        (grpo, "save_story", "curves", nothing),
        (iccot, "is_valid", "plans", lambda *_: True),
        (iccot, "parse", "plans", a_plan),
    ],
    "sample": [],
    "evaluate": [
        (evaluate, "metric_clip_of_all", "asked", colours),
        (benchmarks, "Endpoint", "asked", judge_of),
        (benchmarks, "in_parallel", "judged", None),
        (ablation, "train_row", "rows", nothing),
        (ablation, "measure_row", "measured", row_of_ones),
        (ablation, "save_curves", "plotted", nothing),
    ],
}
# fmt: on


class Results:
    """`Results(place)(name, options)`: what a command does with these options; run once each."""

    def __init__(self, place):
        self.folder, self.tokenizer = place
        self.loaded = pretrained.load_model(self.folder / "model")
        self.known = {}

    def __call__(self, name, options):
        key = name, json.dumps(options, sort_keys=True)
        if key not in self.known:
            self.known[key] = self.run(name, options)
        return self.known[key]

    def run(self, name, options):
        """{what: a list} of one command, in a folder of its own."""
        module, seen = MODULES[name], collections.defaultdict(list)
        values = module.PRESETS["smoke"] | dict(config="smoke", threads=1) | BASE[name] | options
        work = Path(tempfile.mkdtemp(prefix="work-", dir=self.folder))
        for path in self.folder.iterdir():
            if not path.name.startswith("work-"):
                (work / path.name).symlink_to(path)
        before, printed = set(work.rglob("*")), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.chdir(work)
            self.replace(patch, seen, name)
            command = module.train if hasattr(module, "train") else module.main
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    command(module.Config(**values))
            except SystemExit as stopped:
                seen["exit"].append(stopped.code)
        seen["threads"], seen["printed"] = [torch.get_num_threads()], [printed.getvalue()]
        torch.set_num_threads(1)
        made = sorted(path for path in work.rglob("*") if path not in before)
        seen["folder"] = [str(path.relative_to(work)) for path in made]
        seen["states"] = [path.name for path in made if path.name.startswith("state-")]
        seen["files"] = [(str(p.relative_to(work)), p.read_bytes()) for p in made if p.is_file()]
        lines = loop.read_log(work / values["out"]) if "lr" in values else []
        seen["log"] = [{k: v for k, v in one.items() if not TOLD.search(k)} for one in lines]
        return seen

    def replace(self, patch, seen, name):
        """Whatever takes long and is not the command's own is only noted."""
        stages = STAGES if name in ("sft", "grpo") else []
        for owner, function, key, instead in (*stages, *OWN[name]):
            noted(patch, seen, owner, function, key=key, instead=instead)
        noted(patch, seen, model.UnifiedModel, "forward", key="passes")
        noted(patch, seen, model.Block, "forward", key="blocks")
        patch.setattr(sft, "toy_tokenizer", lambda *_: self.tokenizer)
        patch.setattr(toy.painter, "FIRST", 200)
        if name in ("sample", "evaluate"):
            module, measure = MODULES[name], metrics.measure
            how = dict(key="asked", instead=lambda *_, **__: self.loaded)
            noted(patch, seen, module, "load_quantised", **how)

            def measured(samples, results, clip):
                seen["pictures"] += [(one.text, pixels(one.image)) for one in results]
                return measure(samples, results, clip)

            patch.setattr(evaluate, "measure", measured)


TOLD = re.compile("seconds|_tokens|^lr$|^clip_range$")  # of the log: the work, repeated options


def pixels(image):
    return torch.tensor(list(image.tobytes()))


@pytest.fixture(scope="module")
def results(place):
    return Results(place)


def alike(a, b):
    """Whether two results are the same, but for the rounding of numbers and weights."""
    if isinstance(a, torch.Tensor):
        step = 1e-6 if a.is_floating_point() else 1  # of a pixel
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=step)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=1e-4, abs=1e-6, nan_ok=True)
    return a == b


# --------------------------------------------------------------------------------------------------
# the tests


@pytest.mark.parametrize("name", MODULES)
def test_every_option_has_a_row(name):
    fields = {field.name for field in dataclasses.fields(MODULES[name].Config)}
    assert not set(ROWS[name]) & set(ELSEWHERE[name])
    assert {*ROWS[name], *ELSEWHERE[name]} == fields


@pytest.mark.parametrize(
    "name, option", [(name, option) for name, rows in ROWS.items() for option in rows]
)
def test_an_option_that_changes_changes_the_result(results, name, option):
    what, value, also, base = ROWS[name][option]
    before, after = results(name, base), results(name, base | also | {option: value})
    assert not alike(before[what], after[what]), f"--{option} {value} changes nothing"
    if what in CUT:
        for same in ("log", "pictures", "exit"):
            assert alike(before[same], after[same]), f"--{option} {value} changes the result"
    elif what != "exit":
        assert before["exit"] == [] and after["exit"] == []


def test_what_is_tested_elsewhere_is_there():
    for option, where in itertools.chain(*(rows.items() for rows in ELSEWHERE.values())):
        path, function = where.split(":")
        text = (Path(__file__).parent / path).read_text()
        found = [n for n in ast.walk(ast.parse(text)) if getattr(n, "name", "") == function]
        assert found and re.search(rf"\b{option}\b", ast.get_source_segment(text, found[0])), where
