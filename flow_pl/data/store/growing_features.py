"""Write growing files of features: one `.npy` file, or one for each name of a mapping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.store.features import Features, called, feature_files
from flow_pl.data.store.growing import GrowingArray
from flow_pl.utils.inputs import leaves, names_of


class GrowingFeatures:
    """Appends the features of one client after the other to files.

    Args:
        names: names of a mapping's features; empty = a single array.
        files: a file for each name, or a single one.

    Attributes:
        names: names of a mapping's features.
    """

    def __init__(self, names: tuple[str, ...], files: Sequence[GrowingArray]) -> None:
        self.names = names
        self._files = files

    @classmethod
    def create(cls, folder: Path, like: Features) -> GrowingFeatures:
        """Create files for features like these; existing ones are replaced."""
        names = names_of(like) or ()
        paths = (folder / f"{name}.npy" for name in feature_files(names))
        arrays = zip(paths, leaves(like), strict=True)
        return cls(names, [GrowingArray.create(path, array) for path, array in arrays])

    def misfit(self, x: Features) -> tuple[str, str] | None:
        """Return which of a client's features differ from those in the files, and those; None if all match."""
        if names_of(x) != (self.names or None):
            return f"features {_listed(names_of(x))}", f"them {_listed(self.names or None)}"
        for name, file, rows in zip(self.names or (None,), self._files, leaves(x), strict=True):
            if not file.fits(rows):
                found = f"{called(name)} of shape {rows.shape[1:]} and type {rows.dtype}"
                return found, f"shape {file.shape} and type {file.dtype}"
        return None

    def append(self, x: Features, order: NDArray[np.int64] | None = None) -> None:
        """Append the features of a client, in another order if one is given."""
        for file, rows in zip(self._files, leaves(x), strict=True):
            file.append(rows if order is None else rows[order])

    def finish(self) -> None:
        """Fill in the lengths, and write everything to the disk."""
        for file in self._files:
            file.finish()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _listed(names: tuple[str, ...] | None) -> str:
    return "as one array" if names is None else f"named {', '.join(names)}"
