"""Check a client's arrays before they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.store.features import Features, called
from flow_pl.data.store.limits import require_name
from flow_pl.errors import DataError
from flow_pl.utils.inputs import leaves, names_of

LARGEST_LABEL = np.iinfo(np.int32).max
"""Largest label; a larger one means damage, since a model has an output for each class."""

LARGEST_FEATURE = float(np.finfo(np.float32).max)
"""Largest number of single precision, the type of a model's features."""


class UnusableError(DataError):
    """A client has no data to learn from, and may be left out."""


def check_client(name: str, x: Features, y: NDArray[Any], heldout_rows: int, num_classes: int | None) -> None:
    """Check one client's arrays by themselves.

    Args:
        name: the client's name.
        x: features.
        y: labels.
        heldout_rows: number of last rows that the data's own split excludes from training.
        num_classes: number of classes, if known.

    Raises:
        UnusableError: the client has no labelled row, or none to train on.
        DataError: the arrays cannot be used; the message names the client, what was found and the remedy.
    """
    require_name(name, "the data")
    arrays, names = leaves(x), names_of(x) or (None,)
    if not arrays:
        raise unusable(name, "has a mapping of no features", "give it one array, or some by name")
    for array, part in zip(arrays, names, strict=True):
        if array.ndim == 0 or y.ndim == 0 or len(array) != len(y):
            found = f"has {called(part)} {array.shape} and labels {y.shape}"
            raise unusable(name, found, "there must be one label for each row")
    if len(y) == 0:
        raise unusable(name, "has no rows", "leave it out")
    for array, part in zip(arrays, names, strict=True):
        _check_features(name, array, part)
    _check_labels(name, y, num_classes)
    if not 0 <= heldout_rows < len(y):
        raise unusable(
            name,
            f"has {heldout_rows} rows of {len(y)} for validation and testing",
            "its own split must leave a labelled row to train on",
        )
    first = len(y) - heldout_rows
    if not labelled_rows(y[:first]).any():
        raise UnusableError(
            f"client {name!r} has no labelled row among the {first} to train on, beside {heldout_rows} for validation "
            "and testing: leave it out, or give it a label to learn from, or set unusable_clients to skip."
        )


def unusable(name: str, found: str, remedy: str) -> DataError:
    """Create the error for a client that cannot be used."""
    return DataError(f"client {name!r} {found}: {remedy}.")


def _check_features(name: str, x: NDArray[Any], part: str | None) -> None:
    where = "" if part is None else f" of {part!r}"
    if x.dtype.kind not in "biuf":
        raise unusable(name, f"has {called(part)} of type {x.dtype}", "encode them as numbers")
    if x.dtype.kind == "f":
        finite = _rows(np.isfinite(x)).all(axis=1)
        if not finite.all():
            row = int(np.argmin(finite))
            found = f"has a NaN or an infinite value in row {row}{where}"
            raise unusable(name, found, "clean that row or leave it out")
        # models get features in single precision
        fits = _rows(np.abs(x) <= LARGEST_FEATURE).all(axis=1) if x.dtype.itemsize > 4 else finite
        if not fits.all():
            row = int(np.argmin(fits))
            found = f"has a value in row {row}{where} that is larger than the largest float32, {LARGEST_FEATURE:.8g}"
            raise unusable(name, found, "rescale it, or leave that row out")


def labelled_rows(y: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows have a label, [n] bool.

    Args:
        y: [n] or [n, ...] classes, -1 = no label; or [n] real values, NaN = no label.
    """
    known = ~np.isnan(y) if y.dtype.kind == "f" else y != -1
    labelled: NDArray[np.bool_] = np.logical_or.reduce(_rows(np.asarray(known)), axis=1)
    return labelled


def _check_labels(name: str, y: NDArray[Any], num_classes: int | None) -> None:
    if y.dtype == np.float32 and y.ndim == 1:  # real values
        if np.isinf(y).any():
            raise unusable(name, f"has an infinite label in row {int(np.argmax(np.isinf(y)))}", "clean that row")
        _require_some_label(name, y)
        return
    if y.dtype.kind not in "biu" or y.dtype == np.uint64:
        remedy = (
            "encode them as integers from 0, -1 = to be predicted; real values as float32 [n], NaN = to be predicted"
        )
        raise unusable(name, f"has labels of type {y.dtype}", remedy)
    wrong = (y < -1) | (y > (LARGEST_LABEL if num_classes is None else num_classes - 1))
    if wrong.any():
        row = int(np.argmax(_rows(wrong).any(axis=1)))
        expected = f"0 to {num_classes - 1} (num_classes is {num_classes})" if num_classes else "0 or more"
        if num_classes is None and (y > LARGEST_LABEL).any():
            expected = f"at most {LARGEST_LABEL}"
        raise unusable(name, f"has the label {y[wrong][0]} in row {row}", f"expected {expected}, -1 = to be predicted")
    _require_some_label(name, y)


def _require_some_label(name: str, y: NDArray[Any]) -> None:
    if not labelled_rows(y).any():
        raise UnusableError(
            f"client {name!r} has no labelled row: leave it out, or give it a label to learn from, or set "
            "unusable_clients to skip."
        )


def _rows(values: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return values.reshape(len(values), -1)
