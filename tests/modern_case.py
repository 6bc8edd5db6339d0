"""FLUX.2-klein-base and Z-Image in diffusers' layout, narrow and random: their classes, Qwen3 with a chat template."""

import json
from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from flux_case import VAE
from training_case import scenes_data, trainer_for
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from icd_lightning.callbacks.export import ExportWeights
from icd_lightning.commands.main import main
from icd_lightning.models.chat import build_chat_tokenizer
from icd_lightning.models.family import Family
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation

CONF = Path(__file__).parents[1] / "conf"
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


Z_IMAGE = {
    **{"in_channels": 16, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
    **{"cap_feat_dim": WIDTH, "axes_dims": [4, 2, 2], "axes_lens": [256, 32, 32]},
}


def qwen() -> tuple[Qwen3ForCausalLM, Qwen2Tokenizer]:
    """Of as many layers as are looked at; hidden states are of the size of true ones."""
    tokenizer = build_chat_tokenizer()
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **QWEN)).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model, tokenizer


def flux2_pipeline(**transformer: object) -> Flux2KleinPipeline:
    """Of random weights, the transformer's config changed."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**FLUX2_VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, vae, *qwen(), Flux2Transformer2DModel(**{**FLUX2, **transformer}))


def z_image_pipeline() -> ZImagePipeline:
    """Of random weights; what stands in the place of missing tokens differs from nothing."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(**Z_IMAGE)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return ZImagePipeline(scheduler, AutoencoderKL(**VAE), *qwen(), transformer)


def stage_one(pipeline: DiffusionPipeline, folder: Path, scenes: Path, **family: object) -> Family:
    """A pipeline's parts, where `Family` finds them, and what two steps of stage 1 make of them."""
    made = Family(str(write(pipeline, folder, 16)), **family)
    task = GuidanceDistillation(made, (1.0, 3.0), optimizer=OptimizerSettings(lr=1e-2, warmup_steps=0))
    trainer_for(folder, max_steps=2, callbacks=[ExportWeights()]).fit(
        task, datamodule=scenes_data(scenes, resolution=made.resolution)
    )
    return made


def stage_two(name: str, family: Family, scenes: Path, folder: Path) -> None:
    """Two steps by a model's configuration, in float32."""
    backbone = type(family.architecture).__name__
    settings = {
        "model.init_args.family.model": family.model,
        "model.init_args.family.precision": "float32",
        "model.init_args.family.trained_at": 32,
        "model.init_args.family.backbone": f"icd_lightning.models.backbones.{backbone}",
        "model.init_args.family.backbone.init_args.max_sequence_length": family.architecture.max_sequence_length,
        "model.init_args.optimizer": "{lr: 0.1, warmup_steps: 0}",
        "data.init_args": f"{{urls: {scenes}, batch_size: 2, resolution: 32, num_workers: 0}}",
        "trainer": f"{{default_root_dir: {folder}, precision: 32-true, accelerator: cpu, devices: 1, max_steps: 2}}",
    }
    configs = [word for one in ("base", f"model/{name}") for word in ("--config", str(CONF / f"{one}.yaml"))]
    main(["fit", *configs, *(f"--{key}={value}" for key, value in settings.items())])


def write(pipeline: DiffusionPipeline, folder: Path, sample_size: int) -> Path:
    """Every part, where `Family` finds it."""
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "sample_size": sample_size}))
    return folder
