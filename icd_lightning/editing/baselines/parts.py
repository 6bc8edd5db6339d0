"""What a baseline needs of a family, loaded or taken from loaded parts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor, nn

from icd_lightning.diffusion import NoiseSchedule
from icd_lightning.editing.baselines.branches import ConditionalNetwork
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.backbone import predict
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.family import GUIDED, Family
from icd_lightning.models.students import Students
from icd_lightning.models.text import CLIPConditioner, DualCLIPConditioner

log = logging.getLogger(__name__)

LCM_SOLVER_TIMESTEPS = range(19, 1000, 20)
"""The 50 steps that latent consistency models were distilled on."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What a baseline needs of a family: its network, and the ways between pictures, prompts and numbers."""

    network: ConditionalNetwork
    schedule: NoiseSchedule
    autoencoder: LatentAutoencoder
    conditioner: CLIPConditioner | DualCLIPConditioner
    unet: nn.Module

    @classmethod
    def load(cls, family: Family, *, few_step: bool = False) -> Parts:
        """From disk: the teacher, or what makes pictures in few steps.

        A family with a guidance-distilled UNet (tiny; SD1.5 and SDXL for iCD) is no LCM or Turbo, and that UNet stands
        in for one; the folder of an LCM or Turbo in diffusers' layout has but one UNet, and that is it.
        """
        guided = few_step and has_guided_unet(family)
        if few_step and not guided:
            log.warning(
                "%s has no guidance-distilled UNet, so its own UNet is taken for an LCM or Turbo; if it is none, give "
                "one as --model, or a guidance-distilled UNet as --guided_unet",
                family.model,
            )
        if guided:
            log.info("%s is no LCM or Turbo; its guidance-distilled UNet stands in for one", family.model)
        return cls.of(
            family.load_unet(guided=guided),
            family.load_schedule(),
            family.load_autoencoder(),
            family.load_conditioner(),
        )

    @classmethod
    def of(
        cls,
        unet: nn.Module,
        schedule: NoiseSchedule,
        autoencoder: LatentAutoencoder,
        conditioner: CLIPConditioner | DualCLIPConditioner,
    ) -> Parts:
        """From loaded parts."""

        def eps(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
            return schedule.eps_from_output(predict(unet, x, t, conditioning, w), x, t)

        network = ConditionalNetwork(eps, takes_guidance=unet.config.time_cond_proj_dim is not None)
        return cls(network, schedule, autoencoder, conditioner, unet)

    @classmethod
    def of_student(
        cls, students: Students, autoencoder: LatentAutoencoder, conditioner: CLIPConditioner | DualCLIPConditioner
    ) -> Parts:
        """With iCD's reverse student as the network."""

        def eps(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
            return students.schedule.eps_from_output(students.predict("cd", x, t, conditioning, w), x, t)

        network = ConditionalNetwork(eps, takes_guidance=True)
        return cls(network, students.schedule, autoencoder, conditioner, students.unet)


def has_guided_unet(family: Family) -> bool:
    """Whether a family has a guidance-distilled UNet, as iCD's have; FileNotFoundError for a named one that is not."""
    if family.guided_unet != GUIDED:
        family.check()
        return True
    try:
        family.check()
    except FileNotFoundError:
        return False
    return True
