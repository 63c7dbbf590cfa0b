"""Unpack untrusted archives: nothing outside the folder, no links, no more bytes than allowed."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
"""Functions that open compressed files, by their first two bytes."""


def extract(archive: Path, folder: Path, max_bytes: int) -> None:
    """Unpack an archive into a folder.

    Files appear in the folder only when all of them are unpacked; those already there are replaced.

    Args:
        archive: a `.zip` file, or a `.tar` file, compressed or not.
        folder: output folder; files keep their relative paths.
        max_bytes: largest total number of bytes of the files.

    Raises:
        DataError: it is damaged, a member would leave the folder or is not a plain file, or it expands to too many
            bytes, also relative to its size.
    """
    temporary = folder / f".{archive.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        unpack = _unpack_zip if zipfile.is_zipfile(archive) else _unpack_tar
        unpack(archive, temporary, max_bytes)
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    except DataError:
        raise
    except Exception as error:  # damage raises one of a dozen types: of tarfile, zipfile, zlib, OSError, ...
        raise DataError(
            f"{archive} cannot be unpacked into {folder} ({brief(error)}): get it again if damaged, or free space."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack_tar(archive: Path, folder: Path, max_bytes: int) -> None:
    with contextlib.ExitStack() as stack:
        with archive.open("rb") as start:
            opener = _OPENERS.get(start.read(2), open)
        packed = stack.enter_context(opener(archive, "rb"))
        # as a stream, so that a compressed file is read only once
        content = io.BufferedReader(Bounded(packed, archive), _CHUNK)
        tar = stack.enter_context(tarfile.open(fileobj=content, mode="r|"))
        total = 0
        for count, info in enumerate(tar, start=1):
            if not (info.isreg() or info.isdir()):
                raise _not_a_plain_file(archive, info.name)
            total += info.size
            _require_small(archive, count, total, max_bytes)
            try:
                # the filter keeps it within the folder; files become readable and writable
                tar.extract(info, folder, filter="data")
            except tarfile.FilterError as error:
                raise DataError(f"{archive}: {info.name!r} cannot be unpacked safely ({error}): refused.") from error


def _unpack_zip(archive: Path, folder: Path, max_bytes: int) -> None:
    with zipfile.ZipFile(archive) as packed:
        members = packed.infolist()
        total = sum(info.file_size for info in members)
        require_bounded(archive, total, archive.stat().st_size)
        _require_small(archive, len(members), total, max_bytes)
        for info in members:
            kind = info.external_attr >> 28  # the upper bits of the Unix mode; 0 if the archive has none
            if kind not in (0, 8) and not info.is_dir():
                raise _not_a_plain_file(archive, info.filename)
            packed.extract(info, folder)  # it stays within the folder: parts of a path that lead out of it are dropped


def _require_small(archive: Path, count: int, total: int, max_bytes: int) -> None:
    if count > _MOST_FILES:
        raise DataError(f"{archive} holds more than {_MOST_FILES} files: it is refused.")
    if total > max_bytes:
        raise DataError(f"{archive} unpacks to more than {max_bytes} bytes: it is refused.")


def _not_a_plain_file(archive: Path, name: str) -> DataError:
    return DataError(f"{archive}: {name!r} is a link or not a plain file: the archive is refused.")
