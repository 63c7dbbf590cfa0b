"""Convert columns of a table to arrays, and features to single precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_pl.errors import DataError, brief
from flow_pl.utils.optional import import_optional

LARGEST = float(np.finfo(np.float32).max)
"""Largest number of single precision, in which features are stored."""


def is_list(column: Any) -> bool:
    """Return whether an Arrow column holds lists.

    Args:
        column: a `pyarrow.ChunkedArray` or `Array`.
    """
    types = import_optional("pyarrow.types", "parquet")
    return bool(types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type))


def is_text(kind: Any) -> bool:
    """Return whether an Arrow type is one of texts.

    Args:
        kind: a `pyarrow.DataType`.
    """
    types = import_optional("pyarrow.types", "parquet")
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def column_values(path: Path | str, name: str, column: Any) -> NDArray[Any]:
    """Convert an Arrow column to an array.

    Args:
        path: file of the column, for messages.
        name: name of the column, for messages.
        column: a `pyarrow.ChunkedArray` or `Array` of numbers or texts, or of lists of them; categories become their
            values, and decimals double precision.

    Returns:
        [n], or [n, length, ...] for lists.

    Raises:
        DataError: the column holds lists of different lengths, or booleans of which some are missing.
    """
    types = import_optional("pyarrow.types", "parquet")
    column = plain_column(column)
    if not is_list(column):
        if types.is_decimal(column.type):
            column = column.cast("float64")
        if types.is_null(column.type) or (types.is_boolean(column.type) and column.null_count):
            raise missing(path, name, int(np.argmin(column.is_valid().to_numpy(zero_copy_only=False))))
        chunked = hasattr(column, "chunks")
        values: NDArray[Any] = column.to_numpy() if chunked else column.to_numpy(zero_copy_only=False)
        return values
    compute = import_optional("pyarrow.compute", "parquet")
    lengths = np.unique(compute.list_value_length(column).to_numpy(zero_copy_only=False))
    if column.null_count or len(lengths) > 1:
        raise DataError(f"{path}: column {name!r} holds lists of different lengths or none: pad them to one length.")
    inner = column_values(path, name, compute.list_flatten(column))
    return inner.reshape(len(column), -1, *inner.shape[1:])


def plain_column(column: Any) -> Any:
    """Unwrap the values of an Arrow column from categories and from types of other libraries.

    Args:
        column: a `pyarrow.ChunkedArray` or `Array`.
    """
    arrow, types = import_optional("pyarrow", "parquet"), import_optional("pyarrow.types", "parquet")
    while isinstance(column.type, arrow.BaseExtensionType) or types.is_dictionary(column.type):
        column = column.cast(
            column.type.value_type if types.is_dictionary(column.type) else column.type.storage_type,
        )
    return column


def single_precision(path: Path | str, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Convert features to single precision.

    Args:
        path: file of the features, for messages.
        name: name of the column or array, for messages.
        values: [n, ...] numbers or booleans.

    Returns:
        [n, ...] float32.

    Raises:
        DataError: a value is missing, not finite, or exceeds single precision; the message names its row.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    finite = np.isfinite(single)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        value, place = values[at], f"row {at[0]}" + (f" at {list(at[1:])}" if len(at) > 1 else "")
        if np.isnan(value):
            raise missing(path, name, place)
        found = f"{value}, larger than the largest float32, {LARGEST:.8g}" if np.isfinite(value) else f"{value}"
        raise DataError(f"{path}: {name!r} has {found}, in {place}: clean or rescale it, or leave that row out.")
    return single


def require_numbers(path: Path, name: str, values: NDArray[Any]) -> None:
    """Check that features are numbers.

    Raises:
        DataError: they are not numbers.
    """
    if values.dtype.kind not in "biuf":
        entries = values.tolist() if values.dtype.kind in "OUS" and values.ndim == 1 else []
        found = next(((row, value) for row, value in enumerate(entries) if not _is_number(value)), None)
        example = "" if found is None else f" ({brief(repr(found[1]))} in row {found[0]})"
        raise DataError(
            f"{path}: {name!r} has type {values.dtype}{example}: encode it as numbers, or leave it out by naming the "
            "others in feature_columns."
        )


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def missing(path: Path | str, name: str, place: int | str) -> DataError:
    """Return the error for a value that is missing in a row."""
    place = place if isinstance(place, str) else f"row {place}"
    return DataError(
        f"{path}: {name!r} has no value (NaN or null) in {place}: fill it in, leave that row out, or leave the column "
        "out by naming the others in feature_columns."
    )
