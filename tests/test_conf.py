"""Every configuration in conf/: what it composes to, that it builds, and what an ablation changes."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from often_case import often
from training_case import write_scenes

from icd_lightning.commands.fit import FitCommand, micro_batches
from icd_lightning.commands.guide import GUIDES
from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.methods import OTHERS
from icd_lightning.models.family import Family
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation
from icd_lightning.tiny.train_autoencoder import AutoencoderTraining
from icd_lightning.tiny.train_scene_network import SceneNetworkTraining
from icd_lightning.tiny.train_teacher import TeacherTraining

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

CONF = Path(__file__).parents[1] / "conf"
TINY, SD15, SDXL = (("base", f"model/{family}") for family in ("tiny", "sd15", "sdxl"))
FEW_LAYERS = "--model.init_args.students.init_args.lora.target_modules=[to_q]"  # to adapt all takes half a second
ONE_DEVICE = ("--trainer.devices=1", "--trainer.strategy=auto")
SD3 = ("sd3", "sd35_medium", "flux2_klein", "z_image")
WHOLES = {  # what is composed of which files, and the task that comes out
    "tiny": ((*TINY, "experiment/tiny"), InvertibleConsistencyDistillation),
    "demo": ((*TINY, "experiment/demo"), InvertibleConsistencyDistillation),
    "ablations": ((*TINY, "experiment/ablations"), InvertibleConsistencyDistillation),
    "sd15": ((*SD15, "experiment/sd15_paper"), InvertibleConsistencyDistillation),
    "sdxl, paper": ((*SDXL, "experiment/sdxl_paper", "trainer/ddp"), InvertibleConsistencyDistillation),
    "sd15, stage 1": ((*SD15, "task/guidance_distillation", "experiment/sd15_guidance"), GuidanceDistillation),
    "sdxl, stage 1": (
        (*SDXL, "task/guidance_distillation", "experiment/sdxl_guidance", "trainer/fsdp"),
        GuidanceDistillation,
    ),
    "sd15, compiled": ((*SD15, "trainer/single", "trainer/compile"), InvertibleConsistencyDistillation),
    "sd15, other data": ((*SD15, "data/buckets", "data/remote"), InvertibleConsistencyDistillation),
    "sd15, random": ((*SD15, "model/sd15_random"), InvertibleConsistencyDistillation),
    "sdxl, random": (("base", "model/sdxl", "model/sdxl_random"), InvertibleConsistencyDistillation),
    "tiny, logged": ((*TINY, "logger/wandb"), InvertibleConsistencyDistillation),
    "tiny, watched": ((*TINY, "callbacks/tiny"), InvertibleConsistencyDistillation),
    "sd15, watched": ((*SD15, "callbacks/sd15"), InvertibleConsistencyDistillation),
    "tiny weights, autoencoder": (("tiny/base", "tiny/autoencoder"), AutoencoderTraining),
    "tiny weights, scene network": (("tiny/base", "tiny/scene_network"), SceneNetworkTraining),
    "tiny weights, teacher": (("tiny/base", "tiny/teacher"), TeacherTraining),
    "tiny_flow weights, teacher": (("tiny/base", "tiny_flow/teacher"), TeacherTraining),
    "tiny_flow weights, students": (
        (*TINY, "model/tiny_flow", "experiment/tiny_flow", "tiny_flow/students"),
        InvertibleConsistencyDistillation,
    ),
    **{name: (("base", f"model/{name}", "experiment/sd3"), InvertibleConsistencyDistillation) for name in SD3},
    "sd3, stage 1": (
        ("base", "model/sd3", "task/guidance_distillation", "experiment/sd3_guidance", "trainer/fsdp"),
        GuidanceDistillation,
    ),
    **{
        f"{name}, random": (("base", f"model/{name}", f"model/{name}_random"), InvertibleConsistencyDistillation)
        for name in ("sd3", "flux2_klein", "z_image")
    },
    "flux": (("base", "model/flux_dev", "experiment/flux_dev"), InvertibleConsistencyDistillation),
    "flux, random": (("base", "model/flux_dev", "model/flux_dev_random"), InvertibleConsistencyDistillation),
    "tiny weights, guidance": (("tiny/base", "tiny/guidance"), GuidanceDistillation),
    "tiny weights, students": ((*TINY, "experiment/tiny", "tiny/students"), InvertibleConsistencyDistillation),
}

GLOBAL_BATCHES = {"sd15": 512, "sd15, stage 1": 512, "sdxl, paper": 128, "sdxl, stage 1": 128, "flux": 128, "sd3": 128}

TWO, THREE, FOUR = (
    {"boundaries.boundary_timesteps": ends} for ends in ((499, 999), (339, 679, 999), (259, 519, 699, 999))
)
LOSS_KEYS = ("class_path", "trains", "weight", "huber_c")


def without(loss: str) -> dict:
    """What is changed where a loss is null: its keys are gone."""
    return {f"losses.{loss}": None, **{f"losses.{loss}.{key}": GONE for key in LOSS_KEYS}}


LOSSES = ("reverse_cd", "forward_cd", "reverse_preservation", "forward_preservation")
GONE = "not there"
WITHOUT_LF, WITHOUT_LR = without("forward_preservation"), without("reverse_preservation")
UNGUIDED, CONSTANT, DYNAMIC = {"decoding.guidance_scale": 1.0}, {"decoding.tau": 1.0}, {"decoding.tau": 0.7}
ABLATIONS = {  # Table 2, arXiv:2406.14539; there is no D
    "A": TWO | WITHOUT_LF | WITHOUT_LR | UNGUIDED,
    "B": THREE | WITHOUT_LF | WITHOUT_LR | UNGUIDED,
    "C": FOUR | WITHOUT_LF | WITHOUT_LR | UNGUIDED,
    "E": FOUR | WITHOUT_LR | UNGUIDED | without("forward_cd"),
    "F": FOUR | WITHOUT_LR | UNGUIDED,
    "G": FOUR | UNGUIDED,
    "H": FOUR | WITHOUT_LF | WITHOUT_LR | CONSTANT,
    "I": FOUR | WITHOUT_LF | WITHOUT_LR | DYNAMIC,
    "J": FOUR | WITHOUT_LR | DYNAMIC,
    "K": FOUR | DYNAMIC,
}


class Built(FitCommand):
    """Composes and builds, and trains nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def arguments(names, *options: str) -> list[str]:
    return ["fit", *(word for name in names for word in ("--config", str(CONF / f"{name}.yaml"))), *options]


