"""`icd models | memory | download | push`: released weights to this machine, what models take, your own to the hub.

Importing this module is light, for the sake of `--help`.
"""

from __future__ import annotations

import logging
import re
import sys

from icd_lightning.models.released import BASES, LICENCE, RELEASED, find
from icd_lightning.models.released import host as usual_host

log = logging.getLogger(__name__)

ROW = "{:<18} {:<31} {:<16} {:>8}  {}\n"


def models() -> None:
    """List the released models: what they are, their size, their licence, and whether they are here.

    icd models
    """
    sys.stdout.write(ROW.format("name", "what", "boundaries", "download", "here"))
    for one in RELEASED.values():
        what = "students" if one.boundaries else "guidance-distilled UNet"
        ends = ",".join(map(str, one.boundaries)) or "-"
        size = f"{one.gigabytes:g} GB"
        sys.stdout.write(ROW.format(one.name, f"{one.base.title}: {what}", ends, size, "yes" if one.here else "no"))
    bases = "\n".join(f"  {base.title}: {base.model}, {base.licence}" for base in BASES.values())
    sys.stdout.write(
        f"\nLicence of these weights: {LICENCE}. Their base models come from the hub at the first use:\n{bases}\n"
        "`icd download NAME` fetches a model and the UNet that it needs; then --model NAME of every command, and\n"
        "--guided_unet NAME of a UNet. `tiny` ships with the package.\n"
    )


def download(name: str, *, host: str | None = None, sha256: str | None = None) -> None:
    """Download a released model and the UNet that it needs, each once.

    icd download icd-sd15

    Stopped and called again it goes on. The authors published no checksums: an archive's SHA-256 is kept when it is
    first downloaded, and later downloads must have the same.

    Args:
        name: One of `icd models`.
        host: Address of a folder with copies of the archives; by default ICD_RELEASED_URL or else the authors'.
        sha256: What the archive of this name must have; not of the UNet that comes with it.
    """
    released = find(name)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 {sha256!r} is none: it has 64 digits from 0 to f")
    for part in released.parts:
        told = sha256.lower() if sha256 and part is released else None
        if part.here and told in (None, part.known):
            log.info("%s is here: %s", part.name, part.folder)
            continue
        from icd_lightning.models.archives import install

        log.info("%s: %s, about %g GB", part.name, part.archive, part.gigabytes)
        checked = "as it must be" if told or part.known else "noted, for nothing was known of it"
        found = install(part, host or usual_host(), known=told)
        log.info("%s: %s, SHA-256 %s, %s", part.name, part.folder, found, checked)


def push(
    folder: str,
    repo: str,
    *,
    base_model: str | None = None,
    guided_unet: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> None:
    """Upload the two students of a run to the Hugging Face hub, with a card and the UNet that they adapt.

    icd push outputs/sd15 someone/icd-sd15-mine
    icd edit cat.jpg --model someone/icd-sd15-mine --source "a cat" --target "a dog"

    Log in first, by `hf auth login` or HF_TOKEN. Who loads the model needs nothing else: its base model comes from the
    hub, and a released UNet from its authors, both at the first use.

    Args:
        folder: Of a run of `icd fit`, with forward/ and reverse/, or of a pipeline that was saved.
        repo: OWNER/NAME on the hub; made if it is not there.
        base_model: Id on the hub of the model that the students were trained on; by default what the run says.
        guided_unet: Folder of the guidance-distilled UNet, which is uploaded too, or the name of a released one, which
            is not, for it is of no stated licence; by default what the run says.
        private: Make the repository private.
        endpoint: Address of another hub; by default HF_ENDPOINT.
    """
    from icd_lightning.editing.publishing import Publication, publish

    log.info("%s", publish(Publication.of(folder, base_model, guided_unet), repo, private=private, endpoint=endpoint))


TRAINED = 16  # bytes of a trained weight: itself, its gradient and AdamW's two averages, in float32


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
