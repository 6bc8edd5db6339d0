"""Metrics by name: this package's, the tiny world's by its entry point, any class of another package by its path."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icd_lightning.metrics.registry import METRICS, OWN, PRESETS, build_metrics, expand

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
ELSEWHERE = """
import torch
from icd_lightning.metrics.base import FACTS, PerImage

class Brightness(PerImage):
    needs = ("images",)
    higher_is_better = True
    version, digits, factor = 3, 1, 100

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def values(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * (images.mean((1, 2, 3)) + 1) / 2

class NoMetric:
    pass
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A package of another house with a metric."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("elsewhere", None)


def test_a_metric_from_outside_works_by_its_path_and_inside_a_mask(elsewhere):
    names = ["elsewhere.Brightness", "elsewhere.Brightness-edited", "psnr"]
    whole, part, _ = build_metrics(names).values()
    images, masks = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    masks[..., :2] = 1
    assert whole.per_image(images).item() == 1
    assert part.per_image(images, masks=masks).item() == 0.5  # the other half is black
    assert type(part.metric) is type(whole)


def test_a_yaml_file_gives_a_metric_its_settings(elsewhere):
    name = str(elsewhere / "half.yaml")
    Path(name).write_text("class_path: elsewhere.Brightness\ninit_args: {weight: 0.5}\n")
    half = build_metrics([name])[name]
    assert half.per_image(torch.ones(1, 3, 4, 4)).item() == 0.5
    Path(name).write_text("class_path: elsewhere.Brightness\ninit_args: {weight: 0.25}\n")
    assert build_metrics([name])[name].version != half.version  # so that stored values of the one are not the other's
    Path(name).write_text("class_path: elsewhere.Brightness\ninit_args: {wait: 0.5}\n")
    with pytest.raises(ValueError, match="wait"):
        build_metrics([name])


def test_a_class_that_is_no_metric_is_refused(elsewhere):
    with pytest.raises(ValueError, match=r"'elsewhere.NoMetric' is no PictureMetric: derive its class from"):
        build_metrics(["elsewhere.NoMetric"])


def test_a_part_of_a_metric_is_as_good_and_as_new_as_the_whole(elsewhere):
    part = build_metrics(["elsewhere.Brightness-unedited"])["elsewhere.Brightness-unedited"]
    assert (part.higher_is_better, part.version, part.digits, part.factor) == (True, 3, 1, 100)


LOWER = {"mse", "lpips", "lpips-squeeze", "structure-distance", "fid", "fid-tf", "fid-clean", "tiny-fd"}
LOWER |= {"tiny-perceptual"}


@pytest.mark.parametrize("name", METRICS.entries)
def test_every_metric_states_its_direction(name):
    best_is_near_a_value = name == "latent-nll"
    assert METRICS.find(name).load().higher_is_better is (None if best_is_near_a_value else name not in LOWER)


def test_metrics_whose_values_changed_have_a_new_version():
    versions = {name: entry.load().version for name, entry in OWN.items()}
    assert {name: version for name, version in versions.items() if version > 1} == {"lpips": 2, "fid": 2}


def test_names_that_no_metric_has_are_refused_before_anything_is_loaded(metrics_home):
    for name in ("psnrr", "psnrr-edited"):
        with pytest.raises(
            ValueError, match=r"no metric 'psnrr'; there is: psnr, ssim, .*presets: icd, piebench, tiny"
        ):
            build_metrics(["lpips", name])
    with pytest.raises(ValueError, match=r"there is no class elsewhere_2.Metric \(No module"):
        build_metrics(["lpips", "elsewhere_2.Metric"])
    for name in ("tiny-fd-edited", "latent-nll-unedited"):
        with pytest.raises(ValueError, match="is not of single pictures, and so not of parts"):
            build_metrics([name])
    with pytest.raises(ValueError, match=r"metrics \[\] measure nothing"):
        expand([])


def test_a_preset_stands_for_its_metrics_and_a_name_is_built_once():
    assert tuple(build_metrics(["tiny", "psnr", "mse"])) == (*PRESETS.entries["tiny"], "mse")
    for preset in PRESETS.entries:
        assert expand([preset]) == PRESETS.entries[preset]


def test_building_draws_no_random_numbers():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    build_metrics(["tiny"])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_registry_is_light_to_import():
    code = "import sys; from icd_lightning.metrics.registry import expand; expand(['tiny']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "icd_lightning.tiny.parts" in loaded
    assert not {"torch", "torchmetrics", "transformers"} & set(loaded)


def test_the_core_has_metrics_without_the_tiny_world():
    assert not [name for name, entry in OWN.items() if "tiny" in name or "tiny" in entry.class_path]


def test_every_metric_and_preset_is_documented():
    text = DOCS.read_text()
    assert all(f"`{name}`" in text for name in (*METRICS.entries, *PRESETS.entries))
