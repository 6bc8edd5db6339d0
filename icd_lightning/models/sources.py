"""Where the parts of a model come from: a folder in diffusers' layout, the hub, a single file, or a random generator.

Parts go by their names in diffusers' layout: unet, vae, text_encoder, tokenizer, scheduler; SDXL has text_encoder_2 and
tokenizer_2 besides.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, TypeVar

import huggingface_hub
import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, load_single_file_checkpoint
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel

from icd_lightning.files import read_object
from icd_lightning.models.tokenizer import build_tokenizer

RANDOM = "random:"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # of SD1.5 and SDXL; a single file does not hold it
TOKENIZER_OPTIONS = {"tokenizer_2": {"pad_token": "!"}}  # SDXL's second text encoder was trained so
SINGLE_FILES = {  # a key by which a single file is known to be of one of our architectures
    "sdxl": "conditioner.embedders.1.model.positional_embedding",
    "sd15": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
}
GUIDANCE_WIDTH = 512  # of its guidance embedding, where its weights are random; that of the released ones

Result = TypeVar("Result")


class Source(Protocol):
    """The parts of a model."""

    def has(self, part: str) -> bool:
        """Whether the model has this part."""

    def config(self, part: str) -> dict[str, Any]:
        """What the part's config file says, without a library's defaults."""

    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """A part with its weights; ValueError or FileNotFoundError if any of them is missing."""

    def tokenizer(self, part: str) -> CLIPTokenizer:
        """A tokenizer."""


def shipped(name: str = "tiny") -> Path:
    """The folder of a family whose weights come with the package."""
    return Path(str(files("icd_lightning") / "weights" / name))


def architecture(name: str) -> Path:
    """The folder of the config files, which come with the package, of a network without weights: sd15 or sdxl."""
    return Path(str(files("icd_lightning") / "models" / "architectures" / name))


def open_source(model: str, *, variant: str | None = None, config: str | None = None) -> Source:
    """What a model's name stands for; FileNotFoundError, with what was tried and what to do, if that is nothing."""
    path = shipped() if model == "tiny" else Path(model)
    if any((path / part).is_dir() for part in ("unet", "vae")):
        return Folder(str(path), variant)
    if path.is_file():
        return SingleFile(path, None if config is None else _configs(config))
    try:
        if model.startswith(RANDOM):
            return Random.of(model.removeprefix(RANDOM))
        if path.exists() or not HUB_ID.fullmatch(model):
            raise FileNotFoundError(f"{path} has neither unet/ nor vae/" if path.exists() else f"there is no {path}")
        hub = Hub(model, variant)
        hub.index()
        return hub
    except OSError as error:
        raise FileNotFoundError(
            f"no model {model!r}: {first_line(error)}. A model is a folder in diffusers' layout, a single .safetensors "
            "or .ckpt file, or a hub id; name yours by MODEL=... of make, or --model.init_args.family.model of icd fit "
            "(--model of the other commands). `make demo` needs none"
        ) from error


def _configs(location: str) -> Folder | Hub:
    return Hub(location) if HUB_ID.fullmatch(location) and not Path(location).exists() else Folder(location)


@dataclass(frozen=True)
class Folder:
    """A folder in diffusers' layout; `variant` picks files such as `model.fp16.safetensors`."""

    location: str
    variant: str | None = None

    def has(self, part: str) -> bool:
        return (Path(self.location) / part).is_dir()

    def config(self, part: str) -> dict[str, Any]:
        return read_object(Path(self.location) / part / _config_name(part))

    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        return network_in(Path(self.location) / part, cls, dtype, variant=self.variant)

    def tokenizer(self, part: str) -> CLIPTokenizer:
        if not self.has(part):
            raise FileNotFoundError(f"{self.location} has no {part}/")
        return _tokenizer(str(Path(self.location) / part))


