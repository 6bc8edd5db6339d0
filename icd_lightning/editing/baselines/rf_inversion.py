"""RF-Inversion (arXiv:2410.10792): steer a flow, up to a given noise and back to the picture.

Eq. 8 and 15: to the network's velocity v(x, t) a controller adds a part of how the straight path to the known end
differs from it. Up, under the empty prompt, the end is noise y that is drawn once; down it is the picture x0:

    up:    v + gamma ((y - x) / (1 - sigma) - v)
    down:  v + eta ((x - x0) / sigma - v)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icd_lightning.diffusion import OnStep, Split
from icd_lightning.editing.baselines.base import Inversion
from icd_lightning.editing.baselines.flow import FlowBaseline
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.limits import Injection, check_fraction
from icd_lightning.editing.method import Seed, seeded_noise


class RFInversion(FlowBaseline):
    """num_inference_steps evaluations to noise, as many back (w by a second evaluation: twice as many).

    `gamma` and `eta` are the controllers' shares, 0 to 1; eta's holds for the first `controlled` of the steps back. Set
    as in the authors' example. Their diffusion by fresh noise is left out.
    """

    reads_source = False

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 28,
        gamma: float = 0.5,
        eta: float = 0.9,
        controlled: float = 0.25,
        guidance_scale: float = 3.5,
        control: Injection | None = None,
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=control)
        self.gamma, self.eta = check_fraction(gamma, "gamma"), check_fraction(eta, "eta")
        self.controlled_steps = int(check_fraction(controlled, "controlled") * num_inference_steps)

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the grid towards noise of this seed; prompts have no effect."""
        noise, up = seeded_noise(x0.shape, seed, x0.device), [(s, t) for t, s in reversed(self.steps)]

        def move(x: Tensor, split: Split, index: int) -> Tensor:
            t, s = up[index]
            straight = (noise - x) / (1 - self.process.sigma(t))
            velocity = self.process.velocity(split).lerp(straight, self.gamma)
            return self.process.euler_step(x, velocity, t, s)

        return Inversion(prompts, x0, self.climb(x0, [""] * len(x0), up, move, on_step))

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        (t, s), velocity = self.steps[index], self.process.velocity(split)
        if index < self.controlled_steps:
            pictures = inversion.x0.repeat(len(x) // len(inversion.x0), 1, 1, 1)
            velocity = velocity.lerp((x - pictures) / self.process.sigma(t), self.eta)
        return self.process.euler_step(x, velocity, t, s)
