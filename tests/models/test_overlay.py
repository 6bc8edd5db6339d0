"""A released model by its name is the model of its files; downloaded from a real server, on a base from the hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families_case import NAMES, put_on_hub
from often_case import often
from PIL import Image
from safetensors.torch import save
from serving_case import Archives, packed, serving

from icd_lightning.commands.main import main
from icd_lightning.commands.weights import Weights
from icd_lightning.editing.defaults import defaults_of
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.evaluation.methods import teacher_hash
from icd_lightning.models.family import Family
from icd_lightning.models.released import RELEASED
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents

OF = {"sd15": "icd-sd15", "sdxl": "icd-sdxl"}
"""The released model of each architecture that the tests take."""


def released_files(folder: Path, name: str) -> dict[str, bytes]:
    """The content of both archives: a state dict that torch.save wrote, and LoRA files without alpha."""
    students, guided = RELEASED[name].parts
    network = Family(str(folder)).load_model(guided=True)
    torch.save(network.network.state_dict(), folder / "guided.pt")
    both = LoraStudents(network, lora=LoraSettings(rank=4))
    generator = torch.Generator().manual_seed(0)
    files = {}
    for direction, file in zip(DIRECTIONS, students.files, strict=True):
        for parameter in both.parameters_of(direction):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        weights = both.file(direction, {}).weights
        files[file] = save({f"unet.base_model.model.{key}": weight for key, weight in weights.items()})
    return {
        students.archive: packed(files),
        guided.archive: packed({file: (folder / "guided.pt").read_bytes() for file in guided.files}),
    }


@pytest.fixture(scope="module")
def served(layouts):
    archives = Archives()
    for kind, name in OF.items():
        archives.files |= released_files(layouts[kind], name)
    with serving(archives.handler()) as url:
        archives.url = url
        yield archives


@pytest.fixture(scope="module")
def here(layouts, served, tmp_path_factory):
    """A user's caches with both models."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for kind, name in OF.items():
            main(["download", name, "--host", served.url])
            put_on_hub(folder / "hub", RELEASED[name].base.model, layouts[kind])
    return folder


@pytest.fixture
def caches(here, monkeypatch):
    """The same, and nothing beyond them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return here


def edited(pipe: InvertibleConsistencyPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return pipe.edit(image, "a red star", "a blue star", output_type="pt").images


@pytest.mark.parametrize("kind", often(NAMES, "sd15"))
def test_a_released_model_by_name_is_that_of_its_files(layouts, caches, kind):
    name = OF[kind]
    pipe = InvertibleConsistencyPipeline.from_pretrained(name)
    students, guided = RELEASED[name].parts
    (network,) = (str(guided.folder / place) for place in guided.files.values())
    files = {direction: str(students.folder / "students" / direction) for direction in DIRECTIONS}
    told = InvertibleConsistencyPipeline.from_pretrained(str(layouts[kind]), guided_unet=network, **files)
    assert torch.equal(edited(pipe), edited(told))
    assert pipe.students.lora.alpha == 8
    assert pipe.boundaries.boundary_timesteps == (0, *RELEASED[name].boundaries)
    expected = {"sd15": (20.0, 0.8, True), "sdxl": (8.0, 0.7, False)}[kind]  # arXiv:2406.14539
    assert (pipe.config.edit_guidance_scale, pipe.config.tau, pipe.config.attention_control) == expected


def test_released_students_on_a_base_of_ones_own(layouts, caches):
    told = {"guided_unet": "sd15-cfg-distill", "forward": "icd-sd15", "reverse": "icd-sd15"}
    models = Weights(str(layouts["sd15"]), **told, device="cpu").models()
    method = models.load("icd")
    assert method.boundaries.boundary_timesteps == (0, 259, 519, 779, 999)
    assert models.determinants("icd", method)["students"]
    assert models.family.named_guided == str(RELEASED["sd15-cfg-distill"].folder / "sd15_cfg_distill.pt")


def test_teachers_of_one_name_are_told_apart_by_their_weights(layouts, caches):
    family = Family("icd-sd15")
    before = teacher_hash(family)
    file = Path(family.named_guided)
    content = file.read_bytes()
    try:
        torch.save({name: w + 1 for name, w in torch.load(file, weights_only=True).items()}, file)
        assert teacher_hash(Family("icd-sd15")) != before
    finally:
        file.write_bytes(content)
    assert teacher_hash(Family("icd-sd15")) == before


def test_a_command_takes_the_name(caches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("star.png")
    main(["edit", "star.png", "--source", "a red star", "--target", "a blue star", "--model", "icd-sd15"])
    assert Image.open("star-edited.png").text["boundaries"] == "0,259,519,779,999"


def test_a_training_takes_the_base_and_the_guided_network(caches):
    family = Family("icd-sd15")
    family.check()
    assert family.load_model(guided=True).takes_guidance
    assert not family.load_model(guided=False).takes_guidance
    assert Family(RELEASED["icd-sd15"].base.model, guided_unet="sd15-cfg-distill").load_model(guided=True)


# Overlays that somebody wrote


def overlay(folder: Path, **index) -> str:
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def test_a_folder_of_ones_own_names_its_base(layouts, caches, tmp_path):
    shutil.copytree(RELEASED["icd-sd15"].folder / "students", tmp_path / "students")
    place = overlay(tmp_path, base_model=str(layouts["sd15"]), guided_unet="sd15-cfg-distill")
    family = Family(place)
    assert family.student("reverse") == tmp_path / "students" / "reverse"
    assert family.load_model(guided=True).takes_guidance
    assert defaults_of(family)["attention_control"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"base_model": 3}, "says base_model 3: it is a model's id on the hub"),
        (
            {"base_model": "someone/some-base", "guided_unet": "/etc/passwd"},
            "no released model '/etc/passwd'",
        ),
        ({"base_model": "someone/some-base", "guided_unet": "icd-sd15"}, "which are students: name a UNet"),
        (
            {"base_model": "someone/nobody-has"},
            "the base model of .*nobody-has is not in .* by --model, and",
        ),
    ],
    ids=["no base", "a file", "students", "a base that is not here"],
)
def test_an_overlay_that_says_what_it_must_not(caches, tmp_path, index, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Family(overlay(tmp_path, **index)).check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": "x"},
        {"tau": float("nan")},
        {"guidance_scale": [1]},
        {"edit_guidance_scale": "y"},
        {"attention_control": "x"},
    ],
    ids=str,
)
def test_an_overlay_that_says_nonsense_of_edits(layouts, caches, tmp_path, wrong):
    usual = {"guidance_scale": 3.0, "tau": 0.8, "edit_guidance_scale": 3.0}
    usual |= {"attention_control": True, "closed_vocabulary": False}
    assert defaults_of(Family(overlay(tmp_path, base_model=str(layouts["sd15"]), **usual))) == usual
    place = overlay(tmp_path, base_model=str(layouts["sd15"]), **{**usual, **wrong})
    with pytest.raises(ValueError, match=r"model_index\.json says how the model is edited, and .* is (no|out|neither)"):
        defaults_of(Family(place))


def test_a_stranger_on_the_hub_names_no_folder_of_this_machine(layouts, caches, tmp_path):
    overlay(tmp_path, base_model=str(layouts["sd15"]))
    put_on_hub(caches / "hub", "someone/sly", tmp_path)
    with pytest.raises(ValueError, match=r"says base_model .*: it is a model's id on the hub"):
        Family("someone/sly").check()
