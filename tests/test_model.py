"""The transformer: packed equals separate, cached equals whole, experts touch their own tokens,
names and disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model import SMOKE, Cache, ModelConfig, UnifiedModel
from runtime import pretrained
from sequence import Layout, Sequence
from toy.tokenizer import train_tokenizer
from vision import Reference, SpaceToDepth, patchify, unpatchify

LAYOUT = Layout(bos=0, eos=1, image_start=2, image_end=3, latent_side=8, vit_side=2)


@pytest.fixture(scope="module")
def model():
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # no parameter may hide behind a zero or a one
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def reference(seed):
    g = torch.Generator().manual_seed(seed)
    return Reference(
        torch.randn(6, 48, generator=g), (2, 3), torch.randn(4, 768, generator=g), (2, 2)
    )


def write(sequence, seed):
    """One document with everything in it."""
    g = torch.Generator().manual_seed(seed)
    with sequence.document():
        sequence.image(reference(seed))
        sequence.text([5 + seed, 6, 7])
        for plan in ([8, 9 + seed], [10, 11, 12]):
            with sequence.branch():
                sequence.text(plan, loss=True)
                for t in (0.3, 0.9):
                    sequence.noise(torch.randn(4, 48, generator=g), (2, 2), t)


def build(*seeds):
    sequence = Sequence(LAYOUT)
    for seed in seeds:
        write(sequence, seed)
    return sequence.pack()


def in_order(packed, und, gen):
    return torch.cat([und, gen])[packed.inverse]


def test_packed_equals_separate(model):
    together = build(1, 2, 3)
    hidden = in_order(together, *model(together))
    apart = torch.cat([in_order(p, *model(p)) for p in (build(1), build(2), build(3))])
    torch.testing.assert_close(hidden, apart, rtol=1e-10, atol=1e-10)


def test_cached_rows_equal_the_whole(model):
    """Prefill, then the noised leaves, then text token by token: the states of one packed pass."""
    packed = build(1, 2)
    whole = in_order(packed, *model(packed))
    cache = Cache(model, len(packed))
    for rows in (packed.rows_of("given"), packed.rows_of("noised")):
        part = packed.select(rows)
        torch.testing.assert_close(
            in_order(part, *model(part, cache)), whole[rows], rtol=1e-9, atol=1e-9
        )
    slots = torch.tensor([t for t in packed.text_index.tolist() if packed.kinds[t] == 0][-3:])
    ids = packed.text_ids[torch.isin(packed.text_index, slots)]
    for slot, token in zip(slots, ids):
        hidden, _ = model(packed.decoding(slot[None], token[None]), cache)
        torch.testing.assert_close(hidden, whole[slot][None], rtol=1e-9, atol=1e-9)


def test_attention_is_grouped_softmax_attention(model):
    """One block against the equations of the docstring, with a dense mask and without packing."""
    packed = build(3)
    block, c = model.blocks[0], model.config
    und, gen = model.embed(packed)
    x = torch.cat([und, gen])[packed.inverse]
    is_gen = torch.zeros(len(packed), dtype=torch.bool)
    is_gen[packed.latent_index] = True

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def each(function):  # every token by its own expert
        return torch.stack(
            [function(block.gen if is_gen[i] else block.und, i) for i in range(len(packed))]
        )

    angle = packed.positions.double()[:, None] * c.rope_theta ** (
        -torch.arange(0, c.head_dim, 2).double() / c.head_dim
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (N, 1, D / 2)

    def rotate(x):
        half = c.head_dim // 2
        z = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
        return torch.cat([z.real, z.imag], -1)

    n = each(lambda e, i: norm(x[i], e.input_layernorm.weight))
    q = rotate(each(lambda e, i: norm(e.q_proj(n[i]).view(-1, c.head_dim), e.q_norm.weight)))
    k = rotate(each(lambda e, i: norm(e.k_proj(n[i]).view(-1, c.head_dim), e.k_norm.weight)))
    v = each(lambda e, i: e.v_proj(n[i]).view(-1, c.head_dim))
    out = torch.empty_like(q)
    for head in range(c.num_attention_heads):
        group = head // (c.num_attention_heads // c.num_key_value_heads)
        scores = (q[:, head] @ k[:, group].T) / c.head_dim**0.5
        out[:, head] = (
            scores.masked_fill(~packed.mask.dense(), -torch.inf).softmax(-1) @ v[:, group]
        )
    x = x + each(lambda e, i: e.o_proj(out[i].flatten()))
    m = each(lambda e, i: norm(x[i], e.post_attention_layernorm.weight))
    x = x + each(lambda e, i: e.down_proj(F.silu(e.gate_proj(m[i])) * e.up_proj(m[i])))
    cos, sin = angle[packed.order].cos(), angle[packed.order].sin()  # (N, D / 2)
    both = torch.cat([cos, cos], 1)[:, None], torch.cat([-sin, sin], 1)[:, None]  # (N, 1, D)
    got = in_order(packed, *block(und, gen, packed, both, both=True)[:2])
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)


def test_experts_touch_their_own_tokens(model):
    """A loss on the last layer's text tokens gives the generation expert no gradient, and the
    reverse."""
    packed = build(1)
    last = model.blocks[-1]
    for which, silent in ((0, last.gen), (1, last.und)):
        model.zero_grad()
        model(packed)[which].square().sum().backward()
        for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            gradient = getattr(silent, name).weight.grad
            assert gradient is None or not gradient.any(), (which, name)
    model.zero_grad()


def test_checkpointing_changes_nothing(model):
    packed = build(1, 2)

    def gradient():
        model.zero_grad()
        und, gen = model(packed)
        (und.square().sum() + gen.square().sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradient()
    model.checkpointing = True
    again = gradient()
    model.checkpointing = False
    model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_the_last_layer_computes_what_is_read(model):
    """Losses and their gradients from labels and noised latents alone; keys without queries."""
    packed, last, worked = build(1, 2), model.blocks[-1], []
    hooks = [
        expert.down_proj.register_forward_hook(lambda _, x, y: worked.append(len(y)))
        for expert in (last.und, last.gen)
    ]

    def gradient(losses):
        model.zero_grad()
        und, gen = model(packed, losses=losses)
        ce, velocity = model.cross_entropy(und, packed), model.velocity(packed, gen)
        (ce.sum() + velocity.square().sum()).backward()
        return [ce.detach(), velocity.detach()] + [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-9, atol=1e-9)
    assert worked[:2] == [len(packed.labels), len(packed.noised)] and min(worked[2:]) > worked[0]
    model.zero_grad()
    whole, filled = Cache(model, len(packed)), Cache(model, len(packed))
    with torch.no_grad():
        model(packed, whole)
        worked.clear()
        model.fill(packed, filled)
    assert not worked and whole.keys.any()
    assert torch.equal(whole.keys, filled.keys) and torch.equal(whole.values, filled.values)
    for hook in hooks:
        hook.remove()


def test_codec_and_patches_are_lossless():
    image = torch.rand(3, 16, 24) * 2 - 1
    codec = SpaceToDepth(2)
    latents = codec.encode(image)
    assert torch.equal(codec.decode(latents), image)
    assert torch.equal(unpatchify(patchify(latents, 2), (4, 6), 2), latents)
    token = patchify(latents, 2)[7]  # row 1, column 1: laid out (patch row, patch column, channel)
    assert torch.equal(token.view(2, 2, 12), latents[:, 2:4, 2:4].permute(1, 2, 0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    model = UnifiedModel(ModelConfig(**SMOKE)).initialise(3)
    tokenizer = train_tokenizer(folder.parent / "tokenizer", model.config.vocab_size)
    pretrained.save_model(model, tokenizer, folder)
    return model, folder


def test_disk_round_trip_is_bit_identical(saved):
    model, folder = saved
    loaded, tokenizer = pretrained.load_model(folder.parent)  # a run folder is accepted too
    assert loaded.config == model.config
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a, b), name
    assert model.config.layout(tokenizer).bos == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_torn_checkpoints_are_named(saved, tmp_path):
    _, folder = saved

    def broken(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            pretrained.load_model(copy)
        assert "copy" in str(error.value)
        return str(error.value)

    def other_shape(copy):
        path = copy / "llm_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))

    def truncate(copy):
        path = copy / "ema.safetensors"
        path.write_bytes(path.read_bytes()[:5000])

    assert "of another shape" in broken(other_shape)
    assert "cannot be read" in broken(truncate)
    assert "is missing" in broken(lambda copy: (copy / "ema.safetensors").unlink())
    assert "not valid JSON" in broken(lambda copy: (copy / "vit_config.json").write_text("{"))
    assert "no checkpoint" in broken(lambda copy: (copy / "llm_config.json").unlink())
    with pytest.raises(FileNotFoundError, match="not found"):
        pretrained.load_model(tmp_path / "nowhere")


def test_the_names_and_shapes_of_the_7b_model():
    """All 1,223 tensors of ema.safetensors (docs/BAGEL.md §2.2), from a model without memory."""
    expected = {}
    for line in (Path(__file__).parent / "fixtures/bagel_7b_keys.txt").read_text().splitlines():
        name, shape = line.split()
        expected[name] = tuple(map(int, shape.split("x")))
    with torch.device("meta"):
        model = UnifiedModel(ModelConfig())
    named = dict(model.named_parameters()) | {
        name: getattr(model, name) for name in pretrained.TABLES
    }
    assert {
        pretrained.official_name(name): tuple(tensor.shape) for name, tensor in named.items()
    } == expected
    assert (
        len(expected) == 1223 and sum(tensor.numel() for tensor in named.values()) == 14_607_260_128
    )


def test_a_cut_pack_equals_the_whole(model):
    """Forward and gradients: the shared prefix once, then the rest against its keys and values."""
    whole = build(1, 2)
    shape, generator = (len(whole), model.config.hidden_size), torch.Generator().manual_seed(0)
    weights = torch.randn(shape, dtype=torch.float64, generator=generator)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    shared, rest = whole.cut()
    assert 0 < len(shared) and 0 < len(rest) and len(shared) + len(rest) == len(whole)
    outside = in_order(whole, *model(whole))[rest.slots]
    expected = gradients((outside * weights[rest.slots]).sum())
    prefix = model.keys_and_values(shared)
    hidden = in_order(rest, *model(rest, prefix=prefix))
    torch.testing.assert_close(hidden, outside, rtol=1e-10, atol=1e-10)
    cut_gradients = gradients((hidden * weights[rest.slots]).sum())
    for name, gradient in cut_gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10, msg=name)
    assert rest.labels.tolist() == whole.labels.tolist()
    assert rest.text_ids[rest.label_rows].tolist() == whole.text_ids[whole.label_rows].tolist()
    model.zero_grad()


# --------------------------------------------------------------------------------------------------
# checkpoints as other tools write them


@pytest.mark.parametrize(
    "fields, theta",
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),  # transformers 5
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": None, "rope_scaling": None, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn"}}, "not scaled"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "not scaled"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}, "not scaled"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, "expected one value"),
        ({"rope_parameters": {"rope_theta": "5e5"}}, "expected float"),
    ],
)
def test_rope_is_read_from_either_layout_or_refused(saved, tmp_path, fields, theta):
    written = json.loads((saved[1] / "llm_config.json").read_text())
    del written["rope_theta"]
    (tmp_path / "llm_config.json").write_text(json.dumps(written | fields))
    if isinstance(theta, float):
        assert pretrained.load_config(tmp_path).rope_theta == theta
    else:
        with pytest.raises(ValueError, match=theta):
            pretrained.load_config(tmp_path)


@pytest.mark.parametrize("index", ["ema.safetensors.index.json", "model.safetensors.index.json"])
def test_weights_in_parts_are_read(saved, tmp_path, index):
    model, folder = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "ema.safetensors")
    (copy / "ema.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    places = {key: names[i % 3] for i, key in enumerate(tensors)}
    for name in names:
        held = {key: tensor for key, tensor in tensors.items() if places[key] == name}
        pretrained.write_tensors(copy / name, held)
    (copy / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    loaded, _ = pretrained.load_model(copy)
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a, b), name
    assert torch.equal(pretrained.stored_tensor(copy, "norm_und.weight"), model.norm_und.weight)
    part = copy / names[1]
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{names[1]} cannot be read"):
        pretrained.load_model(copy)
    part.unlink()
    with pytest.raises(FileNotFoundError, match=f"{names[1]} is missing"):
        pretrained.load_model(copy)
    (copy / index).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match=f"{index}: '../a.safetensors' names files"):
        pretrained.load_model(copy)
