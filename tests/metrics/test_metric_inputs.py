"""What every metric of the registry asks of its input, and how it counts images."""

import pytest
import torch
from metrics_case import grey, noisy
from torchvision.transforms.functional import InterpolationMode

from icd_lightning.metrics.base import pillow_squares
from icd_lightning.metrics.reconstruction import PSNR, LatentNLL
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.tiny.metrics import TinyAgreement


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (grey(0)[0], r"images of shape \(3, 16, 16\), not \(B, 3, H, W\)"),
        (grey(0)[:, :1], r"images of shape \(1, 1, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"images of torch.uint8, not floating-point.*to_images"),
        (torch.full((1, 3, 16, 16), 255.0), r"images that reach 255: give values in \[-1, 1\]"),
        (grey(0, size=(16, 20)), "different sizes"),
        (grey(0, 2), "2 images, 1 reference: give one of each"),
        (None, r"PSNR needs images: pass images=\.\.\. to it"),
    ],
)
def test_what_is_not_images_in_the_range_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        PSNR().update(images, grey(0))


def test_missing_and_wrong_companions_are_refused():
    with pytest.raises(ValueError, match="PSNR needs reference"):
        PSNR().update(grey(0))
    with pytest.raises(ValueError, match="TinyAgreement needs prompts"):
        TinyAgreement().update(grey(0, size=(64, 64)))
    with pytest.raises(ValueError, match="one text for prompts: give a list"):
        TinyAgreement().update(grey(0, size=(64, 64)), prompts="a red star on a blue background")


def test_a_metric_takes_what_it_needs_of_all_there_is():
    images, reference = noisy()
    given = {"prompts": [""] * 4, "masks": torch.zeros(4, 1, 32, 32), "noise": torch.randn(4, 2, 3, 3)}
    metric = PSNR()
    metric.update(images, reference, **given)
    torch.testing.assert_close(metric.compute(), metric.per_image(images, reference, **given).mean())


@pytest.mark.parametrize("name", ["psnr", "mse", "ssim", "tiny-perceptual", "tiny-agreement", "tiny-fd"])
def test_pictures_of_a_diverged_training_are_nan_and_no_error(name):
    (metric,) = build_metrics([name]).values()
    images, reference = noisy(3, size=(64, 64))
    images[1, 0, 5, 5] = torch.nan
    metric.update(images, reference, prompts=["a red star"] * 3)
    assert metric.compute().isnan()


def test_what_pillow_resizes_of_such_is_nan_for_that_picture_alone():
    images = noisy(2)[0]
    images[1] = torch.nan
    squares = pillow_squares(images, 8, InterpolationMode.BICUBIC)
    assert squares.flatten(1).isnan().any(1).tolist() == squares.flatten(1).isnan().all(1).tolist() == [False, True]


def test_asking_for_single_images_counts_nothing():
    metric = PSNR()
    metric.per_image(*noisy())
    assert metric.count == 0
    metric.update(*noisy(1))
    metric.reset()
    assert metric.count == 0


def test_latent_nll_by_hand():
    noise = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1).expand(3, 4, 2, 3)
    expected = -torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(LatentNLL().per_image(noise=noise), expected)
    metric = LatentNLL()
    metric.update(noise=torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert metric.compute() == pytest.approx(1.419, abs=3e-3)  # of true noise
