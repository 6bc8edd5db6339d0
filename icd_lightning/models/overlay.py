"""Students, and the network they adapt, in a place of their own: the other parts are a base model's, wherever that is.

Such a place is a folder, or a model on the hub, that holds

    students/forward/, students/reverse/
    unet_guided/        in diffusers' layout, unless `guided_unet` below names a released one
    model_index.json    {"base_model": "someone/some-model", "guided_unet": "sd15-cfg-distill", "tau": 0.8, ...}

A released UNet is downloaded at the first use, as the base model is.
`icd download` makes one of each released model, `icd push` one of a run; who writes the JSON makes one of his own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTokenizer

from icd_lightning.models.released import find, located
from icd_lightning.models.sources import HUB_ID, Layout, Source, Tokenizer, open_source
from icd_lightning.models.weights import first_line


@dataclass(frozen=True)
class Overlay(Source):
    """What a place holds comes from there, the rest from a base model."""

    own: Layout
    base: Source

    @property
    def layout(self) -> Layout:
        return self.base.layout

    @property
    def folder(self) -> Path | None:
        return self.own.folder

    @property
    def index(self) -> dict[str, Any]:
        return self.own.index

    def file(self, name: str) -> Path:
        return self.own.file(name)

    def has(self, part: str) -> bool:
        return self.own.has(part) or self.base.has(part)

    def config(self, part: str) -> dict[str, Any]:
        return self._of(part).config(part)

    def network(self, part: str, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        return self._of(part).network(part, cls, dtype)

    def tokenizer(self, part: str, cls: type[Tokenizer] = CLIPTokenizer) -> Tokenizer:
        return self._of(part).tokenizer(part, cls)

    def _of(self, part: str) -> Source:
        return self.own if self.own.has(part) else self.base


def open_model(model: str, *, variant: str | None = None, config: str | None = None) -> Source:
    """What a model's name stands for: a released model, an overlay, or whatever `open_source` knows.

    Raises FileNotFoundError, with what to do, if that is nothing or not here, and ValueError for an overlay whose
    `model_index.json` says what it must not.
    """
    place, opened = located(model), partial(open_source, variant=variant, config=config)
    own: Any = Layout(place) if Path(place, "model_index.json").is_file() else opened(place)
    if "base_model" not in own.index:
        return opened(place)
    base, guided = own.index["base_model"], own.index.get("guided_unet")
    if not isinstance(base, str) or (own.folder is None and not HUB_ID.fullmatch(base)):
        raise ValueError(f"{place}/model_index.json says base_model {base!r}: it is a model's id on the hub")
    if guided is not None and find(str(guided)).boundaries:
        raise ValueError(f"{place}/model_index.json says guided_unet {guided!r}, which are students: name a UNet")
    try:
        return Overlay(Layout(own.location), opened(base))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base model of {model}: {first_line(error.__cause__ or error)}. If it is in a folder, name that by "
            "--model, and the rest by --guided_unet, --forward and --reverse"
        ) from error
