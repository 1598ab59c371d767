"""
kernels/ against float64, brute force and each other.

Without a GPU the Triton kernels run in the interpreter (TRITON_INTERPRET=1, set here before the
import), which shows that masks, lists and algebra are right, not that the GPU's precision or shapes
are. It multiplies the bit patterns of bfloat16 numbers and truncates when it rounds to bfloat16
(Triton 3.9); the fixture `bfloat16_in_the_interpreter` repairs both, so that the bfloat16 cases
mean something.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

from kernels import attention as A  # noqa: E402
from kernels import sdpa, tiles  # noqa: E402
from kernels import triton_attention as T  # noqa: E402
from kernels.mask import Mask  # noqa: E402
from kernels.triton_kernels import triton  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.usefixtures("loop_bounds_in_the_interpreter")
needs_kernel = pytest.mark.skipif(
    not CUDA and not T.interpreted(), reason="no Triton, or imported without interpreter"
)
TOLERANCE = {torch.float32: 1e-5 if CUDA else 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

shipped_config = T.tile_config


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """A hundred tokens fill several tiles, unequal so that rows and keys cannot be confused."""
    sizes = {"forward": (64, 32), "few": (32, 16), "dq": (32, 64), "dkdv": (32, 64)}
    monkeypatch.setattr(T, "tile_config", lambda kernel, *rest: T.Tiling(*sizes[kernel], 4, 1))


@pytest.fixture
def bfloat16_in_the_interpreter(monkeypatch):
    if CUDA:
        return
    from triton.runtime import interpreter as I

    tl, builder = I.tl, I.InterpreterBuilder

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def narrow(data):  # float32 -> bfloat16 bits, to nearest even
        bits = np.ascontiguousarray(data).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *rest)
        product = np.matmul(widen(a), widen(b), dtype=np.float32)
        return I.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return I.TensorHandle(narrow(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, mode):
        return cast_impl(self, src, dst_type)

    for function in (create_dot, cast_impl, create_fp_to_fp):
        monkeypatch.setattr(builder, function.__name__, function)


# --------------------------------------------------------------------------------------------------
# Masks. A node is (length, "causal" or "both", children); a forest is a list of nodes.


def lay_out(forest):
    """(q_hi, k_hi, dense oracle by explicit ancestors) of a forest laid out depth first."""
    runs, q_hi, k_hi = [], [], []  # runs: (range, kind, ancestors)

    def visit(node, ancestors):
        length, kind, children = node
        start, me = len(q_hi), len(runs)
        runs.append((range(start, start + length), kind, ancestors))
        q_hi.extend(
            i + 1 if kind == "causal" else start + length for i in range(start, start + length)
        )
        k_hi.extend([None] * length)
        for child in children:
            visit(child, ancestors + [me])
        k_hi[start : start + length] = [len(q_hi)] * length

    for root in forest:
        visit(root, [])
    dense = torch.zeros(len(q_hi), len(q_hi), dtype=torch.bool)
    for run, kind, ancestors in runs:
        for i in run:
            for ancestor in ancestors:
                dense[i, list(runs[ancestor][0])] = True
            dense[i, [j for j in run if kind == "both" or j <= i]] = True
    return torch.tensor(q_hi), torch.tensor(k_hi), dense


def random_forest(random, depth=0):
    nodes = random.integers(0 if depth else 1, 4 if depth < 4 else 1)
    return [
        (
            int(random.integers(1, 9)),
            ["causal", "both"][random.integers(2)],
            random_forest(random, depth + 1),
        )
        for _ in range(nodes)
    ]


def mask_of(forest):
    q_hi, k_hi, dense = lay_out(forest)
    mask = Mask(q_hi, k_hi)
    assert torch.equal(mask.dense(), dense)
    return mask


def text(n, *children):
    return n, "causal", list(children)


def image(n, *children):
    return n, "both", list(children)


def bagel_pack():
    """Two documents: text, clean image, ViT image, text, a noised image beside what follows it."""
    one = text(9, image(16, image(7, text(11, image(13), image(13, text(5))))))
    return mask_of([one, text(21, image(12))])


def grpo_tree():
    """Two groups: prompt -> plans -> noised images."""
    plans = [text(n, image(8), image(8)) for n in (5, 9, 3)]
    return mask_of([image(18, text(4, *plans)), text(11, *plans[:2])])


def cached_queries():
    """A noised image and a causal continuation as queries against a cache of everything."""
    whole = mask_of([text(13, image(20, text(17, image(22))))])
    rows = torch.cat([torch.arange(33, 50), torch.arange(50, 72)])
    return Mask(whole.q_hi[rows], whole.k_hi, rows)


def decoding():
    """Three members on one prefix of 45 tokens, 11 cache slots each; 3, 1 and 11 are written."""
    prefix, slots, written = 45, 11, [3, 1, 11]
    starts = [prefix + slots * g for g in range(3)]
    q_pos = torch.tensor([s + w - 1 for s, w in zip(starts, written)])
    own = [torch.full((slots,), s + slots) for s in starts]
    k_hi = torch.cat([torch.full((prefix,), prefix + 33), *own])  # (Nk,)
    return Mask(q_pos + 1, k_hi, q_pos)


def padded():
    """Padding inside and at the end: rows that see nothing, keys that nobody sees."""
    mask = mask_of([text(19, image(9)), text(40)])
    q_hi, k_hi = mask.q_hi.clone(), mask.k_hi.clone()
    for part in (slice(3, 6), slice(30, 52), slice(60, 68)):
        q_hi[part], k_hi[part] = 0, 0
    return Mask(q_hi, k_hi)


def random_vectors():
    random = torch.Generator().manual_seed(5)
    q_pos = torch.randint(0, 90, (41,), generator=random)
    return Mask(
        torch.randint(0, 84, (41,), generator=random),
        torch.randint(0, 90, (83,), generator=random),
        q_pos,
    )


MASKS = {
    "causal": lambda: mask_of([text(67)]),
    "full": lambda: mask_of([image(53)]),
    "packed": lambda: mask_of([text(31), text(1), text(23), image(18)]),
    "bagel": bagel_pack,
    "grpo": grpo_tree,
    "cached": cached_queries,
    "decoding": decoding,
    "padded": padded,
    "random": random_vectors,
    "one token": lambda: mask_of([text(1)]),
}


class Inputs(NamedTuple):
    """q (Nq, H, D), k and v (Nk, K, D), and the gradient of the output (Nq, H, D)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gradient: torch.Tensor


