"""Reading a file that says in every row whose it is: `.npz` arrays, or the columns of a Parquet or CSV file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.encodings.encoding import whole_numbers
from flow_pl.data.readers.columns import (
    Labels,
    array_labels,
    array_values,
    column_labels,
    column_reals,
    column_values,
    is_text,
    plain_column,
    require_numbers,
    single_precision,
)
from flow_pl.data.readers.csv_tables import csv_table
from flow_pl.data.readers.npz import npz_arrays
from flow_pl.data.store.features import Features
from flow_pl.data.store.limits import require_bounded
from flow_pl.errors import DataError, brief
from flow_pl.utils.optional import import_optional

_INDEX_NAMES = re.compile(r"__index_level_\d+__|Unnamed: \d+(_level_\d+)?")
"""Names that only the row numbers of a pandas table have, in Parquet and in CSV."""

_MAYBE_INDEX = re.compile(r"index|level_\d+")
"""Names that pandas gives row numbers which were made a column; they may be a feature's as well."""


class Table(NamedTuple):
    """The rows of a file, in its order.

    Attributes:
        x: [n, ...] features; a mapping where they have names.
        y: [n, ...] labels; -1 = to be predicted, or NaN where they are real values.
        client: [n] client of each row, integers or texts.
        names: [names] that integer clients are indices into, if the file has them.
        class_names: names of the classes, if the labels are texts.
        left_out: columns that hold the row numbers of a pandas table.
    """

    x: Features
    y: NDArray[Any]
    client: NDArray[Any]
    names: NDArray[Any] | None
    class_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def read_npz(
    path: Path,
    client: str,
    label: str,
    features: Columns | None,
    tokens: bool | None = None,
    real_valued: bool = False,
) -> Table:
    """Read a `.npz` file.

    Args:
        path: the file.
        client: array with the client of each row; integers may be indices into an array `client_names`.
        label: array of the labels.
        features: arrays of the features, joined or as a mapping; None = `x`.
        tokens: whether whole numbers in arrays of features are tokens; None = where labels are sequences too.
        real_valued: whether the labels are real values, not classes.

    Returns:
        The rows.

    Raises:
        DataError: the file is damaged, an array is missing, or the arrays do not fit each other.
    """
    features = features or ["x"]
    columns = all_columns(features)
    needed = {client, label, *columns, "client_names"}
    stored, arrays = npz_arrays(path, lambda name: name in needed)
    _require(path, stored, [client, label, *columns])
    arrays[client] = whole_numbers(arrays[client])
    names = arrays.get("client_names") if arrays[client].dtype.kind in "iu" else None
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise DataError(
            f"{path}: client_names has type {names.dtype} and shape {names.shape}, expected a list of texts."
        )
    _check_shapes(path, {name: arrays[name].shape for name in [client, label, *columns]})
    labels = (array_values if real_valued else array_labels)(path, label, arrays[label])
    return _table(path, arrays, client, labels, features, tokens)._replace(names=names)


def read_parquet(
    path: Path,
    client: str,
    label: str,
    features: Columns | None,
    tokens: bool | None = None,
    real_valued: bool = False,
) -> Table:
    """Read a Parquet file.

    Args:
        path: the file.
        client: column with the client of each row.
        label: column of the labels; null = to be predicted.
        features: columns of the features, of numbers or of lists of one length; None = all other columns but the row
            numbers that pandas adds.
        tokens: whether whole numbers in lists are tokens; None = where labels are sequences too.
        real_valued: whether the labels are real values, not classes.

    Returns:
        The rows.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: the file is damaged, a column is missing, or the columns do not fit each other.
    """
    arrow = import_optional("pyarrow", "parquet")
    parquet = import_optional("pyarrow.parquet", "parquet")
    try:
        check_parquet(path)
        schema = parquet.read_schema(path)
        others = [name for name in schema.names if name not in (client, label)]
        wanted = [client, label, *(all_columns(features) if features else others)]
        _require(path, schema.names, wanted)
        # texts stay as often as they differ, however many rows have the same one
        texts = [name for name in (client, label) if is_text(schema.field(name).type)]
        columns = parquet.ParquetFile(path, read_dictionary=texts).read(columns=wanted)
        columns.validate(full=True)
        return _from_arrow(path, columns, client, label, features, tokens, real_valued, _pandas_index(schema.metadata))
    except DataError:
        raise
    # damage shows as one of several types; what NumPy cannot hold as another one
    except (arrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} cannot be read ({brief(error)}): write it anew as a Parquet file.") from error


