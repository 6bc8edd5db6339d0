"""`icd models | download | push`, and that what was pushed comes back as the same model."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from families_case import put_on_hub
from family_case import BOUNDARIES, write_students
from serving_case import Archives, Hub, packed, serving
from torch import Tensor

from icd_lightning.commands.main import main
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.models.family import Family
from icd_lightning.models.released import RELEASED
from icd_lightning.models.student_file import StudentFile

BASE, REPO = "someone/some-base", "me/icd-mine"
STUDENT = "pytorch_lora_weights.safetensors"
PUSHED = {
    *("README.md", "model_index.json", "unet_guided/config.json", "unet_guided/diffusion_pytorch_model.safetensors"),
    *(f"students/{direction}/{STUDENT}" for direction in ("forward", "reverse")),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Caches of this package and of the hub, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the hub's other way to upload
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch):
    served = Hub()
    with serving(served.handler()) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)  # as HF_ENDPOINT sets it, read at the import
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
        served.url = url
        yield served


@pytest.fixture(scope="module")
def run(layouts, tmp_path_factory) -> Path:
    """A run's folder, as far as it matters here."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_students(folder, Family(str(layouts["sd15"])))
    family = {"model": BASE, "guided_unet": str(layouts["sd15"] / "unet_guided"), "precision": "bfloat16"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"family": family}}}))
    return folder


def refused(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(args))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Released models


def test_the_list_says_what_there_is_and_what_is_here(capsys):
    place = RELEASED["icd-sdxl"]
    for file in place.files.values():
        (place.folder / file).parent.mkdir(parents=True)
        (place.folder / file).touch()
    main(["models"])
    rows = {words[0]: words for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    assert rows.keys() >= RELEASED.keys()
    assert rows["icd-sdxl"][1:] == ["SDXL:", "students", "249,499,699,999", "1.4", "GB", "yes"]
    assert rows["sdxl-cfg-distill"][-3:] == ["8.9", "GB", "no"]


COMMANDS = {
    "generate": ("generate", "a star"),
    "edit": ("edit", "photo.png", "--source", "a", "--target", "b"),
    "invert": ("invert", "photo.png", "--prompt", "a"),
    "eval": ("eval",),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_is_not_here_is_told_of_in_one_line_before_anything_else(capsys, command):
    line = refused(capsys, *command, "--model", "icd-sdxl")
    assert "icd-sdxl is not here yet: `icd download icd-sdxl` fetches 10.3 GB (iCD-SDXL_4steps_2.tar.gz, " in line
    line = refused(capsys, *command, "--guided_unet", "sd15-cfg-distill")
    assert "`icd download sd15-cfg-distill` fetches 3 GB" in line


def test_without_a_folder_to_keep_weights_in_another_is_asked_for(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    line = refused(capsys, "download", "icd-sd15", "--host", "http://127.0.0.1:9")
    assert f"{tmp_path}/file/icd_lightning/released cannot keep weights (Not a directory): name a folder" in line
    assert "XDG_CACHE_HOME" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("icd-sd14",), "no released model 'icd-sd14'; there is: icd-sd15, "),
        (("icd-sd15", "--sha256", "abc"), "sha256 'abc' is none: it has 64 digits"),
        (("icd-sd15", "--host", "http://127.0.0.1:9"), "http://127.0.0.1:9/iCD-SD15_4steps_1.tar.gz cannot be downl"),
    ],
    ids=["name", "sum", "host"],
)
def test_a_download_that_cannot_be_is_one_line(capsys, args, message, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert f"icd: error: {message}" in refused(capsys, "download", *args)


# To the hub, and back


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_what_was_pushed_comes_back_with_its_base_alone(hub, run, layouts, cache):
    main(["push", str(run), REPO, "--endpoint", hub.url])
    files = hub.repositories[REPO]
    assert set(files) == PUSHED
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == BASE
    assert f'from_pretrained("{REPO}")' in card
    put_on_hub(cache, BASE, layouts["sd15"])
    pipe = InvertibleConsistencyPipeline.from_pretrained(REPO)
    assert list(pipe.boundaries.boundary_timesteps) == BOUNDARIES
    guided = Family(str(layouts["sd15"])).load_model(guided=True).network
    assert same(pipe.students.backbone.bare(pipe.unet).state_dict(), guided.state_dict())
    for direction in ("forward", "reverse"):
        assert same(pipe.students.named_parameters_of(direction), StudentFile.read(run / direction).weights)


@pytest.fixture
def authors(layouts, tmp_path, monkeypatch):
    """A server of the released UNet, narrow as the others are."""
    archives, guided = Archives(), RELEASED["sd15-cfg-distill"]
    torch.save(Family(str(layouts["sd15"])).load_model(guided=True).network.state_dict(), tmp_path / "guided.pt")
    archives.files[guided.archive] = packed({name: (tmp_path / "guided.pt").read_bytes() for name in guided.files})
    with serving(archives.handler()) as url:
        monkeypatch.setenv("ICD_RELEASED_URL", url)
        yield archives


def test_a_released_guided_network_is_named_and_comes_at_the_first_use(hub, run, layouts, cache, authors, caplog):
    for _ in range(2):  # once more is no error
        main(["push", str(run), REPO, "--guided_unet", "sd15-cfg-distill", "--endpoint", hub.url])
    files = hub.repositories[REPO]
    assert set(files) == {name for name in PUSHED if not name.startswith("unet_guided/")}
    assert json.loads(files["model_index.json"])["guided_unet"] == "sd15-cfg-distill"
    assert "`sd15-cfg-distill`, 3 GB, which is downloaded from its authors" in files["README.md"].decode()
    put_on_hub(cache, BASE, layouts["sd15"])
    with caplog.at_level(logging.INFO):
        main(["generate", "a star", "--model", REPO, "-o", str(cache / "star.png")])
    (told,) = [line for line in caplog.messages if "cfg-distill" in line]
    place = os.environ["ICD_RELEASED_URL"]
    assert told == f"sd15-cfg-distill is needed: sd15_cfg_distill.pt.tar.gz, about 3 GB, of {place}"
    guided = Family(str(layouts["sd15"])).load_model(guided=True).network
    pipe = InvertibleConsistencyPipeline.from_pretrained(REPO)
    assert same(pipe.students.backbone.bare(pipe.unet).state_dict(), guided.state_dict())
    assert len(authors.asked) == 1


def test_a_released_guided_network_out_of_reach_is_told_in_a_line(hub, run, layouts, cache, authors, capsys):
    main(["push", str(run), REPO, "--guided_unet", "sd15-cfg-distill", "--endpoint", hub.url])
    put_on_hub(cache, BASE, layouts["sd15"])
    authors.files.clear()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "a star", "--model", REPO])
    assert "what came is kept, and `icd download sd15-cfg-distill` goes on with it" in capsys.readouterr().err


