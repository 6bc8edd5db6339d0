"""What a baseline needs of a family, loaded or taken from loaded parts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from torch import Tensor

from icd_lightning.editing.baselines.branches import ConditionalNetwork
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel, Network
from icd_lightning.models.family import Family
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
        parts = cls.of(model, family.load_autoencoder(), family.load_conditioner())
        return replace(parts, network=_without_w(model)) if few_step and not guided else parts

    @classmethod
    def of(
        cls,
        model: DiffusionModel,
        autoencoder: LatentAutoencoder,
        conditioner: Conditioner,
        *,
        predict: Network | None = None,
    ) -> Parts:
        """From loaded parts; `predict` runs in the place of the model's own network, for instance a student's."""
        network = ConditionalNetwork(_eps(model, predict or model.predict), model.takes_guidance)
        return cls(network, autoencoder, conditioner, model)


def _eps(model: DiffusionModel, predict: Network) -> Network:
    """A network whose output is eps, whatever it was trained to output."""

    def eps(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
        return model.process.split(predict(x, t, conditioning, w), x, t).eps

    return eps


def _without_w(model: DiffusionModel) -> ConditionalNetwork:
    """A model's network, told no w even if it takes one."""

    def predict(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
        time = model.process.network_time(t)
        return model.backbone.predict(model.network, x, time, conditioning, None).to(x.dtype)

    return ConditionalNetwork(_eps(model, predict))


def has_guided_network(family: Family) -> bool:
    """Whether a family has a guidance-distilled network, as iCD's have; FileNotFoundError if one is named in vain."""
    try:
        family.check()
    except FileNotFoundError:
        if family.guided_unet is not None:
            raise
        return False
    return True
