"""Files as people have them: lines, tars made on a Mac, modes, and thousands of broken ones."""

import io
import json
import random
import shutil
import tarfile

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import curate
import data
from data import ShardWriter, Source
from model import SMOKE, ModelConfig, UnifiedModel
from runtime import files, loop
from runtime.config import UserError
from runtime.pretrained import write_tensors
from studies import benchmarks
from studies.material import pools_of

FORMATS = ("png", "jpeg", "webp", "gif", "tiff", "dds")


def record(key="a", **fields):
    plan = {"out_caption": "A ball.", "relations": [{"relation_1": "It is from image_1."}]}
    return {"key": key, "task": "subject", "instruction": "Show it.", "plan": plan} | fields


def picture(suffix="png"):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((9, 8)).convert("RGB").save(buffer, suffix)
    return buffer.getvalue()


def write_tar(path, contents):
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def sample_files(key="a", suffix="png", **fields):
    """{name: bytes} of a sample in a tar."""
    content = json.dumps(record(key, **fields)).encode()
    pictures = {f"{key}.ref_1.{suffix}": picture(suffix), f"{key}.target.png": picture()}
    return {f"{key}.json": content} | pictures


# --------------------------------------------------------------------------------------------------
# lines


def test_lines_end_at_newlines_only(tmp_path):
    """U+2028, U+0085 and others within JSON, a byte order mark, CRLF, blank lines, no last end."""
    (tmp_path / "a.png").write_bytes(picture())
    pictures = dict(references=["a.png"], target="a.png")
    texts = ["one\u2028line", "one\x85line", "one\x0b\x0c\x1c\x1d\x1e\u2029line", "一张图"]
    lines = [
        json.dumps(record(f"k{i}", instruction=text) | pictures, ensure_ascii=False)
        for i, text in enumerate(texts)
    ]
    content = "\ufeff" + "\r\n".join([lines[0], "", *lines[1:]])
    (tmp_path / "records.jsonl").write_bytes(content.encode())
    source = Source(tmp_path)
    found = [source.sample(number).instruction for number in range(len(source))]
    assert found == [json.loads(line)["instruction"] for line in lines]
    assert sorted(entry.key for entry in source.entries) == ["k0", "k1", "k2", "k3"]


def test_a_torn_line_of_scores_or_records_is_cut_off_and_any_other_is_named(tmp_path):
    path = tmp_path / "instructions.jsonl"
    files.append_line(path, {"key": "one", "instruction": "a\u2028b"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n") + b"\0\0\0")
    assert curate.by_key(path) == {"one": {"key": "one", "instruction": "a\u2028b"}}
    files.append_line(path, {"key": "two"})
    assert list(curate.by_key(path)) == ["one", "two"]
    for line in (b"null", b"3", b'{"kye": 1}', b"\xff\xfe", b"[" * 5000, b'{"key": "../../up"}'):
        (tmp_path / "bad.jsonl").write_bytes(line + b"\n")
        with pytest.raises(UserError, match="bad.jsonl"):
            curate.by_key(tmp_path / "bad.jsonl")


def test_the_log_is_read_whatever_stands_in_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "note": "a\u2028b"}\n', encoding="utf-8")
    assert loop.read_log(tmp_path) == [{"step": 1, "note": "a\u2028b"}]


# --------------------------------------------------------------------------------------------------
# tars and keys


def test_what_a_mac_leaves_beside_the_samples_is_skipped(tmp_path):
    contents = {"._a.json": b"\0\5\x16\7", ".DS_Store": b"\0", "__MACOSX/b/._a.json": b"\0\5\x16\7"}
    contents |= sample_files() | {"._a.target.png": b"\0\5\x16\7", "__MACOSX/c.json": b"{}"}
    write_tar(tmp_path / "s.tar", contents)
    (tmp_path / "._s.tar").write_bytes(b"\0\5\x16\7")
    source = Source(tmp_path)
    assert len(source) == 1 and data.problems_of(source, 0) == []
    for kind in ("characters", "objects", "scenes"):
        (tmp_path / "pools" / kind).mkdir(parents=True)
        (tmp_path / "pools" / kind / "a.png").write_bytes(picture())
        (tmp_path / "pools" / kind / "._a.png").write_bytes(b"\0\5\x16\7")
    assert pools_of(tmp_path / "pools")["scenes"] == ["scenes/a.png"]


@pytest.mark.parametrize("fault", ["cut in a picture", "cut in a header", "cut between", "flipped"])
def test_a_tar_that_is_not_whole_loses_no_sample_in_silence(tmp_path, fault):
    write_tar(tmp_path / "s.tar", sample_files("a") | sample_files("b"))
    with tarfile.open(tmp_path / "s.tar") as tar:
        place = tar.getmember("b.json").offset
    content = bytearray((tmp_path / "s.tar").read_bytes())
    cuts = {"cut in a picture": place + 515, "cut in a header": place + 212, "cut between": place}
    content[place + 10] ^= fault == "flipped"
    (tmp_path / "s.tar").write_bytes(content[: cuts.get(fault)])
    with pytest.raises(UserError, match="s.tar cannot be read as a tar file"):
        Source(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"a.json": b"[1]"}, "s.tar, sample a: it holds a list"),
        ({"a.json": b"\xff{}"}, "s.tar, sample a: 'utf-8' codec"),
        ({"a.ref_1.png": b"GIF89a"}, "s.tar, sample a: ref_1 cannot be read as a picture"),
        (
            sample_files(instruction=None),
            "s.tar, sample a: its instruction is None; expected a text",
        ),
        (sample_files(task=["add"]), "s.tar, sample a: its task is"),
        (sample_files(plan=None), "s.tar, sample a: not JSON of the form"),
    ],
)
def test_a_broken_record_names_file_and_member(tmp_path, change, words):
    write_tar(tmp_path / "s.tar", sample_files() | change)
    with pytest.raises(UserError) as error:
        Source(tmp_path).sample(0)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "key", ["../up", "a/b", "..", ".a", "", "a\\b", "a\nb", "k" * 300, "图" * 80, None, 7]
)
def test_a_key_never_leaves_the_output_folder(tmp_path, key):
    with pytest.raises(UserError, match="the key of a sample: .* names files"):
        ShardWriter(tmp_path / "shards").write(record() | {"key": key}, [picture()], picture())
    assert list((tmp_path / "shards").iterdir()) == []
    files.check_name("人物-1 of 2", "a good one")


