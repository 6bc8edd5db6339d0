"""Students in files: each alone, bit for bit, in a form that plain diffusers understands, and never the wrong one."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from golden_case import golden_path, load_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students_case import ADAPTERS, LORA, run, tiny_batch, tiny_students, tiny_unet

from icd_lightning.diffusion import Boundaries, NoiseSchedule
from icd_lightning.models.checkpoints import load_student, lora_settings, save_kohya, save_released, save_student
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.family import Family
from icd_lightning.models.students import RELEASED_TARGET_MODULES, LoraSettings, Students

BOUNDARIES = Boundaries.parse("259,519,779,999")


@pytest.fixture(scope="module")
def students():
    """To read from."""
    return tiny_students()


@pytest.fixture
def empty():
    return Students(tiny_unet(), NoiseSchedule(), lora=LORA)


def weights(students, adapter):
    return {name: parameter.detach() for name, parameter in students.named_parameters_of(adapter).items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def save_both(students, folder):
    for adapter in ADAPTERS:
        save_student(students, adapter, folder / adapter, metadata={"boundaries": BOUNDARIES, "family": "tiny"})


def eps_of(students, adapter, batch):
    with torch.no_grad():
        return students.predict(adapter, batch["x"], batch["t"], Conditioning(batch["prompt_embeds"]), batch["w"])


def test_each_student_comes_back_alone_and_bit_for_bit(students, empty, tmp_path):
    save_both(students, tmp_path)
    fresh = {name: value.clone() for name, value in weights(empty, "fcd").items()}
    load_student(empty, "cd", tmp_path / "cd")
    assert same(weights(empty, "cd"), weights(students, "cd"))
    assert same(weights(empty, "fcd"), fresh)
    load_student(empty, "fcd", tmp_path / "fcd" / "pytorch_lora_weights.safetensors")
    assert same(weights(empty, "fcd"), weights(students, "fcd"))
    assert not same(weights(empty, "fcd"), weights(empty, "cd"))


def test_a_file_says_what_it_holds(students, empty, tmp_path):
    save_both(students, tmp_path)
    about = load_student(empty, "fcd", tmp_path / "fcd")
    assert (about["adapter"], about["direction"], about["rank"], about["alpha"]) == ("fcd", "forward", 4, 8)
    assert about["family"] == "tiny"
    assert about["boundaries"]["boundary_timesteps"] == [0, 259, 519, 779, 999]
    assert json.loads((tmp_path / "fcd" / "icd.json").read_text()) == about
    assert lora_settings(tmp_path / "fcd") == LORA


def test_saving_replaces_the_student_and_nothing_else(empty, tmp_path):
    students, folder = tiny_students(), tmp_path / "exports" / "reverse"
    save_student(students, "cd", folder, metadata={})
    (folder / "README.md").write_text("a model card")
    students.parameters_of("cd")[0].data.add_(1)
    save_student(students, "cd", folder, metadata={})
    load_student(empty, "cd", folder)
    assert same(weights(empty, "cd"), weights(students, "cd"))
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "icd.json",
        "pytorch_lora_weights.safetensors",
    ]
    assert [file.name for file in folder.parent.iterdir()] == ["reverse"]


def test_an_interrupted_save_leaves_the_old_student(empty, tmp_path, monkeypatch):
    students = tiny_students()
    save_student(students, "cd", tmp_path / "reverse", metadata={})
    before = {name: value.clone() for name, value in weights(students, "cd").items()}

    def interrupted(tensors, metadata):
        raise KeyboardInterrupt

    monkeypatch.setattr("icd_lightning.models.checkpoints.save", interrupted)
    students.parameters_of("cd")[0].data.add_(1)
    for folder in ("reverse", "another"):
        with pytest.raises(KeyboardInterrupt):
            save_student(students, "cd", tmp_path / folder, metadata={})
    load_student(empty, "cd", tmp_path / "reverse")
    assert same(weights(empty, "cd"), before)
    assert [file.name for file in tmp_path.iterdir()] == ["reverse"]


# Plain diffusers


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_plain_pipeline_loads_it_with_the_right_strength(students, tmp_path, adapter):
    save_both(students, tmp_path)
    batch, parts = tiny_batch(), ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = StableDiffusionPipeline(
        **dict.fromkeys(parts), unet=tiny_unet(), scheduler=DDIMScheduler(), requires_safety_checker=False
    )
    pipe.load_lora_weights(str(tmp_path / adapter))
    with torch.no_grad():
        assert torch.equal(run(pipe.unet, batch), eps_of(students, adapter, batch))


# Files that others wrote


@pytest.mark.parametrize(("adapter", "name"), [("fcd", "lora_forward.safetensors"), ("cd", "lora_reverse.safetensors")])
def test_peft_files_load(empty, adapter, name):
    assert load_student(empty, adapter, golden_path(name)) == {}
    assert same(weights(empty, adapter), load_tensors(name))


@pytest.mark.parametrize(
    ("adapter", "name"),
    [("cd", "iCD-SD15-reverse_259_519_779_999.safetensors"), ("fcd", "iCD-SD15-forward_19_259_519_779.safetensors")],
)
def test_released_files_load_with_alpha_8_and_round_trip(students, empty, tmp_path, adapter, name):
    released = {f"unet.base_model.model.{key}": value for key, value in weights(students, adapter).items()}
    save_file(released, tmp_path / name)
    assert lora_settings(tmp_path / name) == LoraSettings(rank=4, alpha=8)
    load_student(empty, adapter, tmp_path / name)
    batch = tiny_batch()
    assert torch.equal(eps_of(empty, adapter, batch), eps_of(students, adapter, batch))
    file = save_student(empty, adapter, tmp_path / "ours", metadata={})
    ours = {key.replace("unet.", "unet.base_model.model.", 1): value for key, value in load_file(file).items()}
    assert same(ours, released)

    with pytest.raises(ValueError, match=r"holds the (forward|reverse) model; adapter"):
        load_student(empty, ADAPTERS[1 - ADAPTERS.index(adapter)], tmp_path / name)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_released_and_kohya_files_come_back_bit_for_bit(students, empty, tmp_path, adapter):
    direction = {"fcd": "forward", "cd": "reverse"}[adapter]
    save_released(students, adapter, tmp_path / f"iCD-SD15-{direction}.safetensors")
    save_kohya(students, adapter, tmp_path / "kohya" / "student.safetensors", metadata={"boundaries": BOUNDARIES})
    released = load_file(tmp_path / f"iCD-SD15-{direction}.safetensors")
    assert {f"unet.base_model.model.{name}" for name in weights(students, adapter)} == released.keys()
    fresh = {name: value.clone() for name, value in weights(empty, adapter).items()}
    for file in (f"iCD-SD15-{direction}.safetensors", "kohya/student.safetensors"):
        load_student(empty, adapter, tmp_path / file)
        assert same(weights(empty, adapter), weights(students, adapter))
        save_released(empty, adapter, tmp_path / "again.safetensors")
        assert same(load_file(tmp_path / "again.safetensors"), released)
        with torch.no_grad():
            for name, parameter in empty.named_parameters_of(adapter).items():
                parameter.copy_(fresh[name])
    about = load_student(empty, adapter, tmp_path / "kohya" / "student.safetensors")
    assert (about["direction"], about["boundaries"]["boundary_timesteps"]) == (direction, [0, 259, 519, 779, 999])
    assert lora_settings(tmp_path / "kohya" / "student.safetensors") == LORA


def test_formats_without_this_alpha_are_refused(tmp_path):
    strong = tiny_students(lora=LoraSettings(rank=4, alpha=16))
    with pytest.raises(ValueError, match="the released format mean alpha 8, this is 16"):
        save_released(strong, "cd", tmp_path / "student.safetensors")
    file = save_kohya(strong, "cd", tmp_path / "kohya.safetensors", metadata={})
    assert lora_settings(file).alpha == 16
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith(".alpha"))] = torch.tensor(1.0)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"has the alphas \[1.0, 16.0\]: a student has one"):
        lora_settings(file)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_kohya_names_are_understood_for_every_module_of_the_true_architectures(name):
    """By diffusers' own translation, of the names alone: for the weights, a number each stands in."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(Family(f"random:{name}").source.config("unet"))
    targets = tuple(f".{module}" for module in RELEASED_TARGET_MODULES)
    modules = [module for module, _ in unet.named_modules() if module.endswith(targets)]
    assert len(modules) == {"sd15": 278, "sdxl": 788}[name]
    kohya = {}
    for module in modules:
        stem = "lora_unet_" + module.replace(".", "_")
        kohya |= {f"{stem}.lora_down.weight": torch.ones(1), f"{stem}.lora_up.weight": torch.ones(1)}
        kohya[f"{stem}.alpha"] = torch.tensor(8.0)
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(kohya, unet_config=unet.config)
    peft = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in converted.items()})
    assert peft.keys() == {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    assert (len(alphas), set(alphas.values())) == (len(modules), {8.0})


def test_files_of_diffusers_load(students, empty, tmp_path):
    students.unet.save_lora_adapter(tmp_path / "by_diffusers", "cd")
    load_student(empty, "cd", tmp_path / "by_diffusers")
    assert same(weights(empty, "cd"), weights(students, "cd"))


def test_half_precision_files_fill_float32_students(students, empty, tmp_path):
    half = {name: value.half() for name, value in weights(students, "cd").items()}
    save_file(half, tmp_path / "half.safetensors")
    load_student(empty, "cd", tmp_path / "half.safetensors")
    assert same(weights(empty, "cd"), {name: value.float() for name, value in half.items()})


# What is refused


def test_the_other_student_is_refused(students, empty, tmp_path):
    save_both(students, tmp_path)
    with pytest.raises(ValueError, match="holds the forward model; adapter 'cd' is the reverse model"):
        load_student(empty, "cd", tmp_path / "fcd")


def edit(file, goal, change):
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors, header)
    save_file(tensors, goal, metadata=header)
    return goal


