"""To noise and back (Tables 2 and 5 of arXiv:2406.14539)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from icd_lightning.editing.baselines.base import Baseline
from icd_lightning.editing.method import Clock
from icd_lightning.evaluation.benchmark import Bench, Benchmark, Measured, Outcome, Task, published
from icd_lightning.evaluation.decodings import Decoding
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.report import Section
from icd_lightning.evaluation.summaries import table
from icd_lightning.metrics.reconstruction import LatentNLL

TABLE_2 = {  # row -> LPIPS, DinoV2, PSNR on 5K pairs of COCO; there is no D
    "DDIM-50": (0.167, 0.834, 22.98),
    "A": (0.332, 0.632, 17.75),
    "B": (0.317, 0.649, 18.42),
    "C": (0.276, 0.715, 19.19),
    "E": (0.484, 0.554, 16.40),
    "F": (0.248, 0.728, 20.01),
    "G": (0.198, 0.837, 22.27),
    "DDIM-50, guided": (0.479, 0.534, 14.12),
    "DDIM-50 + d.CFG": (0.279, 0.726, 19.58),
    "H": (0.476, 0.550, 13.87),
    "I": (0.370, 0.650, 16.72),
    "J": (0.317, 0.698, 17.98),
    "K": (0.273, 0.749, 19.66),
}
TABLE_5 = {"3 steps": (0.192, 0.841, 22.21), "3 steps, w 8 + d.CFG": (0.263, 0.770, 19.76)}  # as TABLE_2


def to_noise_and_back(bench: Bench, batch: Sequence[Example], decodings: Sequence[Decoding]) -> Iterator[Outcome]:
    """To noise once, unguided, and back by each decoding.

    A method that fits itself to its guidance on the way to noise goes there for each.
    """
    images, prompts = bench.images(batch), [example.caption for example in batch]
    fitted = [(bench.method, decodings)]
    if isinstance(bench.method, Baseline) and bench.method.fits_guidance:
        fitted = [(bench.method.guided_by(decoding.guidance), [decoding]) for decoding in decodings]
    for method, under in fitted:
        clock = Clock(bench.device)
        noise = method.invert(images, prompts, seed=bench.seeds(batch), on_step=clock.count)
        inverted = {"": (noise, clock.nfe, clock.seconds())}
        yield from decode(replace(bench, method=method), images, prompts, inverted, under)


def decode(
    bench: Bench,
    images: Tensor,
    prompts: Sequence[str],
    inverted: Mapping[str, tuple[Any, int, float]],
    decodings: Sequence[Decoding],
) -> Iterator[Outcome]:
    """Whatever pictures were inverted to, with the evaluations and seconds that it cost, by each decoding.

    `inverted` is by what the names of its outcomes begin with.
    """
    latents = bench.method.autoencoder.encode(images)
    for prefix, (inversion, nfe, seconds) in inverted.items():
        for decoding in decodings:
            clock = Clock(bench.device)
            result = bench.method.generate(prompts, inversion, guidance=decoding.guidance, on_step=clock.count)
            total = (seconds + clock.seconds()) / len(images)
            values = {
                "latent_mse": (bench.method.autoencoder.encode(result) - latents).square().mean((1, 2, 3)),
                "nll": LatentNLL().values(getattr(inversion, "noise", inversion)),
            }
            yield Outcome(prefix + decoding.name, result, nfe + clock.nfe, total, values)


def _sections(measured: Measured) -> list[Section]:
    note = f"{measured.data.name}, encoded to noise at w 1 and decoded as the second column says."
    return [table("Inversion: to noise and back", note, measured.results["inversion"])]


TO_NOISE_AND_BACK = Task("inversion", to_noise_and_back, ("psnr", "ssim", "lpips", "dinov2"))
INVERSION = Benchmark(
    (TO_NOISE_AND_BACK,),
    _sections,
    published=(published("arXiv:2406.14539, Tables 2 and 5, SD1.5", ("LPIPS", "DinoV2", "PSNR"), TABLE_2 | TABLE_5),),
)
