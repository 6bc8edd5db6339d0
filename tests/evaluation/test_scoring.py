"""Scores of edits and pictures: the truth has full marks, the untouched picture its own, and damage what it must."""

import math
from types import SimpleNamespace

import pytest
import torch

from icd_lightning.data.images import to_images
from icd_lightning.evaluation.examples import Example, scene_edits, scene_examples, stack
from icd_lightning.evaluation.scoring import (
    ByMetric,
    OfSets,
    SceneAttributes,
    SceneEdits,
    Scoring,
)
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.tiny.attributes import label_tensor
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import ABSENT, ATTRIBUTES, HELD_OUT_SEED, LABELS

EXAMPLES = scene_edits(16, HELD_OUT_SEED)
ORIGINALS = stack(EXAMPLES, 64)
TRUTHS = to_images([render(example.truth) for example in EXAMPLES])


class Oracle:
    """Reads the very pictures of the examples, before and after their edits."""

    pictures = torch.cat([ORIGINALS, TRUTHS])
    labels = label_tensor([e.picture for e in EXAMPLES] + [e.truth for e in EXAMPLES])

    def read(self, images):
        return self.labels[[int((self.pictures - image).abs().flatten(1).sum(1).argmin()) for image in images]]


def score(results):
    return {name: value.tolist() for name, value in SceneEdits(Oracle())(EXAMPLES, results, ORIGINALS).items()}


def test_the_true_result_has_full_marks():
    scores = score(TRUTHS)
    assert set(scores["changed"]) == set(scores["kept"]) == {1.0}
    assert all(math.isinf(value) for name in ("psnr_truth", "psnr_edited", "psnr_outside") for value in scores[name])


def test_an_untouched_picture_keeps_everything_and_reaches_nothing():
    scores = score(ORIGINALS)
    assert set(scores["changed"]) == {0.0}
    assert set(scores["kept"]) == {1.0}
    assert all(math.isinf(value) for value in scores["psnr_outside"])
    assert all(value < 45 for value in scores["psnr_edited"])
    assert all(e <= t for e, t in zip(scores["psnr_edited"], scores["psnr_truth"], strict=True))


def test_an_object_added_before_another_is_new_and_the_other_kept():
    before = [e for e in scene_edits(400, HELD_OUT_SEED) if e.truth.things[1:] == e.picture.things]
    assert {e.kind for e in before} == {"add"}
    truths, originals = label_tensor([e.truth for e in before]), label_tensor([e.picture for e in before])
    pictures = stack(before, 64)

    def scored(found):
        network = SimpleNamespace(read=lambda images: found)
        columns = SceneEdits(network)(before, pictures, pictures)
        return [columns[name].tolist() for name in ("changed", "kept")]

    every, none = [1.0] * len(before), [0.0] * len(before)
    assert scored(truths) == [every, every]
    assert scored(originals) == [none, every]
    old_lost = truths.clone()
    old_lost[:, [list(LABELS).index(f"{name} 2") for name in ATTRIBUTES]] = ABSENT
    changed, kept = scored(old_lost)
    assert changed == every
    assert kept == pytest.approx([2 / 6] * len(before))  # the background's two of six


def test_harm_outside_of_the_edit_is_not_harm_inside():
    regions = torch.stack([example.editable(64) for example in EXAMPLES])
    harmed = torch.where(regions == 1, TRUTHS, (TRUTHS + 0.2).clamp(-1, 1))
    scores = score(harmed)
    assert all(math.isinf(value) for value in scores["psnr_edited"])
    finite = [value for value, region in zip(scores["psnr_outside"], regions, strict=True) if region.mean() < 1]
    assert all(10 < value < 35 for value in finite)


def test_attributes_of_a_generated_scene_are_shares_of_those_that_are_there():
    scores = SceneAttributes(Oracle())(EXAMPLES, ORIGINALS, None)
    assert all(value == 1 for column in scores.values() for value in column.tolist())
    assert set(scores) >= {"layout", "object color"}


def test_a_metric_scores_each_picture_by_itself():
    psnr = ByMetric("psnr", build_metrics(["psnr"])["psnr"])
    damaged = torch.cat([ORIGINALS[:1], (ORIGINALS[1:] + 0.1).clamp(-1, 1)])
    together = psnr(EXAMPLES, damaged, ORIGINALS)["psnr"]
    alone = [psnr([e], d[None], o[None])["psnr"] for e, d, o in zip(EXAMPLES, damaged, ORIGINALS, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert math.isinf(together[0])


def test_a_masked_metric_takes_the_edits_region_and_names_the_example_without_one():
    inside = ByMetric("mse-edited", build_metrics(["mse-edited"])["mse-edited"])
    outside = ByMetric("mse-unedited", build_metrics(["mse-unedited"])["mse-unedited"])
    assert all(value > 0 for value in inside(EXAMPLES, TRUTHS, ORIGINALS)["mse-edited"])
    assert all(
        value in (0.0,) or math.isnan(value) for value in outside(EXAMPLES, TRUTHS, ORIGINALS)["mse-unedited"].tolist()
    )
    with pytest.raises(ValueError, match="masks"):
        inside(scene_examples(1, 0), ORIGINALS[:1], ORIGINALS[:1])


def test_a_set_is_scored_in_any_batches():
    metric = OfSets(build_metrics(["tiny-fd"])["tiny-fd"])
    shifted = ORIGINALS.flip(0)
    whole = metric([(TRUTHS, shifted)])
    parts = metric([(TRUTHS[:5], shifted[:5]), (TRUTHS[5:], shifted[5:])])
    assert parts == pytest.approx(whole, rel=1e-3)


def test_the_defaults_suit_the_examples():
    edits = Scoring.choose(None, "editing", EXAMPLES)
    assert set(edits.scorers) == {"edits", "tiny-agreement"}
    assert set(Scoring.choose(None, "guidance", scene_examples(1, 0)).set_scorers) == {"tiny-fd"}


def test_what_is_recorded_anyway_is_not_asked_for_twice():
    assert set(Scoring.choose(["psnr", "latent-nll"], "inversion", EXAMPLES).scorers) == {"psnr"}


def test_scores_of_scenes_are_refused_for_photographs(tmp_path):
    with pytest.raises(ValueError, match="metric 'edits' is for scenes"):
        Scoring.choose(["edits"], "editing", [Example("a", "", tmp_path / "a.png")])


def test_pictures_that_are_not_there_are_not_compared_with():
    with pytest.raises(ValueError, match="metric 'psnr' compares with pictures, and the data hold captions alone"):
        Scoring.choose(["psnr"], "generation", [Example("a", "a red star")])


def test_noise_that_is_not_measured_has_no_likelihood():
    with pytest.raises(ValueError, match=r"'latent-nll' is of noise .* which editing does not measure"):
        Scoring.choose(["latent-nll"], "editing", EXAMPLES)


def test_an_unknown_metric_is_named():
    with pytest.raises(ValueError, match="no metric 'psnrr'"):
        Scoring.choose(["psnrr"], "inversion", EXAMPLES)
