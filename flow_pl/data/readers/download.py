"""Fetch published archives, only on request, and verify them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from flow_pl.data.readers.archive import extract
from flow_pl.errors import DataError, brief
from flow_pl.utils.optional import import_optional
from flow_pl.utils.validation import require_count

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a response


@dataclass(frozen=True)
class Archive:
    """Describes a published archive.

    Attributes:
        url: address of the archive; http or https.
        sha256: published checksum; None = none is published.
        max_bytes: largest number of bytes after unpacking; an archive with more is refused.

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
        """Return the name of the file."""
        return PurePosixPath(urlsplit(self.url).path).name


def obtain(paths: Sequence[Path], archive: Archive, download: bool) -> None:
    """Make sure that files exist: unpack their archive if necessary, and fetch it first if allowed.

    Args:
        paths: the files or folders; the archive is unpacked into the folder of the first one.
        archive: the archive that holds them; used without a download if it is in that folder.
        download: whether the archive may be fetched.

    Raises:
        DataError: the files are missing and cannot be obtained; the message says which to put where.
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
    if fetched:  # an archive that the user put there is not deleted
        packed.unlink()


def fetch(archive: Archive, target: Path, by_hand: str) -> None:
    """Fetch an archive, with a progress bar on a terminal; the file appears when it is complete and verified.

    Args:
        archive: the archive.
        target: the file to write.
        by_hand: remedy without a network, for messages.

    Raises:
        ConfigurationError: pooch is not installed.
        DataError: the server cannot be reached, the disk is full, or the checksum is wrong.
    """
    pooch = import_optional("pooch", "download", f"fetching {archive.name}")
    pooch.get_logger().setLevel("WARNING")  # its messages on the file's path, and on the checksum if none is published
    known = None if archive.sha256 is None else f"sha256:{archive.sha256}"
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT)
    try:
        pooch.retrieve(archive.url, known, fname=target.name, path=target.parent, downloader=downloader)
    except OSError as error:  # including those of requests
        raise DataError(f"{archive.url} cannot be fetched ({brief(error)}): try again, or {by_hand}.") from error
    except ValueError as error:
        raise DataError(
            f"{archive.url} is not what was published ({brief(error)}): try again, or {by_hand}."
        ) from error


def _missing(paths: Sequence[Path]) -> str:
    return " and no ".join(str(path) for path in paths if not path.exists())


def _verify(file: Path, archive: Archive) -> None:
    if archive.sha256 is None:
        return
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_CHUNK):
            digest.update(block)
    if digest.hexdigest() != archive.sha256:
        raise DataError(
            f"{file} has the SHA-256 {digest.hexdigest()}, but the published one is {archive.sha256}: the file is "
            "damaged or another one; delete it, and get it again."
        )
