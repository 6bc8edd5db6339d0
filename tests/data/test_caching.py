"""Caching latents at scale: side by side to the same bytes, in bounded memory, to any store; losses are told of."""

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from running_case import running, wait_for_file
from shards_case import corrupt, cut_after, numbered_samples

from icd_lightning.commands.main import main
from icd_lightning.data import latents, manifest
from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.latents import Caching, Encoders, cache_latents
from icd_lightning.data.manifest import MANIFEST, PROGRESS, Manifest
from icd_lightning.data.shards import write_shards
from icd_lightning.data.tally import NothingToReadError

VAE = Path(latents.__file__).parents[1] / "weights" / "tiny" / "vae"


class KilledError(Exception):
    pass


def moments(images):
    """As an encoder would: (B, 3, 1, 1)."""
    return images[:, :, ::8, ::8]


def cache(urls, out, encode=moments, **options) -> Manifest:
    urls = [str(url) for url in urls] if isinstance(urls, list) else str(urls)
    how = {name: options.pop(name) for name in ("part", "overwrite") if name in options}
    caching = Caching(Encoders("x", encode), **{"decoder": SampleDecoder(8), "batch_size": 4} | options)
    return cache_latents(urls, out, caching, **how)


def dying(after: int, error: type[BaseException] = KilledError):
    """An encoder that dies after so many batches."""
    left = [after]

    def encode(images):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return moments(images)

    return encode


def counting(seen: list):
    return lambda images: seen.append(len(images)) or moments(images)


def files_of(folder) -> dict[str, bytes]:
    """All files under a folder or the url of one, by their path in it."""
    system, path = fsspec.url_to_fs(str(folder))
    return {found.removeprefix(path): system.cat_file(found) for found in system.find(path)}


@pytest.fixture
def bare(shards) -> Path:
    """60 samples in 6 shards, some of which cannot be decoded, without a manifest."""
    samples = [corrupt(sample) if number % 7 == 3 else sample for number, sample in enumerate(numbered_samples(60))]
    write_shards(samples, shards, shard_size=10, parameters={}, overwrite=True)
    (shards / MANIFEST).unlink()
    return shards


@pytest.fixture
def store():
    yield "memory://bucket/set"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


# --- side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_write_the_bytes_that_one_thread_writes(bare, tmp_path, caplog, num_workers):
    said = []
    (bare / "00002.tar").write_bytes((bare / "00002.tar").read_bytes()[:9000])
    for number in (0, num_workers):
        caplog.clear()
        cache(bare, tmp_path / str(number), num_workers=number, allow_broken=True)
        said.append([record.getMessage().replace(f"/{number} ", "/N ") for record in caplog.records])
    one, several = (files_of(tmp_path / str(number)) for number in (0, num_workers))
    assert one == several
    assert len(one) == 7
    assert said[0] == said[1]
    assert "left out: corrupt_image 8, broken_shard 1" in said[0]


def test_what_is_not_needed_yet_is_not_decoded(tmp_path, monkeypatch):
    decoded, decode, waiting = [], SampleDecoder.decode, []
    monkeypatch.setattr(SampleDecoder, "decode", lambda self, raw: decoded.append(raw) or decode(self, raw))
    write_shards(numbered_samples(60), tmp_path / "one", shard_size=60, parameters={})
    most = 2 * 2 + 2 * 2  # batches at work and next, and two pictures a thread

    def encode(images):
        if not waiting:
            deadline = time.monotonic() + 10
            while len(decoded) < most and time.monotonic() < deadline:  # the threads go on meanwhile
                time.sleep(0.01)
            time.sleep(0.3)
            waiting.append(len(decoded))
        return moments(images)

    cache(tmp_path / "one", tmp_path / "out", encode, batch_size=2, num_workers=2)
    assert waiting == [most]
    assert len(decoded) == 60


@pytest.mark.parametrize("error", [KilledError, KeyboardInterrupt, SystemExit])
def test_an_error_of_the_encoder_keeps_whole_shards_and_no_other(bare, tmp_path, error):
    before = threading.active_count()
    with pytest.raises(error):
        cache(bare, tmp_path, dying(7, error))
    assert threading.active_count() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "shards") == [
        PROGRESS,
        "00000.tar",
        "00001.tar",
        MANIFEST,
    ]
    encoded = []
    assert cache(bare, tmp_path, counting(encoded)).complete
    assert sum(encoded) == 51 - 9 - 8


