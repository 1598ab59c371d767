"""
Every speed that this project quotes, measured beside its rival in one run. Not a concept of the paper.

    python bench.py model          one thread of a CPU: training, prefill, denoising, decoding of a mid-size model
    python bench.py attention      on a GPU: TFLOP/s of our kernel and its rivals; on a CPU: what the masks cost
    python bench.py grpo           whole groups against one member and one step at a time; 7B computed
    python bench.py data           samples a second read from shards at 1024 px, against decoding alone
    python bench.py scale          one process against two; what 8 and 64 GPUs would have to send, computed

A figure is the best of `repeats` rounds; the rounds of rivals alternate, so that a noisy machine is noisy for all of
them. On a CPU it is CPU time, not wall time. Nothing here is a test: a test that measures time fails by chance.
Left out: figures that were not measured here, unless they are named as such.
"""

import json
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine import Prompt, Sampler, paint, think
from kernels.mask import Mask
from model import ModelConfig, UnifiedModel
from runtime.config import exit_on_user_error, parse
from sequence import Layout, Sequence
from vision import Reference


@dataclass(frozen=True)
class Config:
    repeats: int = 5  # rounds; the best one counts
    threads: int = 1
    seed: int = 0
    json: bool = False  # end with one line of JSON


PRESETS = {"default": {}}


def best_of(repeats, **rivals):
    """{name: least CPU seconds} of functions without arguments, in alternating rounds."""
    best = {name: float("inf") for name in rivals}
    # the first round warms up, and counts if it happens to be the best
    for _ in range(repeats + 1):
        for name, function in rivals.items():
            begun = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - begun)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# model: the same forward passes that training and sampling make

MID = ModelConfig(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=4096, vit_hidden_size=192, vit_intermediate_size=768, vit_num_layers=4, vit_num_heads=4, vit_side=16,
    codec="space_to_depth", latent_side=16,
)  # fmt: skip  # the codec is not used: latents are given


OFFICIAL = {  # CPU seconds of the official code on the same case, one thread of another machine
    "train forward": 0.38,
    "train forward + backward": 0.86,
    "prefill": 0.10,
    "10 steps": 0.55,
    "10 steps, guidance": 1.53,
    "64 greedy tokens": 0.42,
}


def random_reference(generator, side=16):
    patches = torch.randn(side * side, 3 * MID.vit_patch**2, generator=generator)
    return Reference(
        torch.randn(side * side, MID.token_channels, generator=generator),
        (side, side),
        patches,
        (side, side),
    )


