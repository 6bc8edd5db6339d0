"""What is known of shards before they are read."""

import json
import os
import shutil
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from ranks_case import run_ranks
from recorder_case import Recorder, data_for, trainer_for
from safetensors.numpy import load, save
from shards_case import numbered_samples, samples_of, write_files

from icd_lightning.commands.main import main
from icd_lightning.data import index as indexing
from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.index import count_samples, open_indexes
from icd_lightning.data.shards import find_shards, write_shards
from icd_lightning.data.stream import TrainStream
from icd_lightning.data.tally import REASONS, NothingToReadError, RejectedError
from icd_lightning.data.tars import INDEX, parse_sample, read_ranges


def photo(format: str, *, turned: bool = False, **options) -> bytes:
    image, exif = Image.fromarray(np.zeros((40, 60, 3), np.uint8)), Image.Exif()
    if turned:
        exif[0x0112] = 6
    stream = BytesIO()
    image.save(stream, format, exif=exif, **options)
    return stream.getvalue()


SAMPLES = {
    "jpeg": {"jpg": photo("JPEG"), "txt": b"one"},
    "turned": {"jpg": photo("JPEG", turned=True), "txt": b"one"},
    "png turned": {"png": photo("PNG", turned=True), "txt": b"one"},
    "webp": {"webp": photo("WEBP"), "txt": b"one"},
    "large profile": {"jpg": photo("JPEG", icc_profile=bytes(200_000)), "txt": b"one"},
    "caption": {"png": photo("PNG"), "caption": b"one"},
    "other files": {"png": photo("PNG"), "cls": b"3", "mp4": bytes(5000), "txt": b"one"},
    "no caption": {"png": photo("PNG")},
    "no picture": {"txt": b"one"},
    "no image": {"png": b"?", "txt": b"one"},
    "no json": {"png": photo("PNG"), "txt": b"one", "json": b"["},
    "utf-16": {"png": photo("PNG"), "txt": "one".encode("utf-16")},
    "title": {"png": photo("PNG"), "json": b'{"title": "one"}'},
}


@pytest.fixture
def various(tmp_path) -> Path:
    samples = [{"__key__": f"{n:03d} of a rather long name " * 5, **files} for n, files in enumerate(SAMPLES.values())]
    write_shards(samples, tmp_path / "set", shard_size=5, parameters={})
    return tmp_path / "set"


@pytest.mark.parametrize("field", [None, "title"])
def test_an_index_says_of_each_sample_what_reading_it_would(various, field):
    urls, decoder = find_shards(str(various)), SampleDecoder(8, field)
    found = []
    for url, index in zip(urls, open_indexes(urls, field), strict=True):
        for offset, length, _, size, reason in zip(*index[:5], strict=True):
            raw = parse_sample(read_ranges([(url, int(offset), int(length))])[0], url)
            found.append(raw)
            if reason < 0:
                assert decoder.open(raw).size == tuple(size)
                continue
            with pytest.raises(RejectedError, match=f"^{REASONS[reason]}: "):
                decoder.open(raw)
    assert found == samples_of(various)


def test_the_size_of_a_turned_picture_is_that_of_the_upright_one(various):
    sizes = np.concatenate([index.size for index in open_indexes(find_shards(str(various)), None)])
    assert sizes[:6].tolist() == [[40, 60], [60, 40], [60, 40], [40, 60], [40, 60], [40, 60]]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(f"*{INDEX}")}


def test_an_index_is_made_once_and_anew_for_another_shard_or_other_captions(various, monkeypatch):
    made = []
    make = indexing._scan
    monkeypatch.setattr(indexing, "_scan", lambda path, field: made.append((path.name, field)) or make(path, field))
    urls = find_shards(str(various))
    open_indexes(urls, None)
    open_indexes(urls, None)
    assert made == [(f"0000{n}.tar", None) for n in range(3)]
    shutil.copytree(various, various.parent / "copy")
    open_indexes(find_shards(str(various.parent / "copy")), None)
    assert len(made) == 3
    write_shards(numbered_samples(5), various.parent / "other", shard_size=5, parameters={})
    shutil.copy(various.parent / "other" / "00000.tar", various / "00001.tar")
    assert len(open_indexes(urls, None)[1].offset) == 5
    assert made[3:] == [("00001.tar", None)]
    open_indexes(urls, "title")
    assert made[4:] == [(f"0000{n}.tar", "title") for n in range(3)]