def read_csv(
    path: Path,
    client: str,
    label: str,
    features: Columns | None,
    tokens: bool | None = None,
    real_valued: bool = False,
) -> Table:
    """Read a CSV file; see `csv_table` for what it may look like.

    Args:
        path: the file.
        client: column with the client of each row, which is taken as a text.
        label: column of the labels; an empty one = to be predicted.
        features: columns of the features, of numbers or of truth values; None = all other columns but the row numbers
            that pandas adds.
        tokens: without effect, as columns hold single numbers.
        real_valued: whether the labels are real values, not classes.

    Returns:
        The rows.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: the file is damaged, a column is missing, or the columns do not fit each other.
    """
    arrow = import_optional("pyarrow", "parquet")
    try:
        columns = csv_table(path, client, label)
        _require(path, columns.column_names, [client, label, *all_columns(features or [])])
        return _from_arrow(path, columns, client, label, features, tokens, real_valued, ())
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(
            f"{path} cannot be read ({brief(error)}): write it anew, with a header and as many fields in every row."
        ) from error


def check_parquet(path: Path) -> None:
    """Check by its own description that a Parquet file does not expand to far more than its size.

    Args:
        path: the file.

    Raises:
        DataError: it does.
        pyarrow.ArrowException: the description is damaged.
    """
    with import_optional("pyarrow.parquet", "parquet").ParquetFile(path) as file:
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        chunks = [group.column(column) for group in groups for column in range(group.num_columns)]
    # a run of equal values takes no room in the file, thus the number of values counts beside their size
    expanded = sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks)
    require_bounded(path, expanded, path.stat().st_size)


Columns = Sequence[str] | Mapping[str, str | Sequence[str]]
"""Columns of the features: they are joined; or those of each name stay apart, as a mapping."""

Reader = Callable[[Path, str, str, "Columns | None", bool | None, bool], Table]
"""Reads a file by the names of its columns (client, label and features), whether whole numbers are tokens, and whether
labels are real values."""

READERS: dict[str, Reader] = {
    ".npz": read_npz,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".tsv": read_csv,
    ".tsv.gz": read_csv,
}
"""The reader for each ending of a file name."""


def _from_arrow(
    path: Path,
    columns: Any,
    client: str,
    label: str,
    features: Columns | None,
    tokens: bool | None,
    real_valued: bool,
    index: Sequence[str],
) -> Table:
    """The rows of an Arrow table, of which `index` are the columns that pandas calls its index."""
    left_out: list[str] = []
    if features is None:
        candidates = [name for name in columns.column_names if name not in (client, label)]
        left_out = [name for name in candidates if name in index or _is_index(name, columns)]
        features = [name for name in candidates if name not in left_out]
        if not features:
            raise DataError(f"{path} has no column for features beside {client!r} and {label!r}: add one.")
    arrays = {name: column_values(path, name, columns.column(name)) for name in all_columns(features)}
    labels = (column_reals if real_valued else column_labels)(path, label, columns.column(label))
    arrays[client], names = _client_values(path, client, columns.column(client))
    _check_shapes(path, {name: array.shape for name, array in arrays.items()} | {label: labels.y.shape})
    table = _table(path, arrays, client, labels, features, tokens)
    return table._replace(names=names, left_out=tuple(left_out))


