"""Unpacking archives that others made: nothing outside the folder, no links, no more bytes than allowed."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import shutil
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from flow_pl.data.store.limits import Bounded, require_bounded
from flow_pl.errors import DataError, brief

_CHUNK = 1 << 20
_MOST_FILES = 1_000_000
_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
    b"]\0": lzma.open,
}
"""How a compressed file is opened, by its first two bytes."""


class _Member(NamedTuple):
    """A file in an archive; `open` is called before the next member is asked for."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def extract(archive: Path, folder: Path, max_bytes: int) -> None:
    """Unpack an archive into a folder.

    Files appear in the folder only when all of them are unpacked; those already there are replaced.

    Args:
        archive: a `.zip` file, or a `.tar` file, compressed or not.
        folder: where its files go, in the folders that they have in the archive.
        max_bytes: largest number of bytes of all files together.

    Raises:
        DataError: it is damaged, a member would leave the folder or is no plain file, or it holds too much, also in
            comparison with its size.
    """
    temporary = folder / f".{archive.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        written = 0
        for count, member in enumerate(_members(archive), start=1):
            if count > _MOST_FILES:
                raise DataError(f"{archive} holds more than {_MOST_FILES} files: it is refused.")
            _require_room(archive, folder, member.size)
            target = temporary / _safe_path(archive, member.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as packed, target.open("wb") as file:
                while block := packed.read(_CHUNK):
                    written += len(block)
                    if written > max_bytes:
                        raise DataError(f"{archive} unpacks to more than {max_bytes} bytes: it is refused.")
                    file.write(block)
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    except DataError:
        raise
    except Exception as error:  # damage shows as one of a dozen types: of tarfile, zipfile, zlib, OSError, ...
        raise DataError(
            f"{archive} cannot be unpacked into {folder} ({brief(error)}): get it again if it is damaged, or make room."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
    else:
        yield from _tar_members(archive)


def _tar_members(archive: Path) -> Iterator[_Member]:
    with contextlib.ExitStack() as stack:
        with archive.open("rb") as start:
            opener = _OPENERS.get(start.read(2), open)
        packed = stack.enter_context(opener(archive, "rb"))
        # as a stream, in which a compressed file is read once
        content = io.BufferedReader(Bounded(packed, archive), _CHUNK)
        tar = stack.enter_context(tarfile.open(fileobj=content, mode="r|"))
        for info in tar:
            if info.isdir():
                continue
            file = tar.extractfile(info) if info.isreg() else None
            if file is None:
                raise DataError(f"{archive}: {info.name!r} is a link or no plain file: the archive is refused.")
            yield _Member(info.name, info.size, lambda file=file: file)  # type: ignore[misc]


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as packed:
        require_bounded(archive, sum(info.file_size for info in packed.infolist()), archive.stat().st_size)
        for info in packed.infolist():
            if info.is_dir():
                continue
            kind = info.external_attr >> 28  # the upper bits of the Unix mode; 0 where the archive has none
            if kind not in (0, 8):
                raise DataError(f"{archive}: {info.filename!r} is a link or no plain file: the archive is refused.")
            yield _Member(info.filename, info.file_size, lambda info=info: packed.open(info))  # type: ignore[misc]


def _safe_path(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or not path.parts or ".." in path.parts or ":" in path.parts[0]:  # ":" of a drive
        raise DataError(f"{archive}: {name!r} would be written outside of the folder: the archive is refused.")
    return path


def _require_room(archive: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB of room, but a file in {archive} needs {needed / 1e9:.1f} GB: make "
            "room, or choose another folder."
        )
