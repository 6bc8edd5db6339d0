"""What was written comes back: runs, studies, logs; and what ships of them says the same."""

import json
import shutil

import numpy as np
import pytest
from results_case import PICTURES, by_rows, write_ablations, write_generation, write_guidance, write_outputs

from icd_lightning.commands.evaluate import condense as icd_condense
from icd_lightning.evaluation.ablations.study import read_examples, read_study
from icd_lightning.evaluation.ablations.tables import (
    effect_panel,
    place_of_e,
    result_files,
    table_2,
    telling,
    verdict_table,
)
from icd_lightning.evaluation.curves import read_scalars, thinned, write_scalars
from icd_lightning.evaluation.results import read_runs
from icd_lightning.evaluation.shipping import condense
from icd_lightning.files import read_object


def as_plain(run):
    return run.frame.to_dict("records"), run.set_scores, run.folder, run.options, run.styles


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return write_outputs(tmp_path_factory.mktemp("outputs"))


def test_runs_come_back_with_rows_and_scores_of_sets(tmp_path):
    written = write_guidance(tmp_path)
    read = read_runs(tmp_path / "guidance.json")
    assert {name: as_plain(run) for name, run in read.items()} == {name: as_plain(run) for name, run in written.items()}
    assert written["ddim, both ways"].set_scores["tiny-fd"]["encoder none, decoder full"] == pytest.approx(40)


def test_moved_results_are_found(tmp_path):
    write_generation(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert set(read_runs(tmp_path / "there" / "generation.json")) == {"icd", "icd, to noise and back"}


@pytest.mark.parametrize(
    ("text", "complaint"), [('{"methods": {}}', "does not name its runs: make it again"), ("x{", "json is no JSON")]
)
def test_a_summary_that_cannot_be_used_says_so(tmp_path, text, complaint):
    (tmp_path / "guidance.json").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_runs(tmp_path / "guidance.json")


def test_a_study_comes_back(tmp_path):
    written = write_ablations(tmp_path, seeds=(0, 3))
    found = read_study(tmp_path)
    assert found.trainings == written.trainings
    assert {name: as_plain(run) for name, run in found.runs.items()} == {
        name: as_plain(run) for name, run in written.runs.items()
    }
    assert table_2(found) == table_2(written)
    assert verdict_table(found) == verdict_table(written)


def test_the_pictures_of_a_study_are_known_by_key(outputs):
    examples = read_examples(outputs / "ablations")
    study = read_study(outputs / "ablations")
    assert list(examples) == study.runs["ddim"].frame.key[:PICTURES].tolist()


def test_what_ships_says_the_same_in_little_room(outputs, tmp_path):
    folders = condense(outputs, tmp_path)
    assert [folder.name for folder in folders] == ["ablations", "eval-guidance", "eval-generation"]
    before, after = (read_study(root / "ablations") for root in (outputs, tmp_path))
    assert table_2(after) == table_2(before)
    assert verdict_table(after) == verdict_table(before)
    assert place_of_e(after) == place_of_e(before)
    for name, folder in before.trainings.items():
        assert read_scalars(after.trainings[name]) == read_scalars(folder)
    keys, examples = telling(before), read_examples(outputs / "ablations")
    shown = [effect_panel(study, examples, keys) for study in (before, after)]
    assert all(np.array_equal(a, b) for rows in zip(*(p.rows for p in shown), strict=True) for a, b in _pictures(*rows))
    assert len(list(tmp_path.rglob("*.png"))) == 6 * len(keys)
    for file in ("eval-guidance/guidance.json", "eval-generation/generation.json"):
        ours, theirs = read_runs(tmp_path / file), read_runs(outputs / file)
        assert all(ours[name].frame.equals(theirs[name].frame) for name in ours.keys() | theirs.keys())


def _pictures(first, second):
    return zip(first[1], second[1], strict=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"runs": ["A-0"]}, "does not name its runs: make it again"),
        ({"runs": {"A-0": 5}}, "does not name its runs"),
        ({"trainings": {"A-0": "../../elsewhere"}}, "does not name its trainings"),
        ({"trainings": {"A-0": "/elsewhere"}}, "does not name its trainings"),
        ({"trainings": None}, "does not name its trainings"),
        ({"ablations": []}, "does not hold what a study leaves"),
        ({"ablations": [1]}, "does not hold what a study leaves"),
        ({"seeds": [7]}, "does not hold what a study leaves .*A-7"),
        ({"seeds": []}, "does not hold what a study leaves"),
        ({"guidance_scales": None}, "does not hold what a study leaves"),
        ({"guidance_scales": [4.0]}, "does not hold what a study leaves"),
    ],
)
def test_a_study_whose_summary_lies_is_refused_and_nothing_is_copied(outputs, tmp_path, change, complaint):
    shutil.copytree(outputs, tmp_path / "outputs")
    file = tmp_path / "outputs" / "ablations" / "table2.json"
    file.write_text(json.dumps(read_object(file) | change))
    with pytest.raises(ValueError, match=complaint):
        condense(tmp_path / "outputs", tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.drop(columns="decoding"),
        lambda frame: frame.drop(columns="psnr"),
        lambda frame: frame.assign(psnr="x"),
        lambda frame: frame.iloc[:0],
        lambda frame: frame.iloc[:5],
        lambda frame: frame.assign(image="../../../../elsewhere.png"),
    ],
)
def test_a_study_whose_rows_lie_is_refused_and_nothing_is_copied(outputs, tmp_path, change):
    shutil.copytree(outputs, tmp_path / "outputs")
    (tmp_path / "elsewhere.png").touch()
    run = read_study(tmp_path / "outputs" / "ablations").runs["A-0"]
    change(run.frame).to_parquet(run.folder / "rows.parquet")
    with pytest.raises(ValueError, match=r"does not hold what a|is not in the folder"):
        condense(tmp_path / "outputs", tmp_path / "kept")
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "elsewhere.png"}


