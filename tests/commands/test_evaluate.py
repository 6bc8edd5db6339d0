"""`icd eval --benchmark` from the command line."""

import json

import pytest
from ranks_case import run_ranks

from icd_lightning.commands.main import main


def test_a_benchmark_prints_its_table_and_says_where_everything_is(random_family, tmp_path, capsys):
    args = f"eval --benchmark inversion --model {random_family} --count 2 --metrics psnr,ssim --out {tmp_path}"
    main([*args.split(), "--method", "icd,untrained"])
    out = capsys.readouterr().out
    assert "Inversion: to noise and back" in out
    assert "untrained" in out
    found = json.loads((tmp_path / "inversion.json").read_text())["methods"]
    assert set(found) == {"icd", "untrained"}
    assert all(set(decodings) == {"w 1", "w 3", "w 3, tau 0.8"} for decodings in found.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--metrics psnr --grid tau=0.5", "benchmark scenes does not read metrics, grid: leave it out"),
        ("--natural", "benchmark scenes does not read natural: leave it out"),
        ("--seed 3", "seed 3 is of pictures that tiny was trained with (0 to 6)"),
        ("--guidance_scale 0", "guidance_scale 0.0 must be 1 (unguided) or more"),
        ("--benchmark tiny_edit --grid swop_tau=0.5", "grid option 'swop_tau' is none of w, tau, "),
        ("--benchmark fid", "no benchmark 'fid'; there is: inversion"),
        ("--benchmark inversion --method magic", "no method 'magic'; there is: icd"),
        ("--benchmark inversion --metrics magic", "no metric 'magic'; there is: psnr"),
        ("--benchmark inversion --data nowhere.csv", "there is no nowhere.csv"),
        ("--benchmark inversion --grid tau", "grid 'tau' is not as in tau=0.6,0.7,0.8"),
        ("--benchmark inversion --batch_size 0", "batch_size 0 must be from 1 to 1,000,000"),
        ("--benchmark piebench --data .", "is not PIE-Bench: there is no mapping_file.json"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(random_family, tmp_path, capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        main(["eval", *args.split(), "--model", str(random_family), "--count", "1", "--out", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("icd: error: ")
    assert message in error


@pytest.mark.parametrize("metric", ["edits", "mse-unedited", "tiny-fd"])
def test_each_metric_of_edits_works_alone(random_family, tmp_path, metric):
    args = f"eval --benchmark tiny_edit --model {random_family} --count 2 --out {tmp_path} --metrics {metric}"
    main([*args.split(), "--method", "icd_swap"])
    (means,) = json.loads((tmp_path / "tiny_edit.json").read_text())["methods"]["icd_swap"].values()
    assert len(means["all"]) > 2  # nfe, seconds and the metric's


def two_ranks(rank, family, out):
    grid = ["--metrics", "tiny-fd", "--grid", "tau=0.6,1"]
    few = ["--count", "3", "--batch_size", "1"]
    main(["eval", "--benchmark", "generation", "--model", family, *few, "--out", out, *grid])


def test_two_ranks_share_a_benchmark_and_write_its_tables_once(random_family, tmp_path):
    assert run_ranks(two_ranks, str(random_family), str(tmp_path)) == [0, 0]
    results = json.loads((tmp_path / "generation.json").read_text())["methods"]
    assert results["icd"]["tau 1"]["all"]["tiny-fd"] >= 0
    assert list(results) == ["icd", "icd, to noise and back"]