@pytest.mark.parametrize("parallel", [False, True])
def test_indexes_are_the_same_by_however_many_processes(various, monkeypatch, parallel):
    monkeypatch.setattr(indexing, "BYTES_FOR_PROCESSES", 0 if parallel else 1 << 40)
    open_indexes(find_shards(str(various)), None)
    assert len(times(various)) == 3
    assert sum(count_samples(Path(url))[0] for url in find_shards(str(various))) == len(SAMPLES)


def lying(change):
    """What makes of an index one whose columns are changed, with the same words about it."""
    return lambda content: save(change(load(content)), told(content))


def told(content: bytes) -> dict:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


HOSTILE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "text": lambda content: b"no index " * 100,
    "words missing": lambda content: save(load(content)),
    "column missing": lying(lambda a: {n: v for n, v in a.items() if n != "size"}),
    "one column more": lying(lambda a: a | {"more": a["size"]}),
    "another type": lying(lambda a: a | {"offset": a["offset"].astype(np.float32)}),
    "another form": lying(lambda a: a | {"size": a["size"][:, :1].copy()}),
    "shorter": lying(lambda a: a | {"length": a["length"][:-1].copy()}),
    "before the file": lying(lambda a: a | {"offset": a["offset"] - 512}),
    "all memory": lying(lambda a: a | {"length": a["length"] + (1 << 50)}),
    "no pixels": lying(lambda a: a | {"size": a["size"] * 0}),
    "other reasons": lambda content: save(load(content), told(content) | {"reasons": "no_image"}),
    "other kind": lambda content: save(load(content), told(content) | {"kind": "films"}),
    "unknown reason": lying(lambda a: a | {"reason": a["reason"] + 100}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_is_none_is_made_anew(shards, name):
    urls = find_shards(str(shards))
    good = open_indexes(urls, None)
    file = shards / f"00002{INDEX}"
    file.write_bytes(HOSTILE[name](file.read_bytes()))
    for one, again in zip(good, open_indexes(urls, None), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one[:5], again[:5], strict=True))
    assert load(file.read_bytes())["offset"].tolist() == good[2].offset.tolist()


def test_an_index_that_names_other_samples_of_its_shard_trains_on_none_of_its_lies(shards):
    """Each sample is checked again when it is read."""
    open_indexes(find_shards(str(shards)), None)
    file = shards / f"00002{INDEX}"
    file.write_bytes(lying(lambda a: a | {"offset": a["offset"] + 512})(file.read_bytes()))
    data = data_for(shards)
    data.setup("fit")
    seen = [int(key) for batch in data.train_dataloader() for key in batch.keys]
    assert set(seen) >= {*range(20), *range(30, 60)}
    assert data.train_tally.counts()["broken_shard"] >= 10


