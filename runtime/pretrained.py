"""
A model on disk: safetensors under BAGEL's own key names, in BAGEL's file layout (docs/BAGEL.md §2).

    ema.safetensors     the whole model with its eye, without the codec; when read, also in parts,
                        model-00001-of-00007.safetensors ..., with transformers' index of them
    ae.safetensors      the FLUX autoencoder; the toys' codec has no weights
    llm_config.json     shape of the transformer, Qwen2's keys
    vit_config.json     shape of the eye, SigLIP's keys; it counts one layer more than is built, as
                        the official one
    config.json         what the official code keeps in its source: latent grid, codec, resize
                        rules; may be absent
    tokenizer.json ...  written by transformers, or vocab.json and merges.txt

    model, tokenizer = load_model("BAGEL-7B-MoT", dtype=torch.bfloat16)
                        a folder, that of a run, or owner/name on Hugging Face

So a model trained here opens in the official code, and the reverse. Reading goes tensor by tensor
from the mapped file into a model without memory (meta device), so that 29 GB stand in memory once;
any float type is taken. A folder is published whole. Whatever does not fit is a FileNotFoundError
or a ValueError of one sentence that names the file, what was found and what was expected.

Not a concept of the paper. Left out: writing in parts, scaled RoPE, a generation expert made from a
plain Qwen2 folder.
"""

import json
import re
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model import MODELS, ModelConfig, UnifiedModel
from runtime.config import UserError
from runtime.files import check_name, object_of, published

# --------------------------------------------------------------------------------------------------
# names: ours and BAGEL's

LAYER = r"language_model.model.layers.\1"  # BAGEL's name of block \1
VIT = "vit_model.vision_model"

# fmt: off
RENAMES = [  # (ours, BAGEL's), the first pattern that matches a whole name counts
    (r"blocks\.(\d+)\.und\.((?:q|k|v|o)_proj|[qk]_norm)\.(\w+)", rf"{LAYER}.self_attn.\2.\3"),
    (r"blocks\.(\d+)\.gen\.((?:q|k|v|o)_proj|[qk]_norm)\.(\w+)",
     rf"{LAYER}.self_attn.\2_moe_gen.\3"),
    (r"blocks\.(\d+)\.und\.(gate|up|down)_proj\.weight", rf"{LAYER}.mlp.\2_proj.weight"),
    (r"blocks\.(\d+)\.gen\.(gate|up|down)_proj\.weight", rf"{LAYER}.mlp_moe_gen.\2_proj.weight"),
    (r"blocks\.(\d+)\.und\.(\w+_layernorm)\.weight", rf"{LAYER}.\2.weight"),
    (r"blocks\.(\d+)\.gen\.(\w+_layernorm)\.weight", rf"{LAYER}.\2_moe_gen.weight"),
    (r"norm_und\.weight", r"language_model.model.norm.weight"),
    (r"norm_gen\.weight", r"language_model.model.norm_moe_gen.weight"),
    (r"embed_tokens\.weight", r"language_model.model.embed_tokens.weight"),
    (r"lm_head\.weight", r"language_model.lm_head.weight"),
    (r"time_embedder\.fc1\.(\w+)", r"time_embedder.mlp.0.\1"),
    (r"time_embedder\.fc2\.(\w+)", r"time_embedder.mlp.2.\1"),
    (r"latent_in\.(\w+)", r"vae2llm.\1"),
    (r"latent_out\.(\w+)", r"llm2vae.\1"),
    (r"latent_positions", r"latent_pos_embed.pos_embed"),
    (r"vit_positions", r"vit_pos_embed.pos_embed"),
    (r"connector\.(\w+\.\w+)", r"connector.\1"),
    (r"eye\.(patch_embedding|position_embedding)\.(\w+)", rf"{VIT}.embeddings.\1.\2"),
    (r"eye\.layers\.(\d+)\.(\w+_proj)\.(\w+)", rf"{VIT}.encoder.layers.\1.self_attn.\2.\3"),
    (r"eye\.layers\.(\d+)\.(fc\d)\.(\w+)", rf"{VIT}.encoder.layers.\1.mlp.\2.\3"),
    (r"eye\.layers\.(\d+)\.(layer_norm\d)\.(\w+)", rf"{VIT}.encoder.layers.\1.\2.\3"),
    (r"eye\.post_layernorm\.(\w+)", rf"{VIT}.post_layernorm.\1"),
]

LLM_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "rope_theta", "rms_norm_eps")

