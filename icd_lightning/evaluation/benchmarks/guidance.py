"""Guidance at both ends of an inversion, and when it turns on (Table 1 and Fig. 4 of arXiv:2406.14539)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from icd_lightning.diffusion import StepGuidance, ddim_invert
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.editing.method import Clock
from icd_lightning.evaluation.benchmark import Bench, Benchmark, Measured, Outcome, Settings, Task
from icd_lightning.evaluation.benchmarks.inversion import decode, to_noise_and_back
from icd_lightning.evaluation.decodings import UNGUIDED, Decoding
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.report import MAX_SERIES, Curve, Section, Style, Table, Value
from icd_lightning.evaluation.results import Results

GUIDANCES = ("none", "tau 0.6", "tau 0.8", "full")
TABLE_1 = {  # decoder's guidance -> FID on 5K pictures for the encoder's GUIDANCES
    "none": (11.0, 36.6, 63.4, 100.5),
    "tau 0.6": (11.4, 23.5, 67.8, 102.6),
    "tau 0.8": (15.0, 14.6, 52.2, 108.5),
    "full": (19.0, 19.2, 19.0, 102.1),
}
TABLE_1_NLL = (1.401, 1.409, 1.415, 1.428)  # latent NLL per dimension for the encoder's GUIDANCES
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
    rows = {}
    for decoder in GUIDANCES:
        ours = [result.mean(quality, f"encoder {encoder}, decoder {decoder}") for encoder in GUIDANCES]
        rows[decoder] = (*ours, *TABLE_1[decoder])
    title = f"Table 1: {quality} by the encoder's and the decoder's guidance"
    note = (
        "DDIM-50, guided both ways by classifier-free guidance. The paper's columns are FID, of SD1.5 on 5K pictures."
    )
    return _by_encoder(title, note, "decoder", rows, (result.styles[quality].digits, 1))


def table_1_nll(result: Results) -> Table:
    """Negative log-likelihood of what each encoder's guidance makes of pictures."""
    ours = [result.mean("nll", f"encoder {encoder}, decoder none") for encoder in GUIDANCES]
    note = "Per dimension, under the standard normal distribution; noise drawn from it has 1.419."
    return _by_encoder("Table 1: latent NLL", note, "", {"": (*ours, *TABLE_1_NLL)}, (3, 3))


def _by_encoder(
    title: str, note: str, head: str, rows: Mapping[str, Sequence[Value]], digits: tuple[int | None, int]
) -> Table:
    """Columns for each guidance of the encoder, ours and the paper's, each with its decimals."""
    ours, papers = (Style(number) for number in digits)
    columns = {f"encoder {name}": ours for name in GUIDANCES} | {f"paper: {name}": papers for name in GUIDANCES}
    return Table(title, note, (head, *columns), tuple((name, *row) for name, row in rows.items()), styles=columns)


def _sections(measured: Measured) -> list[Section]:
    """Table 1, and Fig. 4: what comes back, against the threshold below which the decoder is guided."""
    (both,) = measured.results["guidance"]
    tables = [table_1(both, quality) for quality in both.set_scores or ("latent_mse",)]
    series = {}
    for result in measured.results["thresholds"][:MAX_SERIES]:
        errors = [float(np.nanmean(result.values("latent_mse", name))) for name in result.decodings]
        series[result.name] = (TURN_ON, errors)
    title, note = (
        "latent_mse against the turn-on threshold",
        "Encoded unguided, decoded with guidance at t <= tau T only.",
    )
    return [*tables, table_1_nll(both), Curve(title, note, "tau", "latent_mse", series)]


BOTH_WAYS = Task("guidance", guide_both_ways, ("psnr", "fid"), _both_ways, methods=("ddim",), suffix=", both ways")
THRESHOLDS = Task("thresholds", to_noise_and_back, ("psnr",), _thresholds)
GUIDANCE = Benchmark((BOTH_WAYS, THRESHOLDS), _sections, unread=("natural", "tau", "grid"))