class Results(NamedTuple):
    """The output (Nq, H, D) and the gradients of q, k, v."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def tensors(mask, heads=4, key_heads=2, *, head_dim=16, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    n_queries, n_keys = len(mask.q_hi), len(mask.k_hi)
    shapes = (n_queries, heads), (n_keys, key_heads), (n_keys, key_heads), (n_queries, heads)
    q, k, v, gradient = (torch.randn(*shape, head_dim, device=DEVICE).to(dtype) for shape in shapes)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient)


def results(data, mask, backend):
    out = A.attention(*data[:3], mask.to(DEVICE), backend)
    return Results(out.detach(), *torch.autograd.grad(out, data[:3], data.gradient))


def exact(data, mask):
    """The reference in float64."""
    wide = [x.detach().double().requires_grad_() for x in data[:3]]
    return results(Inputs(*wide, data.gradient.double()), mask, "reference")


def assert_close(got, expected, tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected):
        assert a.shape == b.shape and torch.isfinite(a).all(), name
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1)
        assert error <= tolerance, (
            f"{name}: relative error {error:.1e}, expected at most {tolerance:.0e}"
        )


# --------------------------------------------------------------------------------------------------
# The mask and its tiles


def test_theorem_on_every_small_matrix():
    """Two vectors make the matrices in which no zero has a one to its right and one below."""
    rows, keys = 3, 3
    vectors = list(itertools.product(range(4), repeat=3))
    made = {
        tuple((j < q[i] and i < k[j]) for i in range(rows) for j in range(keys))
        for q in vectors
        for k in vectors
    }
    for bits in itertools.product((False, True), repeat=rows * keys):
        m = np.array(bits).reshape(rows, keys)
        fits = not any(
            not m[i, j] and m[i, j + 1 :].any() and m[i + 1 :, j].any()
            for i in range(rows)
            for j in range(keys)
        )
        assert fits == (bits in made)


def test_two_vectors_say_what_a_forest_says():
    random = np.random.default_rng(0)
    for _ in range(60):
        q_hi, k_hi, dense = lay_out(random_forest(random))
        assert torch.equal(Mask(q_hi, k_hi).dense(), dense)
        # any rows, as queries against a cache
        rows = torch.from_numpy(random.integers(0, len(q_hi), 5))
        assert torch.equal(Mask(q_hi[rows], k_hi, rows).dense(), dense[rows])


def test_mask_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="give q_pos"):
        Mask(torch.ones(3).int(), torch.ones(4).int())
    with pytest.raises(ValueError, match="one per query"):
        Mask(torch.ones(3).int(), torch.ones(4).int(), torch.ones(2).int())
    with pytest.raises(ValueError, match="one integer a token"):
        Mask(torch.ones(3), torch.ones(3).int())


def tiles_of(dense, group, *, block_m, block_n):
    """(any, all) over tiles of the mask (Nq, Nk), rows folded; beyond the edges nothing is seen."""
    dense = dense.repeat_interleave(group, 0)  # (Nq * group, Nk)
    overhang = -dense.shape[0] % block_m, -dense.shape[1] % block_n
    dense = torch.nn.functional.pad(dense, (0, overhang[1], 0, overhang[0]))
    # (row tiles, key tiles, block_m * block_n)
    cut = dense.view(dense.shape[0] // block_m, block_m, -1, block_n).transpose(1, 2).flatten(2)
    return cut.any(2), cut.all(2)


@pytest.mark.parametrize("group", [1, 2, 7])
def test_tile_classes_against_every_element(group):
    random = np.random.default_rng(group)
    for trial in range(30):
        q_hi, k_hi, dense = lay_out(random_forest(random))
        mask, square = Mask(q_hi, k_hi), True
        if trial % 3 == 1:
            rows = torch.from_numpy(np.sort(random.integers(0, len(q_hi), 9)))
            mask, square = Mask(q_hi[rows], k_hi, rows), False
        if trial % 3 == 2:
            mask, square = Mask(torch.where(torch.rand(len(q_hi)) < 0.2, 0, q_hi), k_hi), False
        some, all_ = tiles_of(mask.dense(), group, block_m=8, block_n=4)
        whole, partly = tiles.classify_tiles(mask.q_hi, mask.positions(), mask.k_hi, group, 8, 4)
        assert torch.equal(whole, all_)  # exact
        assert not (some & ~whole & ~partly).any()  # nothing visible is skipped
        if square and group == 1:
            assert torch.equal(partly, some & ~all_)  # a forest: nothing is visited in vain


def test_lists_hold_each_tile_once_whole_ones_first():
    torch.manual_seed(0)
    whole = torch.rand(17, 9) < 0.4
    partly = (torch.rand(17, 9) < 0.4) & ~whole
    index, counts = tiles.compact(whole, partly)
    for t in range(17):
        n_whole, n_all = counts[t].tolist()
        assert index[t, :n_whole].tolist() == whole[t].nonzero()[:, 0].tolist()
        assert index[t, n_whole:n_all].tolist() == partly[t].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("extra", [0, 3, 40])
def test_cut_lists_cover_every_entry_once(extra, monkeypatch):
    monkeypatch.setattr(tiles, "MIN_PIECE", 1)
    random = torch.Generator().manual_seed(extra)
    lengths = torch.cat([torch.randint(0, 50, (12,), generator=random), torch.tensor([400, 1, 0])])
    counts = torch.stack([(lengths * 0.6).long(), lengths], 1).int()
    work, pieces = tiles.cut_lists(counts, extra)
    assert work.shape == (len(lengths) + extra, 5)
    items = [item for item in work.tolist() if item[0] >= 0]
    for t, (n_whole, n_all) in enumerate(counts.tolist()):
        mine = sorted([item for item in items if item[0] == t], key=lambda item: item[1])
        # each entry once, in order
        assert [e for i in mine for e in range(i[1], i[3])] == list(range(n_all))
        assert all(i[1] <= i[2] <= i[3] and i[2] == min(max(n_whole, i[1]), i[3]) for i in mine)
        first, number = pieces[t].tolist()
        assert len(mine) == max(number, 1) and number != 1
        assert [i[4] for i in mine] == (list(range(first, first + number)) if number else [-1])
    assert max([i[4] for i in items] + [-1]) < max(2 * extra, 1)
    sizes = [i[3] - i[1] for i in items]
    assert sizes == sorted(sizes, reverse=True)
    assert not extra or sizes[0] <= -(-int(lengths.sum()) // extra)


# --------------------------------------------------------------------------------------------------
# The kernels against float64


@needs_kernel
@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask = MASKS[name]()
    data = tensors(mask)
    found = results(data, mask, "triton")
    assert_close(found, exact(data, mask), TOLERANCE[torch.float32])
    if name == "bagel":  # once more: the same bits
        assert all(map(torch.equal, found, results(data, mask, "triton")))
    if name == "padded":  # rows that see nothing, keys that nobody sees
        empty, unseen = ~mask.dense().any(1), ~mask.dense().any(0)
        assert empty.sum() == 33 and not found.out[empty].any() and not found.dq[empty].any()
        assert not found.dk[unseen].any() and not found.dv[unseen].any()


@needs_kernel
@pytest.mark.parametrize("heads, key_heads", [(1, 1), (7, 1), (28, 4), (6, 6)])
def test_head_ratios(heads, key_heads):
    mask = mask_of([text(7, text(4, image(9), image(6)), text(8)), text(5)])
    data = tensors(mask, heads, key_heads)
    assert_close(results(data, mask, "triton"), exact(data, mask), TOLERANCE[torch.float32])


@needs_kernel
@pytest.mark.parametrize(
    "dtype, head_dim",
    # rows of 72 bytes are no multiple of 16
    [(torch.float32, 18), *itertools.product((torch.float16, torch.bfloat16), (20, 72, 128, 256))],
)
def test_types_and_head_dims(dtype, head_dim, bfloat16_in_the_interpreter):
    mask = mask_of([text(17, image(9), image(6, text(10)))])
    data = tensors(mask, 2, 1, head_dim=head_dim, dtype=dtype)
    assert_close(results(data, mask, "triton"), exact(data, mask), TOLERANCE[dtype])


@needs_kernel
def test_shipped_tiles(monkeypatch, bfloat16_in_the_interpreter):
    """The tiles of the GPU, and the chapter's example: 7 heads to a key head, bfloat16."""
    monkeypatch.setattr(T, "tile_config", shipped_config)
    mask = mask_of([image(70, text(20, image(50)), text(11, image(30))), text(37)])
    data = tensors(mask, 7, 1, head_dim=32, dtype=torch.bfloat16)
    assert_close(results(data, mask, "triton"), exact(data, mask), TOLERANCE[torch.bfloat16])


