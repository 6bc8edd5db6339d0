"""Bad samples and shards: skipped with a counted reason, or told of in one line; never a traceback, never in bulk."""

import gzip
import io
import json
import os
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

import icd_lightning
from icd_lightning.commands.main import main
from icd_lightning.data import tars
from icd_lightning.data.datamodule import ShardDataModule
from icd_lightning.data.shards import encode_sample, find_shards, write_shards
from icd_lightning.data.tally import NothingToReadError, Tally
from icd_lightning.data.tars import INDEX, LARGE, BoundedHeader, index_shard, read_samples

VAE = Path(icd_lightning.__file__).parent / "weights" / "tiny" / "vae"


def picture(format: str = "PNG", height: int = 64, width: int = 64) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels, it says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def array(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


LIE = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f2', 'fortran_order': False, 'shape': (8, 1000000, 1000000), }".ljust(
    117
)
ABOUT = {"moments": {"resolution": 64, "autoencoder": "x"}, "original_size": [64, 64], "crop_top_left": [0, 0]}
MOMENTS = {"json": json.dumps(ABOUT).encode(), "txt": b"a caption"}
GOOD = {"png": picture(), "txt": b"a caption"}
SAMPLES = {  # files of one sample, and why it is left out
    "json nested 100,000 deep": (GOOD | {"json": b"[" * 100_000}, "corrupt_json"),
    "json list": (GOOD | {"json": b"[]"}, "corrupt_json"),
    "json cut": (GOOD | {"json": b'{"a":'}, "corrupt_json"),
    "json not UTF-8": (GOOD | {"json": b'{"a": "\xff"}'}, "corrupt_json"),
    "caption of nothing": (GOOD | {"txt": b" \n"}, "no_caption"),
    "caption in cp1252": (GOOD | {"txt": "café".encode("cp1252")}, "bad_caption"),
    "caption in UTF-16": (GOOD | {"txt": "café".encode("utf-16")}, "bad_caption"),
    "caption in UTF-16 without a mark": (GOOD | {"txt": "a caption".encode("utf-16-le")}, "bad_caption"),
    "caption that controls terminals": (GOOD | {"txt": b"\x1b[31mred"}, "bad_caption"),
    "caption with C1 controls": (GOOD | {"txt": "a \x9b31m".encode()}, "bad_caption"),
    "caption with DEL": (GOOD | {"txt": b"a\x7f"}, "bad_caption"),
    "caption of a megabyte": (GOOD | {"txt": b"word " * 200_000}, "bad_caption"),
    "picture of no bytes": (GOOD | {"png": b""}, "corrupt_image"),
    "picture that is text": (GOOD | {"png": b"<svg onload=x>"}, "corrupt_image"),
    "picture cut": (GOOD | {"png": picture()[:600]}, "corrupt_image"),
    "picture of 3.6 billion pixels": (GOOD | {"png": bomb()}, "corrupt_image"),
    "tiff": (GOOD | {"png": picture("TIFF")}, "corrupt_image"),
    "gif": (GOOD | {"png": picture("GIF")}, "corrupt_image"),
    "eps": (GOOD | {"png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"}, "corrupt_image"),
    "picture too small": (GOOD | {"png": picture(height=8, width=8)}, "too_small"),
    "line": (GOOD | {"png": picture(height=4000, width=2)}, "too_narrow"),
    "no picture": ({"txt": b"a caption"}, "no_image"),
    "moments that are an archive": (MOMENTS | {"moments.npy": b"PK\x03\x04aaaa"}, "corrupt_latents"),
    "moments of words": (MOMENTS | {"moments.npy": array(np.array(["a", "b"]))}, "corrupt_latents"),
    "moments of objects": (MOMENTS | {"moments.npy": array(np.array([{}], dtype=object))}, "corrupt_latents"),
    "moments that claim 16 TB": (MOMENTS | {"moments.npy": LIE + b"\n"}, "corrupt_latents"),
    "moments of two axes": (MOMENTS | {"moments.npy": array(np.zeros((8, 8), np.float16))}, "corrupt_latents"),
    "moments of a hostile header": (
        MOMENTS | {"moments.npy": b"\x93NUMPY\x01\x00\x80\x00" + b"(" * 128},
        "corrupt_latents",
    ),
    "moments of long doubles": (
        MOMENTS | {"moments.npy": array(np.zeros((8, 8, 8), np.longdouble))},
        "corrupt_latents",
    ),
    "moments beyond float16": (MOMENTS | {"moments.npy": array(np.full((8, 8, 8), 1e300))}, "corrupt_latents"),
    "moments of nothing": (MOMENTS | {"moments.npy": array(np.zeros((0, 8, 8), np.float16))}, "corrupt_latents"),
    "moments of no square": (MOMENTS | {"moments.npy": array(np.zeros((8, 4, 16), np.float16))}, "corrupt_latents"),
    "moments of NaN": (MOMENTS | {"moments.npy": array(np.full((8, 8, 8), np.nan, np.float16))}, "corrupt_latents"),
}

