"""Students in files: one adapter, one file, in the format that plain diffusers loads, marked with its direction.

`write_diffusers` writes `pytorch_lora_weights.safetensors`. Its header holds the alpha for diffusers and, for us, what
iCD must know (direction, boundaries, ...); the latter is repeated as `icd.json` for people. `write_kohya` writes the
same weights for programs that read other names. `StudentFile.read` reads both, released files and peft's folders:

    diffusers  unet.<module>.lora_A.weight                    alpha in the header
    kohya      lora_unet_<module, _ for .>.lora_down.weight   alpha beside each pair of weights
    peft       base_model.model.<module>.lora_A.weight        alpha in adapter_config.json
    released   unet.base_model.model.<module>.lora_A.weight   alpha is 8, and not in the file
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from icd_lightning.diffusion import Boundaries, Direction
from icd_lightning.files import parse_object, read_object, replaced_folder, write_whole
from icd_lightning.models.weights import check_fit, read_header, read_weights

log = logging.getLogger(__name__)

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # the name `load_lora_weights` looks for in a folder
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
RELEASED = "unet.base_model.model."  # the prefix that the released files have, and no others
RELEASED_ALPHA = 8.0  # the released files do not say; read without it they act 8 times too strong
PREFIX = re.compile(r"lora_(unet|transformer)_|((unet|transformer)\.)?(base_model\.model\.)?")
PART = re.compile(r"(?P<kohya>lora_)?(?P<part>unet|transformer)[._]")
START, LAST = Boundaries.start_timestep, Boundaries.num_train_timesteps - 1  # where released students begin and end
NOT_HAD = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
"""Options of peft that change what weights mean."""


@dataclass(frozen=True, eq=False)
class StudentFile:
    """A student's LoRA weights by `<module>.lora_A.weight`, and what its file says of it.

    `about` holds JSON values: direction, boundaries, family, ...; `part` is the network's folder in diffusers' layout.
    """

    weights: Mapping[str, Tensor]
    rank: int
    alpha: float
    about: Mapping[str, Any]
    target_modules: tuple[str, ...] | None = None
    part: str = "unet"
    path: Path = Path()

    @classmethod
    def read(cls, path: str | Path, *, alpha: float | None = None) -> StudentFile:
        """From a folder or a file of any of the formats above.

        alpha: of a file that does not say its own; without it such a file is an error, for a wrong alpha makes a
        student too weak or too strong.
        """
        file = weights_file(path)
        tensors, header = read_weights(file), read_header(file)
        named = next(filter(None, map(PART.match, tensors)), None)
        part, kohya = (named["part"], named["kohya"]) if named else ("unet", None)
        options = parse_object(header.get("lora_adapter_metadata", "{}"), f"{file}: its header")
        options = {key.removeprefix(f"{part}."): value for key, value in options.items()}
        if kohya:
            tensors, options["lora_alpha"] = _from_kohya(tensors, file)
        options = {**_beside(file, PEFT_CONFIG), **options}
        about = said = _beside(file, "icd.json") if file.name == WEIGHTS_NAME else {}
        if "icd" in header:
            about = parse_object(header["icd"], f"{file}: its header")
        if other := [name for name in said.keys() | about.keys() if said and said.get(name) != about.get(name)]:
            key = min(other)
            raise ValueError(
                f"{file.with_name('icd.json')} says {key} {said.get(key)!r}, and the header of {file.name} "
                f"{about.get(key)!r}: they are of two students"
            )
        if refused := [key for key in NOT_HAD if options.get(key)]:
            raise ValueError(f"{file} uses {refused[0]}, which students do not have")
        released = not kohya and all(name.startswith(RELEASED) for name in tensors)
        stated = (options.get("lora_alpha"), about.get("alpha"), RELEASED_ALPHA if released else None)
        if alpha is not None and not any(value is not None for value in stated):
            log.warning("%s does not say its alpha: it is taken to be %g", file, alpha)
        weights = {PREFIX.sub("", name, count=1): tensor for name, tensor in tensors.items()}
        modules = options.get("target_modules")
        targets = tuple(modules) if isinstance(modules, list) else None
        rank = _rank(weights, file)
        if about.get("rank", rank) != rank:
            raise ValueError(f"{file} says rank {about['rank']!r}, and its weights are of rank {rank}")
        alpha = _alpha((*stated, alpha), file)
        if about.get("alpha", alpha) != alpha:
            where = "beside its weights" if kohya else "as lora_alpha"
            raise ValueError(f"{file} says alpha {about['alpha']!r}, and {alpha:g} {where}: write it anew")
        return cls(weights, rank, alpha, about, targets, part, file)

    @property
    def direction(self) -> Direction | None:
        """As the file says, or the name of a released one: `iCD-SD15-reverse_259_519_779_999.safetensors`."""
        words = set(re.findall("[a-z]+", self.path.stem.lower())) & {"forward", "reverse"}
        named = words.pop() if len(words) == 1 else None
        direction = self.about.get("direction", named)
        if direction not in (None, "forward", "reverse"):
            raise ValueError(f"{self.path} says direction {direction!r}, which is none of forward, reverse")
        return direction

    @property
    def boundaries(self) -> list[int] | None:
        """As the file says, or the name of a released one: of a forward model that is where its jumps begin."""
        if (ends := self.about.get("boundaries")) is not None:
            if not isinstance(ends, list) or not all(type(end) is int for end in ends):
                raise ValueError(f"{self.path} says boundaries {ends!r}: they are a list of timesteps")
            return ends
        if (numbers := re.search(r"(?:_\d+)+$", self.path.stem)) is None:
            return None
        timesteps = [int(number) for number in numbers.group()[1:].split("_")]
        forward = self.direction == "forward"
        if timesteps[0 if forward else -1] != (START if forward else LAST):
            return None  # a count of steps, say
        return [0, *timesteps[1:], LAST] if forward else [0, *timesteps]

    @property
    def start_timestep(self) -> int:
        """Where the forward model begins, slightly noised: as the file says, or as all released ones."""
        if type(start := self.about.get("start_timestep", START)) is not int:
            raise ValueError(f"{self.path} says start_timestep {start!r}: it is a whole number, such as {START}")
        return start

    def fitted(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights by the names expected; ValueError if any is missing, too many, or of another shape."""
        dotted = {_kohya_name(name): name for name in expected}
        weights = {dotted.get(name, name): weight for name, weight in self.weights.items()}
        check_fit(weights, expected, self.path, "this network and these target_modules")
        return weights


