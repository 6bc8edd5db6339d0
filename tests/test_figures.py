"""What `make figures` measured comes to where documents show it."""

import importlib.util
import re
import subprocess

import pytest
from documents_case import ROOT
from PIL import Image

from icd_lightning.commands.ablations import results_of
from icd_lightning.evaluation.report import Table, markdown_table

spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/hooks/figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


@pytest.fixture
def root(tmp_path):
    """A repository's documents, and results: the tables that the documents show, and pictures."""
    for name in figures.DOCUMENTS:
        text = (ROOT / name).read_text()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        for file, shown in re.findall(r"<!-- (\S+) \| .+? -->\n(.*?)<!-- end -->", text, re.DOTALL):
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            known = path.read_text() if path.exists() else ""
            path.write_text(known if shown in known else f"{known}\n{shown}")
    for file, width in figures.PICTURES.values():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2 * width, 400), "red").save(tmp_path / file)
    return tmp_path


def test_documents_that_show_their_figures_stay_as_they_are(root):
    figures.main(root)
    for name in figures.DOCUMENTS:
        assert (root / name).read_text() == (ROOT / name).read_text()
    for name, (_, width) in figures.PICTURES.items():
        assert Image.open(root / name).size == (width, 200)


def test_a_new_table_takes_the_place_of_the_old_one_alone(root):
    old = (root / "README.md").read_text()
    tables = [Table(title, "New.", ("a",), ((1,),)) for title in ("Reconstruction", "Edits by whom", "Generation")]
    for demo in ("demo", "demo-tiny_flow"):
        (root / f"outputs/{demo}/tables.md").write_text("\n".join(map(markdown_table, tables)))
    new = figures.fill(old, root)
    assert new.count(markdown_table(tables[1])) == 2
    assert "Edits by prompt, against" not in new
    assert figures.MARKED.sub("", new) == figures.MARKED.sub("", old)


@pytest.mark.parametrize("missing", ["outputs/ablations/table2.md", "outputs/demo/report.png"])
def test_nothing_is_written_before_all_is_there(root, missing):
    (root / missing).unlink()
    (root / "outputs/demo/tables.md").write_text("**Edits**\n\n**Reconstruction**\n\n**Generation**\n")
    with pytest.raises(FileNotFoundError, match=missing):
        figures.main(root)
    assert (root / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_a_title_that_is_gone_is_named(root):
    (root / "outputs/demo/tables.md").write_text("**Other**\n")
    with pytest.raises(ValueError, match=r"outputs/demo/tables.md has 0 tables 'Edits'"):
        figures.fill((root / "README.md").read_text(), root)


def test_make_figures_measures_all_that_documents_show():
    made = subprocess.run(["make", "-nB", "figures"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    folders = set()
    for command, options in re.findall(r"/icd (demo|ablations|tiny jumps|eval) ?(.*)", made.replace("\\\n", "")):
        given = dict(re.findall(r"--(\w+)[ =](\S+)", options))
        kind = f"eval-{given['benchmark']}" if command == "eval" else command.removeprefix("tiny ")
        model = given.get("family", "tiny") if command == "demo" else given.get("model", "tiny")
        folders.add(str(results_of(kind, model, given.get("out"))))
    texts = "".join((ROOT / name).read_text() for name in figures.DOCUMENTS)
    shown = [file for file, _ in re.findall(r"<!-- (\S+) \| (.+?) -->", texts)]
    shown += [file for file, _ in figures.PICTURES.values()]
    assert {"/".join(file.split("/")[:2]) for file in shown} <= folders
