"""`.npy` files that grow by their first axis."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray


class GrowingArray:
    """A `.npy` file to which rows are appended; numpy pads its header so that the length can be put in at the end.

    Args:
        file: the file, open behind its header.
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
        self._row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self._length = 0

    @classmethod
    def create(cls, path: Path, like: NDArray[Any]) -> GrowingArray:
        """A new file for rows like those of an array; one that is there is replaced."""
        dtype, shape = like.dtype.newbyteorder("="), like.shape[1:]
        file = path.open("w+b")
        _write_header(file, dtype, (0, *shape))
        return cls(file, dtype, shape)

    @classmethod
    def reopen(cls, path: Path) -> GrowingArray:
        """A file that was left unfinished, at its beginning: no row counts before `truncate` says so.

        Raises:
            OSError: there is no such file.
            ValueError: its header is damaged.
        """
        file = path.open("r+b")
        try:
            npy.read_magic(file)
            (_, *shape), _, dtype = npy.read_array_header_1_0(file)
            if dtype.kind not in "biuf" or min(shape, default=1) < 1:
                raise ValueError(f"it has rows of shape {shape} and type {dtype}")
        except Exception as error:  # damage shows as one of a dozen types
            file.close()
            raise ValueError(f"{path} is damaged ({error})") from error
        return cls(file, dtype, tuple(shape))

    def fits(self, rows: NDArray[Any]) -> bool:
        """Whether an array's rows are of the type and shape of those in the file, in any byte order."""
        return (rows.dtype.newbyteorder("="), rows.shape[1:]) == (self.dtype, self.shape)

    def append(self, rows: NDArray[Any], before: int = 0) -> int:
        """Append rows.

        Args:
            rows: of the type and shape of those in the file.
            before: checksum to go on from, of the rows of another file.

        Returns:
            Their checksum, see `checksum`.
        """
        content = np.ascontiguousarray(rows, dtype=self.dtype)
        self._file.write(content.data)
        self._length += len(rows)
        return zlib.crc32(content.data, before)

    def checksum(self, start: int, count: int, before: int = 0) -> int | None:
        """The CRC-32 of rows in the file, going on from another one's, or None where it ends before them."""
        end = self._start + (start + count) * self._row_bytes
        if not 0 <= count <= end <= os.fstat(self._file.fileno()).st_size:
            return None
        self._file.seek(self._start + start * self._row_bytes)
        content = self._file.read(count * self._row_bytes)
        return zlib.crc32(content, before) if len(content) == count * self._row_bytes else None

    def truncate(self, length: int) -> None:
        """Keep the first rows; further ones are appended to them."""
        self._length = length
        self._file.truncate(self._file.seek(self._start + length * self._row_bytes))

    def flush(self) -> None:
        """Hand everything to the operating system, which keeps it if this process is killed."""
        self._file.flush()

    def finish(self) -> None:
        """Write the length, and everything to the disk.

        Bytes that are 0 and 1 alone are pictures of two levels: they become truth values, of the same size.
        """
        two_levels = self.dtype == np.uint8 and self._length > 0 and self._largest_byte() <= 1
        self._file.seek(0)
        _write_header(self._file, np.dtype(np.bool_) if two_levels else self.dtype, (self._length, *self.shape))
        sync(self._file)

    def _largest_byte(self) -> int:
        """A byte larger than 1, or else the largest one."""
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

    Before a folder is renamed to its place, so that after a power cut it does not stand for rows that never got there.
    """
    file.flush()
    os.fsync(file.fileno())


def _write_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)
