"""The tour and the study of jumps: perfect and lazy methods score as they must; commands write what was measured."""

import json
import math

import pytest

from icd_lightning.commands.main import main
from icd_lightning.commands.tiny import jumps
from icd_lightning.data.images import to_images
from icd_lightning.diffusion import Boundaries
from icd_lightning.evaluation.benchmark import Measured, Outcome, Settings
from icd_lightning.evaluation.examples import stack
from icd_lightning.evaluation.runs import Run, perform
from icd_lightning.evaluation.scoring import Scoring
from icd_lightning.tiny.benchmarks import ATTRIBUTE_EDITS, TOUR, figures, tour_examples, tour_tables
from icd_lightning.tiny.jumps import BENCHMARK, NUMBERS, jumps_panel, write_jumps
from icd_lightning.tiny.scene_network import label_tensor
from icd_lightning.tiny.scenes import LABELS

SETTINGS = Settings("scenes", count=12)
DATA = tour_examples(SETTINGS)


def test_edits_take_turns_and_change_one_attribute():
    before, after = (label_tensor([getattr(e, name) for e in DATA.examples]) for name in ("picture", "truth"))
    changed = [[name for name, new in zip(LABELS, row, strict=True) if new] for row in (before != after).tolist()]
    assert all(len(names) == 1 for names in changed)
    assert [names[0].rstrip(" 12") for names in changed] == [*ATTRIBUTE_EDITS] * 2
    assert [example.seed(0) for example in DATA.examples] == list(range(12))


def measured(root, edit, tasks=TOUR.tasks) -> Measured:
    """The tour of a method that loses nothing, generates the very scenes, and edits by `edit`."""

    def same(batch):
        values = {
            "latent_mse": stack(batch, 8).flatten(1)[:, 0] * 0,
            "autoencoder_psnr": stack(batch, 8)[:, 0, 0, 0] + 30,
        }
        yield Outcome("w 1", stack(batch, 64), 5, 0.1, values)

    results = {}
    for task in tasks:
        measure = (lambda batch: iter([Outcome("w 1", edit(batch), 5, 0.1)])) if task.name == "edits" else same
        scoring = Scoring.choose(None, task, DATA)
        options = {"w 1": {"w": 1.0}}
        run = Run("icd", root / task.name, DATA, measure, {}, 64, scoring=scoring, decodings=options)
        results[task.name] = [perform(run)]
    return Measured(SETTINGS, DATA, results, root)


def test_a_perfect_method_has_full_marks_and_a_lazy_one_changes_nothing(tmp_path):
    perfect = measured(tmp_path / "perfect", lambda batch: to_images([example.truth.draw(64) for example in batch]))
    result = figures(perfect)["iCD"]
    assert result["edits"]["changed"] == result["edits"]["kept"] == 1.0
    assert math.isinf(result["edits"]["psnr_truth"])
    assert set(result["generation"].values()) == {1.0}
    (back,) = result["reconstruction"]
    assert math.isinf(back["psnr"])
    assert (back["ssim"], back["nfe"]) == (pytest.approx(1.0), 5)
    assert [table.title.split(":")[0] for table in tour_tables(perfect)][::2] == ["Reconstruction", "Generation"]
    lazy = figures(measured(tmp_path / "lazy", lambda batch: stack(batch, 64)))["iCD"]["edits"]
    assert (lazy["changed"], lazy["kept"]) == (0.0, 1.0)
    assert math.isinf(lazy["psnr_outside"])
    assert 5 < lazy["psnr_truth"] < 40