def bench_model(config):
    """A pack of two edits of about 770 tokens each: reference (256 latents, 256 ViT), 60 words, noised target (196)."""
    g = torch.Generator().manual_seed(config.seed)
    model = UnifiedModel(MID).initialise(config.seed)
    torch.nn.init.normal_(model.latent_out.weight, std=0.02, generator=g)
    layout = Layout(0, 1, 2, 3, MID.latent_side, MID.vit_side)
    words = lambda n: torch.randint(4, MID.vocab_size, (n,), generator=g).tolist()
    prompt = Prompt((random_reference(g), words(40)))
    sequence = Sequence(layout)
    for _ in range(2):
        with sequence.document():
            Prompt((random_reference(g), words(40))).write(sequence)
            sequence.text(words(20), loss=True)
            sequence.noise(torch.randn(196, MID.token_channels, generator=g), (14, 14), 0.5)
    packed = sequence.pack()
    target = torch.randn(len(packed.noised), MID.token_channels, generator=g)

    def loss():
        packed.mask.cache.clear()  # a training step has a new pack and plans its attention anew
        und, gen = model(packed)
        return model.cross_entropy(und, packed).mean() + F.mse_loss(
            model.velocity(packed, gen), target
        )

    def forward():
        with torch.no_grad():
            loss()

    def backward():
        loss().backward()
        model.zero_grad()

    def steps(*scales):
        paint(
            model,
            layout,
            [prompt],
            [[None]],
            [(14, 14)],
            Sampler(11, 3.0, *scales, guidance_interval=(0.0, 1.0)),
            [g],
        )

    prefill = lambda: think(model, layout, [prompt], 1, 1, 0.0)
    rivals = {
        "train forward": forward,
        "train forward + backward": backward,
        "prefill": prefill,
        "10 steps": lambda: steps(1.0, 1.0),
        "10 steps, guidance": lambda: steps(4.0, 1.5),
        "64 greedy tokens": lambda: think(model, layout, [prompt], 1, 64, 0.0),
    }
    ours = best_of(config.repeats, **rivals)
    # the official figures have the prefill apart
    for name in ("10 steps", "10 steps, guidance", "64 greedy tokens"):
        ours[name] -= ours["prefill"]
    print(
        f"{len(packed)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{config.threads} thread"
    )
    print(f"{'CPU seconds':28s}{'ours':>8s}{'official*':>11s}{'ratio':>8s}")
    for name, seconds in ours.items():
        print(f"{name:28s}{seconds:8.3f}{OFFICIAL[name]:11.2f}{seconds / OFFICIAL[name]:8.2f}")
    print(
        "* of the official code, on another machine; a ratio between machines is a hint, not a measurement"
    )
    return {
        name.replace(",", "").replace(" ", "_"): round(seconds, 4) for name, seconds in ours.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# attention: causal and full as everybody measures them, then the shapes that this project is made of

HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128  # BAGEL-7B


IMAGE, VIT = 4096, 4900  # latent and ViT tokens of a picture of 1024 x 1024


def runs(sequence, *sizes):
    """Append runs of these lengths: positive numbers are causal (text), negative ones bidirectional (images)."""
    for size in sizes:
        sequence._run(abs(size), "given", causal=size > 0)


def forest(build):
    """Mask of what `build` lays out."""
    sequence = Sequence(Layout(0, 1, 2, 3, 64, 70))
    build(sequence)
    return sequence.pack().mask


def causal(sequence, tokens=16384):
    with sequence.document():
        runs(sequence, tokens)


def full(sequence, tokens=16384):
    with sequence.document():
        runs(sequence, -tokens)


def bagel_pack(sequence, tokens=36864):
    """Training samples: an edit with a reference, text to image, a question about a picture, until the pack is full."""
    shapes = [(-IMAGE - 2, -1371, 60, -IMAGE - 2), (150, -IMAGE - 2), (-VIT - 2, 400)]
    for shape in shapes * 9:
        if sequence.length + sum(map(abs, shape)) > tokens:
            break
        with sequence.document():
            runs(sequence, *shape[:-1])
            with sequence.branch():
                runs(sequence, shape[-1])


def tree(sequence, prompt, plans=8, plan=300, steps=4, image=1024):
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
    sequence = Sequence(Layout(0, 1, 2, 3, 64, 70))
    with sequence.document():
        runs(sequence, prompt)
        for _ in range(members):
            with sequence.branch():
                sequence.reserve(room)
    whole = sequence.pack()
    slots = torch.tensor(sequence.reserved) + room - 1
    return whole.decoding(slots, torch.zeros_like(slots)).mask


def attention_cases():
    return {
        "causal 16k": forest(causal),
        "full 16k": forest(full),
        "BAGEL pack 36k": forest(bagel_pack),
        "edit tree": forest(lambda sequence: tree(sequence, (-1026, -VIT, 60))),
        "text-to-image tree": forest(lambda sequence: tree(sequence, (120,))),
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
    return attention_on_gpu(config) if torch.cuda.is_available() else attention_metadata(config)


def attention_metadata(config):
    """Milliseconds to build the tile lists of one pack, and how many more pairs the tiles compute than are visible."""
    from kernels import attention as A

    group, result = HEADS // KEY_HEADS, {}
    print(
        f"{'':22s}{'tokens':>8s}{'pairs':>10s}{'lists, ms':>11s}{'forward':>9s}{'dk/dv':>8s}   computed / visible"
    )
    for name, mask in attention_cases().items():
        pairs = visible_pairs(mask)
        rows, keys, _, _ = A.tile_config(
            "few" if len(mask.q_hi) * group <= A.FEW_ROWS else "forward",
            HEAD_DIM,
            torch.bfloat16,
            mask.device,
        )
        dk_rows, dk_keys, _, _ = A.tile_config("dkdv", HEAD_DIM, torch.bfloat16, mask.device)
        q = torch.empty(len(mask.q_hi), HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
        k = torch.empty(len(mask.k_hi), KEY_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")

        def build():
            mask.cache.clear()
            A.forward_lists(mask, q, k), A.backward_lists(mask, q, k)

        seconds = best_of(config.repeats, build=build)["build"]
        computed = []
        for g, m, n in ((group, rows, keys), (1, dk_rows, dk_keys)):
            whole, partly = A.classify_tiles(mask.q_hi, mask.positions(), mask.k_hi, g, m, n)
            computed.append(int((whole | partly).sum()) * m * n / g / pairs)
        print(
            f"{name:22s}{len(mask.q_hi):8d}{pairs:10.2e}{1e3 * seconds:11.2f}{computed[0]:9.2f}{computed[1]:8.2f}"
        )
        result[name] = {"ms": 1e3 * seconds, "forward": computed[0], "dkdv": computed[1]}
    return result


def gpu_best_of(repeats, **rivals):
    """{name: least milliseconds} on the GPU, in alternating rounds; None for a rival that raises on its first call."""
    best = {}
    for name, function in rivals.items():
        try:
            function()
            torch.cuda.synchronize()
            best[name] = float("inf")
        except (RuntimeError, ValueError, AssertionError) as error:
            print(f"  {name}: {str(error).splitlines()[0][:100]}")
            best[name] = None
    for _ in range(repeats):
        for name in [name for name, value in best.items() if value is not None]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(5):
                rivals[name]()
            end.record()
            end.synchronize()
            best[name] = min(best[name], start.elapsed_time(end) / 5)
    return best


def flex_as_bagel_builds_it(mask):
    """FlexAttention with a BlockMask from `create_block_mask` over all heads, as the official training code does."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q_hi, q_pos, k_hi = mask.q_hi, mask.positions(), mask.k_hi
    visible = lambda batch, head, i, j: (j < q_hi[i]) & (q_pos[i] < k_hi[j])
    build = torch.compile(create_block_mask)
    make = lambda: build(
        visible, 1, HEADS, len(q_hi), len(k_hi), device=mask.device, BLOCK_SIZE=128
    )
    attend = torch.compile(flex_attention, dynamic=True)

    def run(q, k, v, block_mask):
        out = attend(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=block_mask, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    return make, run


def plain_sdpa(name):
    """PyTorch's own attention where it needs no dense mask: a causal or a full sequence."""

    def run(q, k, v):
        return F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            is_causal=name.startswith("causal"),
            enable_gqa=True,
        )[0].transpose(0, 1)

    return run


def attention_on_gpu(config):
    """Correctness first, then TFLOP/s over visible pairs: forward 4 pairs H D, backward 2.5 times that."""
    from kernels.attention import attention, backward_lists, forward_lists

    g = torch.Generator("cuda").manual_seed(config.seed)
    draw = lambda *shape: torch.randn(
        *shape, generator=g, device="cuda", dtype=torch.bfloat16
    ).requires_grad_()
    a, b = draw(8192, 8192), draw(8192, 8192)
    ceiling = 2 * 8192**3 / gpu_best_of(config.repeats, matmul=lambda: a @ b)["matmul"] / 1e9
    print(f"matmul of 8192^3 in bfloat16, the ceiling: {ceiling:.0f} TFLOP/s")
    result = {"matmul": ceiling}
    for name, mask in attention_cases().items():
        pairs, mask = visible_pairs(mask), mask.to("cuda")
        q, k, v = (
            draw(len(mask.q_hi), HEADS, HEAD_DIM),
            draw(len(mask.k_hi), KEY_HEADS, HEAD_DIM),
            draw(len(mask.k_hi), KEY_HEADS, HEAD_DIM),
        )
        make, bagel = flex_as_bagel_builds_it(mask)
        rivals = {
            "triton": lambda: attention(q, k, v, mask, "triton"),
            "flex, our lists": lambda: attention(q, k, v, mask, "flex"),
            "sdpa by pieces": lambda: attention(q, k, v, mask, "sdpa"),
        }
        if name.endswith("16k"):
            rivals["sdpa"] = lambda: plain_sdpa(name)(q, k, v)
        block_mask = None
        try:
            block_mask = make()
            rivals["flex, BAGEL"] = lambda: bagel(q, k, v, block_mask)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"  flex, BAGEL: {str(error).splitlines()[0][:100]}")
        check_attention(name, q, k, v, mask)
        forward = gpu_best_of(config.repeats, **{key: no_grad(run) for key, run in rivals.items()})
        backward = {}
        if not name.startswith("decode"):
            both = gpu_best_of(
                config.repeats,
                **{key: with_backward(run, (q, k, v)) for key, run in rivals.items()},
            )
            backward = {
                key: None if both[key] is None or forward[key] is None else both[key] - forward[key]
                for key in both
            }

        def lists():
            mask.cache.clear()
            forward_lists(mask, q, k), backward_lists(mask, q, k)

        metadata = gpu_best_of(
            config.repeats,
            **{"our lists": lists} | ({"BAGEL's mask": make} if block_mask is not None else {}),
        )
        print(
            f"{name}: {len(mask.q_hi)} queries, {len(mask.k_hi)} keys, {pairs:.2e} visible pairs; masks, ms: "
            + ", ".join(
                f"{key} {value:.2f}" for key, value in metadata.items() if value is not None
            )
        )
        flop = 4 * pairs * HEADS * HEAD_DIM
        for key in rivals:
            speeds = [
                None if not ms else factor * flop / ms / 1e9
                for ms, factor in ((forward.get(key), 1), (backward.get(key), 2.5))
            ]
            print(
                f"  {key:18s}"
                + "".join(
                    f"{label} {'-' if speed is None else f'{speed:.0f}':>6s}   "
                    for label, speed in zip(("forward", "backward"), speeds)
                )
                + (f"({forward[key]:.3f} ms)" if forward[key] else "")
            )
            result[f"{name}, {key}"] = speeds
    return result


def no_grad(run):
    def call():
        with torch.no_grad():
            run()

    return call


def with_backward(run, inputs):
    gradient = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(run(), inputs, gradient)


def check_attention(name, q, k, v, mask, rows=64):
    """The output of a few rows, and all gradients if only these rows have one, against float64."""
    from kernels.attention import attention, reference

    some = torch.linspace(0, len(mask.q_hi) - 1, rows, device=q.device).long().unique()
    part = Mask(mask.q_hi[some], mask.k_hi, mask.positions()[some])
    do = torch.zeros_like(q).index_copy_(0, some, torch.randn_like(q[some]))
    out = attention(q, k, v, mask, "triton")
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), do)
    exact = [x.detach().double().requires_grad_() for x in (q[some], k, v)]
    expected = reference(*exact, part)
    expected = (expected, *torch.autograd.grad(expected, exact, do[some].double()))
    for what, got, right in zip(("out", "dq", "dk", "dv"), (out[some], dq[some], dk, dv), expected):
        error = ((got.double() - right).norm() / right.norm()).item()
        if not error < 1e-2:
            raise ValueError(f"{name}: {what} of the Triton kernel is wrong by {error:.1e}")