def write_diffusers(file: StudentFile, folder: str | Path) -> Path:
    """Write one student for plain diffusers, over an earlier one in the folder if any; return the file's path."""
    weights = {f"{file.part}.{name}": weight for name, weight in file.weights.items()}
    # diffusers makes a LoraConfig of this; no more keys than it needs, since versions of peft differ in theirs
    options = {"r": file.rank, "lora_alpha": file.alpha, "target_modules": list(file.target_modules or ())}
    header = {"lora_adapter_metadata": json.dumps({f"{file.part}.{key}": value for key, value in options.items()})}
    with replaced_folder(folder) as temporary:
        (temporary / WEIGHTS_NAME).write_bytes(_packed(file, weights, header))  # save_file lets nobody else read
        (temporary / "icd.json").write_text(_described(file) + "\n")
    return Path(folder).absolute() / WEIGHTS_NAME


def write_kohya(file: StudentFile, path: str | Path) -> Path:
    """Write one student as kohya's scripts do, for the many programs that read this; return the file's path.

    Every pair of weights has its alpha beside it, which no version of diffusers ignores.
    """
    weights = {}
    for name, weight in file.weights.items():
        module, part, _ = _kohya_name(name).split(".")
        kohya_part = {"lora_A": "lora_down", "lora_B": "lora_up"}[part]
        weights[f"lora_{file.part}_{module}.{kohya_part}.weight"] = weight
        weights[f"lora_{file.part}_{module}.alpha"] = torch.tensor(float(file.alpha))
    sizes = {"ss_network_dim": str(file.rank), "ss_network_alpha": str(file.alpha)}
    data = _packed(file, weights, {"ss_network_module": "networks.lora", **sizes})
    write_whole(Path(path), lambda temporary: temporary.write_bytes(data))
    return Path(path)


