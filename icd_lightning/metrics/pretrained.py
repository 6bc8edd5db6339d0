"""Where metrics find the pretrained networks they are defined by: the real ones or none, and nothing is downloaded.

They are read from the folder `ICD_METRICS_HOME`, else from the caches in which torch.hub and the Hugging Face hub keep
what they have fetched. What each metric needs, and under which name, stands in docs/metrics.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from torch import Tensor, nn

from icd_lightning.data.manifest import sha256
from icd_lightning.models.weights import read_weights
from icd_lightning.progress import without_bars


class MissingNetworkError(FileNotFoundError):
    """A pretrained network is not on this machine; the message says what to put where."""


_alive: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


def find_file(url: str) -> Path:
    """The URL's file in ICD_METRICS_HOME or torch.hub's cache; its name ends in its own SHA-256, which must fit."""
    name = url.rsplit("/", 1)[1]
    file = _at_home(name) or Path(torch.hub.get_dir(), "checkpoints", name)
    if not file.is_file():
        raise _missing(url, name)
    if not (digest := sha256(file)).startswith(file.stem.rsplit("-", 1)[1]):
        raise ValueError(f"{file} is damaged or not what its name says (SHA-256 {digest[:8]}); fetch {url} again")
    return file


def find_hub_file(repository: str, name: str) -> Path:
    """A file of a Hugging Face repository, in ICD_METRICS_HOME itself or in the hub's cache."""
    file = _at_home(name) or try_to_load_from_cache(repository, name)
    if not isinstance(file, (str, Path)):
        raise _missing(f"{repository} (hf download {repository} {name})", name)
    return Path(file)


def load_part(repository: str, part: Any, **options: Any) -> Any:
    """A tokenizer or image processor of a Hugging Face repository; `part` is the class that reads it."""
    name = Path(repository).name
    try:  # by its folder: by a repository's name transformers looks online for adapters, whatever it is told
        folder = _at_home(name) or snapshot_download(repository, local_files_only=True)
        with without_bars():
            return part.from_pretrained(folder, local_files_only=True, **options)
    except OSError as error:
        raise _missing(f"{repository} (hf download {repository})", f"{name}/") from error


def load_network(repository: str, **options: Any) -> nn.Module:
    """The network of a Hugging Face repository, float32 and frozen; metrics that are alive share one.

    ValueError if it lacks any of its weights, which transformers would leave random.
    """
    from transformers import AutoModel

    source = str(_at_home(Path(repository).name) or repository)
    if source not in _alive:
        settings = {"output_loading_info": True, "dtype": torch.float32, **options}
        loaded, info = load_part(repository, AutoModel, **settings)
        if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ValueError(f"{source} lacks {len(lacking)} weights, e.g. {lacking[0]}: fetch it again")
        _alive[source] = loaded = frozen(loaded)
    return _alive[source]


def load_weights(file: Path) -> dict[str, Tensor]:
    try:
        return read_weights(file)
    except ValueError as error:
        raise ValueError(f"{error}: fetch it again") from error


def frozen(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False).eval()


def _at_home(name: str) -> Path | None:
    """What has this name in ICD_METRICS_HOME, if there is such a thing."""
    home = os.environ.get("ICD_METRICS_HOME")
    return Path(home, name) if home and Path(home, name).exists() else None


def _missing(source: str, name: str) -> MissingNetworkError:
    folder = os.environ.get("ICD_METRICS_HOME") or "a folder named by ICD_METRICS_HOME"
    return MissingNetworkError(f"put {source} as {name} into {folder}, or go without, e.g. metrics: [psnr, ssim]")
