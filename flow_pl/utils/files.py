"""Files that are seen whole or not at all."""

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
    """Write a file beside its target and rename it, so that a kill or a full disk leaves the target as it was.

    Args:
        path: the file; replaced if it is there.
        beside: name of the temporary file in the same folder; None = that of the file with `.part` behind it.

    Yields:
        The file to write to. What an error leaves of it is removed.

    Raises:
        FlowError: it cannot be written.
    """
    temporary = path.with_name(beside or f"{path.name}.part")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> FlowError:
    """What to say of a file that cannot be written.

    Args:
        path: the file.
        error: why.
    """
    return FlowError(
        f"{path} cannot be written ({error.strerror or error}): make room on its disk, or choose a folder that you may "
        "write to (--trainer.default_root_dir for a run). What was saved before is intact, "
        "and --ckpt_path last goes on from it."
    )


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the whole of it or nothing.

    Args:
        path: the file; replaced if it is there.
        text: its content.

    Raises:
        FlowError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the whole of it or nothing.

    Args:
        path: the file; replaced if it is there.
        content: its content.

    Raises:
        FlowError: it cannot be written.
    """
    with replacing(path) as file:
        file.write(content)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as text below one header, the columns in the order in which the rows first have them.

    Args:
        rows: values by column; one that is not there, None or NaN is left empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    # NaN alone differs from itself
    writer.writerows({name: value for name, value in row.items() if value == value} for row in rows)
    return text.getvalue()
