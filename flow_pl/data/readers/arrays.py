"""The user's own arrays: one `.npz`, Parquet or CSV file that says in every row whose it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from flow_pl.data.datamodule import FederatedDataModule
from flow_pl.data.readers.tables import READERS
from flow_pl.data.store.cache import file_identity
from flow_pl.data.store.limits import require_name
from flow_pl.data.store.writer import ClientData
from flow_pl.errors import ConfigurationError, DataError, brief
from flow_pl.utils.validation import given, require_count, require_counts, require_some


class ArrayData(FederatedDataModule):
    """Clients from one file that says in every row whose it is; rows need not be grouped by client.

    A `.npz` file holds arrays of equal length (integer clients may be indices into an array `client_names`); a
    `.parquet` file holds columns, of numbers or of lists of one length; a `.csv` or `.tsv` file, which may be packed as
    `.csv.gz`, holds columns of numbers below a header. The file is read into memory once, when its store is written.

    Labels are whole numbers from 0, truth values, or texts: these become classes in sorted order, whose names are kept
    (`class_names`). -1, an empty text, or null in Parquet marks a row to be predicted.

    Features that are single numbers, whole ones and truth values too, are taken as they are, in single precision. In
    arrays or lists, bytes are pixels and are scaled to 0..1, unless all of them are 0 or 1.

    Args:
        path: the file, ending on .npz, .parquet, .csv, .tsv, .csv.gz or .tsv.gz.
        client_column: array or column with the client of each row, an integer or a text.
        label_column: array or column of the labels.
        feature_columns: arrays or columns of the features, several being joined along a new last axis; null = the
            array `x` of a `.npz` file, or all columns of another one but the client, the label, and the row numbers
            that pandas writes as its index.
        feature_shape: shape that the features of a row are given, such as [1, 28, 28] for images; pictures that are
            stored with their channels last are turned to have them first. null = as stored.
        num_classes: number of classes; null = the largest label + 1.
        tokens: whether whole numbers in arrays or lists of features are tokens, for a model that begins with an
            embedding; null = only where a label is a sequence as well.
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
        tokens: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._path = Path(path).expanduser()
        self._read = next((read for end, read in READERS.items() if self._path.name.lower().endswith(end)), None)
        if self._read is None:
            raise ConfigurationError(f"path is {path}, expected a file ending on {' or '.join(READERS)}.")
        require_count(**given(num_classes=num_classes))
        require_counts(**given(feature_shape=feature_shape))
        require_some(**given(feature_shape=feature_shape, feature_columns=feature_columns))
        self._columns = (client_column, label_column, feature_columns, tokens)
        self._row_shape = feature_shape
        self._class_count = num_classes
        self._label_names: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """The file, by its path, size and time of modification, and how it is read."""
        return {
            "file": file_identity(self._path),
            "columns": self._columns,
            "feature_shape": self._row_shape,
            "num_classes": self._class_count,
            "unusable_clients": self.unusable_clients,
        }

    def class_count(self) -> int | None:
        """The number of classes given, if one is."""
        return self._class_count

    def label_names(self) -> tuple[str, ...]:
        """The labels, where they are texts, in sorted order."""
        return self._label_names

    def clients(self) -> Iterator[ClientData]:
        """Read the file and group its rows by client.

        Yields:
            The clients in the order of their values in the file, each with its rows in the order of the file.

        Raises:
            DataError: the file is damaged, lacks a column, or its columns do not fit each other.
        """
        assert self._read is not None
        table = self._read(self._path, *self._columns)
        if table.left_out:
            rank_zero_info(
                f"data: left out {brief(list(map(repr, table.left_out)))}, the row numbers of a pandas table; name the "
                "columns in feature_columns to change that"
            )
        self._label_names = table.class_names
        self._check_labels(table.y)
        x = self._shaped(table.x)
        rows = np.argsort(table.client, kind="stable")
        values, starts = np.unique(table.client[rows], return_index=True)
        for value, members in zip(values.tolist(), np.split(rows, starts[1:]), strict=True):
            yield ClientData(self._name(value, table.names), x[members], table.y[members])

    def _check_labels(self, y: NDArray[Any]) -> None:
        if self._label_names and self._class_count and len(self._label_names) > self._class_count:
            raise DataError(
                f"{self._path} has {len(self._label_names)} labels ({brief(list(self._label_names))}), but num_classes "
                f"is {self._class_count}: set it to null."
            )
        if y.ndim == 1 and (y == -1).any() and y.max() == 1 and y.min() == -1 and not (y == 0).any():
            raise DataError(
                f"{self._path}: the labels are -1 and 1 alone, but -1 marks a row to be predicted: write the two "
                "classes as 0 and 1."
            )

    def _shaped(self, x: NDArray[Any]) -> NDArray[Any]:
        if self._row_shape is None:
            return x
        shaped = with_shape(x, tuple(self._row_shape))
        if shaped is None:
            raise ConfigurationError(
                f"feature_shape is {self._row_shape}, but a row of {self._path} has features of shape "
                f"{x.shape[1:]}: give a shape of as many numbers, in the same order of the axes; of pictures with "
                "their channels last, give the shape with the channels first."
            )
        return shaped

    def _name(self, value: int | str | bytes, names: NDArray[Any] | None) -> str:
        if names is not None and isinstance(value, int):
            if not 0 <= value < len(names):
                raise DataError(f"{self._path}: client {value} is no index into its {len(names)} client_names.")
            value = names[value]
        # bytes that are no UTF-8 become what no name may hold
        name = value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else str(value)
        return require_name(name, self._path)


def with_shape(x: NDArray[Any], shape: Sequence[int]) -> NDArray[Any] | None:
    """Rows of another shape, in which no axis is read as another one.

    Axes may be split or joined, and the last one may become the first (channels); they are not mixed otherwise.

    Args:
        x: [n, ...] rows.
        shape: the shape of a row.

    Returns:
        [n, *shape]; None where that cannot be.
    """
    stored, wanted = x.shape[1:], tuple(shape)
    if np.prod(stored) != np.prod(wanted):
        return None
    cuts, wanted_cuts = set(accumulate(stored, mul)), set(accumulate(wanted, mul))
    # an axis of length 1 adds no cut but a 1
    if (cuts - {1}) <= wanted_cuts or (wanted_cuts - {1}) <= cuts:
        return x.reshape(len(x), *wanted)
    if stored[-1:] == wanted[:1] and stored[:-1] == wanted[1:]:
        return np.ascontiguousarray(np.moveaxis(x, -1, 1))
    return None
