"""Read tables in CSV files as people and spreadsheets write them."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flow_pl.data.store.limits import Bounded
from flow_pl.errors import DataError, brief
from flow_pl.utils.optional import import_optional

_DELIMITERS = ",;\t|"


def csv_table(path: Path, client: str, label: str) -> Any:
    """Read a CSV file with a header.

    Fields are separated by commas, semicolons, tabs or bars, and may be quoted. The text is UTF-8, with or without a
    byte order mark, or UTF-16 with one; a file with the ending .gz is decompressed. If fields are not separated by
    commas, numbers may contain them (1,5).

    Args:
        path: the file.
        client: column of the clients, which are kept as texts (007 is not 7).
        label: column of the labels.

    Returns:
        A `pyarrow.Table`.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: the file cannot be read as text, or its header is missing or repeats a name.
        pyarrow.ArrowException: a row does not match the header.
    """
    arrow, reader = import_optional("pyarrow", "parquet"), import_optional("pyarrow.csv", "parquet")
    text = _text(path)
    delimiter, names, lines = _header(path, text, (client, label))
    content = text.encode("utf-8")

    def read(decimal_point: str) -> Any:
        return reader.read_csv(
            io.BytesIO(content),
            # in one block, since the first block determines the types
            read_options=reader.ReadOptions(
                column_names=names, skip_rows=lines, block_size=min(len(content) + 1, 2**31 - 1)
            ),
            parse_options=reader.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=reader.ConvertOptions(
                column_types={client: arrow.string()}, decimal_point=decimal_point, strings_can_be_null=False
            ),
        )

    if len(content) > 2**31 - 2:
        raise DataError(f"{path} has {len(content)} bytes, expected less than 2 GB: write it as a Parquet file.")
    try:
        table = read(".")
    except arrow.ArrowInvalid as error:
        if "Empty CSV" not in str(error):
            raise
        table = None
    if table is None or not table.num_rows:
        raise DataError(f"{path} has a header but no rows: check its source.")
    if delimiter != ",":
        other = read(",")
        table = other if _texts(other, arrow) < _texts(table, arrow) else table
    return table


def _texts(table: Any, arrow: Any) -> int:
    """Return how many columns are not numbers."""
    return sum(arrow.types.is_string(column.type) for column in table.columns)


def _text(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as packed:
            content = io.BufferedReader(Bounded(packed, path)).read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({brief(error)}): get it again.") from error
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path} is not UTF-8 in line {line} ({brief(error)}): save it as UTF-8.") from error


def _header(path: Path, text: str, wanted: Iterable[str]) -> tuple[str, list[str], int]:
    """Return the delimiter, the names of the columns, and the number of lines up to the end of the header."""
    best: tuple[tuple[int, int], str, list[str], int] | None = None
    for delimiter in _DELIMITERS:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            found = next((row for row in rows if any(row)), [])
            # named as by pandas; several names may be missing if lines end with delimiters
            names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(found)]
        except csv.Error as error:
            raise DataError(f"{path} has no header ({brief(error)}): write the names of the columns first.") from error
        rank = (sum(name in names for name in wanted), len(names))
        if names and (best is None or rank > best[0]):
            best = rank, delimiter, names, rows.line_num
    if best is None:
        raise DataError(f"{path} is empty: write a header and a row for each example.")
    _, delimiter, names, lines = best
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has the column {' and '.join(map(repr, twice))} more than once: rename it.")
    return delimiter, names, lines
