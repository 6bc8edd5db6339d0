import re

import pytest
from curation_case import RECIPE, curated, pair

from icd_lightning.commands.main import main
from icd_lightning.data.shards import write_shards
from icd_lightning.evaluation.curation import curation_report
from icd_lightning.evaluation.report import Curve, Panel, Table


@pytest.fixture
def out(tmp_path):
    pairs = [pair(number, similarity=0.4 if number else 0.1) for number in range(6)] + [pair(6, data=b"<b>no</b>")]
    pairs[3]["txt"] = b"<script>x</script>"
    write_shards(pairs, tmp_path / "raw", shard_size=7, parameters={})
    curated([tmp_path / "raw"], tmp_path / "out")
    return tmp_path / "out"


def test_a_report_counts_measures_and_shows_each_outcome(out):
    report = curation_report(out, 4)
    (table,) = (section for section in report.sections if isinstance(section, Table))
    assert table.rows == (("kept", 5, 500 / 7), ("corrupt_image", 1, 100 / 7), ("similarity", 1, 100 / 7))
    curves = [section for section in report.sections if isinstance(section, Curve)]
    assert [curve.x_label for curve in curves] == [stage.name for stage in RECIPE.stages]
    x, y = curves[1].series["pairs"]
    assert (min(x), max(x)) == (0.1, 0.4)
    assert sum(y) == 2 * 6
    panels = {panel.title: panel.rows for panel in report.sections if isinstance(panel, Panel)}
    assert sum(picture is not None for _, pictures in panels["Kept"] for picture in pictures) == 4
    ((label, (picture, *holes)),) = panels["Dropped for similarity"]
    assert "picture 0" in label
    assert "similarity 0.1" in label
    assert picture.shape == (192, 192, 3)
    assert holes == [None] * 3
    ((label, pictures),) = panels["Dropped for corrupt_image"]
    assert "000000006 of" in label
    assert pictures == (None,) * 4


def test_the_command_writes_a_page_that_runs_nothing_of_the_captions(out, tmp_path, capsys):
    main(["data", "report", str(out), "--output", str(tmp_path / "page")])
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'page' / 'report.html'} shows it"
    text = (tmp_path / "page" / "report.html").read_text()
    assert "&lt;script&gt;" in text
    assert not re.search(r"<script>|<b>no", text)


def test_what_is_no_curation_is_refused(tmp_path, out):
    write_shards([pair(1)], tmp_path / "plain", shard_size=4, parameters={})
    for folder in (tmp_path / "plain", tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"has no complete manifest\.json of a curation: run `icd data curate`"):
            curation_report(folder, 4)
    next((out / "curation").glob("*.parquet")).unlink()
    with pytest.raises(FileNotFoundError, match="is gone: curate again, with --overwrite"):
        curation_report(out, 4)
    with pytest.raises(SystemExit):
        main(["data", "report", str(out), "--examples", "0"])
