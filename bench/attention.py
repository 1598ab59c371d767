"""
Attention over the packs that this project is made of, and causal and full ones as others measure.

    python -m bench attention

On a GPU: the Triton kernel against FlexAttention (with our tile lists, and as BAGEL's training code
builds its masks), our pieces of SDPA, and PyTorch's SDPA where it needs no dense mask. The output
and all gradients are compared with float64 before anything is timed. TFLOP/s count visible pairs,

    forward  4 pairs H D        backward  2.5 times that        (D of each head, H heads)

so that work on what nobody sees earns nothing; a matmul of the same card is the ceiling.
On a CPU: milliseconds to build the tile lists of a pack, and how many pairs the tiles compute for
each visible one.
Left out: other head sizes and types than BAGEL-7B's.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.timing import IMAGE, VIT, best_of, first_line, gpu_best_of
from kernels.attention import attention, reference
from kernels.mask import Mask
from kernels.tiles import classify_tiles
from kernels.triton_attention import FEW_ROWS, backward_lists, forward_lists, tile_config
from sequence import Layout, Sequence
from vision import Reference

HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128  # BAGEL-7B
LONGEST = 1 << 14  # tokens of a run; the position tables of the cases are that large


# --------------------------------------------------------------------------------------------------
# cases


def runs(sequence, *sizes):
    """Append runs of these lengths, markers included: positive ones causal (text), negative ones
    bidirectional (images)."""
    for size in sizes:
        n = abs(size) - 2
        if size > 0:
            sequence.text([0] * n)
        else:
            image = Reference(torch.empty(n, 0), (1, n), None, (0, 0))
            sequence.image(image, vit=False)


def forest(build):
    """Mask of what `build` lays out."""
    sequence = Sequence(Layout(0, 1, 2, 3, LONGEST, LONGEST))
    build(sequence)
    return sequence.pack().mask


def one_run(sequence, size):
    """One document of one run, causal or (negative) bidirectional."""
    with sequence.document():
        runs(sequence, size)


def bagel_pack(sequence, tokens=36864):
    """Training samples until the pack is full: an edit with a reference, text to image, a question
    about a picture."""
    shapes = [(-IMAGE - 2, -1371, 60, -IMAGE - 2), (150, -IMAGE - 2), (-VIT - 2, 400)]
    for shape in shapes * 9:
        if sequence.length + sum(map(abs, shape)) > tokens:
            break
        with sequence.document():
            runs(sequence, *shape[:-1])
            with sequence.branch():
                runs(sequence, shape[-1])


def tree(sequence, prompt, plans=8, *, plan=300, steps=4, image=1024):
    """A group of the update: `plans` branches of a plan and the noised pictures of its steps."""
    with sequence.document():
        runs(sequence, *prompt)
        for _ in range(plans):
            with sequence.branch():
                runs(sequence, plan)
                for _ in range(steps):
                    with sequence.branch():
                        runs(sequence, -image)


def decoding(members=32, prompt=36864, room=256):
    """One step: a query a member at the end of its own slots, on the prompt that all share."""
    sequence = Sequence(Layout(0, 1, 2, 3, LONGEST, LONGEST))
    with sequence.document():
        runs(sequence, prompt)
        for _ in range(members):
            with sequence.branch():
                sequence.reserve(room)
    whole = sequence.pack()
    slots = torch.tensor(sequence.reserved) + room - 1
    return whole.decoding(slots, torch.zeros_like(slots)).mask


def attention_cases():
    """{name: Mask} of everything that is measured."""
    return {
        "causal 16k": forest(partial(one_run, size=16384)),
        "full 16k": forest(partial(one_run, size=-16384)),
        "BAGEL pack 36k": forest(bagel_pack),
        "edit tree": forest(partial(tree, prompt=(-1026, -VIT, 60))),
        "text-to-image tree": forest(partial(tree, prompt=(120,))),
        "decode 32 on 36k": decoding(),
    }


def visible_pairs(mask, rows=1024):
    """Visible (query, key) pairs, in pieces of the dense mask."""
    total = 0
    for start in range(0, len(mask.q_hi), rows):
        part = slice(start, start + rows)
        total += int(Mask(mask.q_hi[part], mask.k_hi, mask.positions()[part]).dense().sum())
    return total


def bench_attention(config):
    """Prints and returns the figures of the machine at hand."""
    return attention_on_gpu(config) if torch.cuda.is_available() else attention_lists(config)


# --------------------------------------------------------------------------------------------------
# on a CPU: the tile lists


def attention_lists(config):
    """{case: {"ms": to build the lists, "forward", "dkdv": computed pairs a visible one}}."""
    head = f"{'':22s}{'tokens':>8s}{'pairs':>10s}{'lists, ms':>11s}{'forward':>9s}{'dk/dv':>8s}"
    print(f"{head}   computed / visible")
    result = {}
    for name, mask in attention_cases().items():
        pairs, n = visible_pairs(mask), len(mask.q_hi)
        q = torch.empty(n, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
        k = torch.empty(len(mask.k_hi), KEY_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
        ms = 1e3 * best_of(config.repeats, {"build": partial(build_lists, mask, q, k)})["build"]
        forward, dkdv = (pairs_computed(mask, kernel) / pairs for kernel in ("forward", "dkdv"))
        print(f"{name:22s}{n:8d}{pairs:10.2e}{ms:11.2f}{forward:9.2f}{dkdv:8.2f}")
        result[name] = {"ms": ms, "forward": forward, "dkdv": dkdv}
    return result


def build_lists(mask, q, k):
    """The tile lists of forward and backward, made anew."""
    mask.cache.clear()
    forward_lists(mask, q, k)
    backward_lists(mask, q, k)


def pairs_computed(mask, kernel):
    """(query, key) pairs that the tiles of "forward" or "dkdv" compute, for one head."""
    group = HEADS // KEY_HEADS if kernel == "forward" else 1  # heads that share a tile's rows
    if kernel == "forward" and len(mask.q_hi) * group <= FEW_ROWS:
        kernel = "few"
    tile = tile_config(kernel, HEAD_DIM, torch.bfloat16, mask.device)
    rows, keys = tile.block_m, tile.block_n
    whole, partly = classify_tiles(mask.q_hi, mask.positions(), mask.k_hi, group, rows, keys)
    return int((whole | partly).sum()) * rows * keys / group


# --------------------------------------------------------------------------------------------------
# on a GPU: TFLOP/s


def attention_on_gpu(config):
    """{"case, rival": [TFLOP/s forward, backward]}, None where a rival cannot run."""
    g = torch.Generator("cuda").manual_seed(config.seed)
    a, b = draw(g, 8192, 8192), draw(g, 8192, 8192)
    ms = gpu_best_of(config.repeats, {"matmul": partial(torch.matmul, a, b)})["matmul"]
    ceiling = 2 * 8192**3 / ms / 1e9
    print(f"matmul of 8192^3 in bfloat16, the ceiling: {ceiling:.0f} TFLOP/s")
    result = {"matmul": ceiling}
    for name, mask in attention_cases().items():
        result |= one_case(name, mask, g, repeats=config.repeats)
    return result


def draw(generator, *shape):
    """Standard normal values on the GPU in bfloat16, which require a gradient."""
    x = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    return x.requires_grad_()


def one_case(name, mask, generator, *, repeats):
    """Correctness first, then the speeds of all rivals on one mask."""
    pairs, mask = visible_pairs(mask), mask.to("cuda")
    queries, keys = len(mask.q_hi), len(mask.k_hi)
    q = draw(generator, queries, HEADS, HEAD_DIM)  # (Nq, H, D)
    k = draw(generator, keys, KEY_HEADS, HEAD_DIM)  # (Nk, K, D)
    v = draw(generator, keys, KEY_HEADS, HEAD_DIM)  # (Nk, K, D)
    rivals, builders = attention_rivals(name, (q, k, v), mask)
    check_attention(name, (q, k, v), mask)
    forward = gpu_best_of(repeats, {key: torch.no_grad()(run) for key, run in rivals.items()})
    backward = {}
    if not name.startswith("decode"):
        both = {key: with_backward(run, (q, k, v)) for key, run in rivals.items()}
        both = gpu_best_of(repeats, both)
        known = [key for key in both if None not in (both[key], forward[key])]
        backward = {key: both[key] - forward[key] for key in known}
    masks = {key: ms for key, ms in gpu_best_of(repeats, builders).items() if ms is not None}
    print(
        f"{name}: {queries} queries, {keys} keys, {pairs:.2e} visible pairs; masks, ms: "
        + ", ".join(f"{key} {ms:.2f}" for key, ms in masks.items())
    )
    flop, result = 4 * pairs * HEADS * HEAD_DIM, {}
    for key in rivals:
        times = (forward.get(key), 1), (backward.get(key), 2.5)
        speeds = [factor * flop / ms / 1e9 if ms else None for ms, factor in times]
        print_speeds(key, speeds, forward[key])
        result[f"{name}, {key}"] = speeds
    return result


def print_speeds(rival, speeds, ms):
    """One line: TFLOP/s forward and backward, milliseconds forward."""
    words = ["-" if speed is None else f"{speed:.0f}" for speed in speeds]
    line = f"  {rival:18s}forward {words[0]:>6s}   backward {words[1]:>6s}   "
    print(line + (f"({ms:.3f} ms)" if ms else ""))


def attention_rivals(name, inputs, mask):
    """({rival: attention of q, k, v under the mask}, {rival: what builds its masks})."""
    q, k, _ = inputs
    rivals = {
        "triton": partial(attention, *inputs, mask, "triton"),
        "flex, our lists": partial(attention, *inputs, mask, "flex"),
        "sdpa by pieces": partial(attention, *inputs, mask, "sdpa"),
    }
    builders = {"our lists": partial(build_lists, mask, q, k)}
    if name.endswith("16k"):
        rivals["sdpa"] = partial(plain_sdpa, inputs, name.startswith("causal"))
    build = flex_mask_as_bagel_builds_it(mask)
    try:
        compiled = torch.compile(flex_attention, dynamic=True)
        rivals["flex, BAGEL"] = partial(plain_flex, inputs, compiled, build())
        builders["BAGEL's mask"] = build
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"  flex, BAGEL: {first_line(error)}")
    return rivals, builders


def flex_mask_as_bagel_builds_it(mask):
    """A function that makes a BlockMask with `create_block_mask` over all heads, as the official
    training code does."""
    q_hi, q_pos, k_hi = mask.q_hi, mask.positions(), mask.k_hi
    return partial(
        torch.compile(create_block_mask),
        lambda batch, head, i, j: (j < q_hi[i]) & (q_pos[i] < k_hi[j]),
        *(1, HEADS, len(q_hi), len(k_hi)),
        device=mask.device,
        BLOCK_SIZE=128,
    )


def plain_flex(inputs, compiled, block_mask):
    """FlexAttention with a BlockMask."""
    out = compiled(*batch_of_one(inputs), block_mask=block_mask, enable_gqa=True)
    return out[0].transpose(0, 1)  # (Nq, H, D)


def plain_sdpa(inputs, is_causal):
    """PyTorch's own attention where it needs no dense mask: a causal or a full sequence."""
    sdpa = F.scaled_dot_product_attention
    out = sdpa(*batch_of_one(inputs), is_causal=is_causal, enable_gqa=True)
    return out[0].transpose(0, 1)  # (Nq, H, D)


