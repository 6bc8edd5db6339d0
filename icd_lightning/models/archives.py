"""Released archives: downloaded with resume, checked, and taken out of without trust."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import re
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from huggingface_hub import get_hf_file_metadata
from huggingface_hub.file_download import HfFileMetadata, http_get
from huggingface_hub.utils import WeakFileLock

from icd_lightning.data.manifest import hexdigest, sha256
from icd_lightning.data.tars import BoundedHeader
from icd_lightning.files import replaced_folder, write_json, write_text
from icd_lightning.models.released import Released, find, host, located
from icd_lightning.models.weights import first_line, read_weights

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

MD5 = re.compile("[0-9a-f]{32}")  # what a store's ETag is, unless the file was uploaded in parts


def fetched(name: str) -> str:
    """Where a released UNet is; if it is not here, it is downloaded, by one process while others wait.

    Raises OSError or ValueError as `install` does.
    """
    released = find(name)
    if not released.here:
        log.info("%s is needed: %s, about %g GB, of %s", name, released.archive, released.gigabytes, host())
        install(released, host(), wait=True)
    return located(name)


def install(released: Released, host: str, *, known: str | None = None, wait: bool = False) -> str | None:
    """Download a released archive, check it, and put its weights into their folder; return its SHA-256.

    The sum is kept beside the folder, and every later download must have it. What a stopped call has downloaded, the
    next goes on with.

    known: the sum that the archive must have; by default the catalogue's, or else that of the first download.
    wait: for another call that downloads it; what that one brought is taken as it is.

    Raises OSError for a server that cannot be reached, a full disk, or a call of this kind that is under way, and
    ValueError for other content than was promised; then the folder is as it was.
    """
    folder = released.folder.parent
    lock = folder / f".{released.name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise OSError(
            f"{folder} cannot keep weights ({error.strerror}): name a folder that can be written to by XDG_CACHE_HOME"
        ) from error
    url = f"{host.rstrip('/')}/{released.archive}"
    try:
        with WeakFileLock(lock, timeout=None if wait else 0.1):
            if wait and released.here:
                return released.known
            archive, told = _downloaded(url, released, folder)
            try:
                found = _checked(archive, told, known or released.known)
                _unpack(archive, released)
            except ValueError as error:
                archive.unlink()
                raise ValueError(f"{url} {error}; nothing of it is kept") from error
            write_text(released.record, f"{found}\n")
            for part in folder.glob(f".{released.archive}-*.part"):  # of other versions too
                part.unlink()
    except TimeoutError as error:
        raise OSError(f"{released.name} is being downloaded by another call: wait for it") from error
    return found


class _Promised(io.BufferedWriter):
    """A file that goes on, and that no server can make larger than it said."""

    def __init__(self, place: Path, size: int) -> None:
        super().__init__(io.FileIO(place, "ab"))
        self.size = size

    def write(self, data: Buffer, /) -> int:
        if self.tell() + memoryview(data).nbytes > self.size:
            raise ValueError(f"the server sends more than the {self.size} bytes that it said")
        return super().write(data)


def _downloaded(url: str, released: Released, folder: Path) -> tuple[Path, HfFileMetadata]:
    """The whole archive, and what its server says of it: of another size or ETag it is another file, begun anew."""
    try:
        told = get_hf_file_metadata(url, token=False)
        if told.size is None and told.location != url:  # a copy that is elsewhere
            told = get_hf_file_metadata(told.location, token=False)
        if not told.size or told.size > 2e9 * released.gigabytes:
            raise ValueError(f"the server says {told.size} bytes, and it has about {released.gigabytes:g} GB")
        version = hashlib.sha256(f"{told.size} {told.etag}".encode()).hexdigest()[:16]
        part = folder / f".{released.archive}-{version}.part"
        with _Promised(part, told.size) as file:
            needed = 2 * told.size - file.tell()  # unpacked it takes as much again
            if needed > shutil.disk_usage(folder).free:
                raise OSError(f"{needed / 1e9:.1f} GB are needed in {folder}, where less is free")
            http_get(
                url,
                file,
                resume_size=file.tell(),
                expected_size=told.size,
                displayed_filename=released.archive,
            )
    except Exception as error:  # those of the library, whichever it is, that sends the hub's requests, among them
        raise OSError(
            f"{url} cannot be downloaded ({first_line(error)}); what came is kept, and `icd download {released.name}` "
            "goes on with it. --host names another place of the archives"
        ) from error
    return part, told


def _checked(archive: Path, told: HfFileMetadata, known: str | None) -> str:
    """The archive's SHA-256; ValueError if it is not as known or, where nothing is, its MD5 not as its server says."""
    found = sha256(archive)
    if known is not None:
        if found != known.lower():
            raise ValueError(
                f"has the SHA-256 {found}, and {known} is known of it: download again or, if it is a new release, name "
                "its sum by --sha256"
            )
    elif told.etag and MD5.fullmatch(told.etag) and (digest := hexdigest("md5", archive)) != told.etag:
        raise ValueError(f"has the MD5 {digest}, and its server says {told.etag}: download again")
    return found


class _Bounded:
    """What an archive unpacks to, while that is of a size that weights come to."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self.file, self.left = file, most

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("unpacks to more than weights come to")
        return data


def _unpack(archive: Path, released: Released) -> None:
    """Write the released files into their folder, by our names for them: no name in the archive says where to.

    ValueError unless the archive holds each of them as a plain file.
    """
    most = 4 * archive.stat().st_size + (1 << 20)  # weights hardly compress
    places = dict(released.files)
    with replaced_folder(released.folder) as folder:
        try:
            with (
                gzip.open(archive) as file,
                tarfile.open(fileobj=_Bounded(file, most), mode="r|", tarinfo=BoundedHeader) as tar,
            ):
                for member in tar:
                    tar.members = []  # else all are kept
                    if place := places.pop(Path(member.name).name, None):
                        _write(tar, member, folder / place)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"is no archive, or a damaged one ({first_line(error)}): open the address in a browser, a proxy or a "
                "login page may have answered in its place"
            ) from error
        if places:
            raise ValueError(f"does not hold {', '.join(places)}")
        for name, place in released.files.items():
            _check_weights(name, folder / place)
        if released.index:
            write_json(folder / "model_index.json", released.index)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    if not member.isreg() or member.issparse():
        raise ValueError(f"holds {member.name}, which is no plain file")
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as file:
        shutil.copyfileobj(tar.extractfile(member), file, 1 << 20)


def _check_weights(name: str, file: Path) -> None:
    try:
        read_weights(file)
    except ValueError as error:
        raise ValueError(f"holds {name}, which are no weights ({first_line(error.__cause__ or error)})") from error
