"""What a baseline needs of a family, loaded or taken from loaded parts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from icd_lightning.diffusion import Process
from icd_lightning.editing.baselines.branches import ConditionalNetwork
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel, Network
from icd_lightning.models.family import Family
from icd_lightning.models.students import Students
from icd_lightning.models.text import Conditioner

log = logging.getLogger(__name__)

LCM_SOLVER_TIMESTEPS = range(19, 1000, 20)
"""The 50 steps that latent consistency models were distilled on."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What a baseline needs of a family: its network, and the ways between pictures, prompts and numbers."""

    network: ConditionalNetwork
    autoencoder: LatentAutoencoder
    conditioner: Conditioner
    model: DiffusionModel

    @property
    def process(self) -> Process:
        """The noise process of the network."""
        return self.model.process

    @classmethod
    def load(cls, family: Family, *, few_step: bool = False) -> Parts:
        """From disk: the teacher, or what makes pictures in few steps.

        A family with a guidance-distilled network (tiny; SD1.5 and SDXL for iCD) is no LCM or Turbo, and that network
        stands in for one; the folder of an LCM or Turbo in diffusers' layout has but one network, and that is it. As in
        the code of InfEdit and ReNoise, an LCM is told no w, although it takes one.
        """
        guided = few_step and has_guided_network(family)
        if few_step and not guided:
            log.warning(
                "%s has no guidance-distilled network, so its own is taken for an LCM or Turbo; if it is none, give "
                "one as --model, or a guidance-distilled network as --guided_unet",
                family.model,
            )
        if guided:
            log.info("%s is no LCM or Turbo; its guidance-distilled network stands in for one", family.model)
        model = family.load_model(guided=guided)
        parts = model, family.load_autoencoder(), family.load_conditioner()
        return cls._of(_without_w(model), *parts, takes_guidance=False) if few_step and not guided else cls.of(*parts)

    @classmethod
    def of(cls, model: DiffusionModel, autoencoder: LatentAutoencoder, conditioner: Conditioner) -> Parts:
        """From loaded parts."""
        return cls._of(model.predict, model, autoencoder, conditioner, takes_guidance=model.takes_guidance)

    @classmethod
    def of_student(cls, students: Students, autoencoder: LatentAutoencoder, conditioner: Conditioner) -> Parts:
        """With iCD's reverse student as the network."""
        predict = partial(students.predict, "reverse")
        return cls._of(predict, students.model, autoencoder, conditioner, takes_guidance=True)

    @classmethod
    def _of(
        cls,
        predict: Network,
        model: DiffusionModel,
        autoencoder: LatentAutoencoder,
        conditioner: Conditioner,
        *,
        takes_guidance: bool,
    ) -> Parts:
        def eps(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
            return model.process.split(predict(x, t, conditioning, w), x, t).eps

        return cls(ConditionalNetwork(eps, takes_guidance), autoencoder, conditioner, model)


def _without_w(model: DiffusionModel) -> Network:
    """A model's network, told no w even if it takes one."""

    def predict(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
        time = model.process.network_time(t)
        return model.backbone.predict(model.network, x, time, conditioning, None).to(x.dtype)

    return predict


def has_guided_network(family: Family) -> bool:
    """Whether a family has a guidance-distilled network, as iCD's have; FileNotFoundError if one is named in vain."""
    try:
        family.check()
    except FileNotFoundError:
        if family.guided_unet is not None:
            raise
        return False
    return True
