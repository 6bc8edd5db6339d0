"""The pipeline for people: pictures and prompts in, pictures out, as a `DiffusionPipeline` of diffusers.

    pipe = InvertibleConsistencyPipeline.from_pretrained("tiny")
    dog = pipe.edit("cat.jpg", "a cat on a bench", "a dog on a bench").images[0]

Benchmarks and trainings use what is below it, `InvertibleConsistency`, on tensors.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from icd_lightning.diffusion import Boundaries, GuidanceSchedule, NoiseSchedule, StepGuidance
from icd_lightning.editing.calls import Framed, OnStepEnd, Watch, as_texts, batch_size, one_for_each
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.limits import check_fraction, check_guidance_scale
from icd_lightning.editing.method import UNGUIDED, PromptSwap, Seed, seeded_noise
from icd_lightning.editing.pictures import OutputType, Pictures, as_images, as_output
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt, PromptToPromptEditing
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.checkpoints import save_student
from icd_lightning.models.family import PRECISIONS, EditingDefaults, Family
from icd_lightning.models.students import ADAPTERS, Students
from icd_lightning.models.text import CLIPConditioner, DualCLIPConditioner

Prompts = str | Sequence[str]
Generators = torch.Generator | list[torch.Generator] | None
Control = PromptToPrompt | Sequence[PromptToPrompt] | str | None

DEFAULTS = ("guidance_scale", "tau", "edit_guidance_scale", "attention_control", "closed_vocabulary")
"""What a pipeline's config says for calls that do not."""

_PLANTED: WeakValueDictionary[int, Students] = WeakValueDictionary()
"""The students in a UNet, by its id: pipelines that share components share them too."""


