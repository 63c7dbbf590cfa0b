"""The journal of a client store being written, from which another process can resume.

A line is appended for every client when its rows are in their files. It holds their checksums, so that a line counts
only if the rows are what was written, whatever a kill, a full disk or a power cut has left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

try:
    import fcntl
except ImportError:  # on Windows: without locks, nothing is resumed
    fcntl = None  # type: ignore[assignment]

_NAME = "journal.jsonl"


class Entry(NamedTuple):
    """Records a client's properties apart from its rows; see `ClientStore` for most of them.

    Attributes:
        name: the client's name.
        rows: number of rows.
        labelled: number of labelled rows.
        val_rows: number of validation rows in the data's own split, or -1.
        test_rows: number of test rows in the data's own split, or -1.
        role: index of the role.
        largest_label: its largest label.
        x_checksum: checksum of its features.
        y_checksum: checksum of its labels.
    """

    name: str
    rows: int
    labelled: int
    val_rows: int
    test_rows: int
    role: int
    largest_label: int
    x_checksum: int
    y_checksum: int


class Journal:
    """Journals a folder, which no other process writes to while it is held; created by `hold`.

    Args:
        folder: the folder.
        file: the journal in it, locked.
        identity: what must match for a journal to be resumed, as JSON types.

    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: Path, file: BinaryIO, identity: dict[str, Any]) -> None:
        self.folder = folder
        self._file = file
        self._header = _line(identity)

    @classmethod
    def hold(cls, folder: Path, identity: dict[str, Any]) -> Journal | None:
        """Create the folder if missing, and lock it against other processes.

        Args:
            folder: the folder.
            identity: what must match for a journal to be resumed, as JSON types.

        Returns:
            Its journal; None if another process holds it, or if the file system has no locks.

        Raises:
            OSError: the folder cannot be created or written to.
        """
        if fcntl is None:
            return None
        path = folder / _NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except (FileNotFoundError, FileExistsError):  # the folder has just become a store
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # otherwise the folder was removed
                return cls(folder, file, identity)
        except OSError:
            pass
        file.close()
        return None

    def entries(self) -> Iterator[tuple[Entry, int]]:
        """Yield the written clients, up to the first damaged line.

        Yields:
            A client's entry and the position that `cut` needs to keep it; nothing if the journal has another identity.
        """
        self._file.seek(0)
        if self._file.readline() != self._header:
            return
        while (line := self._file.readline()).endswith(b"\n"):
            try:
                entry = Entry(*json.loads(line))
            except (ValueError, TypeError, RecursionError):
                return
            numbers = entry[1:]
            if not isinstance(entry.name, str) or not all(type(n) is int and -1 <= n < 2**63 for n in numbers):
                return
            yield entry, self._file.tell()

    def restart(self) -> None:
        """Discard all clients."""
        self._file.truncate(0)
        self._file.write(self._header)

    def cut(self, end: int) -> None:
        """Discard the clients after one of `entries`."""
        self._file.truncate(end)

    def append(self, entry: Entry) -> None:
        """Record a client whose rows have been passed to the operating system."""
        self._file.write(_line(entry))
        self._file.flush()

    def discard(self) -> None:
        """Delete the folder."""
        # renamed first, so that another process that creates a folder with this name gets its own
        doomed = self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex}.tmp")
        self.folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def move(self, target: Path) -> None:
        """Give the folder, without the journal, the name of a store.

        Raises:
            OSError: it cannot be renamed.
        """
        self.folder.rename(target)
        # not earlier: another process that created a new journal would take the folder for its own
        with contextlib.suppress(OSError):  # a left-over file does no harm in a store
            (target / _NAME).unlink()

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._file.close()


def _line(values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"
