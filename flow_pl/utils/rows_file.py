"""A CSV file that a fit extends row by row, and that a resumed fit continues wherever it writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flow_pl.errors import ConfigurationError
from flow_pl.utils.files import unwritable, write_text


class RowsFile:
    """Rows below one header; they belong in the checkpoint, and the file is a copy of them.

    A fit that resumes restores the rows from its checkpoint. So it neither repeats nor loses a round, whatever a killed
    process has left in the file, and whichever folder the fit writes to.

    Attributes:
        text: the rows as CSV.
    """

    def __init__(self) -> None:
        self.text = ""
        self._columns: list[str] = []
        self._path: Path | None = None
        self._written = 0  # length of the text that the file holds

    def restore(self, text: str | None) -> None:
        """Replace the rows by those of a checkpoint.

        Args:
            text: the rows as CSV; an incomplete last row is dropped.

        Raises:
            ConfigurationError: the checkpoint has no such text.
        """
        if not isinstance(text, str):
            raise ConfigurationError(
                "the checkpoint lacks the rows of the log, as those of earlier versions of flow_pl do: continue it "
                "with the version that wrote it, or start anew without --ckpt_path."
            )
        self.text, self._written = text[: text.rfind("\n") + 1], 0
        self._columns = list(csv.DictReader(io.StringIO(self.text)).fieldnames or [])

    def rows(self) -> list[dict[str, float]]:
        """Return the rows; one lacks the columns that it has no value for."""
        found = csv.DictReader(io.StringIO(self.text, newline=""))
        return [{name: float(value) for name, value in row.items() if value} for row in found]

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows.

        Args:
            *rows: values by column; a column that is new is added to the header and left empty in the rows before.
        """
        new = dict.fromkeys(name for row in rows for name in row if name not in self._columns)
        if new:
            earlier = list(csv.DictReader(io.StringIO(self.text, newline="")))
            self._columns += new
            self.text, self._written = "", 0
            self._format([dict(zip(self._columns, self._columns, strict=True)), *earlier])
        self._format(rows)

    def write(self, path: Path) -> None:
        """Write the rows to a file: append the new ones if the file holds the others, and replace it if not.

        Args:
            path: the file; never half written.

        Raises:
            FlowError: the disk is full or the folder is not writable; earlier rows are intact.
        """
        if path != self._path or not self._written:
            write_text(path, self.text)
        else:
            _append(path, self.text[self._written :].encode())
        self._path, self._written = path, len(self.text)

    def _format(self, rows: Iterable[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        self.text += text.getvalue()


def _append(path: Path, content: bytes) -> None:
    try:
        # unbuffered: a kill leaves all of it or nothing
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(content) < len(content):
                file.truncate(end)
                raise OSError("there is no space left")
    except OSError as error:
        raise unwritable(path, error) from error