def test_a_key_with_a_dot_would_be_cut_in_a_tar(tmp_path):
    with pytest.raises(UserError, match="'a.b' has a dot"):
        ShardWriter(tmp_path).write(record("a.b"), [picture()], picture())


# --------------------------------------------------------------------------------------------------
# modes


def test_files_get_the_mode_of_the_umask(tmp_path):
    """Also those of a library that makes them for the owner alone, within a folder too."""
    (tmp_path / "usual").touch()
    (tmp_path / "folder").mkdir()
    with files.published(tmp_path / "model") as hidden:
        hidden.mkdir(0o700)
        write_tensors(
            hidden / "ema.safetensors", {"eye": UnifiedModel(ModelConfig(**SMOKE)).norm_und.weight}
        )
    with files.published(tmp_path / "a.png") as hidden:
        hidden.write_bytes(b"")
        hidden.chmod(0o600)
    for name, like in (("model", "folder"), ("model/ema.safetensors", "usual"), ("a.png", "usual")):
        assert (tmp_path / name).stat().st_mode == (tmp_path / like).stat().st_mode, name


# --------------------------------------------------------------------------------------------------
# benchmarks


@pytest.mark.parametrize(
    "names, references",
    [
        (["ref.jpg", "res.jpg", "src.jpg"], ["src", "ref"]),
        (["ref_10.jpg", "ref_2.jpg", "src_0.jpg", "res_0.jpg"], ["src_0", "ref_2", "ref_10"]),
        (["0_src.jpg", "1_ref.jpg", "2_res.jpg"], ["0_src", "1_ref"]),
        (["0.jpg", "1.jpg", "edit-Result.PNG", "imgres2.jpg", "a_gt.jpg"], ["0", "1"]),
        (["dress.jpg", "forest.jpg", "._dress.jpg", "output.jpg"], ["dress", "forest"]),
    ],
)
def test_dreamomni2_answers_are_no_references_and_the_source_is_first(tmp_path, names, references):
    folder = tmp_path / "editing_benchmark/add/1"
    folder.mkdir(parents=True)
    (folder / "instruction.txt").write_bytes("\ufeff把图1\r\n".encode())
    for name in names:
        grey = references.index(name[:-4]) + 1 if name[:-4] in references else 99
        Image.new("L", (8, 8), grey).save(folder / name, "PNG")
    (case,) = benchmarks.read_dreamomni2(tmp_path)
    assert case.instruction == "把图1"
    found = [image.getpixel((0, 0))[0] for image in case.references]
    assert found == list(range(1, len(references) + 1))


