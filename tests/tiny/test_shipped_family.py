"""The weights that come with the package, of both families: complete, small, and able to do what the rest builds on."""

import json
import re
from shutil import copytree

import pytest
import torch

from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.editing.consistency import InvertibleConsistency, Untrained
from icd_lightning.editing.method import seeded_noise
from icd_lightning.evaluation.examples import stack
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.family import Family
from icd_lightning.tiny.attributes import attribute_accuracy, label_tensor
from icd_lightning.tiny.bars import autoencoder_bars, stage_one_bars
from icd_lightning.tiny.benchmarks import scene_examples
from icd_lightning.tiny.card import write_card
from icd_lightning.tiny.packaging import RECIPES
from icd_lightning.tiny.scene_network import SceneNetwork
from icd_lightning.tiny.scenes import HELD_OUT_SEED, LABELS

SCENES = scene_examples(24, HELD_OUT_SEED)
PROMPTS = [example.caption for example in SCENES]


SIZES = {"tiny": 30e6, "tiny_flow": 16e6}  # bytes at most


@pytest.fixture(scope="module", params=SIZES)
def family(request):
    return Family(request.param)


@pytest.fixture(scope="module")
def tiny():
    """Whose autoencoder and scene network serve both."""
    return Family("tiny")


@pytest.fixture(scope="module")
def students(family):
    return InvertibleConsistency.from_pretrained(family)


def test_the_whole_family_is_small_and_in_half_precision(family):
    files = [file for file in family.root.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= SIZES[family.model]
    assert {"README.md", "icd.json"} <= {file.name for file in files}
    assert all((family.root / "training" / stage / "curves.json").is_file() for stage in RECIPES[family.model].stages)


def test_its_students_and_cards_name_the_family_as_users_do(family):
    parts = [file for file in family.root.rglob("*") if file.is_file() and file.name != "config.yaml"]
    assert not [file for file in parts if b"-weights/" in file.read_bytes()], "the folder of the training is named"
    assert json.loads((family.root / "students/forward/icd.json").read_text())["family"] == family.model


def test_cards_are_as_they_would_be_written_again(family, tmp_path):
    copytree(family.root / "training", tmp_path / family.model / "training")
    shipped = (family.root / "README.md").read_text()
    count, seed = map(int, re.search(r"--count (\d+) --seed (\d+)", shipped).groups())
    head, measured = write_card(tmp_path / family.model, [], count=count, seed=seed).read_text().split("## Measured")
    assert shipped.startswith(head)
    assert measured.rstrip() in shipped
    assert ("--model tiny_flow" in measured) == (family.model == "tiny_flow")


def test_the_autoencoder_reaches_its_bar(tiny):
    assert all(bar.passed for bar in autoencoder_bars(DDIMInversion(tiny), SCENES))


def test_the_scene_network_reads_true_scenes(tiny):
    network = SceneNetwork.from_pretrained(tiny.root / "scene_network")
    found = network.read(stack(SCENES, 64))
    assert found.shape == (len(SCENES), len(LABELS))
    assert all(
        share >= 0.95
        for share in attribute_accuracy(found, label_tensor([example.picture for example in SCENES])).values()
    )


@pytest.mark.slow
def test_stage_one_stands_in_for_its_guided_teacher(tiny):
    unguided, *shares = stage_one_bars(tiny, DDIMInversion(tiny), scene_examples(64, HELD_OUT_SEED))
    assert unguided.value < 0.02
    assert len(shares) == 3
    assert all(bar.value < 0.5 for bar in shares), "a network that ignores w has 1"


@pytest.mark.slow
def test_trained_students_come_back_nearer_than_untrained_ones(family, students):
    images, prompts = stack(SCENES[:12], 64), PROMPTS[:12]
    quality = {}
    for name, pipeline in (("trained", students), ("untrained", Untrained.of_teacher(family, students.boundaries))):
        quality[name] = psnr(pipeline.generate(prompts, pipeline.invert(images, prompts)), images).mean()
    assert quality["trained"] > quality["untrained"] + 1


def test_a_prompt_decides_what_is_generated(students):
    noise = seeded_noise(students.latent_shape(4, 64, 64), 0)
    red, blue = (
        students.generate([f"a large white star on a {color} background"] * 4, noise, guidance=StepGuidance(3.0))
        for color in ("red", "blue")
    )
    corner = (slice(None), slice(None), slice(0, 8), slice(0, 8))
    assert (red[corner].mean((2, 3))[:, 0] > blue[corner].mean((2, 3))[:, 0]).all()
    assert (red[corner].mean((2, 3))[:, 2] < blue[corner].mean((2, 3))[:, 2]).all()
    assert torch.isfinite(red).all()