@pytest.fixture(scope="module")
def cli(random_family):
    """One command, since its parser takes longest to make; `cli.parser.parse_args` and `build` use it again."""
    return Built(arguments(TINY, f"--model.init_args.family.model={random_family}"), ExitStack())


def compose(cli, names, *options: str) -> dict:
    """The composed configuration, flat: value by dotted key, without the `init_args` in it."""

    def flat(value, key: str) -> dict:
        if not isinstance(value, dict):
            return {key.replace(".init_args", ""): value}
        parts = (flat(below, f"{key}.{name}" if key else name) for name, below in value.items())
        return {name: found for part in parts for name, found in part.items()}

    composed = cli.parser.parse_args(arguments(names, *options)).fit.as_dict()
    del composed["config"]  # the names of the files
    return flat(composed, "")


@pytest.fixture(scope="module")
def base(cli) -> dict:
    return compose(cli, TINY)


def build(cli, names, *options: str):
    """The task, the data and the trainer that a configuration makes."""
    cli.config = cli.parser.parse_args(arguments(names, *options))
    cli.instantiate_classes()
    return cli.model, cli.datamodule, cli.trainer


def test_no_configuration_is_forgotten():
    known = {name for names, _ in WHOLES.values() for name in names} | {f"ablation/{letter}" for letter in ABLATIONS}
    known |= {f"method/{name}" for name in OTHERS}  # tests/editing/test_baselines.py looks into them
    known |= {f"data/curate/{name}" for name in ("laion_sd15", "sdxl", "flow")}  # tests/data/test_stages.py does
    assert {str(file.relative_to(CONF).with_suffix("")) for file in CONF.rglob("*.yaml")} == known


