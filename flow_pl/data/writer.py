"""Writing a client store, one client at a time, so that it is whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from array import array
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from flow_pl.data.checks import check_client, unusable
from flow_pl.data.store import FORMAT_VERSION, ROLES, Role, StoreMeta
from flow_pl.errors import ConfigurationError, DataError


class ClientData(NamedTuple):
    """One client, as a reader of a source format yields it.

    Attributes:
        name: the client's name, unique in the data set.
        x: [n, ...] features, numbers of any type, finite; the same shape and type for every client.
        y: [n] or [n, ...] integer labels, 0 or more; -1 (in every entry of the row) = to be predicted.
        train_rows: where the data has its own split, the first `train_rows` rows are for training and the rest for
            testing; None = no such split.
        role: whether the data means the client to be trained on, or only to be evaluated on.
        source: file that the client comes from, for messages; empty = none.
    """

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    train_rows: int | None = None
    role: Role = "train"
    source: str = ""


class ClientStoreWriter:
    """Writes a client store; a context manager.

    Rows go straight to disk, in a folder beside the target that is renamed to it at the end. A writer that fails or is
    killed leaves no store; where another process has finished the same store first, that one is kept.

    Args:
        target: folder of the store; must not exist.
        num_classes: number of classes; None = the largest label + 1.

    Raises:
        ConfigurationError: the folder cannot be made, or the disk is full.
        DataError: on leaving, no client was added.
    """

    def __init__(self, target: str | Path, num_classes: int | None = None) -> None:
        self._target = Path(target)
        self._folder = self._target.parent / f".{self._target.name}.{uuid.uuid4().hex}.tmp"
        self._num_classes = num_classes
        self._largest_label = -1
        self._names: dict[str, None] = {}
        self._offsets = array("q", [0])
        self._labelled = array("q")
        self._train_rows = array("q")
        self._roles = array("b")
        self._x: _GrowingArray | None = None
        self._y: _GrowingArray | None = None

    def __enter__(self) -> ClientStoreWriter:
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as problem:
            raise self._unwritable(problem) from problem
        finally:
            for rows in (self._x, self._y):
                if rows is not None:
                    with contextlib.suppress(OSError):  # on a full disk, what is still to be written fails again
                        rows.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(
        self,
        name: str,
        x: NDArray[Any],
        y: NDArray[Any],
        train_rows: int | None = None,
        role: Role = "train",
        source: str = "",
    ) -> None:
        """Append one client; the arguments are the fields of `ClientData`.

        Raises:
            DataError: the client cannot be used; the message names it and its file, what was found and the remedy.
            ConfigurationError: the disk is full.
        """
        try:
            self._add(name, np.asarray(x), np.asarray(y), train_rows, role)
        except DataError as error:
            if not source:
                raise
            raise DataError(f"{source}: {error}") from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _add(self, name: str, x: NDArray[Any], y: NDArray[Any], train_rows: int | None, role: Role) -> None:
        if name in self._names:
            raise unusable(name, "comes twice", "give every client a name of its own, and all of its rows at once")
        check_client(name, x, y, train_rows, self._num_classes)
        y = y.astype(np.promote_types(y.dtype, np.int8))  # the smallest signed type that holds -1 and every label
        if self._x is None or self._y is None:
            self._x = _GrowingArray(self._folder / "x.npy", x)
            self._y = _GrowingArray(self._folder / "y.npy", y)
        for what, file, rows in (("features", self._x, x), ("labels", self._y, y)):
            if not file.fits(rows):
                raise unusable(
                    name,
                    f"has {what} of shape {rows.shape[1:]} and type {rows.dtype}",
                    f"those of the clients before it have shape {file.shape} and type {file.dtype}; make them equal",
                )
        labelled = (y != -1).reshape(len(y), -1).any(axis=1)
        first = np.argsort(~labelled, kind="stable")
        self._x.append(x if labelled.all() else x[first])
        self._y.append(y[first])
        self._names[name] = None
        self._offsets.append(self._offsets[-1] + len(x))
        self._labelled.append(int(labelled.sum()))
        self._train_rows.append(-1 if train_rows is None else int(labelled[:train_rows].sum()))
        self._roles.append(ROLES.index(role))
        self._largest_label = max(self._largest_label, int(y.max()))

    def _commit(self) -> None:
        if self._x is None or self._y is None:
            raise DataError(f"no client to write to {self._target}: the data set has no rows; check its source.")
        arrays = {"offsets": self._offsets, "labelled": self._labelled, "train_rows": self._train_rows}
        for name, values in arrays.items():
            _save(self._folder / f"{name}.npy", np.asarray(values, dtype=np.int64))
        _save(self._folder / "roles.npy", np.asarray(self._roles, dtype=np.int8))
        _save(self._folder / "names.npy", np.array([name.encode("utf-8") for name in self._names], dtype=np.bytes_))
        self._x.finish()
        self._y.finish()
        classes = self._largest_label + 1 if self._num_classes is None else self._num_classes
        meta = StoreMeta(FORMAT_VERSION, len(self._names), self._offsets[-1], classes)
        with (self._folder / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(asdict(meta), file, indent=2)
            _sync(file)
        try:
            self._folder.rename(self._target)
        except OSError:
            if not self._target.is_dir():  # where it is one, another process was first, with the same rows
                raise

    def _unwritable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"the client store {self._target} cannot be written ({error}): set cache_dir, or the environment variable "
            "FLOW_PL_CACHE, to a folder that can be written to, on a disk with room for the data."
        )


class _GrowingArray:
    """A `.npy` file whose first axis grows; numpy pads its header so that the length can be put in later."""

    def __init__(self, path: Path, like: NDArray[Any]) -> None:
        self.dtype, self.shape = like.dtype.newbyteorder("="), like.shape[1:]
        self._length = 0
        self._file = path.open("wb")
        self._write_header()

    def fits(self, rows: NDArray[Any]) -> bool:
        return (rows.dtype.newbyteorder("="), rows.shape[1:]) == (self.dtype, self.shape)

    def append(self, rows: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self._length += len(rows)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        _sync(self._file)

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self._length, *self.shape)}
        npy.write_array_header_1_0(self._file, header)


def _save(path: Path, values: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=False)
        _sync(file)


def _sync(file: BinaryIO | TextIO) -> None:
    # before the rename, so that after a power cut the folder does not stand for rows that never reached the disk
    file.flush()
    os.fsync(file.fileno())
