"""Caching latents at scale: side by side to the same bytes, in bounded memory, to any store; losses are told of."""

import logging
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from running_case import running, wait_for_file
from shards_case import corrupt, cut_after, numbered_samples

from icd_lightning.commands.main import main
from icd_lightning.commands.weights import EncoderWeights
from icd_lightning.data import latents, manifest
from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.latents import Caching, Encoders, cache_latents
from icd_lightning.data.manifest import MANIFEST, PROGRESS, Manifest, complete_set, write_recorded
from icd_lightning.data.shards import open_shards, write_shards
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
        signal.setitimer(signal.ITIMER_REAL, 2)
        with pytest.raises(KeyboardInterrupt):
            cache([f"pipe:true; cat {bare}/00000.tar", f"pipe:sleep 19; cat {bare}/00001.tar"], tmp_path / "out")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 12
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


def test_the_time_that_an_encoder_takes_is_no_silence(tmp_path, monkeypatch):
    """The next picture after the first batch is no good."""
    samples = [corrupt(sample) if number == 2 else sample for number, sample in enumerate(numbered_samples(10))]
    write_shards(samples, tmp_path / "pictures", shard_size=10, parameters={})
    monkeypatch.setattr(latents, "PATIENCE", 0.6)
    sleepy = iter([1.0])
    encode = lambda images: time.sleep(next(sleepy, 0)) or moments(images)  # noqa: E731
    assert cache(tmp_path / "pictures", tmp_path / "out", encode, batch_size=2).samples == 9


# --- on the engine of curation ----------------------------------------------------------------------------------------


def command_for(pictures: Path, out: Path, *options: object) -> list[str]:
    return ["data", "cache-latents", *map(str, (pictures, "--out", out, "--vae", VAE, "--device", "cpu", *options))]


