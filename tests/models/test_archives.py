"""Released archives come whole or not at all, from a real server: broken off, with a wrong sum, or hostile."""

import hashlib
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save
from serving_case import Archives, Quiet, packed, serving

from icd_lightning.models.archives import install
from icd_lightning.models.released import RELEASED, located
from icd_lightning.models.student_file import StudentFile

NAME = "icd-sd15"
ONE = RELEASED[NAME]


def weights(seed: int = 0) -> bytes:
    return save({"unet.weight": torch.randn(4000, generator=torch.Generator().manual_seed(seed))})


def usual(seed: int = 0) -> bytes:
    archive = packed({f"iCD-SD15_4steps_1/{name}": weights(seed + n) for n, name in enumerate(ONE.files)})
    return archive.ljust(40_000, b"\0")  # all of one size


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "icd_lightning" / "released"


@pytest.fixture(params=[True, False], ids=["ranges", "whole files"])
def archives(request, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is written at once
    served = Archives(ranges=request.param)
    served.files[ONE.archive] = usual()
    with serving(served.handler()) as served.url:
        yield served


def content(cache) -> dict[str, bytes]:
    """What a user's cache shows."""
    files = (file for file in cache.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(cache)): file.read_bytes() for file in files}


def test_the_catalogue_names_what_was_released():
    """As the README of the paper's code has it."""
    forward = {"4steps_1": "19_259_519_779", "4steps_2": "19_249_499_699", "3steps": "19_339_699"}
    expected = {
        f"iCD-{family}_{kind}.tar.gz": f"iCD-{family}-forward_{ends}.safetensors"
        for family in ("SD15", "SDXL")
        for kind, ends in forward.items()
    }
    students = [one for one in RELEASED.values() if one.boundaries]
    assert {one.archive: next(iter(one.files)) for one in students} == expected
    for one in students:
        for name, place in one.files.items():
            file = StudentFile({}, 64, 8, {}, path=Path(name))
            assert (tuple(file.boundaries), f"students/{file.direction}/{name}") == ((0, *one.boundaries), place)
        assert [next(iter(part.files)) for part in one.parts[1:]] == [f"{one.family.lower()}_cfg_distill.pt"]


def test_an_archive_becomes_a_folder_and_its_sum_is_kept(archives, cache):
    with pytest.raises(FileNotFoundError, match=r"icd-sd15 is not here yet: `icd download icd-sd15` fetches 3\.5 GB"):
        located(NAME)
    sum_ = hashlib.sha256(archives.files[ONE.archive]).hexdigest()
    assert install(ONE, archives.url) == sum_
    found = content(cache)
    assert found.pop(f"{ONE.archive}.sha256") == f"{sum_}\n".encode()
    assert set(found) == {f"{NAME}/model_index.json"} | {f"{NAME}/{place}" for place in ONE.files.values()}
    assert [found[f"{NAME}/{place}"] for place in ONE.files.values()] == [weights(0), weights(1)]
    assert ONE.here
    assert not list(cache.glob(".*.part")), "the archive goes when its content is here"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(archives, cache):
    archives.cuts = [10_000, 5_000]
    install(ONE, archives.url)
    asked = [asked for _, asked in archives.asked]
    if archives.ranges:
        assert asked == [None, "bytes=10000-", "bytes=15000-"]
    assert content(cache)[f"{NAME}/{ONE.files[next(iter(ONE.files))]}"] == weights()


