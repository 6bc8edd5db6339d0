"""Networks and processes of another package: named to every command, guided, adapted, and no name taken twice."""

from dataclasses import dataclass
from typing import ClassVar

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from outside_case import SmallSD3

from icd_lightning.commands.weights import Weights
from icd_lightning.diffusion import VP, Flow, Process
from icd_lightning.models.backbones import UNet, named_backbone
from icd_lightning.models.backbones.base import Widened
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.students import LoraSettings, LoraStudents


class Later(Flow):
    schedulers = ("LaterScheduler", "CommonScheduler")


class Latest(Later):
    schedulers = ("CommonScheduler",)


def test_a_process_may_extend_one_of_ours_and_no_two_have_one_scheduler():
    assert type(Process.from_config({"_class_name": "LaterScheduler", "shift": 2.0})) is Later
    with pytest.raises(ValueError, match=r"'CommonScheduler' is one of both .*Later and .*Latest: take another name"):
        Process.from_config({"_class_name": "CommonScheduler"})


def test_every_command_takes_a_backbone_by_its_path():
    assert type(Weights(backbone="outside_case.SmallSD3", device="cpu").family().architecture) is SmallSD3
    assert type(Weights(device="cpu").family().architecture) is UNet
    with pytest.raises(ValueError, match="is no Backbone: derive it"):
        named_backbone("outside_case.CLIPTextModel")


@dataclass(frozen=True)
class PixArt(Widened):
    """Its positions are in no file, and its class knows nothing of adapters."""

    network_class: ClassVar = PixArtTransformer2DModel
    part: ClassVar = "transformer"
    blocks: ClassVar = ()
    lora_targets: ClassVar = ("to_q",)
    guidance_weight: ClassVar = "caption_projection.linear_1.weight"
    width_key: ClassVar = "caption_channels"

    def predict(self, network, x, t, conditioning, w):
        raise NotImplementedError

    def conditioner(self, source, dtype):
        raise NotImplementedError

    def weight(self, network):
        return network.pos_embed.proj.weight


def test_a_network_with_positions_of_its_own_and_without_adapters_is_guided_and_adapted():
    sizes = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8}
    network = PixArtTransformer2DModel(**sizes, **heads, use_additional_conditions=False)
    before = torch.get_rng_state()
    guided = DiffusionModel(network, VP(), PixArt()).with_guidance_embedding(16)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(guided.network.pos_embed.pos_embed, network.pos_embed.pos_embed)
    assert guided.network.caption_projection.linear_1.in_features == 8 + 16
    students = LoraStudents(guided, lora=LoraSettings(rank=2))
    assert len(students.parameters_of("forward")) == len(students.parameters_of("reverse")) == 4
