"""Check that the test file of a data set has the features of its training file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.readers.tables import Columns, Table
from flow_pl.data.store.features import read_as
from flow_pl.errors import DataError, brief
from flow_pl.utils.inputs import leaves, names_of, zip_inputs


def read_alike(
    paths: tuple[Path, Path], first: Table, columns: Columns, read: Callable[[Path, Columns], Table]
) -> list[Table]:
    """Read a second file with the features of a first one, which are matched by name where they have names.

    Args:
        paths: the first and the second file, for messages.
        first: rows of the first file.
        columns: the columns that the first file was read with.
        read: reads a file.

    Returns:
        The rows of both files, the features in the order of the first one, features and labels of the same types.

    Raises:
        DataError: the second file cannot be read, has other features, or some of another type.
    """
    second = read(paths[1], columns)
    if first.features and second.features and first.features != second.features:
        # what one file has as row numbers may be a feature of the other
        there = {*second.features, *second.left_out}
        if not set(second.features) <= set(first.features) <= there:
            raise DataError(
                f"{paths[1]} has the features {brief(list(second.features))}, in {paths[0]} they are "
                f"{brief(list(first.features))}: give both files the same columns, in any order, or name those to use "
                "in feature_columns."
            )
        second = read(paths[1], columns._replace(features=list(first.features)))
    _check_types(paths, first, second)
    features, labels = zip_inputs(_common_type, first.x, second.x), _common_type(first.y, second.y)
    return [
        table._replace(
            x=zip_inputs(lambda x, kind: x.astype(kind, copy=False), table.x, features),
            y=table.y.astype(labels, copy=False),
        )
        for table in (first, second)
    ]


def _common_type(first: NDArray[Any], second: NDArray[Any]) -> np.dtype[Any]:
    """Return a type for the values of both arrays: a client that is in one file only gets that of all others, too."""
    common = np.result_type(first, second)
    # for unsigned integers of 64 bits beside signed ones, that of numpy is a float
    is_whole = first.dtype.kind in "iu" and second.dtype.kind in "iu"
    return np.dtype(np.int64) if is_whole and common.kind == "f" else common


def _check_types(paths: tuple[Path, Path], first: Table, second: Table) -> None:
    """Check that a model gets the features of both files alike: bytes are scaled, whole numbers are tokens."""
    named = names_of(first.x) or ("x",)
    for name, before, after in zip(named, leaves(first.x), leaves(second.x), strict=True):
        if read_as(before.dtype) != read_as(after.dtype):
            where = f"features {name!r}" if isinstance(first.x, dict) else "features"
            raise DataError(
                f"{paths[1]}: {where} have type {after.dtype} ({read_as(after.dtype)}), in {paths[0]} they have "
                f"{before.dtype} ({read_as(before.dtype)}): write both files with the same type."
            )
