"""Write growing files of features: one `.npy` file, or one for each name of a mapping."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.store.features import Features, called, feature_files
from flow_pl.data.store.growing import GrowingArray, sync
from flow_pl.utils.inputs import leaves, names_of

_NAMES = "x.json"
"""File with the names of a mapping's features, until the store's `meta.json` has them."""


class GrowingFeatures:
    """Appends the features of one client after the other to files.

    Args:
        names: names of a mapping's features; empty = a single array.
        files: a file for each name, or a single one.
        folder: folder of the files.

    Attributes:
        names: names of a mapping's features.
    """

    def __init__(self, names: tuple[str, ...], files: Sequence[GrowingArray], folder: Path) -> None:
        self.names = names
        self._files = files
        self._folder = folder

    @classmethod
    def create(cls, folder: Path, like: Features) -> GrowingFeatures:
        """Create files for features like these; existing ones are replaced."""
        names = names_of(like) or ()
        if names:
            with (folder / _NAMES).open("w", encoding="utf-8") as file:
                json.dump(names, file)
                sync(file)
        paths = (folder / f"{name}.npy" for name in feature_files(names))
        arrays = zip(paths, leaves(like), strict=True)
        return cls(names, [GrowingArray.create(path, array) for path, array in arrays], folder)

    @classmethod
    def reopen(cls, folder: Path) -> GrowingFeatures:
        """Open unfinished files, see `GrowingArray.reopen`.

        Raises:
            OSError: a file is missing.
            ValueError: a file is damaged.
        """
        names: tuple[str, ...] = ()
        if (folder / _NAMES).exists():
            found = json.loads((folder / _NAMES).read_text(encoding="utf-8"))
            if not (isinstance(found, list) and found and all(isinstance(name, str) for name in found)):
                raise ValueError(f"{folder / _NAMES} holds no names")
            names = tuple(found)
        with contextlib.ExitStack() as stack:
            files = []
            for name in feature_files(names):
                files.append(GrowingArray.reopen(folder / f"{name}.npy"))
                stack.callback(files[-1].close)
            stack.pop_all()
        return cls(names, files, folder)

    def misfit(self, x: Features) -> tuple[str, str] | None:
        """Return which of a client's features differ from those in the files, and those; None if all match."""
        if names_of(x) != (self.names or None):
            return f"features {_listed(names_of(x))}", f"them {_listed(self.names or None)}"
        for name, file, rows in zip(self.names or (None,), self._files, leaves(x), strict=True):
            if not file.fits(rows):
                found = f"{called(name)} of shape {rows.shape[1:]} and type {rows.dtype}"
                return found, f"shape {file.shape} and type {file.dtype}"
        return None

    def append(self, x: Features, order: NDArray[np.int64] | None = None) -> int:
        """Append the features of a client, in another order if one is given; returns their checksum."""
        checksum = 0
        for file, rows in zip(self._files, leaves(x), strict=True):
            checksum = file.append(rows if order is None else rows[order], checksum)
        return checksum

    def checksum(self, start: int, count: int) -> int | None:
        """Compute the checksum of rows in the files; None if a file is too short."""
        checksum: int | None = 0
        for file in self._files:
            checksum = None if checksum is None else file.checksum(start, count, checksum)
        return checksum

    def truncate(self, length: int) -> None:
        """Keep the first rows; further ones are appended to them."""
        for file in self._files:
            file.truncate(length)

    def flush(self) -> None:
        """Pass everything to the operating system."""
        for file in self._files:
            file.flush()

    def finish(self) -> None:
        """Fill in the lengths, and write everything to the disk."""
        for file in self._files:
            file.finish()
        with contextlib.suppress(OSError):  # a left-over file does no harm in a store
            (self._folder / _NAMES).unlink()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _listed(names: tuple[str, ...] | None) -> str:
    return "as one array" if names is None else f"named {', '.join(names)}"
