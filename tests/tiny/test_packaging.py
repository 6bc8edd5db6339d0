"""The family that ships is replaced whole, and is there at every moment."""

import json
import os
from pathlib import Path

import pytest

from icd_lightning.models.students import DIRECTIONS
from icd_lightning.tiny.packaging import RECIPES, package_family


def write_trainings(folder: Path, content: str, family: str = "tiny") -> Path:
    """What `make tiny-weights` leaves, every part one file with this content."""
    recipe = RECIPES[family]
    for part in (*(f"model/{part}" for part in recipe.parts), *(f"students/{direction}" for direction in DIRECTIONS)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "weights.txt").write_text(content)
        (folder / part / "icd.json").write_text(json.dumps({"family": "outputs/model"}))
    for stage in recipe.stages:
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / "config.yaml").write_text(content)
    (folder / "model" / "model_index.json").write_text(content)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_new_family_takes_the_place_of_the_old_but_for_what_people_wrote(tmp_path):
    package_family(write_trainings(tmp_path / "old", "old"), tmp_path / "family", 1.0)
    (tmp_path / "family" / "notes.md").write_text("by hand")
    (tmp_path / "family" / "gone").mkdir()
    (tmp_path / "family" / "gone" / "weights.txt").write_text("old")
    package_family(write_trainings(tmp_path / "new", "new"), tmp_path / "family", 1.0)
    package_family(tmp_path / "new", tmp_path / "alone", 1.0)
    assert files(tmp_path / "family") == {**files(tmp_path / "alone"), "notes.md": "by hand"}
    assert not (tmp_path / "family" / "gone").exists()
    assert json.loads((tmp_path / "family/students/forward/icd.json").read_text()) == {"family": "tiny"}


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    trained = write_trainings(tmp_path / "trained", "x")
    with pytest.raises(ValueError, match=f"{trained} holds other things than a family.*name another --out"):
        package_family(trained, trained, 1.0)
    package_family(trained, tmp_path / "another", 1.0)
    assert files(trained / "students" / "forward")["weights.txt"] == "x"


def test_a_family_that_lacks_parts_keeps_what_says_whose_they_are(tmp_path):
    trained = write_trainings(tmp_path / "tiny-flow-weights", "{}", "tiny_flow")
    package_family(trained, tmp_path / "family", 1.0, "tiny_flow")
    assert (tmp_path / "family" / "model_index.json").read_text() == "{}"
    assert json.loads((tmp_path / "family/students/forward/icd.json").read_text()) == {"family": "tiny_flow"}
    assert not (tmp_path / "family" / "vae").exists()
    (trained / "model" / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model/model_index.json: let `make tiny-flow-weights` run"):
        package_family(trained, tmp_path / "family", 1.0, "tiny_flow")


@pytest.mark.parametrize("renames", [0, 1, 7])
def test_one_that_is_killed_while_it_is_put_in_place_leaves_every_file(tmp_path, monkeypatch, renames):
    package_family(write_trainings(tmp_path / "old", "old"), tmp_path / "family", 1.0)
    before, done, move = files(tmp_path / "family"), [], os.replace

    def killed_after(*paths) -> None:
        if len(done) >= renames:
            raise KeyboardInterrupt
        done.append(move(*paths))

    write_trainings(tmp_path / "new", "new")
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, killed_after)
    with pytest.raises(KeyboardInterrupt):
        package_family(tmp_path / "new", tmp_path / "family", 1.0)
    assert files(tmp_path / "family").keys() == before.keys()
