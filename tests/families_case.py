"""SD1.5 and SDXL with all their blocks and tiny widths, in every form in which a model is found on a disk."""

import json
from functools import cache
from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from icd_lightning.models.family import Family
from icd_lightning.models.sources import architecture

NAMES = ("sd15", "sdxl")
NETWORKS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 600}
VAE = {"block_out_channels": [4, 4, 8, 8], "norm_num_groups": 4, "sample_size": 64}
UNET = {"norm_num_groups": 4, "sample_size": 8}
NARROW = {
    "sd15": {
        "unet": {"block_out_channels": [8, 8, 16, 16], "attention_head_dim": 2, "cross_attention_dim": 16, **UNET},
        "vae": VAE,
        "text_encoder": {**TEXT, "projection_dim": 16},
    },
    "sdxl": {
        "unet": {
            **{"block_out_channels": [8, 8, 16], "attention_head_dim": [1, 2, 2], "cross_attention_dim": 16 + 24},
            **{"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 24},
            **{"transformer_layers_per_block": [1, 1, 2], **UNET},
        },
        "vae": VAE,
        "text_encoder": {**TEXT, "projection_dim": 16},
        "text_encoder_2": {**TEXT, "hidden_size": 24, "projection_dim": 24},
    },
}


def write_configs(name: str, folder: Path) -> Path:
    """The config files of an architecture, narrowed."""
    for file in architecture(name).rglob("*.json"):
        goal = folder / file.relative_to(architecture(name))
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.write_text(json.dumps({**json.loads(file.read_text()), **NARROW[name].get(file.parent.name, {})}))
    return folder


def write_layout(name: str, folder: Path) -> Path:
    """A model in diffusers' layout: narrow, random, with stage 1's UNet in unet_guided/."""
    write_configs(name, folder)
    source = Family(f"random:{folder}").source
    for part, cls in NETWORKS.items():
        if source.has(part):
            source.network(part, cls, torch.float32).save_pretrained(folder / part)
            if part.startswith("text_encoder"):
                source.tokenizer(part.replace("text_encoder", "tokenizer")).save_pretrained(
                    folder / part.replace("text_encoder", "tokenizer")
                )
    Family(f"random:{folder}").load_model(guided=True).network.save_pretrained(folder / "unet_guided")
    (folder / "model_index.json").write_text(json.dumps({path.name: [] for path in folder.iterdir() if path.is_dir()}))
    return folder


def put_on_hub(cache: Path, name: str, folder: Path) -> None:
    """A model in the cache, as a download leaves it."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    (place / "snapshots" / ("0" * 40)).symlink_to(folder)


@cache
def states(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of every network of a model in diffusers' layout, by part."""
    family = Family(str(folder))
    parts = {part: cls for part, cls in NETWORKS.items() if family.source.has(part)}
    return {part: family.source.network(part, cls, torch.float32).state_dict() for part, cls in parts.items()}


# The names of the first releases, from which diffusers' differ; written from the layers' order in those networks.

RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}
UNET_ENDS = {
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
}


def _unet_name(name: str, attends: set[str]) -> str:
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    block, *rest = name.split(".")
    if block == "mid_block":
        kind, index, *rest = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
    else:
        number, kind, index, *rest = rest
        first, side = (1, "input_blocks") if block == "down_blocks" else (0, "output_blocks")
        place = f"{side}.{first + 3 * int(number) + int(index)}"
        if kind == "downsamplers":
            return f"input_blocks.{3 * int(number) + 3}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            slot = 2 if f"up_blocks.{number}" in attends else 1
            return f"output_blocks.{3 * int(number) + 2}.{slot}.conv.{rest[-1]}"
        place += ".1" if kind == "attentions" else ".0"
    if kind == "resnets":
        rest[0] = RESNET[rest[0]]
    return ".".join([place, *rest])


def _vae_name(name: str) -> str:
    for index in range(4):
        name = name.replace(f"encoder.down_blocks.{index}.", f"encoder.down.{index}.")
        name = name.replace(f"decoder.up_blocks.{index}.", f"decoder.up.{3 - index}.")
    for ours, theirs in {
        **{"downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut"},
        **{"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "resnets": "block"},
        **{"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out"},
        **{"to_q": "q", "to_k": "k", "to_v": "v", "conv_norm_out": "norm_out"},
    }.items():
        name = name.replace(ours, theirs)
    return name


def _clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name if name.startswith("text_") else f"text_model.{name}": weight for name, weight in state.items()}


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names; it keeps queries, keys and values in one matrix, and its projection transposed."""
    found, attention = {}, {}
    for name, weight in _clip(state).items():
        for ours, theirs in {
            **{"text_model.": "", "encoder.layers": "transformer.resblocks", "embeddings.token": "token"},
            **{"embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final"},
            **{"layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn"},
            "text_projection.weight": "text_projection",
        }.items():
            name = name.replace(ours, theirs)
        block, _, last = name.rpartition("attn.")
        if last[:2] in ("q_", "k_", "v_"):
            attention.setdefault(f"{block}attn.in_proj_{last.rpartition('.')[2]}", {})[last[0]] = weight
        else:
            found[name] = weight.T.contiguous() if name == "text_projection" else weight
    return found | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in attention.items()}


def single_file(folder: Path) -> dict[str, Tensor]:
    """A model in diffusers' layout as one state dict of the first releases' names."""
    parts = states(folder)
    attends = {name.partition(".attentions")[0] for name in parts["unet"] if ".attentions" in name}
    unet = {f"model.diffusion_model.{_unet_name(n, attends)}": w for n, w in parts["unet"].items()}
    vae = {f"first_stage_model.{_vae_name(name)}": weight for name, weight in parts["vae"].items()}
    for name, weight in vae.items():
        if ".attn_1." in name and weight.ndim == 2:
            vae[name] = weight[:, :, None, None].contiguous()
    if "text_encoder_2" not in parts:
        text = {f"cond_stage_model.transformer.{n}": w for n, w in _clip(parts["text_encoder"]).items()}
        return {**unet, **vae, **text}
    text = {f"conditioner.embedders.0.transformer.{n}": w for n, w in _clip(parts["text_encoder"]).items()}
    second = {f"conditioner.embedders.1.model.{n}": w for n, w in _open_clip(parts["text_encoder_2"]).items()}
    return {**unet, **vae, **text, **second}
