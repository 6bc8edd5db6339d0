"""Scores of edits and pictures: the truth has full marks, the untouched picture its own, and damage what it must."""

import math
from types import SimpleNamespace

import pytest
import torch
from metrics_case import noisy

from icd_lightning.data.images import to_images
from icd_lightning.evaluation.benchmark import BENCHMARKS, Benchmark
from icd_lightning.evaluation.benchmarks.editing import EDITING
from icd_lightning.evaluation.benchmarks.generation import FROM_NOISE
from icd_lightning.evaluation.benchmarks.inversion import TO_NOISE_AND_BACK
from icd_lightning.evaluation.examples import DataSet, Example, stack
from icd_lightning.evaluation.report import Style
from icd_lightning.evaluation.scoring import ByMetric, Scoring, _check, score_set
from icd_lightning.metrics.base import PerImage, PictureMetric
from icd_lightning.metrics.registry import METRICS, build_metrics, expand
from icd_lightning.tiny.benchmarks import data_set, scene_edits, scene_examples
from icd_lightning.tiny.scene_network import label_tensor
from icd_lightning.tiny.scenes import ABSENT, ATTRIBUTES, HELD_OUT_SEED, LABELS
from icd_lightning.tiny.scoring import SceneAttributes, SceneEdits

EXAMPLES = scene_edits(16, HELD_OUT_SEED)
ORIGINALS = stack(EXAMPLES, 64)
TRUTHS = to_images([example.truth.draw(64) for example in EXAMPLES])
EDITS, CAPTIONS = data_set(EXAMPLES), DataSet([Example("a", "a red star")], "1 of a.csv", "0")


class Loudness(PerImage):
    """Of noise, which no file of a run holds."""

    needs = ("noise",)

    def values(self, noise):
        return noise.square().mean((1, 2, 3))


class Agreement(PictureMetric):
    """Of all pictures and prompts together."""

    needs = ("images", "prompts")

    def take(self, images, prompts):
        pass

    def compute(self):
        return torch.ones(())


class Oracle:
    """Reads the very pictures of the examples, before and after their edits."""

    pictures = torch.cat([ORIGINALS, TRUTHS])
    labels = label_tensor([e.picture for e in EXAMPLES] + [e.truth for e in EXAMPLES])

    def read(self, images):
        return self.labels[[int((self.pictures - image).abs().flatten(1).sum(1).argmin()) for image in images]]


def score(results):
    return {name: value.tolist() for name, value in SceneEdits(Oracle())(EXAMPLES, results, ORIGINALS).items()}


def test_the_true_result_has_full_marks_and_an_untouched_picture_its_own():
    truth, untouched = score(TRUTHS), score(ORIGINALS)
    assert set(truth["changed"]) == set(truth["kept"]) == set(untouched["kept"]) == {1.0}
    assert set(untouched["changed"]) == {0.0}
    assert all(math.isinf(value) for name in ("psnr_truth", "psnr_edited", "psnr_outside") for value in truth[name])
    assert all(math.isinf(value) for value in untouched["psnr_outside"])
    assert all(e <= t < 45 for e, t in zip(untouched["psnr_edited"], untouched["psnr_truth"], strict=True))


def test_harm_outside_of_the_edit_is_not_harm_inside():
    regions = torch.stack([example.editable(64) for example in EXAMPLES])
    scores = score(torch.where(regions == 1, TRUTHS, (TRUTHS + 0.2).clamp(-1, 1)))
    assert all(math.isinf(value) for value in scores["psnr_edited"])
    finite = [value for value, region in zip(scores["psnr_outside"], regions, strict=True) if region.mean() < 1]
    assert all(10 < value < 35 for value in finite)


def test_an_object_added_before_another_is_new_and_the_other_kept():
    before = [e for e in scene_edits(400, HELD_OUT_SEED) if e.truth.things[1:] == e.picture.things]
    truths, originals = label_tensor([e.truth for e in before]), label_tensor([e.picture for e in before])
    pictures = stack(before, 64)

    def scored(labels):
        columns = SceneEdits(SimpleNamespace(read=lambda images: labels))(before, pictures, pictures)
        return [columns[name].tolist() for name in ("changed", "kept")]

    every, none = [1.0] * len(before), [0.0] * len(before)
    assert scored(truths) == [every, every]
    assert scored(originals) == [none, every]
    old_lost = truths.clone()
    old_lost[:, [list(LABELS).index(f"{name} 2") for name in ATTRIBUTES]] = ABSENT
    changed, kept = scored(old_lost)
    assert changed == every
    assert kept == pytest.approx([2 / 6] * len(before))  # the background's two of six


def test_attributes_are_shares_of_those_that_are_there():
    scores = SceneAttributes(Oracle())(EXAMPLES, ORIGINALS, None)
    assert all(value == 1 for column in scores.values() for value in column.tolist())
    mixed = SceneAttributes(Oracle())(EXAMPLES, ORIGINALS.roll(1, 0), None)
    shares = [value for value in mixed["object color"].tolist() if not math.isnan(value)]
    assert {0.0, 0.5, 1.0} >= set(shares) > {1.0}


