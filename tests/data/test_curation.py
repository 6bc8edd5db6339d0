import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from operator import methodcaller

import pytest
from curation_case import RECIPE, curated, fail_oddly, files_in, jpeg, pair, photograph
from PIL import Image, ImageEnhance
from shards_case import cut_after, files_of, samples_of, write_files

from icd_lightning.commands.main import main
from icd_lightning.data.curation.curate import Curation
from icd_lightning.data.curation.duplicates import Duplicates
from icd_lightning.data.curation.engine import Engine
from icd_lightning.data.curation.recipe import Recipe
from icd_lightning.data.curation.sources import read_unit
from icd_lightning.data.curation.stages import ShortSide
from icd_lightning.data.datamodule import ShardDataModule
from icd_lightning.data.manifest import Manifest

CONFIG = """
resolution: 64
stages:
  - {class_path: icd_lightning.data.curation.stages.ShortSide, init_args: {least: 64}}
  - {class_path: icd_lightning.data.curation.stages.Field, init_args: {fields: [similarity], least: 0.3}}
duplicates: {radius: 8}
"""


def write_raw(folder, first: int = 0, shards: int = 3):
    """Shards of ten pairs, of which four are unfit and two are copies of the first two of the same shard."""
    for number in range(first, first + shards):
        start = 100 * number
        pairs = [pair(start + row) for row in range(4)]
        brighter = ImageEnhance.Brightness(photograph(start + 1)).enhance(1.05)
        pairs += [pair(start + 4, data=pairs[0]["jpg"]), pair(start + 5, data=jpeg(brighter, 80))]
        pairs += [pair(start + 6, similarity=0.1), pair(start + 7, data=jpeg(photograph(start + 7, 40)))]
        pairs += [pair(start + 8, data=b"no picture"), pair(start + 9) | {"json": b"{"}]
        write_files(folder / f"{number:05d}.tar", files_of(pairs))
    return folder


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


def test_what_is_dropped_is_counted_by_its_reason(raw, tmp_path):
    manifest, new = curated([raw], tmp_path / "out", shard_size=5)
    assert new
    about = manifest.parameters
    assert (about["read"], about["kept"]) == (30, 12)
    expected = ("corrupt_image", "corrupt_json", "duplicate", "near_duplicate", "short_side", "similarity")
    assert about["dropped"] == dict.fromkeys(expected, 3)
    assert [record.samples for record in manifest.shards.values()] == [4, 4, 4]
    assert sum(about["histograms"]["similarity"]["counts"]) == 21
    captions = [sample["txt"].decode() for sample in samples_of(tmp_path / "out")]
    assert captions == [f"picture {100 * shard + row}" for shard in range(3) for row in range(4)]
    curation = Curation(tmp_path / "out", RECIPE, 5)
    named = [(record.key[8], why[8]) for _, record, why in curation.reasons(curation.plans()[0])]
    assert named == [(f"{100 * shard + 8:09d}", "corrupt_image") for shard in range(3)]


def test_training_is_told_the_size_before_curation(tmp_path):
    write_files(tmp_path / "raw" / "0.tar", files_of([pair(n, data=jpeg(photograph(n, 200))) for n in range(4)]))
    curated([tmp_path / "raw"], tmp_path / "out")
    sample = samples_of(tmp_path / "out")[0]
    assert Image.open(BytesIO(sample["jpg"])).size == (64, 64)
    data = ShardDataModule(str(tmp_path / "out"), batch_size=2, resolution=32, verify="sha256")
    data.setup("fit")
    metadata = next(iter(data.train_dataloader())).metadata
    assert [about["original_size"] for about in metadata] == [(200, 200), (200, 200)]
    assert json.loads(sample["json"])["measured"] == {"similarity": 0.4, "short_side": 200}


def test_the_form_of_a_picture_is_kept(tmp_path):
    write_files(tmp_path / "raw" / "0.tar", files_of([pair(0, data=jpeg(photograph(0, 256).resize((300, 201))))]))
    curated([tmp_path / "raw"], tmp_path / "out")
    assert Image.open(BytesIO(samples_of(tmp_path / "out")[0]["jpg"])).size == (96, 64)