@dataclass(frozen=True)
class Hub:
    """A model on the hub. What the local cache holds is taken from there; the rest is downloaded."""

    location: str
    variant: str | None = None

    def index(self) -> dict[str, Any]:
        """The list of the model's parts."""
        return self._read("model_index.json")

    def has(self, part: str) -> bool:
        return part in self.index()

    def config(self, part: str) -> dict[str, Any]:
        return self._read(f"{part}/{_config_name(part)}")

    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        return network_on_hub(self.location, cls, dtype, variant=self.variant, subfolder=part)

    def tokenizer(self, part: str, **options: Any) -> CLIPTokenizer:
        return cached_first(
            self.location, lambda **local: _tokenizer(self.location, subfolder=part, **options, **local)
        )

    def _read(self, name: str) -> dict[str, Any]:
        return read_object(config_on_hub(self.location, name))


@dataclass(frozen=True)
class SingleFile:
    """All weights in one file, the form in which Stable Diffusion was first released, and most of what came of it.

    Such a file holds neither configs nor a tokenizer, so `configs` is a model that does. None: the configs are the
    package's, for SD1.5 or SDXL as the file's keys tell, and the tokenizer is CLIP's, from the hub or its cache.
    """

    file: Path
    configs: Folder | Hub | None = None

    def has(self, part: str) -> bool:
        return self._configs().has(part)

    def config(self, part: str) -> dict[str, Any]:
        return self._configs().config(part)

    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        weights = self._weights()
        options = {"config": self._configs(weights).location, "subfolder": part}
        try:
            if issubclass(cls, PreTrainedModel):
                network = create_diffusers_clip_model_from_ldm(cls, weights, **options)
            else:
                network = cls.from_single_file(weights, **options)
        except NotImplementedError as error:  # diffusers would move what it found no weights for
            raise ValueError(f"{self.file} lacks weights of its {part}") from error
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{self.file} holds no such {part} as {options['config']}: {first_line(error)}") from error
        refuse_missing([n for n, w in network.named_parameters() if w.is_meta], f"{self.file}, {part},")
        return nn.Module.to(network, dtype)  # diffusers' own `to` warns of what is not so

    def tokenizer(self, part: str) -> CLIPTokenizer:
        if self.configs is not None:
            return self.configs.tokenizer(part)
        try:
            return Hub(CLIP_TOKENIZER).tokenizer("", **TOKENIZER_OPTIONS.get(part, {}))
        except OSError as error:
            raise FileNotFoundError(
                f"{self.file} has no tokenizer, as no single file has, and {first_line(error)}: name a folder in "
                f"diffusers' layout with {part}/ by --config (icd fit: --model.init_args.family.config)"
            ) from error

    def _configs(self, weights: dict[str, Tensor] | None = None) -> Folder | Hub:
        if self.configs is not None:
            return self.configs
        weights = self._weights() if weights is None else weights
        for name, key in SINGLE_FILES.items():
            if key in weights:
                return Folder(str(architecture(name)))
        raise ValueError(
            f"{self.file} is neither Stable Diffusion 1.5 nor SDXL, for it has no weight named "
            f"{' or '.join(SINGLE_FILES.values())}: if it is another model of the same kind, name a folder in "
            "diffusers' layout that fits it by --config (icd fit: --model.init_args.family.config)"
        )

    def _weights(self) -> dict[str, Tensor]:
        """By reference to the file, where its format allows; read anew for each part, so that none stays in memory."""
        try:
            return load_single_file_checkpoint(str(self.file))
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.file} cannot be read as a file of weights ({first_line(error)})") from error


