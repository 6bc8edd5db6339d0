"""What every metric of pictures shares: one signature, so that whoever measures passes what there is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize

from icd_lightning.data.images import to_pictures

FACTS = ("higher_is_better", "version", "digits", "factor")  # what a metric states of its values
LIMIT = 1.01  # a decoder may overshoot by rounding; what lies further out was never in [-1, 1]


class PictureMetric(Metric):
    """A torchmetrics Metric that takes, of all that an evaluation has, what its `needs` names.

    images, reference: (B, 3, H, W) in [-1, 1], what a method made and what it should look like; prompts: B texts;
    masks: (B, 1, H, W), 1 where the picture was to be edited; noise: latents (B, C, h, w) that pictures were inverted
    to. ValueError for what is missing or not in this form. States are sums, which torchmetrics adds up over ranks.

    Tables and caches go by what a class states of its values. higher_is_better: None where neither is better. version:
    to be raised when equal pictures get another value. digits: decimals in print, None for three digits in all; factor:
    what values are multiplied by in print, 100 for shares. label: what figures call it. least: pixels that a side of
    pictures must have, of the window or the network that goes over them.
    """

    needs: ClassVar[tuple[str, ...]] = ("images", "reference")
    higher_is_better: ClassVar[bool | None] = None
    version: ClassVar[int] = 1
    digits: ClassVar[int | None] = None
    factor: ClassVar[float] = 1.0
    least: ClassVar[int] = 1
    full_state_update = False

    def update(
        self,
        images: Tensor | None = None,
        reference: Tensor | None = None,
        *,
        prompts: Sequence[str] | None = None,
        masks: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> None:
        self.take(*self._needed(images=images, reference=reference, prompts=prompts, masks=masks, noise=noise))

    @abstractmethod
    def take(self, *inputs: Any) -> None:
        """Take in what `needs` names, in its order."""

    def check_side(self, pixels: int) -> None:
        """ValueError for pictures with so short a side."""
        if pixels < self.least:
            raise ValueError(
                f"{type(self).__name__} is of pictures of {self.least} pixels a side and more, and got a side of "
                f"{pixels}: take larger ones, or another metric"
            )

    def train(self, mode: bool = True) -> PictureMetric:
        """Stay in evaluation mode: LPIPS, for one, holds dropout."""
        return super().train(False)

    def _needed(self, **given: Any) -> list[Any]:
        name = type(self).__name__
        if missing := [need for need in self.needs if given.get(need) is None]:
            raise ValueError(f"{name} needs {' and '.join(missing)}: pass {missing[0]}=... to it")
        inputs = {need: given[need] for need in self.needs}
        for need, value in inputs.items():
            _check(name, need, value)
        if len({len(value) for value in inputs.values()}) > 1:
            lengths = ", ".join(f"{len(value)} {need}" for need, value in inputs.items())
            raise ValueError(f"{name} got {lengths}: give one of each for a picture")
        sizes = {tuple(inputs[need].shape[-2:]) for need in ("images", "reference", "masks") if need in inputs}
        if len(sizes) > 1:
            raise ValueError(f"{name} got pictures of different sizes, {sorted(sizes)}: resize or crop them first")
        self.check_side(min((side for size in sizes for side in size), default=self.least))
        return list(inputs.values())


class PerImage(PictureMetric):
    """The mean over images of one value for each."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @abstractmethod
    def values(self, *inputs: Any) -> Tensor:
        """One value an image (B,), of what `needs` names; NaN where `counted` says that an image has none."""

    def counted(self, *inputs: Any) -> Tensor | slice:
        """Which images have a value, bool (B,) or all."""
        return slice(None)

    def take(self, *inputs: Any) -> None:
        values = self._valued(*inputs)[self.counted(*inputs)]
        self.total += values.sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        return self.total / self.count

    @torch.no_grad()
    def per_image(self, images: Tensor | None = None, reference: Tensor | None = None, **given: Any) -> Tensor:
        """The values (B,) of a batch as `update` takes it, which is left uncounted; NaN for an image without one."""
        return self._valued(*self._needed(images=images, reference=reference, **given))

    def _valued(self, *inputs: Any) -> Tensor:
        """The values; ValueError where they are not one for each picture."""
        values = torch.as_tensor(self.values(*inputs))
        if values.shape != (count := (len(inputs[0]),)):
            shape = tuple(values.shape)
            raise ValueError(f"{type(self).__name__}.values gives shape {shape}: return one value a picture, {count}")
        return values


def pillow_squares(images: Tensor, size: int, interpolation: InterpolationMode) -> Tensor:
    """8-bit values 0 ... 255 (B, 3, size, size), float32: short sides resized by Pillow, centres cut out."""
    pictures = [resize(Image.fromarray(picture), [size], interpolation) for picture in to_pictures(images)]
    squares = torch.stack([pil_to_tensor(center_crop(picture, [size])) for picture in pictures])
    return where_finite(squares.float().to(images.device), images)


def where_finite(values: Tensor, images: Tensor) -> Tensor:
    """Values (B, ...), NaN for those of images that are not finite: 8 bits would make them black, and good figures."""
    finite = images.isfinite().flatten(1).all(1)
    return values.where(finite.view(-1, *(1,) * (values.ndim - 1)), torch.nan)


def _check(name: str, need: str, value: Any) -> None:
    if need == "prompts":
        if isinstance(value, str):
            raise ValueError(f"{name} got one text for prompts: give a list, one for each picture")
        return
    if value.ndim != 4 or (need != "noise" and value.shape[1] != (1 if need == "masks" else 3)):
        form = {"masks": "(B, 1, H, W)", "noise": "(B, C, h, w)"}.get(need, "(B, 3, H, W)")
        raise ValueError(f"{name} got {need} of shape {tuple(value.shape)}, not {form}")
    if need == "masks":
        if ((value != 0) & (value != 1)).any():
            raise ValueError(f"{name} got masks with values other than 0 and 1 (1: to be edited)")
        return
    if not value.is_floating_point():
        raise ValueError(f"{name} got {need} of {value.dtype}, not floating-point numbers; for pictures use to_images")
    if need != "noise" and (value.abs() > LIMIT).any():  # a diverged training's NaN is no mistake of the caller
        raise ValueError(f"{name} got {need} that reach {value.abs().max():g}: give values in [-1, 1]")
