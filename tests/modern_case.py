"""FLUX.2-klein-base in diffusers' layout, narrow and random: its classes, and Qwen3 with a chat template."""

import json
from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from icd_lightning.models.chat import build_chat_tokenizer

WIDTH = 16
QWEN = {
    **{"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 28, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
}
FLUX2 = {
    **{"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2},
    **{"joint_attention_dim": 3 * WIDTH, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False},
}
FLUX2_VAE = {
    **{"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, "sample_size": 64},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}


def qwen() -> tuple[Qwen3ForCausalLM, Qwen2Tokenizer]:
    """Of as many layers as are looked at."""
    tokenizer = build_chat_tokenizer()
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **QWEN)).eval(), tokenizer


def flux2_pipeline(**transformer: object) -> Flux2KleinPipeline:
    """Of random weights, the transformer's config changed."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**FLUX2_VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, vae, *qwen(), Flux2Transformer2DModel(**{**FLUX2, **transformer}))


def write(pipeline: DiffusionPipeline, folder: Path, sample_size: int) -> Path:
    """Every part, where `Family` finds it."""
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "sample_size": sample_size}))
    return folder
