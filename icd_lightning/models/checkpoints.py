"""Students in files: one adapter, one file, in the format that plain diffusers loads, marked with its direction.

`save_student` writes `pytorch_lora_weights.safetensors`. Its header holds the alpha for diffusers and, for us, what iCD
must know (direction, boundaries, ...); the latter is repeated as `icd.json` for people. `load_student` also reads the
released files and those of peft, which hold neither.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icd_lightning.models.students import ADAPTERS, LoraSettings, Students

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name `load_lora_weights` looks for in a folder
RELEASED_ALPHA = 8.0  # the released files do not say; read without it they act 8 times too strong
PREFIXES = ("unet.base_model.model.", "base_model.model.", "unet.")  # the released files, peft, diffusers


def save_student(students: Students, adapter: str, folder: str | Path, *, metadata: Mapping[str, Any]) -> Path:
    """Write one student for plain diffusers, over an earlier one in the folder if any; return the file's path.

    metadata (boundaries, family, ...: JSON values or dataclasses) goes into the file; `load_student` returns it.
    """
    parameters = students.named_parameters_of(adapter)
    weights = {f"unet.{name}": parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    lora = students.lora
    ours = {"adapter": adapter, "direction": ADAPTERS[adapter], "rank": lora.rank, "alpha": lora.alpha}
    if clash := ours.keys() & metadata.keys():
        raise ValueError(f"metadata may not set {sorted(clash)}: the student itself says so")
    about = json.dumps({**ours, **metadata}, indent=2, default=_plain)
    # diffusers makes a LoraConfig of this; no more keys than it needs, since versions of peft differ in theirs
    for_diffusers = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.target_modules)}
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in for_diffusers.items()}),
        "icd": about,
    }
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot write the student to {folder}: that is a file, give a folder")
    temporary = folder.with_name(f".{folder.name}-{uuid4().hex}")  # beside its goal, where a rename is one atomic step
    temporary.mkdir(parents=True)
    try:
        data = _sorted_metadata(save(weights, metadata=header))
        (temporary / WEIGHTS_NAME).write_bytes(data)  # save_file lets nobody else read
        (temporary / "icd.json").write_text(about + "\n")
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / WEIGHTS_NAME


def load_student(students: Students, adapter: str, path: str | Path) -> dict[str, Any]:
    """Load one student from a folder or a file, ours, diffusers', a released one or peft's; return the file's metadata.

    Every key and shape must fit, alpha and rank must be those of `students.lora` (see `lora_settings`), and the
    direction, where the file or its name tells it, must be the adapter's.
    """
    file = weights_file(path)
    weights, header = _read(file)
    about = _about(header)
    targets = students.named_parameters_of(adapter)
    direction = about.get("direction") or _direction_in_name(file)
    if direction is not None and direction != ADAPTERS[adapter]:
        raise ValueError(f"{file} holds the {direction} model; adapter {adapter!r} is the {ADAPTERS[adapter]} model")
    found = _lora_settings(weights, header, file)
    if (found.rank, found.alpha) != (students.lora.rank, students.lora.alpha):
        raise ValueError(
            f"{file} has LoRA rank {found.rank} and alpha {found.alpha:g}, the students {students.lora.rank} and "
            f"{students.lora.alpha:g}: build them with lora=LoraSettings(rank={found.rank}, alpha={found.alpha:g})"
        )
    _check_fit(weights, targets, file)
    with torch.no_grad():
        for name, weight in weights.items():
            targets[name].copy_(weight)
    return about


def lora_settings(path: str | Path) -> LoraSettings:
    """The settings with which `Students` must be built to hold the student in this folder or file."""
    file = weights_file(path)
    return _lora_settings(*_read(file), file)


def _plain(value: Any) -> Any:
    """What JSON does not know: dataclasses such as Boundaries, and paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"metadata must be JSON values or dataclasses, not {type(value).__name__}: {value!r}")


def _sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: written in any, equal students would be unequal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
    assert len(text) == size, "as long as before, but for the order"
    return data[:8] + text + data[8 + size :]


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Move the finished files: no reader ever finds half a file, and nothing else in the folder is touched."""
    if not folder.exists():
        os.rename(temporary, folder)
        return
    for file in temporary.iterdir():
        os.replace(file, folder / file.name)


def weights_file(path: str | Path) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"no student at {path}: give a .safetensors file or a folder that holds {WEIGHTS_NAME}")
    return file


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights by `<module>.lora_A.weight`, whoever wrote them, and the file's header."""
    try:
        with safe_open(file, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {_without_prefix(name): weight for name, weight in weights.items()}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file ({error})") from error


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _about(header: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(header.get("icd", "{}"))


def _direction_in_name(file: Path) -> str | None:
    """Released files tell their direction by name alone: `iCD-SD15-reverse_259_519_779_999.safetensors`."""
    words = set(re.findall("[a-z]+", file.stem.lower())) & set(ADAPTERS.values())
    return words.pop() if len(words) == 1 else None


def _lora_settings(weights: Mapping[str, Tensor], header: Mapping[str, str], file: Path) -> LoraSettings:
    ranks = {weight.shape[1] for name, weight in weights.items() if name.endswith("lora_B.weight")}
    if len(ranks) != 1:
        raise ValueError(f"{file} is no student: it should hold LoRA weights of one rank, it has ranks {sorted(ranks)}")
    for_diffusers = {_without_prefix(k): v for k, v in json.loads(header.get("lora_adapter_metadata", "{}")).items()}
    settings = LoraSettings(rank=ranks.pop(), alpha=for_diffusers.get("lora_alpha", RELEASED_ALPHA))
    if refused := {key for key in ("alpha_pattern", "use_rslora", "use_dora") if for_diffusers.get(key)}:
        raise ValueError(f"{file} uses {sorted(refused)}, which the students do not have")
    modules = for_diffusers.get("target_modules")
    return dataclasses.replace(settings, target_modules=tuple(modules)) if isinstance(modules, list) else settings


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path) -> None:
    if missing := expected.keys() - found.keys():
        raise ValueError(f"{file} lacks {len(missing)} of {len(expected)} weights, for example {min(missing)}")
    if unexpected := found.keys() - expected.keys():
        raise ValueError(
            f"{file} has {len(unexpected)} weights that these students have no place for, for example "
            f"{min(unexpected)}: another UNet or other target_modules?"
        )
    for name, weight in found.items():
        if weight.shape != expected[name].shape:
            shapes = f"{tuple(weight.shape)}, these students need {tuple(expected[name].shape)}"
            raise ValueError(f"{file}: {name} is {shapes}: another UNet?")
