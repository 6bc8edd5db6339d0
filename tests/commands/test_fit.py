"""`icd fit` from end to end: a random family, the real configurations, two steps."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_case import write_family
from often_case import often
from running_case import running
from training_case import write_scenes

from icd_lightning.commands.fit import micro_batches
from icd_lightning.commands.guide import GUIDES
from icd_lightning.commands.main import main
from icd_lightning.evaluation.curves import read_scalars

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

CONF = Path(__file__).parents[2] / "conf"
CONFIGS = [word for name in ("base", "model/tiny") for word in ("--config", str(CONF / f"{name}.yaml"))]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture(scope="module")
def command(random_family, scenes):
    """The words of `icd fit` for a small run into a folder; more options come last and win."""

    def words(folder: Path, *options: str) -> list[str]:
        settings = {
            "model.init_args.family.model": random_family,
            "model.init_args.students.init_args.lora.rank": 4,
            "model.init_args.students.init_args.lora.target_modules": "[to_q]",
            "data.init_args.urls": scenes,
            "data.init_args.val_urls": scenes,
            "data.init_args.batch_size": 2,
            "data.init_args.val_batch_size": 4,
            "trainer.default_root_dir": folder,
            "trainer.accelerator": "cpu",
            "trainer.devices": 1,
            "trainer.max_steps": 2,
            "trainer.val_check_interval": 2,
            "trainer.log_every_n_steps": 1,
        }
        return ["fit", *CONFIGS, *(f"--{key}={value}" for key, value in settings.items()), *options]

    return words


ACCUMULATED = "--global_batch_size=4"
UNSEEN = "--trainer.limit_val_batches=0"


@pytest.fixture(scope="module")
def run(command, tmp_path_factory) -> Path:
    """The folder of a run of two steps, each of two micro-batches."""
    folder = tmp_path_factory.mktemp("run")
    main(command(folder, ACCUMULATED))
    return folder


def steps(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def test_a_run_leaves_everything_in_its_folder(run):
    assert {"config.yaml", "checkpoints", "forward", "reverse"} <= {file.name for file in run.iterdir()}
    assert steps(run) == 2
    scalars = read_scalars(run)
    losses = {f"train/{name}" for name in ("loss", "reverse_cd", "forward_cd")}
    losses |= {f"{stage}/{name}_preservation" for stage in ("train", "val") for name in ("reverse", "forward")}
    assert losses | {"reconstruction/psnr", "reconstruction_guided/ssim", "grad_norm/forward"} <= scalars.keys()


def students(folder: Path) -> list[bytes]:
    return [(folder / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("forward", "reverse")]


def test_the_same_command_again_has_nothing_left_to_do(run, command, caplog):
    before = students(run)
    with caplog.at_level(logging.INFO):
        main(command(run, ACCUMULATED))
    assert "global batch 4 = 2 samples x 1 devices x 2 accumulated micro-batches" in caplog.messages
    assert "already at step 2 of 2; raise trainer.max_steps to go on" in caplog.messages
    assert steps(run) == 2
    assert students(run) == before  # to the byte, so that what was measured of these files stays known


def test_a_runs_own_config_makes_it_again(run, tmp_path):
    main(["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path), UNSEEN])
    assert students(tmp_path) == students(run)


def test_validate_measures_the_last_checkpoint(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    main(["validate", "--config", str(run / "config.yaml"), f"--trainer.default_root_dir={folder}"])
    assert "reconstruction_guided/psnr" in capsys.readouterr().out


@pytest.fixture(scope="module")
def interrupted(command, tmp_path_factory):
    """A run that Ctrl-C stopped: its folder, exit code and console."""
    folder = tmp_path_factory.mktemp("interrupted")
    overlay = folder / "overlay.yaml"
    overlay.write_text(
        """
        trainer:
          max_steps: 100000
          limit_val_batches: 0
          callbacks:
            - class_path: icd_lightning.callbacks.progress.TrainingProgress
              init_args: {every_seconds: 0}
            - class_path: icd_lightning.callbacks.checkpoint.RunCheckpoint
        """
    )
    words = command(folder, "--config", str(overlay))
    with running(
        [sys.executable, "-m", "icd_lightning.commands.main", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored where tests run by `&`
        text=True,
    ) as process:
        console = []
        for line in process.stderr:
            console.append(line)
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGINT)
        return folder, process.wait(), "".join(console)


def test_ctrl_c_saves_and_says_how_to_go_on(interrupted):
    folder, code, console = interrupted
    assert code == 130
    assert f"the same command goes on after step {steps(folder)}" in console
    assert "Traceback" not in console


def test_the_console_says_each_thing_once(interrupted):
    lines = [line for line in interrupted[2].splitlines() if line and not line.startswith("step ")]
    assert len(lines) == len(set(lines))


def test_the_next_call_goes_on(interrupted, command, caplog):
    folder, *_ = interrupted
    done = steps(folder)
    with caplog.at_level(logging.INFO):
        main(command(folder, f"--trainer.max_steps={done + 1}", UNSEEN))
    assert "Restored all states from the checkpoint" in caplog.text
    assert steps(folder) == done + 1
    logged, _ = read_scalars(folder)["train/loss"]
    assert len(logged) == done + 1


def test_gradients_are_accumulated_up_to_the_global_batch(run):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 4
    assert read_scalars(run)["reconstruction/psnr"][0] == [1]  # validated after two steps, not two micro-batches


@pytest.mark.parametrize(
    ("sizes", "expected"), [((512, 8, 8), 8), ((512, 8, 1), 64), ((128, 2, 64), 1), ((128, 2, 8), 8), ((6, 2, 3), 1)]
)
def test_micro_batches_make_up_the_global_batch(sizes, expected):
    assert micro_batches(*sizes) == expected


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ((512, 8, 6), "is not a multiple of 48 (batch_size 8 x 6 devices): take fewer devices, or another"),
        ((512, 6, 8), "is not a multiple of 48 (batch_size 6 x 8 devices): take data.init_args.batch_size 4"),
        ((4, 1, 8), "is not a multiple of 8 (batch_size 1 x 8 devices): take fewer devices, or another"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused(sizes, remedy):
    with pytest.raises(ValueError, match=re.escape(f"global_batch_size {sizes[0]} {remedy}")):
        micro_batches(*sizes)


WRONG = {
    "a key": ("--trainer.max_stepz=3", "max_stepz"),
    "a key of the task": ("--model.init_args.huber=3", "huber"),
    "a value": ("--trainer.max_steps=many", "many"),
    "a loss": ("--model.init_args.losses.backward_cd=1", "backward_cd"),
    "a weight": (
        "--model.init_args.losses.reverse_cd.init_args.weight=-1",
        "weight -1.0 of a loss must be positive and finite; null leaves the loss out",
    ),
    "a learning rate": ("--model.init_args.optimizer.lr=-1", "lr -1.0 must be positive"),
    "a class": ("--model=Missing", "Missing"),
    "a config": ("--config=nowhere.yaml", "nowhere.yaml"),
    "a model": ("--model.init_args.family.model=nowhere", "no model 'nowhere'"),
    "a guided unet": ("--model.init_args.family.guided_unet=nowhere", "no guidance-distilled unet (stage 1)"),
    "boundaries": (
        "--model.init_args.boundaries.boundary_timesteps=[249,499,699,999]",
        "boundary 249 is not on the 50-step solver grid",
    ),
    "an optimizer": ("--model.init_args.optimizer.kind=adamw8bit", "adamw8bit needs a CUDA GPU: take adamw"),
    "a global batch": ("--global_batch_size=7", "global_batch_size 7 is not a multiple of 2"),
    "a device": ("--trainer.accelerator=gpu", "gpu"),
}


def error_of(capsys, words: list[str]) -> str:
    """The one line that a refused command says."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    console = capsys.readouterr().err
    assert "Seed set to" not in console
    (error,) = [line for line in console.splitlines() if line.startswith("icd: error:")]
    return error


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_line(command, tmp_path, capsys, what):
    option, said = WRONG[what]
    if what == "a device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said in error_of(capsys, command(tmp_path, option))


