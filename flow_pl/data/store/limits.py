"""How much a source file may expand to, and which names its clients may have.

A compressed file can hold a thousand times its size and more, and a damaged one can declare any size. What is read is
therefore bounded before memory or disk is taken for it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Protocol

from flow_pl.errors import DataError

ALWAYS_ALLOWED = 1 << 30
"""Bytes that any file may expand to, however small it is."""

LARGEST_RATIO = 200
"""Beyond that, how many times its own size a file may expand to. Pictures and texts are packed to a tenth, tables of
nearly equal numbers to a hundredth."""

LONGEST_NAME = 1024
"""Bytes of a client's name: a client store gives every name the room of the longest one."""


class Readable(Protocol):
    """A file of bytes."""

    def read(self, size: int, /) -> bytes:
        """Up to as many bytes; none at the end."""


def require_bounded(path: Path | str, expanded: int, packed: int) -> None:
    """Check that a file does not expand to far more than its size.

    Args:
        path: the file, for the message.
        expanded: number of bytes that it holds, or declares to hold.
        packed: its size in bytes.

    Raises:
        DataError: it does.
    """
    if expanded > max(ALWAYS_ALLOWED, LARGEST_RATIO * packed):
        raise DataError(
            f"{path} expands to {expanded} bytes or more, but has {packed}: more than {LARGEST_RATIO} times its size "
            "is refused, as of a damaged file or a decompression bomb; if it is neither, write it without compression."
        )


def require_name(name: str, source: Path | str) -> str:
    """Check that a client's name can be stored.

    Args:
        name: the name.
        source: the file that it comes from, for the message.

    Returns:
        The name.

    Raises:
        DataError: it is too long, or holds what is no Unicode character.
    """
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: client {name!r} has a name that is no valid text ({error}): rename it.") from error
    if size > LONGEST_NAME:
        raise DataError(
            f"{source}: client '{name[:40]}...' has a name of {size} bytes, expected at most {LONGEST_NAME}: rename it."
        )
    return name


class Bounded(io.RawIOBase):
    """A file that is expanded while it is read, up to what `require_bounded` allows; to be wrapped in a buffer.

    Args:
        file: gives what is expanded.
        path: the packed file.
    """

    def __init__(self, file: Readable, path: Path) -> None:
        super().__init__()
        self._file = file
        self._path = path
        self._packed = path.stat().st_size
        self._expanded = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as the buffer has.

        Raises:
            DataError: the file has expanded to too much.
        """
        block = self._file.read(len(buffer))
        self._expanded += len(block)
        require_bounded(self._path, self._expanded, self._packed)
        buffer[: len(block)] = block
        return len(block)
