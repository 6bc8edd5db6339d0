"""A family of random weights in diffusers' layout: the tiny family's classes at minimal widths, written in a second."""

import json
from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import torch
from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from icd_lightning.models.family import Family
from icd_lightning.models.student_file import write_diffusers
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents
from icd_lightning.models.text import build_tokenizer
from icd_lightning.tiny.scenes import vocabulary

BOUNDARIES = [0, 259, 519, 779, 999]
CHANNELS = [8, 8, 16, 16]
VAE = {  # 64 x 64 pixels <-> 16 x 8 x 8
    "in_channels": 3,
    "latent_channels": 16,
    "encoder_block_out_channels": CHANNELS,
    "decoder_block_out_channels": CHANNELS,
    "encoder_layers_per_block": [1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [], []],
    "decoder_qkv_multiscales": [[], [], [], []],
}
UNET = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "layers_per_block": 1,
    "block_out_channels": [16, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
TEXT_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_family(folder: Path, *, seed: int = 0) -> Path:
    """Write every part of a family and both students; prompts, guidance and adapters all matter to what comes out."""
    torch.manual_seed(seed)
    AutoencoderDC.from_config(VAE).save_pretrained(folder / "vae")
    tokenizer = build_tokenizer(vocabulary(), TEXT_ENCODER["max_position_embeddings"])
    tokenizer.save_pretrained(folder / "tokenizer")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = CLIPTextConfig(vocab_size=len(tokenizer), **special, **TEXT_ENCODER)
    CLIPTextModel(text_config).save_pretrained(folder / "text_encoder")
    DDIMScheduler.from_config(SCHEDULER).save_pretrained(folder / "scheduler")
    UNet2DConditionModel.from_config(UNET).save_pretrained(folder / "unet")
    family = Family(str(folder))
    guided = family.load_model(guided=False).with_guidance_embedding().network
    torch.nn.init.normal_(guided.time_embedding.cond_proj.weight, std=0.05)
    guided.save_pretrained(folder / "unet_guided")
    (folder / "icd.json").write_text(json.dumps({"guidance_scale": 3.0, "tau": 0.8}))
    write_students(folder / "students", family, seed=seed)
    return folder


def write_students(folder: Path, family: Family, *, seed: int = 0, boundaries: list[int] | None = BOUNDARIES) -> None:
    """Write `forward/` and `reverse/`, of rank 4, away from the teacher and from each other; None: of no boundaries."""
    students = LoraStudents(family.load_model(guided=True), lora=LoraSettings(rank=4))
    generator = torch.Generator().manual_seed(seed)
    about = {"family": "random"} | ({} if boundaries is None else {"boundaries": boundaries})
    for direction in DIRECTIONS:
        for parameter in students.parameters_of(direction):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        write_diffusers(students.file(direction, about), folder / direction)