@pytest.mark.parametrize("key", ["trainer", "model.init_args.losses", "model.init_args.students.init_args.lora"])
def test_a_key_with_nothing_below_it_is_named(command, tmp_path, capsys, key):
    overlay = tmp_path / "overlay.yaml"
    lines = [f"{' ' * depth}{name}:\n" for depth, name in enumerate(key.split("."))]
    overlay.write_text("".join([*lines, "seed_everything: 0\n"]))
    assert f"{key} is null: leave it out" in error_of(capsys, command(tmp_path, f"--config={overlay}"))


def test_bar_and_checkpoints_are_switched_off_by_one_word_each(command, tmp_path, caplog):
    caplog.set_level(logging.INFO, "icd_lightning")
    off = ("--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false", "--trainer.max_steps=1")
    main(command(tmp_path, *off, UNSEEN))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["forward", "kohya", "reverse"]
    assert not [line for line in caplog.messages if "images/s" in line]


def test_steps_after_each_loss_are_refused_before_ddp_starts_processes(command, tmp_path, capsys):
    options = ("--model.init_args.step_after=each_loss", "--trainer.strategy=ddp", "--trainer.devices=2")
    assert "take trainer.strategy ddp_find_unused_parameters_true" in error_of(capsys, command(tmp_path, *options))
    assert not list(tmp_path.iterdir())


