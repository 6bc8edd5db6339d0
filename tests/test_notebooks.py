"""The notebooks define nothing, have no outputs in git, and run from end to end."""

import ast
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from IPython.utils.capture import capture_output
from often_case import often

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHIPPED = ROOT / "notebooks" / "results"

each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook: Path) -> list:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


@each
def test_a_notebook_defines_nothing(notebook):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    defined = [n for cell in cells(notebook) for n in ast.walk(ast.parse(cell.source)) if isinstance(n, kinds)]
    assert not defined


@each
def test_a_notebook_has_no_outputs(notebook):
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells(notebook))


def execute(notebook: Path, results: Path, monkeypatch) -> list[str]:
    """Run it on these results, in this process: a kernel would take ten seconds to import what is here already.

    Return the types of what it shows.
    """
    monkeypatch.setenv("ICD_RESULTS", str(results))
    monkeypatch.chdir(notebook.parent)
    shell = InteractiveShell.instance()
    shell.display_formatter.active_types = shell.display_formatter.format_types  # as in a kernel, not as on a terminal
    with capture_output() as shown:
        for cell in cells(notebook):
            done = shell.run_cell(cell.source)
            done.raise_error()
            if done.result is not None:
                display(done.result)
    InteractiveShell.clear_instance()
    return [kind for output in shown.outputs for kind in output.data]


FIGURES = {"ablations": 10, "guidance": 3}
TABLES = {"ablations": 3, "guidance": 2}


@pytest.mark.parametrize("notebook", often(NOTEBOOKS, NOTEBOOKS[1]), ids=lambda path: path.stem)
def test_a_notebook_runs_on_what_ships(notebook, monkeypatch):
    shown = execute(notebook, SHIPPED, monkeypatch)
    assert shown.count("image/png") == FIGURES[notebook.stem]
    assert shown.count("text/markdown") >= TABLES[notebook.stem]


@pytest.mark.slow
def test_the_notebooks_run_on_a_miniature_study(random_family, tmp_path, monkeypatch):
    from training_case import write_scenes

    from icd_lightning.commands.ablations import ablations
    from icd_lightning.commands.evaluate import evaluate
    from icd_lightning.evaluation.shipping import condense

    monkeypatch.chdir(ROOT)
    outputs, scenes = tmp_path / "outputs", str(write_scenes(tmp_path / "scenes"))
    few = {"model": str(random_family), "count": 4, "batch_size": 4}
    where = {"train_data": scenes, "val_data": scenes, "out": str(outputs / "ablations")}
    ablations(steps=2, guidance_scales="3", **where, **few)
    evaluate(benchmark="guidance", method="icd,ddim", out=str(outputs / "eval-guidance"), **few)
    grid = {"method": "icd", "grid": "tau1=0.4,0.8 tau2=0.4,0.8"}
    evaluate(benchmark="generation", out=str(outputs / "eval-generation"), **grid, **few)
    condense(outputs, tmp_path / "kept")
    for notebook in NOTEBOOKS:
        for results in (outputs, tmp_path / "kept"):
            assert execute(notebook, results, monkeypatch).count("image/png") == FIGURES[notebook.stem]


def test_missing_results_are_said_to_be_made_by_a_command(tmp_path):
    from icd_lightning.evaluation.ablations.study import read_study
    from icd_lightning.evaluation.results import read_runs

    with pytest.raises(FileNotFoundError, match="`icd ablations` makes it"):
        read_study(tmp_path)
    for name in ("guidance", "generation"):
        with pytest.raises(FileNotFoundError, match=f"`icd eval --benchmark {name}.*` makes it"):
            read_runs(tmp_path / f"{name}.json")
