"""Students in files: each alone, bit for bit, in a form that plain diffusers understands, and never the wrong one."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from golden_case import golden_path, load_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from students_case import LORA, output_of, run, tiny_batch, tiny_model, tiny_students, tiny_unet
from training_case import same

from icd_lightning.models.backbones import UNet
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile, write_diffusers, write_kohya
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents

ENDS = [0, 259, 519, 779, 999]
ABOUT = {"boundaries": ENDS, "family": "tiny"}
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def students():
    """To read from."""
    return tiny_students()


@pytest.fixture
def empty():
    return LoraStudents(tiny_model(), lora=LORA)


def weights(students, direction):
    return {name: parameter.detach().clone() for name, parameter in students.named_parameters_of(direction).items()}


def write_both(students, folder):
    for direction in DIRECTIONS:
        students.export(direction, folder, ABOUT)


def read(path, **options) -> StudentFile:
    return StudentFile.read(path, **options)


def test_each_student_comes_back_alone_and_bit_for_bit(students, empty, tmp_path):
    write_both(students, tmp_path)
    fresh = weights(empty, "forward")
    empty.load("reverse", read(tmp_path / "reverse"))
    assert same(weights(empty, "reverse"), weights(students, "reverse"))
    assert same(weights(empty, "forward"), fresh)
    empty.load("forward", read(tmp_path / "forward" / WEIGHTS))
    assert same(weights(empty, "forward"), weights(students, "forward"))
    assert empty.boundaries == {"reverse": ENDS, "forward": ENDS}


@pytest.mark.parametrize("form", ["forward", "kohya/forward.safetensors"])
def test_a_file_says_what_it_holds(students, tmp_path, form):
    write_both(students, tmp_path)
    file = read(tmp_path / form)
    assert (file.direction, file.boundaries, file.rank, file.alpha) == ("forward", ENDS, 4, 8)
    process = {"prediction_type": "epsilon", **LEVELS}
    known = {"adapter": "fcd", "direction": "forward", "process": process}
    assert file.about == {"rank": 4, "alpha": 8, **known, **ABOUT}
    assert json.loads((tmp_path / "forward" / "icd.json").read_text()) == file.about


def test_writing_replaces_the_student_and_nothing_else(tmp_path):
    students, folder = tiny_students(), tmp_path / "exports" / "reverse"
    write_diffusers(students.file("reverse", {}), folder)
    (folder / "README.md").write_text("a model card")
    students.parameters_of("reverse")[0].data.add_(1)
    write_diffusers(students.file("reverse", {}), folder)
    assert same(dict(read(folder).weights), weights(students, "reverse"))
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "icd.json", WEIGHTS]
    assert [file.name for file in folder.parent.iterdir()] == ["reverse"]


def test_an_interrupted_write_leaves_the_old_student(students, tmp_path, monkeypatch):
    write_diffusers(students.file("reverse", {}), tmp_path / "reverse")
    before = (tmp_path / "reverse" / WEIGHTS).read_bytes()

    def interrupted(tensors, metadata):
        raise KeyboardInterrupt

    monkeypatch.setattr("icd_lightning.models.student_file.save", interrupted)
    for folder in ("reverse", "another"):
        with pytest.raises(KeyboardInterrupt):
            write_diffusers(students.file("forward", {}), tmp_path / folder)
    assert (tmp_path / "reverse" / WEIGHTS).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["reverse"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_plain_pipeline_loads_it_with_the_right_strength(students, tmp_path, direction):
    write_both(students, tmp_path)
    batch, parts = tiny_batch(), ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = StableDiffusionPipeline(
        **dict.fromkeys(parts), unet=tiny_unet(), scheduler=DDIMScheduler(), requires_safety_checker=False
    )
    pipe.load_lora_weights(str(tmp_path / direction))
    with torch.no_grad():
        assert torch.equal(run(pipe.unet, batch), output_of(students, direction, batch))


# Files that others wrote, or changed


RELEASED = [
    ("reverse", "iCD-SD15-reverse_259_519_779_999.safetensors"),
    ("forward", "iCD-SD15-forward_19_259_519_779.safetensors"),
]


@pytest.mark.parametrize(("direction", "name"), RELEASED)
def test_a_released_file_has_alpha_8_and_is_known_by_its_name(students, empty, tmp_path, direction, name):
    released = {f"unet.base_model.model.{key}": weight for key, weight in weights(students, direction).items()}
    save_file(released, tmp_path / name)
    file = read(tmp_path / name)
    assert (file.alpha, file.direction, file.boundaries) == (8, direction, ENDS)
    empty.load(direction, file)
    with torch.no_grad():
        assert torch.equal(output_of(empty, direction, tiny_batch()), output_of(students, direction, tiny_batch()))
    other = DIRECTIONS[1 - DIRECTIONS.index(direction)]
    with pytest.raises(ValueError, match=f"holds the {direction} model, and is given as the {other} model"):
        empty.load(other, file)


def lose_header(students, folder, *, alpha=8.0) -> dict:
    """A student whose header was lost in a cast: alone, beside its icd.json, and as the folder that peft writes."""
    written = write_diffusers(students.file("reverse", ABOUT), folder / "whole")
    tensors = load_file(written)
    for name in ("alone", "beside", "peft"):
        (folder / name).mkdir()
    for name in ("alone", "beside"):
        save_file(tensors, folder / name / WEIGHTS)
    shutil.copy(folder / "whole" / "icd.json", folder / "beside")
    theirs = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in tensors.items()}
    save_file(theirs, folder / "peft" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": list(UNet.lora_targets)}
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(config))
    return {name: folder / name for name in ("alone", "beside", "peft")}


@pytest.mark.parametrize("alpha", [8.0, 16.0])
def test_alpha_is_what_is_said_beside_a_lost_header(tmp_path, alpha):
    students = tiny_students(lora=LoraSettings(rank=4, alpha=alpha))
    places = lose_header(students, tmp_path, alpha=alpha)
    for place in ("beside", "peft"):
        file = read(places[place])
        assert (file.alpha, file.rank) == (alpha, 4)
        assert same(dict(file.weights), weights(students, "reverse"))
    assert (read(places["beside"]).direction, read(places["peft"]).direction) == ("reverse", None)


def test_a_file_that_does_not_say_its_alpha_is_refused_with_a_remedy_that_works(students, empty, tmp_path):
    path = lose_header(students, tmp_path)["alone"]
    with pytest.raises(ValueError, match=r"alone.*does not say its alpha: its header is lost.*by --lora_alpha"):
        read(path)
    empty.load("reverse", read(path, alpha=8))
    assert same(weights(empty, "reverse"), weights(students, "reverse"))
    with pytest.raises(ValueError, match="alpha nan is no positive number"):
        read(path, alpha=float("nan"))


def test_what_a_file_says_goes_before_what_the_caller_says(students, tmp_path):
    write_both(students, tmp_path)
    assert read(tmp_path / "reverse", alpha=64).alpha == 8


def test_files_of_peft_and_of_diffusers_load(students, empty, tmp_path):
    empty.load("forward", read(golden_path("lora_forward.safetensors"), alpha=8))
    assert same(weights(empty, "forward"), load_tensors("lora_forward.safetensors"))
    students.network.save_lora_adapter(tmp_path / "by_diffusers", "cd")
    empty.load("reverse", read(tmp_path / "by_diffusers", alpha=8))
    assert same(weights(empty, "reverse"), weights(students, "reverse"))


def test_kohyas_many_alphas_are_one(tmp_path):
    strong = tiny_students(lora=LoraSettings(rank=4, alpha=16)).file("reverse", {})
    file = write_kohya(strong, tmp_path / "kohya.safetensors")
    assert read(file).alpha == 16
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith(".alpha"))] = torch.tensor(1.0)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"has the alphas 1.0, 16.0: a student has one"):
        read(file)


@pytest.mark.parametrize(
    ("alpha", "complaint"),
    [
        (None, r"has no alpha for lora_unet_\w+ and 0 more: a student has one"),
        (torch.ones(3), r"has the alphas 8.0, \[1.0, 1.0, 1.0\]"),
        (torch.tensor(1j), r"alpha is of torch.complex64: convert it to one of torch.float32"),
    ],
)
def test_a_kohya_file_whose_alphas_cannot_be_is_refused(students, tmp_path, alpha, complaint):
    file = write_kohya(students.file("reverse", {}), tmp_path / "kohya.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".alpha"))
    del tensors[name]
    save_file(tensors | ({} if alpha is None else {name: alpha}), file)
    with pytest.raises(ValueError, match=complaint):
        read(file)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_kohya_names_are_understood_for_every_module_of_the_true_architectures(name):
    """By diffusers' own translation, of the names alone: for the weights, a number each stands in."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(Family(f"random:{name}").source.config("unet"))
    targets = tuple(f".{module}" for module in UNet.lora_targets)
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