OLD = {  # a key of earlier configurations, and what it is called now
    "lora: {rank: 4}": "students.init_args.lora",
    "gradient_checkpointing: true": "students.init_args.gradient_checkpointing",
    "reverse_weights: here": "students.init_args.reverse",
    "forward_weights: here": "students.init_args.forward",
    "huber_c: 0.01": "losses.<name>.init_args.huber_c",
    "train: forward": "losses.<name>, null for each loss of the student that is not to be trained",
    "allow_off_grid: true": "boundaries.allow_off_grid",
    "boundaries: [499, 999]": "boundaries.boundary_timesteps",
    "losses: {forward_cd: 0.5}": "losses.forward_cd.init_args.weight, and null leaves it out",
    "losses: {forward_cd: 0}": "losses.forward_cd.init_args.weight, and null leaves it out",
}


@pytest.mark.parametrize("old", OLD)
def test_an_old_configuration_is_refused_with_the_new_spelling(command, tmp_path, capsys, old):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"model: {{init_args: {{{old}}}}}")
    error = error_of(capsys, command(tmp_path, "--config", str(overlay)))
    assert f"model.init_args.{OLD[old]}" in error
    assert error.startswith(f"icd: error: model.init_args.{old.partition(':')[0]}")


@pytest.mark.parametrize("old", ["lora.rank=4", "train=forward", "boundaries=[499,999]", "losses.forward_cd=0"])
def test_an_old_key_of_the_command_line_is_refused_too(command, tmp_path, capsys, old):
    new = next(new for key, new in OLD.items() if key.split(":")[0] == re.split(r"[.=]", old)[0])
    assert f"model.init_args.{new}" in error_of(capsys, command(tmp_path, f"--model.init_args.{old}"))


def test_a_loss_is_left_out_on_the_command_line(command, tmp_path):
    losses = "--model.init_args.losses"
    main(command(tmp_path, UNSEEN, f"{losses}.forward_cd=null", f"{losses}.forward_preservation", "null"))
    assert {name for name in read_scalars(tmp_path) if name.startswith("train/")} == {
        *("train/loss", "train/reverse_cd", "train/reverse_preservation")
    }
    assert not (tmp_path / "forward").exists()


# Going on


OTHER_RUNS = {
    "boundaries [0, 259, 519, 779, 999] (here [0, 499, 999])": "boundaries.boundary_timesteps=[499,999]",
    "alpha 16.0 (here 64.0)": "students.init_args.lora.alpha=64",
    "guidance_scales [1.0, 2.0, 3.0, 5.0] (here [1.0])": "guidance_scales=[1]",
    "step_after sum (here each_loss)": "step_after=each_loss",
}


