"""Guidance at both ends of an inversion, and when it turns on (Table 1 and Fig. 4 of arXiv:2406.14539)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from icd_lightning.diffusion import StepGuidance, ddim_invert
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.evaluation.bench import Bench, Clock, Outcome
from icd_lightning.evaluation.benchmark import Benchmark, Measured, Settings, Task
from icd_lightning.evaluation.benchmarks.inversion import decode, to_noise_and_back
from icd_lightning.evaluation.decodings import UNGUIDED, Decoding
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.published import GUIDANCES, TABLE_1, TABLE_1_NLL
from icd_lightning.evaluation.report import MAX_SERIES, Curve, Section, Table, Value
from icd_lightning.evaluation.runs import Results

TURN_ON = tuple(i / 10 for i in range(11))
"""Thresholds of Fig. 4."""


def guide_both_ways(bench: Bench, batch: Sequence[Example], decodings: Sequence[Decoding]) -> Iterator[Outcome]:
    """To noise by DDIM under each guidance, and back from each of these noises under each guidance."""
    method = bench.method
    if not isinstance(method, DDIMInversion):
        raise ValueError(f"guided encoding is measured on DDIM inversion, not on {type(method).__name__}")
    images, prompts, noises = bench.images(batch), [example.caption for example in batch], {}
    latents = method.autoencoder.encode(images)
    for decoding in decodings:
        clock = Clock(bench.device)
        denoise = method.denoiser(prompts, decoding.guidance)
        noise = ddim_invert(denoise, latents, method.timesteps, method.process, on_step=clock.count)
        noises[f"encoder {decoding.name}, decoder "] = (noise, clock.nfe, clock.seconds())
    yield from decode(bench, images, prompts, noises, decodings)


def _both_ways(settings: Settings, default: StepGuidance, method: type) -> list[Decoding]:
    schedules = (UNGUIDED.guidance, *(StepGuidance(default.guidance_scale, tau) for tau in (0.6, 0.8, 1.0)))
    return [Decoding(schedule, label=name) for name, schedule in zip(GUIDANCES, schedules, strict=True)]


def _thresholds(settings: Settings, default: StepGuidance, method: type) -> list[Decoding]:
    return [Decoding(StepGuidance(default.guidance_scale, tau), {"tau": tau}) for tau in TURN_ON]


def table_1(result: Results, quality: str) -> Table:
    """A score by the decoder's guidance (rows) and the encoder's (columns)."""
    rows: list[tuple[Value, ...]] = []
    for decoder in GUIDANCES:
        ours = [result.mean(quality, f"encoder {encoder}, decoder {decoder}") for encoder in GUIDANCES]
        rows.append((decoder, *ours, *TABLE_1[decoder]))
    return _by_encoder(
        f"Table 1: {quality} by the encoder's and the decoder's guidance",
        "DDIM-50, guided both ways by classifier-free guidance. The paper's columns are FID, of SD1.5 on 5K pictures.",
        "decoder",
        rows,
        (None, *(result.style(quality).digits for _ in GUIDANCES), *(1 for _ in GUIDANCES)),
    )


def table_1_nll(result: Results) -> Table:
    """Negative log-likelihood of what each encoder's guidance makes of pictures."""
    ours = [result.mean("nll", f"encoder {encoder}, decoder none") for encoder in GUIDANCES]
    note = "Per dimension, under the standard normal distribution; noise drawn from it has 1.419."
    return _by_encoder("Table 1: latent NLL", note, "", [("", *ours, *TABLE_1_NLL)], (None, *(3 for _ in range(8))))


def _by_encoder(title: str, note: str, head: str, rows, digits) -> Table:
    header = (head, *(f"encoder {name}" for name in GUIDANCES), *(f"paper: {name}" for name in GUIDANCES))
    return Table(title, note, header, tuple(rows), digits=digits)


def threshold_curve(results: Sequence[Results]) -> Curve:
    """Fig. 4: what comes back, against the threshold below which the decoder is guided."""
    series = {}
    for result in results[:MAX_SERIES]:
        errors = [float(np.nanmean(result.values("latent_mse", name))) for name in result.decodings]
        series[result.name] = (TURN_ON, errors)
    note = "Encoded unguided, decoded with guidance at t <= tau T only."
    return Curve("latent_mse against the turn-on threshold", note, "tau", "latent_mse", series)


def _sections(measured: Measured) -> list[Section]:
    (both,) = measured.results["guidance"]
    qualities = both.set_scores or ("latent_mse",)
    curve = threshold_curve(measured.results["thresholds"])
    return [*(table_1(both, quality) for quality in qualities), table_1_nll(both), curve]


BOTH_WAYS = Task("guidance", guide_both_ways, ("psnr", "fid"), _both_ways, methods=("ddim",), suffix=", both ways")
THRESHOLDS = Task("thresholds", to_noise_and_back, ("psnr",), _thresholds)
GUIDANCE = Benchmark((BOTH_WAYS, THRESHOLDS), _sections, unread=("natural", "tau", "grid"))