def test_a_metric_scores_each_picture_by_itself_and_a_set_in_any_batches():
    psnr = ByMetric("psnr", build_metrics(["psnr"])["psnr"])
    damaged = torch.cat([ORIGINALS[:1], (ORIGINALS[1:] + 0.1).clamp(-1, 1)])
    together = psnr(EXAMPLES, damaged, ORIGINALS)["psnr"]
    alone = [psnr([e], d[None], o[None])["psnr"] for e, d, o in zip(EXAMPLES, damaged, ORIGINALS, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    distance, shifted = build_metrics(["tiny-fd"])["tiny-fd"], ORIGINALS.flip(0)
    parts = score_set(distance, [(TRUTHS[:5], shifted[:5]), (TRUTHS[5:], shifted[5:])])
    assert parts == pytest.approx(score_set(distance, [(TRUTHS, shifted)]), rel=1e-3)


def test_an_edit_is_scored_by_its_target_and_a_picture_by_its_caption():
    agreement = build_metrics(["tiny-agreement"])["tiny-agreement"]
    edits, generation = (ByMetric("x", agreement, edits)(EXAMPLES, TRUTHS, None)["x"].mean() for edits in (True, False))
    assert edits > generation + 0.02


def test_a_masked_metric_takes_the_edits_region():
    scoring = Scoring.choose(["mse-edited", "mse-unedited"], EDITING, EDITS)
    inside, outside = (score(EXAMPLES, TRUTHS, ORIGINALS) for score in scoring.scorers.values())
    assert all(value > 0 for value in inside["mse-edited"])
    assert all(value == 0 or math.isnan(value) for value in outside["mse-unedited"].tolist())


@pytest.mark.parametrize(
    "name", ["edits", "attributes", "psnr", "ssim", "mse-unedited", "tiny-agreement", "tiny-perceptual", "tiny-fd"]
)
def test_each_name_works_by_itself(name):
    scoring = Scoring.choose([name], EDITING, EDITS)
    assert [*scoring.scorers, *scoring.of_sets] == [name]
    for scorer in scoring.scorers.values():
        columns = scorer(EXAMPLES[:2], TRUTHS[:2], ORIGINALS[:2])
        assert columns.keys() == scorer.styles.keys()
    assert all(score_set(metric, [(TRUTHS, ORIGINALS)]) >= 0 for metric in scoring.of_sets.values())


def test_the_defaults_suit_the_examples_and_styles_are_the_metrics_own():
    edits = Scoring.choose(None, EDITING, EDITS)
    assert set(edits.scorers) == {"edits", "tiny-agreement"}
    assert edits.styles["changed"] == edits.styles["tiny-agreement"] == Style(1, "max", 100)
    assert edits.styles["psnr_outside"] == Style(2, "max")
    back = Scoring.choose(None, TO_NOISE_AND_BACK, data_set(scene_examples(1, 0)))
    assert back.styles["tiny-perceptual"].best == back.styles["latent_mse"].best == "min"
    assert set(Scoring.choose(["psnr", "latent-nll"], TO_NOISE_AND_BACK, EDITS).scorers) == {"psnr"}  # it is recorded


@pytest.mark.parametrize(
    ("name", "task", "data", "message"),
    [
        ("edits", EDITING, CAPTIONS, "no metric 'edits'"),
        ("psnrr", TO_NOISE_AND_BACK, EDITS, "no metric 'psnrr'"),
        ("psnr", FROM_NOISE, CAPTIONS, "metric 'psnr' compares with pictures, and the data hold captions alone"),
        ("latent-nll", EDITING, EDITS, r"'latent-nll' is of noise .* which editing does not measure"),
        ("mse-edited", TO_NOISE_AND_BACK, data_set(scene_examples(2, 0)), "'mse-edited' is of a part of the picture"),
        (f"{__name__}.Loudness", TO_NOISE_AND_BACK, EDITS, "needs noise, which it is not given here"),
        (f"{__name__}.Agreement", EDITING, EDITS, "needs prompts, .* one of all together images and reference"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_is_measured(name, task, data, message):
    with pytest.raises(ValueError, match=message):
        Scoring.choose([name], task, data)


@pytest.mark.parametrize("name", ["ssim", "ssim-unedited"])
def test_pictures_smaller_than_a_window_are_refused_before_anything_is_measured(name):
    told = r"SSIM is of pictures of 11 pixels a side and more, and got a side of 10: take larger ones"
    with pytest.raises(ValueError, match=told):
        Scoring.choose([name], EDITING, EDITS, 10)
    metric = Scoring.choose([name], EDITING, EDITS, 11).scorers[name].metric
    masks = torch.zeros(2, 1, 11, 20)
    assert metric.per_image(*noisy(2, size=(11, 20)), masks=masks).isfinite().all()
    with pytest.raises(ValueError, match=told):
        metric.update(*noisy(2, size=(10, 20)), masks=masks[..., :10, :])


@pytest.mark.parametrize("name", BENCHMARKS.entries)
def test_what_a_benchmark_scores_by_default_is_there(name):
    """Without the networks: classes say what metrics need."""
    benchmark = Benchmark.find(name)
    for task in (*benchmark.tasks, *benchmark.grid_tasks):
        for metric in expand([name for name in task.metrics if name not in EDITS.scorers] or ["psnr"]):
            cls = METRICS.find(metric.removesuffix("-unedited").removesuffix("-edited")).load()
            _check(metric, cls.__new__(cls), task, EDITS)
