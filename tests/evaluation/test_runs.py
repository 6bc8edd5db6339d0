"""A run with a real method: its files, and that a killed one gives the table of an unbroken one."""

import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from icd_lightning.data.images import to_pictures
from icd_lightning.diffusion import StepGuidance
from icd_lightning.evaluation.benchmark import Bench, Outcome
from icd_lightning.evaluation.benchmarks.generation import generate
from icd_lightning.evaluation.benchmarks.guidance import guide_both_ways
from icd_lightning.evaluation.benchmarks.inversion import TO_NOISE_AND_BACK, to_noise_and_back
from icd_lightning.evaluation.decodings import UNGUIDED, Decoding, steps
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.evaluation.methods import Models
from icd_lightning.evaluation.results import Results, read_results, slug
from icd_lightning.evaluation.runs import Run, perform
from icd_lightning.evaluation.scoring import Scoring
from icd_lightning.metrics.reconstruction import PSNR
from icd_lightning.models.family import Family
from icd_lightning.tiny.benchmarks import data_set, scene_edits, scene_examples
from icd_lightning.tiny.scenes import HELD_OUT_SEED

EXAMPLES = scene_examples(6, HELD_OUT_SEED)
DECODINGS = [UNGUIDED, Decoding.step(3.0, 0.8)]


@pytest.fixture(scope="module")
def bench(random_family) -> Bench:
    return Bench(Models(Family(str(random_family))).load("icd"), 64)


def run_of(bench, root, examples=EXAMPLES, measure=None, metrics=("psnr", "tiny-fd"), **changes) -> Run:
    return Run(
        "icd",
        root,
        data_set(examples),
        measure or partial(to_noise_and_back, bench, decodings=DECODINGS),
        {"seed": 0, **changes},
        resolution=64,
        batch_size=2,
        scoring=Scoring.choose(metrics, TO_NOISE_AND_BACK, data_set(examples)),
        decodings={one.name: one.options for one in DECODINGS},
    )


def comparable(results: Results):
    """All figures but seconds, which are never the same twice."""
    return results.frame.drop(columns="seconds").to_dict("records"), results.set_scores


@pytest.fixture(scope="module")
def unbroken(bench, tmp_path_factory):
    run = run_of(bench, tmp_path_factory.mktemp("unbroken"))
    return run, perform(run)


def test_a_run_writes_a_row_and_a_picture_for_each_and_is_read_back(unbroken):
    run, results = unbroken
    assert results.decodings == ["w 1", "w 3, tau 0.8"]
    assert len(results.frame) == len(EXAMPLES) * 2
    assert set(results.frame.nfe) == {8}
    assert all((run.folder / image).is_file() for image in results.frame.image)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["seed"] == 0
    assert config["versions"]["torch"]
    means = json.loads((run.folder / "results.json").read_text())["w 1"]["all"]
    assert means["psnr"]["low"] <= means["psnr"]["mean"] <= means["psnr"]["high"]
    assert means["tiny-fd"] > 0
    again = Results.read("icd", run.folder)
    assert comparable(again) == comparable(results)
    assert again.options == {"w 1": {"w": 1.0}, "w 3, tau 0.8": {"w": 3.0, "tau": 0.8}}
    assert (again.styles["psnr"].best, again.styles["psnr"].digits, again.styles["tiny-fd"].best) == ("max", 2, "min")


def test_what_is_scored_is_what_the_files_hold(bench, unbroken):
    run, _ = unbroken
    (first, *_) = to_noise_and_back(bench, EXAMPLES[:2], DECODINGS)
    shown = read_results(run.folder, "w 1", EXAMPLES[:2])
    assert np.array_equal(to_pictures(shown), to_pictures(first.images))


