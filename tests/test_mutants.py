"""The list of faults that `make mutants` puts into the package."""

from pathlib import Path
from runpy import run_path

FOLDER = Path(__file__).parent / "mutants"


def test_the_list_of_faults_follows_the_code():
    """Each text to change occurs once, and its tests are there."""
    faults = run_path(str(FOLDER / "run.py"))["read_faults"](FOLDER / "faults.yaml")
    words = {word for fault in faults for word in fault.tests.split() if word.startswith("tests/")}
    assert not [word for word in words if not (FOLDER.parents[1] / word.partition("::")[0]).exists()]
