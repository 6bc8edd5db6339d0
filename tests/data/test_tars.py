"""One grouping of a tar's files, whether it is counted, indexed or read from end to end."""

import bz2
import gzip
import lzma
from io import BytesIO

import pytest
from recorder_case import trained
from shards_case import files_of, numbered_samples, write_files

from icd_lightning.data.shards import open_shards
from icd_lightning.data.tars import index_shard, read_samples

GROUPS = {
    "extensions": (["d/a.b.JPG", "d/a.txt", "d.e/f.png"], [("d/a", "b.jpg txt"), ("d.e/f", "png")]),
    "what belongs to none": (["__meta__", "a.jpg", "noextension", ".hidden", "a.", "a.txt"], [("a", "jpg txt")]),
    "macOS": (["d/._a.jpg", "d/a.jpg", "d/._a.txt", "d/a.txt"], [("d/a", "jpg txt")]),
    "Windows": (["Thumbs.db", "d/a.jpg", "d/a.txt", "d/Thumbs.db", "desktop.ini"], [("d/a", "jpg txt")]),
    "a folder": (["./a.jpg", "./a.txt", "./b.jpg"], [("a", "jpg txt"), ("b", "jpg")]),
    "underscores": (["__a__1.jpg", "__a__1.txt", "__b__.jpg"], [("__a__1", "jpg txt"), ("__b__", "jpg")]),
    "a name twice": (["a.jpg", "a.jpg", "a.txt"], [("a", "jpg"), ("a", "jpg txt")]),
    "a key twice": (["a.jpg", "a.txt", "b.jpg", "a.jpg", "a.txt"], [("a", "jpg txt"), ("b", "jpg"), ("a", "jpg txt")]),
}  # fmt: skip


def contents(raw: dict) -> tuple[str, str]:
    return raw["__key__"], " ".join(name for name in raw if not name.startswith("__"))


@pytest.mark.parametrize("case", GROUPS)
def test_index_and_stream_group_alike(tmp_path, case):
    names, expected = GROUPS[case]
    path = write_files(tmp_path / "0.tar", [(name, name.encode()) for name in names])
    entries, damage = index_shard(path)
    with path.open("rb") as file:
        streamed = list(read_samples(file, str(path)))
    assert [entry.read() for entry in entries] == streamed
    assert [contents(raw) for raw in streamed] == expected
    assert damage is None


@pytest.mark.parametrize(
    "names", [["a.jpg", "b.jpg", "a.txt", "b.txt"], ["b.jpg", "a.txt", "b.txt", "a.jpg"], ["a.jpg", "b.txt", "a.json"]]
)
def test_a_sample_in_two_places_is_refused_by_all(tmp_path, names):
    path = write_files(tmp_path / "0.tar", [(name, b"x") for name in names])
    with pytest.raises(ValueError, match=r"0\.tar: its files are not sorted by name .*: sort it by `mkdir"):
        index_shard(path)
    with pytest.raises(ValueError, match="not sorted by name"):
        open_shards(str(path))
    with pytest.raises(ValueError, match="not sorted by name"), path.open("rb") as file:
        list(read_samples(file, str(path)))


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, bz2.compress, lzma.compress])
def test_a_stream_may_be_compressed(tmp_path, pack):
    path = write_files(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.txt", b"y")])
    (raw,) = read_samples(BytesIO(pack(path.read_bytes())), "u")
    assert raw == {"__key__": "a", "__url__": "u", "jpg": b"x", "txt": b"y"}


def test_a_tar_of_macos_is_counted_and_trained_on_whole(tmp_path):
    files = [(f"pictures/{mark}{name}", b"?" if mark else data) for name, data in files_of(numbered_samples(16))
             for mark in ("._", "")]  # fmt: skip
    (tmp_path / "set").mkdir()
    write_files(tmp_path / "set" / "00000.tar", [(name.replace("pictures/0", "0"), data) for name, data in files])
    (shard,) = open_shards(str(tmp_path / "set"))
    assert shard.samples == 16
    assert trained(tmp_path / "set", tmp_path, batch_size=4) == list(range(16))