@pytest.mark.parametrize("place", ["pictures", "psnr"])
def test_a_killed_run_gives_the_table_of_an_unbroken_one(bench, unbroken, tmp_path, place):
    run, calls = run_of(bench, tmp_path), []

    def dying(function):
        def call(*args, **options):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    dies = run_of(bench, tmp_path, measure=dying(run.measure) if place == "pictures" else None)
    if place == "psnr":
        scorer = dies.scoring.scorers["psnr"]
        scorer.metric.per_image = dying(scorer.metric.per_image)
    with pytest.raises(KeyboardInterrupt):
        perform(dies)
    assert not (run.folder / "rows.parquet").exists()
    assert comparable(perform(run)) == comparable(unbroken[1])


def test_a_picture_comes_out_the_same_among_others(bench, unbroken, tmp_path):
    results = perform(run_of(bench, tmp_path, list(reversed(EXAMPLES))))
    for decoding in results.decodings:
        ours, others = (r.of(decoding).set_index("key").latent_mse.to_dict() for r in (results, unbroken[1]))
        assert ours == pytest.approx(others, rel=1e-3)


def test_other_determinants_have_another_folder(bench, tmp_path):
    assert run_of(bench, tmp_path).folder == run_of(bench, tmp_path, EXAMPLES[:3]).folder
    assert run_of(bench, tmp_path).folder != run_of(bench, tmp_path, seed=1).folder


def as_they_are(batch):
    yield Outcome("as is", stack(batch, 64), 1, 0.5)


def test_two_data_sets_of_the_same_names_do_not_corrupt_each_other(tmp_path):
    def examples(folder, brightness):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (brightness,) * 3).save(tmp_path / folder / "a.png")
        return [Example("a.png", "a square", tmp_path / folder / "a.png")]

    def measured(examples, *metrics):
        results = perform(run_of(None, tmp_path / "out", examples, as_they_are, metrics))
        return {metric: results.frame[metric].tolist() for metric in metrics}

    first, second = examples("a", 10), examples("b", 200)
    assert measured(first, "psnr") == measured(second, "psnr") == {"psnr": [math.inf]}
    assert measured(first, "psnr", "mse") == {"psnr": [math.inf], "mse": [0.0]}
    run = run_of(None, tmp_path / "out", second, as_they_are, ("psnr",))
    with pytest.raises(ValueError, match=r"is not a result of a\.png: run it again"):
        read_results(run.folder, "as is", second)


def _without_keys(file: Path) -> None:
    pd.read_parquet(file).drop(columns="key").to_parquet(file)


def _with_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE = {
    "cut": lambda file: os.truncate(file, 100),
    "empty": lambda file: os.truncate(file, 0),
    "a pipe": _with_a_pipe,
    "without keys": _without_keys,
}


@pytest.mark.parametrize(
    ("pattern", "damage"), [*(("*.parquet", name) for name in DAMAGE), ("*.png", "cut"), ("*.png", "a pipe")]
)
def test_what_is_damaged_is_measured_anew(tmp_path, pattern, damage):
    run = run_of(None, tmp_path, EXAMPLES[:2], as_they_are, ("psnr",))
    whole = comparable(perform(run))
    for file in [*(run.folder / ("images" if pattern == "*.png" else "parts")).rglob(pattern)]:
        DAMAGE[damage](file)
    assert comparable(perform(run)) == whole
    assert comparable(Results.read(run.name, run.folder)) == whole


@pytest.mark.parametrize("damage", ["cut", "without a column"])
def test_results_that_are_damaged_are_told_of(tmp_path, damage):
    run = run_of(None, tmp_path, EXAMPLES[:2], as_they_are, ("psnr",))
    perform(run)
    if damage == "cut":
        os.truncate(run.folder / "rows.parquet", 100)
    else:
        (run.folder / "results.json").write_text('{"as is": {}}')
    with pytest.raises(ValueError, match=r"does not hold what a run leaves .*: run it again"):
        Results.read(run.name, run.folder)


