import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
from edits import (  # noqa: E402
    BASE,
    NUM_EDITS,
    Edit,
    ReferenceAutoencoder,
    ReferenceEdit,
    Setting,
    merged,
    recolourings,
)
from measuring import in_turns, table  # noqa: E402

from icd_lightning.diffusion import guidance_embedding  # noqa: E402
from icd_lightning.editing.merging import MergedStudent  # noqa: E402
from icd_lightning.evaluation.methods import Models  # noqa: E402
from icd_lightning.models.family import Family  # noqa: E402

REFERENCE_CODE = os.environ.get("ICD_REFERENCE_CODE")
"""A checkout of the reference's code, for the one test that needs it."""


def test_forms_take_turns_and_rare_ones_are_spread_over_the_rounds():
    calls = []

    def form(name):
        return lambda number: calls.append((name, number)) or number

    found = in_turns({"often": form("often"), "rare": form("rare")}, {"often": 6, "rare": 2})
    assert calls[0] == ("often", 0)  # to warm up
    assert found == {"often": [0, 1, 2, 3, 4, 5], "rare": [2, 5]}
    assert calls[1:5] == [("often", 0), ("often", 1), ("often", 2), ("rare", 2)]


def test_a_table_is_markdown():
    assert table(["a", "b"], [["x", "1"], ["y", "2"]]) == "| a | b |\n| --- | --: |\n| x | 1 |\n| y | 2 |"


def test_every_edit_changes_one_word():
    edits = recolourings()
    assert len(edits) == NUM_EDITS
    for edit in edits:
        pairs = zip(edit.caption.split(), edit.target.split(), strict=True)
        assert sum(old != new for old, new in pairs) == 1


@pytest.mark.parametrize(("name", "nfe"), [(BASE, 12), ("icd", 8)])
def test_an_edit_counts_what_it_takes_and_is_the_same_every_time(random_family, name, nfe):
    form = Edit(name, Setting(str(random_family)))
    first, again, other = form(0), form(NUM_EDITS), form(1)
    assert first.nfe == nfe
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (1, 3, 64, 64)


@torch.no_grad()
def test_students_merged_for_the_reference_are_those_of_ours(random_family):
    method = Models(Family(str(random_family))).load("icd_swap")
    x, t, w = torch.randn(2, 16, 8, 8), torch.tensor([259, 999]), torch.tensor([1.0, 3.0])
    told = method.conditioner(["a large red circle", "a green ring"])
    expected = MergedStudent(method.students, "reverse")(x, t, told, w)
    unet = merged(method.students.network, "reverse")
    found = unet(x, t, timestep_cond=guidance_embedding(w), encoder_hidden_states=told.tensors["prompt_embeds"]).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(".lora_" in name for name in unet.state_dict())


def test_latents_have_our_scale_behind_the_references(random_family):
    autoencoder = Family(str(random_family)).load_autoencoder()
    adapted, images = ReferenceAutoencoder(autoencoder), torch.rand(1, 3, 64, 64) * 2 - 1
    latents = adapted.encode(images)["latent_dist"].mean * 0.18215
    torch.testing.assert_close(latents, autoencoder.encode(images))
    torch.testing.assert_close(adapted.decode(latents / 0.18215)["sample"], autoencoder.decode(latents))


def test_a_folder_without_the_references_code_is_refused(random_family, tmp_path):
    with pytest.raises(ValueError, match=r"utils/p2p\.py"):
        ReferenceEdit(Setting(str(random_family)), tmp_path)


@pytest.mark.skipif(REFERENCE_CODE is None, reason="needs the reference's code: ICD_REFERENCE_CODE=../invertible-cd")
def test_the_reference_makes_the_same_edits_with_twice_the_evaluations(random_family):
    setting = Setting(str(random_family))
    ours, reference = Edit(BASE, setting), ReferenceEdit(setting, Path(REFERENCE_CODE))
    for number in range(2):
        a, b = ours(number), reference(number)
        assert b.nfe == 2 * a.nfe
        assert (a.images - b.images).abs().max() * 127.5 < 1.1  # its pictures are cut to whole numbers, not rounded


@pytest.mark.slow
def test_the_command_prints_a_table(random_family):
    command = [sys.executable, "editing.py", "--family", str(random_family), "--methods", "icd", "--repeats", "3"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:3] for row in rows[2:]] == [["| icd_p2p", "12", "3"], ["| icd", "8", "3"]]


@pytest.mark.slow
def test_caching_is_timed_one_after_another_and_in_threads():
    options = ["--size=64", "--count=16", "--shard-size=8", "--encode-ms=1", "--threads=1,2", "--repeats=2"]
    command = [sys.executable, "caching.py", *options]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| one after another", "| threads, 1 to decode", "| threads, 2 to decode"]


def gpu_figures(out: Path, monkeypatch, *options: str) -> dict[str, dict]:
    command = ["gpu.py", "--narrow", "--device", "cpu", "--repeats", "1", "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    return json.loads((out / "figures.json").read_text())["figures"]


@pytest.mark.slow
def test_figures_of_a_card_are_written_one_by_one_and_what_does_not_fit_is_said(tmp_path, monkeypatch):
    every = gpu.parts
    monkeypatch.setattr(gpu, "parts", lambda card: list(every(card))[:4])
    found = gpu_figures(tmp_path, monkeypatch)
    assert len(found) == 4
    ours, style = found["SD1.5 step, batch 8"], found["SD1.5 step, batch 8, reference-style"]
    assert style["ratio"] == style["seconds"] / ours["seconds"]
    assert ours["share"] == ours["tflop_s"] / found["bf16 matrix product"]["tflop_s"]
    assert len((tmp_path / "table.md").read_text().strip().splitlines()) == 2 + 4


def test_what_no_longer_fits_or_fails_is_a_line_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path)])
    card = gpu.Card(gpu.parse())
    card.add("full", 0, lambda: torch.empty(1 << 60))
    card.started -= 480
    card.add("late", 1, lambda: pytest.fail("there was no time left"))
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[-1] == "left out: late: 0 s of --minutes 8 were left"
    assert lines[-2].startswith("left out: full: ")


@pytest.mark.slow
def test_a_mistake_is_one_line():
    command = [sys.executable, "editing.py", "--methods", "ice"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("editing: error: no method 'ice'")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_data_are_timed_and_their_memory_watched():
    options = ["--side=64", "--resolution=64", "--count=400", "--shards=10", "--minutes=0.02"]
    command = [sys.executable, "data.py", *options]
    said = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True).stdout
    for wanted in (
        "2 workers: ",
        "10 shards of 20 pictures: ready in ",
        "first batch at batch 1000: ",
        "averages of the",
    ):
        assert wanted in said
