"""Reading a file that says in every row whose it is: `.npz` arrays or the columns of a Parquet file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.encodings.encoding import whole_numbers
from flow_pl.data.readers.npz import npz_arrays
from flow_pl.data.store.limits import require_bounded
from flow_pl.errors import DataError, brief
from flow_pl.utils.optional import import_optional


class Table(NamedTuple):
    """The rows of a file, in its order.

    Attributes:
        x: [n, ...] features.
        y: [n, ...] labels; -1 = to be predicted.
        client: [n] client of each row, integers or texts.
        names: [names] that integer clients are indices into, if the file has them.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    client: NDArray[Any]
    names: NDArray[Any] | None


def read_npz(path: Path, client: str, label: str, features: Sequence[str] | None) -> Table:
    """Read a `.npz` file.

    Args:
        path: the file.
        client: array with the client of each row; integers may be indices into an array `client_names`.
        label: array of the labels.
        features: arrays of the features; None = `x`.

    Returns:
        The rows.

    Raises:
        DataError: the file is damaged, an array is missing, or the arrays do not fit each other.
    """
    features = features or ["x"]
    needed = {client, label, *features, "client_names"}
    stored, arrays = npz_arrays(path, lambda name: name in needed)
    _require(path, stored, [client, label, *features])
    names = arrays.get("client_names") if arrays[client].dtype.kind in "iu" else None
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise DataError(
            f"{path}: client_names has type {names.dtype} and shape {names.shape}, expected a list of texts."
        )
    return _table(path, arrays, client, label, features, names)


def read_parquet(path: Path, client: str, label: str, features: Sequence[str] | None) -> Table:
    """Read a Parquet file.

    Args:
        path: the file.
        client: column with the client of each row.
        label: column of the labels; null = to be predicted.
        features: columns of the features, of numbers or of lists of one length; None = all other columns.

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
        stored = parquet.read_schema(path).names
        features = features or [name for name in stored if name not in (client, label)]
        wanted = [client, label, *features]
        _require(path, stored, wanted)
        # texts stay as often as they differ, however many rows have the same one
        columns = parquet.ParquetFile(path, read_dictionary=[client]).read(columns=wanted)
        columns.validate(full=True)
        if columns.column(client).null_count:
            raise DataError(f"{path}: column {client!r} has rows without a client: give every row one.")
        arrays = {name: column_values(path, name, columns.column(name)) for name in features}
        arrays[client], names = _client_values(path, client, columns.column(client))
        compute = import_optional("pyarrow.compute", "parquet")
        labels = columns.column(label)
        arrays[label] = column_values(path, label, labels if _is_list(labels) else compute.fill_null(labels, -1))
    except DataError:
        raise
    # damage shows as one of several types; what NumPy cannot hold as another one
    except (arrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} cannot be read ({brief(error)}): write it anew as a Parquet file.") from error
    return _table(path, arrays, client, label, features, names)


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


def _client_values(path: Path, name: str, column: Any) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The client of each row; texts as indices into the names, which are in alphabetical order."""
    types = import_optional("pyarrow.types", "parquet")
    if not types.is_dictionary(column.type):
        return column_values(path, name, column), None
    encoded = column.unify_dictionaries().combine_chunks()
    names = encoded.dictionary.to_pylist()
    if not all(isinstance(value, str) for value in names):
        raise DataError(f"{path}: column {name!r} has clients that are neither integers nor texts: make them texts.")
    ranks = {value: rank for rank, value in enumerate(sorted(set(names)))}
    return np.array([ranks[value] for value in names], dtype=np.int64)[encoded.indices.to_numpy()], np.array(
        list(ranks)
    )


READERS: dict[str, Callable[[Path, str, str, Sequence[str] | None], Table]] = {
    ".npz": read_npz,
    ".parquet": read_parquet,
}
"""The reader for each ending of a file name."""


def column_values(path: Path | str, name: str, column: Any) -> NDArray[Any]:
    """An Arrow column as an array.

    Args:
        path: the file it comes from, for messages.
        name: its name, for messages.
        column: a `pyarrow.ChunkedArray` or `Array` of numbers or texts, or of lists of them.

    Returns:
        [n], or [n, length, ...] where it holds lists.

    Raises:
        DataError: it holds lists of several lengths.
    """
    if not _is_list(column):
        values: NDArray[Any] = column.to_numpy()
        return values
    compute = import_optional("pyarrow.compute", "parquet")
    lengths = np.unique(compute.list_value_length(column).to_numpy())
    if column.null_count or len(lengths) > 1:
        raise DataError(f"{path}: column {name!r} holds lists of several lengths or none: pad them to one length.")
    inner = column_values(path, name, compute.list_flatten(column))
    return inner.reshape(len(column), -1, *inner.shape[1:])


def _is_list(column: Any) -> bool:
    types = import_optional("pyarrow.types", "parquet")
    return bool(types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type))


def _require(path: Path, stored: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise DataError(
            f"{path} has no {' and no '.join(map(repr, missing))}, only {brief(list(map(repr, stored)))}: "
            "name the right ones by client_column, label_column and feature_columns."
        )


def _table(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    client: str,
    label: str,
    features: Sequence[str],
    names: NDArray[Any] | None,
) -> Table:
    shapes = {name: arrays[name].shape for name in [client, label, *features]}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise DataError(f"{path} has arrays of shapes {shapes}: all must have the same number of rows, at least one.")
    if arrays[client].ndim != 1 or arrays[client].dtype.kind not in "iuUS":
        raise DataError(
            f"{path}: {client!r} has type {arrays[client].dtype} and shape {arrays[client].shape}, expected one "
            "integer or text for each row."
        )
    for name in features:
        if arrays[name].dtype.kind not in "biuf":
            raise DataError(
                f"{path}: {name!r} has type {arrays[name].dtype}: encode it as numbers, or leave it out by "
                "naming the others in feature_columns."
            )
        if len(features) > 1 and shapes[name] != shapes[features[0]]:
            raise DataError(f"{path}: the features {shapes} cannot be joined: they must have equal shapes.")
    x = arrays[features[0]] if len(features) == 1 else np.stack([arrays[name] for name in features], axis=-1)
    y = whole_numbers(arrays[label])  # integers with nulls are written as fractions by pandas
    return Table(x if x.ndim > 1 else x[:, None], y, arrays[client], names)