def test_further_shards_are_the_only_ones_done(bare, tmp_path):
    """Though the manifest beside them says more of them than before."""
    out, more, encoded = tmp_path / "out", numbered_samples(80, first=60), []
    write_shards(numbered_samples(60), bare, shard_size=10, parameters={"count": 60}, overwrite=True)
    cache(bare, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    write_shards([*numbered_samples(60), *more], bare, shard_size=10, parameters={"count": 140}, overwrite=True)
    with pytest.raises(KilledError):
        cache(bare, out, dying(3))
    with pytest.raises(ValueError, match="holds an unfinished set"):
        open_shards(str(out))
    assert cache(bare, out, counting(encoded)).complete
    assert sum(encoded) == 70
    assert {path: path.stat().st_mtime_ns for path in before} == before
    cache(bare, tmp_path / "at once")
    assert files_of(out) == files_of(tmp_path / "at once")
    write_shards(numbered_samples(60, first=1), bare, shard_size=10, parameters={}, overwrite=True)
    with pytest.raises(ValueError, match=r"shards/0000\d.tar has changed since its latents were made: .*--overwrite$"):
        cache(bare, out)
    assert cache(bare, out, overwrite=True).samples == 60


def test_a_set_of_former_versions_goes_on(bare, tmp_path):
    """They kept parameters of the pictures' manifests, and no sum of what a shard was made from."""
    manifest = cache(bare, tmp_path / "out")
    former = {name: replace(record, source="") for name, record in manifest.shards.items()}
    Manifest(manifest.parameters | {"source": [{"seed": 0}]}, former).save(tmp_path / "out")
    assert cache(bare, tmp_path / "out", dying(0)).shards == former


def test_a_shard_that_another_process_finishes_first_is_done(tmp_path):
    samples = list(numbered_samples(2, size=64))

    def overtaken():
        yield samples[0]
        write_recorded(samples, tmp_path, "0.tar")
        complete_set(tmp_path, {}, ["0.tar"])
        yield samples[1]

    write_recorded(overtaken(), tmp_path, "0.tar")
    assert Manifest.load(tmp_path).samples == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", MANIFEST]


@pytest.mark.parametrize("source", ["5", "[5]", "null"])
def test_a_manifest_whose_sources_are_no_text_is_refused_by_name(tmp_path, source):
    (tmp_path / MANIFEST).write_text(
        '{"parameters": {}, "complete": true, "shards": {"0.tar": '
        f'{{"samples": 1, "bytes": 1024, "sha256": "x", "source": {source}}}}}}}'
    )
    with pytest.raises(ValueError, match=f"{MANIFEST} cannot be read .*is no record of a shard"):
        Manifest.load(tmp_path)


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_files(tmp_path):
    write_shards(numbered_samples(300, size=64), tmp_path / "pictures", shard_size=20, parameters={})
    options = command_for(tmp_path / "pictures", tmp_path / "out", "--batch_size", 4)
    with running([sys.executable, "-m", "icd_lightning.commands.main", *options]) as process:
        wait_for_file(process, tmp_path, "out/00001.tar")
        process.send_signal(signal.SIGKILL)
    assert not Manifest.load(tmp_path / "out").complete
    for out in ("out", "whole"):
        main(command_for(tmp_path / "pictures", tmp_path / out, "--batch_size", 4))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_each_process_loads_its_own_encoders_once():
    """What Ray sends to its workers is their names."""
    encoders = EncoderWeights(str(VAE), str(VAE.parent), "cpu").encoders()
    sent = pickle.dumps(encoders)
    assert len(sent) < 2000
    there, images = pickle.loads(sent), torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    assert torch.equal(there.moments(images), encoders.moments(images))
    assert there.embeds(["a star"]).keys() == encoders.embeds(["a star"]).keys()
    assert there.moments.__self__ is there.embeds.__self__
    assert there.moments.__self__.autoencoder is there.moments.__self__.autoencoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray_workers", "-1"], "ray_workers -1 must be at least 0"),
        (["--num_gpus", "1"], "num_gpus 1 are of Ray's processes, and ray_workers 0 has none: leave num_gpus out, or"),
        (["--ray_address", "auto"], "ray_workers 0 works in this process, not at 'auto': leave out the address, or"),
        (
            ["--ray_workers", "1", "--ray_address", "nonsense"],
            "ray_address 'nonsense' is none: give auto, host:6379 or",
        ),
        (["--ray_workers", "1", "--ray_address", "http://x:1"], "ray_address 'http://x:1' is none"),
        (["--ray_workers", "1", "--ray_address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1 ("),
        (["--ray_workers", "1", "--ray_address", "ray://127.0.0.1:99999"], "no Ray cluster answers at ray://127"),
    ],
)
def test_wrong_options_of_ray_are_refused_in_one_line(bare, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(command_for(bare, tmp_path / "out", *options, "--overwrite"))
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, line.startswith(f"icd: error: {message}")) == (2, True), line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # a real Ray looks for a cluster
def test_nothing_is_overwritten_where_no_cluster_is(tmp_path, capsys):
    write_shards(numbered_samples(4, size=64), tmp_path / "pictures", shard_size=4, parameters={})
    main(command_for(tmp_path / "pictures", tmp_path / "out"))
    before = files_of(tmp_path / "out")
    with pytest.raises(SystemExit):
        main(
            command_for(
                tmp_path / "pictures", tmp_path / "out", "--ray_workers", "1", "--ray_address", "auto", "--overwrite"
            )
        )
    assert "no Ray cluster answers at auto" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before


@pytest.mark.slow  # a real, local Ray
def test_ray_comes_to_the_same_files_and_counts(tmp_path, caplog):
    samples = [corrupt(one) if number % 7 == 3 else one for number, one in enumerate(numbered_samples(60, size=64))]
    write_shards(samples, tmp_path / "pictures", shard_size=10, parameters={})
    said = []
    for out, workers in (("here", 0), ("there", 2)):
        caplog.clear()
        options = ("--ray_workers", workers, "--text", VAE.parent)
        main(command_for(tmp_path / "pictures", tmp_path / out, *options))
        said.append([record.getMessage() for record in caplog.records if "icd_lightning" in record.name])
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    assert sorted(said[0]) == sorted(said[1])
    assert "left out: corrupt_image 9" in said[1]


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
