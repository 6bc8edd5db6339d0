"""Scenes as examples, and benchmarks of them: edits whose true results are known, and the tour of a tiny family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from icd_lightning.diffusion import StepGuidance
from icd_lightning.evaluation.benchmark import Bench, Benchmark, Measured, Outcome, Settings, Task
from icd_lightning.evaluation.benchmarks.editing import EDITING, edit, edit_sections
from icd_lightning.evaluation.benchmarks.generation import generate
from icd_lightning.evaluation.benchmarks.inversion import to_noise_and_back
from icd_lightning.evaluation.decodings import Decoding, steps
from icd_lightning.evaluation.examples import DataSet, Example
from icd_lightning.evaluation.report import Section, Style, Table
from icd_lightning.evaluation.results import Results
from icd_lightning.files import write_json
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.tiny.scene_network import GROUPS, label_tensor
from icd_lightning.tiny.scenes import ABSENT, EDITS, HELD_OUT_SEED, check_held_out, random_edit, scene_at
from icd_lightning.tiny.scoring import SceneAttributes, SceneEdits, changed_and_kept, columns_in

SCENES = 128  # held-out scenes to measure on where nobody says how many
METRICS = {
    "inversion": ("psnr", "ssim", "tiny-perceptual"),
    "thresholds": ("psnr",),
    "guidance": ("psnr", "tiny-fd"),
    "generation": ("tiny-agreement", "tiny-fd"),
    "editing": ("edits", "tiny-agreement"),
}
"""By what is done."""
SCORERS = {"attributes": SceneAttributes, "edits": SceneEdits}


def scene_examples(count: int, seed: int) -> list[Example]:
    scenes = [scene_at(seed, index) for index in range(count)]
    return [Example(f"scene-{seed}-{i:05d}", scene.caption(), scene) for i, scene in enumerate(scenes)]


def scene_edits(count: int, seed: int) -> list[Example]:
    """`count` edits of held-out scenes, the kinds in EDITS taking turns, each with its true result.

    An edit that a scene is not fit for ("add" to two objects, "remove" from one) takes the next scene that is.
    """
    examples: list[Example] = []
    index = 0
    while len(examples) < count:
        scene, kind = scene_at(seed, index), EDITS[len(examples) % len(EDITS)]
        if len(scene.things) != {"add": 1, "remove": 2}.get(kind, len(scene.things)):
            index += 1
            continue
        truth, _ = random_edit(scene, np.random.default_rng((seed, index)), kind)
        key = f"edit-{seed}-{index:05d}"
        examples.append(Example(key, scene.caption(), scene, truth.caption(), kind, truth=truth))
        index += 1
    return examples


def data_set(examples: Sequence[Example], seed: int = HELD_OUT_SEED) -> DataSet:
    scorers = SCORERS if examples[0].truth else {"attributes": SceneAttributes}
    about = f"{len(examples)} held-out scenes"
    return DataSet(examples, about, f"scenes {seed}", photographs=False, metrics=METRICS, scorers=scorers)


def held_out_scenes(count: int | None) -> DataSet:
    return data_set(scene_examples(count or SCENES, HELD_OUT_SEED))


TINY_EDIT = Benchmark(
    (EDITING,),
    edit_sections,
    read=lambda settings: data_set(scene_edits(settings.count or SCENES, HELD_OUT_SEED)),
    unread=("data", "images", "natural"),
)
"""Edits of scenes whose true results are known."""


ATTRIBUTE_EDITS = ("color", "shape", "texture", "size", "background color", "background texture")
"""Edits that leave the number of objects alone."""
LABELS = {"ddim": "DDIM-50", "untrained": "untrained", "icd": "iCD"}  # what the tour's tables call methods
STYLES = {
    **dict.fromkeys(("PSNR (dB)", "PSNR to truth", "PSNR outside"), Style(2)),
    **dict.fromkeys(("SSIM", "latent MSE", "seconds"), Style(3)),
    **dict.fromkeys(("changed as asked", "kept"), Style(1, factor=100)),
    **dict.fromkeys(GROUPS, Style(1)),
    "evaluations": Style(0),
}
"""Of the columns of the tour's tables."""


def tour_examples(settings: Settings) -> DataSet:
    """Scenes of the world `seed`, each with the true result of an edit, the kinds taking turns; noise by number."""
    seed = HELD_OUT_SEED if settings.seed is None else check_held_out(settings.seed)
    edits = []
    for number, example in enumerate(scene_examples(settings.count or SCENES, seed)):
        kind = ATTRIBUTE_EDITS[number % len(ATTRIBUTE_EDITS)]
        truth, _ = random_edit(example.picture, np.random.default_rng((0, number)), kind)
        edits.append(replace(example, truth=truth, target=truth.caption(), number=number))
    return data_set(edits, seed)


def _reconstruct(bench: Bench, batch: Sequence[Example], decodings: Sequence[Decoding]) -> Iterator[Outcome]:
    images, autoencoder = bench.images(batch), bench.method.autoencoder
    ceiling = {"autoencoder_psnr": psnr(autoencoder.decode(autoencoder.encode(images)), images)}
    for outcome in to_noise_and_back(bench, batch, decodings):
        yield replace(outcome, values={**outcome.values, **ceiling})


def _dynamic(settings: Settings, default: StepGuidance, method: type) -> list[Decoding]:
    return steps(default.guidance_scale, (1.0, default.tau if settings.tau is None else settings.tau))


