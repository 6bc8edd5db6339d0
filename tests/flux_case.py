"""FLUX.1-dev in diffusers' layout, narrow and random: its classes, its packing of latents, both text encoders."""

import json
from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from icd_lightning.models.text import build_t5_tokenizer, build_tokenizer
from icd_lightning.tiny.scenes import vocabulary

WIDTH = 16
TRANSFORMER = {
    **{"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2},
    **{"joint_attention_dim": 24, "pooled_projection_dim": WIDTH, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
}
VAE = {
    **{"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 16, "sample_size": 64},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    **{"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
}
CLIP = {
    **{"hidden_size": WIDTH, "intermediate_size": 32, "projection_dim": WIDTH, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "max_position_embeddings": 24},
}


def flux_pipeline(**transformer: object) -> FluxPipeline:
    """Of random weights, the transformer's config changed."""
    torch.manual_seed(0)
    words, pieces = build_tokenizer(vocabulary(), CLIP["max_position_embeddings"]), build_t5_tokenizer()
    special = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    t5 = T5Config(vocab_size=len(pieces), d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2)
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        AutoencoderKL(**VAE),
        CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **special, **CLIP)),
        words,
        T5EncoderModel(t5),
        pieces,
        FluxTransformer2DModel(**{**TRANSFORMER, **transformer}),
    )


def write_flux(folder: Path, **transformer: object) -> Path:
    """Every part, where `Family` finds it."""
    flux_pipeline(**transformer).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "sample_size": 32}))
    return folder
