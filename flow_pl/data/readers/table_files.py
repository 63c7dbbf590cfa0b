"""Read files that say in every row whose it is: `.npz` arrays, or the columns of a Parquet or CSV file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from flow_pl.data.encodings.values import whole_numbers
from flow_pl.data.readers.arrow_tables import from_arrow, pandas_index
from flow_pl.data.readers.columns import is_text
from flow_pl.data.readers.csv_tables import csv_table
from flow_pl.data.readers.labels import array_labels, array_values
from flow_pl.data.readers.npz import npz_arrays
from flow_pl.data.readers.tables import Columns, Table, check_shapes, make_table, require_columns
from flow_pl.data.store.limits import require_bounded
from flow_pl.errors import DataError, brief
from flow_pl.utils.optional import import_optional


def read_npz(path: Path, columns: Columns) -> Table:
    """Read a `.npz` file.

    Args:
        path: the file.
        columns: arrays of the client of each row, where integers may be indices into an array `client_names`, of the
            labels and of the features, which are `x` where none are named.

    Returns:
        The rows.

    Raises:
        DataError: the file is damaged, an array is missing, or the arrays do not fit each other.
    """
    if not columns.features:
        columns = columns._replace(features=["x"])
    client, label, wanted = columns.client, columns.label, columns.all()
    needed = {*wanted, "client_names"}
    stored, arrays = npz_arrays(path, lambda name: name in needed)
    require_columns(path, stored, wanted)
    arrays[client] = whole_numbers(arrays[client])
    names = arrays.get("client_names") if arrays[client].dtype.kind in "iu" else None
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise DataError(
            f"{path}: client_names has type {names.dtype} and shape {names.shape}, expected a list of texts."
        )
    check_shapes(path, {name: arrays[name].shape for name in wanted})
    labels = (array_values if columns.real_valued else array_labels)(path, label, arrays[label])
    return make_table(path, arrays, columns, labels)._replace(names=names)


@contextlib.contextmanager
def _readable(path: Path, remedy: str) -> Iterator[None]:
    """Raise what damage shows as, or what NumPy cannot hold, as one type of error."""
    arrow = import_optional("pyarrow", "parquet")
    try:
        yield
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path} cannot be read ({brief(error)}): write it anew{remedy}.") from error


def read_parquet(path: Path, columns: Columns) -> Table:
    """Read a Parquet file.

    Args:
        path: the file.
        columns: columns of the client of each row, of the labels, where null = to be predicted, and of the features, of
            numbers or of lists of one length; without names, all others but the row numbers that pandas adds.

    Returns:
        The rows.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: the file is damaged, a column is missing, or the columns do not fit each other.
    """
    parquet = import_optional("pyarrow.parquet", "parquet")
    with _readable(path, " as a Parquet file"):
        check_parquet(path)
        schema = parquet.read_schema(path)
        wanted = columns.all()
        if not columns.features:
            wanted = list(dict.fromkeys([*wanted, *schema.names]))
        require_columns(path, schema.names, wanted)
        # texts stay as often as they differ, however many rows have the same one
        texts = [name for name in (columns.client, columns.label) if is_text(schema.field(name).type)]
        table = parquet.ParquetFile(path, read_dictionary=texts).read(columns=wanted)
        table.validate(full=True)
        return from_arrow(path, table, columns, pandas_index(schema.metadata))


def read_csv(path: Path, columns: Columns) -> Table:
    """Read a CSV file as `read_parquet` does; see `csv_table` for what it may look like.

    Args:
        path: the file.
        columns: columns of the client of each row, which is taken as a text, of the labels, where an empty one = to be
            predicted, and of the features, of numbers or of truth values; without names, all others but the row numbers
            that pandas adds.
    """
    with _readable(path, ", with a header and as many fields in every row"):
        table = csv_table(path, columns.client, columns.label)
        require_columns(path, table.column_names, columns.all())
        return from_arrow(path, table, columns, ())


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


Reader = Callable[[Path, Columns], Table]
"""Reads the columns of a file."""

READERS: dict[str, Reader] = {
    ".npz": read_npz,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".tsv": read_csv,
    ".tsv.gz": read_csv,
}
"""The reader for each ending of a file name."""
