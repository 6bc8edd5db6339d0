"""A model family: its frozen parts, wherever they come from. SD1.5, SDXL and tiny differ in what `model` names."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2
from torch import nn

from icd_lightning.diffusion import Direction, Process
from icd_lightning.files import read_object
from icd_lightning.models.archives import fetched
from icd_lightning.models.autoencoder import LatentAutoencoder, downsampling_of, latent_channels_of, patch_of
from icd_lightning.models.backbones import TRANSFORMERS, Backbone, UNet
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.overlay import open_model
from icd_lightning.models.quantization import Quantization, quantize
from icd_lightning.models.released import RELEASED, located
from icd_lightning.models.sources import Layout, Random, Source
from icd_lightning.models.student_file import WEIGHTS_NAME
from icd_lightning.models.text import Conditioner, DualCLIPConditioner
from icd_lightning.models.weights import told_of

AUTOENCODERS: dict[str, type] = {one.__name__: one for one in (AutoencoderKL, AutoencoderDC, AutoencoderKLFlux2)}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DISTRIBUTION_MATCHED = r"FLUX\.1-schnell|FLUX\.2-klein(?!-base)|Z-Image-Turbo|stable-diffusion-3\.5-large-turbo"
MOST_PIXELS = 1 << 15
GUIDANCE_WIDTH = 512  # of the guidance embedding where weights are random; that of the released ones

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditingDefaults:
    """How a family is best guided, where nobody says otherwise: `icd.json` in its folder, or the paper's for SD1.5."""

    guidance_scale: float = 8.0
    tau: float = 0.8
    closed_vocabulary: bool = False  # it knows those words only that its tokenizer keeps whole

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "tau"):
            if type(getattr(self, name)) not in (int, float):
                raise ValueError(f"{name} {getattr(self, name)!r} is no number")
        if not (0 <= self.guidance_scale < math.inf and 0 <= self.tau <= 1):
            raise ValueError(f"guidance_scale {self.guidance_scale} or tau {self.tau} is out of range")
        if not isinstance(self.closed_vocabulary, bool):
            raise ValueError(f"closed_vocabulary {self.closed_vocabulary!r} is neither true nor false")


