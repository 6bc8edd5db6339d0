import gc
import logging
import shutil
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from families_case import write_configs
from family_case import write_family
from often_case import often
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from icd_lightning.commands import pictures
from icd_lightning.commands.edits import Edit, EditSettings, several_edits
from icd_lightning.commands.main import main
from icd_lightning.commands.session import open_editor
from icd_lightning.data.images import to_images
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import write_diffusers
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import scene_at

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


@pytest.fixture(scope="module")
def pipeline(random_family) -> InvertibleConsistencyPipeline:
    return InvertibleConsistencyPipeline.from_pretrained(str(random_family))


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


def test_edit_writes_what_the_pipeline_makes_beside_the_picture(icd, pipeline, folder, caplog):
    icd(*edit("--seed", "3", "--guidance-scale", "2", "--tau", "0.7", "--swap-tau", "0.6"))
    assert names(folder) == ["photo-edited.png", "photo.png"]
    made = pipeline.edit("photo.png", SOURCE, TARGET, guidance_scale=2.0, tau=0.7, swap_tau=0.6, seed=3)
    np.testing.assert_array_equal(read("photo-edited.png"), np.asarray(made.images[0]))
    assert "photo-edited.png: 8 evaluations, " in caplog.text


@pytest.mark.slow
def test_an_edit_imports_no_more_than_it_needs(random_family, folder):
    """In a process of its own; afterwards what was left out can be imported."""
    program = f"""
import sys
from icd_lightning.commands.main import main
main(["edit", "photo.png", "--source", {SOURCE!r}, "--target", {TARGET!r}, "--model", {str(random_family)!r}])
slow = "bitsandbytes gradio lightning matplotlib pandas scipy sklearn torchao torchmetrics torchvision".split()
print(*(name for name in slow if name in sys.modules))
import scipy, torchvision
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert Path("photo-edited.png").is_file()


def test_garbage_is_collected_again_after_what_a_command_imports():
    for collects in (True, False, True):
        gc.enable() if collects else gc.disable()
        with suppress(KeyError), pictures.light():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == collects
    gc.unfreeze()  # the tests' own
    try:
        with pictures.light():
            pass
        assert gc.get_freeze_count() == 0  # nothing was imported, so what there is may become garbage
        with pictures.light():
            sys.modules["imported_now"] = sys
        assert gc.get_freeze_count() > 1000
    finally:
        del sys.modules["imported_now"]
        gc.freeze()


def test_edit_by_attention_control(icd, pipeline, folder, caplog):
    icd(*edit("--cross", "0.5", "--self", "0.25", "--amplify", "2", "--blend", "red blue"))
    control = PromptToPrompt(cross_replace=0.5, self_replace=0.25, amplify=2.0, blend=("red", "blue"))
    made = pipeline.edit("photo.png", SOURCE, TARGET, control=control)
    np.testing.assert_array_equal(read("photo-edited.png"), np.asarray(made.images[0]))
    expected = {"method": "icd_p2p", "cross_replace": "0.5", "self_replace": "0.25", "blend": "('red', 'blue')"}
    assert about("photo-edited.png").items() >= expected.items()
    assert "photo-edited.png: 12 evaluations, " in caplog.text
    icd(*edit("--method", "iCD-P2P", "--blend", "none", "--alignment", "refine", "-o", "whole.png"))
    assert about("whole.png").items() >= {"blend": "False", "cross_replace": "0.3", "alignment": "refine"}.items()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("ddim", ("--swap-tau", "0.5"), {"swap_tau": "0.5"}),
        ("infedit", ("--cross", "0.25", "--blend_threshold", "0.5"), {"cross_replace": "0.25"}),
        ("sdedit", (), {}),
    ],
)
def test_edit_by_a_baseline(icd, folder, caplog, method, options, said):
    icd(*edit("--method", method, "--guidance-scale", "2", *options))
    expected = {"method": method, "guidance_scale": "2.0", "source": SOURCE, **said}
    assert about("photo-edited.png").items() >= expected.items()
    assert read("photo-edited.png").shape == (64, 64, 3)
    assert "photo-edited.png: 0 evaluations" not in caplog.text


def test_words_are_amplified_by_name(icd, folder):
    words = " ".join(f"{word}={number}" for number, word in enumerate(TARGET.split()[-2:], 2))
    icd(*edit("--amplify", words))
    assert about("photo-edited.png")["amplify"] == str(dict(zip(TARGET.split()[-2:], (2.0, 3.0), strict=True)))


def test_edit_by_a_method_of_one_s_own(icd, folder, caplog):
    Path("Half.yaml").write_text(
        "class_path: icd_lightning.editing.baselines.sdedit.SDEdit\ninit_args: {num_inference_steps: 4, strength: 0.5}"
    )
    icd(*edit("--method", "Half.yaml"))
    assert about("photo-edited.png")["method"] == "Half.yaml"
    assert "photo-edited.png: 4 evaluations" in caplog.text


def test_a_style_beneath_the_students(icd, random_family, folder):
    style = str(random_family / "students/forward/pytorch_lora_weights.safetensors")
    icd(*edit())
    icd(*edit("--style", f"{style}:0", "-o", "none.png"))
    icd(*edit("--style", f"{style}:0.5", "-o", "half.png"))
    assert np.abs(read("photo-edited.png").astype(int) - read("none.png")).max() <= 1
    assert np.abs(read("photo-edited.png").astype(int) - read("half.png")).max() > 5
    assert about("half.png")["style"] == f"{style}:0.5"


OUTSIDE = """
from icd_lightning.editing.baselines.base import Baseline, Inversion