def test_where_nobody_may_write_the_index_is_kept_among_the_users_caches(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = indexing.write_whole

    def refuse(path, *args):
        if path.parent == shards:
            raise PermissionError(f"{path} is read-only")
        return write(path, *args)

    monkeypatch.setattr(indexing, "write_whole", refuse)
    urls = find_shards(str(shards))
    open_indexes(urls, None)
    assert not times(shards)
    assert len(times(tmp_path / "cache" / "icd_lightning")) == 6
    monkeypatch.setattr(indexing, "_scan", None)
    assert len(open_indexes(urls, None)) == 6


def _train(rank, shards, noted):
    scan = indexing._scan

    def noted_scan(path, field):
        with noted.open("a") as file:
            file.write(f"{path.name}\n")
        return scan(path, field)

    indexing._scan = noted_scan
    trainer = trainer_for(shards.parent, devices=2, strategy="ddp", max_epochs=1)
    trainer.fit(Recorder(), datamodule=data_for(shards))


def test_one_rank_makes_the_index_for_all(shards, tmp_path):
    assert run_ranks(_train, shards, tmp_path / "made.txt") == [0, 0]
    assert sorted((tmp_path / "made.txt").read_text().split()) == [f"0000{n}.tar" for n in range(6)]


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(shards):
    """The shards with their indexes in fsspec's store in memory."""
    open_indexes(find_shards(str(shards)), None)
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/indexed/{path.name}", path.read_bytes())
    yield memory
    memory.rm("/indexed", recursive=True)


def test_shards_elsewhere_with_indexes_give_the_batches_of_local_ones(shards, store, tmp_path):
    here, there = Recorder(), Recorder()
    trainer_for(tmp_path).fit(here, datamodule=data_for(shards))
    data = data_for("memory://indexed/{00000..00005}.tar")
    trainer_for(tmp_path).fit(there, datamodule=data)
    assert isinstance(data.stream, TrainStream)
    assert here.trained == there.trained


def test_a_shard_elsewhere_without_an_index_makes_all_uncounted(store):
    store.rm(f"/indexed/00003{INDEX}")
    with pytest.raises(ValueError, match=r"how many samples .*00000.tar holds is not known .*icd data index"):
        data_for("memory://indexed/{00000..00005}.tar").setup("fit")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_makes_indexes_and_says_what_can_be_used(various, capsys):
    main(["data", "index", str(various)])
    said = " ".join(capsys.readouterr().out.split())
    assert "13 samples in 3 shards are indexed, 7 of them can be used" in said
    assert said.endswith("not: no_image 1, no_caption 2, bad_caption 1, corrupt_image 1, corrupt_json 1")
    assert len(times(various)) == 3


def test_the_command_cannot_write_elsewhere(store, capsys):
    store.rm(f"/indexed/00003{INDEX}")
    with pytest.raises(SystemExit):
        main(["data", "index", "memory://indexed/{00000..00005}.tar"])
    assert "index them where they are local, and copy the" in capsys.readouterr().err


# --- shards and indexes that do not belong together -------------------------------------------------------------------


def test_a_shard_mended_in_one_sample_has_another_index(shards):
    """Tars are filled up with zeros, so that a mended one is often as long as before."""
    urls = find_shards(str(shards))
    before = [index.reason.tolist() for index in open_indexes(urls, None)]
    longer = numbered_samples(60)
    longer[33]["txt"] = b"x" * 600
    write_shards(longer, shards, shard_size=10, parameters={"seed": 0}, overwrite=True)
    data = data_for(shards)
    data.setup("fit")
    assert sorted(int(key) for batch in data.train_dataloader() for key in batch.keys) == list(range(60))
    assert data.train_tally.counts()["broken_shard"] == 0
    assert [index.reason.tolist() for index in open_indexes(urls, None)] == before


def test_no_caption_goes_to_another_picture_by_an_index_that_lies(tmp_path):
    """All samples have one key, and the index begins each at its caption."""
    samples = [sample | {"__key__": "x"} for sample in numbered_samples(4)]
    files = [(f"x.{name}", sample[name]) for sample in samples for name in ("png", "txt", "json")]
    write_files(tmp_path / "0.tar", files)
    open_indexes([str(tmp_path / "0.tar")], None)
    file = tmp_path / f"0{INDEX}"
    file.write_bytes(lying(lambda a: a | {"offset": a["offset"] + 1024})(file.read_bytes()))
    data = data_for(tmp_path, batch_size=1, batches_per_epoch=4)
    data.setup("fit")
    with pytest.raises(NothingToReadError, match="another header"):
        list(data.train_dataloader())


def test_an_index_that_lies_about_a_size_spoils_no_batch(tmp_path):
    write_shards(
        [*numbered_samples(8, size=64), *numbered_samples(8, first=8, size=96)], tmp_path, shard_size=16, parameters={}
    )
    open_indexes(find_shards(str(tmp_path)), None)
    file = tmp_path / f"00000{INDEX}"
    swapped = [[96, 48]] * 4 + [[64, 64]] * 12
    file.write_bytes(lying(lambda a: a | {"size": np.array(swapped, np.int32)})(file.read_bytes()))
    data = data_for(tmp_path, batch_size=4, resolution=64, buckets=True, min_size=0)
    data.setup("fit")
    keys = {int(key) for batch in data.train_dataloader() for key in batch.keys}
    assert keys == set(range(4, 16))
    assert data.train_tally.counts()["broken_shard"] >= 4


def test_nothing_is_kept_beside_what_is_no_shard(shards, capsys):
    with pytest.raises(SystemExit):
        main(["data", "index", f"{shards}/manifest.json"])
    told = capsys.readouterr()
    assert "1 damaged shard" in told.err
    assert not told.out
    assert not list(shards.glob(f"*{INDEX}"))


def test_indexes_are_no_shards(shards):
    open_indexes(find_shards(str(shards)), None)
    assert find_shards(f"{shards}/0*") == find_shards(str(shards))


@pytest.mark.slow
def test_a_killed_process_ends_the_indexing_with_one_line(shards, monkeypatch):
    monkeypatch.setattr(indexing, "BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr(indexing.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(indexing, "_scan", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(OSError, match="one of 2 processes was killed"):
        open_indexes(find_shards(str(shards)), None)


def test_an_index_under_the_name_of_other_captions_is_not_taken(various):
    url = find_shards(str(various))[0]
    (plain,) = open_indexes([url], None)
    shutil.copy(indexing.beside(url), indexing.beside(url, "title"))
    (titled,) = open_indexes([url], "title")
    assert titled.reason.tolist() != plain.reason.tolist()
