"""Check the local files of a `datasets.Dataset` before that library reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flow_pl.data.readers.table_files import check_parquet
from flow_pl.utils.optional import import_optional


def check_files(folder: Path, files: Iterable[Path]) -> None:
    """Check that files are complete, do not expand to far more than their size, and do not refer to other files.

    Args:
        folder: folder of the data set, or its only file.
        files: files of the data set.

    Raises:
        DataError: a file expands to too many bytes.
        ValueError: a file refers to one outside of the folder.
        pyarrow.ArrowException: a file is damaged.
    """
    for file in files:
        if file.suffix == ".parquet":
            check_parquet(file)
        elif file.suffix == ".arrow":
            _check_arrow(file)
        elif file.name == "state.json":
            state = json.loads(file.read_text(encoding="utf-8"))
            for entry in state["_data_files"]:
                if not (file.parent / entry["filename"]).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{file} refers to a file outside of the folder, {entry['filename']!r}")


def require_embedded(column: Any) -> None:
    """Check that images are in the table itself, not in files or on servers that it names.

    Args:
        column: a `pyarrow.ChunkedArray`.

    Raises:
        ValueError: an image is only named.
    """
    types, compute = import_optional("pyarrow.types", "datasets"), import_optional("pyarrow.compute", "datasets")
    if types.is_struct(column.type) and "bytes" in {field.name for field in column.type}:
        missing = len(column) - compute.count(compute.struct_field(column, "bytes")).as_py()
        if missing:
            raise ValueError(f"{missing} images are not in the data, which only names their files: embed them")


def _check_arrow(file: Path) -> None:
    """Check every buffer, since Arrow trusts offsets that lead out of the file, and crashes."""
    arrow = import_optional("pyarrow", "datasets")
    with arrow.memory_map(str(file)) as source:
        try:
            reader = arrow.ipc.open_stream(source)
            batches: Iterable[Any] = reader
        except arrow.ArrowInvalid:
            reader = arrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        for batch in batches:
            batch.validate(full=True)
