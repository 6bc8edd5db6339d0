"""What a training leaves: students that a program without our code loads, for either family, and gets the same eps."""

import json
import subprocess
import sys
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from families_case import NAMES
from training_case import distillation, scenes_data, student_weights, trainer_for, write_scenes

import icd_lightning._torchvision
from icd_lightning.callbacks.export import ExportWeights
from icd_lightning.data.datamodule import ShardDataModule
from icd_lightning.data.shards import write_shards
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

FORMATS = ("{direction}", "kohya/{direction}.safetensors")
ELSEWHERE = """
import runpy, sys, torch
torchvision_fix, *folders = sys.argv[1:]
runpy.run_path(torchvision_fix)["install"]()
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
for folder in folders:
    cases = torch.load(folder + "/cases.pt")
    for case in cases:
        unet = UNet2DConditionModel.from_pretrained(folder + "/model/unet_guided")
        if case["name"] == "sd15":
            parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
            pipe = StableDiffusionPipeline(**parts, unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False)
        else:
            parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
            pipe = StableDiffusionXLPipeline(**parts, unet=unet, scheduler=DDIMScheduler())
        pipe.load_lora_weights(folder + "/run/" + case["file"])
        with torch.no_grad():
            eps = pipe.unet.eval()(**case["inputs"]).sample
        torch.testing.assert_close(eps, case["eps"])
        pipe.unload_lora_weights()
        with torch.no_grad():
            assert not torch.allclose(pipe.unet(**case["inputs"]).sample, case["eps"], atol=1e-3)
assert not any(name.startswith("icd_lightning") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def trained(layouts, tmp_path_factory):
    """For each family a folder with what two steps of stage 2 left, and the task; SDXL learns sizes from the data."""
    root, tasks = tmp_path_factory.mktemp("trained"), {}
    shards = str(write_scenes(root / "shards", 8))
    for name in NAMES:
        data = ShardDataModule(shards, batch_size=2, resolution=64, shuffle_buffer=8)
        (root / name).mkdir()
        (root / name / "model").symlink_to(layouts[name])
        tasks[name] = InvertibleConsistencyDistillation(
            Family(str(layouts[name])),
            partial(LoraStudents, lora=LoraSettings(rank=4)),
            optimizer=OptimizerSettings(lr=1e-1),
            caption_dropout=0.5,
        )
        trainer_for(root / name / "run", max_steps=2, callbacks=[ExportWeights()]).fit(tasks[name], datamodule=data)
    return root, tasks


def case_of(task, direction: str, name: str, form: str) -> dict:
    """What the other program is to load, to give the network, and to find."""
    inputs: dict = {}
    handle = task.students.network.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.update(kwargs, sample=args[0], timestep=args[1]), with_kwargs=True
    )
    with torch.no_grad():
        conditioning, x = task.conditioner(["a red star", "a ring"]), torch.randn(2, 4, 8, 8)
        eps = task.students.predict(direction, x, torch.tensor([259, 999]), conditioning, torch.tensor([1.0, 8.0]))
    handle.remove()
    inputs["return_dict"] = True
    return {"name": name, "file": form.format(direction=direction), "inputs": inputs, "eps": eps}


@pytest.mark.slow
def test_a_program_without_our_code_gets_the_same_eps(trained):
    root, tasks = trained
    for (name, task), forms in zip(tasks.items(), (FORMATS, FORMATS[::-1]), strict=True):
        cases = [case_of(task, direction, name, form) for direction, form in zip(DIRECTIONS, forms, strict=True)]
        torch.save(cases, root / name / "cases.pt")
    folders = [str(root / name) for name in tasks]
    program = [sys.executable, "-c", ELSEWHERE, icd_lightning._torchvision.__file__, *folders]
    subprocess.run(program, check=True, cwd=root)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_holds_the_trained_student(trained, name):
    root, tasks = trained
    family = Family(str(root / name / "model"))
    students = LoraStudents(family.load_model(guided=True), lora=LoraSettings(rank=4))
    for direction in DIRECTIONS:
        expected, found = (each.named_parameters_of(direction) for each in (tasks[name].students, students))
        for form in FORMATS:
            with torch.no_grad():
                [parameter.zero_() for parameter in found.values()]
            file = StudentFile.read(root / name / "run" / form.format(direction=direction))
            assert (file.direction, file.boundaries) == (direction, [0, 259, 519, 779, 999])
            students.load(direction, file)
            assert all(torch.equal(parameter, expected[name]) for name, parameter in found.items())


def test_a_card_tells_what_a_student_is_and_how_it_was_made(trained):
    root, _ = trained
    for direction, jumps in (("forward", "19 to 259, 259 to 519"), ("reverse", "999 to 779, 779 to 519")):
        card = (root / "sdxl" / "run" / direction / "README.md").read_text()
        assert card.startswith("---\n")
        assert all(text in card for text in (jumps, "0, 259, 519, 779, 999", "rank 4, alpha 8 (scale 2)", direction))
        settings = json.loads(card.partition("```json\n")[2].partition("```")[0])
        assert settings["steps"] == 2
        assert settings["optimizer"]["lr"] == 0.1
        assert settings["losses"]["reverse_preservation"]["weight"] == 1.5


@pytest.mark.slow
def test_stage_one_leaves_the_teacher_of_stage_two(layouts, tmp_path):
    data = ShardDataModule(str(write_scenes(tmp_path / "shards", 8)), batch_size=2, resolution=64, shuffle_buffer=8)
    model = str(layouts["sd15"])
    task = GuidanceDistillation(Family(model), (1.0, 8.0), optimizer=OptimizerSettings(lr=1e-3))
    trainer_for(tmp_path / "run", max_steps=1, callbacks=[ExportWeights()]).fit(task, datamodule=data)
    guided = Family(model, guided_unet=str(tmp_path / "run")).load_model(guided=True).network
    assert all(torch.equal(w, guided.state_dict()[n]) for n, w in task.student.state_dict().items())
    card = (tmp_path / "run" / "unet_guided" / "README.md").read_text()
    assert "w = 1, 8," in card
    assert model in card


def write_latents(folder, autoencoder: str, bad: int, side: int = 8):
    """Eight samples of latents, of which the first `bad` are no numbers; as after a bug of whatever wrote them."""
    about = {
        "moments": {"autoencoder": autoencoder, "resolution": 64},
        "original_size": [64, 64],
        "crop_top_left": [0, 0],
    }
    samples = []
    for index in range(8):
        stream = BytesIO()
        np.save(stream, np.full((16, side, side), np.nan if index < bad else 0.1 * index, np.float16))
        files = {"moments.npy": stream.getvalue(), "json": json.dumps(about).encode(), "txt": b"a red star"}
        samples.append({"__key__": f"{index:05d}", **files})
    write_shards(samples, folder, shard_size=8, parameters={})


@pytest.mark.parametrize("bad", [1, 8])
def test_latents_that_are_no_numbers_never_reach_the_students(random_family, tmp_path, bad):
    task = distillation(random_family, optimizer=OptimizerSettings(lr=1e-3, max_skipped_steps=3))
    write_latents(tmp_path / "shards", task.autoencoder.fingerprint, bad)
    data = scenes_data(tmp_path / "shards")
    trainer = trainer_for(tmp_path / "run", max_steps=4, callbacks=[ExportWeights()])  # an epoch, in batches of two
    if bad == 1:
        trainer.fit(task, datamodule=data)
        assert task.skipped_steps == 0
        assert data.train_tally.counts()["corrupt_latents"] > 0
        weights = StudentFile.read(tmp_path / "run" / "reverse").weights  # which it refuses if they are not finite
        assert any((weights[n] != w).any() for n, w in student_weights(distillation(random_family))["reverse"].items())
    else:
        with pytest.raises(ValueError, match=r"none of the first 8 samples .*corrupt_latents.* no finite moments"):
            trainer.fit(task, datamodule=data)
        assert not (tmp_path / "run" / "reverse").exists()


def test_latents_of_another_size_than_their_pictures_have_are_refused(random_family, tmp_path):
    task = distillation(random_family)
    write_latents(tmp_path / "shards", task.autoencoder.fingerprint, 0, side=4)
    trainer = trainer_for(tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match=r"latents are \[16, 4, 4\], which pictures of 64 pixels never give"):
        trainer.fit(task, datamodule=scenes_data(tmp_path / "shards"))
