"""The user's own arrays: one `.npz` or Parquet file that says in every row whose it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.readers.tables import READERS
from flow_pl.data.store.cache import file_identity
from flow_pl.data.store.limits import require_name
from flow_pl.data.store.writer import ClientData
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.utils.validation import given, require_count, require_counts, require_some


class ArrayData(FederatedDataModule):
    """Clients from one file that says in every row whose it is; rows need not be grouped by client.

    A `.npz` file holds arrays of equal length (integer clients may be indices into an array `client_names`); a
    `.parquet` file holds columns, of numbers or of lists of one length. Labels are integers from 0; -1, or null in
    Parquet, marks a row to be predicted. The file is read into memory once, when its store is written.

    Args:
        path: the file, ending on .npz or .parquet.
        client_column: array or column with the client of each row, an integer or a text.
        label_column: array or column of the labels.
        feature_columns: arrays or columns of the features, several being joined along a new last axis; null = the
            array `x` of a `.npz` file, or all columns but the client and the label of a `.parquet` file.
        feature_shape: shape that the features of a row are given, such as [1, 28, 28] for images; null = as stored.
        num_classes: number of classes; null = the largest label + 1.
        **kwargs: settings of every data set, see `FederatedDataModule`.

    Raises:
        ConfigurationError: the file is of another kind, or a setting is out of its range.
    """

    def __init__(
        self,
        path: str,
        client_column: str = "client",
        label_column: str = "y",
        feature_columns: list[str] | None = None,
        feature_shape: list[int] | None = None,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._path = Path(path).expanduser()
        if self._path.suffix not in READERS:
            raise ConfigurationError(f"path is {path}, expected a file ending on {' or '.join(READERS)}.")
        require_count(**given(num_classes=num_classes))
        require_counts(**given(feature_shape=feature_shape))
        require_some(**given(feature_shape=feature_shape, feature_columns=feature_columns))
        self._columns = (client_column, label_column, feature_columns)
        self._row_shape = feature_shape
        self._class_count = num_classes

    def options(self) -> dict[str, Any]:
        """The file, by its path, size and time of modification, and how it is read."""
        return {
            "file": file_identity(self._path),
            "columns": self._columns,
            "feature_shape": self._row_shape,
            "num_classes": self._class_count,
        }

    def class_count(self) -> int | None:
        """The number of classes given, if one is."""
        return self._class_count

    def clients(self) -> Iterator[ClientData]:
        """Read the file and group its rows by client.

        Yields:
            The clients in the order of their values in the file, each with its rows in the order of the file.

        Raises:
            DataError: the file is damaged, lacks a column, or its columns do not fit each other.
        """
        table = READERS[self._path.suffix](self._path, *self._columns)
        x = self._shaped(table.x)
        rows = np.argsort(table.client, kind="stable")
        values, starts = np.unique(table.client[rows], return_index=True)
        for value, members in zip(values.tolist(), np.split(rows, starts[1:]), strict=True):
            yield ClientData(self._name(value, table.names), x[members], table.y[members])

    def _shaped(self, x: NDArray[Any]) -> NDArray[Any]:
        if self._row_shape is None:
            return x
        try:
            return x.reshape(len(x), *self._row_shape)
        except ValueError as error:
            raise ConfigurationError(
                f"feature_shape is {self._row_shape}, but a row of {self._path} has features of shape "
                f"{x.shape[1:]}: give a shape of as many numbers."
            ) from error

    def _name(self, value: int | str | bytes, names: NDArray[Any] | None) -> str:
        if names is not None and isinstance(value, int):
            if not 0 <= value < len(names):
                raise DataError(f"{self._path}: client {value} is no index into its {len(names)} client_names.")
            value = names[value]
        # bytes that are no UTF-8 become what no name may hold
        name = value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else str(value)
        return require_name(name, self._path)