@dataclass(frozen=True)
class Family:
    """A model family, and how to load each part; nothing is loaded before it is asked for.

    Args:
        model: "tiny" or "tiny_flow" (shipped), a released one such as "icd-sd15" (`icd models`), a folder in diffusers'
            layout, a single .safetensors or .ckpt file, a hub id, or "random:sd15", likewise sdxl, sd3, sd35_large,
            flux_dev, flux2_klein and z_image: random weights of that architecture, for trials.
        guided_unet: the guidance-distilled UNet of stage 1: the folder of a run of stage 1 or of its UNet, a file, a
            released one such as "sd15-cfg-distill", or a folder inside the model's.
        vae: another autoencoder in place of the model's own, a folder or a hub id: SDXL's own gives NaN in float16 and
            is kept in float32, `madebyollin/sdxl-vae-fp16-fix` is not.
        style: a style LoRA to merge into the network, FILE or FILE:SCALE.
        precision: type of the frozen weights.
        variant: of the model's files, e.g. fp16 for `diffusion_pytorch_model.fp16.safetensors`.
        prediction_type: what the UNet predicts, where the model's scheduler config is wrong or a single file has none.
        config: a folder in diffusers' layout, or a hub id, whose configs and tokenizer a single file is read with.
        backbone: the architecture of its network; by default the one that its files name.
        trained_at: pixels of a side of the pictures that students are trained on, if other than the model's own. It
            fixes the shift of a flow that has one by resolution, such as FLUX.1-dev's.
        quantization: of the linear layers of the frozen network's blocks, to train and sample in less memory.
    """

    model: str = "tiny"
    guided_unet: str | None = None
    vae: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    variant: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    config: str | None = None
    style: str | None = None
    backbone: Backbone | None = None
    trained_at: int | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.trained_at is not None and not 0 < self.trained_at <= MOST_PIXELS:
            raise ValueError(f"trained_at {self.trained_at} is no side of pictures, in pixels: name one such as 512")

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @cached_property
    def source(self) -> Source:
        """Where the parts come from; FileNotFoundError, with what to do, if there is no such model."""
        return open_model(self.model, variant=self.variant, config=self.config)

    @cached_property
    def architecture(self) -> Backbone:
        """The backbone, as told or as the model's files name its class.

        ValueError for a class that has none here, and for a model that is known to be no teacher.
        """
        if re.search(DISTRIBUTION_MATCHED, self.model, re.IGNORECASE) or self.source.index.get("is_distilled"):
            raise ValueError(
                f"the few steps of {self.model} match a distribution and follow no probability flow: students cannot "
                "be distilled from it; take the model that it was made of"
            )
        if self.backbone is not None:
            return self.backbone
        if not self.source.has("transformer"):
            return UNet()
        name = self.source.config("transformer").get("_class_name")
        if name not in TRANSFORMERS:
            raise ValueError(
                f"the transformer of {self.model} is of class {name!r}, for which there is no backbone here; known: "
                f"{', '.join(TRANSFORMERS)}. Name one of yours by family.backbone (icd fit) or --backbone"
            )
        return TRANSFORMERS[name]()

    @property
    def root(self) -> Path:
        """The model's folder; ValueError if the model is none."""
        if self.source.folder is None:
            raise ValueError(
                f"model {self.model!r} is not a folder, so it brings no students: name both (--forward and --reverse)"
            )
        return self.source.folder

    def student(self, direction: Direction, told: str | None = None) -> Path:
        """Where a student is: as told, of a released model or a path; else the model's own, ValueError if it has none.

        FileNotFoundError for a released model that is not here.
        """
        if told is not None:
            return Path(located(told), "students", direction) if told in RELEASED else Path(told)
        if self.source.folder is None and "students" in self.source.index:
            return self.source.file(f"students/{direction}/{WEIGHTS_NAME}")
        return self.root / "students" / direction

    @property
    def named_guided(self) -> str | None:
        """The guidance-distilled network, if it is named: as told, or as the model says; a released one by its file.

        A released one that the model names is downloaded if it is not here, as the model's own parts are.
        """
        if self.guided_unet is not None:
            return located(self.guided_unet)
        name = self.source.index.get("guided_unet")
        return name and fetched(str(name))

    @property
    def resolution(self) -> int:
        """Pixels of a side of the pictures that the network was trained on, or its students."""
        if self.trained_at is not None:
            return self.trained_at
        part, usual = self.architecture.part, self.architecture.sample_size
        size = {"sample_size": usual, **self.source.index, **self.source.config(part)}["sample_size"]
        if type(size) is not int or not 0 < size <= 1 << 12:
            raise ValueError(
                f"{self.model}/{part}/config.json: sample_size {size!r} is no side of latents: it is a whole number, "
                "such as 64"
            )
        return size * downsampling_of(self._autoencoder_config())

    def check_side(self, pixels: int) -> None:
        """Compare the side of pictures to train on with trained_at, or else with the model's own.

        Another than trained_at is a ValueError, and so is another than the model's where the shift of its flow goes by
        it; else it may be meant, and is told of.
        """
        if not self.source.has(self.architecture.part) or pixels == self.resolution:
            return
        ours = f"{self.model} is of" if self.trained_at is None else "family.trained_at is"
        text = f"data are of {pixels} pixels a side, {ours} {self.resolution}: give family.trained_at {pixels}"
        if self.trained_at is not None or self.source.config("scheduler").get("use_dynamic_shifting"):
            raise ValueError(f"{text}, or data of {self.resolution}")
        log.warning("%s, and --trained_at where the students are used", text)

    def check(self) -> None:
        """Say at once, not after minutes of loading, that stage 2 would miss the model or its guided UNet."""
        self._guided_network()

    def load_defaults(self) -> EditingDefaults:
        """What the model's folder says; ValueError for anything else than a JSON object of these fields."""
        if self.source.folder is None or not (file := self.source.folder / "icd.json").is_file():
            return EditingDefaults()
        try:
            return EditingDefaults(**read_object(file))
        except (ValueError, TypeError) as error:
            known = ", ".join(field.name for field in fields(EditingDefaults))
            raise ValueError(f"{file} must be a JSON object with {known} ({error})") from error

    def load_process(self) -> Process:
        changes = {} if self.prediction_type is None else {"prediction_type": self.prediction_type}
        try:
            config = {**self.source.config("scheduler"), **changes}
            tokens = self._tokens() if config.get("use_dynamic_shifting") else None
            return Process.from_config(self.architecture.scheduler(config, tokens) if tokens else config, tokens)
        except ValueError as error:
            raise ValueError(f"{self.model}/scheduler: {error}") from error

    def _tokens(self) -> int:
        """Patches in a picture, of 2 x 2 of what an autoencoder's network makes."""
        config = self._autoencoder_config()
        return (self.resolution * patch_of(config) // downsampling_of(config) // 2) ** 2

    def load_autoencoder(self) -> LatentAutoencoder:
        if self.vae is not None:
            return load_autoencoder(self.vae, self.dtype)
        return _autoencoder(self.source, "vae", self.dtype, f"the autoencoder of {self.model}")

    def _autoencoder_config(self) -> dict[str, Any]:
        return self.source.config("vae") if self.vae is None else Layout(self.vae).config("")

    def load_conditioner(self) -> Conditioner:
        """The frozen text side; where it tells sizes of pictures, by default the model's own."""
        conditioner = self.architecture.conditioner(self.source, self.dtype)
        if isinstance(conditioner, DualCLIPConditioner):
            return conditioner.for_size(self.resolution, self.resolution)
        return conditioner

    def load_model(self, *, guided: bool) -> DiffusionModel:
        """The plain teacher, or the guidance-distilled one of stage 1, which may be the same; frozen."""
        load = self._guided_network() if guided else self._plain_network()
        network = load().requires_grad_(False).eval()
        self._check_channels(network)
        if self.style is not None:
            self.architecture.merge_lora(network, *parse_style(self.style))
        if self.quantization is not None:
            quantize(network, self.architecture.blocks, self.quantization)
        return DiffusionModel(network, self.load_process(), self.architecture)

    def hollow_network(self) -> nn.Module:
        """The plain network on the meta device, without weights, to see what it is made of."""
        config = self.source.config(self.architecture.part)
        with told_of(f"{self.model}/{self.architecture.part}"), torch.device("meta"):
            return self.architecture.network_class.from_config(config)

    def _plain_network(self) -> Callable[[], nn.Module]:
        part, cls = self.architecture.part, self.architecture.network_class
        self.architecture.check_teacher(self.source.config(part))
        return partial(self.source.network, part, cls, self.dtype)

    def _check_channels(self, network: nn.Module) -> None:
        """Refuse networks that are fed more than latents, such as those for inpainting."""
        taken, config = self.architecture.latent_channels(network), self._autoencoder_config()
        if "latent_channels" in config and taken != (latent := latent_channels_of(config)):
            raise ValueError(
                f"the {self.architecture.part} of {self.model} takes {taken} channels, and its latents have {latent}: "
                "it is made for more than pictures from prompts (inpainting, depth, ...); take the plain model instead"
            )

    def _guided_network(self) -> Callable[[], nn.Module]:
        """How to load the guidance-distilled network; FileNotFoundError, with what to do, if there is none."""
        backbone, source, named = self.architecture, self.source, self.named_guided
        usual = f"{backbone.part}_guided"
        plain = self._plain_network()
        if named is None and backbone.is_guided(source.config(backbone.part)):
            return plain
        path = Path(named or usual)
        if named and path.is_file():
            return partial(backbone.guided_from_file, path, source.config(backbone.part), self.dtype)
        folders = [path, path / usual] if named else []
        if source.folder is not None:
            folders.append(source.folder / path)
        for folder in folders:
            if (folder / "config.json").is_file():
                variant = self.variant if list(folder.glob(f"*.{self.variant}.*")) else None
                return partial(Layout(str(folder), variant).network, "", backbone.network_class, self.dtype)
        if named in (None, usual):
            if isinstance(source, Random):
                config = backbone.config_with_guidance(source.config(backbone.part), GUIDANCE_WIDTH)
                return partial(source.network, usual, backbone.network_class, self.dtype, config=config)
            if source.has(usual):
                return partial(source.network, usual, backbone.network_class, self.dtype)
        raise FileNotFoundError(
            f"no guidance-distilled {backbone.part} (stage 1) for {self.model}: looked for a file {path} and for "
            f"config.json in {', '.join(dict.fromkeys(map(str, folders)))}. Make one with "
            "conf/task/guidance_distillation.yaml, or take a released one (`icd models`); name it by "
            "GUIDED=... of make, or --model.init_args.family.guided_unet of icd fit, --guided_unet of other commands. "
            "`make demo` needs none"
        )


def load_autoencoder(location: str | Path, dtype: torch.dtype = torch.float32) -> LatentAutoencoder:
    """Load the autoencoder in a folder or on the hub, of whichever class its config names."""
    layout = Layout(str(location))
    if not (file := layout.file("config.json")).is_file():
        raise FileNotFoundError(f"no autoencoder at {location}: there is no {file}")
    return _autoencoder(layout, "", dtype, str(location))


def _autoencoder(source: Source, part: str, dtype: torch.dtype, name: str) -> LatentAutoencoder:
    """By its config."""
    config = source.config(part)
    cls = AUTOENCODERS.get(str(config.get("_class_name")))
    if cls is None:
        raise ValueError(
            f"{name} is of class {config.get('_class_name')!r}; known autoencoders: {', '.join(AUTOENCODERS)}"
        )
    if dtype == torch.float16 and config.get("force_upcast"):  # as SDXL's config says, whose activations overflow
        log.warning(
            "%s gives NaN in float16 (force_upcast in its config): it stays in float32. An autoencoder that does "
            "not need this, such as madebyollin/sdxl-vae-fp16-fix, is named by family.vae",
            name,
        )
        dtype = torch.float32
    return LatentAutoencoder(source.network(part, cls, dtype))


def parse_style(style: str) -> tuple[Path, float]:
    """The file and the scale, by default 1, of a style `FILE:SCALE`; ValueError for no file, or no such scale."""
    name, _, text = style.rpartition(":")
    try:
        file, scale = (Path(style), 1.0) if not name or Path(style).is_file() else (Path(name), float(text))
    except ValueError:
        raise ValueError(f"style {style!r} must be FILE or FILE:SCALE, SCALE a number") from None
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"style {style!r}: there is no .safetensors file {file}")
    if not math.isfinite(scale):
        raise ValueError(f"style {style!r}: scale {scale} is not finite")
    return file, scale
