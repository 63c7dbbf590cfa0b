"""Read the rows of an Arrow table, which a Parquet or CSV file becomes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.encodings.values import whole_numbers
from flow_pl.data.readers.columns import column_values, is_text, plain_column
from flow_pl.data.readers.labels import column_labels, column_reals
from flow_pl.data.readers.tables import Columns, Table, check_shapes, make_table
from flow_pl.errors import DataError
from flow_pl.utils.optional import import_optional

_INDEX_NAMES = re.compile(r"__index_level_\d+__|Unnamed: \d+(_level_\d+)?")
"""Names that only the row numbers of a pandas table have, in Parquet and in CSV."""

_MAYBE_INDEX = re.compile(r"index|level_\d+")
"""Names that pandas gives row numbers which were made a column; they may be a feature's as well."""


def from_arrow(path: Path, table: Any, columns: Columns, index: Sequence[str]) -> Table:
    """Read the rows of an Arrow table.

    Args:
        path: its file, for messages.
        table: the table.
        columns: its columns.
        index: columns that pandas calls its index.

    Raises:
        DataError: the columns do not fit each other.
    """
    client, label, left_out, features = columns.client, columns.label, list[str](), list[str]()
    if columns.features is None:
        candidates = [name for name in table.column_names if name not in (client, label)]
        left_out = [name for name in candidates if name in index or _is_index(name, table)]
        features = [name for name in candidates if name not in left_out]
        if not features:
            raise DataError(f"{path} has no column for features beside {client!r} and {label!r}: add one.")
        columns = columns._replace(features=features)
    arrays = {name: column_values(path, name, table.column(name)) for name in columns.feature_names()}
    labels = (column_reals if columns.real_valued else column_labels)(path, label, table.column(label))
    arrays[client], names = _client_values(path, client, table.column(client))
    check_shapes(path, {name: array.shape for name, array in arrays.items()} | {label: labels.y.shape})
    table_read = make_table(path, arrays, columns, labels)
    return table_read._replace(names=names, left_out=tuple(left_out), features=tuple(features))


def _client_values(path: Path, name: str, column: Any) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return the client of each row; texts as indices into the names, which are in alphabetical order."""
    types, compute = import_optional("pyarrow.types", "parquet"), import_optional("pyarrow.compute", "parquet")
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if column.null_count:
        raise _no_client(path, name, compute.index(column.is_null(), True).as_py())
    if not is_text(kind):
        values = whole_numbers(column_values(path, name, column))
        if values.dtype.kind not in "iu":
            raise DataError(
                f"{path}: {name!r} has type {kind}, expected one integer or text for each row, as a client's name."
            )
        return values, None
    encoded = column if types.is_dictionary(column.type) else compute.dictionary_encode(column)
    encoded = encoded.unify_dictionaries().combine_chunks()
    names, indices = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    # a CSV file has no other way to leave a field out; a category without rows does no harm
    blank = np.isin(indices, [place for place, value in enumerate(names) if not value.strip()])
    if blank.any():
        raise _no_client(path, name, int(np.argmax(blank)))
    ranks = {value: rank for rank, value in enumerate(sorted(set(names)))}
    return np.array([ranks[value] for value in names], dtype=np.int64)[indices], np.array(list(ranks))


def _no_client(path: Path, name: str, row: int) -> DataError:
    return DataError(f"{path}: column {name!r} has rows without a client, the first is row {row}: give every row one.")


def pandas_index(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """Return the columns that a table of pandas says are its index."""
    try:
        said = json.loads((metadata or {})[b"pandas"])["index_columns"]
        return [name for name in said if isinstance(name, str)]
    except (KeyError, ValueError, TypeError):
        return []


def _is_index(name: str, columns: Any) -> bool:
    """Return whether a column holds the row numbers of a pandas table."""
    if _INDEX_NAMES.fullmatch(name):
        return True
    if not _MAYBE_INDEX.fullmatch(name):
        return False
    column = plain_column(columns.column(name))
    types, compute = import_optional("pyarrow.types", "parquet"), import_optional("pyarrow.compute", "parquet")
    return bool(types.is_integer(column.type) and compute.count_distinct(column).as_py() == len(column))
