"""Model folders that are damaged or lie: one line that names the file, nothing written, never a traceback."""

import json
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import icd_lightning
from icd_lightning.commands.main import main
from icd_lightning.data.images import save_png
from icd_lightning.metrics.distribution import read_statistics
from icd_lightning.metrics.pretrained import load_weights
from icd_lightning.models.family import Family
from icd_lightning.models.text import build_tokenizer
from icd_lightning.models.weights import read_weights
from icd_lightning.tiny.scenes import vocabulary

TINY = Path(icd_lightning.__file__).parent / "weights" / "tiny"
JSON = [
    "icd.json",
    "unet_guided/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
    "text_encoder/config.json",
]
NOT_JSON = {
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "cut": b'{"a":',
    "empty": b"",
    "deep": b'{"a":' * 100_000,
    "binary": b"\xff\xfe\x00\x01",
}
WEIGHTS = [
    "unet_guided/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "students/forward/pytorch_lora_weights.safetensors",
    "students/reverse/pytorch_lora_weights.safetensors",
]


def changed(change: Callable[[dict, str], None]) -> Callable[[Path], None]:
    """The file with its first tensor of several numbers changed, its header kept."""

    def apply(path: Path) -> None:
        with safe_open(path, "pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        change(tensors, min(name for name, value in tensors.items() if value.numel() > 1 and value.is_floating_point()))
        path.unlink()
        save_file(tensors, path, metadata=header)

    return apply


def replaced(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The file with other bytes in it."""

    def apply(path: Path) -> None:
        there = path.read_bytes()
        path.unlink()
        path.write_bytes(content(there))

    return apply


DAMAGE = {
    "empty": replaced(lambda _: b""),
    "cut": replaced(lambda there: there[:100_000]),
    "a header of 5 TB": replaced(lambda _: (5 * 10**12).to_bytes(8, "little") + b"{}"),
    "text": replaced(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1234\n"),
    "missing": Path.unlink,
    "nan": changed(lambda tensors, name: tensors[name].view(-1).__setitem__(0, torch.nan)),
    "inf": changed(lambda tensors, name: tensors[name].view(-1).__setitem__(-1, torch.inf)),
    "without a tensor": changed(lambda tensors, name: tensors.pop(name)),
    "of another shape": changed(lambda tensors, name: tensors.update({name: torch.zeros(3, 7)})),
    "without all tensors": changed(lambda tensors, _: tensors.clear()),
}
VALUES = {
    "icd.json": [
        {"guidance_scale": 10**400},
        {"guidance_scale": "3"},
        {"guidance_scale": None},
        {"guidance_scale": -1},
        {"tau": "x"},
        {"tau": 7},
    ],
    "scheduler/scheduler_config.json": [
        {"num_train_timesteps": "x"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": 10},
        {"num_train_timesteps": 2000},
        {"beta_start": "a"},
        {"beta_end": 5},
        {"beta_start": float("nan")},
        {"beta_schedule": "zig"},
        {"prediction_type": "sample"},
        {"trained_betas": "x"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    ],
    "unet_guided/config.json": [
        {"in_channels": -1},
        {"layers_per_block": 10**6},
        {"norm_eps": float("nan")},
        {"in_channels": "a"},
        {"block_out_channels": []},
        {"_class_name": "Nope"},
    ],
    "unet/config.json": [{"sample_size": value} for value in ("x", None, 0, [16, 16], 10**9)],
    "vae/config.json": [
        *({"scaling_factor": value} for value in (1e300, [1], None, "x")),
        {"_class_name": ["x"]},
        {"_class_name": "Nope"},
        {"latent_channels": "a"},
        {"encoder_block_out_channels": [7, 13]},
        {"scaling_factor": float("nan")},
        {"scaling_factor": 0},
        *({"patch_size": value} for value in (2, [], [0, 0], ["2", "2"], [2, 1])),
    ],
    "text_encoder/config.json": [{"hidden_size": "big"}, {"num_attention_heads": 0}, {"vocab_size": 3}],
    "tokenizer/tokenizer_config.json": [
        *({"model_max_length": value} for value in ("x", 0, -1, [1], True)),
        {"pad_token": None},
        {"eos_token": 5},
    ],
}
STUDENT_VALUES = [
    {"alpha": "16"},
    {"alpha": None},
    {"alpha": -1},
    {"alpha": float("inf")},
    {"rank": "16"},
    {"rank": 8},
    {"boundaries": 7},
    {"boundaries": [0]},
    {"boundaries": [False, True]},
    {"start_timestep": True},
    {"start_timestep": "x"},
    {"alpha": 10**400},
    {"boundaries": [0, "a"]},
    {"boundaries": [0, 5000]},
    {"boundaries": [999, 0]},
    {"direction": "up"},
    {"direction": "reverse"},
]


@pytest.fixture
def family(tmp_path) -> Path:
    """The shipped family, each of its files a link that can be replaced."""
    for file in (file for file in TINY.rglob("*") if file.suffix in (".json", ".safetensors")):
        link = tmp_path / "model" / file.relative_to(TINY)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(file, link)
    return tmp_path / "model"


def assert_refused(capsys, family: Path, named: str, *words: str) -> None:
    """An edit with this family ends in one line that names the file, its folder or a word, and writes nothing."""
    picture, output = family.parent / "p.png", family.parent / "edited.png"
    save_png(torch.full((64, 64, 3), 120, dtype=torch.uint8).numpy(), picture, about={})
    prompts = [
        "--source",
        "a large red circle on a blue background",
        "--target",
        "a large green circle on a blue background",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["edit", str(picture), *prompts, "--model", str(family), "--output", str(output)])
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("icd: error: ")]
    assert (ended.value.code, len(complaints)) == (2, 1)
    assert any(str(name) in complaints[0] for name in (family / named, (family / named).parent, *words)), complaints[0]
    assert not output.exists()


def full(cases: list, few: int) -> list:
    """All of the cases, every `few`-th of them a fast test."""
    return [case if i % few == 0 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


@pytest.mark.parametrize(("name", "content"), full(list(product(JSON, NOT_JSON)), 5))
def test_what_is_no_json_object_is_refused_by_name(family, capsys, name, content):
    (family / name).unlink()
    (family / name).write_bytes(NOT_JSON[content])
    assert_refused(capsys, family, name)


@pytest.mark.parametrize(("name", "damage"), full(list(product(WEIGHTS, DAMAGE)), 5))
def test_damaged_weights_are_refused_by_name(family, capsys, name, damage):
    DAMAGE[damage](family / name)
    assert_refused(capsys, family, name)


@pytest.mark.parametrize(("name", "value"), full([(name, v) for name, values in VALUES.items() for v in values], 6))
def test_configurations_with_values_that_cannot_be_are_refused_by_name(family, capsys, name, value):
    content = {**json.loads((family / name).read_text()), **value}
    (family / name).unlink()
    (family / name).write_text(json.dumps(content))
    assert_refused(capsys, family, name, *value, f"autoencoder of {family}", "its latents have a", "not finite")


def test_a_tokenizer_of_another_text_encoder_is_refused_by_name(family, capsys):
    for file in (family / "tokenizer").iterdir():
        file.unlink()
    build_tokenizer({*vocabulary(), "zebra"}, 24).save_pretrained(family / "tokenizer")
    assert_refused(capsys, family, "tokenizer")


def test_a_tokenizer_cuts_where_its_encoder_does_whatever_its_file_says(family):
    file = family / "tokenizer" / "tokenizer_config.json"
    said = json.loads(file.read_text())
    file.unlink()
    for length in ({"model_max_length": 10**30}, {"model_max_length": 7}, {}):
        file.write_text(json.dumps({key: value for key, value in said.items() if key != "model_max_length"} | length))
        assert Family(str(family)).load_conditioner().tokenizer.model_max_length == 24  # prompt-to-prompt's length too


@pytest.mark.parametrize(("value", "header"), full(list(product(STUDENT_VALUES, ["kept", "lost"])), 4))
def test_a_student_whose_header_and_file_disagree_or_lie_is_refused(family, capsys, value, header):
    folder = family / "students" / "forward"
    weights, said = folder / "pytorch_lora_weights.safetensors", folder / "icd.json"
    content = {**json.loads(said.read_text()), **value}
    said.unlink()
    said.write_text(json.dumps(content))
    if header == "lost":
        tensors = load_file(weights)
        weights.unlink()
        save_file(tensors, weights)
    assert_refused(capsys, family, "students/forward/icd.json", *value)


@pytest.mark.parametrize(
    "read",
    [read_weights, load_weights, partial(read_statistics, num_features=2)],
    ids=["weights", "a metric's weights", "statistics"],
)
def test_a_pipe_is_refused_by_name_and_never_waited_for(tmp_path, impatient, read):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"{tmp_path}/x.pt is no file"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content", [b"hello", b"root:x:0:0:root:/root:/bin/sh\n", b"\x80\x02q", b"\x80\x02h\x05.", b""]
)
@pytest.mark.parametrize("option", ["--guided_unet", "--model"])
def test_what_is_no_pickle_is_refused_by_name(tmp_path, capsys, option, content):
    file, picture = tmp_path / "theirs.ckpt", tmp_path / "p.png"
    file.write_bytes(content)
    save_png(torch.full((64, 64, 3), 120, dtype=torch.uint8).numpy(), picture, about={})
    with pytest.raises(SystemExit) as ended:
        main(["edit", str(picture), "--source", "a", "--target", "b", option, str(file)])
    assert (ended.value.code, f"icd: error: {file} cannot be read" in capsys.readouterr().err) == (2, True)
