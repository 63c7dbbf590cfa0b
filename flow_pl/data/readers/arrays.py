"""Read the user's own arrays: one `.npz`, Parquet or CSV file that names the client of every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.readers.same_columns import read_alike
from flow_pl.data.readers.table_files import READERS, Reader
from flow_pl.data.readers.tables import Columns, Table
from flow_pl.data.store.cache import file_identity
from flow_pl.data.store.features import Features
from flow_pl.data.store.limits import require_name
from flow_pl.data.store.writer import ClientData
from flow_pl.errors import ConfigurationError, DataError, brief
from flow_pl.utils.inputs import map_inputs, take, zip_inputs
from flow_pl.utils.validation import given, require_choice, require_count, require_counts, require_some


class ArrayData(FederatedDataModule):
    """Provides clients from one file that names the client of every row; rows need not be grouped by client.

    A `.npz` file holds arrays of equal length (integer clients may be indices into an array `client_names`); a
    `.parquet` file holds columns, of numbers or of lists of one length; a `.csv` or `.tsv` file, which may be
    compressed as `.csv.gz`, holds columns of numbers below a header. The file is read into memory once, when its store
    is written.

    Labels are integers from 0, booleans, or texts, which become classes in sorted order, with their names
    (`class_names`). -1, an empty text, or null in Parquet marks a row to be predicted. Labels may also be real values
    (`labels: values`), for `Regression`, where NaN or null marks a row to be predicted.

    Features that are single numbers, including integers and booleans, are used unscaled, in single precision. In arrays
    or lists, bytes are pixels and are scaled to 0..1, unless all of them are 0 or 1.

    Args:
        path: the file, with the ending .npz, .parquet, .csv, .tsv, .csv.gz or .tsv.gz.
        test: another file, with test examples in the same columns, in any order and of the same types; clients that
            are only in this file are new. null = a share of each client's examples is for testing.
        client_column: array or column with the client of each row, an integer or a text.
        label_column: array or column of the labels.
        feature_columns: arrays or columns of the features; several are joined along a new last axis. For a model that
            takes a mapping of tensors, a mapping from each name to its array or column, or to several to be joined,
            such as {input_ids: ids, attention_mask: mask}. null = the array `x` of a `.npz` file, or else all columns
            except the client, the label, and the row numbers that pandas writes as its index.
        feature_shape: shape of the features of a row, such as [1, 28, 28] for images; images stored with channels last
            are changed to channels first. null = as stored, which is required for a mapping.
        num_classes: number of classes; null = the largest label + 1.
        tokens: whether integers in arrays or lists of features are tokens, bytes among them, for a model that starts
            with an embedding; null = in a mapping, and if labels are sequences, too, except for bytes.
        labels: `classes`, or `values` for regression.
        classes: names of the classes in the order of their numbers, for labels that are texts, such as those of a run
            whose file has other classes than this one; null = the file's labels in sorted order.
        **kwargs: settings of every data set, see `FederatedDataModule`.

    Raises:
        ConfigurationError: the file is of another kind, or a setting is out of its range.
    """

    def __init__(
        self,
        path: str,
        client_column: str = "client",
        label_column: str = "y",
        feature_columns: list[str] | dict[str, str | list[str]] | None = None,
        feature_shape: list[int] | None = None,
        num_classes: int | None = None,
        tokens: bool | None = None,
        test: str | None = None,
        labels: Literal["classes", "values"] = "classes",
        classes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._paths = [Path(file).expanduser() for file in (path, test) if file is not None]
        for setting, file in zip(("path", "test"), self._paths, strict=False):
            if _reader(file) is None:
                raise ConfigurationError(f"{setting} is {file}, expected a file ending on {' or '.join(READERS)}.")
        require_count(**given(num_classes=num_classes))
        require_counts(**given(feature_shape=feature_shape))
        require_some(**given(feature_shape=feature_shape, feature_columns=feature_columns, classes=classes))
        require_choice(("classes", "values"), labels=labels)
        if labels == "values" and num_classes is not None:
            raise ConfigurationError(f"num_classes is {num_classes}, but labels is values: set num_classes to null.")
        if labels == "values" and classes is not None:
            raise ConfigurationError(f"classes is {brief(classes)}, but labels is values: set classes to null.")
        if classes is not None and (len(set(classes)) < len(classes) or "" in classes):
            raise ConfigurationError(f"classes is {brief(classes)}, expected a name of its own for each class.")
        if isinstance(feature_columns, dict):
            require_some(**{f"feature_columns.{name}": columns for name, columns in feature_columns.items()})
            if feature_shape is not None:
                raise ConfigurationError(
                    f"feature_shape is {feature_shape}, but feature_columns is a mapping, whose features have shapes "
                    "of their own: set feature_shape to null, and store each array in its shape."
                )
        self._real_valued = labels == "values"
        self._columns = Columns(client_column, label_column, feature_columns, tokens, self._real_valued)
        self._row_shape = feature_shape
        self._class_count = 1 if self._real_valued else num_classes
        self._classes = None if classes is None else tuple(classes)
        self._label_names: tuple[str, ...] = self._classes or ()

    def options(self) -> dict[str, Any]:
        """Return the files' paths, sizes and modification times, and how they are read."""
        return {
            "files": [file_identity(file) for file in self._paths],
            "columns": self._columns,
            "feature_shape": self._row_shape,
            "num_classes": self._class_count,
            "unusable_clients": self.unusable_clients,
            # a file without these settings keeps its store
            **({} if self._classes is None else {"classes": self._classes}),
            **({"bytes": "tokens"} if self._columns.tokens else {}),
        }

    def class_count(self) -> int | None:
        """Return the configured number of classes, if any."""
        return self._class_count

    def label_names(self) -> tuple[str, ...]:
        """Return the labels in the order of their numbers if they are texts."""
        return self._label_names

    def clients(self) -> Iterator[ClientData]:
        """Read the files and group their rows by client.

        Yields:
            The clients in the order of their values in the file, each with its rows in the order of the file; clients
            that are only in the test file come last.

        Raises:
            DataError: a file is damaged, lacks a column, or has inconsistent columns.
        """
        tables = [self._table(self._paths[0], self._columns)]
        if len(self._paths) > 1:
            tables = read_alike((self._paths[0], self._paths[1]), tables[0], self._columns, self._table)
        self._label_names = self._named(tables)
        self._check_labels(tables)
        parts = []
        for path, table in zip(self._paths, tables, strict=True):
            # a file may have only some of all names; the last entry is for -1
            numbers = np.array([*map(self._label_names.index, table.class_names), -1])
            y = numbers[table.y] if self._label_names else table.y
            parts.append(self._grouped(path, table._replace(y=y)))
        train, test = parts[0], parts[1] if len(parts) > 1 else None
        for name, (x, y) in train.items():
            if test is None:
                yield ClientData(name, x, y)
                continue
            x_test, y_test = test.pop(name, (take(x, slice(0)), y[:0]))
            try:
                x_both = zip_inputs(lambda *parts: np.concatenate(parts), x, x_test)
                joined = np.concatenate([y, y_test])
            except ValueError as error:
                shapes, shapes_test = (map_inputs(lambda rows: rows.shape[1:], part) for part in (x, x_test))
                raise DataError(
                    f"{self._paths[1]}: features have shape {shapes_test} and labels {y_test.shape[1:]}, in "
                    f"{self._paths[0]} they have {shapes} and {y.shape[1:]}: make them equal."
                ) from error
            yield ClientData(name, x_both, joined, test_rows=len(y_test))
        for name, (x, y) in (test or {}).items():
            yield ClientData(name, x, y, role="test")

    def _table(self, path: Path, columns: Columns) -> Table:
        read = _reader(path)
        assert read is not None
        table = read(path, columns)
        if table.left_out:
            rank_zero_info(
                f"data: left out {brief(list(map(repr, table.left_out)))}, the row numbers of a pandas table; name the "
                "columns in feature_columns to change that"
            )
        return table

    def _grouped(self, path: Path, table: Table) -> dict[str, tuple[Features, NDArray[Any]]]:
        """Return the features and labels of each client by name."""
        x = self._shaped(path, table.x)
        rows = np.argsort(table.client, kind="stable")
        values, starts = np.unique(table.client[rows], return_index=True)
        groups = zip(values.tolist(), np.split(rows, starts[1:]), strict=True)
        names = [] if table.names is None else table.names.tolist()
        repeated = [str(name) for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise DataError(
                f"{path}: client_names has {brief(repeated)} more than once, expected a name of its own for each "
                "client: rename them, or give the rows of a client one number."
            )
        return {self._name(path, value, table.names): (take(x, members), table.y[members]) for value, members in groups}

    def _named(self, tables: Sequence[Table]) -> tuple[str, ...]:
        """Return the names of the classes, none if the labels are numbers."""
        files = " and ".join(map(str, self._paths))
        found = sorted({name for table in tables for name in table.class_names})
        labelled = [table for table in tables if (table.y != -1).any()]
        if len({bool(table.class_names) for table in labelled}) > 1:
            raise DataError(f"{files}: the labels are texts in one, numbers in the other.")
        if self._classes is None:
            return tuple(found)
        if labelled and not found:
            raise DataError(f"{files}: the labels are numbers, but classes are named for texts: set classes to null.")
        unknown = [name for name in found if name not in self._classes]
        if unknown:
            raise DataError(
                f"{files}: the label {unknown[0]!r} is not among classes ({brief(self._classes)}): add it, or leave "
                "its rows out."
            )
        return self._classes

    def _check_labels(self, tables: Sequence[Table]) -> None:
        files = " and ".join(map(str, self._paths))
        if self._label_names and self._class_count and len(self._label_names) > self._class_count:
            raise DataError(
                f"{files} {'has' if len(self._paths) == 1 else 'have'} {len(self._label_names)} labels "
                f"({brief(list(self._label_names))}), but num_classes is {self._class_count}: set it to null."
            )
        if self._label_names or self._real_valued or tables[0].y.ndim > 1:
            return
        found = {label for table in tables for label in np.unique(table.y).tolist()}
        if found == {-1, 1}:
            raise DataError(
                f"{files}: the labels are only -1 and 1, but -1 marks a row to be predicted: write the two "
                "classes as 0 and 1."
            )

    def _shaped(self, path: Path, x: Features) -> Features:
        if self._row_shape is None or isinstance(x, dict):
            return x
        shaped = with_shape(x, tuple(self._row_shape))
        if shaped is None:
            raise ConfigurationError(
                f"feature_shape is {self._row_shape}, but a row of {path} has features of shape "
                f"{x.shape[1:]}: give a shape of as many numbers, in the same order of the axes; of pictures with "
                "their channels last, give the shape with the channels first."
            )
        return shaped

    def _name(self, path: Path, value: int | str | bytes, names: NDArray[Any] | None) -> str:
        if names is not None and isinstance(value, int):
            if not 0 <= value < len(names):
                raise DataError(f"{path}: client {value} is not an index into its {len(names)} client_names.")
            value = names[value]
        # bytes that are not UTF-8 become what no name may contain
        name = value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else str(value)
        return require_name(name, path)


def _reader(path: Path) -> Reader | None:
    return next((read for ending, read in READERS.items() if path.name.lower().endswith(ending)), None)


def with_shape(x: NDArray[Any], shape: Sequence[int]) -> NDArray[Any] | None:
    """Reshape rows such that no axis is read as another one.

    Axes may be split or joined, and the last one may become the first (channels).

    Args:
        x: [n, ...] rows.
        shape: new shape of a row.

    Returns:
        [n, *shape]; None if that is impossible.
    """
    stored, wanted = x.shape[1:], tuple(shape)
    if np.prod(stored) != np.prod(wanted):
        return None
    cuts, wanted_cuts = set(accumulate(stored, mul)), set(accumulate(wanted, mul))
    # an axis of length 1 adds no boundary, only a 1
    if (cuts - {1}) <= wanted_cuts or (wanted_cuts - {1}) <= cuts:
        return x.reshape(len(x), *wanted)
    if stored[-1:] == wanted[:1] and stored[:-1] == wanted[1:]:
        return np.ascontiguousarray(np.moveaxis(x, -1, 1))
    return None
