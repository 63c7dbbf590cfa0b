"""Check where an HDF5 file stores texts of variable length, before HDF5 reads them.

HDF5 trusts this part of a file: damage can make it loop forever, and a small file can refer to the same long text in
any number of rows. Source of the layout: HDF5 File Format Specification 3.0, III.E "Global Heap" and VIII "Appendix:
Definitions, References" (a row is the length of its text, the address of a heap, and the number of an object in it).
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROW = np.dtype([("length", "<u4"), ("heap", "<u8"), ("object", "<u4")])
_HEAP = struct.Struct("<4sB3xQ")
_OBJECT = struct.Struct("<HH4xQ")
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_MOST_REMEMBERED = 1 << 16


class Texts:
    """Checks the texts of a file.

    Args:
        path: the file.
        file: the same file, opened by h5py.

    Raises:
        ValueError: addresses have another size than in files of h5py.
    """

    def __init__(self, path: Path, file: Any) -> None:
        creation = file.id.get_create_plist()
        if creation.get_sizes() != (8, 8):
            raise ValueError(f"its addresses and lengths have {creation.get_sizes()} bytes, expected 8 and 8")
        self._base = creation.get_userblock()
        self._size = path.stat().st_size
        self._file = path.open("rb")
        self._whole: set[int] = set()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def lengths(self, dataset: Any, count: int) -> NDArray[np.uint32]:
        """Return the lengths of the first texts of a field, after checking everything that HDF5 needs to read them.

        Args:
            dataset: the field, with one axis.
            count: number of texts.

        Returns:
            [count] lengths in bytes.

        Raises:
            ValueError: something is damaged, or stored in a form that cannot be checked.
        """
        rows = self._rows(dataset, count)
        for heap in np.unique(rows["heap"]).tolist():
            if heap and heap not in self._whole:
                self._check_heap(heap)
                if len(self._whole) == _MOST_REMEMBERED:
                    self._whole.clear()
                self._whole.add(heap)
        return rows["length"]

    def _rows(self, dataset: Any, count: int) -> NDArray[Any]:
        if dataset.chunks is not None:
            return self._chunked_rows(dataset, count)
        if not dataset.id.get_storage_size():  # never written, so the texts are empty
            return np.zeros(count, dtype=_ROW)
        offset = dataset.id.get_offset()
        if offset is None:
            raise ValueError(f"the texts of {dataset.name} are stored in its header, expected outside of it")
        return np.frombuffer(self._read(offset, count * _ROW.itemsize), dtype=_ROW)

    def _chunked_rows(self, dataset: Any, count: int) -> NDArray[Any]:
        creation = dataset.id.get_create_plist()
        filters = [creation.get_filter(index)[0] for index in range(creation.get_nfilters())]
        length = dataset.chunks[0]
        rows = np.zeros(-(-count // length) * length, dtype=_ROW)
        for start in range(0, count, length):
            info = dataset.id.get_chunk_info_by_coord((start,))
            if info.byte_offset is None:  # never written
                continue
            content = self._read(info.byte_offset, info.size)
            for index, code in reversed(list(enumerate(filters))):
                if not info.filter_mask >> index & 1:
                    content = _unfiltered(content, code, length * _ROW.itemsize)
            if len(content) != length * _ROW.itemsize:
                raise ValueError(f"a chunk of {dataset.name} has {len(content)} bytes")
            rows[start : start + length] = np.frombuffer(content, dtype=_ROW)
        return rows[:count]

    def _check_heap(self, address: int) -> None:
        """Walk through the objects of a heap, as HDF5 does."""
        signature, version, size = _HEAP.unpack(self._read(self._base + address, _HEAP.size))
        if signature != b"GCOL" or version != 1:
            raise ValueError(f"there is no heap of texts at {address}")
        content = self._read(self._base + address, size)
        at, seen = _HEAP.size, set()
        while len(content) - at >= _OBJECT.size:
            number, _, length = _OBJECT.unpack_from(content, at)
            # number 0 is free space, including its header
            at += (_OBJECT.size + (length + 7) // 8 * 8) if number else length
            if (not number and length < _OBJECT.size) or at > len(content) or number in seen:
                raise ValueError(f"the heap of texts at {address} is damaged")
            seen.add(number)

    def _read(self, offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > self._size:
            raise ValueError(f"it ends at {self._size}, but {size} bytes are expected at {offset}")
        self._file.seek(offset)
        return self._file.read(size)


def _unfiltered(content: bytes, code: int, size: int) -> bytes:
    """Undo one of the filters of a chunk of this size in bytes."""
    if code == _DEFLATE:
        inflated = zlib.decompressobj()
        found = inflated.decompress(content, size + 64)
        if not inflated.eof:
            raise ValueError("a chunk of texts is damaged")
        return found
    if code == _SHUFFLE:
        whole = len(content) // _ROW.itemsize * _ROW.itemsize
        columns = np.frombuffer(content[:whole], dtype=np.uint8).reshape(_ROW.itemsize, -1)
        return bytes(columns.T.tobytes()) + content[whole:]
    if code == _FLETCHER32:
        return content[:-4]
    raise ValueError(f"texts are compressed by filter {code}, expected gzip")
