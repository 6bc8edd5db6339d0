"""Pictures of captions, from drawn noise (Table 4 of arXiv:2406.14539; over a grid Fig. 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from icd_lightning.editing.method import Clock, EditingMethod, seeded_noise
from icd_lightning.evaluation.benchmark import Bench, Benchmark, Measured, Outcome, Task, published
from icd_lightning.evaluation.benchmarks.inversion import TO_NOISE_AND_BACK
from icd_lightning.evaluation.decodings import Decoding
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.report import Section
from icd_lightning.evaluation.summaries import LAST, table, trade_off

TABLE_4 = {  # FID, CLIP, ImageReward
    "DDIM-50": (18.73, 0.266, 0.201),
    "CD4": (18.45, 0.259, 0.044),
    "CD3": (17.96, 0.258, -0.009),
    "CD4, tau 0.8": (16.25, 0.254, -0.193),
    "CD4, tau 0.7": (16.38, 0.253, -0.217),
    "CD3, tau 0.7": (17.66, 0.251, -0.351),
}


def generate(bench: Bench, batch: Sequence[Example], decodings: Sequence[Decoding]) -> Iterator[Outcome]:
    prompts, method = [example.caption for example in batch], bench.method
    if not isinstance(method, EditingMethod):
        raise ValueError(f"{type(method).__name__} edits pictures and makes none from drawn noise; choose icd or ddim")
    shape = method.latent_shape(len(batch), bench.resolution, bench.resolution)
    noise = seeded_noise(shape, bench.seeds(batch), bench.device)
    for decoding in decodings:
        clock = Clock(bench.device)
        images = method.generate(prompts, noise, guidance=decoding.guidance, on_step=clock.count)
        yield Outcome(decoding.name, images, clock.nfe, clock.seconds() / len(batch))


def _sections(measured: Measured) -> list[Section]:
    results = measured.results["generation"]
    sections: list[Section] = [table("Generation", f"{measured.data.name}: their captions, from drawn noise.", results)]
    if measured.settings.has_grid:
        keys, both = ["key", "decoding"], []
        for one, back in zip(results, measured.results["inversion"], strict=True):
            both.append(replace(one, frame=one.frame.merge(back.frame[[*keys, "latent_mse"]], on=keys)))
        if scores := [name for name in results[0].columns if name not in LAST]:
            title = f"{scores[0]} of generation against the error of inversion"
            sections.append(trade_off(both, "latent_mse", scores[0], title))
    return sections


FROM_NOISE = Task("generation", generate, ("image-reward", "clip-t", "fid"))
GENERATION = Benchmark(
    (FROM_NOISE,),
    _sections,
    grid_tasks=(replace(TO_NOISE_AND_BACK, suffix=", to noise and back"),),
    published=(published("arXiv:2406.14539, Table 4, SD1.5", ("FID", "CLIP", "ImageReward"), TABLE_4),),
)
