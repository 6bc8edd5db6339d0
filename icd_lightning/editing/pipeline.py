"""The pipeline for people: pictures and prompts in, pictures out, as a `DiffusionPipeline` of diffusers.

    pipe = InvertibleConsistencyPipeline.from_pretrained("tiny")
    dog = pipe.edit("cat.jpg", "a cat on a bench", "a dog on a bench").images[0]

Benchmarks and trainings use what is below it, `InvertibleConsistency`, on tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, get_args

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, OnStep, Step, StepGuidance
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.injection import usual_control
from icd_lightning.editing.limits import Control, check_fraction, check_guidance_scale
from icd_lightning.editing.loading import StudentPipeline
from icd_lightning.editing.method import UNGUIDED, Seed, seeded_noise
from icd_lightning.editing.pictures import OutputType, Pictures, as_images, as_output, as_texts, batch_size, repeated

Prompts = str | Sequence[str]
Generators = torch.Generator | list[torch.Generator] | None
Borrowed = Control | Sequence[Control] | str | None
OnStepEnd = Callable[..., dict[str, Any] | None]
"""callback(pipe, index, t, {"latents": ...}); latents that it returns replace those of the step."""


class InvertibleConsistencyPipeline(StudentPipeline):
    """Generate and invert in 3-4 steps, edit by prompt; what it is made of, loaded and saved: see `StudentPipeline`."""

    @torch.no_grad()
    def generate(
        self,
        prompt: Prompts,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        tau: float | None = None,
        guidance: GuidanceSchedule | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        seed: Seed | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: OnStepEnd | None = None,
    ) -> ImagePipelineOutput:
        """Make pictures from prompts, of each `num_images_per_prompt`.

        Args:
            guidance_scale: w, 1 is unguided; by default the family's.
            tau: guide at t <= tau T only; by default the family's.
            guidance: any other schedule of w, in the place of these two.
            height, width: in pixels; by default as in the training.
            generator: one for the batch, or a list of one for each picture, which is then the same alone.
            seed: in place of generators: picture i has seed + i, or the i-th of a list; the same alone, on any device.
            latents: noise (B, C, h, w) to begin with, for instance what `invert` returned.
            output_type: pil; np, (B, H, W, 3), and pt, (B, 3, H, W), in [0, 1]; or latent, (B, C, h, w).
            callback_on_step_end: called as callback(pipe, index, t, {"latents": ...}); what it returns replaces them.
        """
        guided = self._guidance(guidance_scale, tau, guidance)
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt {num_images_per_prompt} must be 1 or more")
        prompts = [text for text in as_texts(prompt, "prompt") for _ in range(num_images_per_prompt)]
        if latents is None:
            latents = self._noise(len(prompts), *self._size(height, width), generator, seed)
        with self._followed(self.boundaries.num_segments, callback_on_step_end, output_type) as on_step:
            count = batch_size(prompt=prompts, latents=latents)
            method, noise = self._bound(latents, count)
            denoise = method.denoiser(repeated(prompts, count), guided)
            return self._output(method.from_noise(denoise, noise, on_step=on_step), output_type)

    __call__ = generate

    @torch.no_grad()
    def invert(
        self,
        image: Pictures,
        prompt: Prompts,
        *,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        seed: Seed | None = None,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> Tensor:
        """Take pictures to noise (B, C, h, w), each under the prompt that describes it.

        Args:
            image: one or several (see `Pictures`); the centre of height x width pixels is cut out.
            generator: of the slight noise with which the way begins; one for the batch, or a list of one for each.
            seed: in place of generators, by default 0: of every picture, or a list with one for each.
            height, width, callback_on_step_end: see `generate`.
        """
        images = as_images(image, *self._size(height, width))
        with self._followed(self.boundaries.num_segments, callback_on_step_end) as on_step:
            return self._climb(images, as_texts(prompt, "prompt"), generator, seed, on_step)

    def reconstruct(self, image: Pictures, prompt: Prompts, **options: Any) -> ImagePipelineOutput:
        """Take pictures to noise and back, unguided; options of `edit`, such as sizes, seed, output_type."""
        return self.edit(image, prompt, prompt, control=None, guidance=UNGUIDED, **options)

    @torch.no_grad()
    def edit(
        self,
        image: Pictures | None,
        source_prompt: Prompts,
        target_prompt: Prompts,
        *,
        control: Borrowed = "auto",
        swap_tau: float | None = None,
        guidance_scale: float | None = None,
        tau: float | None = None,
        guidance: GuidanceSchedule | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        seed: Seed | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: OnStepEnd | None = None,
    ) -> ImagePipelineOutput:
        """Take pictures to noise with what they show, and back with what they shall show.

        One picture with B target prompts, or B with one, are B edits; a picture is inverted once.

        Args:
            image: see `invert`; None where `latents` are given.
            control: a `PromptToPrompt`, on a transformer an `Injection`, or one for each edit; None swaps the prompt;
                "auto" does as the family is best edited, by its default settings.
            swap_tau: without control, follow the source prompt while t > swap_tau T; by default where
                guidance ends, its tau, tau2 or hi. Given, it asks for this way to edit.
            latents: noise (B, C, h, w) that `invert` returned for the source prompts.
            guidance_scale, tau, guidance, output_type, callback_on_step_end: see `generate`. With control, latents in
                callbacks are (2 B, C, h, w): all sources, then all targets.
            height, width, generator, seed: see `invert`.
        """
        control = self._control(control, swap_tau)
        guided = self._guidance(guidance_scale, tau, guidance, edit=control is not None)
        if swap_tau is not None:
            check_fraction(swap_tau, "swap_tau")
        sources, targets = as_texts(source_prompt, "source_prompt"), as_texts(target_prompt, "target_prompt")
        if (image is None) == (latents is None):
            raise ValueError("give either an image to edit, or latents, the noise that it was inverted to")
        images = None if image is None else as_images(image, *self._size(height, width))
        steps = self.boundaries.num_segments
        with self._followed(steps if images is None else 2 * steps, callback_on_step_end, output_type) as on_step:
            noise = latents if images is None else self._climb(images, sources, generator, seed, on_step)
            count = batch_size(image=noise, source_prompt=sources, target_prompt=targets)
            method, noise = self._bound(noise, count)
            sources, targets = repeated(sources, count), repeated(targets, count)
            if control is None:
                denoise = method.swapping(sources, targets, guidance=guided, swap_tau=swap_tau)
                return self._output(method.from_noise(denoise, noise, on_step=on_step), output_type)
            both = method.decode_pairs(noise, sources, targets, guidance=guided, control=control, on_step=on_step)
            return self._output(both[count:], output_type)

    @contextmanager
    def _followed(self, total: int, callback: OnStepEnd | None, output_type: str = "pil") -> Iterator[OnStep]:
        """What follows steps: counts evaluations, moves the progress bar, calls the callback; afterwards, offloads."""
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type {output_type!r} is none of {', '.join(get_args(OutputType))}")
        self.nfe, bar, numbers = 0, self.progress_bar(total=total), itertools.count()

        def on_step(step: Step) -> None:
            self.nfe += step.nfe
            bar.update()
            changed = callback(self, next(numbers), step.t, {"latents": step.x}) if callback is not None else None
            if changed and "latents" in changed:
                given, expected = tuple(changed["latents"].shape), tuple(step.x.shape)
                if given != expected:
                    raise ValueError(f"the callback returned latents of shape {given} for those of {expected}")
                step.x.copy_(changed["latents"])  # the loop goes on from it

        try:
            yield on_step
        finally:
            bar.close()
            self.maybe_free_model_hooks()

    def _climb(
        self, images: Tensor, prompts: list[str], generator: Generators, seed: Seed | None, on_step: OnStep
    ) -> Tensor:
        count = batch_size(image=images, prompt=prompts)
        if generator is None:
            seed = [seed or 0] * count if seed is None or isinstance(seed, Integral) else seed
        method, noise = self._bound(self._noise(count, *images.shape[-2:], generator, seed), count)
        latents = method.autoencoder.encode(images.to(noise.device))
        return method.climb(repeated(latents, count), repeated(prompts, count), noise, on_step=on_step)

    def _bound(self, latents: Tensor, count: int) -> tuple[InvertibleConsistency, Tensor]:
        """The method for latents (B or 1, C, h, w) on the device that runs, and these as (count, C, h, w)."""
        self.students.process.to(self._execution_device)
        return self.method.framed_for(latents), repeated(latents, count)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Pixels of the pictures; ValueError if the autoencoder cannot have them."""
        size = (self.resolution if height is None else height, self.resolution if width is None else width)
        self.method.latent_shape(1, *size)
        return size

    def _noise(self, count: int, height: int, width: int, generator: Generators, seed: Seed | None) -> Tensor:
        shape, device = self.method.latent_shape(count, height, width), self._execution_device
        if seed is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            if isinstance(generator, list) and len(generator) != count:
                raise ValueError(f"{len(generator)} generators for {count} pictures: give one, or one for each")
            return randn_tensor(shape, generator, device, torch.float32)
        if generator is not None:
            raise ValueError("generator and seed are two ways to say the same: give one of them")
        return seeded_noise(shape, seed, device)

    def _guidance(
        self, scale: float | None, tau: float | None, schedule: GuidanceSchedule | None, *, edit: bool = False
    ) -> GuidanceSchedule:
        if schedule is not None:
            if scale is not None or tau is not None:
                raise ValueError("guidance says w at every t: leave out guidance_scale and tau")
            check_guidance_scale(getattr(schedule, "guidance_scale", 1.0))
            return schedule
        usual = self.config.edit_guidance_scale if edit else self.config.guidance_scale
        return StepGuidance(
            check_guidance_scale(usual if scale is None else scale),
            check_fraction(self.config.tau if tau is None else tau, "tau"),
            num_train_timesteps=self.students.process.num_train_timesteps,
        )

    def _control(self, control: Borrowed, swap_tau: float | None) -> Control | Sequence[Control] | None:
        if control is None:
            return None
        if control == "auto":
            return usual_control(self.students) if self.config.attention_control and swap_tau is None else None
        each = control if isinstance(control, (list, tuple)) else [control]
        if not all(isinstance(one, Control) for one in each):
            kinds = "a PromptToPrompt, an Injection, a list of these"
            raise ValueError(f"control {control!r} is none of: auto, None, {kinds}")
        if swap_tau is not None:
            raise ValueError("swap_tau is of edits without control: leave out one of them")
        return control

    def _output(self, latents: Tensor, output_type: OutputType) -> ImagePipelineOutput:
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        return ImagePipelineOutput(images=as_output(self.method.autoencoder.decode(latents), output_type))
