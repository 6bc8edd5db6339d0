"""Configurations and method files that somebody else wrote: they build trusted parts, or end in one line."""

import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from kills_case import ICD, ROOT
from often_case import often
from PIL import Image
from running_case import running, wait_for_file
from safetensors.torch import save_file
from training_case import write_scenes

from icd_lightning import trust
from icd_lightning.commands import fit
from icd_lightning.commands.main import main
from icd_lightning.data.tars import expand

BASE = [
    *("fit", f"--config={ROOT}/conf/base.yaml", f"--config={ROOT}/conf/model/tiny.yaml", "--trainer.max_steps=0"),
    "--model.init_args.students.init_args.lora.target_modules=[to_q]",
]
TOUCH = "{class_path: subprocess.Popen, init_args: {args: [touch, PWNED]}}"
LOOK = "trainer: {callbacks: [{class_path: icd_lightning.callbacks.reconstruction.ReconstructionCallback, init_args: "
BOMB = "\n".join(f"{name}: &{name} [{', '.join([f'*{above}'] * 9)}]" for above, name in pairwise("abcdefghij"))
CONFIGURATIONS = {
    "a class for a parameter of any type": (
        "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {ddp_comm_state: "
        f"{TOUCH}}}}}}}",
        "subprocess.Popen",
    ),
    "a class of another package": (f"trainer: {{callbacks: [{TOUCH}]}}", "subprocess.Popen"),
    "a function": ("model: {class_path: os.system}", "os.system"),
    "a metric of another package": (LOOK + "{metrics: [theirs.Metric]}}]}", "theirs.Metric"),
    "a metric's file": (LOOK + "{metrics: [metric.yaml]}}]}", "is no PictureMetric"),
    "a shell command": ("data: {init_args: {urls: 'pipe:touch PWNED'}}", "pipe:touch PWNED"),
    "a shell command in braces": ("data: {init_args: {urls: '{pipe:touch PWNED,x}'}}", "pipe:touch PWNED"),
    "a checkpoint elsewhere": ("ckpt_path: http://localhost:1/x.ckpt", "copy it here"),
    "aliases of aliases": (f"a: &a [x]\n{BOMB}", "aliases"),
    "great depth": ("[" * 5000 + "]" * 5000, "nested too deeply"),
    "a python object": ("x: !!python/object/apply:os.system [touch PWNED]", "python/object"),
    "no accumulation": ("trainer: {accumulate_grad_batches: 0}", "accumulate_grad_batches 0"),
    "no number to clip to": ("trainer: {gradient_clip_val: .nan}", "gradient_clip_val nan"),
    "data without batches": (
        "data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}\nglobal_batch_size: 2",
        "needs data.init_args.batch_size",
    ),
    "no devices": ("trainer: {devices: -3}", "devices"),
    "a folder that cannot be": ("trainer: {default_root_dir: /dev/null/x}", "cannot write to /dev/null/x"),
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def refusal(capsys, *args: str) -> str:
    """The one line by which a command refuses."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("icd: error: ")]
    assert (ended.value.code, len(complaints)) == (2, 1)
    return complaints[0]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_runs_nothing_and_is_refused_by_name(here, capsys, name):
    text, named = CONFIGURATIONS[name]
    Path("theirs.yaml").write_text(text)
    Path("theirs.py").write_text("open('PWNED', 'w')")
    Path("metric.yaml").write_text(
        "class_path: icd_lightning.data.tars._Pipe\ninit_args: {command: touch PWNED, patience: 1}"
    )
    scenes = write_scenes(here / "scenes")
    own = [f"--data.init_args.urls={scenes}", f"--data.init_args.val_urls={scenes}", "--trainer.default_root_dir=run"]
    assert named in refusal(capsys, *BASE, *own, "--config", "theirs.yaml")
    assert not Path("PWNED").exists()


METHODS = {
    "a function": ("class_path: os.system\ninit_args: {command: touch PWNED}", "names os.system"),
    "a class": ("class_path: subprocess.Popen\ninit_args: {args: [touch, PWNED]}", "names subprocess.Popen"),
    "a name like ours": ("class_path: icd_lightning_evil.X", "names icd_lightning_evil.X"),
    "a list": ("[1, 2]", "must hold class_path"),
    "nothing": ("", "must hold class_path"),
    "no text for a class": ("class_path: [1]", "is no module.Class"),
    "a python object": ("!!python/object/apply:os.system [touch PWNED]", "python/object"),
    "great depth": ("[" * 5000, "theirs.yaml"),
    "no number": (
        "class_path: icd_lightning.editing.baselines.sdedit.SDEdit\ninit_args: {strength: .nan}",
        "strength",
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_file_runs_nothing_and_is_refused_by_name(here, capsys, name):
    text, named = METHODS[name]
    Path("theirs.yaml").write_text(text)
    picture = str(ROOT / "docs" / "edits.png")
    assert named in refusal(capsys, "edit", picture, "--source", "a", "--target", "b", "--method", "theirs.yaml")
    assert not Path("PWNED").exists()


def test_what_is_trusted_may_name_anything(here, capsys):
    Path("mine.py").write_text("def make(**_):\n    raise ValueError('made by me')\n")
    Path("mine.yaml").write_text("class_path: mine.make")
    picture = str(ROOT / "docs" / "edits.png")
    edit = ["edit", picture, "--source", "a", "--target", "b", "--method", "mine.yaml"]
    assert "names mine.make" in refusal(capsys, *edit)
    assert "names mine.make" not in refusal(capsys, "--trust-config", *edit)


def test_a_run_without_room_for_its_checkpoints_is_told_of_before_it_begins(here, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    scenes = write_scenes(here / "scenes")
    own = [f"--data.init_args.urls={scenes}", f"--data.init_args.val_urls={scenes}", "--trainer.default_root_dir=run"]
    assert "run has 0 MB free, checkpoints need" in refusal(capsys, *BASE, *own)
    assert list(Path("run").iterdir()) == []


def test_two_runs_do_not_train_into_one_folder(here, capsys, monkeypatch):
    monkeypatch.setattr(fit, "PATIENCE", 0.1)
    scenes = write_scenes(here / "scenes")
    own = [f"--data.init_args.urls={scenes}", f"--data.init_args.val_urls={scenes}", "--trainer.default_root_dir=run"]
    Path("run").mkdir()
    other = "import sys; from pathlib import Path; from icd_lightning.commands.fit import alone\n"
    other += "with alone(Path('run')):\n    print('mine', flush=True)\n    sys.stdin.read()"
    with running([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"mine\n"
        said = refusal(capsys, *BASE, *own)
    assert "another run trains into run: wait for its end, or give another trainer.default_root_dir" in said
    assert [path.name for path in Path("run").iterdir()] == [".lock"]
    main([*BASE, *own])  # killed, it lets go


def test_sigterm_ends_any_command_with_143_and_nothing_half_written(here):
    command = [str(ICD), "data", "shapes", "--out", "shapes", "--count", "1000000", "--shard_size", "100000"]
    with running(command, stderr=subprocess.DEVNULL) as process:
        wait_for_file(process, here, "shapes/.00000.tar-*.tmp")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert [file.name for file in Path("shapes").iterdir()] == ["manifest.json"]


def test_a_package_that_registers_parts_is_trusted(monkeypatch):
    assert {"icd_lightning", "lightning.pytorch"} <= set(trust.packages())
    monkeypatch.setattr(trust, "packages", lambda: ["icd_lightning", "theirs"])
    trust.begin(trusted=False)
    trust.check_class("theirs.metrics.Mine", "x.yaml")


def test_lightnings_own_plugins_may_be_named(here, capsys):
    """Some live in lightning.fabric, whatever name they go by."""
    plugin = "{class_path: lightning.pytorch.plugins.environments.SLURMEnvironment, init_args: {auto_requeue: false}}"
    Path("slurm.yaml").write_text(f"trainer: {{plugins: [{plugin}]}}")
    missing = "--data.init_args.urls=nowhere"
    assert "nowhere does not exist" in refusal(capsys, *BASE, "--config", "slurm.yaml", missing)


def test_commands_in_the_place_of_shards_are_for_code_and_for_those_who_say_so(here, capsys):
    assert expand("pipe:cat x.tar") == ["pipe:cat x.tar"]
    assert "--trust-config" in refusal(capsys, "data", "describe", "pipe:cat x.tar")
    assert "copy it to this machine" in refusal(capsys, "--trust-config", "data", "describe", "pipe:cat x.tar")


def state(checkpoint: dict) -> dict:
    return next(iter(checkpoint["optimizer_states"][0]["state"].values()))


DAMAGE = {  # of a checkpoint's content
    "a list": lambda checkpoint: [checkpoint],
    "a tensor": lambda checkpoint: torch.zeros(3),
    "nothing": lambda checkpoint: {},
    "no loops": lambda checkpoint: {key: value for key, value in checkpoint.items() if key != "loops"},
    "no weights": lambda checkpoint: {**checkpoint, "state_dict": "x"},
    "a recipe of text": lambda checkpoint: {**checkpoint, "recipe": "x"},
    "loops of text": lambda checkpoint: {**checkpoint, "loops": {"fit_loop": "x"}},
    "no optimizer": lambda checkpoint: {**checkpoint, "optimizer_states": []},
    "an optimizer of text": lambda checkpoint: {**checkpoint, "optimizer_states": ["x"]},
    "data of text": lambda checkpoint: {**checkpoint, "ShardDataModule": {"position": "x"}},
    "data without an order": lambda checkpoint: {**checkpoint, "ShardDataModule": {"position": 1}},
    "averages that are not finite": lambda checkpoint: state(checkpoint)["exp_avg"].fill_(torch.nan),
    "averages of another shape": lambda checkpoint: state(checkpoint).update(exp_avg=torch.zeros(3)),
    "averages of text": lambda checkpoint: state(checkpoint).update(exp_avg="x"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The words of a training and the checkpoint of its first step."""
    root = tmp_path_factory.mktemp("trained")
    scenes = write_scenes(root / "scenes")
    own = [f"--data.init_args.{key}={scenes}" for key in ("urls", "val_urls")]
    own += ["--data.init_args.batch_size=2", "--global_batch_size=2", f"--trainer.default_root_dir={root / 'run'}"]
    fit = [*BASE, *own, "--trainer.limit_val_batches=0"]
    main([*fit, "--trainer.max_steps=1"])
    return fit, root / "run" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", often(DAMAGE, "no weights", "an optimizer of text"))
def test_a_checkpoint_whose_content_cannot_be_is_refused_by_name(trained, here, capsys, name):
    fit, place = trained
    checkpoint = torch.load(place, weights_only=True)
    changed = DAMAGE[name](checkpoint)
    torch.save(checkpoint if changed is None or name.startswith("averages") else changed, here / "damaged.ckpt")
    said = refusal(capsys, *fit, "--trainer.max_steps=2", f"--ckpt_path={here / 'damaged.ckpt'}")
    assert re.search("cannot go on from|cannot be read as a checkpoint|s optimizer is of another", said)
    assert "ckpt_path" in said


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(touch PWNED) run\n", None])
def test_pictures_that_start_programs_or_have_no_white_are_refused(here, capsys, content):
    file = here / "p.tif"
    Image.new("F", (64, 64), 0.5).save(file)
    if content:
        file.write_bytes(content)
    said = refusal(capsys, "edit", str(file), "--source", "a", "--target", "b")
    assert f"{file} cannot be read as a picture" in said
    assert "Ghostscript" not in said


def test_sides_beyond_all_pictures_are_refused(here, capsys):
    Image.new("RGB", (64, 64)).save("p.png")
    assert "width 1000" in refusal(capsys, "edit", "p.png", "--source", "a", "--target", "b", f"--width={10**20}")


def test_a_prompt_that_is_no_text_is_refused(here, capsys):
    assert "is it UTF-8?" in refusal(capsys, "generate", "a \udcff star")


def test_guidance_beyond_all_numbers_makes_no_picture(here, capsys):
    assert "not finite" in refusal(capsys, "generate", "a star", "--guidance_scale", "1e38", "--output", "x.png")
    assert not Path("x.png").exists()


@pytest.mark.parametrize(
    "latents", [torch.tensor(1.0), torch.zeros(0, 4, 16, 16), torch.full((1, 4, 16, 16), torch.nan)]
)
def test_latents_that_are_none_are_refused(here, capsys, latents):
    save_file({"latents": latents}, "theirs.safetensors")
    assert "theirs.safetensors" in refusal(capsys, "generate", "a star", "--latents", "theirs.safetensors")


def test_what_would_never_end_is_refused(here, capsys):
    assert "count 1000000000" in refusal(capsys, "generate", "a star", "--count", "1000000000")


NO_FILES = {"a pipe": os.mkfifo, "without end": lambda place: os.symlink("/dev/zero", place), "a folder": os.mkdir}
READ = {  # a name, and what reads it
    "set/0.tar": [["data", "describe", "set"], ["data", "describe", "set/*.tar"], [*BASE, "--data.init_args.urls=set"]],
    "set/manifest.json": [["data", "describe", "set"], [*BASE, "--data.init_args.urls=set"]],
    "p.png": [["edit", "p.png", "--source", "a", "--target", "b"], ["invert", "p.png", "--prompt", "a"]],
    "my.yaml": [[*BASE, "--config", "my.yaml"], [*BASE, "--config=my.yaml"]],
    "mine": [[*BASE, "--config", "mine"]],
    "method.yaml": [
        ["edit", str(ROOT / "docs/edits.png"), "--source", "a", "--target", "b", "--method", "method.yaml"]
    ],
    "x.ckpt": [[*BASE, "--ckpt_path=x.ckpt"], ["generate", "a", "--model=x.ckpt"]],
    "run/checkpoints/last.ckpt": [BASE],
    "x.pt": [["generate", "a", "--guided_unet=x.pt"]],
    "x.safetensors": [["generate", "a", f"--{name}=x.safetensors"] for name in ("forward", "style", "latents")],
    "edits.csv": [["edit", "edits.csv"]],
}


@pytest.mark.parametrize("kind", often(NO_FILES, "a pipe"))
@pytest.mark.parametrize("name", READ)
def test_what_is_no_file_is_refused_by_name_and_never_waited_for(here, capsys, impatient, name, kind):
    scenes = write_scenes(here / "scenes", 8)
    (here / name).parent.mkdir(parents=True, exist_ok=True)
    NO_FILES[kind](here / name)
    for command in READ[name]:
        own = ["--trainer.default_root_dir=run", f"--data.init_args.val_urls={scenes}"] if "fit" in command else []
        if own and not any("urls=" in word for word in command):
            own.append(f"--data.init_args.urls={scenes}")
        said = refusal(capsys, *command, *own)
        assert name in said
        assert "does not exist" not in said