def omnicontext_row(**fields):
    row = {"key": "7", "task_type": "single_object", "instruction": "Do it."}
    return row | {"input_images": [{"bytes": picture(), "path": None}]} | fields


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"input_images": []}, "row 7 has no input_images"),
        ({"input_images": [None]}, "an input image of 7 has neither bytes nor a path"),
        ({"input_images": [{"bytes": None}]}, "an input image of 7 has neither bytes nor a path"),
        ({"input_images": [{"bytes": b"GIF89a"}]}, "an input image of 7 cannot be read"),
        ({"key": "../../a"}, "a key of the benchmark: '../../a' names files"),
        ({"instruction": None}, "row 7 has the task 'single_object' and the instruction None"),
        ({"task_type": "../up"}, "row 7 has the task '../up'"),
    ],
)
def test_other_rows_of_omnicontext_get_one_line(tmp_path, fields, words):
    with pytest.raises(ValueError) as error:
        benchmarks.omnicontext_case(omnicontext_row(**fields), tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_parquet_file_alone_has_its_pictures_beside_it(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    row = omnicontext_row(key=7, input_images=[{"bytes": None, "path": "a.png"}])
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train.parquet")
    (tmp_path / "._train.parquet").write_bytes(b"\0\5\x16\7")
    for path in (tmp_path, tmp_path / "train.parquet"):
        (case,) = benchmarks.read_omnicontext(path)
        assert case.key == "7" and [image.size for image in case.references] == [(9, 8)]


# --------------------------------------------------------------------------------------------------
# thousands of broken ones


def mutated(content, rng):
    """A copy with a few bytes changed, cut out, doubled or put in."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(content) + 1)
        length = rng.choice((1, 2, 9, 300))
        new = rng.choice((b"", b"\n", b'"', b"\xff", b"[", b"null,", content[place:][:length] * 2))
        new = rng.choice((new, rng.randbytes(length)))
        content[place : place + rng.choice((0, len(new), length))] = new
    return bytes(content if rng.random() < 0.9 else content[: rng.randrange(len(content))])


def complaints(path):
    """What is said about the samples at `path`; anything but a UserError is a failure."""
    try:
        source = Source(path)
        keys = [entry.key for entry in source.entries]
        data.held_out_keys(keys)
        said = [line for number in range(len(source)) for line in data.problems_of(source, number)]
    except UserError as error:
        said = [str(error)]
    assert not any("\n" in line for line in said), said
    return bool(said)


def test_a_thousand_broken_tars_and_records_give_one_line_each(tmp_path):
    rng, counts = random.Random(0), {"tar": 0, "records": 0, "index": 0, "lines": 0}
    tars = []
    for suffix in FORMATS:
        write_tar(tmp_path / "s.tar", sample_files("a", suffix) | sample_files("b"))
        tars.append((tmp_path / "s.tar").read_bytes())
        (tmp_path / f"a.{suffix}").write_bytes(picture(suffix))
    for _ in range(400):
        (tmp_path / "s.tar").write_bytes(mutated(rng.choice(tars), rng))
        counts["tar"] += complaints(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(tars[0])
    assert not complaints(tmp_path / "s.tar")
    index = (tmp_path / "s.index.json").read_bytes()
    for _ in range(100):
        (tmp_path / "s.index.json").write_bytes(mutated(index, rng))
        counts["index"] += complaints(tmp_path / "s.tar")
    pictures = [dict(references=[f"a.{suffix}"], target="a.png") for suffix in ("jpeg", "webp")]
    lines = [json.dumps(record(f"k{i}") | paths) + "\n" for i, paths in enumerate(pictures)]
    folder = tmp_path / "records"
    folder.mkdir()
    for suffix in FORMATS:
        shutil.copy(tmp_path / f"a.{suffix}", folder)
    for _ in range(400):
        (folder / "records.jsonl").write_bytes(mutated("".join(lines).encode(), rng))
        counts["records"] += complaints(folder)
    for _ in range(100):
        (tmp_path / "stage.jsonl").write_bytes(mutated("".join(lines).encode(), rng))
        try:
            curate.by_key(tmp_path / "stage.jsonl")
        except UserError:
            counts["lines"] += 1
    print(f"\n1,000 broken files, complaints: {counts}")
    assert counts["tar"] > 200 and counts["records"] > 200 and counts["lines"] > 40
