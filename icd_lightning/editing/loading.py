"""What the pipeline is made of: its parts put together, loaded from a model, saved for the next time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from icd_lightning.diffusion import VP, Boundaries, Process
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.defaults import defaults_of, suitable_tau
from icd_lightning.editing.limits import check_fraction, check_guidance_scale
from icd_lightning.files import replaced_folder, write_json
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.backbones import UNet
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import PRECISIONS, EditingDefaults, Family
from icd_lightning.models.student_file import write_diffusers
from icd_lightning.models.students import DIRECTIONS, LoraStudents
from icd_lightning.models.text import CLIPConditioner, DualCLIPConditioner, unknown_words

if TYPE_CHECKING:
    from typing_extensions import Self

_PLANTED: WeakValueDictionary[int, LoraStudents] = WeakValueDictionary()
"""The students in a UNet, by its id: pipelines that share components share them too."""


class StudentPipeline(DiffusionPipeline):
    """A frozen guided UNet, the two students in it, and what stands between them and pictures and prompts.

    `from_pretrained` loads students. A pipeline made of parts has those that its UNet carries, or else new ones, which
    begin as the UNet itself.

    Args:
        unet: the guidance-distilled UNet of stage 1.
        boundaries: the ends of the students' segments; None: the paper's four.
        guidance_scale: w, where a call does not say.
        tau: of dynamic guidance, where a call does not say; None: what suits the boundaries.
        edit_guidance_scale: w of edits by attention control; None: guidance_scale.
        attention_control: edit by Prompt-to-Prompt where a call does not say; otherwise by swapping the prompt.
        start_timestep: where the forward model begins, slightly noised.
        closed_vocabulary: the family knows those words only that its tokenizer keeps whole.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ("text_encoder_2", "tokenizer_2")

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,  # `from_pipe` of diffusers hands over parts of exactly these types
        scheduler: DDIMScheduler,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        boundaries: list[int] | None = None,
        guidance_scale: float = EditingDefaults.guidance_scale,
        tau: float | None = None,
        edit_guidance_scale: float | None = None,
        attention_control: bool = False,
        closed_vocabulary: bool = False,
        start_timestep: int = Boundaries.start_timestep,
    ) -> None:
        super().__init__()
        ends = Boundaries.uniform(4).boundary_timesteps if boundaries is None else boundaries
        ends = Boundaries(tuple(ends), start_timestep, allow_off_grid=True)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)
        edit_scale = guidance_scale if edit_guidance_scale is None else edit_guidance_scale
        self.register_to_config(
            boundaries=list(ends.boundary_timesteps),
            guidance_scale=check_guidance_scale(guidance_scale),
            tau=check_fraction(suitable_tau(ends) if tau is None else tau, "tau"),
            edit_guidance_scale=check_guidance_scale(edit_scale, "edit_guidance_scale"),
            attention_control=attention_control,
            closed_vocabulary=closed_vocabulary,
            start_timestep=start_timestep,
        )
        model = DiffusionModel(
            unet, Process.from_config({"_class_name": type(scheduler).__name__, **scheduler.config}), UNet()
        )
        self.students = _PLANTED.get(id(unet)) or LoraStudents(model)
        _PLANTED[id(unet)] = self.students
        autoencoder, conditioner = LatentAutoencoder(vae), CLIPConditioner(tokenizer, text_encoder)
        self.boundaries = ends  # of the students' segments
        # pixels of a side of the pictures that the UNet was trained on
        self.resolution = int(unet.config.sample_size) * autoencoder.downsampling
        if text_encoder_2 is not None:
            second = CLIPConditioner(tokenizer_2, text_encoder_2)
            conditioner = DualCLIPConditioner(conditioner, second, self.resolution)
        self.method = InvertibleConsistency(self.students, autoencoder, conditioner, ends, merge=True)
        self.nfe = 0  # network evaluations of one picture in the latest call; its source beside it counts, too

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Family = "tiny",
        *,
        forward: str | None = None,
        reverse: str | None = None,
        boundaries: str | None = None,
        lora_alpha: float | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **family: Any,
    ) -> Self:
        """Load a model and its two students.

        Args:
            model: "tiny" (shipped), a folder that `save_pretrained` wrote, or any other model that a `Family` names.
            forward, reverse: folders or files of the students, ours or released ones; by default the model's own.
            boundaries: e.g. "259,519,779,999"; by default what the students' files say.
            lora_alpha: of students' files that do not say theirs.
            torch_dtype: type of the weights.
            family: what else a `Family` takes, such as guided_unet and vae.
        """
        if not isinstance(model, Family):
            precision = {dtype: name for name, dtype in PRECISIONS.items()}.get(torch_dtype)
            if precision is None:
                raise ValueError(f"torch_dtype {torch_dtype} is none of {', '.join(PRECISIONS)}")
            model = Family(str(model), precision=precision, **family)
        if not isinstance(process := model.load_process(), VP):
            raise ValueError(
                f"the pipeline is for networks of a VP process, and {model.model} has {type(process).__name__}: "
                "take InvertibleConsistency.from_pretrained of icd_lightning.editing.consistency"
            )
        method = InvertibleConsistency.from_pretrained(
            model, forward=forward, reverse=reverse, boundaries=boundaries, lora_alpha=lora_alpha
        )
        conditioner, unet = method.conditioner, method.students.network
        sides = [conditioner] if isinstance(conditioner, CLIPConditioner) else [conditioner.first, conditioner.second]
        second = {"text_encoder_2": sides[1].text_encoder, "tokenizer_2": sides[1].tokenizer} if sides[1:] else {}
        _PLANTED[id(unet)] = method.students
        pipe = cls(
            method.autoencoder.vae,
            sides[0].text_encoder,
            sides[0].tokenizer,
            unet,
            DDIMScheduler.from_config(model.source.config("scheduler"), prediction_type=method.process.prediction_type),
            **second,
            boundaries=list(method.boundaries.boundary_timesteps),
            start_timestep=method.boundaries.start_timestep,
            **defaults_of(model, method.boundaries),
        )
        pipe.register_to_config(_name_or_path=model.model)
        return pipe

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder for `from_pretrained`, and for `--model` of the commands: every part, and both students."""
        with replaced_folder(save_directory) as folder:
            for name in ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"):
                if getattr(self, name) is not None:
                    getattr(self, name).save_pretrained(folder / name)
            bare = self.students.backbone.bare(self.unet)
            bare.save_pretrained(folder / "unet_guided")
            bare.save_config(folder / "unet")  # sizes of the family; the plain teacher is not known here
            for direction in DIRECTIONS:
                file = self.students.file(
                    direction, {name: self.config[name] for name in ("boundaries", "start_timestep")}
                )
                write_diffusers(file, folder / "students" / direction)
            defaults = EditingDefaults(self.config.guidance_scale, self.config.tau, self.config.closed_vocabulary)
            write_json(folder / "icd.json", asdict(defaults))
            self.save_config(folder)

    @property
    def _execution_device(self) -> torch.device:
        """As diffusers has it, which asks every module there is; where nothing is offloaded one weight knows."""
        offloaded = hasattr(self.unet, "_hf_hook") or hasattr(self.unet, "_diffusers_hook")
        return super()._execution_device if offloaded else self.students.backbone.weight(self.unet).device

    def unknown_words(self, *prompts: str) -> list[str]:
        """Words that a family with a closed vocabulary has never seen: what they do to a picture is arbitrary."""
        return unknown_words(self.tokenizer, *prompts) if self.config.closed_vocabulary else []