@pytest.mark.parametrize("told", often(OTHER_RUNS, "alpha 16.0 (here 64.0)"))
def test_a_run_does_not_go_on_as_another(command, run, tmp_path, capsys, told):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    error = error_of(capsys, command(folder, f"--model.init_args.{OTHER_RUNS[told]}", "--trainer.max_steps=3"))
    assert f"the checkpoint of this run was trained with {told}: give this training another" in error
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_run_does_not_go_on_over_another_teacher(command, run, tmp_path, capsys):
    other = write_family(tmp_path / "family", seed=1)
    error = error_of(capsys, command(run, f"--model.init_args.family.model={other}", "--trainer.max_steps=3"))
    assert "was trained with teacher " in error


def test_a_changed_optimizer_goes_on_and_is_told_of(command, run, tmp_path, caplog):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    optimizer = "--model.init_args.optimizer"
    options = ("--trainer.max_steps=3", f"{optimizer}.lr=5.0e-4", f"{optimizer}.decay=constant")
    main(command(folder, *options, f"{optimizer}.weight_decay=0.1", f"{optimizer}.warmup_steps=0"))
    assert "optimizer.lr was 0.001, and goes on as 0.0005" in caplog.messages
    (group, _) = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.1)


@pytest.mark.parametrize(("action", "named"), [("fit", False), ("validate", True)])
def test_a_damaged_checkpoint_is_named(command, run, tmp_path, capsys, action, named):
    file = tmp_path / "checkpoints/last.ckpt"
    file.parent.mkdir()
    file.write_bytes((run / "checkpoints/last.ckpt").read_bytes()[:3000])
    error = error_of(capsys, [action, *command(tmp_path, *([f"--ckpt_path={file}"] if named else []))[1:]])
    assert f"icd: error: {file} cannot be read as a checkpoint" in error
    assert not (tmp_path / "config.yaml").exists()


def test_an_empty_checkpoint_is_no_question_of_how_it_was_saved(command, run, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert "cannot be read as a checkpoint (EOFError)" in error_of(capsys, command(folder, ACCUMULATED))


def test_a_folder_in_the_place_of_the_configuration_is_named_before_training(command, tmp_path, capsys):
    (tmp_path / "config.yaml").mkdir()
    assert "config.yaml is no file, and a run keeps its configuration there" in error_of(capsys, command(tmp_path))


def test_a_lost_last_checkpoint_is_not_begun_over_where_the_one_before_is_kept(command, run, tmp_path, capsys):
    last, kept = tmp_path / "checkpoints/last.ckpt", tmp_path / "checkpoints/before-last.ckpt"
    last.parent.mkdir()
    kept.write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    assert f"{last} is gone, {kept} is the one before: rename it" in error_of(capsys, command(tmp_path))
    kept.rename(last)
    main(command(tmp_path, "--trainer.max_steps=2"))
    last.write_bytes(b"damaged")
    kept.write_bytes(b"")
    assert f"another ckpt_path ({kept} is the one before)" in error_of(capsys, command(tmp_path))


def test_nothing_is_validated_for_want_of_a_checkpoint(command, tmp_path, capsys):
    _, *rest = command(tmp_path)
    error = error_of(capsys, ["validate", *rest])
    assert f"icd: error: there is no checkpoint in {tmp_path}: name the run's folder" in error


def test_boundaries_off_the_grid_are_trained_if_asked_for(command, tmp_path):
    ends = "--model.init_args.boundaries"
    main(command(tmp_path, UNSEEN, f"{ends}.boundary_timesteps=[250,999]", f"{ends}.allow_off_grid=true"))
    assert steps(tmp_path) == 2


def test_a_config_before_the_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--config", "conf/base.yaml", "fit"])
    assert exit_.value.code == 2
    assert "--config comes before the command" in capsys.readouterr().err


@pytest.mark.parametrize("name", GUIDES)
def test_help_is_a_guide_that_imports_nothing_heavy(name):
    program = (
        "import sys; from icd_lightning.commands.main import main; "
        f"main(['{name}', '--help']); assert not {{'torch', 'lightning', 'jsonargparse'}} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == GUIDES[name]


def test_what_the_guide_names_exists():
    for name in ("experiment", "trainer", "ablation", "task", "tiny", "model"):
        assert f"conf/{name}/" in GUIDES["fit"]
        assert (CONF / name).is_dir()


def test_help_all_lists_every_key(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--help_all"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "--trainer.accumulate_grad_batches" in shown
    assert "--model.help" in shown
