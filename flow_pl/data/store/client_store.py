"""A store of clients on disk: the rows of all clients one after the other, memory-mapped.

Opening a store costs the same for a hundred clients and for a million: rows are read only when a client is requested,
and memory does not grow with the population.

Layout of the folder, with M clients and R rows in all:

- `x.npy` [R, ...]: features, of any numeric type; for several by name, `x_0.npy`, `x_1.npy`, ... in the order of the
  names in `meta.json`;
- `y.npy` [R] or [R, ...]: labels, a signed integer type, -1 = to be predicted; or [R] real values, float32, NaN = to
  be predicted;
- `offsets.npy` [M + 1] int64: client i owns the rows offsets[i] to offsets[i + 1]; its labelled rows come first;
- `labelled.npy` [M] int64: number of labelled rows;
- `val_rows.npy` and `test_rows.npy` [M] int64: numbers of validation and test rows in the data's own split: the test
  rows are the last labelled ones, and the validation rows come before them; -1 if the data does not specify them;
- `roles.npy` [M] int8: role of the client in the data, an index into `ROLES`;
- `names.npy` [M] bytes: names of the clients, UTF-8;
- `meta.json`: metadata that a reader checks (`StoreMeta`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.store.client_checks import check_client
from flow_pl.data.store.features import Features, feature_files
from flow_pl.errors import DataError, brief
from flow_pl.utils.inputs import first, from_leaves, map_inputs, take

FORMAT_VERSION = 5
"""Version of the layout; a store of another version is not read."""

Role = Literal["train", "validation", "test"]
"""Role of a client in the data: trained on, or never sampled in training and evaluated after rounds ("validation") or
at the end ("test"). If the data does not divide its clients, all are trained on."""

ROLES: tuple[Role, ...] = ("train", "validation", "test")


class ClientRows(NamedTuple):
    """Holds the rows of one client, which are not copied from the file until they are indexed.

    Attributes:
        x: [n, ...] features; a mapping for several by name.
        y: [n, ...] labels; -1 in the rows after the labelled ones.
        labelled: number of labelled rows, which come first.
        val_rows: number of validation rows in the data's own split; -1 = not specified.
        test_rows: number of test rows in the data's own split, the last labelled ones; -1 = not specified.
    """

    x: Features
    y: NDArray[Any]
    labelled: int
    val_rows: int
    test_rows: int


@dataclass(frozen=True)
class StoreMeta:
    """Describes the contents of `meta.json`.

    Attributes:
        version: `FORMAT_VERSION` of the writer.
        clients: number of clients.
        rows: number of rows.
        num_classes: number of classes of the labels; 1 for real values.
        class_names: names of the classes in the order of their numbers if labels are texts; otherwise none.
        features: names of several features in the order of their files; otherwise none, and not in the
            file.
        largest_label: the largest label; None for real values.
    """

    version: int
    clients: int
    rows: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    largest_label: int | None = None


class ClientStore:
    """Reads clients from a folder written by `ClientStoreWriter`; created by `ClientStore.open`.

    Copies sent to loader workers open the files again instead of carrying the rows.

    Attributes:
        path: the folder.
        meta: number of clients, rows and classes.
        offsets: [M + 1] int64, memory-mapped.
        labelled: [M] int64, labelled rows of each client, memory-mapped.
        val_rows: [M] int64, validation rows of the data's own split or -1, memory-mapped.
        test_rows: [M] int64, test rows of the data's own split or -1, memory-mapped.
        roles: [M] int8, indices into `ROLES`, memory-mapped.
    """

    _x: Features

    def __init__(self, path: Path, meta: StoreMeta, arrays: dict[str, NDArray[Any]]) -> None:
        self.path = path
        self.meta = meta
        self.offsets: NDArray[np.int64] = arrays["offsets"]
        self.labelled: NDArray[np.int64] = arrays["labelled"]
        self.val_rows: NDArray[np.int64] = arrays["val_rows"]
        self.test_rows: NDArray[np.int64] = arrays["test_rows"]
        self.roles: NDArray[np.int8] = arrays["roles"]
        self._x = from_leaves(meta.features or None, [arrays[file] for file in feature_files(meta.features)])
        self._y = arrays["y"]
        self._names = arrays["names"]

    @classmethod
    def open(cls, path: str | Path) -> ClientStore:
        """Open a store; reads the headers of its files and the clients' numbers of rows, but no row.

        Args:
            path: the folder of the store.

        Returns:
            The store.

        Raises:
            DataError: a file is missing, truncated, or of another version; the message names it and the remedy.
        """
        path = Path(path)
        meta: StoreMeta = _load(path / "meta.json", _meta)
        if meta.version != FORMAT_VERSION:
            raise DataError(_broken(path / "meta.json", f"version {meta.version} instead of {FORMAT_VERSION}"))
        features = feature_files(meta.features)
        lengths = {
            **dict.fromkeys(features, meta.rows),
            "y": meta.rows,
            "offsets": meta.clients + 1,
            "labelled": meta.clients,
            "val_rows": meta.clients,
            "test_rows": meta.clients,
            "roles": meta.clients,
            "names": meta.clients,
        }
        arrays = {}
        for name, length in lengths.items():
            # a plain array on the mapped memory, since numpy's memmap creates an object of its class for every slice
            array = np.asarray(
                _load(path / f"{name}.npy", lambda file: np.load(file, mmap_mode="r", allow_pickle=False))
            )
            if array.shape[:1] != (length,):
                raise DataError(_broken(path / f"{name}.npy", f"shape {array.shape} instead of {length} entries"))
            kinds = "biuf" if name in features else _KINDS.get(name, "i")
            if array.dtype.kind not in kinds or (name not in (*features, "y") and array.ndim != 1):
                raise DataError(_broken(path / f"{name}.npy", f"shape {array.shape} and type {array.dtype}"))
            # the same mapped memory as a plain array, since slices of numpy's memmap are slow
            arrays[name] = np.asarray(array)
        if arrays["offsets"][-1] != meta.rows:
            raise DataError(_broken(path / "offsets.npy", f"it ends at {arrays['offsets'][-1]}, not at {meta.rows}"))
        for start in range(0, meta.clients, _CLIENTS_AT_ONCE):
            for name, problem in _wrong_counts(arrays, slice(start, start + _CLIENTS_AT_ONCE)):
                raise DataError(_broken(path / f"{name}.npy", problem))
        return cls(path, meta, arrays)

    def __reduce__(self) -> tuple[Callable[[str], ClientStore], tuple[str]]:
        return ClientStore.open, (str(self.path),)

    def __len__(self) -> int:
        """Return the number of clients."""
        return self.meta.clients

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return the number of rows [M] of each client, including unlabelled ones; reads no row."""
        return np.diff(self.offsets)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Return the shape of the features of one row; of several, that of the first."""
        return first(self._x).shape[1:]

    @property
    def feature_dtype(self) -> np.dtype[Any]:
        """Return the stored type of the features; of several, that of the first."""
        return first(self._x).dtype

    @property
    def real_valued(self) -> bool:
        """Return whether the labels are real values rather than classes."""
        return bool(self._y.dtype.kind == "f")

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Return the shape of the label of one row: () for a class, (T,) for a sequence."""
        return self._y.shape[1:]

    def read(self, client: int) -> ClientRows:
        """Return the rows of one client.

        Args:
            client: index of the client, 0 to M - 1.

        Returns:
            Views of the memory-mapped rows, of which only indexed ones are read.
        """
        start, stop = int(self.offsets[client]), int(self.offsets[client + 1])
        x, y = take(self._x, slice(start, stop)), self._y[start:stop]
        counts = (int(rows[client]) for rows in (self.labelled, self.val_rows, self.test_rows))
        return ClientRows(x, y, *counts)

    def rows(self, numbers: NDArray[np.int64]) -> tuple[Features, NDArray[Any]]:
        """Copy rows of any clients.

        Args:
            numbers: [...] numbers of rows in the store; beyond the last one, that is taken.

        Returns:
            Features and labels [..., *shape of a row], in their stored types.
        """
        x = map_inputs(lambda x: x.take(numbers, axis=0, mode="clip"), self._x)
        return x, self._y.take(numbers, axis=0, mode="clip")

    def check(self, client: int) -> None:
        """Check the values of a client: a damaged file could stop or spoil a whole run.

        Raises:
            DataError: a feature is not finite, or a label is not a class.
        """
        rows = self.read(client)
        try:
            check_client(self.name(client), rows.x, rows.y, 0, self.meta.num_classes)
        except DataError as error:
            raise DataError(
                f"the client store {self.path} is damaged: delete the folder, it will be rebuilt ({brief(error)})"
            ) from error

    def name(self, client: int) -> str:
        """Return the name of a client, as in the source data."""
        try:
            return bytes(self._names[client]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(_broken(self.path / "names.npy", brief(error))) from error


_KINDS = {"y": "if", "names": "S"}
"""Types of the files; features have any type, all other files signed integers."""


_CLIENTS_AT_ONCE = 1 << 13


def _meta(file: Path) -> StoreMeta:
    meta = StoreMeta(**json.loads(file.read_text(encoding="utf-8")))
    counts = (meta.version, meta.clients, meta.rows, meta.num_classes, meta.largest_label or 0)
    if not all(type(value) is int and 0 <= value < 2**62 for value in counts):
        raise ValueError(f"{counts} holds a value that is not a count")
    for key, names in (("class_names", meta.class_names), ("features", meta.features)):
        if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{key} is not a list of texts")
    if len(meta.class_names) > meta.num_classes:
        raise ValueError(f"{len(meta.class_names)} names are given to {meta.num_classes} classes")
    if len(set(meta.features)) != len(meta.features):
        raise ValueError("features repeats a name")
    return replace(meta, class_names=tuple(meta.class_names), features=tuple(meta.features))


def _wrong_counts(arrays: dict[str, NDArray[Any]], clients: slice) -> Iterator[tuple[str, str]]:
    """Yield files whose numbers for some clients are inconsistent with the rows, and what is wrong."""
    sizes = np.diff(arrays["offsets"][clients.start : clients.stop + 1])
    labelled, val_rows, test_rows, roles = (
        arrays[name][clients] for name in ("labelled", "val_rows", "test_rows", "roles")
    )
    heldout = np.maximum(val_rows, 0) + np.maximum(test_rows, 0)
    if arrays["offsets"][0] != 0 or (sizes < 1).any():
        yield "offsets", "a client has no rows, or fewer"
    if (labelled < 0).any() or (labelled > sizes).any():
        yield "labelled", "a client has more labelled rows than rows, or fewer than none"
    for name, rows in (("val_rows", val_rows), ("test_rows", test_rows)):
        if (rows < -1).any() or (heldout > labelled).any():
            yield name, "a client has more rows for validation and testing than labelled ones, or fewer than none"
    if (roles < 0).any() or (roles >= len(ROLES)).any():
        yield "roles", f"a client has a role other than {', '.join(ROLES)}"


def _load(file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except Exception as error:  # damage raises one of a dozen types: ValueError, TokenError, OSError, TypeError, ...
        raise DataError(_broken(file, brief(error))) from error


def _broken(file: Path, found: str) -> str:
    return f"{file} is not a usable part of a client store ({found}): delete {file.parent}, it will be rebuilt."