NAME = "unet.conv.lora_A.weight"
FIRST = "unet.down_blocks.0.resnets.0.conv1.lora_A.weight"
DAMAGES = {
    "lacks 1 of": lambda tensors, header: tensors.pop(FIRST),
    "has 1 weights that these students have no place for": lambda tensors, header: tensors.update(
        {NAME: torch.ones(1)}
    ),
    r"conv1.lora_A.weight is \(4, 1, 3, 3\), these students need \(4, 16, 3, 3\)": lambda tensors, header: (
        tensors.update({FIRST: torch.ones(4, 1, 3, 3)})
    ),
    r"rank 4 and alpha 64, the students 4 and 8: .*alpha=64": lambda tensors, header: header.update(
        lora_adapter_metadata=json.dumps({"unet.r": 4, "unet.lora_alpha": 64})
    ),
    "uses ..use_dora..": lambda tensors, header: header.update(
        lora_adapter_metadata=json.dumps({"unet.use_dora": True})
    ),
    "is no student": lambda tensors, header: tensors.clear(),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(students, empty, tmp_path, complaint):
    file = save_student(students, "cd", tmp_path / "reverse", metadata={})
    damaged = edit(file, tmp_path / "damaged.safetensors", DAMAGES[complaint])
    before = {name: value.clone() for name, value in weights(empty, "cd").items()}
    with pytest.raises(ValueError, match=complaint):
        load_student(empty, "cd", damaged)
    assert same(weights(empty, "cd"), before)


def test_a_path_without_a_student_is_refused(empty, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no student at .*nowhere"):
        load_student(empty, "cd", tmp_path / "nowhere")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_student(empty, "cd", tmp_path / "torn.safetensors")


def test_metadata_that_would_not_come_back_is_refused(students, tmp_path):
    with pytest.raises(ValueError, match=r"metadata may not set .'rank'."):
        save_student(students, "cd", tmp_path / "reverse", metadata={"rank": 1})
    with pytest.raises(ValueError, match="not Tensor"):
        save_student(students, "cd", tmp_path / "reverse", metadata={"w": torch.ones(1)})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="that is a file"):
        save_student(students, "cd", tmp_path / "file", metadata={})
