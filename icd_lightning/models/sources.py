"""Where the parts of a model come from: a folder in diffusers' layout, the hub, a single file, or a random generator.

Parts go by their names in diffusers' layout: unet, vae, text_encoder, tokenizer, scheduler; SDXL has text_encoder_2 and
tokenizer_2 besides.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import huggingface_hub
import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, load_single_file_checkpoint
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel, Qwen2Tokenizer, Qwen3Model, T5EncoderModel, T5Tokenizer
from transformers.modeling_utils import local_torch_dtype

from icd_lightning.files import read_object
from icd_lightning.models.chat import build_chat_tokenizer
from icd_lightning.models.released import SHIPPED
from icd_lightning.models.text import build_t5_tokenizer, build_tokenizer
from icd_lightning.models.weights import first_line, refuse_missing, refuse_not_finite, told_of

RANDOM = "random:"
NETWORKS = ("transformer", "unet")
"""The part that is the network: a model has one of these."""
MOST_LAYERS = 1000
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # of SD1.5 and SDXL; a single file does not hold it
PAD_TOKENS = {"tokenizer_2": "!"}  # SDXL's second text encoder was trained so
SINGLE_FILES = {  # a key by which a single file is known to be of one of our architectures
    "sdxl": "conditioner.embedders.1.model.positional_embedding",
    "sd15": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
}

BUILDERS = {T5Tokenizer: build_t5_tokenizer, Qwen2Tokenizer: build_chat_tokenizer}
"""Of tokenizers of random models."""

Result = TypeVar("Result")
Tokenizer = CLIPTokenizer | T5Tokenizer | Qwen2Tokenizer


def shipped(name: str = "tiny") -> Path:
    """The folder of a family whose weights come with the package."""
    return Path(str(files("icd_lightning") / "weights" / name))


def architecture(name: str) -> Path:
    """The folder of the config files, which come with the package, of a model without weights, such as sd15."""
    return Path(str(files("icd_lightning") / "models" / "architectures" / name))


def open_source(model: str, *, variant: str | None = None, config: str | None = None) -> Source:
    """What a model's name stands for.

    Raises FileNotFoundError, with what was tried and what to do, if that is nothing.
    """
    path = shipped(model) if model in SHIPPED else Path(model)
    if any((path / name).is_dir() for name in (*NETWORKS, "vae")):
        return Layout(str(path), variant)
    if model in SHIPPED:
        raise FileNotFoundError(f"{model} is not in this package: train it by `make {model.replace('_', '-')}-weights`")
    if path.is_file():
        return SingleFile(path, None if config is None else Layout(config))
    try:
        if model.startswith(RANDOM):
            name = model.removeprefix(RANDOM)
            folder = architecture(name) if architecture(name).is_dir() else Path(name)
            if not any((folder / part).is_dir() for part in NETWORKS):
                known = ", ".join(sorted(path.name for path in architecture("").iterdir()))
                raise FileNotFoundError(f"there is no architecture {name}: {known} and folders of config files are")
            return Random(Layout(str(folder)))
        if not on_hub(model):
            raise FileNotFoundError(
                f"{path} has none of {', '.join(NETWORKS)}, vae" if path.exists() else f"there is no {path}"
            )
        hub = Layout(model, variant)
        hub.file("model_index.json")
        return hub
    except OSError as error:
        raise FileNotFoundError(
            f"no model {model!r}: {first_line(error)}. A model is a folder in diffusers' layout, a single .safetensors "
            "or .ckpt file, or a hub id; name yours by MODEL=... of make, or --model.init_args.family.model of icd fit "
            "(--model of the other commands). `make demo` needs none"
        ) from error


def on_hub(location: str) -> bool:
    """Whether this is the name of a model on the hub, and not of a folder here."""
    return bool(HUB_ID.fullmatch(location)) and not Path(location).exists()


class Source(ABC):
    """The parts of a model."""

    layout: Layout
    """Where the configs are, for a model that is not in diffusers' layout itself."""
    folder: Path | None = None
    """Where the model is, if it is a folder in that layout."""
    index: Mapping[str, Any] = MappingProxyType({})
    """What the model says of itself as a whole, `model_index.json` in that layout; empty if nothing."""

    def has(self, part: str) -> bool:
        """Whether the model has this part."""
        return self.layout.has(part)

    def config(self, part: str) -> dict[str, Any]:
        """What the part's config file says, without a library's defaults."""
        return self.layout.config(part)

    @abstractmethod
    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        """A part with its weights; ValueError or FileNotFoundError if any of them is missing."""

    @abstractmethod
    def tokenizer(self, part: str, cls: type[Tokenizer] = CLIPTokenizer) -> Tokenizer:
        """A tokenizer."""


