"""Folders that shards are written to: here, or in any store that fsspec knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from icd_lightning.data.tars import is_local
from icd_lightning.files import remove_tree, write_whole

T = TypeVar("T")


@dataclass(frozen=True)
class RemotePath:
    """A file or folder in a store, with those methods of a Path that writers of shards use.

    Whatever the store's driver raises becomes an OSError that names it.
    """

    system: Any
    path: str
    url: str
    size: int | None = None  # if it is from a listing

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return replace(self, path=f"{self.path}/{name}", url=f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def st_size(self) -> int:
        with self._told("read"):
            return self.system.info(self.path)["size"] if self.size is None else self.size

    def stat(self) -> RemotePath:
        return self

    def exists(self) -> bool:
        with suppress(FileNotFoundError):
            return self.st_size >= 0
        return False

    is_file = exists

    def glob(self, pattern: str) -> list[RemotePath]:
        """What lies in this folder and is named like this; none if the folder is not there."""
        try:
            with self._told("listed"):
                self.system.invalidate_cache()  # other processes write there, too
                found = self.system.ls(self.path, detail=True)
        except FileNotFoundError:
            return []
        files = [replace(self / PurePosixPath(about["name"]).name, size=about["size"]) for about in found]
        return [file for file in files if fnmatchcase(file.name, pattern)]

    def read_text(self, encoding: str) -> str:
        with self._told("read"):
            content = self.system.cat_file(self.path)
        return content.decode(encoding)

    def unlink(self, missing_ok: bool = True) -> None:
        with suppress(FileNotFoundError), self._told("removed"):
            self.system.rm_file(self.path)

    @contextmanager
    def _told(self, done: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(f"{self} cannot be {done} ({type(error).__name__}: {error})") from error


AnyPath = Path | RemotePath


def folder_at(out: str | Path) -> AnyPath:
    """The folder that a path or url names; ValueError where nothing can be written."""
    url = str(out).removeprefix("file://")
    if is_local(url):
        return Path(url)
    from fsspec.core import url_to_fs

    try:
        if "://" not in url:
            raise ValueError("it is no url of a folder")
        url = url.rstrip("/")
        return RemotePath(*url_to_fs(url), url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{out} cannot be written to: {error}; give a local folder, and copy it there") from error


@write_whole.register(RemotePath)
def _upload(path: RemotePath, write: Callable[[Path], T]) -> T:
    """Let `write` make a file on this machine, and upload it when it is whole."""
    with TemporaryDirectory(prefix="icd-") as folder:
        result = write(Path(folder, path.name))
        with path._told("written"):
            if not path.system.async_impl:  # the others are stores of objects, without folders
                path.system.makedirs(path.path.rpartition("/")[0], exist_ok=True)
            path.system.put_file(f"{folder}/{path.name}", path.path)
        return result


@remove_tree.register(RemotePath)
def _remove_all(folder: RemotePath) -> None:
    with suppress(FileNotFoundError), folder._told("removed"):
        folder.system.rm(folder.path, recursive=True)
