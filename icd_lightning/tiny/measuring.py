"""The picture world as a benchmark: pictures with captions, and edits whose true results are known."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, Step
from icd_lightning.editing.method import EditingMethod, seeded_noise
from icd_lightning.metrics.reconstruction import PSNR, SSIM, psnr
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.tiny.attributes import attribute_accuracy, label_tensor
from icd_lightning.tiny.datamodule import scene_batch
from icd_lightning.tiny.scene_network import SceneNetwork
from icd_lightning.tiny.scenes import ABSENT, HELD_OUT_SEED, Scene, random_edit, scene_at

ATTRIBUTE_EDITS = ("color", "shape", "texture", "size", "background color", "background texture")
"""Edits that leave the number of objects alone."""


@dataclass
class Cost:
    """Network evaluations and seconds of one picture; `count` is passed to a method as `on_step`."""

    nfe: int = 0
    seconds: float = 0.0

    def count(self, step: Step) -> None:
        """Add the evaluations of one step."""
        self.nfe += step.nfe


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """The first `count` scenes of a world that no training sees."""
    return [scene_at(seed, index) for index in range(count)]


def images_of(scenes: Sequence[Scene]) -> Tensor:
    """The scenes' pictures, (B, 3, 64, 64) in [-1, 1]."""
    return scene_batch(scenes, [""] * len(scenes)).images


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """Cut into runs of `size`; the last may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def autoencoder_psnr(autoencoder: LatentAutoencoder, scenes: Sequence[Scene], batch_size: int = 64) -> float:
    """Mean PSNR of the autoencoder alone: no method that works on latents comes back better."""
    parts = (images_of(part) for part in batches(scenes, batch_size))
    return float(torch.cat([psnr(autoencoder.decode(autoencoder.encode(images)), images) for images in parts]).mean())


@torch.no_grad()
def measure_reconstruction(
    method: EditingMethod,
    scenes: Sequence[Scene],
    guidances: dict[str, GuidanceSchedule],
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict]:
    """Invert the scenes once, decode under each guidance; one row each: psnr, ssim, latent_mse, nfe, seconds.

    Evaluations and seconds are those of one picture, noise and back, seconds as measured in batches on this machine.
    """
    rows = {name: {"psnr": PSNR(), "ssim": SSIM(), "latent": [], "cost": Cost()} for name in guidances}
    for part_index, part in enumerate(batches(scenes, batch_size)):
        images, prompts = images_of(part), [scene.caption() for scene in part]
        latents = method.autoencoder.encode(images)
        inversion, start = Cost(), time.perf_counter()
        noise = method.invert(images, prompts, seed=seed + part_index * batch_size, on_step=inversion.count)
        inversion.seconds = time.perf_counter() - start
        for name, guidance in guidances.items():
            row, decoding, start = rows[name], Cost(), time.perf_counter()
            result = method.generate(prompts, noise, guidance=guidance, on_step=decoding.count)
            row["cost"].seconds += inversion.seconds + time.perf_counter() - start
            row["cost"].nfe = inversion.nfe + decoding.nfe
            row["psnr"].update(result, images)
            row["ssim"].update(result, images)
            row["latent"].append((method.autoencoder.encode(result) - latents).square().mean((1, 2, 3)))
    return [
        {
            "guidance": name,
            "psnr": float(row["psnr"].compute()),
            "ssim": float(row["ssim"].compute()),
            "latent_mse": float(torch.cat(row["latent"]).mean()),
            "nfe": row["cost"].nfe,
            "seconds": row["cost"].seconds / len(scenes),
        }
        for name, row in rows.items()
    ]


@torch.no_grad()
def measure_generation(
    method: EditingMethod,
    network: SceneNetwork,
    scenes: Sequence[Scene],
    guidance: GuidanceSchedule,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Generate pictures from the scenes' captions; the share of attributes that the scene network finds right."""
    found = []
    for index, part in enumerate(batches(scenes, batch_size)):
        noise = seeded_noise(method.latent_shape(len(part), 64, 64), seed + index * batch_size)
        found.append(network.read(method.generate([s.caption() for s in part], noise, guidance=guidance)))
    return {name: float(v) for name, v in attribute_accuracy(torch.cat(found), label_tensor(scenes)).items()}


def random_edits(scenes: Sequence[Scene], seed: int = 0, kinds: Sequence[str] = ATTRIBUTE_EDITS) -> list[Scene]:
    """The true results of one edit of each scene, the kinds taking turns."""
    return [
        random_edit(scene, np.random.default_rng((seed, index)), kinds[index % len(kinds)])[0]
        for index, scene in enumerate(scenes)
    ]


@dataclass(frozen=True)
class EditScore:
    """Scores of edits: attributes that should change and did, should stay and did; PSNR to the truth and outside.

    Shares are by the scene network; `psnr_outside` is over the pixels that the true edit leaves alone, against the
    original picture.
    """

    changed: float
    kept: float
    psnr_truth: float
    psnr_outside: float
    nfe: int
    seconds: float


@torch.no_grad()
def measure_edits(
    method: EditingMethod,
    network: SceneNetwork,
    scenes: Sequence[Scene],
    targets: Sequence[Scene],
    guidance: GuidanceSchedule,
    *,
    swap_tau: float,
    batch_size: int = 64,
) -> EditScore:
    """Edit the scenes' pictures towards the targets' captions, and compare with the targets' pictures."""
    found, to_truth, outside, cost = [], [], [], Cost()
    for index, (sources, truths) in enumerate(
        zip(batches(scenes, batch_size), batches(targets, batch_size), strict=True)
    ):
        images, truth = images_of(sources), images_of(truths)
        step, start = Cost(), time.perf_counter()
        result = method.edit(
            images,
            [s.caption() for s in sources],
            [s.caption() for s in truths],
            guidance=guidance,
            swap_tau=swap_tau,
            seed=index * batch_size,
            on_step=step.count,
        )
        cost.seconds += time.perf_counter() - start
        cost.nfe = step.nfe
        found.append(network.read(result))
        to_truth.append(psnr(result, truth))
        same = (images == truth).all(1, keepdim=True)
        error = ((result - images) * same).square().sum((1, 2, 3)) / (3 * same.sum((1, 2, 3))).clamp(min=1)
        outside.append(10 * torch.log10(4 / error))
    before, after, read = label_tensor(scenes), label_tensor(targets), torch.cat(found)
    change = before != after
    stay = ~change & (after != ABSENT)
    return EditScore(
        changed=float((read == after)[change].float().mean()),
        kept=float((read == after)[stay].float().mean()),
        psnr_truth=float(torch.cat(to_truth).mean()),
        psnr_outside=float(torch.cat(outside).mean()),
        nfe=cost.nfe,
        seconds=cost.seconds / len(scenes),
    )