VIT_KEYS = {"hidden_size": "vit_hidden_size", "intermediate_size": "vit_intermediate_size",
            "num_attention_heads": "vit_num_heads", "patch_size": "vit_patch"}  # {BAGEL's: ours}

OWN_KEYS = ("vit_side", "vit_shortest", "vit_longest", "codec", "codec_factor", "latent_channels",
            "latent_patch", "latent_side", "image_shortest", "image_longest", "vae_channels",
            "vae_multipliers", "vae_blocks", "vae_scale", "vae_shift", "position_scale",
            "position_theta")

WRITTEN = {  # what else the official code reads
    "llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                   "hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0,
                   "max_position_embeddings": 32768},
    "vit_config": {"model_type": "siglip_vision_model"},
}

BUILT_IN = {  # what the code does whatever a config says, so it must say the same or nothing
    "llm_config": {"hidden_act": "silu", "use_sliding_window": False},
    "vit_config": {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
}

# {buffer: its side}; deterministic: rebuilt, checked if present
TABLES = {"latent_positions": "latent_side", "vit_positions": "vit_side"}
# fmt: on


def official_name(name):
    """BAGEL's key for one of our parameter names."""
    for ours, theirs in RENAMES:
        if re.fullmatch(ours, name):
            return re.sub(ours, theirs, name)
    raise KeyError(f"{name} has no name in BAGEL's layout; add it to RENAMES")


# --------------------------------------------------------------------------------------------------
# writing


def save_model(model, tokenizer, folder, *, weights=None):
    """Write the model into `folder`, whole or not at all; an older folder is replaced.

    weights: {our name: tensor} in place of its parameters, say their averages.
    """
    named = dict(weights or model.named_parameters())
    named |= {name: getattr(model, name) for name in TABLES}
    with published(folder) as hidden:
        hidden.mkdir(parents=True)
        official = {official_name(name): tensor for name, tensor in named.items()}
        write_tensors(hidden / "ema.safetensors", official)
        if model.config.codec == "flux":
            write_tensors(hidden / "ae.safetensors", dict(model.codec.weights.named_parameters()))
        for name, content in official_configs(model.config).items():
            text = json.dumps(content, indent=1) + "\n"
            (hidden / f"{name}.json").write_text(text, encoding="utf-8")
        tokenizer.save_pretrained(hidden)


def official_configs(config):
    """The contents of the three JSON files that describe a ModelConfig: {name: object}."""
    values = asdict(config)
    vit = {theirs: values[ours] for theirs, ours in VIT_KEYS.items()} | WRITTEN["vit_config"]
    vit["num_hidden_layers"] = config.vit_num_layers + 1
    vit["image_size"] = config.vit_side * config.vit_patch
    return {
        "llm_config": {key: values[key] for key in LLM_KEYS} | WRITTEN["llm_config"],
        "vit_config": vit,
        "config": {key: values[key] for key in OWN_KEYS},
    }


def write_tensors(path, tensors):
    """{key: tensor}, whole ones, into a safetensors file."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------------
# finding


def is_on_the_hub(path):
    """Whether a path can name a repository `owner/name`: no path and no folder like it is here."""
    here = Path(path).exists() or Path(path).parent.exists()
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path))) and not here


def find_model(path):
    """The model folder at `path`: the folder itself, that of a run, or a Hugging Face repository
    `owner/name`. FileNotFoundError if it is none of them."""
    path = download(str(path)) if is_on_the_hub(path) else Path(path)
    for folder in (path, path / "model"):
        if (folder / "llm_config.json").is_file():
            return folder
    if not path.is_dir():
        raise FileNotFoundError(
            f"checkpoint folder not found: {path}; train one with python sft.py --config toy"
        )
    raise FileNotFoundError(
        f"{path} is no checkpoint: neither it nor its folder `model` holds llm_config.json"
    )


def download(name):
    """The folder of a Hugging Face repository, from the cache or the network; FileNotFoundError if
    neither has it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"checkpoint folder not found: {name}, and the Hugging Face hub does not give it "
            f"({reason}); train one with python sft.py --config toy"
        ) from None


# --------------------------------------------------------------------------------------------------
# reading


def load_model(path, device="cpu", dtype=torch.float32, *, prepare=None):
    """(model, tokenizer) from a folder of this layout; every key is checked by name and shape.

    path: see `find_model`; prepare: see `load_weights`.
    """
    folder = find_model(path)
    model = load_weights(folder, load_config(folder), device, dtype=dtype, prepare=prepare)
    return model, load_tokenizer(folder)