# ---------------------------------------------------------------------------------------------------------------------
# grpo: groups over the tree against the naive loop


def grpo_case(shape, plan_tokens, side, config):
    """(model, layout, config of grpo.py), for pictures alone: the naive loop takes no gradient of the plans."""
    import grpo

    model = UnifiedModel(shape).initialise(config.seed)
    torch.nn.init.normal_(
        model.latent_out.weight, std=0.02, generator=torch.Generator().manual_seed(0)
    )
    settings = grpo.Config(
        config="toy",
        **grpo.PRESETS["toy"]
        | dict(
            max_plan_tokens=plan_tokens, picture_side=side, updates=1, train_text=False, kl_beta=0.0
        ),
    )
    return model, Layout(0, 1, 2, 3, model.config.latent_side, model.config.vit_side), settings


def naive_rollout(model, layout, prompts, settings, generator):
    """One member at a time: the prompt is read anew for its plan and for its picture."""
    grid = model.config.picture_grid(settings.picture_side, settings.picture_side)
    for prompt in prompts:
        for _ in range(settings.group_size):
            plan, _ = think(model, layout, [prompt], 1, settings.max_plan_tokens, 1.0, [generator])
            paint(model, layout, [prompt], [plan], [grid], settings.sampler, [generator])


def tree_rollout(model, layout, prompts, settings, generator):
    """All members of all groups together."""
    from engine import prefill

    prefix, size = prefill(model, layout, prompts), settings.group_size
    plans, _ = think(
        model,
        layout,
        prompts,
        size,
        settings.max_plan_tokens,
        1.0,
        [generator] * size * len(prompts),
        prefix=prefix,
    )
    grid = model.config.picture_grid(settings.picture_side, settings.picture_side)
    plans = [plans[i : i + size] for i in range(0, len(plans), size)]
    paint(
        model,
        layout,
        prompts,
        plans,
        [grid] * len(prompts),
        settings.sampler,
        [generator] * size * len(prompts),
        prefix=prefix,
    )
    return plans


