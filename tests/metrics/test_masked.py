"""PIE-Bench's metrics of the edited and of the other part, by hand and in its own arithmetic."""

import math

import numpy as np
import pytest
import torch
from metrics_case import grey, noisy
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from icd_lightning.data.images import to_pictures
from icd_lightning.metrics.reconstruction import MSE, PSNR, SSIM, Within
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.tiny.metrics import psnr_within


def half(count: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    """Masks (count, 1, H, W) of the left half."""
    masks = torch.zeros(count, 1, *size)
    masks[..., : size[1] // 2] = 1
    return masks


def test_the_part_is_averaged_over_all_pixels():
    """A difference of 51 of 255 in one half: a fifth, squared, over twice as many pixels."""
    images, reference, masks = grey(51), grey(0), half(1)
    for edited in (True, False):
        metric = Within(MSE(), edited=edited)
        metric.update(images, reference, masks=masks)
        assert metric.compute().item() == pytest.approx(0.2**2 / 2, rel=1e-6)


def test_only_the_part_counts():
    images = torch.where(half(1).bool(), grey(100), grey(0))
    inside, outside = (Within(PSNR(), edited=edited).per_image(images, grey(0), masks=half(1)) for edited in (1, 0))
    assert inside.item() == pytest.approx(-10 * math.log10((100 / 255) ** 2 / 2), abs=1e-4)
    assert outside.item() == math.inf


def test_pictures_of_which_nothing_is_left_are_not_counted():
    images, reference = noisy(3, size=(16, 16))
    masks = torch.cat([torch.ones(1, 1, 16, 16), half(2)])
    metric = Within(MSE(), edited=False)
    values = metric.per_image(images, reference, masks=masks)
    assert values.isnan().tolist() == [True, False, False]
    metric.update(images, reference, masks=masks)
    torch.testing.assert_close(metric.compute(), values[1:].mean())
    metric.reset()
    metric.update(images[:1], reference[:1], masks=masks[:1])
    assert metric.count == 0
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("psnr-unedited", PeakSignalNoiseRatio(data_range=1.0)),
        ("ssim-unedited", StructuralSimilarityIndexMeasure(data_range=1.0)),
    ],
)
def test_it_is_piebench_s_arithmetic(name, theirs):
    """Which takes pictures as fractions of 255 and multiplies both by 1 - mask."""
    images, reference = noisy(2, size=(24, 32))
    masks = half(2, (24, 32))
    (metric,) = build_metrics([name]).values()
    metric.update(images, reference, masks=masks)
    expected = []
    for index in range(2):
        kept = 1 - masks[index].permute(1, 2, 0).numpy()
        pair = [(to_pictures(x[index : index + 1])[0] / np.float32(255)) * kept for x in (images, reference)]
        expected.append(theirs(*(torch.from_numpy(x).permute(2, 0, 1)[None] for x in pair)))
    torch.testing.assert_close(metric.compute(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_psnr_within_a_region_is_over_its_pixels_alone():
    reference, region = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    region[0, :, :4] = 1
    images = reference.clone()
    images[:, :, :4] = 2 / 255 * 16  # 16 grey levels
    images[:, :, 4:] = 1
    first, second = psnr_within(images, reference, region).tolist()
    assert first == pytest.approx(20 * math.log10(255 / 16), abs=1e-3)
    assert math.isnan(second)


def test_the_two_readings_of_psnr_outside_of_an_edit_differ_by_the_share_of_the_rest():
    """PIE-Bench averages over all pixels, `psnr_outside` over the region's own."""
    images, reference = noisy(2, size=(16, 16))
    masks = half(2)
    masks[1, ..., :12] = 1
    (metric,) = build_metrics(["psnr-unedited"]).values()
    share = (1 - masks).mean((1, 2, 3))
    expected = psnr_within(images, reference, 1 - masks) - 10 * torch.log10(share)
    torch.testing.assert_close(metric.per_image(images, reference, masks=masks), expected)


def test_masks_are_asked_for_and_looked_at():
    metric = Within(SSIM(), edited=True)
    with pytest.raises(ValueError, match="Within needs masks"):
        metric.update(grey(0), grey(0))
    with pytest.raises(ValueError, match="masks with values other than 0 and 1"):
        metric.update(grey(0), grey(0), masks=255 * half(1))
    with pytest.raises(ValueError, match="different sizes"):
        metric.update(grey(0), grey(0), masks=half(1, (8, 8)))
