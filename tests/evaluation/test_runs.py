"""A run with a real method: its files, and that a killed one gives the table of an unbroken one."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from icd_lightning.data.images import to_pictures
from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.baselines.registry import build
from icd_lightning.editing.method import UNGUIDED
from icd_lightning.evaluation import benchmarks
from icd_lightning.evaluation.benchmarks import Bench, Outcome
from icd_lightning.evaluation.examples import scene_edits, scene_examples, stack
from icd_lightning.evaluation.methods import Models
from icd_lightning.evaluation.rows import read_rows
from icd_lightning.evaluation.runs import Results, Run, perform, read_results, slug
from icd_lightning.evaluation.scoring import Scoring
from icd_lightning.models.family import Family
from icd_lightning.tiny.scenes import HELD_OUT_SEED

EXAMPLES = scene_examples(6, HELD_OUT_SEED)
GUIDANCES = {"w 1": UNGUIDED, "w 3, tau 0.8": StepGuidance(3.0, 0.8)}


@pytest.fixture(scope="module")
def bench(random_family) -> Bench:
    return Bench(Models(Family(str(random_family))).load("icd"), 64)


def run_of(bench, root, examples=EXAMPLES, measure=None, **changes) -> Run:
    scoring = Scoring.choose(["psnr", "tiny-fd"], "inversion", examples)
    return Run(
        "icd",
        root,
        examples,
        measure or partial(benchmarks.inversion, bench, guidances=GUIDANCES),
        {"seed": 0, **changes},
        resolution=64,
        batch_size=2,
        scorers=scoring.scorers,
        set_scorers=scoring.set_scorers,
    )


def comparable(results: Results):
    """All figures but seconds, which are never the same twice."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in results.rows]
    return rows, results.set_scores


@pytest.fixture(scope="module")
def unbroken(bench, tmp_path_factory):
    run = run_of(bench, tmp_path_factory.mktemp("unbroken"))
    return run, perform(run)


def test_a_run_writes_a_row_and_a_picture_for_each_and_says_how(unbroken):
    run, results = unbroken
    assert results.decodings == list(GUIDANCES)
    assert len(results.rows) == len(EXAMPLES) * len(GUIDANCES)
    assert {row["nfe"] for row in results.rows} == {8}
    assert read_rows(run.folder / "rows.parquet") == list(results.rows)
    assert all((run.folder / row["image"]).is_file() for row in results.rows)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["seed"] == 0
    assert config["versions"]["torch"]
    means = json.loads((run.folder / "results.json").read_text())["w 1"]["all"]
    assert means["psnr"]["low"] <= means["psnr"]["mean"] <= means["psnr"]["high"]
    assert means["seconds"]["mean"] > 0
    assert means["tiny-fd"] > 0


def test_what_is_scored_is_what_the_files_hold(bench, unbroken):
    run, _ = unbroken
    (first, *_) = benchmarks.inversion(bench, EXAMPLES[:2], GUIDANCES)
    shown = read_results(run.folder, "w 1", EXAMPLES[:2])
    assert np.array_equal(to_pictures(shown), to_pictures(first.images))


@pytest.mark.parametrize("place", ["pictures", "psnr"])
def test_a_killed_run_gives_the_table_of_an_unbroken_one(bench, unbroken, tmp_path, monkeypatch, place):
    run, calls = run_of(bench, tmp_path), []

    def dying(function):
        def call(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return function(*args)

        return call

    if place == "pictures":
        dies = run_of(bench, tmp_path, measure=dying(run.measure))
    else:
        dies = run_of(bench, tmp_path)
        dies.scorers["psnr"] = dying(dies.scorers["psnr"])
    with pytest.raises(KeyboardInterrupt):
        perform(dies)
    assert not (run.folder / "rows.parquet").exists()
    assert comparable(perform(run)) == comparable(unbroken[1])


def test_a_picture_comes_out_the_same_among_others(bench, unbroken, tmp_path):
    results = perform(run_of(bench, tmp_path, list(reversed(EXAMPLES))))
    for decoding in GUIDANCES:
        ours, others = (
            {row["key"]: row["latent_mse"] for row in r.rows if row["decoding"] == decoding}
            for r in (results, unbroken[1])
        )
        assert ours == pytest.approx(others, rel=1e-3)


def test_other_determinants_have_another_folder(bench, tmp_path):
    assert run_of(bench, tmp_path).folder == run_of(bench, tmp_path, EXAMPLES[:3]).folder
    assert run_of(bench, tmp_path).folder != run_of(bench, tmp_path, seed=1).folder


def test_noise_that_is_noise_has_the_likelihood_of_noise(bench):
    (outcome, *_) = benchmarks.inversion(bench, EXAMPLES[:2], {"w 1": UNGUIDED})
    assert outcome.values["nll"].shape == (2,)
    from icd_lightning.metrics.latents import LatentNLL

    assert float(LatentNLL().values(torch.randn(4, 16, 32, 32)).mean()) == pytest.approx(1.419, abs=0.01)


def test_edits_are_averaged_by_type(tmp_path):
    examples = scene_edits(16, HELD_OUT_SEED)

    def measure(batch):
        yield Outcome("as is", stack(batch, 64), 3, 0.5, {"odd": torch.arange(len(batch)) % 2})

    results = perform(Run("none", tmp_path, examples, measure, {}, resolution=64, batch_size=8))
    assert results.kinds == [example.kind for example in examples[:8]]
    assert results.mean("odd", "as is") == 0.5
    assert results.mean("odd", "as is", "shape") == 1.0
    assert results.mean("odd", "as is", "color") == 0.0


def test_a_value_that_no_picture_has_is_a_gap():
    rows = [{"key": "a", "decoding": "x", "kind": "", "image": "", "changed": math.nan}]
    assert Results("icd", rows).mean("changed", "x") is None


def test_drawn_noise_needs_a_method_that_takes_it(random_family):
    sdedit = Bench(Models(Family(str(random_family))).load("sdedit"), 64)
    with pytest.raises(ValueError, match="SDEdit edits pictures and makes none from drawn noise"):
        list(benchmarks.generation(sdedit, EXAMPLES[:1], GUIDANCES))


def test_each_encoders_noise_is_decoded_in_each_way(random_family):
    method = build("ddim", Family(str(random_family)), num_inference_steps=2)  # at t 0 and 500
    guidances = {"none": UNGUIDED, "full": StepGuidance(3.0)}
    found = {o.decoding: o for o in benchmarks.guided_inversion(Bench(method, 64), EXAMPLES[:2], guidances)}
    assert {name: outcome.nfe for name, outcome in found.items()} == {
        "encoder none, decoder none": 4,
        "encoder none, decoder full": 6,
        "encoder full, decoder none": 6,
        "encoder full, decoder full": 8,
    }
    (plain, *_) = benchmarks.inversion(Bench(method, 64), EXAMPLES[:2], {"none": UNGUIDED})
    assert torch.equal(found["encoder none, decoder none"].images, plain.images)
    nll = [found[f"encoder {name}, decoder none"].values["nll"] for name in guidances]
    assert not torch.equal(*nll)


def test_guided_encoding_is_ddims(bench):
    with pytest.raises(ValueError, match="guided encoding is measured on DDIM inversion"):
        list(benchmarks.guided_inversion(bench, EXAMPLES[:1], GUIDANCES))


def test_a_name_for_a_folder_is_plain():
    assert slug("encoder none, decoder tau 0.8") == "encoder-none-decoder-tau-0.8"