def weights_file(path: str | Path) -> Path:
    """The file of weights that a student's folder, or its own name, stands for."""
    file = Path(path)
    if file.is_dir():
        found = sorted(file.glob("*.safetensors"))
        usual = [file / name for name in (WEIGHTS_NAME, PEFT_NAME) if file / name in found]
        alone = found if len(found) == 1 else []  # a released student keeps its own name, which says what it is
        file = next(iter(usual or alone), file / WEIGHTS_NAME)
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(
            f"no student at {path}: give a .safetensors file or a folder that holds one, {WEIGHTS_NAME} or {PEFT_NAME}"
        )
    return file


def sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: written in any, equal students would be unequal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
    assert len(text) == size, "as long as before, but for the order"
    return data[:8] + text + data[8 + size :]


def _packed(file: StudentFile, weights: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    return sorted_metadata(save(weights, metadata={"format": "pt", **header, "icd": _described(file)}))


def _described(file: StudentFile) -> str:
    assert not {"rank", "alpha"} & file.about.keys(), "the student itself says so"
    return json.dumps({"rank": file.rank, "alpha": file.alpha, **file.about}, indent=2)


def _beside(file: Path, name: str) -> dict[str, Any]:
    return read_object(file.with_name(name)) if file.with_name(name).is_file() else {}


def _from_kohya(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], float]:
    """Weights with their pairs named as elsewhere, the dots of modules still missing, and their alpha."""
    stated = {name.partition(".")[0]: value.tolist() for name, value in tensors.items() if name.endswith(".alpha")}
    modules, alphas = {name.partition(".")[0] for name in tensors}, set(map(str, stated.values()))
    if len(alphas) != 1:
        raise ValueError(f"{file} has the alphas {', '.join(sorted(alphas)) or 'of none'}: a student has one")
    if lacking := modules - stated.keys():  # there kohya's scripts take the rank
        raise ValueError(f"{file} has no alpha for {min(lacking)} and {len(lacking) - 1} more: a student has one")
    usual = {
        name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B."): value
        for name, value in tensors.items()
        if not name.endswith(".alpha")
    }
    return usual, next(iter(stated.values()))


def _kohya_name(name: str) -> str:
    """A weight's name with the dots of its module lost, as in kohya's files."""
    module, _, part = name.partition(".lora_")
    return f"{module.replace('.', '_')}.lora_{part}"


def _rank(weights: Mapping[str, Tensor], file: Path) -> int:
    ranks = {tuple(weight.shape[1:2]) for name, weight in weights.items() if name.endswith("lora_B.weight")}
    if len(ranks) != 1 or () in ranks:
        stated = sorted(str(*rank) or "none" for rank in ranks)
        raise ValueError(f"{file} is no student: it should hold LoRA weights of one rank, it has ranks {stated}")
    return next(iter(ranks))[0]


def _alpha(alphas: tuple[Any, ...], file: Path) -> float:
    """The first alpha that somebody says: the weights' own header, a file beside them, the caller."""
    alpha = next((value for value in alphas if value is not None), None)
    if alpha is None:
        raise ValueError(
            f"{file} does not say its alpha: its header is lost, and neither icd.json nor {PEFT_CONFIG} lies beside "
            "it; name the alpha that it was trained with by --lora_alpha (released students have 8)"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise ValueError(f"{file}: alpha {alpha!r} is no positive number")
    return float(alpha)
