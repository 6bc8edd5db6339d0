"""Where a model family's parts lie: a folder in diffusers' layout. SD1.5, SDXL and tiny differ in nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from icd_lightning.diffusion import NoiseSchedule
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.text import CLIPConditioner

AUTOENCODERS: dict[str, type] = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shipped(name: str = "tiny") -> Path:
    """The folder of a family whose weights come with the package."""
    return Path(str(files("icd_lightning") / "weights" / name))


@dataclass(frozen=True)
class EditingDefaults:
    """How a family is best guided, where nobody says otherwise: `icd.json` in its folder, or the paper's for SD1.5."""

    guidance_scale: float = 8.0
    tau: float = 0.8
    closed_vocabulary: bool = False  # it knows those words only that its tokenizer keeps whole

    @classmethod
    def read(cls, file: Path) -> EditingDefaults:
        """From a JSON object of these fields; ValueError for any other content."""
        try:
            return cls(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"{file} must be a JSON object with {known} ({error})") from error


@dataclass(frozen=True)
class Family:
    """A model family on disk, and how to load each part; nothing is loaded before it is asked for.

    Args:
        model: "tiny" (shipped) or a folder in diffusers' layout.
        guided_unet: the guidance-distilled UNet of stage 1: a folder, or one inside the model's folder.
        vae: another autoencoder in place of the model's own, e.g. one that survives half precision.
        precision: type of the frozen weights.
    """

    model: str = "tiny"
    guided_unet: str = "unet_guided"
    vae: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def root(self) -> Path:
        """The model's folder; FileNotFoundError, with what to do, where there is none."""
        folder = shipped() if self.model == "tiny" else Path(self.model)
        if not (folder / "unet").is_dir() and not (folder / "vae").is_dir():
            if self.model == "tiny":
                raise FileNotFoundError(f"the family 'tiny' did not come with this package: there is no {folder}")
            raise FileNotFoundError(
                f"no model at {self.model!r}: looked for {folder / 'unet'}; give a folder in diffusers' layout "
                "(--model, model.init_args.family.model, or MODEL=... of make), or the shipped family 'tiny', which "
                "`make demo` uses"
            )
        return folder

    def load_defaults(self) -> EditingDefaults:
        file = self.root / "icd.json"
        return EditingDefaults.read(file) if file.is_file() else EditingDefaults()

    def load_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(json.loads((self.root / "scheduler" / "scheduler_config.json").read_text()))

    def load_autoencoder(self) -> LatentAutoencoder:
        return load_autoencoder(Path(self.vae) if self.vae else self.root / "vae", self.dtype)

    def load_conditioner(self) -> CLIPConditioner:
        """The frozen text side."""
        encoder = CLIPTextModel.from_pretrained(self.root / "text_encoder", dtype=self.dtype)
        tokenizer = CLIPTokenizer.from_pretrained(self.root / "tokenizer")
        return CLIPConditioner(tokenizer, encoder.requires_grad_(False).eval())

    def load_unet(self, *, guided: bool) -> UNet2DConditionModel:
        """The plain teacher, or the guidance-distilled one of stage 1; frozen."""
        if not guided:
            return _frozen(UNet2DConditionModel.from_pretrained(self.root / "unet", torch_dtype=self.dtype))
        for folder in (Path(self.guided_unet), self.root / self.guided_unet):
            if (folder / "config.json").is_file():
                return _frozen(UNet2DConditionModel.from_pretrained(folder, torch_dtype=self.dtype))
        raise FileNotFoundError(
            f"no guidance-distilled UNet at {self.guided_unet!r} or {self.root / self.guided_unet}: "
            "train one with conf/task/guidance_distillation.yaml and name its folder in "
            "model.init_args.family.guided_unet"
        )


def load_autoencoder(folder: Path, dtype: torch.dtype = torch.float32) -> LatentAutoencoder:
    """Load the autoencoder of a folder, of whichever class its config names."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no autoencoder at {folder}: there is no {config}")
    name = json.loads(config.read_text()).get("_class_name")
    if name not in AUTOENCODERS:
        raise ValueError(f"{config} names the class {name!r}; known autoencoders: {', '.join(AUTOENCODERS)}")
    return LatentAutoencoder(AUTOENCODERS[name].from_pretrained(folder, torch_dtype=dtype))


def _frozen(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False).eval()