def test_a_metric_of_another_version_scores_again(tmp_path, monkeypatch):
    run = run_of(None, tmp_path, EXAMPLES[:2], as_they_are, ("psnr",))
    assert perform(run).frame.psnr.tolist() == [math.inf, math.inf]
    monkeypatch.setattr(PSNR, "values", lambda self, images, reference: torch.full((len(images),), 7.0))
    assert perform(run).frame.psnr.tolist() == [math.inf, math.inf]  # the same version
    monkeypatch.setattr(PSNR, "version", PSNR.version + 1)
    assert perform(run).frame.psnr.tolist() == [7.0, 7.0]


def test_edits_are_averaged_by_type(tmp_path):
    examples = scene_edits(16, HELD_OUT_SEED)

    def measure(batch):
        yield Outcome("as is", stack(batch, 64), 3, 0.5, {"odd": torch.arange(len(batch)) % 2})

    results = perform(Run("none", tmp_path, data_set(examples), measure, {}, resolution=64, batch_size=8))
    assert results.kinds == [example.kind for example in examples[:8]]
    assert results.mean("odd", "as is") == 0.5
    assert results.mean("odd", "as is", "shape") == 1.0
    assert results.mean("odd", "as is", "color") == 0.0


def test_a_value_that_no_picture_has_is_a_gap():
    rows = pd.DataFrame([{"key": "a", "decoding": "x", "kind": "", "image": "", "changed": math.nan}])
    assert Results("icd", rows).mean("changed", "x") is None


def test_drawn_noise_needs_a_method_that_takes_it(random_family):
    sdedit = Bench(Models(Family(str(random_family))).load("sdedit"), 64)
    with pytest.raises(ValueError, match="SDEdit edits pictures and makes none from drawn noise"):
        list(generate(sdedit, EXAMPLES[:1], DECODINGS))


def test_each_encoders_noise_is_decoded_in_each_way(random_family, bench):
    models = Models(Family(str(random_family)))
    ddim = replace(bench, method=models.variant("ddim", models.load("ddim"), {"num_inference_steps": 2.0}))
    both = [replace(UNGUIDED, label="none"), Decoding(StepGuidance(3.0), label="full")]
    outcomes = {outcome.decoding: outcome for outcome in guide_both_ways(ddim, EXAMPLES[:2], both)}
    assert {name: outcome.nfe for name, outcome in outcomes.items()} == {
        "encoder none, decoder none": 4,
        "encoder none, decoder full": 6,
        "encoder full, decoder none": 6,
        "encoder full, decoder full": 8,
    }
    (plain, *_) = to_noise_and_back(ddim, EXAMPLES[:2], both)
    assert torch.equal(outcomes["encoder none, decoder none"].images, plain.images)
    assert not torch.equal(*(outcomes[f"encoder {name}, decoder none"].values["nll"] for name in ("none", "full")))
    with pytest.raises(ValueError, match="guided encoding is measured on DDIM inversion"):
        list(guide_both_ways(bench, EXAMPLES[:1], both))


def test_what_is_fit_to_a_guidance_is_fit_to_each(random_family):
    models = Models(Family(str(random_family)))
    method = models.variant("nti", models.load("nti"), {"num_inference_steps": 3.0})
    bench, batch = Bench(method, 64), EXAMPLES[:1]
    images, prompts = bench.images(batch), [batch[0].caption]
    unfit = method.generate(prompts, method.invert(images, prompts), guidance=StepGuidance(2.0))
    made = {one.decoding: one.images for one in to_noise_and_back(bench, batch, steps(2.0, (1.0,)))}
    fit = method.guided_by(StepGuidance(2.0))
    torch.testing.assert_close(made["w 2"], fit.generate(prompts, fit.invert(images, prompts)))
    assert (made["w 2"] - unfit).abs().max() > 1e-3


def test_a_name_for_a_folder_is_plain():
    assert slug("encoder none, decoder tau 0.8") == "encoder-none-decoder-tau-0.8"
