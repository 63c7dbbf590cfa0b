"""Locate client stores, and build missing ones."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from flow_pl.data.store.client_checks import UnusableError
from flow_pl.data.store.client_store import FORMAT_VERSION
from flow_pl.data.store.writer import ClientData, ClientStoreWriter
from flow_pl.errors import DataError

T = TypeVar("T")


def store_path(cache_dir: str | None, name: str, options: dict[str, Any]) -> Path:
    """Return the folder of a data set's store: data sets that differ in any option have different stores.

    Args:
        cache_dir: folder of all stores; None = the environment variable FLOW_PL_CACHE, or else ~/.cache/flow_pl.
        name: name of the kind of data.
        options: everything that the rows depend on, of JSON types.

    Returns:
        The folder of the store, which may not exist yet.
    """
    root = Path(cache_dir or os.environ.get("FLOW_PL_CACHE") or "~/.cache/flow_pl").expanduser()
    identity = json.dumps({"format": FORMAT_VERSION, "name": name, "options": options}, sort_keys=True)
    return root / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def file_identity(path: Path) -> dict[str, Any]:
    """Identify a source file for the options of a store: the result changes whenever the file is written.

    Args:
        path: the file.

    Returns:
        Its full path, size in bytes and time of modification in nanoseconds.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}: correct the path of the data.")
    status = path.stat()
    return {"path": str(path.resolve()), "size": status.st_size, "modified": status.st_mtime_ns}


def progress(clients: Iterable[T], description: str) -> Iterable[T]:
    """Show progress on a terminal, and nothing elsewhere.

    Args:
        clients: the clients to iterate over.
        description: what is being done.

    Returns:
        The same, one at a time.
    """
    console = Console(stderr=True)
    return track(clients, description, console=console, transient=True, disable=not console.is_terminal)


def build_store(
    path: Path,
    clients: Iterable[ClientData],
    num_classes: int | None,
    class_names: Callable[[], Sequence[str]] = tuple,
    leave_out: Callable[[str], None] | None = None,
) -> None:
    """Write a client store, showing progress on a terminal; after an interruption it is written from the start.

    Args:
        path: the folder of the store.
        clients: the clients, one at a time.
        num_classes: number of classes.
        class_names: returns the class names, if any, after all clients are read.
        leave_out: called with the name of a client without labels, which is then left out; None = such a client is an
            error.

    Raises:
        DataError: a client cannot be used.
        ConfigurationError: the folder cannot be created, or the disk is full.
    """
    for folder in path.parent.glob(f".{path.name}.*.tmp"):
        warnings.warn(
            f"{folder} was left by a process that was killed before the client store was complete, or another process "
            "is writing it now. The store is written from the start; delete the folder if no process is writing it.",
            stacklevel=2,
        )
    with ClientStoreWriter(path, num_classes) as writer:
        skipped = False
        for client in progress(clients, f"Writing {path.name}"):
            try:
                writer.add(*client)
            except UnusableError:
                if leave_out is None:
                    raise
                leave_out(client.name)
                skipped = True
        if skipped and not writer.written:
            raise DataError(f"no client to write to {path} has a label: check where the labels come from.")
        writer.class_names = class_names()