def test_the_larger_of_two_alike_is_kept_wherever_it_lies(tmp_path):
    pairs = [pair(0, data=jpeg(photograph(0, 96))), pair(1, data=jpeg(photograph(0, 128)))]
    write_files(tmp_path / "raw" / "0.tar", files_of(pairs))
    curated([tmp_path / "raw"], tmp_path / "out")
    assert [sample["txt"] for sample in samples_of(tmp_path / "out")] == [b"picture 1"]


def test_pictures_of_a_benchmark_are_left_out(raw, tmp_path):
    (tmp_path / "benchmark" / "part").mkdir(parents=True)
    photograph(102, 300).save(tmp_path / "benchmark" / "part" / "x.png")
    recipe = Recipe(RECIPE.stages, Duplicates(benchmarks=[str(tmp_path / "benchmark")]), 64)
    manifest, _ = curated([raw], tmp_path / "out", recipe)
    assert manifest.parameters["dropped"]["leaked"] == 1
    assert b"picture 102" not in [sample["txt"] for sample in samples_of(tmp_path / "out")]


def test_the_same_again_does_nothing(raw, tmp_path):
    first, _ = curated([raw], tmp_path / "out")
    before = {path: path.stat() for path in (tmp_path / "out").rglob("*")}
    again, new = curated([raw], tmp_path / "out")
    assert again == first
    assert not new
    assert {path: path.stat() for path in (tmp_path / "out").rglob("*")} == before


def test_further_inputs_do_only_the_new_part(raw, tmp_path, monkeypatch):
    curated([raw], tmp_path / "out", shard_size=5)
    before = {path: path.stat() for path in (tmp_path / "out").rglob("*.tar")}
    write_raw(raw, first=3, shards=1)
    write_files(raw / "0000.tar", files_of([pair(1), pair(500)]))  # sorted before all; the first is there already
    opened = []

    def noticed(unit, damage):
        opened.append(unit.name)
        return read_unit(unit, damage)

    monkeypatch.setattr("icd_lightning.data.curation.passes.read_unit", noticed)
    manifest, _ = curated([raw], tmp_path / "out", shard_size=5)
    assert opened == ["0000.tar", "00003.tar"] * 2  # in each of the two passes
    assert manifest.complete
    assert {path: path.stat() for path in before} == before
    assert manifest.parameters["kept"] == manifest.samples == 12 + 5
    assert manifest.parameters["dropped"]["duplicate"] == 5


