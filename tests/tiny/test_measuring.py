"""The picture world as a benchmark: perfect, lazy and useless methods score as they must."""

import json
import math

import pytest
import torch

from icd_lightning.diffusion import Step, StepGuidance
from icd_lightning.editing.method import EditingMethod
from icd_lightning.tiny.measuring import (
    ATTRIBUTE_EDITS,
    held_out,
    images_of,
    label_tensor,
    measure_edits,
    measure_generation,
    measure_reconstruction,
    random_edits,
)
from icd_lightning.tiny.scenes import LABELS
from icd_lightning.tiny.study import StudySettings, remembered, study

SCENES = held_out(12)
TARGETS = random_edits(SCENES)


class PlainPixels:
    """An autoencoder that does nothing: its latents are the pixels."""

    downsampling, latent_channels = 1, 3

    @staticmethod
    def encode(images):
        return images

    decode = encode


class Painter(EditingMethod):
    """Takes pictures to 'noise' and back without loss, in 2 + 3 evaluations; edits by what `editor` returns."""

    autoencoder = PlainPixels()
    schedule = conditioner = None

    def __init__(self, editor=None, damage=0.0):
        self.editor, self.damage = editor, damage

    def denoiser(self, prompts, guidance):
        return prompts

    def to_noise(self, latents, prompts, *, seed, on_step=None):
        on_step(Step(0, 0, latents, 2))
        return latents

    def from_noise(self, denoise, noise, *, on_step=None):
        on_step and on_step(Step(0, 0, noise, 3))
        return (noise + self.damage).clamp(-1, 1)

    def edit(self, images, source_prompts, target_prompts, *, on_step, **_):
        on_step(Step(0, 0, images, 5))
        return self.editor(images, source_prompts, target_prompts)


class Oracle:
    """Reads the very pictures it knows, and nothing else."""

    def __init__(self, scenes):
        self.pictures, self.labels = images_of(scenes), label_tensor(scenes)

    def read(self, images):
        at = [(self.pictures - image).abs().flatten(1).sum(1).argmin() for image in images]
        return self.labels[torch.stack(at)]


def paint(captions):
    known = {scene.caption(): scene for scene in (*SCENES, *TARGETS)}
    return images_of([known[caption] for caption in captions])


def score(editor):
    return measure_edits(
        Painter(editor), Oracle([*SCENES, *TARGETS]), SCENES, TARGETS, StepGuidance(3.0), swap_tau=0.8, batch_size=5
    )


def test_the_true_result_scores_full_marks():
    result = score(lambda images, sources, targets: paint(targets))
    assert (result.changed, result.kept, result.nfe) == (1.0, 1.0, 5)
    assert math.isinf(result.psnr_truth)
    assert math.isinf(result.psnr_outside)


def test_an_untouched_picture_keeps_everything_and_changes_nothing():
    result = score(lambda images, sources, targets: images)
    assert (result.changed, result.kept) == (0.0, 1.0)
    assert math.isinf(result.psnr_outside)
    assert 5 < result.psnr_truth < 40


def test_a_grey_picture_is_near_nothing():
    result = score(lambda images, sources, targets: torch.zeros_like(images))
    assert result.psnr_outside < 15
    assert result.psnr_truth < 15


def test_edits_take_turns_and_change_their_caption():
    assert all(scene.caption() != target.caption() for scene, target in zip(SCENES, TARGETS, strict=True))
    assert all(len(scene.things) == len(target.things) for scene, target in zip(SCENES, TARGETS, strict=True))
    changed = [
        {name for name, a, b in zip(LABELS, *pair, strict=True) if a != b}
        for pair in zip(label_tensor(SCENES).tolist(), label_tensor(TARGETS).tolist(), strict=True)
    ]
    assert all(len(names) == 1 for names in changed)
    assert [next(iter(names)).rstrip(" 12") for names in changed] == [*ATTRIBUTE_EDITS] * 2


def test_reconstruction_counts_both_ways_and_knows_a_perfect_method():
    guidances = {"w 1": StepGuidance(1.0), "w 3": StepGuidance(3.0)}
    rows = measure_reconstruction(Painter(), SCENES, guidances, batch_size=5)
    assert [row["guidance"] for row in rows] == list(guidances)
    assert all(math.isinf(row["psnr"]) and row["nfe"] == 5 and row["latent_mse"] == 0 for row in rows)
    assert all(row["ssim"] == pytest.approx(1.0) for row in rows)


def test_reconstruction_error_is_that_of_the_pictures():
    row = measure_reconstruction(Painter(damage=2 / 255 * 4), SCENES, {"w 1": StepGuidance(1.0)}, batch_size=5)[0]
    assert 20 * math.log10(255 / 4) - 0.01 <= row["psnr"] < 45  # four grey levels, less where clipped at white


def test_generation_counts_the_attributes_that_are_there():
    class FromCaption(Painter):
        def from_noise(self, denoise, noise, *, on_step=None):
            return paint(denoise)

    shares = measure_generation(FromCaption(), Oracle(SCENES), SCENES, StepGuidance(3.0), batch_size=5)
    assert set(shares.values()) == {1.0}


def test_a_study_is_plain_json():
    settings = StudySettings(count=4)
    painter = Painter(lambda images, sources, targets: images)
    result = study(painter, Oracle([*SCENES, *TARGETS]), settings)
    assert set(json.loads(json.dumps(result))) == {"reconstruction", "generation", "edits"}
    assert [row["guidance"] for row in result["reconstruction"]] == ["w 1", "w 3", "w 3, tau 0.8"]


def test_what_was_measured_is_remembered_until_its_key_changes(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": len(calls)}

    file = tmp_path / "deep" / "result.json"
    assert remembered(file, {"weights": "a"}, compute) == {"value": 1}
    assert remembered(file, {"weights": "a"}, compute) == {"value": 1}
    assert remembered(file, {"weights": "b"}, compute) == {"value": 2}
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="count 0 must be 1 or more"):
        StudySettings(count=0)
