"""Write a client store, one client at a time, so that it is either complete or absent."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from array import array
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.store.client_checks import check_client, labelled_rows, unusable
from flow_pl.data.store.client_store import FORMAT_VERSION, ROLES, Role, StoreMeta
from flow_pl.data.store.features import Features
from flow_pl.data.store.growing import GrowingArray, sync
from flow_pl.data.store.growing_features import GrowingFeatures
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.utils.inputs import in_order, map_inputs
from flow_pl.utils.validation import given, require_count


class ClientData(NamedTuple):
    """Holds one client, as yielded by a reader.

    Attributes:
        name: the client's name, unique in the data set.
        x: [n, ...] features, numbers of any type, finite; the same shape and type for every client. Or a mapping of
            several by name, which a model gets as a mapping of tensors, in alphabetical order.
        y: [n] or [n, ...] integer labels, 0 or more; -1 (in every entry of the row) = to be predicted. Or [n] real
            values, float32; NaN = to be predicted.
        val_rows: number of rows that the data marks for validation, which come before its test rows; None = not
            specified.
        test_rows: number of rows that the data marks for testing, which come last; None = not specified.
        role: role of the client in the data: trained on, or only evaluated.
        source: file of the client, for messages; empty = none.
    """

    name: str
    x: Features
    y: NDArray[Any]
    val_rows: int | None = None
    test_rows: int | None = None
    role: Role = "train"
    source: str = ""


class ClientStoreWriter:
    """Writes a client store; a context manager.

    Rows go straight to disk, in a folder beside the target that is renamed to it at the end. A writer that fails or is
    killed leaves no store; if another process has finished the same store first, that one is kept.

    Args:
        target: folder of the store; must not exist.
        num_classes: number of classes; None = the largest label + 1.

    Raises:
        ConfigurationError: the folder cannot be made, or the disk is full.
        DataError: at the end of the context, if no client was added.

    Attributes:
        class_names: names of the classes in the order of their numbers, to be set before the context ends; none =
            unnamed.
    """

    def __init__(self, target: str | Path, num_classes: int | None = None) -> None:
        require_count(**given(num_classes=num_classes))
        self._target = Path(target)
        self._folder = self._target.parent / f".{self._target.name}.{uuid.uuid4().hex}.tmp"
        self._num_classes = num_classes
        self.class_names: Sequence[str] = ()
        self._largest_label = -1
        self._names: dict[str, None] = {}
        self._offsets = array("q", [0])
        self._counts = {name: array("q") for name in ("labelled", "val_rows", "test_rows")}
        self._roles = array("b")
        self._x: GrowingFeatures | None = None
        self._y: GrowingArray | None = None

    @property
    def written(self) -> Collection[str]:
        """Return the names of the clients added so far."""
        return self._names.keys()

    def __enter__(self) -> ClientStoreWriter:
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stays = False
        try:
            if kind is None:
                stays = self._commit()
        except OSError as problem:
            raise self._unwritable(problem) from problem
        finally:
            if not stays:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._close()

    def add(
        self,
        name: str,
        x: Features,
        y: NDArray[Any],
        val_rows: int | None = None,
        test_rows: int | None = None,
        role: Role = "train",
        source: str = "",
    ) -> None:
        """Append one client; the arguments are the fields of `ClientData`.

        Raises:
            UnusableError: the client has no labelled row; it can be left out, and others added.
            DataError: the client cannot be used; the message names it and its file, what was found and the remedy.
            ConfigurationError: the disk is full.
        """
        try:
            self._add(name, in_order(map_inputs(np.asarray, x)), np.asarray(y), val_rows, test_rows, role)
        except DataError as error:
            if not source:
                raise
            raise type(error)(f"{source}: {error}") from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _add(
        self, name: str, x: Features, y: NDArray[Any], val_rows: int | None, test_rows: int | None, role: Role
    ) -> None:
        if name in self._names:
            raise unusable(name, "comes twice", "give every client a unique name, and all of its rows at once")
        check_client(name, x, y, (val_rows or 0) + (test_rows or 0), self._num_classes)
        if y.dtype.kind != "f":
            y = y.astype(np.promote_types(y.dtype, np.int8))  # the smallest signed type that holds -1 and every label
        if self._x is None or self._y is None:
            self._x = GrowingFeatures.create(self._folder, x)
            self._y = GrowingArray.create(self._folder / "y.npy", y)
        misfit = self._x.misfit(x)
        if misfit is None and not self._y.fits(y):
            found = f"labels of shape {y.shape[1:]} and type {y.dtype}"
            misfit = found, f"shape {self._y.shape} and type {self._y.dtype}"
        if misfit is not None:
            found, before = misfit
            raise unusable(name, f"has {found}", f"those of the clients before it have {before}; make them equal")
        labelled = labelled_rows(y)
        first = np.argsort(~labelled, kind="stable")
        before_test = len(y) - (test_rows or 0)
        self._x.append(x, None if labelled.all() else first)
        self._y.append(y[first])
        self._names[name] = None
        self._offsets.append(self._offsets[-1] + len(y))
        self._counts["labelled"].append(int(labelled.sum()))
        self._counts["val_rows"].append(
            -1 if val_rows is None else int(labelled[before_test - val_rows : before_test].sum())
        )
        self._counts["test_rows"].append(-1 if test_rows is None else int(labelled[before_test:].sum()))
        self._roles.append(ROLES.index(role))
        self._largest_label = max(self._largest_label, 0 if y.dtype.kind == "f" else int(y.max()))

    def _commit(self) -> bool:
        """Turn the folder into a store; False = another one exists by now, and the folder is left."""
        if self._x is None or self._y is None:
            raise DataError(f"no client to write to {self._target}: the data set has no rows; check its source.")
        for name, values in {"offsets": self._offsets, **self._counts}.items():
            _save(self._folder / f"{name}.npy", np.asarray(values, dtype=np.int64))
        _save(self._folder / "roles.npy", np.asarray(self._roles, dtype=np.int8))
        _save(self._folder / "names.npy", np.array([name.encode("utf-8") for name in self._names], dtype=np.bytes_))
        self._x.finish()
        self._y.finish()
        classes = self._largest_label + 1 if self._num_classes is None else self._num_classes
        names = tuple(self.class_names)
        meta = StoreMeta(
            FORMAT_VERSION,
            len(self._names),
            self._offsets[-1],
            max(classes, len(names)),
            names,
            self._x.names,
            None if self._y.dtype.kind == "f" else self._largest_label,
        )
        described = asdict(meta)
        if not meta.features:  # the layout of a store with one array is unchanged
            del described["features"]
        with (self._folder / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(described, file, indent=2)
            sync(file)
        try:
            self._folder.rename(self._target)
        except OSError:
            if not self._target.is_dir():  # if it is a store, another process was first, with the same rows
                raise
            return False
        return True

    def _close(self) -> None:
        for file in (self._x, self._y):
            if file is not None:
                with contextlib.suppress(OSError):  # on a full disk, pending writes fail again
                    file.close()

    def _unwritable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"the client store {self._target} cannot be written ({error}): set cache_dir, or the environment variable "
            f"FLOW_PL_CACHE, to a writable folder on a disk with space for the data."
        )


def _save(path: Path, values: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=False)
        sync(file)