def _client_values(path: Path, name: str, column: Any) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The client of each row; texts as indices into the names, which are in alphabetical order."""
    types, compute = import_optional("pyarrow.types", "parquet"), import_optional("pyarrow.compute", "parquet")
    if column.null_count:
        raise DataError(f"{path}: column {name!r} has rows without a client: give every row one.")
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not is_text(kind):
        values = whole_numbers(column_values(path, name, column))
        if values.dtype.kind not in "iu":
            raise DataError(
                f"{path}: {name!r} has type {kind}, expected one integer or text for each row, as a client's name."
            )
        return values, None
    encoded = column if types.is_dictionary(column.type) else compute.dictionary_encode(column)
    encoded = encoded.unify_dictionaries().combine_chunks()
    names = encoded.dictionary.to_pylist()
    ranks = {value: rank for rank, value in enumerate(sorted(set(names)))}
    return np.array([ranks[value] for value in names], dtype=np.int64)[encoded.indices.to_numpy()], np.array(
        list(ranks)
    )


def _pandas_index(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """The columns that a table of pandas says are its index."""
    try:
        said = json.loads((metadata or {})[b"pandas"])["index_columns"]
        return [name for name in said if isinstance(name, str)]
    except (KeyError, ValueError, TypeError):
        return []


def _is_index(name: str, columns: Any) -> bool:
    """Whether a column holds the row numbers of a pandas table."""
    if _INDEX_NAMES.fullmatch(name):
        return True
    if not _MAYBE_INDEX.fullmatch(name):
        return False
    column = plain_column(columns.column(name))
    types, compute = import_optional("pyarrow.types", "parquet"), import_optional("pyarrow.compute", "parquet")
    return bool(types.is_integer(column.type) and compute.count_distinct(column).as_py() == len(column))


def _require(path: Path, stored: Sequence[str], wanted: Sequence[str]) -> None:
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


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise DataError(
            f"{path} has arrays of shapes {dict(shapes)}: all must have the same number of rows, at least one."
        )


def all_columns(features: Columns) -> list[str]:
    """The columns of the features, each once."""
    if not isinstance(features, Mapping):
        return list(features)
    return list(dict.fromkeys(name for group in features.values() for name in _group(group)))


def _group(columns: str | Sequence[str]) -> Sequence[str]:
    return [columns] if isinstance(columns, str) else columns


def _table(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    client: str,
    labels: Labels,
    features: Columns,
    tokens: bool | None,
) -> Table:
    if arrays[client].ndim != 1 or arrays[client].dtype.kind not in "iuUS":
        raise DataError(
            f"{path}: {client!r} has type {arrays[client].dtype} and shape {arrays[client].shape}, expected one "
            "integer or text for each row."
        )
    if isinstance(features, Mapping):
        # each is what it is: whole numbers in lists beside others are tokens, their mask or their segments
        keeps = tokens is None or tokens
        x: Features = {name: _joined(path, arrays, _group(columns), keeps) for name, columns in features.items()}
    else:
        x = _joined(path, arrays, features, labels.y.ndim > 1 if tokens is None else tokens)
    return Table(x, labels.y, arrays[client], None, labels.names)


def _joined(path: Path, arrays: dict[str, NDArray[Any]], columns: Sequence[str], keeps_integers: bool) -> NDArray[Any]:
    """The features of some columns, joined along a new last axis where they are several."""
    shapes = {name: arrays[name].shape for name in columns}
    for name in columns:
        require_numbers(path, name, arrays[name])
        if shapes[name] != shapes[columns[0]]:
            raise DataError(
                f"{path}: the features {shapes} cannot be joined: they must have equal shapes. Where a model takes "
                "several features by name, give feature_columns as a mapping from name to column."
            )
    parts = [_features(path, name, arrays[name], keeps_integers) for name in columns]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.astype(np.float32) for part in parts]
    x = parts[0] if len(parts) == 1 else np.stack(parts, axis=-1)
    return x if x.ndim > 1 else x[:, None]


def _features(path: Path, name: str, values: NDArray[Any], keeps_integers: bool) -> NDArray[Any]:
    """An array or column as it is stored: single numbers in single precision; bytes of pictures, and tokens, as are."""
    is_picture = values.ndim > 1 and (values.dtype.kind == "b" or values.dtype == np.uint8)
    is_tokens = values.ndim > 1 and values.dtype.kind in "iu" and keeps_integers
    return values if is_picture or is_tokens else single_precision(path, name, values)
