"""Shards that are not files here: commands, http, stores. Each is really read, from this machine."""

import time
from functools import partial
from http.server import SimpleHTTPRequestHandler
from io import FileIO
from itertools import chain, islice

import fsspec
import pytest
from serving_case import serving
from shards_case import corrupt, numbered_samples, numbers

from icd_lightning.data import datamodule, tally, tars, uncounted
from icd_lightning.data.datamodule import ShardDataModule
from icd_lightning.data.shards import find_shards, write_shards
from icd_lightning.data.tally import NothingToReadError, Tally
from icd_lightning.data.tars import expand, index_shard, open_url
from icd_lightning.data.uncounted import UncountedStream, read_shard


def data_for(urls, **options) -> ShardDataModule:
    defaults = {"batch_size": 5, "resolution": 8, "shuffle_buffer": 8, "batches_per_epoch": 12}
    return ShardDataModule(urls, **(defaults | options))


def epoch(data: ShardDataModule) -> list[int]:
    """The numbers of all samples of the first epoch."""
    data.setup("fit")
    seen = list(chain.from_iterable(map(numbers, data.train_dataloader())))
    data.teardown()
    return seen


class Handler(SimpleHTTPRequestHandler):
    """A server of files; with `ranges`, of parts of them too, as stores and most servers do. `stuck` has no answer."""

    def __init__(self, *args, ranges: bool, **options) -> None:
        self.ranges = ranges
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        if "stuck" in self.path:
            return time.sleep(10)
        if outages := OUTAGES.get(self.path):
            return getattr(self, outages.pop(0))()
        wanted = self.headers.get("Range")
        if not (wanted and self.ranges):
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        first, last = (int(end) for end in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def refuse(self) -> None:
        self.send_error(503)

    def cut(self) -> None:
        """Half of the file, as a connection that breaks leaves it."""
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        super().end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def end_headers(self) -> None:
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """What cannot be read is tried again at once."""
    monkeypatch.setattr(tars, "PAUSES", (0.0, 0.01, 0.02))
    monkeypatch.setattr(uncounted, "PAUSES", (0.0, 0.01, 0.02))


OUTAGES: dict[str, list[str]] = {}
"""What the server does at the next requests for a path, before it serves it."""


@pytest.fixture(params=[False, True], ids=["whole files", "ranges"])
def http(request, shards):
    """Address of a server of the shards."""
    OUTAGES.clear()
    with serving(partial(Handler, directory=str(shards), ranges=request.param)) as address:
        yield address


@pytest.fixture
def memory(shards):
    """The shards in fsspec's store in memory."""
    store = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        store.pipe(f"/set/{path.name}", path.read_bytes())
    yield "memory://set"
    store.rm("/set", recursive=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_http(http, num_workers):
    data = data_for(f"{http}/{{00000..00005}}.tar", num_workers=num_workers)
    assert sorted(epoch(data)) == list(range(60))
    assert isinstance(data.stream, UncountedStream)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_outage_that_ends_changes_no_batch(http, num_workers, monkeypatch):
    urls = f"{http}/{{00000..00005}}.tar"
    steady = epoch(data_for(urls, num_workers=num_workers))
    OUTAGES.update({"/00001.tar": ["refuse", "refuse"], "/00003.tar": ["cut", "refuse"], "/00004.tar": ["cut", "cut"]})
    assert epoch(data_for(urls, num_workers=num_workers)) == steady
    assert not any(OUTAGES.values())


def test_a_shard_that_broke_off_goes_on_from_its_next_sample(shards, monkeypatch):
    attempts = []

    class BreaksOff(FileIO):
        """A connection that ends after some samples, the first time."""

        def read(self, size: int = -1) -> bytes:
            if len(attempts) == 1 and self.tell() > 10_000:
                raise OSError("connection lost")
            return super().read(min(size, 1024) if size > 0 else size)

    def open_slowly(url: str, patience: float) -> BreaksOff:
        attempts.append(url)
        return BreaksOff(shards / "00000.tar")

    monkeypatch.setattr(uncounted, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(uncounted, "open_url", open_slowly)
    counts = Tally()
    keys = [raw["__key__"] for raw in read_shard("http://elsewhere/00000.tar", counts)]
    assert len(attempts) == 2
    assert keys == [entry.key for entry in index_shard(shards / "00000.tar")[0]]
    assert counts.counts()["broken_shard"] == 0


def test_indexed_shards_are_read_by_their_places_where_the_server_gives_parts(http, shards, caplog, monkeypatch):
    here = data_for(str(shards))
    wanted = epoch(here)  # which leaves an index beside each
    data = data_for(f"{http}/{{00000..00005}}.tar")
    seen = epoch(data)
    if isinstance(data.stream, UncountedStream):
        assert "gives out whole files only" in caplog.text
        assert sorted(seen) == list(range(60))
        return
    assert seen == wanted
    OUTAGES.update({"/00001.tar": ["refuse", "refuse"], "/00004.tar": ["refuse"]})
    assert list(chain.from_iterable(map(numbers, data.train_dataloader()))) == [
        number for batch in islice(here.stream.batches_from(0, Tally()), 12) for number in numbers(batch)
    ]
    assert not any(OUTAGES.values())
    assert data.train_tally.counts()["broken_shard"] == 0


def test_an_outage_at_the_start_is_told_of_and_changes_no_order(monkeypatch):
    """Else one rank might read from end to end, and another by places."""
    monkeypatch.setattr(tars, "PAUSES", (0.0, 0.01))
    with pytest.raises(OSError, match=r"nothing.tar cannot be read .*though its index can: try again later"):
        datamodule._gives_parts(("memory://nothing.tar", 0, 512))


def test_a_store_that_fsspec_knows(memory):
    assert sorted(epoch(data_for(f"{memory}/{{00000..00005}}.tar"))) == list(range(60))
    assert find_shards(f"{memory}/0000[01]*.tar") == [f"memory:///set/0000{n}.tar" for n in (0, 1)]
    assert sorted(epoch(data_for(f"{memory}/*.tar"))) == list(range(60))
    with pytest.raises(FileNotFoundError, match=r"no file matches memory://set/x\*"):
        find_shards(f"{memory}/x*.tar")


def test_a_file_url_is_a_local_file(shards):
    urls = f"file://{shards}/{{00000..00005}}.tar"
    assert find_shards(urls) == find_shards(str(shards))
    data = data_for(urls, batches_per_epoch=None)
    assert sorted(epoch(data)) == list(range(60))
    assert data.stream.places.bounds.tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert sorted(epoch(data_for([f"local://{shards}/{n:05d}.tar" for n in range(6)]))) == list(range(60))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_commands(shards, num_workers):
    urls = f"pipe:cat {shards}/{{00000..00005}}.tar | cat"
    assert sorted(epoch(data_for(urls, num_workers=num_workers))) == list(range(60))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/{0..3}.tar", r"s3://bucket/0.tar cannot be read here: Install s3fs"),
        ("gs://bucket/0.tar", r"gs://bucket/0.tar cannot be read here: Please install gcsfs"),
        ("sftp://host/0.tar", "install paramiko|requires .*paramiko"),
        ("tape:0.tar", "Protocol not known: tape"),
    ],
)
def test_a_missing_driver_is_named(url, message):
    for package, schemes in (("s3fs", "s3"), ("gcsfs", "gs"), ("paramiko", "sftp")):
        if url.startswith(schemes):
            try:
                __import__(package)
            except ImportError:
                break
            pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=f"(?i){message}"):
        data_for(url).setup("fit")