def test_icd_eval_is_a_tour_that_goes_on_where_it_was(random_family, tmp_path, capsys):
    args = ["eval", "--model", str(random_family), "--count", "2", "--no_ddim", "--out", str(tmp_path)]
    main(args)
    first = capsys.readouterr().out
    assert all(title in first for title in ("Reconstruction: to noise", "Edits by prompt", "Generation: attributes"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["untrained", "iCD"]
    names = [row["guidance"] for row in results["methods"]["iCD"]["reconstruction"]]
    assert names == ["w 1", "w 3", "w 3, tau 0.8"]
    assert results["settings"] == {"count": 2, "guidance_scale": 3.0, "tau": 0.8, "edit_tau": 0.8, "seed": 1_000_003}
    main(args)
    assert capsys.readouterr().out == first  # seconds too: nothing was measured again


def test_each_number_of_jumps_has_its_own_rows_and_pictures(tmp_path):
    edits = (lambda batch: to_images([example.truth.draw(64) for example in batch]), lambda batch: stack(batch, 64))
    perfect, lazy = (measured(tmp_path / str(n), edit, BENCHMARK.tasks) for n, edit in enumerate(edits))
    table, paths = write_jumps({1: perfect, 2: lazy}, tmp_path)
    assert [(row[0], row[1], row[3], row[6]) for row in table.rows] == [("1 + 1", "iCD", 1, 1), ("2 + 2", "iCD", 0, 1)]
    assert [row[7] for row in table.rows] == pytest.approx([0, 0], abs=1e-2), "generated are the very scenes"
    assert all(path.is_file() for path in paths)
    panel = jumps_panel({1: perfect, 2: lazy}, "edits", "Edits")
    assert panel.columns == ("original", "1 + 1\niCD", "2 + 2\niCD")
    label, (original, edited, untouched) = panel.rows[0]
    assert label == DATA.examples[0].caption
    assert (original == untouched).all()
    assert (edited == DATA.examples[0].truth.draw(64)).all()


def test_a_count_that_cannot_be_is_refused_before_any_training(tmp_path):
    with pytest.raises(ValueError, match="count 0 must be from 1"):
        jumps(out=str(tmp_path), count=0)
    assert not list(tmp_path.iterdir())


def test_a_demo_of_no_model_leaves_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--family", "nowhere", "--out", str(tmp_path / "demo")])
    assert "icd: error: no model 'nowhere': there is no nowhere" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_demo_of_another_family_trains_that_one(random_family, tmp_path, capsys):
    counts = ["--steps", "1", "--train_count", "16", "--eval_count", "6", "--out", str(tmp_path)]
    main(["demo", "--family", str(random_family), *counts])
    first = capsys.readouterr().out.partition("Reconstruction")[2]
    assert [line.split(":")[0] for line in (tmp_path / "tables.md").read_text().splitlines() if line[:2] == "**"] == [
        "**Reconstruction",
        "**Edits by prompt, against their true results**",
        "**Generation",
    ]
    about = json.loads((tmp_path / "training/forward/icd.json").read_text())
    assert about["family"] == str(random_family)
    assert json.loads((tmp_path / "metrics.json").read_text())["machine"]["command"].endswith(str(random_family))
    assert f"Both students of {random_family}" in (tmp_path / "report.html").read_text()
    main(["demo", "--model", str(random_family), *counts])
    assert capsys.readouterr().out.partition("Reconstruction")[2] == first, "nothing was measured again"


@pytest.mark.slow
def test_icd_tiny_jumps_trains_and_measures_each_number(random_family, scenes, tmp_path, capsys):
    options = {
        "model": random_family,
        "train_data": scenes,
        "val_data": scenes,
        "out": tmp_path,
        "steps": 1,
        "count": 2,
    }
    args = ["tiny", "jumps", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    main(args)
    first = capsys.readouterr().out
    ends = [
        json.loads(file.read_text())["boundaries"] for file in sorted(tmp_path.glob("trainings/*/forward/icd.json"))
    ]
    assert ends == [list(Boundaries.uniform(number).boundary_timesteps) for number in NUMBERS]
    rows = [line.split() for line in first.splitlines() if line[1:2].isdigit()]
    assert [row[:4] for row in rows] == [[f"{n}", "+", f"{n}", who] for n in NUMBERS for who in ("untrained", "iCD")]
    assert len({tuple(row[4:]) for row in rows[::2]}) == len(NUMBERS), "each number jumps otherwise"
    main(args)
    assert capsys.readouterr().out == first