def a_rollout(model, prompts, plans, settings, generator):
    """What the update needs of a rollout, with latents drawn at random."""
    import flow
    import grpo

    grid = model.config.picture_grid(settings.picture_side, settings.picture_side)
    tokens = len(prompts) * settings.group_size * grid[0] * grid[1]
    x = torch.randn(settings.window, tokens, model.config.token_channels, generator=generator)
    times = flow.time_grid(settings.num_timesteps, settings.timestep_shift)[1 : settings.window + 2]
    count = len(prompts) * settings.group_size
    return grpo.Rollout(
        prompts,
        plans,
        torch.ones(count, dtype=torch.bool),
        ["x"] * count,
        torch.ones(count, dtype=torch.bool),
        x,
        x + 0.1 * torch.randn(x.shape, generator=generator),
        times,
        torch.zeros(count, settings.window),
        [],
        grid,
    )


def naive_update(model, layout, rollout, advantage, settings):
    """One member and one step at a time."""
    import flow

    n, size = rollout.grid[0] * rollout.grid[1], settings.group_size
    for group, prompt in enumerate(rollout.prompts):
        for i in range(size):
            span = slice((group * size + i) * n, (group * size + i + 1) * n)
            for k in range(settings.window):
                sequence = Sequence(layout)
                with sequence.document():
                    prompt.write(sequence)
                    sequence.text(rollout.plans[group][i])
                    sequence.noise(rollout.x[k, span], rollout.grid, rollout.times[k])
                packed = sequence.pack()
                v = model.velocity(packed, model(packed)[1])
                mean, std = flow.transition(
                    rollout.x[k, span],
                    v,
                    rollout.times[k],
                    rollout.times[k + 1],
                    settings.noise_level,
                )
                log_prob = flow.log_prob(
                    rollout.x_next[k, span], mean, std, torch.zeros(n, dtype=torch.long), 1
                )
                (-advantage[group, i] * (log_prob - log_prob.detach()).exp().sum()).backward()
    model.zero_grad()