def test_what_needs_no_driver(shards):
    for url in ("pipe:cat x", "a.tar", "https://host/a.tar", "memory://a.tar"):
        assert expand(url) == [url]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (lambda http, shards: f"{http}/nothing.tar", "404"),
        (lambda http, shards: "http://127.0.0.1:9/a.tar", "Connect"),
        (lambda http, shards: "pipe:exit 3", "exit code 3"),
        (lambda http, shards: f"pipe:head -c 9000 {shards}/00000.tar; exit 3", "exit code 3"),
        (lambda http, shards: f"pipe:head -c 9000 {shards}/00000.tar", "unexpected end of data"),
        (lambda http, shards: "memory://nothing.tar", "FileNotFoundError"),
    ],
)
def test_a_source_that_fails_is_counted_and_the_others_go_on(http, shards, caplog, source, why):
    counted = Tally()
    list(read_shard(source(http, shards), counted))
    assert counted.counts()["broken_shard"] == 1
    assert why in caplog.text
    good = [f"{http}/{n:05d}.tar" for n in range(6)]
    data = data_for([*good, source(http, shards)], batches_per_epoch=24)
    assert set(epoch(data)) == set(range(60))
    assert data.train_tally.counts()["broken_shard"] >= 1


def test_only_failing_sources_end_at_once_with_the_reason(http):
    with pytest.raises(ValueError, match=r"the shards of urls hold no samples .*broken_shard 3.*x/0.tar .*404"):
        data_for(f"{http}/x/{{0..2}}.tar").setup("fit")


