"""Convert columns of a table to labels: classes, or real values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.encodings.values import EXACT, whole_numbers
from flow_pl.data.readers.columns import column_values, is_list, is_text, plain_column, single_precision
from flow_pl.errors import DataError, brief
from flow_pl.utils.optional import import_optional


class Labels(NamedTuple):
    """Holds the labels of a table.

    Attributes:
        y: [n] or [n, ...] numbers of the classes; -1 = to be predicted.
        names: names of the classes in the order of their numbers if they are texts; otherwise none.
    """

    y: NDArray[Any]
    names: tuple[str, ...] = ()


def column_labels(path: Path, name: str, column: Any) -> Labels:
    """Return the labels of an Arrow column.

    Args:
        path: file of the column, for messages.
        name: name of the column, for messages.
        column: a `pyarrow.ChunkedArray` of numbers, booleans or texts, or of lists of numbers; null = to be
            predicted.

    Returns:
        The labels.

    Raises:
        DataError: the values are not labels.
    """
    compute = import_optional("pyarrow.compute", "parquet")
    if is_list(plain_column(column)):
        return array_labels(path, name, column_values(path, name, column))
    known = column.is_valid().to_numpy()
    column = plain_column(column)
    if is_text(column.type):
        # only distinct texts are kept
        encoded = compute.dictionary_encode(column).combine_chunks()
        texts = np.array(encoded.dictionary.to_pylist(), dtype=object)
        return _named(texts, encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False))
    if not known.any():
        return Labels(np.full(len(known), -1, dtype=np.int64))
    values = column_values(path, name, column.drop_null())
    if values.dtype.kind == "O":
        raise _no_labels(path, name, str(column.type))
    found = array_labels(path, name, values, np.flatnonzero(known))
    if known.all():
        return found
    y = np.full(len(known), -1, dtype=np.int64)
    y[known] = found.y
    return Labels(y)


def array_labels(path: Path, name: str, values: NDArray[Any], rows: NDArray[np.int64] | None = None) -> Labels:
    """Return the labels of an array.

    Args:
        path: file of the column, for messages.
        name: name of the column, for messages.
        values: [n] or [n, ...] numbers or booleans, or [n] texts, of which empty ones are to be predicted.
        rows: [n] row numbers in the file, for messages; None = the first n.

    Returns:
        The labels.

    Raises:
        DataError: the values are not labels.
    """
    if values.dtype.kind in "US" and values.ndim == 1:
        texts, indices = np.unique(values, return_inverse=True)
        try:
            decoded = [text.decode("utf-8") if isinstance(text, bytes) else text for text in texts.tolist()]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: {name!r} has a label that is not UTF-8 ({brief(error)}): write it again."
            ) from error
        return _named(np.array(decoded, dtype=object), indices)
    if values.dtype.kind not in "biuf":
        raise _no_labels(path, name, str(values.dtype))
    if values.ndim > 1 and values.size == len(values):
        values = values.reshape(len(values))
    y = whole_numbers(values)
    if y.dtype.kind == "f" or y.dtype == np.uint64:
        # the first one that is not a class
        wrong = ~np.isfinite(y) | (y != np.floor(y)) if y.dtype.kind == "f" else y > np.iinfo(np.int64).max
        at = np.argwhere(wrong | (np.abs(y) >= EXACT))[0]
        row = int(at[0]) if rows is None else int(rows[at[0]])
        found = "NaN" if np.isnan(float(y[tuple(at)])) else f"{y[tuple(at)]}"
        raise DataError(
            f"{path}: {name!r} has the label {found} in row {row}, expected whole numbers from 0, or texts; -1 marks a "
            "row to be predicted. For real values, set labels to values."
        )
    return Labels(y.astype(np.int8) if y.dtype.kind == "b" else y)


def column_reals(path: Path, name: str, column: Any) -> Labels:
    """Return the real-valued labels of an Arrow column, of which null and empty texts are to be predicted.

    Args:
        path: file of the column, for messages.
        name: name of the column, for messages.
        column: a `pyarrow.ChunkedArray` of numbers, or of texts that are numbers.

    Returns:
        The labels, [n] float32; NaN = to be predicted.

    Raises:
        DataError: the column holds something else.
    """
    column = plain_column(column)
    if is_text(column.type):  # as in CSV files
        arrow, compute = import_optional("pyarrow", "parquet"), import_optional("pyarrow.compute", "parquet")
        texts = compute.if_else(compute.equal(column, ""), None, column)
        try:
            column = compute.cast(texts, "float64")
        except arrow.ArrowInvalid as error:
            raise DataError(f"{path}: {name!r} has a label that is no number ({brief(error)}): encode it.") from error
    known = column.is_valid().to_numpy()
    values = np.full(len(known), np.nan)
    if not known.any():
        return array_values(path, name, values)
    found = column_values(path, name, column.drop_null())
    if found.dtype.kind not in "biuf" or found.ndim != 1:
        raise _no_values(path, name, str(column.type))
    values[known] = found
    return array_values(path, name, values)


def array_values(path: Path, name: str, values: NDArray[Any]) -> Labels:
    """Return the real-valued labels of an array.

    Args:
        path: file of the column, for messages.
        name: name of the column, for messages.
        values: [n] or [n, 1] numbers; NaN = to be predicted.

    Returns:
        The labels, [n] float32.

    Raises:
        DataError: they are not numbers, or one exceeds single precision.
    """
    if values.dtype.kind not in "biuf" or values.size != len(values):
        raise _no_values(path, name, f"{values.dtype} and shape {list(values.shape)}")
    y = values.reshape(len(values))
    missing = np.isnan(y) if y.dtype.kind == "f" else np.zeros(len(y), dtype=bool)
    single = single_precision(path, name, np.where(missing, 0, y))
    return Labels(np.where(missing, np.float32(np.nan), single))


def _named(texts: NDArray[Any], indices: NDArray[Any]) -> Labels:
    """Return the classes of texts, given as indices into them (-1 = none), in sorted order."""
    names = sorted({text for text in texts.tolist() if text})
    number = {text: place for place, text in enumerate(names)}
    # the last entry is for the index -1
    places = np.array([*(number.get(text, -1) for text in texts.tolist()), -1], dtype=np.int64)
    return Labels(places[indices], tuple(names))


def _no_values(path: Path, name: str, kind: str) -> DataError:
    return DataError(f"{path}: {name!r} has labels of type {kind}, expected one number for each row (labels: values).")


def _no_labels(path: Path, name: str, kind: str) -> DataError:
    return DataError(
        f"{path}: {name!r} has labels of type {kind}, expected whole numbers from 0, truth values or texts: encode "
        "them so."
    )
