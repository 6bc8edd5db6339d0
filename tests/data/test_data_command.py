import numpy as np
import pytest
from PIL import Image
from shards_case import samples_of

from icd_lightning.commands.data import describe, index, shapes
from icd_lightning.commands.main import main
from icd_lightning.data.manifest import Manifest
from icd_lightning.data.shards import encode_sample
from icd_lightning.data.tars import write_tar
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import Scene, scene_at


def test_shapes_writes_the_scenes_of_its_seed(tmp_path):
    from io import BytesIO
    from json import loads

    shapes(str(tmp_path), count=25, shard_size=10, seed=3, num_workers=1)
    samples = samples_of(tmp_path)
    assert [sample["__key__"] for sample in samples] == [f"{n:08d}" for n in range(25)]
    for number, sample in enumerate(samples):
        scene = Scene.from_dict(loads(sample["json"]))
        assert scene == scene_at(3, number)
        assert sample["txt"].decode() == scene.caption()
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(sample["png"]))), render(scene))


def test_the_number_of_workers_changes_nothing(tmp_path):
    for workers in (1, 2):
        shapes(str(tmp_path / str(workers)), count=210, size=8, shard_size=150, num_workers=workers)
    assert Manifest.load(tmp_path / "1") == Manifest.load(tmp_path / "2")
    assert Manifest.load(tmp_path / "1").samples == 210


def test_shapes_keeps_what_it_wrote_before_and_says_so(tmp_path, capsys):
    shapes(str(tmp_path), count=5, format="jpg", num_workers=1)
    before = (tmp_path / "00000.tar").stat()
    shapes(str(tmp_path), count=5, format="jpg", num_workers=1)
    assert "already" in capsys.readouterr().out
    assert (tmp_path / "00000.tar").stat() == before
    with pytest.raises(ValueError, match=r"count 5, not 6.*--overwrite"):
        shapes(str(tmp_path), count=6, format="jpg", num_workers=1)
    shapes(str(tmp_path), count=6, format="jpg", overwrite=True, num_workers=1)
    assert Manifest.load(tmp_path).samples == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count 0 must be at least 1"),
        ({"shard_size": 0}, "shard_size 0 must be at least 1"),
        ({"size": 7}, "size 7 must be at least 8"),
        ({"seed": -1}, "seed -1 must be at least 0"),
        ({"format": "gif"}, "format 'gif' is not one of png, jpg"),
    ],
)
def test_shapes_refuses_wrong_values_and_touches_nothing(tmp_path, options, message):
    shapes(str(tmp_path), count=5, num_workers=1)
    with pytest.raises(ValueError, match=message):
        shapes(**({"out": str(tmp_path), "count": 5, "overwrite": True} | options))
    assert len(samples_of(tmp_path)) == 5


def test_describe_shows_what_is_there_and_fails_where_the_manifest_does(tmp_path, capsys):
    shapes(str(tmp_path), count=25, shard_size=10, num_workers=1)
    describe(str(tmp_path))
    shown = capsys.readouterr().out
    for part in ("25", "25 png", "64 x 64", "background", "agrees"):
        assert part in shown
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:20000])
    with pytest.raises(
        ValueError, match=r"^1 problem: \S+00001.tar holds \d samples .*; write or copy the shards again"
    ):
        describe(str(tmp_path / "{00000..00001}.tar"), str(tmp_path / "00002.tar"))
    shown = capsys.readouterr().out
    assert "does not agree" in shown
    assert "00001.tar" not in shown  # the error says it


def test_describe_names_five_problems_at_most(tmp_path, capsys):
    shapes(str(tmp_path), count=14, shard_size=2, num_workers=1)
    for shard in tmp_path.glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(
        ValueError, match=r"^7 problems: (\S+\.tar holds [^;]*; ?){4}\S+00004.tar holds [^;]* and 2 more;"
    ):
        describe(str(tmp_path))


def test_one_shard_is_no_plural(tmp_path, capsys):
    shapes(str(tmp_path), count=1, num_workers=1)
    assert capsys.readouterr().out.replace("\n", "").endswith("holds 1 picture in 1 shard")


def test_the_command_line(tmp_path, capsys):
    main(["data", "shapes", "--out", str(tmp_path), "--count", "5", "--format", "jpg"])
    main(["data", "shapes", "--out", str(tmp_path), "--count", "6", "--overwrite"])
    main(["data", "describe", str(tmp_path)])
    assert "6 png" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["data", "shapes", "--out", str(tmp_path), "--count", "7"])
    assert stopped.value.code == 2
    assert "count 6, not 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"png": b"GIF89a"}, "corrupt_image"),
        ({"txt": "caf\ufffd".encode()}, "bad_caption"),
        ({"json": b"["}, "corrupt_json"),
    ],
)
def test_why_samples_cannot_be_used_is_said_where_one_is_sent(tmp_path, capsys, files, why):
    sample = encode_sample("0", np.zeros((8, 8, 3), np.uint8), "a cat", {}) | files
    write_tar([sample], tmp_path / "0.tar")
    with pytest.raises(ValueError, match=rf"none of 1 sample can be used \({why} 1\): see `icd data describe`"):
        index(str(tmp_path))
    with pytest.raises(ValueError, match=rf"1 problem: {why}: 0 of \S+0.tar: "):
        describe(str(tmp_path))


def test_empty_shards_are_not_indexed_in_silence(tmp_path):
    write_tar([], tmp_path / "0.tar")
    with pytest.raises(ValueError, match=r"none of 0 samples can be used \(the shards are empty\)"):
        index(str(tmp_path))