def _as_default(settings: Settings, default: StepGuidance, method: type) -> list[Decoding]:
    return [Decoding.step(default.guidance_scale, default.tau)]


def figures(measured: Measured) -> dict[str, dict[str, Any]]:
    """By method: reconstruction by decoding, edits and generation, as plain numbers."""
    examples = measured.data.examples
    change, keep = changed_and_kept(examples)
    there = label_tensor([example.picture for example in examples]) != ABSENT
    of_groups = {group: columns_in(there, group) for group in GROUPS}
    return {
        LABELS.get(back.name, back.name): {
            "reconstruction": [{"guidance": name, **_means(back, name)} for name in back.decodings],
            "generation": {g: _pooled(made, g, counted) for g, counted in of_groups.items()},
            "edits": {
                "changed": _pooled(edits, "changed", change),
                "kept": _pooled(edits, "kept", keep),
                **_means(edits, edits.decodings[0], ("psnr_truth", "psnr_outside", "nfe", "seconds")),
            },
        }
        for back, edits, made in zip(*measured.results.values(), strict=True)
    }


def _means(
    results: Results, decoding: str, columns: Sequence[str] = ("psnr", "ssim", "latent_mse", "nfe", "seconds")
) -> dict[str, float]:
    means = results.of(decoding)[list(columns)].mean().to_dict()
    return {**means, "nfe": round(means["nfe"])}


def _pooled(results: Results, column: str, counted: Tensor) -> float:
    """Share of all attributes that are counted (pictures, len(LABELS)), not the mean of the pictures' shares."""
    weights = counted.sum(1).numpy()
    shares = results.values(column, results.decodings[0])
    return float(np.average(shares[weights > 0], weights=weights[weights > 0]))


def about(measured: Measured) -> dict[str, Any]:
    """What tour tables say of how it was measured."""
    back, edits, _ = (results[0] for results in measured.results.values())
    (decoding,) = edits.decodings
    guidance = edits.options[decoding]
    return {
        "count": len(measured.data.examples),
        "guidance_scale": guidance["w"],
        "tau": back.options[back.decodings[-1]].get("tau", 1.0),
        "edit_tau": guidance.get("tau", 1.0),
        "seed": HELD_OUT_SEED if measured.settings.seed is None else measured.settings.seed,
        "decoding": decoding,
    }


def ceiling(measured: Measured) -> float:
    """PSNR of the autoencoder alone: no method that works on latents comes back better."""
    back = measured.results["reconstruction"][0]
    return float(back.values("autoencoder_psnr", back.decodings[0]).mean())


def tour_tables(measured: Measured) -> list[Section]:
    """Reconstruction, edits and generation, by method: the rows of `figures`."""
    results, facts = figures(measured), about(measured)
    count, decoding = facts["count"], facts["decoding"]

    def table(title: str, note: str, header: tuple[str, ...], rows: list[tuple]) -> Table:
        ours = tuple(i for i, row in enumerate(rows) if row[0] == LABELS["icd"])
        return Table(title, note, ("method", *header), tuple(rows), ours, STYLES)

    back: list[tuple] = [("autoencoder alone", "", ceiling(measured), None, None, None, None)]
    back += [(name, *row.values()) for name, result in results.items() for row in result["reconstruction"]]
    return [
        table(
            "Reconstruction: to noise and back",
            f"{count} held-out pictures, encoded at w 1 and decoded as the second column says. The autoencoder alone "
            "is the best that latents can give. Seconds of one picture, in batches, on this machine.",
            ("decoding", "PSNR (dB)", "SSIM", "latent MSE", "evaluations", "seconds"),
            back,
        ),
        table(
            "Edits by prompt, against their true results",
            f"{count} edits of one attribute each (colour, shape, texture or size of an object, colour or texture of "
            f"the background), {decoding}. Attributes as read by a small network made for this world; PSNR to the true "
            "edit and, outside the edited region, to the original.",
            ("changed as asked", "kept", "PSNR to truth", "PSNR outside", "evaluations", "seconds"),
            [(name, *result["edits"].values()) for name, result in results.items()],
        ),
        table(
            "Generation: attributes of the caption that the picture shows (%)",
            f"{count} pictures from drawn noise, {decoding}, read by the same network.",
            tuple(GROUPS),
            [(name, *(100 * share for share in result["generation"].values())) for name, result in results.items()],
        ),
    ]


def _write(measured: Measured, sections: Sequence[Section]) -> list[Path]:
    file = measured.out / "results.json"
    settings: Mapping[str, Any] = {name: value for name, value in about(measured).items() if name != "decoding"}
    methods = figures(measured)
    write_json(file, {"settings": settings, "autoencoder_psnr": ceiling(measured), "methods": methods})
    return [file]


TOUR = Benchmark(
    (
        Task("reconstruction", _reconstruct, ("psnr", "ssim"), _dynamic, as_family=True),
        Task("edits", edit, ("edits",), _as_default, edits=True, as_family=True),
        Task("pictures", generate, ("attributes",), _as_default, as_family=True),
    ),
    tour_tables,
    read=tour_examples,
    methods=tuple(LABELS),
    unread=("metrics", "data", "images", "natural", "grid"),
    batch_size=64,
    write=_write,
    folder="eval-inversion",
)
"""`icd eval`: the students, the same jumps untrained, and DDIM-50, on the held-out picture world."""