@dataclass(frozen=True)
class Random:
    """Networks of a true architecture with random weights, the same ones every time, for trials of everything else."""

    configs: Folder
    seed: int = 0

    @classmethod
    def of(cls, name: str) -> Random:
        """Of one of the package's architectures, or of a folder of config files in diffusers' layout."""
        folder = architecture(name) if architecture(name).is_dir() else Path(name)
        if not (folder / "unet").is_dir():
            raise FileNotFoundError(f"there is no architecture {name}: sd15, sdxl and folders of config files are")
        return cls(Folder(str(folder)))

    def has(self, part: str) -> bool:
        return self.configs.has(part)

    def config(self, part: str) -> dict[str, Any]:
        return self.configs.config(part)

    def network(
        self, part: str, cls: type[nn.Module], dtype: torch.dtype, *, config: dict[str, Any] | None = None
    ) -> nn.Module:
        """A part with random weights; `config` in the place of its own, for parts that the configs lack."""
        config = self.config(part) if config is None else config
        with torch.random.fork_rng(devices=[]), _default_dtype(dtype):
            torch.manual_seed(self.seed + zlib.crc32(part.encode()))
            if not issubclass(cls, PreTrainedModel):
                return cls.from_config(config)
            tokenizer = self.tokenizer(part.replace("text_encoder", "tokenizer"))
            special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            return cls(cls.config_class(**{**config, **special}))

    def tokenizer(self, part: str) -> CLIPTokenizer:
        """One that knows bytes alone, which any text encoder's vocabulary has room for."""
        length = self.config(part.replace("tokenizer", "text_encoder"))["max_position_embeddings"]
        tokenizer = build_tokenizer((), length)
        for name, value in TOKENIZER_OPTIONS.get(part, {}).items():
            setattr(tokenizer, name, value)
        return tokenizer


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New networks are made in this type, not cast to it: SDXL's UNet takes 5 GB instead of 15."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def network_in(folder: Path, cls: type[nn.Module], dtype: torch.dtype, *, variant: str | None = None) -> nn.Module:
    """Load a network from its folder."""
    try:
        return _from_pretrained(str(folder), cls, dtype, variant=variant, local_files_only=True)
    except OSError as error:
        present = sorted(file.name for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
        raise FileNotFoundError(
            f"{folder} has no weights{f' of variant {variant}' if variant else ''} that can be read; it holds "
            f"{', '.join(present) or 'no file of weights'} (name.fp16.safetensors is variant fp16, to be named by "
            f"--variant, of icd fit --model.init_args.family.variant)"
        ) from error


def network_on_hub(
    name: str, cls: type[nn.Module], dtype: torch.dtype, *, variant: str | None = None, subfolder: str | None = None
) -> nn.Module:
    """Load a network from the hub or its cache."""
    options = {} if subfolder is None else {"subfolder": subfolder}
    return cached_first(name, lambda **local: _from_pretrained(name, cls, dtype, variant=variant, **options, **local))


def config_on_hub(name: str, file: str = "config.json") -> Path:
    """A small file from the hub or its cache."""
    return Path(cached_first(name, lambda **local: huggingface_hub.hf_hub_download(name, file, **local)))


def _from_pretrained(location: str, cls: type[nn.Module], dtype: torch.dtype, **options: Any) -> nn.Module:
    precision = "dtype" if issubclass(cls, PreTrainedModel) else "torch_dtype"
    network, info = cls.from_pretrained(location, output_loading_info=True, **{precision: dtype}, **options)
    refuse_missing(sorted(info["missing_keys"]), location)
    return network


def _tokenizer(location: str, **options: Any) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(location, **options)
    if len(tokenizer) <= 2:  # where there are no files, transformers makes one that knows nothing
        raise FileNotFoundError(f"{location} has no tokenizer: there is neither tokenizer.json nor vocab.json")
    return tokenizer


def cached_first(name: str, load: Callable[..., Result]) -> Result:
    """Call load(local_files_only=True), and if the cache lacks anything, load(local_files_only=False)."""
    try:
        return load(local_files_only=True)
    except (OSError, EntryNotFoundError):
        pass
    try:
        huggingface_hub.model_info(name, timeout=10)  # it fails at once, where a download would try for half a minute
    except Exception as error:  # those of the library, whichever it is, that sends the hub's requests, among them
        raise FileNotFoundError(
            f"{name} is not in the hub's cache here and cannot be downloaded ({first_line(error)})"
        ) from error
    return load(local_files_only=False)


def refuse_missing(names: list[str], where: str) -> None:
    """Libraries would fill weights that are not there with random ones, and say so in a warning at most."""
    if names:
        raise ValueError(f"{where} lacks {len(names)} of the network's weights, for example {names[0]}")


def read_weights(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict in this type, safetensors or pickled; nothing in a pickle is run."""
    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} cannot be read as a file of weights ({first_line(error)})") from error
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{file} holds something else than one network's state dict, a dict of tensors by name")
    return {name: weight.to(dtype) for name, weight in weights.items()}


def first_line(error: Exception) -> str:
    """The gist of another library's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:")


def _config_name(part: str) -> str:
    return "scheduler_config.json" if part == "scheduler" else "config.json"