def tree_update(model, layout, rollout, reward, settings):
    """grpo.update, with an optimiser that changes nothing."""
    import grpo

    grpo.update(
        model, None, torch.optim.SGD(model.parameters(), 0.0), layout, rollout, reward, settings
    )


def kept_for_backward(model, layout, rollout, settings):
    """Bytes that autograd keeps at a time: for one member and step, and for one pack of members with its prompt."""
    import grpo
    from bench.memory import kept_bytes

    sequence, n = Sequence(layout), rollout.grid[0] * rollout.grid[1]
    with sequence.document():
        rollout.prompts[0].write(sequence)
        sequence.text(rollout.plans[0][0])
        sequence.noise(rollout.x[0, :n], rollout.grid, rollout.times[0])
    packed = sequence.pack()
    with kept_bytes(model.parameters()) as alone:
        model.velocity(packed, model(packed)[1])
    shared, found = grpo.batches(layout, rollout, 0, settings)
    with kept_bytes(model.parameters()) as together:
        grpo.policy(model, model.keys_and_values(shared), found[0], settings)
    return alone.total, together.total


def bench_grpo(config):
    from dataclasses import replace

    from model import TOY

    g, result = torch.Generator().manual_seed(config.seed), {}
    toy = ModelConfig(**TOY)
    side, patch = toy.latent_side, toy.vit_patch
    picture = lambda: Reference(
        torch.randn(side**2, toy.token_channels, generator=g),
        (side, side),
        torch.randn(4, 3 * patch**2, generator=g),
        (2, 2),
    )
    words = lambda n, vocabulary: torch.randint(4, vocabulary, (n,), generator=g).tolist()
    cases = {
        "toy": (
            toy,
            lambda: Prompt((picture(), picture(), words(20, 512))),
            50,
            32,
            dict(group_size=16, window=2),
        ),
        "mid, 4 references": (
            MID,
            lambda: Prompt((*[random_reference(g) for _ in range(4)], words(40, 512))),
            60,
            112,
            dict(group_size=8, window=2),
        ),
    }
    for name, (shape, prompt, plan_tokens, pixels, options) in cases.items():
        model, layout, settings = grpo_case(shape, plan_tokens, pixels, config)
        settings = replace(settings, prompts_per_step=1, tokens_per_pack=4096, **options)
        prompts = [prompt()]
        plans = [[words(plan_tokens, 512) for _ in range(settings.group_size)]]
        rollout, reward = (
            a_rollout(model, prompts, plans, settings, g),
            torch.randn(1, settings.group_size, generator=g),
        )
        counted, kept = {}, kept_for_backward(model, layout, rollout, settings)

        def counting(key, function):
            def call():
                model.tokens = 0
                function()
                counted[key] = model.tokens

            return call

        rivals = {
            "rollout, naive": lambda: naive_rollout(model, layout, prompts, settings, g),
            "rollout, tree": lambda: tree_rollout(model, layout, prompts, settings, g),
            "update, naive": lambda: naive_update(model, layout, rollout, reward, settings),
            "update, tree": lambda: tree_update(model, layout, rollout, reward, settings),
        }
        best = best_of(
            config.repeats, **{key: counting(key, function) for key, function in rivals.items()}
        )
        print(
            f"{name}: prompt {len(prompts[0])} tokens, {settings.group_size} members, plans of {plan_tokens}, "
            f"{settings.window} trained steps"
        )
        for phase in ("rollout", "update"):
            naive, tree = best[f"{phase}, naive"], best[f"{phase}, tree"]
            memory = (
                ""
                if phase == "rollout"
                else f", kept for backward {kept[0] / 1e6:.1f} and {kept[1] / 1e6:.1f} MB"
            )
            print(
                f"  {phase:8s} naive {naive:7.2f} s  tree {tree:7.2f} s  {naive / tree:5.1f} times faster; tokens "
                f"{counted[f'{phase}, naive']:,} and {counted[f'{phase}, tree']:,}{memory}"
            )
            result[f"{name.split(',')[0]}_{phase}_speedup"] = round(naive / tree, 2)
    print_seven_billion()
    return {
        "update_speedup": result["toy_update_speedup"],
        "rollout_speedup": result["toy_rollout_speedup"],
        **result,
    }


