"""Write `.npy` files that grow along their first axis."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray


class GrowingArray:
    """A `.npy` file to which rows are appended; numpy pads the header, so that the length can be filled in at the end.

    Args:
        file: the file, open after its header.
        dtype: type of the entries.
        shape: shape of a row.

    Attributes:
        dtype: type of the entries.
        shape: shape of a row.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self._file = file
        self._start = file.tell()
        self._length = 0

    @classmethod
    def create(cls, path: Path, like: NDArray[Any]) -> GrowingArray:
        """Create a file for rows like those of an array; an existing one is replaced."""
        dtype, shape = like.dtype.newbyteorder("="), like.shape[1:]
        file = path.open("w+b")
        _write_header(file, dtype, (0, *shape))
        return cls(file, dtype, shape)

    def fits(self, rows: NDArray[Any]) -> bool:
        """Return whether an array's rows have the file's type and shape, in any byte order."""
        return (rows.dtype.newbyteorder("="), rows.shape[1:]) == (self.dtype, self.shape)

    def append(self, rows: NDArray[Any]) -> None:
        """Append rows of the file's type and shape."""
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self._length += len(rows)

    def finish(self) -> None:
        """Fill in the length, and write everything to the disk.

        Bytes that are all 0 or 1 are images with two levels: they become booleans, of the same size.
        """
        two_levels = self.dtype == np.uint8 and self._length > 0 and self._largest_byte() <= 1
        self._file.seek(0)
        _write_header(self._file, np.dtype(np.bool_) if two_levels else self.dtype, (self._length, *self.shape))
        sync(self._file)

    def _largest_byte(self) -> int:
        """Return a byte larger than 1 if there is one, or else the largest."""
        self._file.flush()
        self._file.seek(self._start)
        largest = 0
        while largest <= 1 and (block := self._file.read(1 << 20)):
            largest = max(largest, max(block))
        return largest

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def sync(file: BinaryIO | TextIO) -> None:
    """Write a file to the disk.

    Done before a folder is renamed to its final name, so that no rows are missing in it after a power cut.
    """
    file.flush()
    os.fsync(file.fileno())


def _write_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)
