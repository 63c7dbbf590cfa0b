"""Read `.npz` files, as arrays or as the columns of a table."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from flow_pl.data.store.limits import require_bounded
from flow_pl.errors import DataError, brief
from flow_pl.utils.optional import import_optional


def npz_arrays(path: Path, wanted: Callable[[str], bool]) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Read some arrays of a `.npz` file.

    Args:
        path: the file.
        wanted: whether to read the array of a name.

    Returns:
        The names of all arrays, and the wanted arrays.

    Raises:
        DataError: the file is damaged, not written by numpy, holds objects, or expands to too many bytes.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is damaged, or holds a single array without names, or pickled objects")
        with zipfile.ZipFile(path) as file:
            stored = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            require_bounded(path, sum(info.file_size for info in file.infolist()), path.stat().st_size)
            return list(stored), {name: _array(file, info) for name, info in stored.items() if wanted(name)}
    except DataError:
        raise
    except Exception as error:  # damage raises one of a dozen types: of zipfile, of zlib, OSError, ValueError, ...
        raise DataError(
            f"{path} cannot be read ({brief(error)}): write it again by numpy.savez, with arrays of numbers or texts."
        ) from error


def _array(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """Read one array, after checking its size before memory is allocated."""
    with file.open(info) as content:
        version = npy.read_magic(content)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read_header is None:
            raise ValueError(f"{info.filename} is of version {version} of numpy's format, which is only for records")
        shape, _, dtype = read_header(content)
        if dtype.hasobject:
            raise ValueError("Object arrays are refused, since they can run code when they are read")
        size = math.prod(shape) * dtype.itemsize
        # arrays without bytes can declare any number of rows
        if content.tell() + size != info.file_size or (not size and shape[:1] != (0,)):
            raise ValueError(f"{info.filename} has {info.file_size} bytes, but declares shape {shape} and type {dtype}")
    with file.open(info) as content:
        values: NDArray[Any] = npy.read_array(content, allow_pickle=False)
        return values


def npz_table(path: Path, columns: Sequence[str], split: str) -> Any:
    """Read a `.npz` file as a table, whose columns are its arrays with an entry for each row.

    The array `x_train` is the column `x` of the split `train`. A file without such arrays has no splits, and its array
    `x` is the column.

    Args:
        path: the file.
        columns: necessary columns; others with as many rows are read, too.
        split: name of the split; `train+test` = the rows of both, in this order.

    Returns:
        A `pyarrow.Table`; arrays of several axes become columns of lists, without a copy.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: the file is damaged, a column is missing, or the columns have different numbers of rows.
    """
    endings = [f"_{part}" for part in split.split("+")]
    stored, arrays = npz_arrays(path, lambda name: True)
    if not any(column + ending in stored for column in columns for ending in endings):
        endings = [""]
    missing = [column + ending for ending in endings for column in columns if column + ending not in stored]
    if missing:
        raise DataError(
            f"{path} has no {' and no '.join(missing)}, only {brief(stored)}: name the right columns in the "
            "encoding, and the right split."
        )
    parts = [_columns(path, arrays, columns, ending) for ending in endings]
    names = [name for name in parts[0] if all(name in part for part in parts)]
    try:
        table = {name: np.concatenate([part[name] for part in parts]) for name in names}
    except ValueError as error:
        raise DataError(f"{path}: the splits {split} do not match ({brief(error)}): correct the file.") from error
    return import_optional("pyarrow", "parquet").table({name: _arrow(values) for name, values in table.items()})


def _columns(
    path: Path, arrays: dict[str, NDArray[Any]], columns: Sequence[str], ending: str
) -> dict[str, NDArray[Any]]:
    """Return the arrays of one split by column: the necessary ones, and those with as many rows."""
    lengths = {column + ending: arrays[column + ending].shape[:1] for column in columns}
    if len(set(lengths.values())) != 1 or set(lengths.values()) & {(), (0,)}:
        shapes = {name: arrays[name].shape for name in lengths}
        raise DataError(f"{path} has arrays of shapes {shapes}: all must have the same number of rows, at least one.")
    length = next(iter(lengths.values()))
    named = {name.removesuffix(ending): array for name, array in arrays.items() if name.endswith(ending)}
    return {name: array for name, array in named.items() if array.shape[:1] == length}


def _arrow(values: NDArray[Any]) -> Any:
    """Convert an array to an Arrow column; every axis after the first one becomes lists of fixed length."""
    arrow = import_optional("pyarrow", "parquet")
    column = arrow.array(np.ascontiguousarray(values).reshape(-1))
    for length in reversed(values.shape[1:]):
        column = arrow.FixedSizeListArray.from_arrays(column, length)
    return column
