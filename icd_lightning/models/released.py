"""The weights that the paper's authors released, by name: what they are, where they come from, where they are kept.

A catalogue and paths, light enough for `icd --help`: nothing is read or loaded here. `icd download` makes the folders,
of the layout that `models/overlay.py` opens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icd_lightning.files import cache_folder

URL = "https://storage.yandexcloud.net/yandex-research/invertible-cd"
LICENCE = "not stated"
"""Of the released weights, and of the code beside them (github.com/yandex-research/invertible-cd has no licence)."""


@dataclass(frozen=True)
class Base:
    """What released weights were made for: a model on the hub, under a licence of its own."""

    model: str
    title: str
    licence: str


BASES = {
    "SD15": Base("stable-diffusion-v1-5/stable-diffusion-v1-5", "SD1.5", "CreativeML OpenRAIL-M"),
    "SDXL": Base("stabilityai/stable-diffusion-xl-base-1.0", "SDXL", "CreativeML OpenRAIL++-M"),
}


@dataclass(frozen=True)
class Released:
    """Both students of these boundaries, or without boundaries the guidance-distilled UNet that students adapt.

    gigabytes: of the archive, as its authors say. sha256: of the archive, where it is known; none was published.
    """

    name: str
    archive: str
    gigabytes: float
    family: str
    boundaries: tuple[int, ...] = ()
    sha256: str | None = None

    @property
    def base(self) -> Base:
        return BASES[self.family]

    @property
    def files(self) -> dict[str, str]:
        """The archive's files of weights by name, and where each goes in `folder`."""
        if not self.boundaries:
            name = self.archive.removesuffix(".tar.gz")
            return {name: name}
        timesteps = {"forward": (19, *self.boundaries[:-1]), "reverse": self.boundaries}
        names = {part: f"iCD-{self.family}-{part}_{'_'.join(map(str, ends))}" for part, ends in timesteps.items()}
        return {f"{name}.safetensors": f"students/{part}/{name}.safetensors" for part, name in names.items()}

    @property
    def folder(self) -> Path:
        return cache_folder() / "released" / self.name

    @property
    def here(self) -> bool:
        return all((self.folder / place).is_file() for place in self.files.values())

    @property
    def record(self) -> Path:
        """The file that keeps the SHA-256 of the archive as it was downloaded first."""
        return self.folder.with_name(f"{self.archive}.sha256")

    @property
    def known(self) -> str | None:
        """The SHA-256 that the archive must have: the catalogue's or else the first download's, if there is one."""
        return self.sha256 or (self.record.read_text().strip() if self.record.is_file() else None)

    @property
    def index(self) -> dict[str, Any]:
        """`model_index.json` of its folder: see `models/overlay.py`."""
        return {"base_model": self.base.model, "guided_unet": self._guided} if self.boundaries else {}

    @property
    def parts(self) -> tuple[Released, ...]:
        return (self, RELEASED[self._guided]) if self.boundaries else (self,)

    @property
    def _guided(self) -> str:
        return f"{self.family.lower()}-cfg-distill"


RELEASED = {
    one.name: one
    for one in (
        Released("icd-sd15", "iCD-SD15_4steps_1.tar.gz", 0.5, "SD15", (259, 519, 779, 999)),
        Released("icd-sd15-4steps-2", "iCD-SD15_4steps_2.tar.gz", 0.5, "SD15", (249, 499, 699, 999)),
        Released("icd-sd15-3steps", "iCD-SD15_3steps.tar.gz", 0.5, "SD15", (339, 699, 999)),
        Released("icd-sdxl", "iCD-SDXL_4steps_2.tar.gz", 1.4, "SDXL", (249, 499, 699, 999)),
        Released("icd-sdxl-4steps-1", "iCD-SDXL_4steps_1.tar.gz", 1.4, "SDXL", (259, 519, 779, 999)),
        Released("icd-sdxl-3steps", "iCD-SDXL_3steps.tar.gz", 1.4, "SDXL", (339, 699, 999)),
        Released("sd15-cfg-distill", "sd15_cfg_distill.pt.tar.gz", 3.0, "SD15"),
        Released("sdxl-cfg-distill", "sdxl_cfg_distill.pt.tar.gz", 8.9, "SDXL"),
    )
}
"""icd-sd15 and icd-sdxl are those that the authors edit with most."""


SHIPPED = ("tiny", "tiny_flow")  # families whose weights come with the package


def host() -> str:
    """Where the archives are: at the authors', or where ICD_RELEASED_URL says that there are copies."""
    return os.environ.get("ICD_RELEASED_URL", URL)


def find(name: str) -> Released:
    """ValueError, with the names there are, if there is none of this one."""
    if name not in RELEASED:
        raise ValueError(f"no released model {name!r}; there is: {', '.join(RELEASED)}")
    return RELEASED[name]


def located(name: str) -> str:
    """The folder of released students, the file of a released UNet; any other name as it is.

    FileNotFoundError that says what a download would fetch, if a released model is not here.
    """
    if (released := RELEASED.get(name)) is None:
        return name
    if missing := [part for part in released.parts if not part.here]:
        size = sum(part.gigabytes for part in missing)
        raise FileNotFoundError(
            f"{name} is not here yet: `icd download {name}` fetches {size:g} GB "
            f"({', '.join(part.archive for part in missing)} of {host()}) into {released.folder.parent}"
        )
    return str(released.folder if released.boundaries else released.folder / next(iter(released.files)))
