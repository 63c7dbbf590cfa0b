"""Features of clients: one array, or a mapping of several by name that have as many rows."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Features = NDArray[Any] | dict[str, NDArray[Any]]
"""[n, ...] features of one client, or of several: one array, or arrays by name."""


def feature_files(names: tuple[str, ...]) -> list[str]:
    """Return the names of the files that hold features of these names, without `.npy`; of none, that of one array."""
    return [f"x_{i}" for i in range(len(names))] or ["x"]


def called(name: str | None) -> str:
    """Return what messages call the features of a name; None where there is one array."""
    return "features" if name is None else f"features {name!r}"