def print_seven_billion(group_size=32, window=3, steps=16, plan=150):
    """FLOPs of one group at 1024 px and BAGEL's size, each pass of a member on its own and over the tree; its cache."""
    shape = ModelConfig()
    active = (
        shape.hidden_size * (2 * shape.hidden_size + 2 * shape.num_key_value_heads * shape.head_dim)
        + 3 * shape.hidden_size * shape.intermediate_size
    )
    active *= shape.num_hidden_layers
    pair = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    # keys: visible to a token, on average
    flop = lambda tokens, keys: 2 * active * tokens + pair * tokens * keys
    picture, kv = (
        IMAGE + 2,
        4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim,
    )
    print(
        f"computed for BAGEL-7B: {group_size} members, {steps} denoising steps, {window} of them trained, "
        f"plans of {plan}; PFLOP a group"
    )
    print(
        f"{'references':>12s}{'prompt':>9s}{'rollout':>10s}{'tree':>8s}{'update':>10s}{'tree':>8s}"
        f"{'KV cache, naive and tree, GB':>32s}"
    )
    for references in range(1, 5):
        prompt = references * (picture + VIT + 2) + 60
        once, own = flop(prompt, prompt / 2), flop(plan, prompt + plan / 2)
        image = flop(picture, prompt + plan + picture)
        naive = group_size * (2 * once + own + steps * image)
        tree = once + group_size * (own + steps * image)
        naive_trained = 3 * group_size * window * (once + own + image)
        tree_trained = 3 * (once + group_size * (own + window * image))
        cache = [
            kv * group_size * (prompt + plan + picture) / 1e9,
            kv * (prompt + group_size * (plan + picture)) / 1e9,
        ]
        print(
            f"{references:12d}{prompt:9,d}{naive / 1e15:10.0f}{tree / 1e15:8.0f}"
            f"{naive_trained / 1e15:10.0f}{tree_trained / 1e15:8.0f}"
            f"{cache[0]:22.1f}{cache[1]:10.1f}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# data: how fast samples come from disk


def bench_data(config):
    import tempfile
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from data import ShardWriter, Source, stream, to_png
    from toy.tasks import draw_sample

    rng, count = np.random.default_rng(config.seed), 24
    noisy = lambda image: Image.fromarray(
        (
            np.asarray(image.resize((1024, 1024), Image.Resampling.BICUBIC)) * 0.9
            + rng.integers(0, 24, (1024, 1024, 3))
        ).astype(np.uint8)
    )
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, 8) as writer:
            for i in range(count):
                one = draw_sample("train", i)
                record = {
                    "key": one.key,
                    "task": one.task,
                    "instruction": one.instruction,
                    "plan": {
                        "out_caption": one.plan.caption,
                        "relations": [
                            {f"relation_{j}": r} for j, r in enumerate(one.plan.relations, 1)
                        ],
                    },
                }
                writer.write(
                    record,
                    [to_png(noisy(image)) for image in one.references],
                    to_png(noisy(one.target)),
                )
        source = Source(folder)
        pictures = sum(len(source.sample(i).references) + 1 for i in range(count))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        encoded = [
            source._read(part, place)
            for part, _, files in source.entries
            for name, place in files.items()
            if name != "json"
        ]

        def wall(function):
            begun = time.perf_counter()
            function()
            return time.perf_counter() - begun

        def decode():
            import io

            for content in encoded:
                Image.open(io.BytesIO(content)).convert("RGB").load()

        def read(workers):
            for _ in stream(source, range(count), workers):
                pass

        rivals = {
            "decoding alone": decode,
            "loader, no worker": lambda: read(0),
            "loader, 1 worker": lambda: read(1),
            "loader, 2 workers": lambda: read(2),
        }
        best = {
            name: min(wall(function) for _ in range(config.repeats))
            for name, function in rivals.items()
        }
    print(f"{count} samples of 1024 px, {pictures} pictures, {size / count / 1e6:.1f} MB a sample")
    for name, seconds in best.items():
        print(f"  {name:20s}{count / seconds:8.1f} samples/s{pictures / seconds:8.1f} pictures/s")
    # of a sample: 2.7 pictures on average, its references seen twice
    tokens = 2.7 * (IMAGE + VIT + 4) + IMAGE + 300
    need = 0.4 * 989e12 / (6 * 6.5e9 * tokens)
    print(
        f"a step at 7B consumes {need:.2f} samples/s on each GPU (40 % of 989 TFLOP/s, {tokens:,.0f} tokens a sample): "
        f"one worker feeds "
        f"{count / best['loader, 1 worker'] / need:.0f} GPUs"
    )
    return {
        name.replace(",", "").replace(" ", "_"): round(count / seconds, 2)
        for name, seconds in best.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# scale: processes


def bench_scale(config):
    """Tokens a second of stage 1 on the toy preset by one process and by two, one thread each, in alternating runs."""
    import os
    import subprocess
    import tempfile
    from pathlib import Path

    import run

    here, best = Path(__file__).resolve().parent, {1: 0.0, 2: 0.0}
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(config.repeats):
            for processes in best:
                out = f"{folder}/{processes}-{repeat}"
                launcher = (
                    ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
                    if processes == 2
                    else []
                )
                options = "--config toy --threads 1 --steps 30 --save_every 1000 --sample_every 1000 --out"
                command = [sys.executable, *launcher, str(here / "sft.py"), *options.split(), out]
                subprocess.run(command, env=environment, check=True, capture_output=True)
                lines = run.read_log(Path(out))[10:]
                best[processes] = max(
                    best[processes],
                    sum(line["tokens"] for line in lines) / sum(line["seconds"] for line in lines),
                )
    print(
        f"sft.py --config toy, tokens/s: one process {best[1]:,.0f}, two {best[2]:,.0f}, "
        f"{best[2] / best[1]:.2f} times as many"
    )
    print_communication()
    return {"one": round(best[1]), "two": round(best[2]), "speedup": round(best[2] / best[1], 3)}


def print_communication(tokens=36_864, tflops=400, intra=360e9, inter=45e9):
    """Sharded training at 7B: bytes that each GPU sends for one pack, and the time of it beside the arithmetic.

    Every pass gathers all weights (bfloat16) and the backward pass gathers them again and scatters float32 gradients;
    a GPU moves (n - 1) / n of each. Assumed: `tflops` reached, NVLink `intra` bytes/s in a node of 8, `inter` between.
    """
    values, seconds = 14.59e9, 6 * 6.5e9 * tokens * 4 / 3 / (tflops * 1e12)
    print(
        f"computed for BAGEL-7B, all weights trained, a pack of {tokens:,} tokens a pass, {seconds:.2f} s of "
        f"arithmetic (recomputation included) at {tflops} TFLOP/s"
    )
    for gpus in (8, 64):
        sent = (2 * 2 + 4) * values * (gpus - 1) / gpus
        flat = sent / (intra if gpus <= 8 else inter)
        line = f"  {gpus:3d} GPUs, sharded over all: {sent / 1e9:6.1f} GB, {flat:5.2f} s"
        if gpus > 8:
            inside, across = (
                (2 * 2 + 4) * values * 7 / 8,
                2 * 4 * values / 8 * (gpus // 8 - 1) / (gpus // 8),
            )
            line += f"; replicas={gpus // 8}: {inside / 1e9:6.1f} GB in the node and {across / 1e9:5.1f} GB between, "
            line += f"{inside / intra + across / inter:5.2f} s"
        print(line)


BENCHES = {
    "model": bench_model,
    "attention": bench_attention,
    "grpo": bench_grpo,
    "data": bench_data,
    "scale": bench_scale,
}


def main(argv):
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    config = parse(Config, PRESETS, argv[bool(name) :])
    with exit_on_user_error(ValueError):
        if name not in BENCHES:
            raise ValueError(
                f"nothing to measure is called {name!r}; say python bench.py {' or '.join(BENCHES)}"
            )
    torch.set_num_threads(config.threads)
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"
    )
    result = BENCHES[name](config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
