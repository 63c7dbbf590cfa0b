"""Features of clients: one array, or several by name with equal numbers of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[Any] | dict[str, NDArray[Any]]
"""[n, ...] features of one or several clients: one array, or arrays by name."""


def feature_files(names: tuple[str, ...]) -> list[str]:
    """Return the files' names, without `.npy`, for features with these names; without names, that of one array."""
    return [f"x_{i}" for i in range(len(names))] or ["x"]


def called(name: str | None) -> str:
    """Return what messages call the features with a name; None for a single array."""
    return "features" if name is None else f"features {name!r}"


READINGS = ("numbers", "tokens", "bytes, scaled to 0..1", "truth values, or bytes of which all are 0 or 1")
"""How features are read (`FederatedDataModule.transform`), by their stored types."""


def read_as(kind: np.dtype[Any]) -> str:
    """Return which of `READINGS` a stored type has; those of any size are alike."""
    if kind == np.uint8:
        return READINGS[2]
    return {"f": READINGS[0], "b": READINGS[3]}.get(kind.kind, READINGS[1])
