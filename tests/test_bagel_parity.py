"""Our model against inputs and outputs of the official BAGEL code on tiny random models.

Every folder with a config.json in tests/fixtures/bagel/ and in $BAGEL_FIXTURES is a set; its files
are described in tests/fixtures/bagel/README.md. Float32 on a CPU: 5e-5, squared errors 1e-4,
sampled latents 2e-4, gradients 1e-3 relative, uint8 pictures one step (values are truncated),
everything else exact. The files are those of Pillow 13: one before rounds a resized picture
otherwise, here and in the official code, by one step of 255.
"""

import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import engine
import flow
import model as transformer
from engine import Branch, Engine, Group, Noised, Prompt, Sampler, Thinking
from model import Cache, ModelConfig, rope, sincos_table
from runtime import pretrained
from sequence import Sequence, position_ids
from vision import Reference, ResizeRule, patchify, resize, to_rgb, to_tensor

HERE = Path(__file__).parent / "fixtures" / "bagel"
ROOTS = [HERE] + [Path(root) for root in [os.environ.get("BAGEL_FIXTURES")] if root]
SETS = sorted(
    {
        folder.parent
        for root in ROOTS
        for folder in [*root.glob("config.json"), *root.glob("*/config.json")]
    }
)

RESIZES_AS_THE_FILES = int(PIL.__version__.split(".")[0]) >= 13
resized = pytest.mark.skipif(
    not RESIZES_AS_THE_FILES, reason="the files are of pictures that Pillow 13 resized"
)


class SpecialTokens:
    """All of a tokenizer that an engine needs where prompts are token ids already."""

    unk_token_id = None

    def __init__(self, ids):
        self.ids = {
            "<|im_start|>": ids["bos_token_id"],
            "<|im_end|>": ids["eos_token_id"],
            "<|vision_start|>": ids["start_of_image"],
            "<|vision_end|>": ids["end_of_image"],
        }

    def convert_tokens_to_ids(self, name):
        return self.ids[name]