class Middle(Baseline):
    def __init__(self, parts, *, t: int = 500, guidance_scale: float = 7.0):
        super().__init__(parts, guidance_scale)
        self.steps = [(t, 0)]

    def invert_latents(self, x0, prompts, *, seed=0, on_step=None):
        return Inversion(prompts, x0, self.process.add_noise(x0, 0 * x0, self.steps[0][0]))

    def move(self, x, split, index, inversion):
        return self.process.mix(*split, self.steps[index][1])
"""


def test_a_baseline_from_outside_the_package(icd, folder, monkeypatch, caplog):
    """One file, named by its class's path or a YAML file; the family bears w 3, and a file that says 12 has 12."""
    Path("outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(folder)
    icd(*edit("--method", "outside.Middle"))
    assert about("photo-edited.png").items() >= {"method": "outside.Middle", "guidance_scale": "3.0"}.items()
    assert "photo-edited.png: 2 evaluations" in caplog.text
    for name, settings in (("early", "{t: 900}"), ("strong", "{guidance_scale: 12}")):
        Path(f"{name}.yaml").write_text(f"class_path: outside.Middle\ninit_args: {settings}")
        icd(*edit("--method", f"{name}.yaml", "-o", f"{name}.png"), "--trust-config")
    assert about("early.png")["guidance_scale"] == "3.0"
    assert about("strong.png")["guidance_scale"] == "12.0"
    assert (read("early.png") != read("photo-edited.png")).any()
    assert (read("strong.png") != read("photo-edited.png")).any()
    icd(*edit("--method", "strong.yaml", "--guidance_scale", "3", "-o", "weak.png"), "--trust-config")
    np.testing.assert_array_equal(read("weak.png"), read("photo-edited.png"))


def without_header(file: Path, place: Path, prefix: str) -> None:
    """A student's weights under names with this prefix, and nothing else of what its file says."""
    place.parent.mkdir(parents=True)
    weights = {prefix + name.removeprefix("unet."): weight for name, weight in load_file(file).items()}
    save_file(weights, place, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", often(["nothing beside", "icd.json beside", "a folder of peft"], "nothing beside"))
def test_students_whose_files_lost_their_alpha(icd, random_family, folder, capsys, kind):
    """Of alpha 16, which nobody would guess."""
    written = LoraStudents(Family(str(random_family)).load_model(guided=True), lora=LoraSettings(rank=4, alpha=16))
    for direction in DIRECTIONS:
        for weight in written.parameters_of(direction):
            weight.data = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        given = folder / "whole" / direction
        write_diffusers(written.file(direction, {"boundaries": [0, 259, 519, 779, 999]}), given)
        peft = kind == "a folder of peft"
        name, prefix = ("adapter_model", "base_model.model.") if peft else ("pytorch_lora_weights", "unet.")
        without_header(given / "pytorch_lora_weights.safetensors", Path(direction, f"{name}.safetensors"), prefix)
        if peft:
            Path(direction, "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
        if kind == "icd.json beside":
            shutil.copy(given / "icd.json", direction)
    icd(*edit("--forward", "whole/forward", "--reverse", "whole/reverse", "-o", "whole.png"))
    students = ["--forward", "forward", "--reverse", "reverse", "--boundaries", "259,519,779,999"]
    if kind == "nothing beside":
        with pytest.raises(SystemExit):
            icd(*edit(*students, "-o", "guessed.png"))
        assert "does not say its alpha" in (message := capsys.readouterr().err)
        assert "--lora_alpha" in message
        students += ["--lora_alpha", "16"]
        icd(*edit(*students, "--method", "renoise_lcm", "-o", "baseline.png"))
    icd(*edit(*students, "-o", "again.png"))
    np.testing.assert_array_equal(read("again.png"), read("whole.png"))


def test_boundaries_that_the_students_were_not_trained_for_are_said(icd, folder, caplog):
    icd(*edit("--boundaries", "499,999"))
    assert "trained for other boundaries than 499,999: {'forward': [0, " in caplog.text


def test_defaults_are_the_family_s_and_every_setting_is_in_the_file(icd, random_family, folder):
    icd(*edit("-o", "new/dog.png"))
    expected = {"command": "icd edit", "image": "photo.png", "source": SOURCE, "target": TARGET, "seed": "0"}
    expected |= {
        "method": "icd_swap",
        "precision": "float32",
        "guidance_scale": "3.0",
        "tau": "0.8",
        "swap_tau": "0.8",
        "boundaries": "0,259,519,779,999",
    }
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


def write_gray16(path: str) -> None:
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(path)


def write_turned(path: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 40), "blue").save(path, exif=exif)


PHOTOGRAPHS = {
    "turned.jpg": write_turned,
    "grey.png": write_gray16,
    "tiny.png": lambda path: Image.new("RGB", (3, 2), "red").save(path),
    "clear.png": lambda path: Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(path),
    "palette.gif": lambda path: Image.new("P", (40, 40), 3).save(path),
    "cmyk.jpg": lambda path: Image.new("CMYK", (40, 40), (0, 99, 0, 0)).save(path),
}


def test_photographs_of_every_kind(icd, folder):
    Path("photos").mkdir()
    for name, write in PHOTOGRAPHS.items():
        write(f"photos/{name}")
    icd("edit", "photos", "--source", SOURCE, "--target", TARGET, "-o", "new", "--height", "72", "--width", "64")
    for name in PHOTOGRAPHS:
        assert read(f"new/{Path(name).stem}-edited.png").shape == (72, 64, 3)


@pytest.mark.parametrize("name", often(["sd15", "sdxl"], "sd15"))
def test_a_photograph_by_networks_of_the_true_families(folder, caplog, name):
    """With all their blocks, narrow and random, and new students in files: the whole path, by each family's own way."""
    model = f"random:{write_configs(name, folder / name)}"
    family = Family(model)
    students = LoraStudents(family.load_model(guided=True))
    for direction in DIRECTIONS:
        write_diffusers(students.file(direction, {"boundaries": [0, 259, 519, 779, 999]}), folder / direction)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save("photo.jpg")
    prompts = ["--source", "a cat on a bench", "--target", "a dog on a bench"]
    weights = ["--model", model, "--forward", "forward", "--reverse", "reverse", "--device", "cpu"]
    main(["edit", "photo.jpg", *prompts, *weights])
    assert read("photo-edited.png").shape == (64, 64, 3)
    method, nfe = {"sd15": ("icd_p2p", 12), "sdxl": ("icd_swap", 8)}[name]
    assert about("photo-edited.png")["method"] == method
    assert f"{nfe} evaluations" in caplog.text


def test_half_precision(icd, folder):
    icd(*edit("--precision", "bfloat16"))
    assert about("photo-edited.png")["precision"] == "bfloat16"


# Grid


def test_a_grid_is_a_sheet_of_the_very_edits(icd, pipeline, folder, caplog):
    icd(*edit("--grid", "tau=0.6,1", "w=2,4"))
    sheet, found = read("photo-grid.png"), about("photo-grid.png")
    assert found.items() >= {"grid": "tau=0.6,1 w=2,4", "source": SOURCE, "target": TARGET}.items()
    assert "tau 0.6, guidance_scale 2: 8 evaluations" in caplog.text
    assert "tau 1, guidance_scale 4: 4 evaluations" in caplog.text  # the way to noise is shared
    cells = cells_of(sheet)
    assert [len(row) for row in cells] == [3, 2]
    settings = [(0.6, 2), (1, 2), (0.6, 4), (1, 4)]
    edits = [pipeline.edit("photo.png", SOURCE, TARGET, tau=tau, guidance_scale=w).images[0] for tau, w in settings]
    pictures = [Image.open("photo.png"), *edits]
    enlarged = [np.asarray(picture.resize((256, 256), Image.Resampling.LANCZOS)) for picture in pictures]
    for index, cell in enumerate(cells[0] + cells[1]):
        errors = [np.abs(cell.astype(float) - picture)[8:-8, 8:-8].mean() for picture in enlarged]
        assert np.argmin(errors) == index
        assert errors[index] < 6


def cells_of(sheet: np.ndarray) -> list[list[np.ndarray]]:
    """The sheet's cells as pictures (256, 256, 3), row by row: runs of rows and columns without white gaps."""
    filled = (sheet != 255).any(2)
    tops = [y for y, length in runs(filled[:, 700:].mean(1) > 0.3) if length >= 250]
    lefts = [[x for x, length in runs(filled[y : y + 256].mean(0) > 0.5) if length >= 250] for y in tops]
    return [[sheet[y : y + 256, x : x + 256] for x in row] for y, row in zip(tops, lefts, strict=True)]


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and length of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return [(int(a), int(b - a)) for a, b in edges.reshape(-1, 2)]


def test_a_grid_inverts_once_for_each_seed(icd, folder, caplog):
    icd(*edit("--grid", "seed=0,1", "swap_tau=0.6,0.8"))
    costs = [
        record.getMessage().split(": ")[1].split(",")[0] for record in caplog.records if "swap_tau 0" in record.message
    ]
    assert costs == ["8 evaluations", "8 evaluations", "4 evaluations", "4 evaluations"]


# Many


def write_table(*rows: str, heading: str = "image,source,target,output") -> None:
    Path("edits.csv").write_text("\n".join([heading, *rows]) + "\n")


def test_rows_of_one_picture_and_source_share_the_way_to_noise(icd, folder, caplog):
    Image.new("RGB", (64, 64), "red").save("red.png")
    write_table(
        f"photo.png,{SOURCE},{TARGET},",
        f"photo.png,{SOURCE},a star,",
        f"photo.png,another {SOURCE},a star,",
        f"red.png,another {SOURCE},a star,",
    )
    icd("edit", "edits.csv")
    costs = [text.split(": ")[1].split(" ")[0] for text in caplog.messages if "-edited" in text]
    assert costs == ["8", "4", "8", "8"]
    icd("edit", "photo.png", "--source", SOURCE, "--target", "a star", "-o", "alone.png")
    np.testing.assert_array_equal(read("edits-edited/photo-edited-2.png"), read("alone.png"))


def test_a_picture_that_has_changed_is_taken_to_noise_again(random_family, folder):
    settings = EditSettings(str(random_family), device="cpu")
    editor, one = open_editor(settings), Edit(Path("photo.png"), SOURCE, TARGET, Path("x.png"))

    def cost() -> str:
        return next(editor.edit(one, [settings], (None, None)))[2].split(" ")[0]

    costs = [cost(), cost()]
    Image.new("RGB", (64, 64), "red").save("photo.png")
    assert [*costs, cost()] == ["8", "4", "8"]


@pytest.mark.parametrize("place", ["photo.png", "."])
def test_compilation_is_asked_for_and_where_it_does_not_work_edits_are_made_without(
    icd, folder, monkeypatch, caplog, place
):
    def fail(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", fail)
    options = ["--source", SOURCE, "--target", TARGET, "-o", "out" if place == "." else "out.png"]
    icd("edit", place, *options, "--compile")
    (said,) = [text for text in caplog.messages if "compile" in text]
    assert said == "torch.compile does not work here, so networks run as they are (no compiler here)"
    assert Path(options[-1]).exists()


def test_a_table_of_edits_goes_on_where_it_stopped_and_a_bad_row_stops_nobody(icd, folder, caplog, capsys):
    Path("half.png").write_bytes(Path("photo.png").read_bytes()[:3000])
    Image.new("RGB", (64, 64), "red").save("red.png")
    write_table(
        f"photo.png,{SOURCE},{TARGET},",
        f'red.png,"{SOURCE}","{TARGET}",deep/red.png',
        "none.png,a,b,",
        "half.png,a,b,",
        "photo.png,,b,",
        f"photo.png,{SOURCE},a star,",
    )
    with pytest.raises(SystemExit) as stop:
        icd("edit", "edits.csv")
    assert stop.value.code == 2
    assert "3 of 6 edits failed, the first: there is no picture at none.png" in capsys.readouterr().err
    made = sorted(str(path.relative_to(folder)) for path in folder.rglob("*/*.png"))
    assert made == [f"edits-edited/{name}" for name in ("deep/red.png", "photo-edited-3.png", "photo-edited.png")]
    assert "2/6 edits-edited/deep/red.png: 8 evaluations, " in caplog.text
    assert "4/6 half.png: half.png cannot be read as a picture" in caplog.text
    assert "5/6 photo.png: photo.png has no source prompt" in caplog.text
    icd(*edit("-o", "alone.png"))
    np.testing.assert_array_equal(read("edits-edited/photo-edited.png"), read("alone.png"))

    Path("edits-edited/deep/red.png").unlink()
    write_table(f"photo.png,{SOURCE},{TARGET},", f'red.png,"{SOURCE}","{TARGET}",deep/red.png')
    before = Path("edits-edited/photo-edited.png").stat().st_mtime_ns
    caplog.clear()
    icd("edit", "edits.csv")
    assert "1 of 2 outputs are there and kept" in caplog.text
    assert Path("edits-edited/deep/red.png").is_file()
    assert Path("edits-edited/photo-edited.png").stat().st_mtime_ns == before
    icd("edit", "edits.csv", "--overwrite")
    assert Path("edits-edited/photo-edited.png").stat().st_mtime_ns > before


@pytest.mark.parametrize("method", often(["icd_p2p", "npi"], "icd_p2p"))
def test_the_table_of_the_paper_s_code(icd, folder, method):
    """Its columns and an index before them; its words say where to blend, none: nowhere, unless the command does."""
    heading = ",Unnamed: 0,file_name,old_caption,edited_caption,blended_words"
    row = f"photo.png,{SOURCE}, {TARGET} "
    write_table(f"""0,0,{row},"('red', 'blue')\"""", f"1,1,{row},", heading=heading)
    icd("edit", "edits.csv", "--method", method)
    names = ("photo-edited", "photo-edited-2")
    assert [about(f"edits-edited/{name}.png")["blend"] for name in names] == ["('red', 'blue')", "False"]
    assert about("edits-edited/photo-edited.png").items() >= {"source": SOURCE, "target": TARGET}.items()
    icd("edit", "edits.csv", "--method", method, "--blend", "circle circle", "--overwrite")
    assert about("edits-edited/photo-edited-2.png")["blend"] == "('circle', 'circle')"


def test_sdedit_needs_no_source_prompt(icd, folder, caplog, capsys):
    icd("edit", "photo.png", "--target", TARGET, "--method", "sdedit")
    made = read("photo-edited.png")
    icd("edit", "photo.png", "--source", "", "--target", TARGET, "--method", "sdedit", "-o", "empty.png")
    icd(*edit("--method", "sdedit", "-o", "told.png"))
    np.testing.assert_array_equal(made, read("empty.png"))
    np.testing.assert_array_equal(made, read("told.png"))
    with pytest.raises(SystemExit):
        icd("edit", "photo.png", "--target", TARGET, "--method", "npi", "-o", "npi.png")
    assert "photo.png has no source prompt: say what it shows, which method npi reads" in capsys.readouterr().err


def test_a_folder_of_pictures(icd, folder):
    Path("photos").mkdir()
    shutil.copy("photo.png", "photos/b.png")
    Image.new("RGB", (80, 60)).save("photos/a.jpg")
    Path("photos/notes.txt").touch()
    Path("photos/._a.jpg").write_bytes(b"what macOS keeps")
    icd("edit", "photos", "--source", SOURCE, "--target", TARGET, "-o", "results")
    assert names(folder / "results") == ["a-edited.png", "b-edited.png"]
    icd(*edit())
    np.testing.assert_array_equal(read("results/b-edited.png"), read("photo-edited.png"))


@pytest.mark.parametrize("place", [".", "../photos"])
def test_the_results_of_a_folder_go_beside_it_however_it_is_named(folder, monkeypatch, place):
    (folder / "photos").mkdir()
    shutil.copy("photo.png", "photos/a.png")
    monkeypatch.chdir(folder / "photos")
    (one,) = several_edits(Path(place), "a", "b", None)
    assert one.output.resolve() == folder / "photos-edited" / "a-edited.png"


# Invert


def test_invert_writes_the_noise_and_what_comes_back(icd, pipeline, folder, caplog):
    icd("invert", "photo.png", "--prompt", SOURCE, "--seed", "2")
    assert names(folder) == ["photo-inverted.safetensors", "photo-reconstructed.png", "photo.png"]
    images = to_images([read("photo.png")])
    noise = pipeline.invert("photo.png", SOURCE, seed=2)
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


def write_bomb(path: str) -> None:
    """A PNG of a few hundred bytes that says it is 30,000 x 30,000 pixels."""
    Image.new("1", (1, 1)).save(path)
    data = bytearray(Path(path).read_bytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    Path(path).write_bytes(data)


def test_settings_of_another_kind_of_network_are_refused_before_weights_are_read(
    icd, folder, flow_layouts, capsys, monkeypatch
):
    monkeypatch.setattr(Family, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(SystemExit):
        icd(*edit("--model", str(flow_layouts["flux"]), "--cross", "0.5"))
    assert "edits have no cross_replace; what they borrow: inject, blocks_from, blocks_to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["edit", "none.png", "--source", "a", "--target", "b"], "there is no picture at none.png"),
        (["edit", "notes.txt", "--source", "a", "--target", "b"], "notes.txt cannot be read as a picture"),
        (edit("-o", "dog.jpg"), "output dog.jpg will be a png file: give it a name that ends in .png"),
        (edit("-o", "dog"), "output dog will be a png file"),
        (edit("--guidance_scale", "0.5"), "guidance_scale 0.5 must be 1 (unguided) or more"),
        (edit("--guidance_scale", ".inf"), "guidance_scale inf must be 1 (unguided) or more, and finite"),
        (
            edit("--guidance_scale", "nan"),
            "guidance_scale nan must be a finite number: How strongly to follow the target prompt, 1 or more",
        ),
        (edit("--tau=-inf"), "tau -inf must be a finite number: Guide at times t <= tau T only"),
        (edit("--tau", "1.5"), "tau 1.5 is no fraction: choose between 0 and 1"),
        (edit("--tau", ".nan"), "tau nan is no fraction"),
        (edit("--swap_tau", "-1"), "swap_tau -1.0 is no fraction"),
        (edit("--cross", "2"), "cross_replace 2.0 is no fraction"),
        (edit("--amplify", "-1"), "amplify -1.0 must be 0 or more"),
        (edit("--blend", "red"), "blend 'red' must be a word of the source and one of the target, or none"),
        (edit("--blend", "red violet"), "'violet' is no word of the prompt"),
        (edit("--method", "magic"), "no method 'magic'; there is: icd, icd_p2p, icd_swap, untrained, ddim"),
        (edit("--inject", "0.5"), "edits have no inject; what they borrow: cross_replace, self_replace, alignment"),
        (edit("--method", "icd_swap", "--cross", "0.5"), "icd_swap borrows no attention: leave out cross_replace"),
        (edit("--method", "icd_p2p", "--swap_tau", "0.5"), "icd_p2p swaps no prompt: leave out swap_tau"),
        (edit("--method", "ddim", "--cross", "0.5"), "ddim borrows no attention: leave out cross_replace"),
        (edit("--method", "sdedit", "--swap_tau", "0.5"), "sdedit swaps no prompt: leave out swap_tau"),
        (edit("--method", "ddim", "--grid", "cross=0.2,0.4"), "ddim borrows no attention: leave out cross_replace"),
        (edit("--method", "sdedit", "--height", "60"), "height 60 must be a multiple of 8, for example 64"),
        (edit("--cross", "0.5", "--swap_tau", "0.5"), "swap_tau is of edits without cross_replace"),
        (edit("--height", "60"), "height 60 must be a multiple of 8, for example 64"),
        (edit("--width", "-8"), "width -8 must be 1 or more"),
        (edit("-o", "photo.png", "--overwrite"), "output photo.png is the picture itself: name another --output"),
        (edit("-o", "./photo.PNG/../photo.png", "--overwrite"), "is the picture itself"),
        (edit("--grid", "tau"), "grid 'tau': '' are not numbers separated by commas"),
        (edit("--grid", "tau=0.5,x"), "grid 'tau=0.5,x': '0.5,x' are not numbers"),
        (edit("--grid", "hue=1"), "grid 'hue=1' must be NAME=VALUE,VALUE"),
        (edit("--grid", "tau=0.5", "tau=0.6"), "grid varies tau twice"),
        (edit("--grid", "tau=0.5,2"), "tau 2.0 is no fraction"),
        (["edit", "half.png", "--source", "a", "--target", "b"], "half.png cannot be read as a picture"),
        (["edit", "bomb.png", "--source", "a", "--target", "b"], "bomb.png has more than 178 million pixels"),
        (["edit", "photo.png", "--target", "b"], "photo.png has no source prompt: say what it shows"),
        (["edit", "empty.csv"], "empty.csv has no column image (or file_name)"),
        (["edit", "twice.csv"], "would be written more than once: give each edit its own output"),
        (["edit", "twice.csv", "-o", "a.png"], "output a.png must be a folder"),
        (["edit", "twice.csv", "--grid", "tau=0.5"], "grid is of one picture"),
        (["edit", "nothing", "--source", "a", "--target", "b"], "nothing holds no pictures (.png, .jpg"),
        (edit("--seed", "-1"), "seed -1 must be 0 or more"),
        (edit("--seed", "x"), "seed: Expected a int. Got value: x"),
        (edit("--tau", "x"), "tau: Expected a float; Given value: x"),
        (edit("--taus", "0.7"), "unrecognized arguments: --taus 0.7"),
        (edit("--over"), "unrecognized arguments: --over"),
        (edit("--boundaries", "999,259"), "boundar"),
        (edit("--boundaries", "some"), "boundaries 'some' are not whole numbers"),
        (edit("--forward", "nowhere"), "no student at nowhere"),
        (edit("--method", "infedit", "--guided_unet", "nowhere"), "nowhere"),
        (edit("--method", "conf.yaml"), "conf.yaml must hold class_path and init_args"),
        (edit("--method", "../mine"), "there is no class ../mine"),
        (edit("--method", "subprocess.Popen"), "subprocess.Popen is no PictureMethod: derive it from Baseline"),
        (edit("--lora_alpha", "0"), "lora_alpha 0.0 must be a positive number"),
        (["edit", "chain.csv", "-o", ".", "--overwrite"], "output red.png is a picture to be edited: name another"),
        (["edit", "control.csv"], r"control.csv, row 1: image holds '\x00'; is it UTF-8?"),
        (["edit", "open.csv"], "open.csv cannot be read as a CSV file (line 1: unexpected end of data)"),
        (["edit", "aliases.csv"], "aliases.csv has two columns image (or file_name): leave one"),
        (edit("-o", "photo.png/x.png"), "photo.png: that is a file, name another place"),
        (["edit", "leaves.csv"], "output '../x.png' leaves leaves-edited: name a file in it"),
        (["edit", "same.csv"], "x.png would be written more than once"),
        (
            ["edit", "photo.png", "--source", "", "--target", "b"],
            "no source prompt: say what it shows, which method icd",
        ),
        (edit("--amplify", "lego:3"), "amplify 'lego:3' must be a number, or words with numbers"),
        (edit("--amplify", "dog=-1"), "amplify -1.0 must be 0 or more"),
        (edit("--amplify", "unheard=2"), "'unheard' is no word of the prompt"),
        (edit("--alignment", "words"), "alignment 'words' is none of: auto, replace, refine"),
        (edit("--blend_threshold", "2"), "blend_threshold 2.0 is no fraction"),
        (edit("--device", "gpu"), "device 'gpu' cannot be used here"),
        (edit("--style", "none.safetensors"), "there is no .safetensors file none.safetensors"),
        (edit("--variant", "fp16"), "has no weights of variant fp16 that can be read"),
        (["generate", "a", "--latents", "photo.png", "--seed", "3"], "latents are noise of one size: leave out height"),
        (["generate", "a", "--seed", "-1"], "seed -1 must be 0 or more"),
        (
            ["generate", "a", "--height", "2000000", "--width", "2000000"],
            "height 2000000 must be 1 or more, and at most 65536",
        ),
        (edit("--device", "meta"), "device 'meta' cannot be used here: choose auto, cpu, cuda, cuda:1 or mps"),
        (["edit", "photo.png", "--source", "a"], "photo.png has no target prompt"),
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
            "latents are of shape (1, 4, 8, 8); this model's are (B, 16, h, w)",
        ),
        (
            ["generate", "a", "--latents", "small.safetensors", "--count", "2"],
            "count 2 must be 1 or more, and cannot be",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(icd, folder, capsys, args, message):
    Path("notes.txt").write_text("no picture")
    Path("nothing").mkdir()
    Path("half.png").write_bytes(Path("photo.png").read_bytes()[:3000])
    write_bomb("bomb.png")
    Path("empty.csv").write_text("picture,source\na.png,a\n")
    heading = "image,source,target,output\n"
    Path("chain.csv").write_text(f"{heading}photo.png,a,b,red.png\nred.png,a,b,x.png\n")
    Path("control.csv").write_text(f"{heading}pho\0to.png,a,b,\n")
    Path("open.csv").write_text(f'{heading}photo.png,"a,b,\nphoto.png,a,b,\n')
    Path("aliases.csv").write_text("image,file_name,source,target\nphoto.png,red.png,a,b\n")
    Path("leaves.csv").write_text(f"{heading}photo.png,a,b,../x.png\n")
    Path("same.csv").write_text(f"{heading}photo.png,a,b,x.png\nphoto.png,a,c,d/../x.png\n")
    Path("twice.csv").write_text("image,source,target,output\na.png,a,b,c.png\nb.png,a,b,c.png\n")
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


CHEAP = [
    edit("--tau", "2"),
    edit("--guidance_scale", "0"),
    edit("--method", "magic"),
    edit("--device", "foo"),
    edit("--model", "nowhere"),
    edit("--forward", "nowhere"),
    edit("-o", "photo.png"),
    edit("--grid", "hue=1"),
    ["edit", "half.png", "--source", "a", "--target", "b"],
    ["edit", "none.csv"],
    ["generate", "a", "--tau", "-1"],
    ["invert", "none.png", "--prompt", "a"],
]


def test_what_is_refused_without_torch_is_refused_before_it_is_loaded(folder):
    Path("half.png").write_bytes(Path("photo.png").read_bytes()[:3000])
    program = f"""
import sys
from icd_lightning.commands.main import main
for args in {CHEAP!r}:
    try:
        main(args)
    except SystemExit as stop:
        assert stop.code == 2, args
    else:
        raise AssertionError(args)
    assert "torch" not in sys.modules, args
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_shipped_family_from_the_command_line(folder):
    scene = scene_at(1_000_003, 0)
    Image.fromarray(render(scene, 64)).resize((200, 160)).save("scene.jpg")
    icd = [sys.executable, "-m", "icd_lightning.commands.main"]
    prompts = ["--source", scene.caption(), "--target", "a large yellow star on a blue background"]
    for args in (
        ["edit", "scene.jpg", *prompts],
        ["edit", "scene.jpg", *prompts, "--grid", "tau=0.6,0.8", "cross=0.2,0.4"],
    ):
        result = subprocess.run([*icd, *args], capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
    assert names(folder) == ["photo.png", "scene-edited.png", "scene-grid.png", "scene.jpg"]
    assert about("scene-edited.png")["source"] == scene.caption()


def test_words_that_a_closed_vocabulary_lacks_are_named(random_family, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "family"
    shutil.copytree(random_family, folder)
    arguments = ["generate", "a red dog on a blue background", "--model", str(folder)]
    monkeypatch.chdir(tmp_path)
    main([*arguments, "-o", "open.png"])
    assert "does not know" not in caplog.text
    (folder / "icd.json").write_text('{"guidance_scale": 3.0, "closed_vocabulary": true}')
    main([*arguments, "-o", "closed.png"])
    assert "does not know: dog; expect nonsense" in caplog.text
    told = ["edit", "closed.png", "--source", "a red circle", "--target", "a red cat", "--model", str(folder)]
    main([*told, "--method", "sdedit", "-o", "edited.png"])
    assert "does not know: cat; expect nonsense" in caplog.text
