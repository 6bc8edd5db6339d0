"""`make tiny-weights` from nothing to the packaged family and its card, every stage two steps long."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from icd_lightning.tiny.packaging import RECIPES

ROOT = Path(__file__).parents[2]
PACKAGE = Path("icd_lightning/weights/tiny")


def make(checkout: Path) -> subprocess.CompletedProcess:
    """The target in a checkout, run by this environment's Python."""
    settings = {
        "ICD": f"{sys.executable} -m icd_lightning.commands.main",
        "STAMP": "installed",
        "PICTURES": 64,
        "SCENES": 8,
        "ARGS": "--trainer.max_steps 2 --trainer.log_every_n_steps 1",
    }
    command = ["make", "tiny-weights", *(f"{name}={value}" for name, value in settings.items())]
    done = subprocess.run(
        command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def written(folder: Path) -> dict[str, bytes]:
    """Each file's tensors in one order: safetensors writes metadata in any."""
    return {str(file.relative_to(folder)): tensors(file) for file in folder.rglob("*.safetensors")}


def tensors(file: Path) -> bytes:
    return save(dict(sorted(load_file(file).items())))


def checkpoints(checkout: Path) -> dict[str, int]:
    """When each stage's training was last saved."""
    files = (checkout / "outputs/tiny-weights").glob("*/checkpoints/last.ckpt")
    return {file.parents[1].name: file.stat().st_mtime_ns for file in files}


@pytest.fixture
def checkout(tmp_path):
    """What make needs of the repository, with shards of a few pictures in the place of data/shapes."""
    for name in ("icd_lightning", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "installed").touch()
    for name in ("train", "val"):
        options = ["--out", f"data/shapes/{name}", "--count", "32"]
        command = [sys.executable, "-m", "icd_lightning.commands.main", "data", "shapes", *options]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.mark.slow
def test_the_family_is_made_from_nothing_and_once(checkout):
    shipped = written(checkout / PACKAGE)
    make(checkout)
    made = written(checkout / PACKAGE)
    assert made.keys() == shipped.keys()
    assert all(made[name] != shipped[name] for name in made), "a part that shipped is not from this training"
    assert {file.name for file in (checkout / PACKAGE).iterdir()} >= {*RECIPES["tiny"].parts, "students", "notes.md"}
    for stage in RECIPES["tiny"].stages:
        curves = json.loads((checkout / PACKAGE / "training" / stage / "curves.json").read_text())
        assert curves, stage

    files = [file for file in (checkout / PACKAGE).rglob("*") if file.is_file()]
    naming = {file.name for file in files if b"tiny-weights/" in file.read_bytes()}
    assert naming == {"config.yaml"}, "a part names the folder it was trained in"

    notes = (checkout / PACKAGE / "notes.md").read_text()
    assert notes == (ROOT / PACKAGE / "notes.md").read_text()
    card = (checkout / PACKAGE / "README.md").read_text()
    assert card.endswith(notes)
    assert "8 held-out scenes" in card

    trained = checkpoints(checkout)
    assert trained.keys() == set(RECIPES["tiny"].stages)
    make(checkout)
    assert written(checkout / PACKAGE) == made
    assert checkpoints(checkout) == trained, "a finished stage was trained again"