@pytest.mark.parametrize("url", ["pipe:sleep 60", "pipe:head -c 9000 {shards}/00000.tar; sleep 60", "{http}/stuck.tar"])
def test_a_source_that_falls_silent_is_given_up(http, shards, url):
    counted = Tally(stall_timeout=0.3)
    start = time.monotonic()
    with pytest.raises(NothingToReadError, match=r"no sample that can be used was found for 0.3 s .*broken_shard 1"):
        list(read_shard(url.format(http=http, shards=shards), counted))
    assert time.monotonic() - start < 10


def test_closing_a_pipe_ends_what_its_command_has_started(tmp_path):
    pipe = open_url(f"pipe:(sleep 0.4; touch {tmp_path}/late) | cat; echo")
    pipe.close()
    time.sleep(0.6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_ends_when_nothing_comes_any_more(shards, num_workers):
    """The first shards are good, each later one is silent."""
    urls = [f"pipe:cat {shards}/0000{n}.tar" for n in range(2)] + [f"pipe:sleep {60 + n}" for n in range(2)]
    data = data_for(urls, num_workers=num_workers, stall_timeout=0.5, shuffle_buffer=0)
    data.setup("fit")
    start = time.monotonic()
    with pytest.raises(NothingToReadError, match=r"no (worker found a )?sample that can be used"):
        list(islice(data.train_dataloader(), 100))
    data.teardown()
    assert time.monotonic() - start < 20


def test_slow_is_not_silent(shards):
    """A worker whose samples come one by one is waited for beyond the timeout, as long as they come."""
    slow = f"pipe:cat {shards}/00000.tar | (head -c 8192; sleep 1.1; head -c 8192; sleep 1.1; cat)"
    options = {"num_workers": 1, "batch_size": 10, "batches_per_epoch": 1, "shuffle_buffer": 10}
    data = data_for([slow], **options, stall_timeout=2)
    data.setup("fit")
    assert sorted(numbers(next(iter(data.train_dataloader())))) == list(range(10))
    data.teardown()


def epochs(data: ShardDataModule, count: int) -> int:
    """Go through epochs; return how many batches they were."""
    loader = data.train_dataloader()
    return sum(1 for _ in range(count) for _ in loader)


def test_too_much_lost_ends_a_training(shards, monkeypatch):
    monkeypatch.setattr(tally, "MIN_READ", 200)
    samples = [corrupt(s) if n % 3 else s for n, s in enumerate(numbered_samples(60))]
    write_shards(samples, shards.parent / "bad", shard_size=10, parameters={})
    bad = str(shards.parent / "bad")
    for num_workers in (0, 2):
        data = data_for(bad, num_workers=num_workers, batches_per_epoch=None)
        data.setup("fit")
        with pytest.raises(
            NothingToReadError, match=r"more than max_skipped 0.5 allows \(skipped: corrupt_image \d+; for one"
        ):
            epochs(data, 20)
        data.teardown()
    data = data_for(bad, max_skipped=0.8, batches_per_epoch=None)
    data.setup("fit")
    assert epochs(data, 10) == 120