def test_stopped_anywhere_it_comes_to_the_same(tmp_path, monkeypatch):
    """Whatever file is the last to be written, the next call goes on to the same set, byte for byte."""
    raw = write_raw(tmp_path / "raw", shards=1)
    curated([raw], tmp_path / "whole", shard_size=2)
    whole = files_in(tmp_path / "whole")
    for stop in range(1, 40):
        monkeypatch.setattr(os, "replace", Stopping(stop))
        try:
            curated([raw], tmp_path / "out", shard_size=2)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", REPLACE)
            curated([raw], tmp_path / "out", shard_size=2)
        else:
            break
        assert files_in(tmp_path / "out") == whole
        for path in sorted((tmp_path / "out").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert 8 < stop < 39


class Stopping:
    """In the place of `os.replace`: the so many-th time, an interrupt."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *paths) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        REPLACE(*paths)


REPLACE = os.replace


def test_another_recipe_is_refused_and_nothing_touched(raw, tmp_path):
    curated([raw], tmp_path / "out")
    before = files_in(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds another set \(duplicates .*--overwrite"):
        curated([raw], tmp_path / "out", Recipe((ShortSide(least=32),)))
    assert files_in(tmp_path / "out") == before
    curated([raw], tmp_path / "out", Recipe((ShortSide(least=32),)), overwrite=True)
    assert Manifest.load(tmp_path / "out").parameters["kept"] == 24


def test_where_nothing_is_kept_the_counts_are_told(raw, tmp_path):
    with pytest.raises(ValueError, match=r"no pair was kept \(corrupt_image 3, corrupt_json 3, short_side 24\)"):
        curated([raw], tmp_path / "out", Recipe((ShortSide(least=1000),)))


def test_a_damaged_shard_is_named_and_the_rest_of_it_kept(raw, tmp_path, caplog):
    shard = raw / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:30_000])
    manifest, _ = curated([raw], tmp_path / "out")
    (damage,) = manifest.parameters["damaged"]
    assert damage.startswith(f"{shard} cannot be read to its end")
    assert damage in caplog.text
    assert manifest.parameters["read"] < 30


def test_a_manifest_notices_what_a_cut_shard_lacks(tmp_path, raw):
    curated([raw], tmp_path / "out")
    cut_after(tmp_path / "out" / "00000.tar", 3)
    with pytest.raises(ValueError, match=r"00000.tar holds 3 samples"):
        curated([tmp_path / "out"], tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "shard_size 0 must be at least 1"),
        ({"out": "s3://bucket/x"}, "s3://bucket/x is elsewhere"),
        ({"recipe": Recipe(duplicates=Duplicates(benchmarks=["nowhere"]))}, "benchmark nowhere holds no pictures"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(raw, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        curated([raw], **({"out": tmp_path / "out"} | options))
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_shards(raw, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="that is a file, give a folder"):
        curated([raw], out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_pairs_are_not_written_over(raw):
    with pytest.raises(ValueError, match="holds the pairs themselves"):
        curated([raw], raw, overwrite=True)
    assert len(list(raw.glob("*.tar"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "num_workers -1"),
        ({"num_gpus": float("nan")}, "num_gpus nan"),
        ({"num_workers": 0, "address": "auto"}, "num_workers 0 works in this process, not at 'auto': leave out"),
    ],
)
def test_an_engine_refuses_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(**options)


def test_without_ray_one_line_says_what_to_install(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "recipe.yaml").write_text(CONFIG)
    command = ["data", "curate", str(raw), "--out", str(tmp_path / "out"), "--config", str(tmp_path / "recipe.yaml")]
    with pytest.raises(SystemExit):
        main(command)
    assert capsys.readouterr().err.splitlines() == [
        "icd: error: Ray is not installed: pip install 'icd-lightning[curate]'; or pass --num_workers 0 to do without"
    ]
    main([*command, "--num_workers", "0"])
    assert "holds 12 of 30 pairs in 1 shard; dropped: corrupt_image 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--overwrite"])
    main([*command, "--num_workers", "0"])
    assert "nothing new to do" in capsys.readouterr().out


# --- on a real, local Ray: seconds to start, minutes on a machine that has other work ---------------------------------


@pytest.mark.slow
def test_ray_comes_to_the_same_bytes_whoever_works_and_whenever_it_is_killed(raw, tmp_path):
    curated([raw], tmp_path / "here", shard_size=5)
    curated([raw], tmp_path / "two", shard_size=5, engine=Engine(num_workers=2))
    assert files_in(tmp_path / "two") == files_in(tmp_path / "here")
    (tmp_path / "recipe.yaml").write_text(CONFIG)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "icd_lightning.commands.main", "data", "curate", str(raw), "--out", str(out)]
    command += ["--config", str(tmp_path / "recipe.yaml"), "--shard_size", "5", "--num_workers", "2"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 300
    while not list(out.glob("curation/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Manifest.load(out).complete
    subprocess.run(command, check=True, timeout=300)
    assert Manifest.load(out) == Manifest.load(tmp_path / "here")
    assert {n: b for n, b in files_in(out).items() if n.endswith(".tar")} == {
        n: b for n, b in files_in(tmp_path / "here").items() if n.endswith(".tar")
    }


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers find what stands beside the tests
    with Engine(num_workers=1).started() as each:
        assert sorted(each(abs, [-1, 2])) == [1, 2]
        assert list(each(abs, [])) == []
        with pytest.raises(ValueError, match=r"^invalid literal for int\(\) with base 10: 'x'$"):
            list(each(int, ["1", "x"]))
        with pytest.raises(OSError, match="No such file"):
            list(each(os.stat, [str(tmp_path / "gone")]))
        with pytest.raises(OSError, match=r"^here: gone$"):
            list(each(fail_oddly, ["here"]))
        with pytest.raises(OSError, match=r"^a process of Ray's ended \(WorkerCrashedError\): see that memory lasts"):
            list(each(os._exit, [3]))


@pytest.mark.slow
def test_a_worker_with_a_gpu_stays_and_loads_once():
    """Ray counts GPUs as it is told: these are none."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with Engine(num_workers=3, num_gpus=1).started() as each:
            assert len(set(each(methodcaller("__call__"), [os.getpid] * 3))) == 1
        with Engine(num_gpus=2).started() as each, pytest.raises(ValueError, match=r"num_gpus 2 of .* finds 1 in all"):
            list(each(abs, [1]))
    finally:
        ray.shutdown()
