"""Describe the columns of a file that says in every row whose it is, and join them to a table of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.readers.columns import require_numbers, single_precision
from flow_pl.data.readers.labels import Labels
from flow_pl.data.store.features import Features
from flow_pl.errors import DataError, brief

FeatureColumns = Sequence[str] | Mapping[str, str | Sequence[str]]
"""Columns of the features: they are joined; or those of each name stay apart, as a mapping."""


class Columns(NamedTuple):
    """Names the columns of a file, and says how they are read.

    Attributes:
        client: the client of each row.
        label: the labels.
        features: the features; None = those that the reader takes without names.
        tokens: whether whole numbers in arrays or lists of features are tokens, bytes among them; None = in a mapping,
            and where labels are sequences too, except for bytes, which are pixels.
        real_valued: whether the labels are real values, not classes.
    """

    client: str
    label: str
    features: FeatureColumns | None = None
    tokens: bool | None = None
    real_valued: bool = False

    def feature_names(self) -> list[str]:
        """Return the named columns of the features, each once."""
        if not isinstance(self.features, Mapping):
            return list(self.features or ())
        return list(dict.fromkeys(name for group in self.features.values() for name in _group(group)))

    def all(self) -> list[str]:
        """Return all named columns."""
        return [self.client, self.label, *self.feature_names()]


class Table(NamedTuple):
    """The rows of a file, in its order.

    Attributes:
        x: [n, ...] features; a mapping where they have names.
        y: [n, ...] labels; -1 = to be predicted, or NaN where they are real values.
        client: [n] client of each row, integers or texts.
        names: [names] that integer clients are indices into, if the file has them.
        class_names: names of the classes, if the labels are texts.
        left_out: columns that hold the row numbers of a pandas table.
        features: columns that a reader took as features without their being named, in the order of the file.
    """

    x: Features
    y: NDArray[Any]
    client: NDArray[Any]
    names: NDArray[Any] | None
    class_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


def require_columns(path: Path, stored: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that a file stores the wanted columns, each once.

    Raises:
        DataError: one is missing, or there twice.
    """
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise DataError(
            f"{path} has no {' and no '.join(map(repr, missing))}, only {brief(list(map(repr, stored)))}: "
            "name the right ones by client_column, label_column and feature_columns."
        )
    twice = [name for name, count in Counter(stored).items() if count > 1 and name in wanted]
    if twice:
        raise DataError(
            f"{path} has the column {' and '.join(map(repr, twice))} more than once: give every column a name of its "
            "own."
        )


def check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the columns of a file have as many rows, at least one.

    Raises:
        DataError: they have not.
    """
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise DataError(
            f"{path} has arrays of shapes {dict(shapes)}: all must have the same number of rows, at least one."
        )


def make_table(path: Path, arrays: dict[str, NDArray[Any]], columns: Columns, labels: Labels) -> Table:
    """Join the features of a file.

    Args:
        path: the file, for messages.
        arrays: [n, ...] the client of each row and the features, by column.
        columns: the columns, those of the features named.
        labels: the labels.

    Raises:
        DataError: the features cannot be joined, or a client is neither an integer nor a text.
    """
    client, features, tokens = columns.client, columns.features or (), columns.tokens
    if arrays[client].ndim != 1 or arrays[client].dtype.kind not in "iuUS":
        raise DataError(
            f"{path}: {client!r} has type {arrays[client].dtype} and shape {arrays[client].shape}, expected one "
            "integer or text for each row."
        )
    if isinstance(features, Mapping):
        # each is what it is: whole numbers in lists beside others are tokens, their mask or their segments
        keeps = tokens is None or tokens
        x: Features = {
            name: _joined(path, arrays, _group(group), keeps, bool(tokens)) for name, group in features.items()
        }
    else:
        x = _joined(path, arrays, features, labels.y.ndim > 1 if tokens is None else tokens, bool(tokens))
    return Table(x, labels.y, arrays[client], None, labels.names)


def _group(columns: str | Sequence[str]) -> Sequence[str]:
    return [columns] if isinstance(columns, str) else columns


def _joined(
    path: Path, arrays: dict[str, NDArray[Any]], columns: Sequence[str], keeps_integers: bool, keeps_bytes: bool
) -> NDArray[Any]:
    """Return the features of some columns, joined along a new last axis where they are several."""
    shapes = {name: arrays[name].shape for name in columns}
    for name in columns:
        require_numbers(path, name, arrays[name])
        if shapes[name] != shapes[columns[0]]:
            raise DataError(
                f"{path}: the features {shapes} cannot be joined: they must have equal shapes. Where a model takes "
                "several features by name, give feature_columns as a mapping from name to column."
            )
    parts = [_features(path, name, arrays[name], keeps_integers, keeps_bytes) for name in columns]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.astype(np.float32) for part in parts]
    x = parts[0] if len(parts) == 1 else np.stack(parts, axis=-1)
    return x if x.ndim > 1 else x[:, None]


def _features(path: Path, name: str, values: NDArray[Any], keeps_integers: bool, keeps_bytes: bool) -> NDArray[Any]:
    """Convert single numbers to single precision; bytes of pictures, and tokens, are stored as they are."""
    if values.ndim > 1 and values.dtype == np.uint8 and keeps_bytes:
        return values.astype(np.int16)  # stored bytes are pixels
    is_picture = values.ndim > 1 and (values.dtype.kind == "b" or values.dtype == np.uint8)
    is_tokens = values.ndim > 1 and values.dtype.kind in "iu" and keeps_integers
    return values if is_picture or is_tokens else single_precision(path, name, values)