@needs_kernel
def test_lists_cut_into_pieces_change_nothing_but_rounding(monkeypatch):
    """A tree whose prompt is seen by all, and decoding: the two cases in which lists are cut."""
    monkeypatch.setattr(tiles, "MIN_PIECE", 1)
    monkeypatch.setattr(T, "PROGRAMS", 8)
    tree = mask_of([text(20, *[text(5, image(16), image(16)) for _ in range(3)])]).to(DEVICE)
    data = tensors(tree)
    # else no list was cut, and this test tests nothing
    assert (T.backward_lists(tree, *data[:2])[5][:, 1] > 1).any()
    assert_close(results(data, tree, "triton"), exact(data, tree), TOLERANCE[torch.float32])
    members = decoding().to(DEVICE)
    q, k, v, _ = tensors(members)
    assert (T.forward_lists(members, q, k)[2][:, 1] > 1).any()
    expected = A.reference(q.double(), k.double(), v.double(), members)
    assert_close([A.attention(q, k, v, members, "triton")], [expected], TOLERANCE[torch.float32])


@needs_kernel
def test_views_of_a_fused_projection():
    """q, k, v as slices of one tensor, and a gradient that is expanded: no layout is assumed."""
    mask = mask_of([text(21, image(8), image(9))])
    fused = torch.randn(38, 8 * 16 + 3, device=DEVICE)
    aligned, shifted = fused[:, :128].clone(), fused[:, 3:]  # shifted: not even 16-byte aligned
    for whole in (aligned, shifted):
        parts = (x.unflatten(1, (-1, 16)) for x in whole.split([64, 32, 32], 1))  # (N, heads, D)
        q, k, v = (x.detach().requires_grad_() for x in parts)
        ones = torch.ones(1, device=DEVICE).expand(38, 4, 16)  # (N, H, D)
        out = A.attention(q, k, v, mask.to(DEVICE), "triton")
        got = Results(out.detach(), *torch.autograd.grad(out.sum(), (q, k, v)))
        assert_close(got, exact(Inputs(q, k, v, ones), mask), TOLERANCE[torch.float32])