@dataclass(frozen=True)
class Layout(Source):
    """A folder in diffusers' layout, or a model on the hub; if it is a single part, that is "".

    Of a model on the hub, what the local cache holds is taken from there, and the rest is downloaded. `variant` picks
    files such as `model.fp16.safetensors`.
    """

    location: str
    variant: str | None = None

    @property
    def folder(self) -> Path | None:
        return None if on_hub(self.location) else Path(self.location)

    def file(self, name: str) -> Path:
        """A small file."""
        if self.folder is not None:
            return self.folder / name
        return Path(self._read(partial(huggingface_hub.hf_hub_download, self.location, name)))

    @cached_property
    def index(self) -> dict[str, Any]:
        file = self.file("model_index.json")
        return read_object(file) if self.folder is None or file.is_file() else {}

    def has(self, part: str) -> bool:
        return self.file(part).is_dir() if self.folder else part in self.index

    def config(self, part: str) -> dict[str, Any]:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        file = self.file(str(Path(part) / name))
        config = read_object(file)
        for key, value in config.items():
            if "layers" in key and isinstance(value, int) and value > MOST_LAYERS:  # made before weights are compared
                raise ValueError(f"{file}: {key} {value} is more than any network has")
        return config

    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        options = {"dtype" if issubclass(cls, PreTrainedModel) else "torch_dtype": dtype, "variant": self.variant}
        if part:
            options["subfolder"] = part
        place = Path(self.location) / part
        named = self.config(part).get("_class_name", cls.__name__)
        if not issubclass(cls, PreTrainedModel) and named != cls.__name__:
            raise ValueError(f"{place} is of class {named!r}, not {cls.__name__}")
        try:
            load = partial(cls.from_pretrained, self.location, output_loading_info=True, **options)
            with told_of(str(place)):
                network, info = self._read(load)
        except OSError as error:
            if self.folder is None:
                raise
            present = sorted(file.name for pattern in ("*.safetensors", "*.bin") for file in place.glob(pattern))
            raise FileNotFoundError(
                f"{place} has no weights{f' of variant {self.variant}' if self.variant else ''} that can be read; it "
                f"holds {', '.join(present) or 'no file of weights'} (name.fp16.safetensors is variant fp16, to be "
                f"named by --variant, of icd fit --model.init_args.family.variant)"
            ) from error
        refuse_missing(sorted(info["missing_keys"]), str(place))
        refuse_not_finite(network, str(place))
        return network

    def tokenizer(self, part: str, cls: type[Tokenizer] = CLIPTokenizer) -> Tokenizer:
        place = Path(self.location) / part
        for name in ("tokenizer_config.json", "tokenizer.json"):
            if (place / name).is_file():
                read_object(place / name)

        def load(**local: bool) -> Tokenizer:
            with told_of(str(place)):
                tokenizer = cls.from_pretrained(self.location, subfolder=part, **local)
            # where there are no files, transformers makes one that knows nothing, or T5's space alone
            if len(tokenizer.get_vocab().keys() - tokenizer.all_special_tokens) <= 1:
                raise FileNotFoundError(f"{place} has no tokenizer: there is neither tokenizer.json nor vocab.json")
            length, pad = tokenizer.model_max_length, tokenizer.pad_token
            if type(length) not in (int, float) or not length > 0 or pad is None:
                raise ValueError(
                    f"{place}/tokenizer_config.json says model_max_length {length!r} and pad_token {pad!r}: one is "
                    "a number of tokens, the other a token; correct it, or copy the file again from where it came"
                )
            return tokenizer

        return self._read(load)

    def _read(self, load: Callable[..., Result]) -> Result:
        """What load(local_files_only=True) returns; and on the hub, if the cache lacks anything, with False."""
        try:
            return load(local_files_only=True)
        except (OSError, EntryNotFoundError):
            if self.folder is not None:
                raise
        try:  # it fails at once, where a download would try for half a minute
            huggingface_hub.model_info(self.location, timeout=10)
        except Exception as error:  # those of the library, whichever it is, that sends the hub's requests, among them
            raise FileNotFoundError(
                f"{self.location} is not in the hub's cache here and cannot be downloaded ({first_line(error)})"
            ) from error
        return load(local_files_only=False)


