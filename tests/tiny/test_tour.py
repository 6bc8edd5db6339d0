"""The tour: perfect and lazy methods score as they must, its tables are of all attributes, and `icd eval` writes it."""

import json
import math

import pytest

from icd_lightning.commands.main import main
from icd_lightning.data.images import to_images
from icd_lightning.evaluation.benchmark import Measured, Outcome, Settings
from icd_lightning.evaluation.examples import stack
from icd_lightning.evaluation.runs import Run, perform
from icd_lightning.evaluation.scoring import Scoring
from icd_lightning.tiny.attributes import label_tensor
from icd_lightning.tiny.benchmarks import ATTRIBUTE_EDITS, TOUR, figures, tour_examples, tour_tables
from icd_lightning.tiny.scenes import LABELS

SETTINGS = Settings("scenes", count=12)
DATA = tour_examples(SETTINGS)


def test_edits_take_turns_and_change_one_attribute():
    before, after = (label_tensor([getattr(e, name) for e in DATA.examples]) for name in ("picture", "truth"))
    changed = [[name for name, new in zip(LABELS, row, strict=True) if new] for row in (before != after).tolist()]
    assert all(len(names) == 1 for names in changed)
    assert [names[0].rstrip(" 12") for names in changed] == [*ATTRIBUTE_EDITS] * 2
    assert [example.seed(0) for example in DATA.examples] == list(range(12))


def measured(root, edit) -> Measured:
    """The tour of a method that loses nothing, generates the very scenes, and edits by `edit`."""

    def same(batch):
        values = {
            "latent_mse": stack(batch, 8).flatten(1)[:, 0] * 0,
            "autoencoder_psnr": stack(batch, 8)[:, 0, 0, 0] + 30,
        }
        yield Outcome("w 1", stack(batch, 64), 5, 0.1, values)

    results = {}
    for task in TOUR.tasks:
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
