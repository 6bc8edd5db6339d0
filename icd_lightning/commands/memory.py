"""`icd memory`: what models take, counted from their configs. Importing this module is light."""

from __future__ import annotations

import sys

TRAINED = 16
"""Bytes of a trained weight: itself, its gradient and AdamW's two averages, in float32."""


def memory(*models: str) -> None:
    """Count the GB (10^9 bytes) of models by their config files: no weights are read, downloaded or made.

    icd memory
    icd memory flux_dev /models/sd35

    Of the frozen guided network in bfloat16, and with the linear layers of its blocks in int8 or nf4
    (family.quantization); of its VAE and text encoders in bfloat16; of both students at the usual rank, 16 bytes a
    weight with its gradient and AdamW's averages. Activations come on top.

    Args:
        models: sd15, sdxl, sd3, sd35_large, flux_dev, flux2_klein, z_image, or folders in diffusers' layout; by
            default the former.
    """
    from icd_lightning.models.sources import architecture

    names = models or sorted(path.name for path in architecture("").iterdir())
    rows = [f"| {name} | {' | '.join(f'{count / 1e9:.3g}' for count in counted(name))} |\n" for name in names]
    sys.stdout.write("| | bfloat16 | int8 | nf4 | VAE, text | students |\n|---|--:|--:|--:|--:|--:|\n" + "".join(rows))


def counted(model: str) -> list[int]:
    """Bytes of the network in bfloat16, int8 and nf4, of what is beside it, and of the students in training."""
    import torch

    from icd_lightning.models.family import Family
    from icd_lightning.models.quantization import KINDS, bytes_of
    from icd_lightning.models.students import DIRECTIONS, LoraStudents

    family = Family(f"random:{model}", precision="bfloat16")
    with torch.device("meta"):
        guided, beside = family.load_model(guided=True), [family.load_autoencoder(), family.load_conditioner()]
        kinds = [bytes_of(guided.network, family.architecture.blocks, kind) for kind in (None, *KINDS)]
        students = LoraStudents(guided)
    trained = sum(weight.numel() for direction in DIRECTIONS for weight in students.parameters_of(direction))
    return [*kinds, sum(bytes_of(part) for part in beside), TRAINED * trained]
