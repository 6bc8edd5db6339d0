"""PSNR and SSIM: by hand, and against torchmetrics on the 8-bit values."""

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from icd_lightning.data.images import quantize
from icd_lightning.metrics.reconstruction import PSNR, SSIM, psnr

LEVEL = 2 / 255


def grey(level: float, count: int = 1) -> torch.Tensor:
    """Images (count, 3, 16, 16) of one 8-bit value."""
    return torch.full((count, 3, 16, 16), level / 127.5 - 1)


def noisy(count: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = 2 * torch.rand(count, 3, 32, 32, generator=generator) - 1
    error = torch.randn(reference.shape, generator=generator) * torch.linspace(0.02, 0.4, count).view(-1, 1, 1, 1)
    return reference + error, reference


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


def test_psnr_is_torchmetrics_of_the_8_bit_values():
    images, reference = noisy()
    expected = peak_signal_noise_ratio(
        quantize(images), quantize(reference), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    torch.testing.assert_close(psnr(images, reference), expected)


def test_the_metric_averages_over_images_however_they_come():
    images, reference = noisy(5)
    metric = PSNR()
    for part in (slice(0, 1), slice(1, 5)):
        metric.update(images[part], reference[part])
    torch.testing.assert_close(metric.compute(), psnr(images, reference).mean())


def test_ssim_is_torchmetrics_of_the_8_bit_values():
    images, reference = noisy()
    metric = SSIM()
    for part in (slice(0, 3), slice(3, 4)):
        metric.update(images[part], reference[part])
    expected = structural_similarity_index_measure(quantize(images), quantize(reference), data_range=255.0)
    torch.testing.assert_close(metric.compute(), expected)
    metric.reset()
    metric.update(reference, reference)
    assert metric.compute() == pytest.approx(1)