def test_a_saved_pipeline_keeps_how_it_is_edited(hub, random_family, tmp_path):
    pipe = InvertibleConsistencyPipeline.from_pretrained(str(random_family))
    pipe.register_to_config(tau=0.55)
    pipe.save_pretrained(tmp_path / "saved")
    main(["push", str(tmp_path / "saved"), REPO, "--base_model", BASE, "--endpoint", hub.url])
    assert set(hub.repositories[REPO]) == PUSHED
    assert json.loads(hub.repositories[REPO]["model_index.json"])["tau"] == 0.55


def test_a_run_on_a_released_model_names_what_that_stands_on(hub, run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    family = {"model": "icd-sdxl", "guided_unet": None}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"family": family}}}))
    main(["push", str(folder), REPO, "--endpoint", hub.url])
    index = json.loads(hub.repositories[REPO]["model_index.json"])
    assert (index["base_model"], index["guided_unet"]) == (RELEASED["icd-sdxl"].base.model, "sdxl-cfg-distill")


def without_reverse(folder: Path) -> None:
    shutil.rmtree(folder / "reverse")


def twice_forward(folder: Path) -> None:
    shutil.copytree(folder / "forward", folder / "reverse", dirs_exist_ok=True)


def without_config(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def with_odd_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {init_args: {family: {model: [1], guided_unet: {a: 1}}}}")


def with_cut_weights(folder: Path) -> None:
    unet = folder / "unet_guided"
    unet.mkdir()
    (unet / "config.json").write_text("{}")
    (unet / "diffusion_pytorch_model.safetensors").touch()
    (folder / "config.yaml").write_text(f"model: {{init_args: {{family: {{model: {BASE}, guided_unet: {folder}}}}}}}")


def with_odd_defaults(folder: Path) -> None:
    told = {"guidance_scale": 8, "tau": "x", "edit_guidance_scale": 8, "attention_control": True}
    (folder / "model_index.json").write_text(json.dumps({**told, "closed_vocabulary": False}))


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        (with_cut_weights, (), "unet_guided/diffusion_pytorch_model.safetensors cannot be read as a file of weights"),
        (with_odd_defaults, ("--base_model", BASE), "model_index.json says how the model is edited, and tau 'x' is no"),
        (without_reverse, (), "no student at .*reverse"),
        (twice_forward, (), "is no reverse model"),
        (without_config, (), "'random', which is not on the hub: name its id by --base_model"),
        (with_odd_config, (), "'random', which is not on the hub: name its id by --base_model"),
        (with_odd_config, ("--base_model", BASE), "no guidance-distilled UNet at .*run, .* by --guided_unet"),
        (None, ("--base_model", "/models/sd15"), "'/models/sd15', which is not on the hub"),
        (None, ("--guided_unet", "nowhere"), "no guidance-distilled UNet at nowhere.* by --guided_unet"),
        (
            None,
            ("--endpoint", "http://127.0.0.1:9"),
            r"cannot be written on http://127\.0\.0\.1:9 .*--endpoint or HF_ENDPOINT",
        ),
    ],
    ids=[
        "cut",
        "defaults",
        "a student lacks",
        "twice the same",
        "no configuration",
        "names",
        "no UNet",
        "base",
        "guided",
        "endpoint",
    ],
)
def test_a_push_that_cannot_be_is_one_line_and_uploads_nothing(hub, run, tmp_path, capsys, change, args, message):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    if change:
        change(folder)
    line = refused(capsys, "push", str(folder), REPO, *args)
    assert re.search(message, line)
    assert hub.repositories == {}


def test_a_stranger_is_told_to_log_in(hub, run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    line = refused(capsys, "push", str(run), REPO, "--endpoint", hub.url)
    assert "401" in line
    assert "log in as someone who may, by `hf auth login` or HF_TOKEN" in line


@pytest.mark.parametrize("repo", ["mine", "me/a b", "me/a--b", "me/mine.git", "mé/mine"])
def test_a_name_that_is_none_is_refused(run, capsys, repo):
    line = refused(capsys, "push", str(run), repo, "--endpoint", "http://127.0.0.1:9")
    assert repr(repo) in line
    assert "log in" not in line


@pytest.mark.slow
def test_the_environment_names_the_hub(hub, run, layouts, tmp_path):
    put_on_hub(tmp_path / "home" / "hub", BASE, layouts["sd15"])
    env = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for args in (["push", str(run), REPO], ["generate", "a star", "--model", REPO, "-o", str(tmp_path / "star.png")]):
        subprocess.run([sys.executable, "-m", "icd_lightning.commands.main", *args], env=env, check=True, timeout=200)
    assert (tmp_path / "star.png").is_file()