@pytest.mark.parametrize("where", ["decoder", "writer", "record"])
def test_an_error_of_any_thread_comes_out_as_it_is(bare, tmp_path, monkeypatch, where):
    def fail(*_):
        raise OSError(f"{where} failed")

    before = threading.active_count()
    owner = {"decoder": SampleDecoder, "writer": manifest, "record": manifest}[where]
    name = {"decoder": "decode", "writer": "write_shard", "record": "write_json"}[where]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match=f"^{where} failed$"):
        cache(bare, tmp_path / "out")
    assert threading.active_count() == before
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_an_interruption_does_not_wait_for_a_source_that_hangs(bare, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    start = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            cache([f"pipe:true; cat {bare}/00000.tar", f"pipe:sleep 9; cat {bare}/00001.tar"], tmp_path / "out")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MANIFEST, PROGRESS, "00000.tar"}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_nothing_half_written(tmp_path, number, code):
    write_shards(numbered_samples(4000, size=64), tmp_path / "pictures", shard_size=4000, parameters={})
    options = [tmp_path / "pictures", "--out", tmp_path / "out", "--vae", VAE, "--device", "cpu"]
    command = [sys.executable, "-m", "icd_lightning.commands.main", "data", "cache-latents", *map(str, options)]
    with running(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_file(process, tmp_path, "out/.00000.tar-*.tmp")
        process.send_signal(number)
        start = time.monotonic()
        assert process.wait(60) == code
        assert time.monotonic() - start < 10
        assert "Traceback" not in process.stderr.read()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MANIFEST]


def test_a_silent_source_is_given_up(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PATIENCE", 0.4)
    with pytest.raises(NothingToReadError, match=r"no sample that can be used was found for 0\.4 s"):
        cache([f"pipe:true; cat {bare}/00000.tar", f"pipe:sleep 9; cat {bare}/00001.tar"], tmp_path / "silent")


@pytest.mark.parametrize(("shard_size", "bad"), [(10, 7), (4, 4)])
def test_the_time_that_an_encoder_takes_is_no_silence(tmp_path, monkeypatch, shard_size, bad):
    """The next picture after the first batch, of this shard or of the next, is no good."""
    samples = [corrupt(sample) if number == bad else sample for number, sample in enumerate(numbered_samples(10))]
    write_shards(samples, tmp_path / "pictures", shard_size=shard_size, parameters={})
    monkeypatch.setattr(latents, "PATIENCE", 0.6)
    sleepy = iter([1.0])
    encode = lambda images: time.sleep(next(sleepy, 0)) or moments(images)  # noqa: E731
    assert cache(tmp_path / "pictures", tmp_path / "out", encode, batch_size=2).samples == 9


# --- broken shards ----------------------------------------------------------------------------------------------------


def cut_at(end: int):
    return lambda path: path.write_bytes(path.read_bytes()[:end])


def without_end(path: Path) -> None:
    """Cut between two samples, so that all that is there can be read."""
    cut_after(path, 6)
    path.write_bytes(path.read_bytes()[:-1024])


@pytest.mark.parametrize("cut", [cut_at(9000), cut_at(100), without_end])
def test_a_cut_shard_is_named_and_not_done_before_it_is_mended(bare, tmp_path, cut, caplog):
    whole, url, out = (bare / "00003.tar").read_bytes(), bare / "00003.tar", tmp_path / "out"
    cut(url)
    named = (
        rf"{out} lacks the latents of shards that cannot be read to their end \({url}\): write or copy .*allow_broken"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=named):
            cache(bare, out)
        assert len(list(out.glob("*.tar"))) == 5
        assert not Manifest.load(out).complete
    url.write_bytes(whole)
    encoded = []
    assert cache(bare, out, counting(encoded)).complete
    assert sum(encoded) == 8
    cut(url)
    shutil.rmtree(out)
    with caplog.at_level(logging.WARNING):
        assert cache(bare, out, allow_broken=True).complete
    assert f"{out} holds what could be read of shards that cannot be read to their end ({url})" in caplog.messages
    assert "broken_shard 1" in caplog.text


def test_part_of_the_shards_being_broken_is_an_error_of_the_command(bare, tmp_path, capsys):
    without_end(bare / "00001.tar")
    out = ["--out", str(tmp_path / "out"), "--vae", str(VAE), "--min_size", "0"]
    with pytest.raises(SystemExit) as ended:
        main(["data", "cache-latents", str(bare), *out, "--part", "1/2"])
    assert (ended.value.code, f"({bare}/00001.tar): write or copy" in capsys.readouterr().err) == (2, True)
    main(["data", "cache-latents", str(bare), *out, "--part", "1/2", "--allow_broken", "--num_workers", "0"])
    assert "part 1/2 is done" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["data", "cache-latents", str(bare), *out, "--num_workers", "-1"])
    assert "num_workers -1 must be at least 0" in capsys.readouterr().err