def load_config(folder):
    """ModelConfig from the three JSON files; what they leave out is BAGEL-7B's.

    ValueError if they ask for what is not built, or give a value of another type.
    """
    names = ("llm_config", "vit_config", "config")
    llm, vit, own = (read_object(Path(folder) / f"{name}.json") for name in names)
    for name, content in zip(names, (llm, vit)):
        for key, value in BUILT_IN[name].items():
            if content.get(key, value) != value:
                raise ValueError(
                    f"{folder}/{name}.json has {key}={content[key]!r}; this model is built for "
                    f"{value!r}"
                )
    values = _our_values(llm | _rope_theta(f"{folder}/llm_config.json", llm), vit, own)
    for field in fields(ModelConfig):
        if isinstance(values.get(field.name), list):
            values[field.name] = tuple(values[field.name])
        given, kind = values.get(field.name, field.default), type(field.default)
        if type(given) is not kind and not (kind is float and type(given) is int):
            raise ValueError(
                f"the configs in {folder} give {field.name}={given!r}; expected {kind.__name__}"
            )
    return ModelConfig(**values)


def shape_of(path, name, default=""):
    """The shape of the checkpoint at `path`, or where there is none yet that of preset `name`.

    default: the path that this preset starts from, which may be still to come, as may what is on
    the hub. UserError for any other path that is not there, or it would be taken for that preset.
    """
    if path and Path(path).exists():
        return load_config(find_model(path))
    on_the_hub = is_on_the_hub(path) and not path.startswith("out/")
    if path not in ("", default) and not on_the_hub:
        raise UserError(
            f"checkpoint folder not found: {path}; its shape would be that of preset {name} only "
            f"if it were {default or 'left out'}"
        )
    return ModelConfig(**MODELS.get(name, {}))


def _rope_theta(path, llm):
    """{"rope_theta": its value}, {} where none is given.

    Older configs have it at the top and a scaling in `rope_scaling`; transformers 5 has both in
    `rope_parameters`. ValueError for any scaling, and for two values.
    """
    thetas = [llm["rope_theta"]] if llm.get("rope_theta") is not None else []
    plain = {"rope_type": ("default",), "type": ("default",)}  # of any other key: 1 or nothing
    for name in ("rope_scaling", "rope_parameters"):
        if (about := llm.get(name)) is None:
            continue
        if not isinstance(about, dict) or not all(
            key == "rope_theta" or value in (None, *plain.get(key, (1,)))
            for key, value in about.items()
        ):
            raise ValueError(f"{path} has {name}={about}; this model's RoPE is not scaled")
        thetas += [about["rope_theta"]] if "rope_theta" in about else []
    none = llm.get("rope_parameters") is not None and not thetas
    if none or thetas and thetas[0] != thetas[-1]:
        raise ValueError(f"{path} gives {thetas or 'none'} as rope_theta; expected one value")
    return {"rope_theta": thetas[0]} if thetas else {}


def _our_values(llm, vit, own):
    """{field of ModelConfig: value} of the objects in the three files, as far as they say."""
    values = {key: llm[key] for key in LLM_KEYS if key in llm}
    values |= {ours: vit[theirs] for theirs, ours in VIT_KEYS.items() if theirs in vit}
    if isinstance(vit.get("num_hidden_layers"), int):
        values["vit_num_layers"] = vit["num_hidden_layers"] - 1
    if isinstance(vit.get("image_size"), int) and isinstance(vit.get("patch_size"), int):
        values["vit_side"] = vit["image_size"] // max(1, vit["patch_size"])
    return values | {key: own[key] for key in OWN_KEYS if key in own}


