import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from family_case import write_family
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from icd_lightning.commands import pictures
from icd_lightning.commands.main import main
from icd_lightning.data.images import to_images, to_pictures
from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.family import Family

SOURCE, TARGET = "a large red circle on a white background", "a large blue circle on a white background"


@pytest.fixture
def folder(tmp_path, monkeypatch, caplog) -> Path:
    """Where the commands run; `photo.png` is of the family's own size."""
    monkeypatch.chdir(tmp_path)
    disable_progress_bar()  # main asks for this in a way that only works before transformers is imported
    caplog.set_level(logging.INFO)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return tmp_path


@pytest.fixture
def icd(random_family, folder):
    """Run a command on the random family."""
    return lambda name, *args: main([name, "--model", str(random_family), "--device", "cpu", *args])


def read(name: str) -> np.ndarray:
    with Image.open(name) as image:
        return np.asarray(image)


def about(name: str) -> dict:
    with Image.open(name) as image:
        return image.text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(*args: str) -> list[str]:
    return ["edit", "photo.png", "--source", SOURCE, "--target", TARGET, *args]


# Edit


def test_edit_writes_what_the_pipeline_makes_beside_the_picture(icd, random_family, folder, caplog):
    icd(*edit("--seed", "3", "--guidance_scale", "2", "--tau", "0.7", "--swap_tau", "0.6"))
    assert names(folder) == ["photo-edited.png", "photo.png"]
    pipeline = InvertibleConsistencyPipeline.from_pretrained(Family(str(random_family)))
    images = to_images([read("photo.png")])
    made = pipeline.edit(images, [SOURCE], [TARGET], guidance=StepGuidance(2.0, 0.7), swap_tau=0.6, seed=3)
    np.testing.assert_array_equal(read("photo-edited.png"), to_pictures(made)[0])
    assert "photo-edited.png: 8 evaluations, " in caplog.text


def test_defaults_are_the_family_s_and_every_setting_is_in_the_file(icd, random_family, folder):
    icd(*edit("-o", "new/dog.png"))
    expected = {"command": "icd edit", "image": "photo.png", "source": SOURCE, "target": TARGET, "seed": "0"}
    expected |= {"guidance_scale": "3.0", "tau": "0.8", "swap_tau": "0.8", "boundaries": "0,259,519,779,999"}
    assert about("new/dog.png").items() >= (expected | {"model": str(random_family)}).items()
    assert about("new/dog.png")["Software"].startswith("icd_lightning ")


def test_swap_tau_follows_tau(icd, folder):
    icd(*edit("--tau", "0.6"))
    assert about("photo-edited.png")["swap_tau"] == "0.6"


def test_a_family_that_says_nothing_is_guided_as_in_the_paper(tmp_path):
    family = write_family(tmp_path / "family")
    (family / "icd.json").unlink()
    defaults = Family(str(family)).load_defaults()
    assert (defaults.guidance_scale, defaults.tau) == (8.0, 0.8)
    (family / "icd.json").write_text('{"guidance": 3}')
    with pytest.raises(ValueError, match=r"icd\.json must be a JSON object with guidance_scale, tau"):
        Family(str(family)).load_defaults()


def test_nothing_is_replaced_unasked(icd, folder, capsys):
    Path("photo-edited.png").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        icd(*edit())
    assert stop.value.code == 2
    assert "photo-edited.png exists; name another --output, or replace it by --overwrite" in capsys.readouterr().err
    assert Path("photo-edited.png").read_text() == "mine"
    icd(*edit("--overwrite"))
    assert read("photo-edited.png").shape == (64, 64, 3)


def test_a_picture_of_another_size_is_cut_and_the_log_says_so(icd, folder, caplog):
    Image.new("RGBA", (200, 100), (0, 255, 0, 128)).save("wide.webp")
    icd("edit", "wide.webp", "--source", SOURCE, "--target", TARGET)
    assert read("wide-edited.png").shape == (64, 64, 3)
    assert "wide.webp: of 200 x 100 pixels the centre, resized to 64 x 64" in caplog.text