def test_results_that_lack_a_picture_are_not_copied_by_halves(outputs, tmp_path):
    shutil.copytree(outputs, tmp_path / "outputs")
    for picture in (tmp_path / "outputs").rglob("*.png"):
        picture.unlink()
    with pytest.raises(FileNotFoundError, match=r"ablations/runs/.*png"):
        condense(tmp_path / "outputs", tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_training_that_is_gone_is_named(outputs, tmp_path):
    shutil.copytree(outputs, tmp_path / "outputs")
    training = read_study(tmp_path / "outputs" / "ablations").trainings["A-0"]
    shutil.rmtree(training)
    with pytest.raises(FileNotFoundError, match=f"{training} holds no scalars of a training: bring it back"):
        condense(tmp_path / "outputs", tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_shipped_results_are_not_mixed_with_others(outputs, tmp_path):
    condense(outputs, tmp_path)
    with pytest.raises(FileExistsError, match="is there already: remove it first"):
        condense(outputs, tmp_path)


def test_nothing_to_ship_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of ablations/table2.json, eval-guidance/guidance.json"):
        icd_condense(source=str(tmp_path), out=str(tmp_path / "results"))


def test_scalars_come_back_as_float32(tmp_path):
    scalars = {"val/loss": ([0, 10, 20], [0.5, 0.25, 0.125]), "train/loss": ([5], [float(np.float32(0.1))])}
    write_scalars(tmp_path, scalars)
    assert read_scalars(tmp_path) == scalars


def test_thinned_scalars_end_where_the_training_did():
    steps = list(range(1, 251))
    found, values = thinned({"loss": (steps, list(map(float, steps)))}, 100)["loss"]
    assert len(found) == 84
    assert found[-1] == 250
    assert values == list(map(float, found))
    assert thinned({"loss": ([1, 2], [0.1, 0.2])}, 100) == {"loss": ([1, 2], [0.1, 0.2])}


def test_effects_are_differences_over_the_same_pictures(outputs):
    study = read_study(outputs / "ablations")
    found = by_rows(study.comparisons())
    assert list(found) == ["AB", "BC", "CF", "FG"]
    expected = study.row("G", 1.0).pictures() - study.row("F", 1.0).pictures()
    assert np.array_equal(found["FG"].gain, expected)
    best, worst = telling(study, 1)[-2:]
    assert found["FG"].keys.index(best) == expected.argmax()
    assert found["FG"].keys.index(worst) == expected.argmin()
    guided = by_rows(study.comparisons(5.0))
    assert guided["HI"].gain.mean() == pytest.approx(
        study.row("I", 5.0).values().mean() - study.row("H", 5.0).values().mean(), abs=1e-9
    )


def test_gain_by_hardness_parts_all_pictures(outputs):
    study = read_study(outputs / "ablations")
    effect = study.comparisons()[-1]
    groups = effect.by_hardness(study.runs["ddim"].values("psnr", "w 1"))
    assert [x for x, _ in groups] == sorted(x for x, _ in groups)
    assert np.mean([gain for _, gain in groups]) == pytest.approx(effect.gain.mean())


def test_result_files_are_those_of_the_unguided_decoding(outputs):
    study = read_study(outputs / "ablations")
    (file,) = result_files(study, "G", [telling(study)[0]])
    assert file.startswith("images/w-1/")