LATENTS = MOMENTS | {"moments.npy": array(np.zeros((8, 8, 8), np.float16))}
TOLD = [
    *({"original_size": value} for value in ("64", [64], [-5, 1], [10**30, 1], [64.5, 1], [True, 1], {"1": 2}, None)),
    *({"original_size": [float(value), 1]} for value in ("inf", "nan")),
    {"crop_top_left": [0, 0, 0]},
    *({"moments": ABOUT["moments"] | {"resolution": value}} for value in ("64", 64.0, None)),
    *({"moments": ABOUT["moments"] | {"buckets": value}} for value in ("no", [], 1)),
    *({"moments": ABOUT["moments"] | {"autoencoder": value}} for value in (["x"], {}, 5)),
    {"moments": {"resolution": 64}},
]
EMBEDS = [
    np.zeros((4, 8), np.int64),
    np.zeros((4, 8), bool),
    np.zeros(4, np.float16),
    np.zeros((0, 8), np.float16),
    np.full((4, 8), 1e300),
    np.zeros((4, 8), np.complex64),
]


def write(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def good(count: int = 6) -> list[tuple[str, bytes]]:
    return [(f"good{i}.{extension}", data) for i in range(count) for extension, data in GOOD.items()]


def epoch(folder: Path, **options) -> tuple[set[str], dict[str, int]]:
    """The keys trained on in two epochs, and what was counted."""
    module = ShardDataModule(
        str(folder), batch_size=1, resolution=64, **{"max_skipped": 1.0, "shuffle_buffer": 0, **options}
    )
    module.setup("fit")
    loader = module.train_dataloader()
    keys = {key for _ in range(2) for batch in loader for key in batch.keys}
    return keys, module.train_tally.counts()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_bad_sample_is_skipped_with_its_reason_and_the_good_ones_trained_on(tmp_path, name):
    files, reason = SAMPLES[name]
    write(tmp_path / "0.tar", [*[(f"bad.{extension}", data) for extension, data in files.items()], *good()])
    keys, counts = epoch(tmp_path, min_size=0 if reason == "too_narrow" else None)
    assert keys == {f"good{i}" for i in range(6)}
    assert counts[reason] > 0
    assert sum(counts.values()) == counts["passed"] + counts[reason]


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_json_of_other_types_is_a_reason_to_skip_latents(tmp_path, told):
    bad = {**LATENTS, "json": json.dumps({**ABOUT, **told}).encode()}
    named = (("bad", bad), ("good", LATENTS))
    write(
        tmp_path / "0.tar", [(f"{key}.{extension}", data) for key, files in named for extension, data in files.items()]
    )
    keys, counts = epoch(tmp_path)
    assert keys == {"good"}
    assert counts["corrupt_latents"] > 0


@pytest.mark.parametrize("embeds", EMBEDS, ids=lambda values: f"{values.dtype} {values.shape}")
def test_embeddings_of_other_types_and_shapes_are_a_reason_to_skip(tmp_path, embeds):
    about = json.dumps({**ABOUT, "moments": ABOUT["moments"] | {"text_encoder": "t"}}).encode()
    members = []
    for key, values in (("bad", embeds), ("good", np.zeros((4, 8), np.float16))):
        files = {**LATENTS, "json": about, "text.safetensors": save({"prompt_embeds": values})}
        members += [(f"{key}.{extension}", data) for extension, data in files.items()]
    write(tmp_path / "0.tar", members)
    keys, counts = epoch(tmp_path)
    assert keys == {"good"}
    assert counts["corrupt_latents"] > 0


def test_a_caption_of_half_characters_is_skipped(tmp_path):
    pair = {"png": picture(), "json": b'{"c": "ok"}'}
    bad = {"png": picture(), "json": b'{"c": "\\ud800 a"}'}
    named = (("bad", bad), ("good", pair))
    write(
        tmp_path / "0.tar", [(f"{key}.{extension}", data) for key, files in named for extension, data in files.items()]
    )
    keys, counts = epoch(tmp_path, caption_field="c")
    assert keys == {"good"}
    assert counts["bad_caption"] > 0


def header(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", size: bytes | None = None) -> bytes:
    """A member, perhaps with another field of its size."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(data)
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    if size is not None:
        block[124:136] = size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + b"\0" * (-len(data) % 512)


PAX = tarfile.XHDTYPE
HEADERS = {
    "a size beyond all places": header("bad.png", size=b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7),
    "a negative size": header("x", PAX, b"11 size=-5\n") + header("bad.png", data=picture()),
    "a sparse map of words": header("x", PAX, b"24 GNU.sparse.map=a,b\n\n\n") + header("bad.png", data=b"x"),
    "a sparse size of words": header("x", PAX, b"21 GNU.sparse.size=z\n") + header("bad.png", data=b"x"),
    "a length of 5000 digits": header("x", PAX, b"9" * 5000 + b" a=b\n"),
    "3000 headers for one file": header("x", PAX, b"6 a=b\n") * 3000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_end_their_shard_and_no_other(tmp_path, capsys, name):
    (tmp_path / "0.tar").write_bytes(HEADERS[name] + b"\0" * 1024)
    write(tmp_path / "1.tar", good())
    assert epoch(tmp_path)[0] == {f"good{i}" for i in range(6)}
    with pytest.raises(SystemExit) as ended:
        main(["data", "describe", str(tmp_path)])
    assert (ended.value.code, "0.tar" in capsys.readouterr().err) == (2, True)


def test_files_named_as_what_a_reader_knows_of_a_sample_are_none_of_it(tmp_path):
    files = {**GOOD, "__key__": b"evil", "__url__": b"evil"}
    write(tmp_path / "0.tar", [(f"a.{extension}", data) for extension, data in files.items()])
    assert epoch(tmp_path)[0] == {"a"}


def test_patterns_that_stand_for_too_many_shards_are_refused():
    for pattern in ("{0..99999999}.tar", "{1..2000}{1..2000}.tar", "{a,b}" * 30):
        with pytest.raises(ValueError, match="more than 1,000,000 shards"):
            find_shards(pattern)


def test_what_claims_a_picture_of_any_size_is_described_as_corrupt(tmp_path, capsys):
    claim = b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff"
    write(tmp_path / "0.tar", [("bad.webp", claim), ("bad.txt", b"a caption"), *good()])
    with pytest.raises(SystemExit):
        main(["data", "describe", str(tmp_path), "--examples", "10"])
    assert "1 problem: corrupt_image: bad of " in capsys.readouterr().err


RECORDS = {"a list": "[]", "cut": "{", "nothing": "", "deep": "[" * 100_000, "other fields": '{"a": 1}'}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_of_progress_is_named(tmp_path, capsys, name):
    write(tmp_path / "0.tar", good())
    out = tmp_path / "latents"
    caching = ["data", "cache-latents", str(tmp_path), "--out", str(out), "--vae", str(VAE), "--resolution", "64"]
    main(caching)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "shards": {}, "complete": False}))
    (out / ".progress").mkdir()
    (out / ".progress" / "0.tar.json").write_text(RECORDS[name])
    with pytest.raises(SystemExit) as ended:
        main(caching)
    assert (ended.value.code, "0.tar.json" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--resolution", "0"], "resolution 0"),
        (["--resolution", "-64"], "resolution -64"),
        (["--min-size", "-1"], "min_size -1"),
        (["--resolution", "4096"], "of no picture"),
    ],
)
def test_latents_of_nothing_are_no_success(tmp_path, capsys, options, named):
    write(tmp_path / "0.tar", good())
    with pytest.raises(SystemExit) as ended:
        main(["data", "cache-latents", str(tmp_path), "--out", str(tmp_path / "out"), "--vae", str(VAE), *options])
    assert (ended.value.code, named in capsys.readouterr().err) == (2, True)


def test_latents_never_take_the_place_of_the_pictures(tmp_path, capsys):
    write(tmp_path / "0.tar", good())
    before = (tmp_path / "0.tar").read_bytes()
    with pytest.raises(SystemExit):
        main(["data", "cache-latents", str(tmp_path), "--out", str(tmp_path), "--vae", str(VAE), "--overwrite"])
    assert "holds the pictures themselves" in capsys.readouterr().err
    assert (tmp_path / "0.tar").read_bytes() == before


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    write(tmp_path / "0.tar", [("a.png", picture()), ("a.txt", b"\xef\xbb\xbfa caption")])
    module = ShardDataModule(str(tmp_path), batch_size=1, resolution=64)
    module.setup("fit")
    assert next(iter(module.train_dataloader())).captions == ["a caption"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_none_of_a_sample(tmp_path, kind):
    link = tarfile.TarInfo("bad.png")
    link.type, link.linkname = kind, "/etc/passwd"
    write(tmp_path / "0.tar", [("", link), ("bad.txt", b"a caption"), *good()])
    keys, counts = epoch(tmp_path)
    assert "bad" not in keys
    assert counts["no_image"] > 0


def test_a_file_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MOST_BYTES", 20_000)
    write(tmp_path / "0.tar", [("bad.png", b"\0" * 20_001), ("bad.txt", b"a caption"), *good()])
    assert epoch(tmp_path)[1]["too_large"] > 0
    assert next(iter(index_shard(tmp_path / "0.tar")[0])).read()["png"] is LARGE  # as a validation reads it


def test_a_sparse_file_of_gigabytes_is_not_read(tmp_path):
    write(tmp_path / "0.tar", good())
    with (tmp_path / "bad.png").open("wb") as file:
        file.truncate(4 << 30)
    assert os.system(f"cd {tmp_path} && tar --sparse -cf 1.tar bad.png && rm bad.png") == 0
    tracemalloc.start()
    keys, _ = epoch(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
    assert keys == {f"good{i}" for i in range(6)}


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_of_gigabytes_ends_its_shard_before_it_is_read(kind):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 2 << 30
    packed = io.BytesIO(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + b"\0" * (8 << 20), 1))
    tracemalloc.start()
    with pytest.raises(tarfile.TarError, match="claims"):
        list(read_samples(packed, "x.tar.gz"))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_long_names_and_attributes_are_read_as_ever(tmp_path):
    name = "k" * 180
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for extension, data in GOOD.items():
            header = tarfile.TarInfo(f"{name}.{extension}")
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    with tarfile.open(tmp_path / "0.tar", tarinfo=BoundedHeader) as tar:
        assert len(tar.getnames()) == 2
    assert epoch(tmp_path)[0] == {name}


def test_samples_with_long_keys_are_written_and_read(tmp_path):
    samples = [encode_sample(f"{'k' * 150}{i}", np.zeros((64, 64, 3), np.uint8), "a caption", {}) for i in range(2)]
    write_shards(samples, tmp_path, shard_size=2, parameters={})
    assert epoch(tmp_path)[0] == {f"{'k' * 150}{i}" for i in range(2)}


@pytest.mark.parametrize("name", ["pipe:touch PWNED;.tar", "http:x.tar", "{a,b}.tar", "*.tar"])
def test_a_name_in_a_folder_is_a_path_and_no_url(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(Path(f"./{name}"), good())
    for urls in (".", str(tmp_path), "*.tar"):
        assert find_shards(urls) == [str(tmp_path / name)]
    assert epoch(".")[0] == {f"good{i}" for i in range(6)}
    assert set(os.listdir()) == {name, name.replace(".tar", INDEX)}


MANIFESTS = {
    "samples": ["4", -5, 10**9, 4.5, True, None],
    "bytes": ["x", -1, None],
    "sha256": [[], 3],
    "name": ["../x.tar", "/etc/passwd", "pipe:touch PWNED;.tar", "a/b.tar", "", "..", "x.txt"],
    "complete": ["yes", None],
    "shards": [[], None, {"00000.tar": []}, {"00000.tar": {"foo": 1}}],
    "parameters": ["x", None],
    "file": ["[]", "", "null", '{"a":' * 100_000, "\xff"],
}


@pytest.mark.parametrize(("field", "value"), [(field, v) for field, values in MANIFESTS.items() for v in values])
@pytest.mark.parametrize("verify", ["bytes", "count"])
def test_a_manifest_that_lies_is_refused_by_name(tmp_path, field, value, verify):
    samples = [encode_sample(f"{i}", np.zeros((64, 64, 3), np.uint8), "a caption", {}) for i in range(4)]
    write_shards(samples, tmp_path, shard_size=4, parameters={})
    file = tmp_path / "manifest.json"
    content = json.loads(file.read_text())
    if field in ("samples", "bytes", "sha256"):
        content["shards"]["00000.tar"][field] = value
    elif field == "name":
        content["shards"][value] = content["shards"].pop("00000.tar")
    else:
        content[field] = value
    file.write_text(value if field == "file" else json.dumps(content), encoding="latin-1")
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        epoch(tmp_path, verify=verify)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("content", [b"", b"hello" * 1000, tarfile.TarInfo("x").tobuf()[:200]])
def test_a_shard_that_is_none_is_told_of_and_the_others_trained_on(tmp_path, content):
    write(tmp_path / "0.tar", good())
    (tmp_path / "1.tar").write_bytes(content)
    assert epoch(tmp_path)[0] == {f"good{i}" for i in range(6)}


def test_a_late_outage_ends_a_run_that_has_read_much_before(tmp_path):
    tally = Tally(max_skipped=0.5)

    def lose(count: int) -> None:
        for _ in range(count):
            tally.add("read")
            tally.skipped("corrupt_image", "one")

    tally.add("read", 1_000_000)
    lose(1)
    lose(900)
    with pytest.raises(NothingToReadError, match="could not be used, more than max_skipped"):
        lose(200)


def test_what_is_described_neither_controls_the_terminal_nor_is_markup(tmp_path, capsys):
    samples = [("a.png", picture()), ("a.txt", b"\x1b[2J[bold]caption[/bold] [/nope]"), ("\x1b[31mb.txt", b"caption")]
    write(tmp_path / "0.tar", samples)
    with pytest.raises(SystemExit):
        main(["data", "describe", str(tmp_path)])
    said = "".join(capsys.readouterr())
    assert "\x1b[2J" not in said
    assert "\x1b[31m" not in said
    assert "[bold]caption[/bold] [/nope]" in said
