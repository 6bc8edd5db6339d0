"""The parts in CONTRIBUTING.md, word for word, as a package of somebody else's: each works by its path alone."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from curation_case import curated, jpeg, pair
from documents_case import DOCUMENTS, fences
from PIL import Image
from training_case import distillation, scenes_data, trainer_for

from icd_lightning.commands.main import main
from icd_lightning.data.curation.recipe import read_recipe
from icd_lightning.data.shards import write_shards
from icd_lightning.diffusion import Step
from icd_lightning.editing.methods import build
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.models.family import Family
from icd_lightning.tasks.invertible_consistency import Losses

FENCES = fences(DOCUMENTS["CONTRIBUTING.md"])
FILES = {re.match(r"# (\w+)\.py\n", fence.text)[1]: fence.text for fence in FENCES if fence.language == "python"}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


@pytest.fixture
def parts(tmp_path, monkeypatch) -> Path:
    """A folder on the path that holds every file of the document."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_kind_of_part_is_shown():
    assert FILES.keys() == {"my_losses", "my_metrics", "my_baselines", "my_benchmarks", "my_stages"}


def test_the_loss_trains_its_student(parts, random_family, scenes):
    from my_losses import StayNearTheTeacher

    (overlay,) = (fence.text for fence in FENCES if fence.language == "yaml")
    others = yaml.safe_load(overlay)["model"]["init_args"]["losses"]["others"]
    assert others["near"]["class_path"] == "my_losses.StayNearTheTeacher"
    losses = {"near": StayNearTheTeacher(**others["near"]["init_args"])}
    task = distillation(random_family, losses=Losses(None, None, None, None, others=losses))
    trainer = trainer_for(parts, max_steps=1)
    trainer.fit(task, datamodule=scenes_data(scenes))
    assert trainer.callback_metrics["train/near"] > 0
    assert task.trained == ["forward"]


def test_the_metric_measures(parts):
    (metric,) = build_metrics(["my_metrics.Brightness"]).values()
    metric.update(torch.full((2, 3, 8, 8), 0.5), torch.zeros(2, 3, 8, 8))
    assert metric.compute() == 0.5


def test_the_baseline_edits(parts, random_family):
    method = build("my_baselines.Renoised", Family(str(random_family)), num_inference_steps=5)
    images = torch.zeros(1, 3, 64, 64)
    steps = list[Step]()
    edited = method.edit(images, ["a red circle"], ["a blue circle"], on_step=steps.append)
    assert edited.shape == images.shape
    assert edited.isfinite().all()
    assert sum(step.nfe for step in steps) == 2 * len(method.steps) == 4


def test_the_benchmark_runs_from_the_command_line(parts, random_family, capsys):
    words = "eval --benchmark my_benchmarks.CAPTIONS --method icd --metrics psnr,my_metrics.Brightness --count 2"
    main([*words.split(), "--model", str(random_family), "--out", str(parts / "out")])
    assert "To noise and back, once more" in capsys.readouterr().out


def test_the_curation_stage_drops_what_is_flat(parts, tmp_path):
    (tmp_path / "recipe.yaml").write_text("stages: [{class_path: my_stages.Contrast, init_args: {least: 50}}]")
    flat = pair(0, data=jpeg(Image.new("RGB", (96, 96), "red")))
    write_shards([flat, pair(1)], tmp_path / "raw", shard_size=2, parameters={})
    manifest, _ = curated([tmp_path / "raw"], tmp_path / "out", read_recipe(tmp_path / "recipe.yaml"))
    assert (manifest.parameters["kept"], manifest.parameters["dropped"]) == (1, {"contrast": 1})
