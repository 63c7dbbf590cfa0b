"""Fetching published archives: only when asked to, with a progress bar, resumed where they broke off, and verified."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from flow_pl.data.readers.archive import extract
from flow_pl.errors import DataError
from flow_pl.utils.validation import require_count

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without an answer


@dataclass(frozen=True)
class Archive:
    """A published archive.

    Attributes:
        url: where it is published; http or https.
        sha256: its published checksum; None = none is published.
        max_bytes: an archive that unpacks to more is refused.

    Raises:
        ConfigurationError: `max_bytes` is not positive.
    """

    url: str
    sha256: str | None = None
    max_bytes: int = 200 * 10**9

    def __post_init__(self) -> None:
        require_count(max_bytes=self.max_bytes)

    @property
    def name(self) -> str:
        """Name of the file."""
        return PurePosixPath(urlsplit(self.url).path).name


def obtain(paths: Sequence[Path], archive: Archive, download: bool) -> None:
    """Make sure that files are there, unpacking the archive they come in, and fetching it first where asked to.

    Args:
        paths: the files or folders; the archive is unpacked into the folder of the first one.
        archive: the archive that holds them; used where it lies in that folder already.
        download: whether it may be fetched.

    Raises:
        DataError: the files are not there and cannot be had; the message says which to put where.
    """
    folder = paths[0].parent
    missing = _missing(paths)
    if not missing:
        return
    packed = folder / archive.name
    fetched = not packed.is_file()
    if fetched:
        by_hand = f"get {archive.url} by hand and put it into {folder}, packed or unpacked"
        if not download:
            raise DataError(f"there is no {missing}: set download to true, or {by_hand}.")
        fetch(archive, packed, by_hand)
    else:
        _verify(packed, archive)
    extract(packed, folder, archive.max_bytes)
    missing = _missing(paths)
    if missing:
        raise DataError(f"{packed} unpacks to no {missing}: it is not the archive of this data.")
    if fetched:  # one that was put there by hand is not ours to delete
        packed.unlink()


def fetch(archive: Archive, target: Path, by_hand: str) -> None:
    """Fetch an archive; what an earlier attempt has fetched is not fetched again.

    Args:
        archive: the archive.
        target: the file to write; what is not complete is kept beside it, ending on `.part`.
        by_hand: what to do without a network, for messages.

    Raises:
        DataError: it cannot be reached, the disk is too small, or the checksum is wrong.
    """
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        # a second time where the part turns out to be of another version, or longer than the file
        while not _fetch_part(archive, part):
            part.unlink()
    except (OSError, HTTPException) as error:
        raise DataError(
            f"{archive.url} cannot be fetched ({error}): try again, the part that has come is kept; or {by_hand}."
        ) from error
    _verify(part, archive)
    part.rename(target)


def _fetch_part(archive: Archive, part: Path) -> bool:
    """Append what is missing of the file; False = the part is not the beginning of the file."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    version = part.with_name(part.name + ".version")
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: there is nothing behind the part
            raise
        return error.headers.get("Content-Range") == f"bytes */{have}"
    with response:
        resumed = response.status == 206
        found = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if resumed and version.exists() and version.read_text(encoding="utf-8") != found:
            return False
        version.write_text(found, encoding="utf-8")
        length = response.headers.get("Content-Length")
        _require_room(part, int(length or 0))
        _copy(response, part, have if resumed else 0, int(length) if length else None)
    version.unlink()
    return True


def _copy(response: HTTPResponse, part: Path, start: int, length: int | None) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    total = None if length is None else start + length
    with (
        part.open("ab" if start else "wb") as file,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(f"Fetching {part.stem}", total=total, completed=start)
        while block := response.read(_CHUNK):
            file.write(block)
            progress.advance(task, len(block))
        if total is not None and file.tell() < total:
            raise OSError(f"the connection broke off after {file.tell()} of {total} bytes")
        file.flush()
        os.fsync(file.fileno())


def _missing(paths: Sequence[Path]) -> str:
    return " and no ".join(str(path) for path in paths if not path.exists())


def _require_room(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise DataError(
            f"{part.parent} has {free / 1e9:.1f} GB of room, but {part.stem} needs {needed / 1e9:.1f} GB more, and as "
            "much again and more to be unpacked: make room, or choose another folder."
        )


def _verify(file: Path, archive: Archive) -> None:
    if archive.sha256 is None:
        return
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_CHUNK):
            digest.update(block)
    if digest.hexdigest() != archive.sha256:
        # a part with a wrong checksum cannot be resumed to a file with the right one
        with contextlib.suppress(OSError):
            if file.suffix == ".part":
                file.unlink()
        raise DataError(
            f"{file} has the SHA-256 {digest.hexdigest()}, but the published one is {archive.sha256}: the file is "
            "damaged or another one; delete it where it is still there, and get it again."
        )
