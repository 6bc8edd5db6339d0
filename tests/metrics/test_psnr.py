"""PSNR, MSE and SSIM: by hand, and against torchmetrics on the 8-bit values."""

import math

import pytest
import torch
from metrics_case import LEVEL, grey, noisy
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from icd_lightning.data.images import quantize
from icd_lightning.metrics.reconstruction import MSE, PSNR, SSIM, mse, psnr


@pytest.mark.parametrize("difference", [1, 2, 25, 255])
def test_psnr_of_a_constant_difference_by_hand(difference):
    expected = 20 * math.log10(255 / difference)
    assert psnr(grey(difference), grey(0)).item() == pytest.approx(expected, abs=1e-4)
    assert psnr(grey(0), grey(difference)).item() == pytest.approx(expected, abs=1e-4)


def test_psnr_of_one_wrong_value_by_hand():
    images = grey(100)
    images[0, 1, 3, 5] += 10 * LEVEL
    expected = 10 * math.log10(255**2 / (10**2 / (3 * 16 * 16)))
    assert psnr(images, grey(100)).item() == pytest.approx(expected, abs=1e-4)


def test_each_image_counts_for_itself():
    found = psnr(torch.cat([grey(10), grey(0), grey(1)]), grey(0, count=3))
    assert found.shape == (3,)
    assert found[1] == math.inf
    assert found[2] - found[0] == pytest.approx(20, abs=1e-4)


def test_what_a_png_would_not_keep_does_not_count():
    """Less than half a level, and what lies beyond black and white."""
    assert psnr(grey(100) + 0.4 * LEVEL, grey(100)).item() == math.inf
    assert psnr(grey(100) + 0.6 * LEVEL, grey(100)).item() == pytest.approx(20 * math.log10(255), abs=1e-4)
    assert psnr(torch.full((1, 3, 8, 8), 1.5), torch.ones(1, 3, 8, 8)).item() == math.inf
    assert psnr(grey(100).half(), grey(100).bfloat16()).item() > 45


def test_the_metric_averages_over_images_however_they_come():
    images, reference = noisy(5)
    metric = PSNR()
    for part in (slice(0, 1), slice(1, 5)):
        metric.update(images[part], reference[part])
    torch.testing.assert_close(metric.compute(), psnr(images, reference).mean())


@pytest.mark.parametrize("difference", [1, 25, 255])
def test_mse_of_a_constant_difference_by_hand(difference):
    assert mse(grey(difference), grey(0)).item() == pytest.approx((difference / 255) ** 2, rel=1e-6)


def test_mse_averages_over_images_and_psnr_does_not_average_it():
    images, reference = grey(0, 2), torch.cat([grey(1), grey(100)])
    metric = MSE()
    metric.update(images, reference)
    assert metric.compute().item() == pytest.approx((1 / 255**2 + (100 / 255) ** 2) / 2, rel=1e-6)
    metric = PSNR()
    metric.update(images, reference)
    assert metric.compute().item() == pytest.approx(20 * math.log10(255) - 20, abs=1e-4)


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_they_are_torchmetrics_as_piebench_calls_it_of_8_bit_fractions(size):
    images, reference = noisy(size=size)
    fractions = [quantize(x) / 255 for x in (images, reference)]
    expected = structural_similarity_index_measure(*fractions, data_range=1.0)  # as PIE-Bench calls it
    torch.testing.assert_close(SSIM().per_image(images, reference).mean(), expected)
    expected = peak_signal_noise_ratio(*fractions, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(PSNR().per_image(images, reference), expected)
    torch.testing.assert_close(MSE().per_image(images, reference).mean(), (fractions[0] - fractions[1]).square().mean())
