"""
Attention over the packs that this project is made of, and causal and full ones as others measure.

    python -m bench attention

On a GPU: the Triton kernel against FlexAttention, with masks as BAGEL's training code builds them,
our pieces of SDPA, and PyTorch's SDPA where it needs no dense mask. The output and all gradients
are compared with float64 before anything is timed. TFLOP/s count visible pairs,

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

from bench.timing import best_of, gpu_best_of
from kernels.attention import attention, reference
from kernels.mask import Mask
from kernels.tiles import classify_tiles
from kernels.triton_attention import FEW_ROWS, backward_lists, forward_lists, tile_config
from sequence import Layout, Sequence
from vision import Reference

HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128  # BAGEL-7B
IMAGE, VIT = 4096, 4900  # latent and ViT tokens of a picture of 1024 x 1024
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
            sequence.image(Reference(torch.empty(n, 0), (1, n), None, (0, 0)), vit=False)


def new_sequence():
    return Sequence(Layout(0, 1, 2, 3, LONGEST, LONGEST))


def document(*sizes):
    """Mask of one document of these runs."""
    sequence = new_sequence()
    with sequence.document():
        runs(sequence, *sizes)
    return sequence.pack().mask


def bagel_pack(tokens=36864):
    """Training samples until the pack is full: an edit with a reference, text to image, a question
    about a picture."""
    sequence = new_sequence()
    shapes = [(-IMAGE - 2, -1371, 60, -IMAGE - 2), (150, -IMAGE - 2), (-VIT - 2, 400)]
    for shape in shapes * 9:
        if sequence.length + sum(map(abs, shape)) > tokens:
            break
        with sequence.document():
            runs(sequence, *shape[:-1])
            with sequence.branch():
                runs(sequence, shape[-1])
    return sequence.pack().mask


def tree(*prompt, plans=8, plan=300, steps=4, image=1024):
    """A group of the update: `plans` branches of a plan and the noised pictures of its steps."""
    sequence = new_sequence()
    with sequence.document():
        runs(sequence, *prompt)
        for _ in range(plans):
            with sequence.branch():
                runs(sequence, plan)
                for _ in range(steps):
                    with sequence.branch():
                        runs(sequence, -image)
    return sequence.pack().mask


def decoding(members=32, prompt=36864, room=256):
    """One step: a query a member at the end of its own slots, on the prompt that all share."""
    sequence = new_sequence()
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
        "causal 16k": document(16384),
        "full 16k": document(-16384),
        "BAGEL pack 36k": bagel_pack(),
        "edit tree": tree(-1026, -VIT, 60),
        "text-to-image tree": tree(120),
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
        result |= measure(name, mask, g, config.repeats)
    return result


def draw(generator, *shape):
    """Standard normal values on the GPU in bfloat16, which require a gradient."""
    x = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    return x.requires_grad_()


def measure(name, mask, generator, repeats):
    """Correctness first, then the speeds of all rivals on one mask."""
    pairs, mask = visible_pairs(mask), mask.to("cuda")
    queries, keys = len(mask.q_hi), len(mask.k_hi)
    q = draw(generator, queries, HEADS, HEAD_DIM)  # (Nq, H, D)
    k = draw(generator, keys, KEY_HEADS, HEAD_DIM)  # (Nk, K, D)
    v = draw(generator, keys, KEY_HEADS, HEAD_DIM)  # (Nk, K, D)
    check(name, (q, k, v), mask)
    build_flex = flex_mask_as_bagel_builds_it(mask)
    rivals = {
        "triton": partial(attention, q, k, v, mask, "triton"),
        "sdpa by pieces": partial(attention, q, k, v, mask, "sdpa"),
        "flex, BAGEL": flex_rival((q, k, v), build_flex),
    }
    if name.endswith("16k"):
        rivals["sdpa"] = partial(plain_sdpa, (q, k, v), name.startswith("causal"))
    builders = {"our lists": partial(build_lists, mask, q, k), "BAGEL's mask": build_flex}
    forward = gpu_best_of(repeats, {key: torch.no_grad()(run) for key, run in rivals.items()})
    both = {}
    if not name.startswith("decode"):
        gradient = torch.randn_like(q)
        both = {
            key: partial(with_backward, run, (q, k, v), gradient) for key, run in rivals.items()
        }
        both = gpu_best_of(repeats, both)
    print(f"{name}: {queries} queries, {keys} keys, {pairs:.2e} visible pairs; masks, ms:")
    for key, ms in gpu_best_of(repeats, builders).items():
        print(f"  {key:18s}" + (f"{ms:.2f}" if ms else "-"))
    flop, result = 4 * pairs * HEADS * HEAD_DIM, {}
    for key, ms in forward.items():
        speeds = [None, None]
        if ms:
            speeds[0] = flop / ms / 1e9
        if ms and both.get(key):
            speeds[1] = 2.5 * flop / (both[key] - ms) / 1e9
        words = ["-" if speed is None else f"{speed:.0f}" for speed in speeds]
        print(f"  {key:18s}forward {words[0]:>6s}   backward {words[1]:>6s}")
        result[f"{name}, {key}"] = speeds
    return result


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


def flex_rival(inputs, build):
    """FlexAttention with a BlockMask, which is made on the first call."""
    compiled, made = torch.compile(flex_attention, dynamic=True), []

    def run():
        if not made:
            made.append(build())
        out = compiled(*batch_of_one(inputs), block_mask=made[0], enable_gqa=True)
        return out[0].transpose(0, 1)  # (Nq, H, D)

    return run


def plain_sdpa(inputs, is_causal):
    """PyTorch's own attention where it needs no dense mask: a causal or a full sequence."""
    sdpa = F.scaled_dot_product_attention
    out = sdpa(*batch_of_one(inputs), is_causal=is_causal, enable_gqa=True)
    return out[0].transpose(0, 1)  # (Nq, H, D)


def batch_of_one(inputs):
    """(N, heads, D) of each -> (1, heads, N, D)."""
    return [x.transpose(0, 1)[None] for x in inputs]  # (1, heads, N, D)


def with_backward(run, inputs, gradient):
    """Run, and take the gradients of q, k and v."""
    return torch.autograd.grad(run(), inputs, gradient)


def check(name, inputs, mask, *, rows=64):
    """ValueError unless the Triton kernel is right about some rows and their gradients.

    The output of a few rows, and all gradients if only these rows have one, against float64.
    """
    q, k, v = inputs
    rows = torch.linspace(0, len(q) - 1, rows, device=q.device).long().unique()  # (rows,)
    part = Mask(mask.q_hi[rows], mask.k_hi, mask.positions()[rows])
    do = torch.zeros_like(q).index_copy_(0, rows, torch.randn_like(q[rows]))  # (Nq, H, D)
    out = attention(q, k, v, mask, "triton")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
    exact = [x.detach().double().requires_grad_() for x in (q[rows], k, v)]
    expected = reference(*exact, part)
    expected = (expected, *torch.autograd.grad(expected, exact, do[rows].double()))
    for what, got, right in zip(("out", "dq", "dk", "dv"), (out[rows], dq[rows], dk, dv), expected):
        error = ((got.double() - right).norm() / right.norm()).item()
        if not error < 1e-2:
            raise ValueError(f"{name}: {what} of the Triton kernel is wrong by {error:.1e}")