def test_a_stopped_download_goes_on_in_the_next_call(archives, cache, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", stop)  # what follows a break is a pause: Ctrl-C comes there
    archives.cuts = [10_000]
    with pytest.raises(KeyboardInterrupt):
        install(ONE, archives.url)
    assert content(cache) == {}
    assert [part.stat().st_size for part in cache.glob(".*.part")] == [10_000]
    install(ONE, archives.url)
    assert archives.asked[-1] == (ONE.archive, "bytes=10000-")
    assert ONE.here


def test_what_came_of_another_version_is_not_gone_on_with(archives, cache, monkeypatch):
    test_a_stopped_download_goes_on_in_the_next_call(archives, cache, monkeypatch)
    shutil.rmtree(ONE.folder)
    ONE.record.unlink()
    archives.cuts = [10_000]
    with pytest.raises(KeyboardInterrupt):
        install(ONE, archives.url)
    archives.files[ONE.archive] = usual(seed=5)
    install(ONE, archives.url)
    assert archives.asked[-1] == (ONE.archive, None)
    assert content(cache)[f"{NAME}/{next(iter(ONE.files.values()))}"] == weights(5)


# Sums


def test_what_came_first_binds_later_downloads_unless_another_sum_is_named(archives, cache):
    install(ONE, archives.url)
    before = content(cache)
    archives.files[ONE.archive] = usual(seed=5)
    with pytest.raises(ValueError, match=r"has the SHA-256 \w{64}, and \w{64} is known of it.* --sha256; nothing"):
        install(ONE, archives.url)
    assert content(cache) == before
    assert not list(cache.glob(".*.part"))
    install(ONE, archives.url, known=hashlib.sha256(archives.files[ONE.archive]).hexdigest().upper())
    assert content(cache)[f"{NAME}/{next(iter(ONE.files.values()))}"] == weights(5)
    install(ONE, archives.url)


@pytest.mark.parametrize(
    ("etag", "known", "message"),
    [("0" * 32, None, "has the MD5 .*its server says 0000"), (None, "0" * 64, "has the SHA-256 .*and 0000")],
    ids=["the server's", "a known one"],
)
def test_a_wrong_sum_leaves_nothing(archives, cache, etag, known, message):
    if etag:
        archives.etags[ONE.archive] = etag
    with pytest.raises(ValueError, match=message):
        install(replace(ONE, sha256=known), archives.url)
    assert content(cache) == {}
    assert not list(cache.glob(".*.part"))


def test_an_etag_of_a_file_that_was_uploaded_in_parts_is_no_sum(archives):
    archives.etags[ONE.archive] = "0" * 32 + "-3"
    install(ONE, archives.url)


# Hostile archives


def special(kind: bytes, name: str, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pax() -> tarfile.TarInfo:
    """A file whose attributes are longer than any are."""
    info = tarfile.TarInfo("x")
    info.pax_headers = {"comment": "y" * (2 << 20)}
    return info


FIRST, SECOND = ONE.files
BOTH = {FIRST: weights(), SECOND: weights(1)}
HOSTILE = {
    "a link to a file outside": (packed({FIRST: special(tarfile.SYMTYPE, FIRST, "/etc/passwd")}), "is no plain file"),
    "a link inside": (packed({FIRST: weights(), SECOND: special(tarfile.LNKTYPE, SECOND, FIRST)}), "is no plain file"),
    "a device": (packed({FIRST: special(tarfile.CHRTYPE, FIRST)}), "is no plain file"),
    "a folder": (packed({FIRST: special(tarfile.DIRTYPE, FIRST)}), "is no plain file"),
    "a bomb": (packed({"zeros": b"\0" * (20 << 20), **BOTH}), "unpacks to more than weights come to"),
    "a header of megabytes": (packed({"x": pax(), **BOTH}), "is no archive, or a damaged one"),
    "without one of them": (packed({FIRST: weights()}), f"does not hold {SECOND}"),
    "something else": (packed({FIRST: weights(), SECOND: b"x" * 9000}), f"holds {SECOND}, which are no weights"),
    "no archive": (b"<html>not found</html>" * 9, "is no archive, or a damaged one.* a proxy or a login page may"),
    "cut": (usual()[:-20_000], "is no archive, or a damaged one"),
}


@pytest.mark.parametrize("archives", [True], indirect=True, ids=[""])
@pytest.mark.parametrize(("archive", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_leaves_nothing(archives, cache, archive, message):
    archives.files[ONE.archive] = archive
    with pytest.raises(ValueError, match=message):
        install(ONE, archives.url)
    assert content(cache) == {}
    assert not list(cache.glob(".*.part"))


def test_nothing_is_written_where_an_archive_says(archives, cache, tmp_path):
    members = {"../../../escaped": b"x", str(tmp_path / "absolute"): b"x", f"../../{FIRST}": weights()}
    members["notes.txt"] = b"x"
    archives.files[ONE.archive] = packed({**members, SECOND: weights(1)})
    install(ONE, archives.url)
    everything = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    expected = {f"{NAME}/{place}" for place in ONE.files.values()} | {f"{NAME}/model_index.json"}
    expected |= {f"{ONE.archive}.sha256", f".{NAME}.lock"}
    assert everything == {str((cache / name).relative_to(tmp_path)) for name in expected}


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_runs_nothing(archives, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guided = RELEASED["sd15-cfg-distill"]
    archives.files[guided.archive] = packed({"sd15_cfg_distill.pt": pickle.dumps(Malicious())})
    with pytest.raises(ValueError, match=r"holds sd15_cfg_distill\.pt, which are no weights"):
        install(guided, archives.url)
    assert not (tmp_path / "ran").exists()
    assert content(cache) == {}


# Servers and disks


def test_a_server_that_has_no_such_archive_is_told_of(archives):
    del archives.files[ONE.archive]
    with pytest.raises(OSError, match=r"iCD-SD15_4steps_1\.tar\.gz cannot be downloaded \(.*404.*goes on with it"):
        install(ONE, archives.url)


def test_a_server_out_of_reach_is_told_of(cache):
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9/.* cannot be downloaded .* --host names another place"):
        install(ONE, "http://127.0.0.1:9/")


def test_more_than_the_catalogue_says_is_not_begun(archives):
    with pytest.raises(OSError, match=r"the server says .* bytes, and it has about 1e-06 GB"):
        install(replace(ONE, gigabytes=1e-6), archives.url)
    assert archives.asked == []


def test_a_full_disk_is_told_of_before_anything_comes(archives, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(OSError, match=r"GB are needed in .*, where less is free"):
        install(ONE, archives.url)
    assert archives.asked == []


@pytest.mark.parametrize("archives", [True], indirect=True, ids=[""])
def test_who_waits_takes_what_another_call_brought(archives, cache):
    cache.mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        with WeakFileLock(cache / f".{NAME}.lock"):
            waiting = pool.submit(install, ONE, archives.url, wait=True)
            with pytest.raises(TimeoutError):
                waiting.result(0.3)
            for place in ONE.files.values():
                (ONE.folder / place).parent.mkdir(parents=True)
                (ONE.folder / place).touch()
        waiting.result(20)
    assert archives.asked == []


def test_a_server_that_sends_more_than_it_said_fills_no_disk(archives, cache):
    archives.said[ONE.archive] = 30_000
    with pytest.raises(OSError, match="the server sends more than the 30000 bytes that it said"):
        install(ONE, archives.url)
    assert sum(file.stat().st_size for file in cache.iterdir()) <= 30_000


def test_a_copy_may_be_elsewhere(archives):
    class Elsewhere(Quiet):
        def do_HEAD(self) -> None:  # noqa: N802
            self.answer(302, Location=f"{archives.url}{self.path}")

        do_GET = do_HEAD  # noqa: N815

    with serving(Elsewhere) as url:
        install(ONE, url)
    assert ONE.here


def test_two_calls_at_once_do_not_write_to_one_file(archives, cache):
    cache.mkdir(parents=True)
    with WeakFileLock(cache / f".{NAME}.lock"), pytest.raises(OSError, match="is being downloaded by another call"):
        install(ONE, archives.url)
    install(ONE, archives.url)
