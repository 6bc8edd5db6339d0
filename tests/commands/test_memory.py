"""Memory by the true shapes, from configs alone."""

import json
import re
import shutil
from pathlib import Path

import pytest

from icd_lightning.commands.main import main
from icd_lightning.models.family import Family
from icd_lightning.models.sources import architecture

DOCS = (Path(__file__).parents[2] / "docs" / "gpus.md").read_text()
NAMES = sorted(path.name for path in architecture("").iterdir())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "sd15")) for name in NAMES])
def test_the_documentation_has_the_table_that_is_counted(name, capsys):
    main(["memory", name])
    heading, ruler, row = capsys.readouterr().out.splitlines(keepends=True)
    assert heading + ruler in DOCS
    assert row in DOCS


@pytest.mark.parametrize(
    ("part", "lie"),
    [
        ("unet", {"block_out_channels": None}),
        ("unet", {"block_out_channels": [-4, 8, 8, 8]}),
        ("unet", {"attention_head_dim": 0}),
        ("vae", {"block_out_channels": ["a"]}),
        ("text_encoder", {"hidden_size": "wide"}),
    ],
)
def test_a_config_of_what_cannot_be_is_named(tmp_path, capsys, part, lie):
    shutil.copytree(architecture("sd15"), tmp_path / "model")
    file = tmp_path / "model" / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | lie))
    with pytest.raises(SystemExit):
        main(["memory", str(tmp_path / "model")])
    assert f" of {tmp_path / 'model'} cannot be loaded (" in capsys.readouterr().err
    if part == "unet":
        with pytest.raises(ValueError, match=re.escape(f"{file.parent} cannot be loaded (")):
            Family(str(tmp_path / "model")).hollow_network()


def test_a_folder_is_counted_and_what_is_no_model_is_refused_before_anything_is_printed(flow_layouts, capsys):
    main(["memory", str(flow_layouts["sd3"])])
    assert re.search(rf"\| {flow_layouts['sd3']} \| [1-9]\S*e-\d+ \| ", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["memory", str(flow_layouts["sd3"]), "nowhere"])
    told = capsys.readouterr()
    assert not told.out
    assert (
        "icd: error: no model 'random:nowhere': there is no architecture nowhere: flux2_klein, flux_dev, sd15, sd3,"
        in told.err
    )