class Fixture:
    """One set: its configuration, our model with its weights, and its files."""

    def __init__(self, folder):
        self.folder = folder
        self.raw = raw = json.loads((folder / "config.json").read_text())
        vit, vae, bagel = raw["vit"], raw["vae"], raw["bagel"]
        self.config = ModelConfig(
            **{key: raw["llm"][key] for key in pretrained.LLM_KEYS},
            vit_hidden_size=vit["hidden_size"],
            vit_intermediate_size=vit["intermediate_size"],
            vit_num_layers=vit["num_hidden_layers"] - 1,
            vit_num_heads=vit["num_attention_heads"],
            vit_patch=vit["patch_size"],
            vit_side=bagel["vit_max_num_patch_per_side"],
            vit_longest=raw["vit_transform"]["max_image_size"],
            vit_shortest=raw["vit_transform"]["min_image_size"],
            codec="flux",
            codec_factor=vae["downsample"],
            latent_channels=vae["z_channels"],
            latent_patch=bagel["latent_patch_size"],
            latent_side=bagel["max_latent_size"],
            image_longest=raw["vae_transform"]["max_image_size"],
            image_shortest=raw["vae_transform"]["min_image_size"],
            vae_channels=vae["ch"],
            vae_multipliers=tuple(vae["ch_mult"]),
            vae_blocks=vae["num_res_blocks"],
            vae_scale=vae["scale_factor"],
            vae_shift=vae["shift_factor"],
        )
        self.model = pretrained.load_weights(folder, self.config)
        self.engine = Engine(self.model, SpecialTokens(raw["tokens"]))
        self.layout = self.engine.layout

    def tensors(self, name):
        return load_tensors(self.folder / f"{name}.safetensors")

    def json(self, name):
        return load_json(self.folder / f"{name}.json")

    def eye_reference(self, image):
        """What the ViT sees of a transformed image (3, H, W)."""
        patch = self.config.vit_patch
        grid = (image.shape[1] // patch, image.shape[2] // patch)
        return Reference(None, None, patchify(image, patch), grid)

    def prompt(self, inputs, tensors, vae=True):
        """Prompt of an inferencer input list."""
        items = [
            item["ids"]
            if item["type"] == "text"
            else self.model.encode_reference(pil(tensors[item["tensor"]]), as_inferencer=True)
            for item in inputs
        ]
        return Prompt(tuple(items), vae)

    def grid(self, image_shape):
        return tuple(side // self.config.token_pixels for side in image_shape)


@functools.cache
def load_tensors(path):
    return load_file(path)


@functools.cache
def load_json(path):
    return json.loads(path.read_text())


def pil(pixels):
    return Image.fromarray(pixels.numpy())


def close(got, expected, tolerance=5e-5):
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


def in_order(packed, und, gen):
    return torch.cat([und, gen])[packed.inverse]


@pytest.fixture(scope="module", params=SETS, ids=lambda folder: folder.name)
def bagel(request):
    return Fixture(request.param)


def test_both_shared_sets_are_here():
    assert {"a", "b"} <= {folder.name for folder in SETS}


# --------------------------------------------------------------------------------------------------
# f7 tables, f8 transforms


def test_f7_tables(bagel):
    f, c = bagel.tensors("f7_tables"), bagel.config
    close(bagel.model.latent_positions, f["latent_pos_embed"], 1e-6)
    close(bagel.model.vit_positions, f["vit_pos_embed"], 1e-6)
    big = sincos_table(64, 3584)
    close(big[f["real64_rows"]][:, f["real64_cols"]], f["real64_values"], 1e-6)
    features = []
    embedder = bagel.model.time_embedder
    handle = embedder.fc1.register_forward_pre_hook(
        lambda module, inputs: features.append(inputs[0])
    )
    close(embedder(f["t"]), f["t_emb"], 1e-5)
    handle.remove()
    close(features[0], f["t_freq"], 1e-6)
    for key, expected in f.items():
        if key.startswith("extrapolate."):  # extrapolate.HxW.pP.sideS
            _, size, patch, side = key.split(".")
            height, width = (int(n) // int(patch[1:]) for n in size.split("x"))
            assert torch.equal(position_ids(height, width, int(side[4:])), expected), key
        if key.startswith("grid.shift"):
            shift, n = key.removeprefix("grid.shift").split(".n")
            close(flow.time_grid(int(n), float(shift)), expected, 1e-6)
    assert torch.equal(patchify(f["patchify_image"], 14), f["patchify_out_p14"])
    cos, sin = rope(f["rope_pos"], c.head_dim, c.rope_theta, dtype=torch.float32)
    signs = torch.ones(c.head_dim)
    signs[: c.head_dim // 2] = -1  # `rotate` exchanges the halves and changes no sign
    close(cos[:, 0], f["rope_cos"], 1e-6)
    close(sin[:, 0] * signs, f["rope_sin"], 1e-6)


def test_f8_sizes(bagel):
    f = bagel.json("f8_transforms")
    for row in f["rows"]:
        kind = f["kinds"][row["kind"]]
        names = ("max_image_size", "min_image_size", "image_stride", "max_pixels")
        rule = ResizeRule(*(kind[name] for name in names if name in kind))
        assert rule.size(row["w"], row["h"], row["img_num"]) == (row["out_w"], row["out_h"]), row


def test_f8_pixels(bagel):
    f, c = bagel.tensors("f8_pixels"), bagel.config
    for i in range(sum(key.startswith("image") for key in f)):
        for rule, kind in ((c.image_rule, "vae"), (c.vit_rule, "vit")):
            found, expected = to_tensor(resize(pil(f[f"image{i}"]), rule)), f[f"tiny_{kind}{i}"]
            close(found, expected, 0.0 if RESIZES_AS_THE_FILES else 2.01 / 255)
    for name in ("rgba", "gray"):
        assert torch.equal(to_tensor(to_rgb(pil(f[name]))), to_tensor(pil(f[f"{name}_to_rgb"])))


# --------------------------------------------------------------------------------------------------
# f2 eye, f3 codec


def test_f2_eye(bagel):
    f, model = bagel.tensors("f2_vit"), bagel.model
    seen = [bagel.eye_reference(f[f"image{i}"]) for i in range(len(f["seqlens"]))]
    assert torch.equal(torch.cat([one.patches for one in seen]), f["tokens"])
    ids = torch.cat([position_ids(*one.patch_grid, bagel.config.vit_side) for one in seen])
    assert torch.equal(ids, f["position_ids"])
    lengths = tuple(f["seqlens"].tolist())
    close(
        model.eye.patch_embedding(f["tokens"]) + model.eye.position_embedding(ids), f["patch_embed"]
    )
    features = model.eye(f["tokens"], ids, lengths)
    close(features, f["out_vit"])
    close(model.connector(features), f["out_connector"])
    sequence = Sequence(bagel.layout)
    for one in seen:
        with sequence.document():
            sequence.image(one, vae=False)
    packed = sequence.pack()
    close(model.embed(packed)[0][len(packed.text_ids) :], f["out_with_pos"])


def test_f3_codec(bagel):
    f, codec = bagel.tensors("f3_vae"), bagel.model.codec
    for i, image in enumerate(f["image"]):
        close(codec.weights["encoder"](image[None])[0], f["moments"][i])
        close(codec.encode(image), f["encode_mean"][i])
        close(codec.encode(image, f["eps"][i]), f["encode_sample"][i])
        close(codec.decode(f["z"][i]), f["decode"][i])
        close(codec.decode(codec.encode(image)), f["roundtrip"][i])


def test_the_codec_is_frozen_and_no_part_of_the_model(bagel):
    assert not any(p.requires_grad for p in bagel.model.codec.weights.parameters())
    assert not any(
        "encoder.conv_in" in name or "decoder.conv_in" in name
        for name, _ in bagel.model.named_parameters()
    )
    image = bagel.tensors("f3_vae")["image"][0]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    drawn = [bagel.model.to_latents(image, one)[0] for one in generators]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(bagel.model.to_latents(image)[0], bagel.model.to_latents(image)[0])


# --------------------------------------------------------------------------------------------------
# f1 training forward


def clean_tokens(bagel, f, i):
    """Latent tokens of the i-th VAE image, cut out of the official padded batch, and their grid."""
    grid, patch = tuple(f["patchified_vae_latent_shapes"][i].tolist()), bagel.config.latent_patch
    return patchify(f["padded_latent"][i][:, : grid[0] * patch, : grid[1] * patch], patch), grid


def lay_out(bagel, drop=()):
    """The official training pack in our builder, and the velocity targets (M, C).

    drop: kinds of conditions that are left out ("text", "vit", "vae").
    """
    f, facts = bagel.tensors("f1_train"), bagel.json("f1_train")
    sequence, targets, vae_image, row = Sequence(bagel.layout), [], 0, 0
    for j, items in enumerate(facts["samples"]):
        image = 0
        with sequence.document():
            for item in items:
                dropped = bool(item["enable_cfg"]) and item["type"].removesuffix("_image") in drop
                if item["type"] == "text":
                    if not dropped:
                        sequence.text(item["ids"], loss=bool(item["loss"]))
                elif item["type"] == "vit_image":
                    one = bagel.eye_reference(f[f"sample{j}.image{image}"])
                    sequence.image(replace(one, patches=None) if dropped else one, vae=False)
                else:
                    clean, grid = clean_tokens(bagel, f, vae_image)
                    vae_image += 1
                    noise = f["noise"][row : row + len(clean)]
                    t = torch.sigmoid(f["packed_timesteps"][row])
                    row += len(clean)
                    if item["loss"]:
                        t = flow.shift_time(t, facts["timestep_shift"])
                        sequence.noise(flow.interpolate(clean, noise, t), grid, t)
                        targets.append(flow.velocity(clean, noise))
                    else:
                        latents = None if dropped else clean
                        sequence.image(Reference(latents, grid, None, None), vit=False)
                image += item["type"] != "text"
    return sequence.pack(), torch.cat(targets)


def test_f1_padded_latents(bagel):
    """The official code encodes all pictures of a pack padded with grey, we each one alone."""
    f = bagel.tensors("f1_train")
    for image, latent in zip(f["padded_images"], f["padded_latent"]):
        close(bagel.model.codec.encode(image), latent)


def test_f1_pack(bagel):
    f, (packed, _) = bagel.tensors("f1_train"), lay_out(bagel)
    exact = {
        "packed_text_ids": packed.text_ids,
        "packed_text_indexes": packed.text_index,
        "packed_position_ids": packed.positions,
        "packed_vit_position_ids": packed.vit_position_ids,
        "packed_vit_token_indexes": packed.vit_index,
        "vit_token_seqlens": torch.tensor(packed.vit_lengths),
        "packed_latent_position_ids": packed.latent_position_ids,
        "packed_vae_token_indexes": packed.latent_index,
        "mse_loss_indexes": packed.latent_index[packed.noised],
        "packed_label_ids": packed.labels,
        "ce_loss_indexes": packed.text_index[packed.label_rows],
        "packed_vit_tokens": packed.vit_patches,
        "attention_mask": packed.mask.dense(),
    }
    for name, tensor in exact.items():
        assert torch.equal(tensor.to(f[name].dtype), f[name]), name
    close(packed.timesteps[packed.image_of_latent], f["timesteps_after_shift"], 1e-6)


@pytest.mark.parametrize("kind", ["none", "text", "vit", "vae", "all"])
def test_f1_condition_dropout(bagel, kind):
    expected = bagel.json("f1_pack_dropout")[kind]
    packed, _ = lay_out(bagel, ("text", "vit", "vae") if kind == "all" else (kind,))
    assert packed.text_ids.tolist() == expected["packed_text_ids"]
    assert packed.text_index.tolist() == expected["packed_text_indexes"]
    assert packed.positions.tolist() == expected["packed_position_ids"]
    assert packed.labels.tolist() == expected["packed_label_ids"]
    assert packed.text_index[packed.label_rows].tolist() == expected["ce_loss_indexes"]
    assert packed.latent_index[packed.noised].tolist() == expected["mse_loss_indexes"]
    assert packed.latent_index.tolist() == expected["packed_vae_token_indexes"]
    assert packed.vit_index.tolist() == expected["packed_vit_token_indexes"]
    assert (packed.timesteps[packed.image_of_latent] == 0).tolist() == expected["clean"]


@functools.cache
def training_forward(bagel):
    packed, target = lay_out(bagel)
    und, gen = bagel.model(packed)
    ce = bagel.model.cross_entropy(und, packed)
    v = bagel.model.velocity(packed, gen)
    return packed, target, und, gen, ce, v


def test_f1_forward(bagel):
    f = bagel.tensors("f1_train")
    packed, target, und, gen, ce, v = training_forward(bagel)
    close(in_order(packed, *bagel.model.embed(packed)), f["out_lm_input"])
    close(in_order(packed, und, gen), f["out_last_hidden"])
    close(v, f["out_velocity_pred"])
    close((v - target).square(), f["out_mse"], 1e-4)
    close(ce, f["out_ce"])
    close(ce.mean(), f["out_ce_loss"])
    close(F.mse_loss(v, target), f["out_mse_loss"], 1e-4)


def test_f1_gradients(bagel):
    _, target, _, _, ce, v = training_forward(bagel)
    names, parameters = zip(*bagel.model.named_parameters())
    loss = ce.mean() + F.mse_loss(v, target)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    gradients = dict(zip(map(pretrained.official_name, names), gradients))
    norms = bagel.json("f1_train")["grad_l2"]
    assert set(gradients) == set(norms)
    for name, gradient in gradients.items():
        assert abs(gradient.norm().item() - norms[name]) <= 1e-3 * norms[name] + 1e-6, name
    if (bagel.folder / "f1_grads.safetensors").is_file():
        for name, expected in bagel.tensors("f1_grads").items():
            close(gradients[name], expected, 2e-5)
            assert (gradients[name] - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name


def test_f1_cross_entropy_in_chunks(bagel, monkeypatch):
    """Chunks of a few rows, recomputed backwards, give the losses and gradients of one piece."""
    packed, _, und, _, ce, _ = training_forward(bagel)
    (whole,) = torch.autograd.grad(ce.sum(), und, retain_graph=True)
    monkeypatch.setattr(transformer, "MAX_LOGITS", 3 * bagel.config.vocab_size)
    chunked = bagel.model.cross_entropy(und, packed)
    assert len(packed.labels) > 3
    close(chunked, ce, 1e-6)
    close(torch.autograd.grad(chunked.sum(), und, retain_graph=True)[0], whole, 1e-5)


# --------------------------------------------------------------------------------------------------
# f4 text


@pytest.mark.parametrize("case", ["text_only", "image_text"])
@torch.no_grad()
def test_f4_text(bagel, case):
    f, facts, model = bagel.tensors("f4_text"), bagel.json("f4_text"), bagel.model

    def get(name):
        return f[f"{case}.{name}"]

    items = [bagel.eye_reference(get("image"))] if case == "image_text" else []
    prompt = Prompt((*items, get("prompt_ids").tolist()), vae=False)
    fed, last = get("tokens"), bagel.config.num_hidden_layers - 1
    sequence = Sequence(bagel.layout)
    with sequence.document():
        prompt.write(sequence)
        start = sequence.reserve(len(fed))
    packed = sequence.pack()
    cache = Cache(model, len(packed))
    model(packed.select(packed.rows_of("given")), cache)
    assert start == facts[f"{case}.kv_len_after_prefill"]
    assert packed.positions[start] == facts[f"{case}.rope_after_prefill"]
    for layer in {0, last}:
        close(cache.keys[layer, :start], get(f"prefill_k{layer}"))
        close(cache.values[layer, :start], get(f"prefill_v{layer}"))
    for step, token in enumerate(fed):
        hidden, _ = model(packed.decoding(torch.tensor([start + step]), token[None]), cache)
        close(model.lm_head(hidden)[0], get("logits")[step])
    close(cache.keys[last, : start + len(fed)], get(f"final_k{last}"))
    plans, ended = bagel.engine.think([prompt], Thinking(len(fed) - 1))
    assert plans[0] == fed[1:].tolist() and ended == [False]
    assert bagel.layout.bos == fed[0] == get("tokens_with_stop")[0]
    stopped = fed.tolist()[: fed.tolist().index(facts[f"{case}.stop_token"])]
    assert get("tokens_with_stop").tolist() == stopped


# --------------------------------------------------------------------------------------------------
# f5 velocities, f6 trajectories


# our names and the official ones
CONTEXTS = {"full": "full", "no_text": "cfg_text", "no_image": "cfg_img"}


@torch.no_grad()
def velocities(bagel, prompts, grids, x_t, t, contexts):
    """({context: velocity (I * T, C)}, cache, pack, rows of `lay_out`) at the stored x_t and t."""
    groups = [
        Group(prompt, grid, (Branch(None, (Noised(x, t),)),))
        for prompt, grid, x in zip(prompts, grids, x_t.split([h * w for h, w in grids]))
    ]
    packed, rows = engine.lay_out(bagel.layout, groups, contexts)
    cache = Cache(bagel.model, len(packed))
    if len(given := packed.rows_of("given")):
        bagel.model(packed.select(given), cache)
    canvas = packed.select(packed.rows_of("noised"))
    v = bagel.model.velocity(canvas, bagel.model(canvas, cache)[1])
    return {name: v[index] for name, index in rows.items()}, cache, packed, rows


@resized
def test_f5_velocities(bagel):
    f, facts = bagel.tensors("f5_velocity"), bagel.json("f5_velocity")
    for scenario, one in facts["scenarios"].items():
        prompt, grid = bagel.prompt(one["inputs"], f), bagel.grid(one["image_shape"])
        v, cache, packed, rows = velocities(
            bagel, [prompt], [grid], f[f"{scenario}.x_t"], one["t"], tuple(CONTEXTS)
        )
        close(v["full"], f[f"{scenario}.v0"])
        for ours in ("no_text", "no_image"):
            close(v[ours], f[f"{scenario}.v_{CONTEXTS[ours]}"])
        for i, combo in enumerate(facts["cfg_combos"]):
            guidance = flow.Guidance(*(combo[key] for key in ("text", "img", "type", "rmin")))
            got = flow.guide(v["full"], v["no_text"], v["no_image"], guidance=guidance)
            close(got, f[f"{scenario}.v{i}"], 1e-4)
        for ours, context in CONTEXTS.items():
            start = packed.latent_index[packed.noised[rows[ours][0]]] - 1  # its opening marker
            seen = packed.mask.dense()[start].nonzero().squeeze(1)
            seen = seen[seen < start]
            assert len(seen) == one[f"{context}.kv_len"]
            assert packed.positions[start] == one[f"{context}.rope"]
            if len(seen):
                close(cache.keys[-1, seen], f[f"{scenario}.{context}.k_last"])
                close(cache.values[-1, seen], f[f"{scenario}.{context}.v_last"])


def test_pictures_decoded_together_are_those_decoded_alone(bagel, monkeypatch):
    """Of several sizes, in order; the bound on the pixels at a time acts."""
    config, decode, sizes = bagel.model.config, bagel.model.codec.decode, []
    grids = [(2, 2), (2, 2), (2, 2), (1, 2), (2, 2)]
    tokens = [
        torch.randn(h * w, config.token_channels, generator=torch.Generator().manual_seed(i))
        for i, (h, w) in enumerate(grids)
    ]
    alone = [bagel.engine.pictures([one], [grid])[0] for one, grid in zip(tokens, grids)]
    monkeypatch.setattr("engine.MAX_DECODED", 8 * config.token_pixels**2)
    monkeypatch.setattr(bagel.model.codec, "decode", lambda z: sizes.append(len(z)) or decode(z))
    together = bagel.engine.pictures(tokens, grids)
    assert sizes == [2, 1, 1, 1]
    for one, other in zip(alone, together):
        assert one.size == other.size
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_a_prefix_changes_nothing(bagel):
    """Prompts prefilled once, taken over by decoding and painting, against prefilling in each."""
    f, facts = bagel.tensors("f5_velocity"), bagel.json("f5_velocity")["scenarios"]
    prompts = [bagel.prompt(one["inputs"], f) for one in facts.values()]
    grids = [bagel.grid(one["image_shape"]) for one in facts.values()]
    prefix = bagel.engine.prefill(prompts)
    plans, again = (
        bagel.engine.think(prompts, Thinking(5), count=2, prefix=one)[0] for one in (None, prefix)
    )
    assert plans == again
    groups = []
    for i, (prompt, grid) in enumerate(zip(prompts, grids)):
        generators = [torch.Generator().manual_seed(2 * i + j) for j in range(2)]
        starts = [(bagel.engine.start(grid, one),) for one in generators]
        groups.append(Group(prompt, grid, tuple(map(Branch, plans[2 * i : 2 * i + 2], starts))))
    sampler = Sampler(3, 3.0, 4.0, 1.5, (0.0, 1.0))
    close(*(bagel.engine.paint(groups, sampler, prefix=one) for one in (None, prefix)), 2e-5)


def sampler_of(facts):
    return Sampler(
        facts["num_timesteps"],
        facts["timestep_shift"],
        facts["cfg_text_scale"],
        facts["cfg_img_scale"],
        tuple(facts["cfg_interval"]),
        facts["cfg_renorm_type"],
        facts["cfg_renorm_min"],
    )


def group_of(prompt, grid, plan, noise):
    """One picture of a prompt."""
    return Group(prompt, grid, (Branch(plan, (Noised(noise, 1.0),)),))


def check_image(bagel, tokens, grid, expected):
    got = torch.from_numpy(np.array(bagel.engine.pictures([tokens], [grid])[0])).int()
    assert got.shape == expected.shape and (got - expected.int()).abs().max() <= 1


def euler_step_seen(seen, k, x, v, t, t_next):
    """An Euler step that is noted down."""
    seen.append((x, v, t))
    return flow.euler_step(x, v, t, t_next=t_next)


@resized
def test_f6_trajectories(bagel):
    f, inputs = bagel.tensors("f6_sampling"), bagel.tensors("f5_velocity")
    for name, facts in bagel.json("f6_sampling")["scenarios"].items():
        scenario = name.split(".")[0]
        prompt = bagel.prompt(bagel.json("f5_velocity")["scenarios"][scenario]["inputs"], inputs)
        grid, seen = bagel.grid(facts["image_shape"]), []
        group = group_of(prompt, grid, None, f[f"{name}.x"][0])
        step = functools.partial(euler_step_seen, seen)
        x = bagel.engine.paint([group], sampler_of(facts), step=step)
        assert len(seen) == facts["n_model_calls"]
        close(torch.stack([t for *_, t in seen]), f[f"{name}.t"], 1e-6)
        close(torch.stack([x for x, *_ in seen] + [x]), f[f"{name}.x"], 2e-4)
        close(torch.stack([v for _, v, _ in seen]), f[f"{name}.v"], 2e-4)
        check_image(bagel, x, grid, f[f"{name}.image"])


# --------------------------------------------------------------------------------------------------
# f9 whole runs, f12 batches


@resized
def test_f9_inferencer(bagel):
    f, facts = bagel.tensors("f9_inferencer"), bagel.json("f9_inferencer")
    for name, one in facts["runs"].items():
        hyper, understand = one["hyper"], one["understanding_output"]
        prompt = bagel.prompt(one["inputs"], f, vae=not understand)
        system = facts["system_prompt_ids"]["und" if understand else "gen"]
        prompt = Prompt((system,) * one["think"] + prompt.items, prompt.vae)
        plan = None
        if one["think"] or understand:
            thinking = Thinking(hyper["max_think_token_n"] - 1)
            (plan,), _ = bagel.engine.think([prompt], thinking)
            assert [bagel.layout.bos, *plan] == one["generated_tokens_incl_bos"][0], name
        if not understand:
            pictures = [item for item in one["inputs"] if item["type"] == "image"]
            shape = hyper.get("image_shapes")
            # the size rule of the inferencer: the last picture after the codec's resize
            if pictures:
                size = pictures[-1]["width"], pictures[-1]["height"]
                shape = bagel.config.image_rule.size(*size)[::-1]
            grid = bagel.grid(shape)
            group = group_of(prompt, grid, plan, f[f"{name}.init_noise"])
            x = bagel.engine.paint([group], sampler_of(hyper))
            close(x, f[f"{name}.latent"], 2e-4)
            check_image(bagel, x, grid, f[f"{name}.image"])


@torch.no_grad()
def test_f12_batch(bagel):
    """Two prompts and two picture sizes in one pack; the official code's `global` renormalisation
    couples them."""
    f, facts = bagel.tensors("f12_batch"), bagel.json("f12_batch")
    prompts = [Prompt((f[f"prompt{i}"].tolist(),)) for i in range(2)]
    grids = [bagel.grid(size) for size in facts["image_sizes"]]
    v, *_ = velocities(bagel, prompts, grids, f["x_t"], facts["t"], ("full", "no_text"))
    close(v["full"], f["v_nocfg"])
    for renorm in flow.RENORMS:
        guidance = flow.Guidance(4.0, renorm=renorm)
        got = flow.guide(v["full"], v["no_text"], None, guidance=guidance)
        close(got, f[f"v_cfg4_{renorm}"], 1e-4)
