"""Write tables of predictions batch by batch, as CSV or Parquet."""

from __future__ import annotations

import csv
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flow_pl.errors import ConfigurationError
from flow_pl.utils.optional import install_command

Column = np.ma.MaskedArray[Any, Any]
"""Values of one column, of strings, numbers, truth values or lists of integers; masked where a row has none."""

ROW_GROUP = 65_536
"""Rows that are gathered in memory before a Parquet file grows: readers are slow with smaller groups."""


class PredictionFile(ABC):
    """Appends batches of rows to a file.

    Args:
        path: the file; replaced if it exists.
        types: numpy type of each column, by name.
    """

    def __init__(self, path: Path, types: Mapping[str, type]) -> None:
        self.path = path
        self.types = types

    @abstractmethod
    def write(self, columns: Mapping[str, Column]) -> None:
        """Append rows: one array per column, all of the same length."""

    @abstractmethod
    def close(self) -> None:
        """Complete the file."""

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Path], path: Path) -> None:
        """Write the rows of several complete files, in order, to one."""


class CsvPredictions(PredictionFile):
    """Writes comma-separated text with a header.

    Booleans are `true` and `false`, list entries are separated by spaces, and missing values are empty.
    """

    def __init__(self, path: Path, types: Mapping[str, type]) -> None:
        super().__init__(path, types)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(types)

    def write(self, columns: Mapping[str, Column]) -> None:
        """Append rows."""
        self._writer.writerows(zip(*(_texts(columns[name]) for name in self.types), strict=True))

    def close(self) -> None:
        """Complete the file."""
        self._file.close()

    @classmethod
    def join(cls, parts: Sequence[Path], path: Path) -> None:
        """Write one header, then the rows of each part."""
        with path.open("wb") as joined:
            for number, part in enumerate(parts):
                with part.open("rb") as rows:
                    header = rows.readline()
                    if number == 0:
                        joined.write(header)
                    shutil.copyfileobj(rows, joined)


class ParquetPredictions(PredictionFile):
    """Writes Apache Parquet; lists are stored as lists, missing values as null.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """

    def __init__(self, path: Path, types: Mapping[str, type]) -> None:
        super().__init__(path, types)
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigurationError(
                f"{path} needs pyarrow, which is missing: {install_command('parquet')}, or set path to a .csv file."
            ) from error
        self._arrow = pyarrow
        kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float32(), bool: pyarrow.bool_()}
        kinds[list] = pyarrow.list_(pyarrow.int64())
        self._schema = pyarrow.schema([(name, kinds[kind]) for name, kind in types.items()])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._batches: list[Any] = []
        self._rows = 0

    def write(self, columns: Mapping[str, Column]) -> None:
        """Append rows; they reach the disk in groups."""
        arrays = [
            self._arrow.array(columns[name].data, type=field.type, mask=np.ma.getmaskarray(columns[name]))
            for name, field in zip(self.types, self._schema, strict=True)
        ]
        self._batches.append(self._arrow.record_batch(arrays, schema=self._schema))
        self._rows += len(arrays[0])
        if self._rows >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Complete the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._arrow.Table.from_batches(self._batches), row_group_size=self._rows)
        self._batches, self._rows = [], 0

    @classmethod
    def join(cls, parts: Sequence[Path], path: Path) -> None:
        """Copy the row groups of each part."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetWriter(path, pyarrow.parquet.read_schema(parts[0])) as joined:
            for part in parts:
                with pyarrow.parquet.ParquetFile(part) as file:
                    for group in range(file.num_row_groups):
                        joined.write_table(file.read_row_group(group))


FORMATS: dict[str, type[PredictionFile]] = {".csv": CsvPredictions, ".parquet": ParquetPredictions}
"""The format of a file by the ending of its name."""


def _texts(column: Column) -> list[str]:
    if column.dtype == object:
        texts = np.array([" ".join(map(str, entries)) for entries in column.data], dtype=str)
    elif column.dtype == bool:
        texts = np.where(column.data, "true", "false")
    else:
        texts = column.data.astype(str)
    return list(np.where(np.ma.getmaskarray(column), "", texts))
