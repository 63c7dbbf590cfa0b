"""Read a client's columns: texts, numbers and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_pl.errors import DataError, brief

Columns = Mapping[str, Sequence[Any]]
"""A client's examples: columns by name, all of the same length, of numbers, arrays, texts or JSON values."""

EXACT = np.float64(2**53)
"""Whole numbers below it are exact in double precision; of that type, since half precision has no such number."""


def texts(columns: Columns, name: str) -> list[str]:
    """Return a column of texts, which files store as bytes or as texts.

    Args:
        columns: a client's examples.
        name: name of the column.

    Returns:
        The texts; bytes that are not UTF-8 become replacement characters.

    Raises:
        DataError: an entry is not a text.
    """
    found = []
    for row, value in enumerate(columns[name]):
        if not isinstance(value, str | bytes):
            raise DataError(f"has a {type(value).__name__} in row {row} of {name!r}, expected a text.")
        found.append(value if isinstance(value, str) else value.decode("utf-8", errors="replace"))
    return found


def whole_numbers(labels: NDArray[Any]) -> NDArray[Any]:
    """Convert labels that are integers of another type to signed integers; leave others unchanged.

    Args:
        labels: labels of any numeric type and shape.

    Returns:
        The labels.
    """
    if labels.dtype.kind == "f" and ((labels == np.floor(labels)) & (np.abs(labels) < EXACT)).all():
        return labels.astype(np.int64)
    if labels.dtype == np.uint64 and (labels <= np.iinfo(np.int64).max).all():
        return labels.astype(np.int64)
    return labels


def class_numbers(column: Sequence[Any], name: str, classes: Sequence[str] | None = None) -> NDArray[Any]:
    """Return a column of labels as integers.

    Args:
        column: labels, numbers or texts.
        name: name of the column, for messages.
        classes: names of the classes in the order of their numbers; None = labels are numbers.

    Returns:
        [n] or [n, ...] classes; -1 = to be predicted.

    Raises:
        DataError: an entry is not a label.
    """
    if classes is not None or (len(column) and isinstance(column[0], str | bytes)):
        return _numbered(column, name, classes)
    labels = number_column(column, name)
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        row = int(np.argwhere(np.isnan(labels))[0][0])
        raise DataError(f"has the label NaN in row {row} of {name!r}: expected 0 or more, -1 = to be predicted.")
    labels = whole_numbers(labels)  # JSON files may write 3.0 for 3
    if labels.dtype.kind == "f":
        place = tuple(np.argwhere((labels != np.floor(labels)) | (np.abs(labels) >= EXACT))[0])
        raise DataError(
            f"has the label {labels[place]} in row {place[0]} of {name!r}, expected whole numbers from 0. For real "
            "values, set labels to values in the encoding, Vectors."
        )
    # a single label per row may be stored as [n, 1]
    return labels.reshape(len(labels)) if labels.size == len(labels) else labels


def real_numbers(column: Sequence[Any], name: str) -> NDArray[np.float32]:
    """Return a column of real-valued labels.

    Args:
        column: numbers, or lists of one number; None and NaN = to be predicted.
        name: name of the column, for messages.

    Returns:
        [n] values; NaN = to be predicted.

    Raises:
        DataError: an entry is not a number, or exceeds single precision.
    """
    known = column if isinstance(column, np.ndarray) else [np.nan if value is None else value for value in column]
    values = float_column(known, name)
    if values.size != len(values):
        raise DataError(f"has labels of shape {list(values.shape[1:])} in {name!r}, expected one number for each row.")
    return values.reshape(len(values))


def number_column(column: Sequence[Any], name: str) -> NDArray[Any]:
    """Return a column of numbers as an array.

    Args:
        column: numbers, or lists or arrays of one shape.
        name: name of the column, for messages.

    Raises:
        DataError: rows differ in shape, or hold something else.
    """
    try:
        values = np.asarray(column)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # rows of different lengths
        raise DataError(f"has rows of different shapes in {name!r} ({brief(error)}): make them equal.") from error
    if values.dtype.kind not in "biuf":
        raise DataError(f"has values of type {values.dtype} in {name!r}, expected numbers.")
    return values


def float_column(column: Sequence[Any], name: str) -> NDArray[Any]:
    """Return a column of numbers in single precision.

    Args:
        column: see `number_column`.
        name: name of the column, for messages.

    Raises:
        DataError: see `number_column`; or a number exceeds single precision.
    """
    values = number_column(column, name)
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    lost = np.isinf(single) & np.isfinite(values)
    if lost.any():
        row = int(np.argwhere(lost)[0][0])
        raise DataError(
            f"has {values[lost][0]} in row {row} of {name!r}, larger than the largest float32, "
            f"{float(np.finfo(np.float32).max):.8g}: rescale it, or leave that row out."
        )
    return single


def _numbered(column: Sequence[Any], name: str, classes: Sequence[str] | None) -> NDArray[np.int64]:
    """Return the class numbers of labels that are texts; an empty one is -1."""
    if classes is None:
        raise DataError(
            f"has the label {brief(repr(column[0]))} in {name!r}: set classes in the encoding to the names of all "
            "classes."
        )
    numbers = {text: number for number, text in enumerate(classes)} | {"": -1}
    labels = [text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text for text in column]
    unknown = [label for label in labels if label is not None and label not in numbers]
    if unknown:
        raise DataError(f"has the label {brief(repr(unknown[0]))} in {name!r}, expected one of {brief(list(classes))}.")
    return np.array([-1 if label is None else numbers[label] for label in labels], dtype=np.int64)
