"""The scene network's own measures on pictures whose truth is known."""

from dataclasses import replace

import pytest
import torch
from metrics_case import grey, scenes

from icd_lightning.metrics.registry import build_metrics
from icd_lightning.tiny.metrics import TinyAgreement, TinyPerceptualDistance
from icd_lightning.tiny.scene_network import caption_labels, label_tensor
from icd_lightning.tiny.scenes import ABSENT, LABELS, scene_at

NAMES = list(LABELS)


def test_a_caption_says_what_the_scene_s_labels_say():
    for index in range(200):
        scene = scene_at(3, index)
        assert torch.equal(caption_labels(scene.caption()), label_tensor([scene])[0]), scene.caption()


def test_what_a_caption_leaves_open_is_absent():
    said = caption_labels("a red star")
    counted = {name: LABELS[name][value] for name, value in zip(NAMES, said, strict=True) if value != ABSENT}
    assert counted == {"layout": "single", "color 1": "red", "texture 1": "plain", "shape 1": "star"}


@pytest.mark.parametrize(
    ("caption", "word"), [("a photo of a cat", "'photo'"), ("a red star on a large background", "background size")]
)
def test_a_caption_of_another_world_is_refused(caption, word):
    with pytest.raises(ValueError, match=word):
        caption_labels(caption)


def test_agreement_of_true_pictures_is_whole_and_of_wrong_ones_counted():
    found, images = scenes(24)
    captions = [scene.caption() for scene in found]
    metric = TinyAgreement()
    assert metric.per_image(images, prompts=captions).mean() > 0.98
    wrong = []
    for scene in found:
        color = "red" if scene.background.color != "red" else "blue"
        wrong.append(replace(scene, background=replace(scene.background, color=color)).caption())
    counted = (label_tensor(found) != ABSENT).sum(1)
    expected = metric.per_image(images, prompts=captions) - 1 / counted  # one attribute less
    torch.testing.assert_close(metric.per_image(images, prompts=wrong), expected)


def test_perceptual_distance_is_nought_of_equals_and_grows():
    images = scenes(8)[1]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    metric = TinyPerceptualDistance()
    assert (metric.per_image(images, images) == 0).all()
    near, far = (metric.per_image(images, (images + level * noise).clamp(-1, 1)) for level in (0.05, 0.3))
    assert (far > near).all()
    assert (near > 0).all()
    torch.testing.assert_close(metric.per_image(images, images.flip(0)), metric.per_image(images.flip(0), images))


def test_other_sizes_than_the_network_s_are_refused():
    for metric in build_metrics(["tiny-perceptual", "tiny-fd"]).values():
        with pytest.raises(ValueError, match="64 x 64"):
            metric.update(grey(0, 2, (32, 32)), grey(0, 2, (32, 32)))


def test_the_preset_measures_one_batch_of_everything():
    found, images = scenes(4)
    metrics = build_metrics(["tiny"])
    noisy = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    for metric in metrics.values():
        metric.update(noisy, images, prompts=[scene.caption() for scene in found])
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert values.keys() == {"psnr", "ssim", "tiny-perceptual", "tiny-agreement", "tiny-fd"}
    assert 0 < values["tiny-agreement"] <= 1
    assert values["tiny-fd"] > 0