def read_object(path):
    """The object in a JSON file of a checkpoint, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return object_of(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the checkpoint is torn") from None


def load_weights(folder, config, device="cpu", *, dtype=torch.float32, prepare=None):
    """The model of this shape with the folder's weights as `dtype`; its codec stays float32, as in
    the official code.

    prepare(model): called while the weights are on the meta device, to shard them (sharding.shard),
    so that each process reads its own rows only, or to add adapters (lora.add_lora), which no file
    holds: their values are for the caller to set.
    """
    with torch.device("meta"):
        model = UnifiedModel(config).to(dtype)
    if prepare is not None:
        prepare(model)
        model.to_empty(device=device)
    tables = {name: config.position_table(getattr(config, side)) for name, side in TABLES.items()}
    for name, table in tables.items():
        setattr(model, name, table.to(device))
    weights = Path(folder) / "ema.safetensors"
    read_tensors(weights, model, official_name, device=device, tables=tables)
    if config.codec == "flux":
        weights = Path(folder) / "ae.safetensors"
        read_tensors(weights, model.codec.weights, str, device=device, tables={})
    return model


def read_tensors(path, module, rename, *, device, tables):
    """Fill a module on the meta device, or shards of it on `device`; its parameters keep their
    type, whatever the file has.

    rename: our name -> the file's; tables: what else the file may hold, {our name: its value}.
    """
    parameters = {
        rename(name): (name, p) for name, p in module.named_parameters() if ".lora_" not in name
    }
    tables = {rename(name): table for name, table in tables.items()}
    with open_tensors(path) as files:
        found = {key: tuple(file.get_slice(key).get_shape()) for key, file in files.items()}
        wanted = {key: tuple(p.shape) for key, (_, p) in parameters.items()}
        optional = {key: tuple(table.shape) for key, table in tables.items()}
        check_keys(path, found, wanted, optional=optional)
        for key, (name, parameter) in parameters.items():
            sharded = isinstance(parameter, DTensor)
            if sharded:
                tensor = files[key].get_slice(key)[own_rows(parameter)]
            else:
                tensor = files[key].get_tensor(key)
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{path}: {key} is {tensor.dtype}; expected floating point numbers"
                )
            if sharded:
                parameter.to_local().detach().copy_(tensor)
            else:
                _replace(module, name, tensor.to(device, parameter.dtype, copy=True))
        for key in tables.keys() & files.keys():
            stored = files[key].get_tensor(key).float()
            if not torch.allclose(stored, tables[key], rtol=0, atol=1e-2):
                raise ValueError(
                    f"{path}: {key} is not the sin-cos table that the configs describe"
                )


@contextmanager
def open_tensors(path):
    """Yields {key: the open safetensors file that holds it}, of `path` or of its parts.

    FileNotFoundError, ValueError: one of them is missing or torn.
    """
    files, part = {}, path
    try:
        with ExitStack() as stack:
            for part in parts_of(path):
                file = stack.enter_context(safe_open(part, "pt"))
                files |= dict.fromkeys(file.keys(), file)
            yield files
    except SafetensorError as error:
        raise ValueError(
            f"{part} cannot be read ({error}); the file is torn: copy or train it again"
        ) from None


def parts_of(path):
    """The files of the tensors of `path`: itself, or those that an index beside it lists.

    The index of ema.safetensors may have the name that transformers gives to it.
    """
    indexes = [path.with_name(f"{path.name}.index.json")]
    indexes += [path.with_name("model.safetensors.index.json")] * (path.name == "ema.safetensors")
    index = next((index for index in indexes if index.is_file()), None)
    if path.is_file():
        return [path]
    if index is None:
        raise FileNotFoundError(
            f"{path} is missing; the checkpoint is torn, or not in BAGEL's layout"
        )
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map; the checkpoint is torn")
    for name in places.values():
        check_name(name, index)
        if not path.with_name(name).is_file():
            raise FileNotFoundError(f"{path.with_name(name)} is missing, {index} lists it; copy it")
    return [path.with_name(name) for name in sorted(set(places.values()))]


def _replace(module, name, tensor):
    """Put a tensor in the place of the parameter of this name, frozen or not as that one was."""
    owner, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner)
    setattr(owner, leaf, nn.Parameter(tensor, getattr(owner, leaf).requires_grad))


def own_rows(parameter):
    """The slices of a whole tensor that this process keeps of it."""
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(start, start + length) for start, length in zip(offset, shape))


def check_keys(path, found, wanted, *, optional):
    """ValueError with everything that is missing, extra or misshapen. All three: {key: shape}."""
    problems = {
        "missing": sorted(set(wanted) - set(found)),
        "unknown": sorted(set(found) - set(wanted) - set(optional)),
        "of another shape": [
            f"{key} is {found[key]}, expected {shape}"
            for key, shape in sorted((wanted | optional).items())
            if found.get(key, shape) != shape
        ],
    }
    sentences = [
        f"{len(keys)} {problem} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for problem, keys in problems.items()
        if keys
    ]
    if sentences:
        raise ValueError(
            f"{path} does not fit the configs beside it: tensors {'; '.join(sentences)}"
        )


def stored_tensor(folder, name):
    """The tensor that ema.safetensors in a model folder has for our parameter `name`."""
    with open_tensors(Path(folder) / "ema.safetensors") as held:
        return held[official_name(name)].get_tensor(official_name(name))


def load_tokenizer(folder):
    """The tokenizer of a model folder, through transformers, without a network."""
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json or vocab.json; the checkpoint is torn"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
