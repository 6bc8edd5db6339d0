"""Parts of baselines whose networks are known: by formula, or by the reference's tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from golden_case import load_json, load_tensors
from torch import Tensor

import icd_lightning  # noqa: F401  must come before diffusers
from icd_lightning.diffusion import VP, Denoiser, Process
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.models.backbones import UNet
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel


@dataclass
class GivenEmbeddings:
    """In the place of a text encoder: the embedding (L, D) of each prompt is given, "" is the unconditional one."""

    embeds: dict[str, Tensor]

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(prompt_embeds=torch.stack([self.embeds[prompt] for prompt in prompts]))

    def unconditional(self, batch_size: int) -> Conditioning:
        return self([""] * batch_size)


def golden_parts() -> tuple[Parts, dict[str, Tensor], str]:
    """The reference's network, its tensors, and its prompt."""
    meta, tensors = load_json("baselines.json"), load_tensors("baselines.safetensors")
    unet = UNet2DConditionModel(**meta["unet_config"]).requires_grad_(False).eval()
    unet.load_state_dict(load_tensors("baselines_unet.safetensors"))
    embeds = {meta["prompt"]: tensors["prompt_embeds"][0], "": tensors["uncond_embeds"][0]}
    parts = Parts.of(DiffusionModel(unet, VP(), UNet()), None, GivenEmbeddings(embeds))
    return parts, tensors, meta["prompt"]


def analytic_parts(denoise: Denoiser, process: Process) -> Parts:
    """A network known by formula, whatever the prompt says."""

    def predict(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
        return process.target(*denoise(x, t), t)

    embeds = {name: torch.zeros(1, 1) for name in ("", "source", "target")}
    return Parts(DiffusionModel(None, process, UNet()), None, GivenEmbeddings(embeds), predict, takes_guidance=False)
