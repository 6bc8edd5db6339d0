import hashlib
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from PIL import Image
from shards_case import cut_after, numbered_samples

from icd_lightning.data.manifest import MANIFEST, Manifest
from icd_lightning.data.shards import (
    describe_shards,
    encode_sample,
    find_reusable,
    find_shards,
    open_shards,
    write_shards,
)
from icd_lightning.data.tars import index_shard

PARAMETERS = {"seed": 0}


def test_webdataset_reads_what_was_written(shards):
    read = list(webdataset.WebDataset(str(shards / "{00000..00005}.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in read] == [f"{n:05d}" for n in range(60)]
    assert read[7]["txt"] == "picture 7"
    assert read[7]["json"]["number"] == 7
    np.testing.assert_array_equal(read[7]["png"], np.full((8, 8, 3), 7))


def test_png_keeps_every_pixel_and_jpg_nearly(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for format, tolerance in (("png", 0), ("jpg", 40)):
        (tmp_path / format).write_bytes(encode_sample("a", picture, "", {}, format=format)[format])
        decoded = np.asarray(Image.open(tmp_path / format)).astype(int)
        assert np.abs(decoded - picture).max() <= tolerance


def test_manifest_says_what_the_shards_hold(shards):
    manifest = Manifest.load(shards)
    assert manifest.complete
    assert manifest.samples == 60
    assert list(manifest.shards) == [f"{n:05d}.tar" for n in range(6)]
    for name, record in manifest.shards.items():
        content = (shards / name).read_bytes()
        assert record.bytes == len(content)
        assert record.sha256 == hashlib.sha256(content).hexdigest()


def test_equal_samples_give_equal_bytes(shards, tmp_path):
    again = write_shards(numbered_samples(60), tmp_path / "again", shard_size=10, parameters=PARAMETERS)
    assert again == Manifest.load(shards)
    assert (shards / MANIFEST).read_bytes() == (tmp_path / "again" / MANIFEST).read_bytes()


def test_samples_are_streamed_shard_by_shard(tmp_path):
    def samples():
        for number, sample in enumerate(numbered_samples(25)):
            assert len(list(tmp_path.glob("*.tar"))) == number // 10
            yield sample

    manifest = write_shards(samples(), tmp_path, shard_size=10, parameters={})
    assert [record.samples for record in manifest.shards.values()] == [10, 10, 5]


def test_a_stopped_writer_leaves_whole_shards_and_starts_again(tmp_path):
    def stopped():
        yield from numbered_samples(15)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(stopped(), tmp_path, shard_size=10, parameters=PARAMETERS)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["00000.tar"]
    assert len(index_shard(tmp_path / "00000.tar")[0]) == 10
    with pytest.raises(ValueError, match="unfinished set"):
        open_shards(str(tmp_path))
    manifest = write_shards(numbered_samples(15), tmp_path, shard_size=10, parameters=PARAMETERS)
    assert manifest.complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", MANIFEST]


def test_a_set_that_is_there_is_reused_without_drawing_samples(shards):
    assert write_shards(iter([]), shards, shard_size=10, parameters=PARAMETERS) == Manifest.load(shards)


def test_a_damaged_set_is_written_again(shards):
    cut_after(shards / "00003.tar", 5)
    assert find_reusable(shards, PARAMETERS) is None
    assert write_shards(numbered_samples(60), shards, shard_size=10, parameters=PARAMETERS).samples == 60
    assert len(open_shards(str(shards), verify="sha256")) == 6


def test_another_set_is_replaced_only_when_asked(shards, tmp_path):
    with pytest.raises(ValueError, match=r"seed 0, not 1.*--overwrite"):
        write_shards(numbered_samples(5), shards, shard_size=5, parameters={"seed": 1})
    assert write_shards(numbered_samples(5), shards, shard_size=5, parameters={"seed": 1}, overwrite=True).samples == 5
    assert len(list(shards.glob("*.tar"))) == 1
    (shards / MANIFEST).unlink()
    with pytest.raises(ValueError, match=f"without a {MANIFEST}"):
        write_shards(numbered_samples(5), shards, shard_size=5, parameters={"seed": 1})


def test_bad_requests_to_the_writer(tmp_path):
    options = {"shard_size": 1, "parameters": {}}
    with pytest.raises(ValueError, match="shard_size 0"):
        write_shards([], tmp_path, shard_size=0, parameters={})
    with pytest.raises(ValueError, match=r"key 00000\.b holds a dot"):
        write_shards([sample | {"__key__": "00000.b"} for sample in numbered_samples(1)], tmp_path, **options)
    with pytest.raises(ValueError, match="no samples"):
        write_shards([], tmp_path, **options)


def test_urls_may_be_a_folder_a_list_or_a_pattern(shards):
    names = [str(shards / f"{n:05d}.tar") for n in range(6)]
    assert find_shards(str(shards)) == names
    assert find_shards(names) == names
    assert find_shards(str(shards / "{00000..00005}.tar")) == names
    assert find_shards(str(shards / "*.tar")) == names
    assert find_shards([str(shards / "{00000..00001}.tar"), "pipe:cat x.tar"]) == [*names[:2], "pipe:cat x.tar"]


def test_missing_and_repeated_shards_are_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"00006.tar and 3 more shards do not exist"):
        find_shards(str(shards / "{00000..00009}.tar"))
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        find_shards(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no .tar shards in"):
        find_shards(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file matches .*/x\*.tar"):
        find_shards(str(shards / "x*.tar"))
    for nothing in ([], "", [""]):
        with pytest.raises(ValueError, match="name no shards"):
            find_shards(nothing)
    with pytest.raises(ValueError, match=r"00000.tar 2 times"):
        find_shards([str(shards), str(shards / "00000.tar")])
    (shards / "00004.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"00004.tar does not exist"):
        find_shards(str(shards))


def test_a_shard_that_disagrees_with_the_manifest_is_refused(shards):
    assert [shard.samples for shard in open_shards(str(shards))] == [10] * 6
    cut_after(shards / "00002.tar", 7)
    with tarfile.open(shards / "00002.tar") as tar:  # as a tar it is whole
        assert len(tar.getnames()) == 21
    for verify in ("bytes", "count", "sha256"):
        with pytest.raises(ValueError, match=r"00002.tar holds 7 samples .* says 10 "):
            open_shards(str(shards), verify=verify)
    assert len(open_shards(str(shards), verify="off")) == 6


def test_wrong_counts_hashes_and_unlisted_shards_are_refused(shards):
    manifest = Manifest.load(shards)
    wrong = replace(manifest.shards["00001.tar"], samples=11)
    replace(manifest, shards=manifest.shards | {"00001.tar": wrong}).save(shards)
    assert len(open_shards(str(shards), verify="bytes")) == 6
    with pytest.raises(ValueError, match=r"00001.tar holds 10 samples .* says 11"):
        open_shards(str(shards))
    manifest.save(shards)

    content = bytearray((shards / "00001.tar").read_bytes())
    content[520] ^= 1
    (shards / "00001.tar").write_bytes(content)
    assert len(open_shards(str(shards))) == 6
    with pytest.raises(ValueError, match="another sha256"):
        open_shards(str(shards), verify="sha256")

    shutil.copy(shards / "00000.tar", shards / "new.tar")
    with pytest.raises(ValueError, match=r"new.tar is not in its folder's manifest.json"):
        open_shards(str(shards))
    (shards / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        open_shards(str(shards))


def test_without_a_manifest_the_headers_are_counted(shards, caplog):
    (shards / MANIFEST).unlink()
    (shards / "00005.tar").write_bytes((shards / "00005.tar").read_bytes()[:5000])
    counts = [shard.samples for shard in open_shards([str(shards), "pipe:cat x.tar"])]
    assert counts[:5] == [10] * 5
    assert 0 < counts[5] < 10
    assert counts[6] is None
    assert "00005.tar: it is damaged after" in caplog.text


def test_a_file_that_ends_early_is_noticed(shards):
    path = shards / "00000.tar"
    entries, problem = index_shard(path)
    assert len(entries) == 10
    assert problem is None
    cut_after(path, 4)
    path.write_bytes(path.read_bytes()[:-1024])
    assert index_shard(path)[1] == "it was cut short after 4 samples"


def test_describe(shards):
    rows, problems = describe_shards(str(shards), examples=2)
    assert problems == []
    assert rows[-3:] == [("caption", "picture 0"), ("caption", "picture 5"), ("manifest", "agrees")]
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    expected = {"shards": "6", "samples": "60", "bytes": f"{size:,}", "files": "60 png, 60 json, 60 txt"}
    assert dict(rows[:5]) == expected | {"sizes": "8 x 8"}
    cut_after(shards / "00002.tar", 7)
    rows, problems = describe_shards(str(shards))
    assert "00002.tar holds 7 samples" in problems[0]
    assert rows[-1] == ("manifest", "does not agree")
    (shards / MANIFEST).unlink()
    assert describe_shards(str(shards))[0][-1][1].startswith("none beside")
    with pytest.raises(ValueError, match="not a local file"):
        describe_shards("pipe:cat x.tar")