@pytest.mark.parametrize("whole", WHOLES)
def test_every_configuration_builds_on_a_random_family(cli, random_family, tmp_path, whole):
    names, task_class = WHOLES[whole]
    options = [f"--trainer.default_root_dir={tmp_path}"]
    if task_class not in (AutoencoderTraining, SceneNetworkTraining):
        options.append(f"--model.init_args.family.model={random_family}")
    if task_class is InvertibleConsistencyDistillation:
        options.append(FEW_LAYERS)
    if whole.endswith(", random"):  # which names its own stage 1
        options.append("--model.init_args.family.guided_unet=unet_guided")
    if whole in GLOBAL_BATCHES:
        composed = compose(cli, names, *options)
        assert composed["global_batch_size"] == GLOBAL_BATCHES[whole]
        for devices in (1, 8, 16, 64):
            batches = micro_batches(GLOBAL_BATCHES[whole], composed["data.batch_size"], devices)
            assert batches * composed["data.batch_size"] * devices == GLOBAL_BATCHES[whole]
        options += ONE_DEVICE
    task, _, trainer = build(cli, names, *options)
    assert type(task) is task_class
    assert trainer.max_steps > 0
    assert {"TrainingProgress", "ExportWeights"} <= {type(callback).__name__ for callback in trainer.callbacks}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux_dev", "flux2_klein", "z_image"])
def test_a_random_model_brings_stage_one_whatever_make_names_before(cli, name):
    guided = () if name == "flux_dev" else (f"--model.init_args.family.guided_unet=outputs/guidance-{name}",)
    after = ("--config", str(CONF / f"model/{name}_random.yaml"))  # as ARGS of make
    composed = cli.parser.parse_args(arguments(("base", f"model/{name}"), *guided, *after))
    Family(**composed.fit.model.init_args.family).check()


@pytest.mark.parametrize("letter", ABLATIONS)
def test_an_ablation_changes_what_it_says_and_nothing_else(cli, base, letter):
    ablation = compose(cli, (*TINY, f"ablation/{letter}"))
    keys = ablation.keys() | base.keys()
    changed = {key: ablation.get(key, GONE) for key in keys if ablation.get(key, GONE) != base.get(key, GONE)}
    assert changed == {f"model.{key}": value for key, value in ABLATIONS[letter].items()}


@pytest.mark.parametrize("letter", often(ABLATIONS, "A", "E"))
def test_an_ablation_builds_its_losses_and_boundaries(cli, random_family, letter):
    family = f"--model.init_args.family.model={random_family}"
    task, *_ = build(cli, (*TINY, f"ablation/{letter}"), family, FEW_LAYERS)
    assert task.boundaries.boundary_timesteps == (0, *ABLATIONS[letter]["boundaries.boundary_timesteps"])
    assert task.losses.keys() == {name for name in LOSSES if ABLATIONS[letter].get(f"losses.{name}", name) is not None}


def test_the_defaults_are_the_papers_recipe(cli):
    composed = compose(cli, SD15)
    task = {key.removeprefix("model."): value for key, value in composed.items() if key.startswith("model.")}
    expected = {
        "guidance_scales": [1, 8, 12, 16, 20],
        **{f"losses.{name}.huber_c": 0.001 for name in LOSSES},
        **{f"losses.{name}.trains": name.partition("_")[0] for name in LOSSES},
        **{f"losses.{name}.weight": 1.5 if name.endswith("preservation") else 1.0 for name in LOSSES},
        "step_after": "sum",
        "students.lora.rank": 64,
        "students.lora.alpha": 8,
        "students.gradient_checkpointing": True,
        "optimizer.lr": 8e-6,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip": 1.0,
        "optimizer.decay": "constant",
        "decoding.guidance_scale": 8.0,
        "decoding.tau": 0.8,
    }
    assert {key: task[key] for key in expected} == expected
    assert composed["trainer.max_steps"] == 6000


