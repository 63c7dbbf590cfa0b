"""Limit how much a source file may expand to, and which names its clients may have.

A compressed file can hold more than a thousand times its size, and a damaged one can declare any size. So sizes are
checked before memory or disk space is allocated.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Protocol

from flow_pl.errors import DataError

ALWAYS_ALLOWED = 1 << 30
"""Number of bytes that any file may expand to, however small it is."""

LARGEST_RATIO = 200
"""Beyond that, largest ratio of the expanded size to the size of a file. Images and texts are compressed to a tenth,
tables of nearly equal numbers to a hundredth."""

LONGEST_NAME = 1024
"""Largest number of bytes of a client's name: in a store, all names take as much space as the longest."""


class Readable(Protocol):
    """A file of bytes."""

    def read(self, size: int, /) -> bytes:
        """Read up to this many bytes; none at the end."""


def require_bounded(path: Path | str, expanded: int, packed: int) -> None:
    """Check that a file does not expand to far more than its size.

    Args:
        path: the file, for the message.
        expanded: number of bytes that it contains, or declares.
        packed: size of the file in bytes.

    Raises:
        DataError: it expands to more than allowed.
    """
    if expanded > max(ALWAYS_ALLOWED, LARGEST_RATIO * packed):
        raise DataError(
            f"{path} expands to {expanded} bytes or more, but has {packed}: more than {LARGEST_RATIO} times its size "
            "is refused, as of a damaged file or a decompression bomb; if it is neither, write it without compression."
        )


def require_name(name: str, source: Path | str) -> str:
    """Check that a client's name can be stored.

    Args:
        name: name of the client.
        source: file of the client, for the message.

    Returns:
        The name.

    Raises:
        DataError: the name is blank, too long, or not valid Unicode.
    """
    if not name.strip():
        raise DataError(f"{source}: a client has the name {name!r}, which is blank: name the client of every row.")
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: client {name!r} has a name that is not valid text ({error}): rename it.") from error
    if size > LONGEST_NAME:
        raise DataError(
            f"{source}: client '{name[:40]}...' has a name of {size} bytes, expected at most {LONGEST_NAME}: rename it."
        )
    return name


class Bounded(io.RawIOBase):
    """A file that is expanded while it is read, up to the limit of `require_bounded`; to be wrapped in a buffer.

    Args:
        file: file of the expanded bytes.
        path: path of the compressed file.
    """

    def __init__(self, file: Readable, path: Path) -> None:
        super().__init__()
        self._file = file
        self._path = path
        self._packed = path.stat().st_size
        self._expanded = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as the buffer holds.

        Raises:
            DataError: the file has expanded to more than allowed.
        """
        block = self._file.read(len(buffer))
        self._expanded += len(block)
        require_bounded(self._path, self._expanded, self._packed)
        buffer[: len(block)] = block
        return len(block)
