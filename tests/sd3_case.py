"""Stable Diffusion 3.5 in diffusers' layout, narrow and random: its classes, all three text encoders."""

from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from icd_lightning.models.family import Family
from icd_lightning.models.text import build_t5_tokenizer, build_tokenizer

WIDTH = 16
TRANSFORMER = {
    **{"sample_size": 8, "patch_size": 2, "in_channels": 16, "num_layers": 2, "qk_norm": "rms_norm"},
    **{"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 40, "caption_projection_dim": WIDTH},
    **{"pooled_projection_dim": 2 * WIDTH, "pos_embed_max_size": 8, "dual_attention_layers": (0,)},
}
VAE = {
    **{"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "latent_channels": 16, "sample_size": 64},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    **{"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
}
CLIP = {
    **{"hidden_size": WIDTH, "intermediate_size": 32, "projection_dim": WIDTH, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "max_position_embeddings": 24},
}


def sd3_pipeline() -> StableDiffusion3Pipeline:
    """Of random weights; the velocity is of the size of true ones."""
    torch.manual_seed(0)
    clips: list[object] = []
    for _ in range(2):
        tokenizer = build_tokenizer({"red", "star"}, CLIP["max_position_embeddings"])
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = CLIPTextConfig(vocab_size=len(tokenizer), **special, **CLIP)
        clips += [CLIPTextModelWithProjection(config), tokenizer]
    pieces = build_t5_tokenizer()
    t5 = T5Config(vocab_size=len(pieces), d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = SD3Transformer2DModel(**TRANSFORMER)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, AutoencoderKL(**VAE), *clips, T5EncoderModel(t5), pieces)


def write_sd3(folder: Path) -> Path:
    """Every part, where `Family` finds it, and a guided transformer that is told w."""
    sd3_pipeline().save_pretrained(folder)
    guided = Family(str(folder)).load_model(guided=False).with_guidance_embedding().network
    torch.nn.init.normal_(guided.time_text_embed.text_embedder.linear_1.weight[:, 2 * WIDTH :], std=0.05)
    guided.save_pretrained(folder / "transformer_guided")
    return folder
