"""Tiny students and what they are compared with: separate networks, built with peft and diffusers alone."""

import copy
import json
from pathlib import Path

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from icd_lightning.diffusion import VP, Direction, Process, guidance_embedding
from icd_lightning.models.backbones import UNet
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents

GOLDEN = Path(__file__).parents[1] / "golden"
UNET_CONFIG = json.loads((GOLDEN / "meta.json").read_text())["unet_config"]
LORA = LoraSettings(rank=4, alpha=8)


def tiny_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**UNET_CONFIG, **config}).eval()


def tiny_model(unet: UNet2DConditionModel | None = None, process: Process | None = None) -> DiffusionModel:
    return DiffusionModel(unet or tiny_unet(), process or VP(), UNet())


def tiny_students(seed: int = 0, *, unet: UNet2DConditionModel | None = None, **options) -> LoraStudents:
    """Students whose adapters are far from zero and from each other."""
    students = LoraStudents(tiny_model(unet), **{"lora": LORA, **options})
    generator = torch.Generator().manual_seed(seed)
    for direction in DIRECTIONS:
        for parameter in students.parameters_of(direction):
            with torch.no_grad():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return students


def separate_unet(students: LoraStudents, direction: Direction) -> UNet2DConditionModel:
    """The same UNet with one adapter alone, by the public calls of diffusers and peft."""
    unet = tiny_unet().requires_grad_(False)
    settings = students.lora
    modules = list(UNet.lora_targets)
    unet.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=modules), "default")
    weights = {name: p.detach().clone() for name, p in students.named_parameters_of(direction).items()}
    own = separate_parameters(unet)
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return unet


def separate_parameters(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    return {name.replace(".default", ""): p for name, p in unet.named_parameters() if "lora_" in name}


def tiny_batch(count: int = 4, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": normal(count, 4, 8, 8),
        "goal": normal(count, 4, 8, 8),
        "t": torch.randint(0, 1000, (count,), generator=generator),
        "prompt_embeds": normal(count, 5, 16),
        "w": 1 + 7 * torch.rand(count, generator=generator),
    }


def part(batch: dict, index: slice) -> dict:
    return {name: value[index] for name, value in batch.items()}


def output_of(students: LoraStudents, role: str, batch: dict) -> Tensor:
    """The network's output in one role."""
    conditioning = Conditioning(prompt_embeds=batch["prompt_embeds"])
    return students.predict(role, batch["x"], batch["t"], conditioning, batch["w"])


def loss_of(students: LoraStudents, direction: Direction, batch: dict) -> Tensor:
    """The student's mean squared distance from a goal."""
    denoise = students.denoiser(direction, Conditioning(prompt_embeds=batch["prompt_embeds"]), batch["w"])
    return (denoise(batch["x"], batch["t"]).eps - batch["goal"]).square().mean()


def separate_loss(unet: UNet2DConditionModel, batch: dict) -> Tensor:
    return (run(unet, batch) - batch["goal"]).square().mean()


def run(unet: UNet2DConditionModel, batch: dict) -> Tensor:
    """The UNet's output as plain diffusers gives it."""
    embedding = guidance_embedding(batch["w"]) if unet.config.time_cond_proj_dim else None
    return unet(batch["x"], batch["t"], batch["prompt_embeds"], timestep_cond=embedding).sample


def gradients(students: LoraStudents, direction: Direction) -> dict[str, Tensor | None]:
    return {name: copy.copy(p.grad) for name, p in students.named_parameters_of(direction).items()}


def expected_gradients(students: LoraStudents, direction: Direction, batch: dict) -> dict[str, Tensor]:
    """The adapter's gradients in a model of its own."""
    unet = separate_unet(students, direction)
    separate_loss(unet, batch).backward()
    return {name: p.grad for name, p in separate_parameters(unet).items()}


def assert_same_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> None:
    """To 1e-4 of each tensor's largest number: what cancels keeps the rounding of its parts, and processors differ."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        atol = 1e-4 * float(expected[name].abs().max()) + 1e-7
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
