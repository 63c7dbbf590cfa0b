"""Write files atomically."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from flow_pl.errors import FlowError


@contextlib.contextmanager
def replacing(path: Path, beside: str | None = None) -> Iterator[BinaryIO]:
    """Write a file beside its target and rename it, so that a kill or a full disk leaves the target unchanged.

    Args:
        path: the file; replaced if it exists.
        beside: name of the temporary file in the same folder; None for the file's name with `.part` appended.

    Yields:
        The file to write to. It is removed on an error.

    Raises:
        FlowError: the file cannot be written.
    """
    temporary = path.with_name(beside or f"{path.name}.part")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # otherwise a power failure may leave an empty file under the new name
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> FlowError:
    """Return the error for a file that cannot be written.

    Args:
        path: the file.
        error: the cause.
    """
    return FlowError(
        f"{path} cannot be written ({error.strerror or error}): free space on its disk, or choose a writable folder "
        "(--trainer.default_root_dir for a run). Earlier checkpoints are intact; --ckpt_path last resumes from the "
        "last one."
    )


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing.

    Args:
        path: the file; replaced if it exists.
        text: its content.

    Raises:
        FlowError: the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing.

    Args:
        path: the file; replaced if it exists.
        content: its content.

    Raises:
        FlowError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(content)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Format rows as CSV with one header, the columns in the order of their first appearance.

    Args:
        rows: values by column; a missing value, None or NaN is left empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    # only NaN differs from itself
    writer.writerows({name: value for name, value in row.items() if value == value} for row in rows)
    return text.getvalue()