def test_the_last_word_on_the_command_line_wins(cli, random_family):
    family = f"--model.init_args.family.model={random_family}"
    weight = "--model.init_args.losses.reverse_cd.init_args.weight=0.5"
    options = (weight, "--model.init_args.decoding.tau=1.0", "--trainer.max_steps=7")
    task, _, trainer = build(cli, TINY, family, *options)
    assert [loss.weight for loss in task.losses.values()] == [0.5, 1.0, 1.5, 1.5]
    assert task.decoding == StepGuidance(3.0, 1.0)
    assert trainer.max_steps == 7


def test_a_callback_is_added_as_the_guide_says(cli, random_family):
    (option,) = (word for word in GUIDES["fit"].split() if word.startswith("--trainer.callbacks+="))
    *_, trainer = build(cli, TINY, f"--model.init_args.family.model={random_family}", option)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert {"ExponentialAverage", "ReconstructionCallback", "RunCheckpoint"} <= set(names)
    assert names[-1] == "RunCheckpoint"  # after the average of its step


def test_the_runs_folder_is_tensorboards_whatever_else_logs(cli, random_family, tmp_path):
    logger = f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path / 'other'}}}}}"
    options = (f"--trainer.default_root_dir={tmp_path / 'run'}", f"--trainer.logger={logger}")
    *_, trainer = build(cli, TINY, f"--model.init_args.family.model={random_family}", *options)
    assert [type(one).__name__ for one in trainer.loggers] == ["RunTensorBoard", "CSVLogger"]
    assert Path(trainer.log_dir) == tmp_path / "run"


def test_a_typo_in_an_overlay_is_one_line_and_exit_code_2(cli, tmp_path, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {losses: {forward_preservatoin: null}}}")
    with pytest.raises(SystemExit) as stop:
        cli.parser.parse_args([*arguments(TINY), "--config", str(overlay)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "forward_preservatoin" in error


@pytest.mark.slow
def test_sd15_trains_a_half_precision_base(cli, random_family, tmp_path):
    """One step of its very configuration, on a family that fits a test: bfloat16 base, checkpointing, validation."""
    scenes = write_scenes(tmp_path / "scenes", 4)
    data = {
        "urls": scenes,
        "val_urls": scenes,
        "batch_size": 2,
        "val_batch_size": 4,
        "resolution": 64,
        "num_workers": 0,
    }
    task, data, trainer = build(
        cli,
        (*SD15, "experiment/sd15_paper"),
        f"--model.init_args.family.model={random_family}",
        f"--trainer.default_root_dir={tmp_path}",
        *ONE_DEVICE,
        *("--trainer.accelerator=cpu", "--trainer.max_steps=1", "--global_batch_size=null"),
        *("--trainer.val_check_interval=1", "--model.init_args.students.init_args.lora.rank=4"),
        *(f"--data.init_args.{key}={value}" for key, value in data.items()),
    )
    trainer.fit(task, datamodule=data)
    assert task.students.network.conv_out.weight.dtype.itemsize == 2
    assert trainer.callback_metrics["reconstruction/psnr"] > 0
    assert (tmp_path / "forward").is_dir()


@pytest.mark.parametrize("name", sorted(path.stem.removesuffix("_random") for path in CONF.glob("model/*_random.yaml")))
def test_data_have_the_size_that_a_model_is_trained_at(name, caplog):
    whole = yaml.safe_load((CONF / f"model/{name}.yaml").read_text())
    trained_at = whole["model"]["init_args"]["family"].get("trained_at")
    Family(f"random:{name}", trained_at=trained_at).check_side(whole["data"]["init_args"]["resolution"])
    assert not caplog.records
