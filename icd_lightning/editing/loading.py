"""What the pipeline is made of: its parts put together, loaded from a model, saved for the next time."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5EncoderModel,
    T5Tokenizer,
)
from typing_extensions import Self

from icd_lightning.diffusion import VP, Boundaries, Flow, Process
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.defaults import defaults_of, suitable_tau
from icd_lightning.editing.limits import check_fraction, check_guidance_scale
from icd_lightning.files import replaced_folder, write_json
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.backbones import backbone_of
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import PRECISIONS, EditingDefaults, Family
from icd_lightning.models.sources import Loaded
from icd_lightning.models.student_file import write_diffusers
from icd_lightning.models.students import DIRECTIONS, LoraStudents
from icd_lightning.models.text import DualCLIPConditioner, unknown_words

Transformer = FluxTransformer2DModel | Flux2Transformer2DModel | SD3Transformer2DModel | ZImageTransformer2DModel
_PLANTED: WeakValueDictionary[int, LoraStudents] = WeakValueDictionary()
"""The students in a network, by its id: pipelines that share components share them too."""
SUFFIXES = ("", "_2", "_3")  # of the names of text encoders and tokenizers


class StudentPipeline(DiffusionPipeline):
    """A frozen guided network, the two students in it, and what stands between them and pictures and prompts.

    `from_pretrained` loads students. A pipeline made of parts has those that its network carries, or else new ones,
    which begin as the network itself.

    Args:
        unet, transformer: the one that takes w, such as the guidance-distilled network of stage 1; the other is None.
        boundaries: the ends of the students' segments; None: the paper's four.
        guidance_scale: w, where a call does not say.
        tau: of dynamic guidance, where a call does not say; None: what suits the boundaries.
        edit_guidance_scale: w of edits by attention control; None: guidance_scale.
        attention_control: edit by Prompt-to-Prompt where a call does not say; otherwise by swapping the prompt.
        start_timestep: where the forward model begins, slightly noised.
        closed_vocabulary: the family knows those words only that its tokenizer keeps whole.
        resolution: pixels of a side of the pictures that the network was trained on; None: as its config says.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components = ("unet", "transformer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderKLFlux2,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection | Qwen3ForCausalLM | Qwen3Model,
        tokenizer: CLIPTokenizer | Qwen2Tokenizer,
        unet: UNet2DConditionModel | None,  # `from_pipe` of diffusers hands over parts of exactly these types
        scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler,
        text_encoder_2: CLIPTextModelWithProjection | T5EncoderModel | None = None,
        tokenizer_2: CLIPTokenizer | T5Tokenizer | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5Tokenizer | None = None,
        transformer: Transformer | None = None,
        boundaries: list[int] | None = None,
        guidance_scale: float = EditingDefaults.guidance_scale,
        tau: float | None = None,
        edit_guidance_scale: float | None = None,
        attention_control: bool = False,
        closed_vocabulary: bool = False,
        start_timestep: int = Boundaries.start_timestep,
        resolution: int | None = None,
    ) -> None:
        super().__init__()
        ends = Boundaries.uniform(4).boundary_timesteps if boundaries is None else boundaries
        ends = Boundaries(tuple(ends), start_timestep, allow_off_grid=True)
        self.register_modules(vae=vae, unet=unet, transformer=transformer, scheduler=scheduler)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)
        self.register_modules(text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3)
        edit_scale = guidance_scale if edit_guidance_scale is None else edit_guidance_scale
        self.register_to_config(
            boundaries=list(ends.boundary_timesteps),
            guidance_scale=check_guidance_scale(guidance_scale),
            tau=check_fraction(suitable_tau(ends) if tau is None else tau, "tau"),
            edit_guidance_scale=check_guidance_scale(edit_scale, "edit_guidance_scale"),
            attention_control=attention_control,
            closed_vocabulary=closed_vocabulary,
            start_timestep=start_timestep,
            resolution=resolution,
        )
        network = self.network
        process = Process.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})
        students = _PLANTED.get(id(network)) or LoraStudents(DiffusionModel(network, process, backbone_of(network)))
        self.students = _PLANTED[id(network)] = students
        autoencoder, backbone = LatentAutoencoder(vae), students.backbone
        self.boundaries = ends  # of the students' segments
        # pixels of a side of the pictures that the network was trained on
        side = network.config.get("sample_size") or backbone.sample_size
        self.resolution = resolution or int(side) * autoencoder.downsampling
        conditioner = backbone.conditioner(Loaded(self.components), backbone.weight(network).dtype)
        if isinstance(conditioner, DualCLIPConditioner):
            conditioner = conditioner.for_size(self.resolution, self.resolution)
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
        scheduler = scheduler_of(model)
        method = InvertibleConsistency.from_pretrained(
            model, forward=forward, reverse=reverse, boundaries=boundaries, lora_alpha=lora_alpha
        )
        students, parts = method.students, {"unet": None}
        for suffix, side in zip(SUFFIXES, method.conditioner.sides, strict=False):
            parts |= {f"text_encoder{suffix}": side.text_encoder, f"tokenizer{suffix}": side.tokenizer}
        parts[students.backbone.part] = students.network
        _PLANTED[id(students.network)] = students
        pipe = cls(
            method.autoencoder.vae,
            scheduler=scheduler,
            **parts,
            resolution=model.resolution,
            boundaries=list(method.boundaries.boundary_timesteps),
            start_timestep=method.boundaries.start_timestep,
            **defaults_of(model, method.boundaries),
        )
        pipe.register_to_config(_name_or_path=model.model)
        return pipe

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder for `from_pretrained`, and for `--model` of the commands: every part, and both students."""
        with replaced_folder(save_directory) as folder:
            backbone = self.students.backbone
            for name, part in self.components.items():
                if name != backbone.part and part is not None:
                    part.save_pretrained(folder / name)
            bare = backbone.bare(self.network)
            bare.save_config(folder / backbone.part)  # sizes of the family; the plain teacher is not known here
            bare.save_pretrained(folder / f"{backbone.part}{'' if backbone.is_guided(bare.config) else '_guided'}")
            told = {name: self.config[name] for name in ("boundaries", "start_timestep")}
            for direction in DIRECTIONS:
                write_diffusers(self.students.file(direction, told), folder / "students" / direction)
            defaults = EditingDefaults(self.config.guidance_scale, self.config.tau, self.config.closed_vocabulary)
            write_json(folder / "icd.json", asdict(defaults))
            self.save_config(folder)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast as diffusers does; nothing merged stays on a device that is left."""
        self.method.merged = copy(self.method.merged)
        return super().to(*args, **kwargs)

    @property
    def network(self) -> nn.Module:
        return self.unet if self.transformer is None else self.transformer

    @property
    def _execution_device(self) -> torch.device:
        """As diffusers has it, which asks every module there is; where nothing is offloaded one weight knows."""
        network = self.network
        offloaded = hasattr(network, "_hf_hook") or hasattr(network, "_diffusers_hook")
        return super()._execution_device if offloaded else self.students.backbone.weight(network).device

    def unknown_words(self, *prompts: str) -> list[str]:
        """Words that a family with a closed vocabulary has never seen: what they do to a picture is arbitrary."""
        return unknown_words(self.tokenizer, *prompts) if self.config.closed_vocabulary else []


def scheduler_of(family: Family) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """A scheduler of diffusers whose config says the family's process; ValueError where there is none."""
    process = family.load_process()
    if isinstance(process, VP):
        return DDIMScheduler.from_config(family.source.config("scheduler"), prediction_type=process.prediction_type)
    if isinstance(process, Flow):
        return FlowMatchEulerDiscreteScheduler(process.num_train_timesteps, **process.settings)
    raise ValueError(
        f"the pipeline is for networks of a VP process or a flow, and {family.model} has {type(process).__name__}: "
        "take InvertibleConsistency.from_pretrained of icd_lightning.editing.consistency"
    )