# --------------------------------------------------------------------------------------------------
# Registration, back ends, dispatch


def test_reference_has_the_gradient_of_its_output():
    mask = mask_of([text(3, image(2), image(2))])
    # and a row that sees nothing
    mask = Mask(torch.where(torch.arange(7) == 1, 0, mask.q_hi), mask.k_hi)
    data = [torch.randn(7, h, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: A.reference(q, k, v, mask), data)


@needs_kernel
def test_operator_is_registered_soundly():
    mask = mask_of([text(5, image(4), image(5))]).to(DEVICE)
    q, k, v, _ = tensors(mask, 2, 1)
    vectors = mask.q_hi, mask.positions(), mask.k_hi
    lists = T.forward_lists(mask, q, k), T.backward_lists(mask, q, k)
    torch.library.opcheck(T.attention_forward, (q, k, v, *vectors, *lists, 0.25))


@needs_kernel
def test_checkpointed_equals_eager():
    mask = mask_of([text(12, image(44), image(11))]).to(DEVICE)
    q, k, v, gradient = tensors(mask, 2, 2)

    def block(q, k, v):
        return A.attention(q * 2, k, v, mask, "triton") + q

    out = block(q, k, v)
    again = torch.utils.checkpoint.checkpoint(block, q, k, v, use_reentrant=False)
    eager = torch.autograd.grad(out, (q, k, v), gradient)
    recomputed = torch.autograd.grad(again, (q, k, v), gradient)
    for a, b in zip((out, *eager), (again, *recomputed)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("call", [sdpa.CALL, 0])
def test_sdpa_equals_the_reference(name, call, monkeypatch):
    monkeypatch.setattr(sdpa, "CALL", call)  # 0: so short a sequence is cut as long ones are
    monkeypatch.setattr(sdpa, "TEXT", 16 if call else 5)
    mask = MASKS[name]()
    data = tensors(mask)
    assert_close(results(data, mask, "sdpa"), exact(data, mask), 1e-6)


def test_sdpa_computes_little_that_nobody_sees(monkeypatch):
    """Pairs that are computed, and the bias: none for pictures, and never all rows by all keys."""
    monkeypatch.setattr(sdpa, "CALL", 0)  # so short a sequence is cut as long ones are
    monkeypatch.setattr(sdpa, "TEXT", 16)
    after = [image(80), text(60)]
    mask = mask_of([image(60, image(40, text(12, *after))) for _ in range(2)])
    schedule, computed = sdpa.make_schedule(mask), 0
    for call, fetched in zip(schedule.calls, schedule.lengths):
        viewed = call.count * (call.keys.stop - call.keys.start) if call.keys else 0
        computed += call.rows * (fetched + viewed)
    assert computed <= 1.2 * mask.dense().sum()
    biased = sum(call.bias.numel() for call in schedule.calls if call.bias is not None)
    assert 0 < biased < len(mask.q_hi) ** 2 / 6


def test_dispatch(monkeypatch):
    monkeypatch.delenv("REALIGN_ATTENTION", raising=False)
    assert A.choose_backend("cpu")[0] == "sdpa"
    if triton is not None:
        assert A.choose_backend("cuda")[0] == "triton"
        assert A.choose_backend("cuda", torch.float64)[0] == "sdpa"
    monkeypatch.setenv("REALIGN_ATTENTION", "reference")
    assert A.describe_backend() == "attention: reference (as REALIGN_ATTENTION says)"


def test_bad_input_is_named():
    mask = mask_of([text(5)])
    q, k, v, _ = tensors(mask)
    for inputs, backend, message in (
        ((q[:, :3], k, v), None, "multiple of K"),
        ((q[:4], k, v), None, "the mask is for 5 queries"),
        ((q, k.double(), v), None, "expected one type"),
        ((q.double(), k.double(), v.double()), "triton", "cannot run here: torch.float64"),
        ((q, k, v), "cudnn", "unknown; expected one of triton, sdpa, reference"),
    ):
        with pytest.raises(ValueError, match=message):
            A.attention(*inputs, mask.to(DEVICE), backend)


@needs_kernel
def test_no_queries_or_no_keys():
    empty, one = torch.zeros(0).int(), torch.ones(3).int()
    q, k = torch.randn(3, 2, 16, device=DEVICE), torch.randn(0, 1, 16, device=DEVICE)
    assert not A.attention(q, k, k, Mask(one, empty, one).to(DEVICE), "triton").any()
    out = A.attention(q[:0], q, q, Mask(empty, one, empty).to(DEVICE), "triton")
    assert out.shape == (0, 2, 16)


def test_shipped_configurations_compile_for_hopper():
    """Registers, spills, shared memory of the shipped configurations, compiled for sm_90."""
    if triton is None:
        pytest.skip("Triton is not installed")
    ptxas = pytest.importorskip(
        "triton.backends.nvidia.compiler", reason="this Triton cannot compile for NVIDIA"
    )
    if not os.path.exists(ptxas.get_ptxas(90).path):
        pytest.skip("this Triton brings no NVIDIA assembler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = str(here.parent)
    command = [sys.executable, str(here / "offline.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    lines = run.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["forward", "few", "dq", "dkdv"]
    for line in lines:
        numbers = re.findall(r"(\w+) (\d+)", line.split("stages")[1])
        found = {key: int(value) for key, value in numbers}
        assert found["spilled_bytes"] == found["serialized"] == 0, line
        assert found["wgmma"] > 0 and found["tma"] > 0 and found["shared"] <= 227 * 1024, line
