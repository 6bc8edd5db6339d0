"""Edit-friendly DDPM inversion (arXiv:2304.06140): noise for each step that makes a DDPM sampler draw this picture.

The picture is noised to every timestep independently, and z_t is what the sampler would have to draw to pass from one
to the next. These are no Gaussian noise: they hold the picture's layout, which edits keep.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icd_lightning.diffusion import VP, OnStep, Split, ddim_timesteps, falling
from icd_lightning.editing.baselines.base import Baseline, Inversion
from icd_lightning.editing.baselines.parts import Branch, Parts, descend
from icd_lightning.editing.method import Seed, seeded_noise
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt

CONTROL = PromptToPrompt(cross_replace=0.4, self_replace=0.6, amplify=1.0, blend=False)


class EditFriendlyInversion(Baseline):
    """One evaluation for each step taken, num_inference_steps - skip, and three back: the target's is guided.

    Raises ValueError for a skip that leaves no steps.
    """

    needs = VP

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 50,
        skip: int = 12,
        guidance_scale: float = 7.5,
        control: PromptToPrompt | None = CONTROL,
    ) -> None:
        super().__init__(parts, guidance_scale, control)
        if not 0 <= skip < num_inference_steps:
            raise ValueError(f"skip {skip} must be 0 or more and less than num_inference_steps {num_inference_steps}")
        # One later than DDIM's grid, as Stable Diffusion's own scheduler has it: a step from 0 to 0 would draw nothing.
        grid = [t + 1 for t in ddim_timesteps(num_inference_steps, self.process.num_train_timesteps)]
        self.steps = falling(grid[: num_inference_steps - skip])
        self.skipped = skip

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Noise x0 to each timestep, independently; per_step holds z (B, C, h, w). What is skipped is not asked for.

        The reference sets the last z to zero; kept, it brings the picture back exactly.
        """
        batch, *size = x0.shape
        drawn = seeded_noise((batch, len(self.steps), *size), seed, x0.device).unbind(1)
        points = [self.process.add_noise(x0, noise, t) for noise, (t, _) in zip(drawn, self.steps, strict=True)]
        source = self.conditioner(prompts)
        branches = [Branch(source, source)]
        stored: list[Tensor] = []

        def solve(x: Tensor, split: Split, index: int) -> Tensor:
            following = points[index + 1] if index + 1 < len(points) else x0
            mean, std = self._mean(x, split.eps, index)
            stored.append((following - mean) / std)
            return mean + std * stored[-1]  # equal to `following` but for rounding, which so cannot add up

        descend(self.parts, points[0], self.steps, lambda index: branches, solve, on_step=on_step)
        return Inversion(prompts, x0, points[0], stored)

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        mean, std = self._mean(x, split.eps, index)
        z = inversion.per_step[index]
        return mean + std * z.repeat(len(x) // len(z), 1, 1, 1)

    def _mean(self, x: Tensor, eps: Tensor, index: int) -> tuple[Tensor, Tensor]:
        t, s = self.steps[index]
        std = self.process.posterior_std(t, s, set_alpha_to_one=False)
        return self.process.ddim_step(x, eps, t, s, noise_std=std, set_alpha_to_one=False), std