# What is refused


def edit(file, goal, change):
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors, header)
    save_file(tensors, goal, metadata=header)
    return goal


def lora(**said):
    """Change what the header says to peft."""
    return lambda tensors, header: header.update(lora_adapter_metadata=json.dumps(said))


NAME = "unet.conv.lora_A.weight"
FIRST = "unet.down_blocks.0.resnets.0.conv1.lora_A.weight"
NAN = torch.full((4, 16, 3, 3), torch.nan)
DAMAGES = {
    "is not of this network and these target_modules: 1 weights missing, 0 unknown": lambda tensors, header: (
        tensors.pop(FIRST)
    ),
    "0 weights missing, 1 unknown": lambda tensors, header: tensors.update({NAME: torch.ones(1)}),
    r"conv1.lora_A.weight of \(4, 1, 3, 3\) in the place of \(4, 16, 3, 3\)": lambda tensors, header: tensors.update(
        {FIRST: torch.ones(4, 1, 3, 3)}
    ),
    r"was trained for the process .*v_prediction.*, and this network's is .*epsilon": lambda tensors, header: (
        header.update(icd='{"process": {"prediction_type": "v_prediction"}}')
    ),
    r"was trained for the process .*0\.02.*, and this network's is .*0\.012": lambda tensors, header: header.update(
        icd=json.dumps({"process": {"prediction_type": "epsilon", **LEVELS, "beta_end": 0.02}})
    ),
    "conv1.lora_A.weight is not finite": lambda tensors, header: tensors.update({FIRST: NAN}),
    r"rank 4 and alpha 64, the students 4 and 8: .*students\.init_args\.lora": lambda tensors, header: header.update(
        icd="{}", lora_adapter_metadata='{"unet.lora_alpha": 64}'
    ),
    "says alpha 8, and 64 as lora_alpha: write it anew": lora(**{"unet.lora_alpha": 64}),
    "alpha '16' is no positive number": lora(**{"unet.lora_alpha": "16"}),
    "uses use_dora, which students do not have": lora(**{"unet.use_dora": True}),
    "its header holds list, not a JSON object": lambda tensors, header: header.update(icd="[7]"),
    "its header is no JSON": lambda tensors, header: header.update(icd="{"),
    "says boundaries 7: they are a list": lambda tensors, header: header.update(icd='{"boundaries": 7}'),
    r"lora_A.weight of \(4, 16, 3, 3\) torch.int8 in the place": lambda tensors, header: tensors.update(
        {FIRST: torch.ones(4, 16, 3, 3, dtype=torch.int8)}
    ),
    r"lora_A.weight is of torch.float8_e4m3fn: convert it to one": lambda tensors, header: tensors.update(
        {FIRST: torch.ones(4, 16, 3, 3).to(torch.float8_e4m3fn)}
    ),
    r"it has ranks \['4', 'none'\]": lambda tensors, header: tensors.update(
        {FIRST.replace("lora_A", "lora_B"): torch.ones(())}
    ),
    "is no student": lambda tensors, header: tensors.clear(),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(students, empty, tmp_path, complaint):
    file = write_diffusers(students.file("reverse", {}), tmp_path / "reverse")
    damaged = edit(file, tmp_path / "damaged.safetensors", DAMAGES[complaint])
    before = weights(empty, "reverse")
    with pytest.raises(ValueError, match=complaint):
        empty.load("reverse", read(damaged))
    assert same(weights(empty, "reverse"), before)


def test_a_student_of_an_older_version_tells_no_betas(students, empty, tmp_path):
    file = write_diffusers(students.file("reverse", {}), tmp_path / "reverse")
    told = {"process": {"prediction_type": "epsilon"}}
    older = edit(file, tmp_path / "older.safetensors", lambda tensors, header: header.update(icd=json.dumps(told)))
    empty.load("reverse", read(older))
    assert same(weights(empty, "reverse"), weights(students, "reverse"))


def test_a_path_without_a_student_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no student at .*nowhere"):
        read(tmp_path / "nowhere")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"torn\.safetensors cannot be read as a file of weights"):
        read(tmp_path / "torn.safetensors")


def test_what_would_not_come_back_is_not_written(students, tmp_path):
    with pytest.raises(TypeError, match="Tensor is not JSON"):
        students.export("reverse", tmp_path, {"w": torch.ones(1)})
    (tmp_path / "reverse").touch()
    with pytest.raises(ValueError, match="that is a file"):
        students.export("reverse", tmp_path, ABOUT)
