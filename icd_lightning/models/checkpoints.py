"""Students in files: one adapter, one file, in the format that plain diffusers loads, marked with its direction.

`save_student` writes `pytorch_lora_weights.safetensors`. Its header holds the alpha for diffusers and, for us, what iCD
must know (direction, boundaries, ...); the latter is repeated as `icd.json` for people. `save_kohya` and
`save_released` write the same weights for programs that read other names. `load_student` reads all of these and peft's.

    diffusers  unet.<module>.lora_A.weight                    alpha in the header
    kohya      lora_unet_<module, _ for .>.lora_down.weight   alpha beside each pair of weights
    released   unet.base_model.model.<module>.lora_A.weight   alpha is 8, and not in the file
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icd_lightning.files import write_whole
from icd_lightning.models.students import ADAPTERS, LoraSettings, Students

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name `load_lora_weights` looks for in a folder
RELEASED_ALPHA = 8.0  # the released files do not say; read without it they act 8 times too strong
KOHYA = "lora_unet_"
KOHYA_PARTS = {"lora_down": "lora_A", "lora_up": "lora_B"}
PREFIXES = ("unet.base_model.model.", "base_model.model.", "unet.")  # the released files, peft, diffusers


def save_student(students: Students, adapter: str, folder: str | Path, *, metadata: Mapping[str, Any]) -> Path:
    """Write one student for plain diffusers, over an earlier one in the folder if any; return the file's path.

    metadata (boundaries, family, ...: JSON values or dataclasses) goes into the file; `load_student` returns it.
    """
    weights = {f"unet.{name}": weight for name, weight in _weights_of(students, adapter).items()}
    about, lora = _described(students, adapter, metadata), students.lora
    # diffusers makes a LoraConfig of this; no more keys than it needs, since versions of peft differ in theirs
    for_diffusers = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.target_modules)}
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in for_diffusers.items()}),
        "icd": about,
    }
    with replaced_folder(folder) as temporary:
        data = sorted_metadata(save(weights, metadata=header))
        (temporary / WEIGHTS_NAME).write_bytes(data)  # save_file lets nobody else read
        (temporary / "icd.json").write_text(about + "\n")
    return Path(folder).absolute() / WEIGHTS_NAME


def save_kohya(students: Students, adapter: str, file: str | Path, *, metadata: Mapping[str, Any]) -> Path:
    """Write one student as kohya's scripts do, for the many programs that read this; return the file's path.

    Every pair of weights has its alpha beside it, which no version of diffusers ignores.
    """
    weights, lora = {}, students.lora
    for name, weight in _weights_of(students, adapter).items():
        module, part, _ = _kohya_name(name).split(".")
        theirs = next(theirs for theirs, ours in KOHYA_PARTS.items() if ours == part)
        weights[f"{KOHYA}{module}.{theirs}.weight"] = weight
        weights[f"{KOHYA}{module}.alpha"] = torch.tensor(float(lora.alpha))
    dim = {"ss_network_module": "networks.lora", "ss_network_dim": str(lora.rank), "ss_network_alpha": str(lora.alpha)}
    data = save(weights, metadata={"format": "pt", **dim, "icd": _described(students, adapter, metadata)})
    write_whole(Path(file), lambda temporary: temporary.write_bytes(sorted_metadata(data)))
    return Path(file)


def save_released(students: Students, adapter: str, file: str | Path) -> Path:
    """Write one student as those of the paper were released, for its code; return the file's path.

    That code knows students of alpha 8 only, and tells their direction and boundaries by the name of the file.
    """
    if students.lora.alpha != RELEASED_ALPHA:
        raise ValueError(f"files in the released format mean alpha {RELEASED_ALPHA:g}, this is {students.lora.alpha:g}")
    data = save({f"{PREFIXES[0]}{name}": weight for name, weight in _weights_of(students, adapter).items()})
    write_whole(Path(file), lambda temporary: temporary.write_bytes(data))
    return Path(file)


def load_student(students: Students, adapter: str, path: str | Path) -> dict[str, Any]:
    """Load one student from a folder or a file of any of the formats above; return the file's metadata.

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
    dotted = {_kohya_name(name): name for name in targets}
    weights = {dotted.get(name, name): weight for name, weight in weights.items()}
    _check_fit(weights, targets, file)
    with torch.no_grad():
        for name, weight in weights.items():
            targets[name].copy_(weight)
    return about


def lora_settings(path: str | Path) -> LoraSettings:
    """The settings with which `Students` must be built to hold the student in this folder or file."""
    file = weights_file(path)
    return _lora_settings(*_read(file), file)


def _weights_of(students: Students, adapter: str) -> dict[str, Tensor]:
    parameters = students.named_parameters_of(adapter)
    return {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}


def _described(students: Students, adapter: str, metadata: Mapping[str, Any]) -> str:
    """What a student's file says of it, as JSON."""
    lora = students.lora
    ours = {"adapter": adapter, "direction": ADAPTERS[adapter], "rank": lora.rank, "alpha": lora.alpha}
    if clash := ours.keys() & metadata.keys():
        raise ValueError(f"metadata may not set {sorted(clash)}: the student itself says so")
    return json.dumps({**ours, **metadata}, indent=2, default=_plain)


def _kohya_name(name: str) -> str:
    """A weight's name with the dots of its module lost, as in kohya's files."""
    module, _, part = name.partition(".lora_")
    return f"{module.replace('.', '_')}.lora_{part}"


def _plain(value: Any) -> Any:
    """What JSON does not know: dataclasses such as Boundaries, and paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"metadata must be JSON values or dataclasses, not {type(value).__name__}: {value!r}")


def sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: written in any, equal students would be unequal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
    assert len(text) == size, "as long as before, but for the order"
    return data[:8] + text + data[8 + size :]


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder whose files, if all goes well, go into `folder`, whose other files stay.

    No reader ever finds half a file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot write weights to {folder}: that is a file, give a folder")
    temporary = folder.with_name(f".{folder.name}-{uuid4().hex}")  # beside its goal, where a rename is one atomic step
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not folder.exists():
            os.rename(temporary, folder)
            return
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file ({error})") from error
    if any(name.startswith(KOHYA) for name in weights):
        return _from_kohya(weights, header, file)
    return {_without_prefix(name): weight for name, weight in weights.items()}, header


def _from_kohya(
    found: Mapping[str, Tensor], header: Mapping[str, str], file: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `_read`, the dots of modules still missing; alpha goes to where diffusers' files have it."""
    alphas = {float(value) for name, value in found.items() if name.endswith(".alpha")}
    if len(alphas) != 1:
        raise ValueError(f"{file} has the alphas {sorted(alphas)}: a student has one")
    weights = {}
    for name, weight in found.items():
        module, _, part = name.removeprefix(KOHYA).partition(".")
        if part != "alpha":
            weights[f"{module}.{KOHYA_PARTS.get(part.removesuffix('.weight'), part)}.weight"] = weight
    return weights, {**header, "lora_adapter_metadata": json.dumps({"lora_alpha": alphas.pop()})}


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