# --- elsewhere --------------------------------------------------------------------------------------------------------


def test_a_store_gets_the_files_that_a_folder_gets(bare, tmp_path, store):
    manifest = cache(bare, tmp_path / "out")
    assert cache(bare, store) == manifest
    assert files_of(store) == files_of(tmp_path / "out")
    assert cache(bare, f"{store}/", dying(0)) == manifest  # nothing to do
    assert cache(bare, f"file://{tmp_path}/again") == manifest
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_a_store_goes_on_with_what_is_there(bare, tmp_path, store):
    with pytest.raises(KilledError):
        cache(bare, store, dying(7))
    system = fsspec.filesystem("memory")
    assert sorted(files_of(store)) == [
        f"/{name}" for name in (f"{PROGRESS}/00000.tar.json", f"{PROGRESS}/00001.tar.json", *_tars(2), MANIFEST)
    ]
    system.pipe_file("/bucket/set/00001.tar", b"half")  # as an upload that broke off leaves it
    system.pipe_file("/bucket/set/00002.tar", b"half")
    encoded = []
    manifest = cache(bare, store, counting(encoded))
    assert sum(encoded) == 51 - 9
    assert manifest == cache(bare, tmp_path / "out")
    assert files_of(store) == files_of(tmp_path / "out")


def test_parts_of_a_store_together_make_the_set(bare, tmp_path, store):
    parts = [cache(bare, store, part=(number, 3)) for number in range(3)]
    assert [manifest.complete for manifest in parts] == [False, False, True]
    assert parts[-1] == cache(bare, tmp_path / "out")
    assert files_of(store) == files_of(tmp_path / "out")


def test_an_upload_that_fails_is_no_shard(bare, tmp_path, store, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    system = fsspec.filesystem("memory")
    put = system.put_file

    def refuse(source, goal, **options):
        if goal.endswith("00001.tar"):
            raise RuntimeError("over quota")  # drivers raise what they like
        put(source, goal, **options)

    with monkeypatch.context() as patched:
        patched.setattr(system, "put_file", refuse)
        with pytest.raises(OSError, match=rf"^{store}/00001.tar cannot be written \(RuntimeError: over quota\)$"):
            cache(bare, store)
    assert sorted(files_of(store)) == [f"/{name}" for name in (f"{PROGRESS}/00000.tar.json", *_tars(1), MANIFEST)]
    assert list(temporary.iterdir()) == []
    assert cache(bare, store).complete


def test_what_else_a_store_holds_is_refused(bare, store, tmp_path):
    cache(bare, store)
    with pytest.raises(ValueError, match=f"^{store} holds another set .*min_size.* pass --overwrite"):
        cache(bare, store, decoder=SampleDecoder(8, min_size=0))
    with pytest.raises(ValueError, match=f"to overwrite would remove what other parts write: remove {store} before"):
        cache(bare, store, overwrite=True, part=(0, 2))
    assert cache(bare / "00000.tar", store, decoder=SampleDecoder(8, min_size=0), overwrite=True).complete
    assert sorted(files_of(store)) == ["/00000.tar", f"/{MANIFEST}"]
    for name, content in files_of(bare).items():
        fsspec.filesystem("memory").pipe_file(f"/bucket/pictures{name}", content)
    pictures = "memory://bucket/pictures"
    with pytest.raises(ValueError, match=f"^{pictures} holds the pictures themselves"):
        cache(f"{pictures}/*.tar", pictures, overwrite=True)
    assert files_of(pictures) == files_of(bare)
    assert cache(f"{pictures}/*.tar", "memory://bucket/other").complete
    fsspec.filesystem("memory").rm(f"/bucket/set/{MANIFEST}")
    with pytest.raises(ValueError, match=f"^{store} holds shards without a manifest"):
        cache(bare, store)
    fsspec.filesystem("memory").pipe_file(f"/bucket/set/{MANIFEST}", b"\xff")
    with pytest.raises(ValueError, match=f"^{store}/manifest.json cannot be read"):
        cache(bare, store)


@pytest.mark.parametrize("url", ["pipe:cat > x", "nowhere://bucket/set", "s3:bucket"])
def test_what_cannot_be_written_to_is_refused(bare, url):
    with pytest.raises(ValueError, match=f"^{url} cannot be written to: .*; give a local folder"):
        cache(bare, url)


def _tars(count: int) -> list[str]:
    return [f"{number:05d}.tar" for number in range(count)]