@dataclass(frozen=True)
class SingleFile(Source):
    """All weights in one file, the form in which Stable Diffusion was first released, and most of what came of it.

    Such a file holds neither configs nor a tokenizer, so `configs` is a model that does. None: the configs are the
    package's, for SD1.5 or SDXL as the file's keys tell, and the tokenizer is CLIP's, from the hub or its cache.
    """

    file: Path
    configs: Layout | None = None

    @cached_property
    def layout(self) -> Layout:
        if self.configs is not None:
            return self.configs
        weights = self._weights()
        name = next((name for name, key in SINGLE_FILES.items() if key in weights), None)
        if name is None:
            raise ValueError(
                f"{self.file} is neither Stable Diffusion 1.5 nor SDXL, for it has no weight named "
                f"{' or '.join(SINGLE_FILES.values())}: if it is another model of the same kind, name a folder in "
                "diffusers' layout that fits it by --config (icd fit: --model.init_args.family.config)"
            )
        return Layout(str(architecture(name)))

    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        weights, options = self._weights(), {"config": self.layout.location, "subfolder": part}
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
        refuse_not_finite(network, f"{self.file}, {part}")
        return nn.Module.to(network, dtype)  # diffusers' own `to` warns of what is not so

    def tokenizer(self, part: str, cls: type[Tokenizer] = CLIPTokenizer) -> Tokenizer:
        if self.configs is not None:
            return self.configs.tokenizer(part, cls)
        try:
            return _padded(Layout(CLIP_TOKENIZER).tokenizer(""), part)
        except OSError as error:
            raise FileNotFoundError(
                f"{self.file} has no tokenizer, as no single file has, and {first_line(error)}: name a folder in "
                f"diffusers' layout with {part}/ by --config (icd fit: --model.init_args.family.config)"
            ) from error

    def _weights(self) -> dict[str, Tensor]:
        """By reference to the file, where its format allows; read anew for each part, so that none stays in memory."""
        try:
            return load_single_file_checkpoint(str(self.file))
        except MemoryError:
            raise
        except Exception as error:  # see `read_pickled`
            raise ValueError(f"{self.file} cannot be read as a file of weights ({first_line(error)})") from error


@dataclass(frozen=True)
class Loaded(Source):
    """Parts in memory, by name; one that the model does not have may be None."""

    parts: Mapping[str, Any]

    def has(self, part: str) -> bool:
        return self.parts.get(part) is not None

    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        return self.parts[part]

    def tokenizer(self, part: str, cls: type[Tokenizer] = CLIPTokenizer) -> Tokenizer:
        return self.parts[part]


@dataclass(frozen=True)
class Random(Source):
    """Networks of a true architecture with random weights, the same ones every time, for trials of everything else."""

    layout: Layout

    def network(
        self, part: str, cls: type[nn.Module], dtype: torch.dtype, *, config: dict[str, Any] | None = None
    ) -> nn.Module:
        """A part with random weights; `config` in the place of its own, for parts that the configs lack."""
        config = self.config(part) if config is None else config
        # made in this type, not cast to it: SDXL's UNet takes 5 GB instead of 15
        network = f"{cls.__name__} of {self.layout.location}"
        with told_of(network), torch.random.fork_rng(devices=[]), local_torch_dtype(dtype):
            torch.manual_seed(zlib.crc32(part.encode()))
            if not issubclass(cls, PreTrainedModel):
                return cls.from_config(config)
            if issubclass(cls, (T5EncoderModel, Qwen3Model)):
                return cls(cls.config_class(**config))
            tokenizer = self.tokenizer(part.replace("text_encoder", "tokenizer"))
            special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            return cls(cls.config_class(**{**config, **special}))

    def tokenizer(self, part: str, cls: type[Tokenizer] = CLIPTokenizer) -> Tokenizer:
        """One that knows bytes alone, which any text encoder's vocabulary has room for."""
        if cls in BUILDERS:
            return BUILDERS[cls]()
        length = self.config(part.replace("tokenizer", "text_encoder"))["max_position_embeddings"]
        return _padded(build_tokenizer((), length), part)


def _padded(tokenizer: CLIPTokenizer, part: str) -> CLIPTokenizer:
    tokenizer.pad_token = PAD_TOKENS.get(part, tokenizer.pad_token)
    return tokenizer