class InvertibleConsistencyPipeline(DiffusionPipeline):
    """Generate in 3-4 steps, invert in 3-4 steps, edit by prompt: a frozen guided UNet and the two students in it.

    `from_pretrained` loads students. A pipeline made of parts has those that its UNet carries, or else new ones, which
    begin as the UNet itself.

    Args:
        unet: the guidance-distilled UNet of stage 1.
        boundaries: the ends of the students' segments; None: the paper's four.
        guidance_scale: w, where a call does not say.
        tau: of dynamic guidance, where a call does not say; None: what suits the boundaries.
        edit_guidance_scale: w of edits by attention control; None: guidance_scale.
        attention_control: edit by Prompt-to-Prompt where a call does not say; otherwise by swapping the prompt.
        closed_vocabulary: the family knows those words only that its tokenizer keeps whole.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ("text_encoder_2", "tokenizer_2")

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        boundaries: list[int] | None = None,
        guidance_scale: float = 8.0,
        tau: float | None = None,
        edit_guidance_scale: float | None = None,
        attention_control: bool = False,
        closed_vocabulary: bool = False,
    ) -> None:
        super().__init__()
        ends = Boundaries.uniform(4) if boundaries is None else Boundaries(tuple(boundaries), allow_off_grid=True)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            boundaries=list(ends.boundary_timesteps),
            guidance_scale=check_guidance_scale(guidance_scale),
            tau=check_fraction(suitable_tau(ends) if tau is None else tau, "tau"),
            edit_guidance_scale=check_guidance_scale(
                guidance_scale if edit_guidance_scale is None else edit_guidance_scale, "edit_guidance_scale"
            ),
            attention_control=attention_control,
            closed_vocabulary=closed_vocabulary,
        )
        self.students = _PLANTED.get(id(unet)) or Students(unet, NoiseSchedule.from_config(scheduler.config))
        _PLANTED[id(unet)] = self.students
        autoencoder = LatentAutoencoder(vae)
        self.method = InvertibleConsistency(self.students, autoencoder, self._conditioner(autoencoder), ends)
        self.nfe = 0  # network evaluations of one picture in the latest call; its source beside it counts, too

    def _conditioner(self, autoencoder: LatentAutoencoder) -> CLIPConditioner | DualCLIPConditioner:
        first = CLIPConditioner(self.tokenizer, self.text_encoder)
        if self.text_encoder_2 is None:
            return first
        resolution = int(self.unet.config.sample_size) * autoencoder.downsampling
        return DualCLIPConditioner(first, CLIPConditioner(self.tokenizer_2, self.text_encoder_2), resolution)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Family = "tiny",
        *,
        forward: str | None = None,
        reverse: str | None = None,
        boundaries: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **family: Any,
    ) -> InvertibleConsistencyPipeline:
        """Load a model and its two students.

        Args:
            model: "tiny" (shipped), a folder that `save_pretrained` wrote, or any other model that a `Family` names.
            forward, reverse: folders or files of the students, ours or released ones; by default the model's own.
            boundaries: e.g. "259,519,779,999"; by default what the students' files say.
            torch_dtype: type of the weights.
            family: what else a `Family` takes, such as guided_unet and vae.
        """
        if not isinstance(model, Family):
            precision = {dtype: name for name, dtype in PRECISIONS.items()}.get(torch_dtype)
            if precision is None:
                raise ValueError(f"torch_dtype {torch_dtype} is none of {', '.join(PRECISIONS)}")
            model = Family(str(model), precision=precision, **family)
        method = InvertibleConsistency.from_pretrained(model, forward=forward, reverse=reverse, boundaries=boundaries)
        conditioner, unet = method.conditioner, method.students.unet
        sides = [conditioner] if isinstance(conditioner, CLIPConditioner) else [conditioner.first, conditioner.second]
        second = {"text_encoder_2": sides[1].text_encoder, "tokenizer_2": sides[1].tokenizer} if sides[1:] else {}
        _PLANTED[id(unet)] = method.students
        pipe = cls(
            method.autoencoder.vae,
            sides[0].text_encoder,
            sides[0].tokenizer,
            unet,
            DDIMScheduler.from_config(
                model.source.config("scheduler"), prediction_type=method.schedule.prediction_type
            ),
            **second,
            boundaries=list(method.boundaries.boundary_timesteps),
            **_defaults(model, method.boundaries, two_encoders=bool(second)),
        )
        pipe.register_to_config(_name_or_path=model.model)
        return pipe

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder for `from_pretrained`, and for `--model` of the commands: every part, and both students."""
        folder = Path(save_directory).absolute()
        if folder.is_file():
            raise ValueError(f"cannot save to {folder}: that is a file, give a folder")
        temporary = folder.with_name(f".{folder.name}-{uuid4().hex}")
        try:
            for name in ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"):
                if getattr(self, name) is not None:
                    getattr(self, name).save_pretrained(temporary / name)
            bare = _bare(self.unet)
            bare.save_pretrained(temporary / "unet_guided")
            bare.save_config(temporary / "unet")  # sizes of the family; the plain teacher is not known here
            for adapter, direction in ADAPTERS.items():
                about = {"boundaries": self.config.boundaries}
                save_student(self.students, adapter, temporary / "students" / direction, metadata=about)
            defaults = EditingDefaults(self.config.guidance_scale, self.config.tau, self.config.closed_vocabulary)
            (temporary / "icd.json").write_text(json.dumps(asdict(defaults)) + "\n")
            self.save_config(temporary)
            for file in [path for path in temporary.rglob("*") if path.is_file()]:
                place = folder / file.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    # Calls

    @property
    def boundaries(self) -> Boundaries:
        """The ends of the students' segments."""
        return self.method.boundaries

    @property
    def resolution(self) -> int:
        """Pixels of a side of the pictures that the UNet was trained on."""
        return self.method.resolution

    def __call__(self, prompt: Prompts, **options: Any) -> ImagePipelineOutput:
        """Make pictures from prompts: see `generate`."""
        return self.generate(prompt, **options)

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
        prompts = [text for text in as_texts(prompt, "prompt") for _ in range(num_images_per_prompt)]
        count = batch_size(prompt=prompts, latents=latents)
        if latents is None:
            latents = self._noise(count, *self._size(height, width), generator, seed)
        method, noise = self._bound(latents), one_for_each(latents, count)
        with Watch(self, self.boundaries.num_segments, callback_on_step_end, output_type) as watch:
            denoise = method.denoiser(one_for_each(prompts, count), guided)
            return self._output(method.from_noise(denoise, noise, on_step=watch), output_type)

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
        with Watch(self, self.boundaries.num_segments, callback_on_step_end) as watch:
            return self._climb(images, as_texts(prompt, "prompt"), generator, seed, watch)

    @torch.no_grad()
    def reconstruct(
        self,
        image: Pictures,
        prompt: Prompts,
        *,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        seed: Seed | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: OnStepEnd | None = None,
    ) -> ImagePipelineOutput:
        """Take pictures to noise and back, unguided. Arguments as of `invert` and `generate`."""
        images, prompts = as_images(image, *self._size(height, width)), as_texts(prompt, "prompt")
        with Watch(self, 2 * self.boundaries.num_segments, callback_on_step_end, output_type) as watch:
            noise = self._climb(images, prompts, generator, seed, watch)
            method = self._bound(noise)
            denoise = method.denoiser(one_for_each(prompts, len(noise)), UNGUIDED)
            return self._output(method.from_noise(denoise, noise, on_step=watch), output_type)

    @torch.no_grad()
    def edit(
        self,
        image: Pictures | None,
        source_prompt: Prompts,
        target_prompt: Prompts,
        *,
        control: Control = "auto",
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
            control: a `PromptToPrompt`, or one for each edit; None swaps the prompt; "auto" does as the family is best
                edited, by its default settings.
            swap_tau: without control, follow the source prompt while t > swap_tau T; by default tau. Given, it asks for
                this way to edit.
            latents: noise (B, C, h, w) that `invert` returned for the source prompts.
            guidance_scale, tau, guidance, output_type, callback_on_step_end: see `generate`. With control, latents in
                callbacks are (2 B, C, h, w): all sources, then all targets.
            height, width, generator, seed: see `invert`.
        """
        control = self._control(control, swap_tau)
        guided = self._guidance(guidance_scale, tau, guidance, edit=control is not None)
        swap_tau = getattr(guided, "tau", self.config.tau) if swap_tau is None else check_fraction(swap_tau, "swap_tau")
        sources, targets = as_texts(source_prompt, "source_prompt"), as_texts(target_prompt, "target_prompt")
        if (image is None) == (latents is None):
            raise ValueError("give either an image to edit, or latents, the noise that it was inverted to")
        images = None if image is None else as_images(image, *self._size(height, width))
        steps = self.boundaries.num_segments
        with Watch(self, steps if images is None else 2 * steps, callback_on_step_end, output_type) as watch:
            noise = latents if images is None else self._climb(images, sources, generator, seed, watch)
            count = batch_size(image=noise, source_prompt=sources, target_prompt=targets)
            method, noise = self._bound(noise), one_for_each(noise, count)
            sources, targets = one_for_each(sources, count), one_for_each(targets, count)
            if control is None:
                total = self.students.schedule.num_train_timesteps
                denoise = PromptSwap(
                    method.denoiser(sources, UNGUIDED), method.denoiser(targets, guided), swap_tau, total
                )
                return self._output(method.from_noise(denoise, noise, on_step=watch), output_type)
            watch.branches = 2
            editing = PromptToPromptEditing(method, self.unet, steps, control)
            both = editing.decode(noise, sources, targets, guidance=guided, on_step=watch)
            return self._output(both[count:], output_type)

    # Parts of a call

    def _climb(
        self, images: Tensor, prompts: list[str], generator: Generators, seed: Seed | None, watch: Watch
    ) -> Tensor:
        """Images (B, 3, H, W) to noise (B, C, h, w)."""
        count = batch_size(image=images, prompt=prompts)
        if generator is None:
            seed = [seed or 0] * count if seed is None or isinstance(seed, int) else seed
        noise = self._noise(count, *images.shape[-2:], generator, seed)
        method = self._bound(noise)
        latents = method.autoencoder.encode(images.to(noise.device))
        return method.climb(one_for_each(latents, count), one_for_each(prompts, count), noise, on_step=watch)

    def _bound(self, latents: Tensor) -> InvertibleConsistency:
        """The method for latents (B, C, h, w), on the device that runs; networks that ask are told of their size."""
        if latents.ndim != 4 or latents.shape[1] != self.method.autoencoder.latent_channels:
            raise ValueError(
                f"latents are of shape {tuple(latents.shape)}; this model's are "
                f"(B, {self.method.autoencoder.latent_channels}, h, w)"
            )
        self.students.schedule.to(self._execution_device)
        height, width = (side * self.method.autoencoder.downsampling for side in latents.shape[-2:])
        framed = Framed(self.method.conditioner, height, width)
        return InvertibleConsistency(self.students, self.method.autoencoder, framed, self.boundaries)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Pixels of the pictures; ValueError if the autoencoder cannot have them."""
        factor = self.method.autoencoder.downsampling
        size = (self.resolution if height is None else height, self.resolution if width is None else width)
        for name, side in zip(("height", "width"), size, strict=True):
            if side < factor or side % factor:
                near = max(factor, round(side / factor) * factor)
                raise ValueError(f"{name} {side} must be a multiple of {factor}, for example {near}")
        return size

    def _noise(self, count: int, height: int, width: int, generator: Generators, seed: Seed | None) -> Tensor:
        """Standard normal noise (B, C, h, w), float32, on the device that runs."""
        shape, device = self.method.latent_shape(count, height, width), self._execution_device
        if seed is None:
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
            return schedule
        usual = self.config.edit_guidance_scale if edit else self.config.guidance_scale
        return StepGuidance(
            check_guidance_scale(usual if scale is None else scale),
            check_fraction(self.config.tau if tau is None else tau, "tau"),
            num_train_timesteps=self.students.schedule.num_train_timesteps,
        )

    def _control(self, control: Control, swap_tau: float | None) -> PromptToPrompt | Sequence[PromptToPrompt] | None:
        if isinstance(control, str) and control != "auto":
            raise ValueError(f"control {control!r} is none of: auto, None, a PromptToPrompt")
        if control == "auto":
            return PromptToPrompt() if self.config.attention_control and swap_tau is None else None
        if control is not None and swap_tau is not None:
            raise ValueError("swap_tau is of edits without control: leave out one of them")
        return control

    def _output(self, latents: Tensor, output_type: OutputType) -> ImagePipelineOutput:
        """Latents (B, C, h, w) as asked for."""
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        return ImagePipelineOutput(images=as_output(self.method.autoencoder.decode(latents), output_type))

    def unknown_words(self, *prompts: str) -> list[str]:
        """Words that a family with a closed vocabulary has never seen: what they do to a picture is arbitrary."""
        if not self.config.closed_vocabulary:
            return []
        words = dict.fromkeys(word for prompt in prompts for word in prompt.lower().split())
        return [word for word in words if len(self.tokenizer(word).input_ids) > 3]


def suitable_tau(boundaries: Boundaries) -> float:
    """The paper's tau for these segments: guide in all but the first step, 0.8 for 779 and 0.7 for 679 or 699."""
    last = boundaries.boundary_timesteps[-2]
    return math.ceil(10 * last / boundaries.num_train_timesteps) / 10 if last else 1.0


def _defaults(family: Family, boundaries: Boundaries, *, two_encoders: bool) -> dict[str, Any]:
    """What the model's folder says, or the paper: SD1.5 by Prompt-to-Prompt at w 20, SDXL by swapping the prompt."""
    folder = Path(getattr(family.source, "location", ""))
    if (folder / "model_index.json").is_file():
        index = json.loads((folder / "model_index.json").read_text())
        if index.get("_class_name") == InvertibleConsistencyPipeline.__name__:
            return {name: index[name] for name in DEFAULTS}
    if (folder / "icd.json").is_file():
        return asdict(family.load_defaults())
    paper: dict[str, Any] = {"guidance_scale": 8.0, "tau": suitable_tau(boundaries)}
    return paper if two_encoders else {**paper, "edit_guidance_scale": 20.0, "attention_control": True}


def _bare(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet without its students; it shares the weights."""
    weights = {
        name.replace(".base_layer.", "."): weight for name, weight in unet.state_dict().items() if ".lora_" not in name
    }
    with torch.device("meta"):  # every weight is replaced below, so none is drawn
        bare = UNet2DConditionModel.from_config({k: v for k, v in unet.config.items() if k != "_use_default_values"})
    bare.load_state_dict(weights, assign=True)
    return bare