def test_a_prompt_that_is_too_long_is_cut_and_reported_once(icd, folder, caplog):
    icd("edit", "photo.png", "--source", SOURCE + " and a very small red circle" * 9, "--target", TARGET)
    reports = [record.getMessage() for record in caplog.records if "is longer than 24 tokens; cut: " in record.message]
    assert len(reports) == 1


# Invert


def test_invert_writes_the_noise_and_what_comes_back(icd, random_family, folder, caplog):
    icd("invert", "photo.png", "--prompt", SOURCE, "--seed", "2")
    assert names(folder) == ["photo-inverted.safetensors", "photo-reconstructed.png", "photo.png"]
    pipeline = InvertibleConsistencyPipeline.from_pretrained(Family(str(random_family)))
    images = to_images([read("photo.png")])
    noise = pipeline.invert(images, [SOURCE], seed=2)
    torch.testing.assert_close(load_file("photo-inverted.safetensors"), {"latents": noise}, rtol=0, atol=1e-6)
    with safe_open("photo-inverted.safetensors", framework="pt") as opened:
        assert opened.metadata() == about("photo-reconstructed.png")
        assert opened.metadata().items() >= {"prompt": SOURCE, "seed": "2", "guidance_scale": "1.0"}.items()
    found = float(psnr(to_images([read("photo-reconstructed.png")]), images))
    assert "photo-inverted.safetensors: 4 evaluations, " in caplog.text
    assert f"s, unguided; PSNR {found:.2f} dB to the picture" in caplog.text


def test_the_reconstruction_never_takes_the_picture_s_place(icd, folder):
    before = read("photo.png")
    icd("invert", "photo.png", "--prompt", SOURCE, "-o", "photo.safetensors", "--overwrite")
    assert names(folder) == ["photo-reconstructed.png", "photo.png", "photo.safetensors"]
    np.testing.assert_array_equal(read("photo.png"), before)


def test_generating_from_inverted_noise_is_the_other_half_of_invert(icd, folder):
    icd("invert", "photo.png", "--prompt", SOURCE)
    icd("generate", "--latents", "photo-inverted.safetensors", "--guidance_scale", "1")
    made = "photo-inverted-generated.png"
    np.testing.assert_array_equal(read(made), read("photo-reconstructed.png"))
    assert about(made).items() >= {"prompt": SOURCE, "latents": "photo-inverted.safetensors"}.items()
    assert "seed" not in about(made)
    icd("generate", TARGET, "--latents", "photo-inverted.safetensors", "-o", "other.png")
    assert about("other.png")["prompt"] == TARGET
    assert (read("other.png") != read(made)).any()


# Generate


def test_each_picture_can_be_made_again_alone(icd, folder, monkeypatch, caplog):
    monkeypatch.setattr(pictures, "BATCH_SIZE", 3)
    icd("generate", SOURCE, TARGET, "--count", "2", "--seed", "5")
    numbered = [f"generated-{i}.png" for i in (1, 2, 3, 4)]
    assert names(folder) == [*numbered, "photo.png"]
    assert [about(name)["prompt"] for name in numbered] == [SOURCE, SOURCE, TARGET, TARGET]
    assert [about(name)["seed"] for name in numbered] == ["5", "6", "7", "8"]
    assert "generated-1.png: 4 evaluations, " in caplog.text
    icd("generate", TARGET, "--seed", "7", "-o", "alone.png")
    difference = read("alone.png").astype(int) - read("generated-3.png")
    assert np.abs(difference).max() <= 1  # the last digit may differ in a batch
    assert (read("generated-3.png") != read("generated-4.png")).any()


# Mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["edit", "none.png", "--source", "a", "--target", "b"], "there is no picture at none.png"),
        (["edit", ".", "--source", "a", "--target", "b"], ". is a folder, not a picture"),
        (["edit", "notes.txt", "--source", "a", "--target", "b"], "notes.txt cannot be read as a picture"),
        (edit("-o", "dog.jpg"), "output dog.jpg will be a png file: give it a name that ends in .png"),
        (edit("-o", "dog"), "output dog will be a png file"),
        (edit("--guidance_scale", "0.5"), "guidance_scale 0.5 must be 1 (unguided) or more"),
        (edit("--guidance_scale", ".inf"), "guidance_scale inf must be 1 (unguided) or more"),
        (edit("--tau", "1.5"), "tau=1.5: choose fractions of the time axis between 0 and 1"),
        (edit("--swap_tau", "-1"), "swap_tau -1.0 is no fraction of the time axis"),
        (edit("--seed", "-1"), "seed -1 must be 0 or more"),
        (edit("--seed", "x"), "seed: Expected a int. Got value: x"),
        (edit("--tau", "x"), "tau: Expected a float; Given value: x"),
        (edit("--taus", "0.7"), "unrecognized arguments: --taus 0.7"),
        (edit("--over"), "unrecognized arguments: --over"),
        (edit("--boundaries", "999,259"), "boundar"),
        (edit("--boundaries", "some"), "boundaries 'some' are not whole numbers"),
        (edit("--forward", "nowhere"), "no student at nowhere"),
        (edit("--device", "gpu"), "device 'gpu' cannot be used here"),
        (edit("--device", "meta"), "device 'meta' cannot be used here"),
        (["edit", "photo.png", "--source", "a"], "the following arguments are required: target"),
        (["edit", "--source", "a", "--target", "b"], "the following arguments are required: image"),
        (["invert", "photo.png"], "the following arguments are required: prompt"),
        (["invert", "photo.png", "--prompt", "a", "-o", "a.png"], "output a.png will be a safetensors file"),
        (["generate"], "there is no prompt; write for example"),
        (["generate", "a", "--count", "0"], "count 0 must be 1 or more"),
        (["generate", "a", "--latents", "none.safetensors"], "there are no latents at none.safetensors"),
        (["generate", "a", "--latents", "notes.txt"], "notes.txt holds no latents"),
        (["generate", "a", "--latents", "other.safetensors"], "other.safetensors holds no latents"),
        (
            ["generate", "a", "--latents", "small.safetensors"],
            "latents of shape (4, 8, 8); this model's are (16, 8, 8)",
        ),
        (
            ["generate", "a", "--latents", "small.safetensors", "--count", "2"],
            "count 2 must be 1 or more, and cannot be",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(icd, folder, capsys, args, message):
    Path("notes.txt").write_text("no picture")
    save_file({"weights": torch.zeros(2)}, "other.safetensors")
    save_file({"latents": torch.zeros(1, 4, 8, 8)}, "small.safetensors")
    before = names(folder)
    with pytest.raises(SystemExit) as stop:
        icd(*args)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert lines[-1].startswith("icd: error: ")
    assert message in lines[-1]
    assert len(lines) == 1
    assert names(folder) == before


def test_a_model_that_is_not_there(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*edit(), "--model", "nowhere"])
    assert stop.value.code == 2
    assert "no model at 'nowhere'" in capsys.readouterr().err


def test_words_that_a_closed_vocabulary_lacks_are_named(random_family, tmp_path, monkeypatch, caplog):
    import shutil

    folder = tmp_path / "family"
    shutil.copytree(random_family, folder)
    arguments = ["generate", "a red dog on a blue background", "--model", str(folder)]
    monkeypatch.chdir(tmp_path)
    main([*arguments, "-o", "open.png"])
    assert "does not know" not in caplog.text
    (folder / "icd.json").write_text('{"guidance_scale": 3.0, "closed_vocabulary": true}')
    main([*arguments, "-o", "closed.png"])
    assert "does not know: dog; expect nonsense" in caplog.text