def batch_of_one(inputs):
    """(N, heads, D) of each -> (1, heads, N, D)."""
    return [x.transpose(0, 1)[None] for x in inputs]  # (1, heads, N, D)


def with_backward(run, inputs):
    """A function that runs `run` and takes the gradients of q, k and v."""
    gradient = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(run(), inputs, gradient)


def check_attention(name, inputs, mask, *, rows=64):
    """ValueError unless the Triton kernel is right about some rows and their gradients.

    The output of a few rows, and all gradients if only these rows have one, against float64.
    """
    q, k, v = inputs
    some = torch.linspace(0, len(mask.q_hi) - 1, rows, device=q.device).long().unique()  # (rows,)
    part = Mask(mask.q_hi[some], mask.k_hi, mask.positions()[some])
    do = torch.zeros_like(q).index_copy_(0, some, torch.randn_like(q[some]))  # (Nq, H, D)
    out = attention(q, k, v, mask, "triton")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
    exact = [x.detach().double().requires_grad_() for x in (q[some], k, v)]
    expected = reference(*exact, part)
    expected = (expected, *torch.autograd.grad(expected, exact, do[some].double()))
    for what, got, right in zip(("out", "dq", "dk", "dv"), (out[some], dq[some], dk, dv), expected):
        error = ((got.double() - right).norm() / right.norm()).item()
        if not error < 1e-2:
            raise ValueError(f"{name}: {what} of the Triton kernel is wrong by {error:.1e}")
