"""Store the clients' state between rounds in a file with one row per client, outside the memory of any process.

The file is sparse: a client that has never been sampled takes no space on the disk. It has no name once every process
has opened it, so it vanishes with the last process, however that ends. All processes of a run read and write it; they
never share a client in a round, and the server's step separates rounds.

A client has two places in the file. A round writes to the one that is not in use, which comes into use at the end of
the round, so an interrupted round changes nothing.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flow_pl.errors import ConfigurationError, DataError, FlowError
from flow_pl.utils.groups import Groups

ROWS_AT_ONCE = 256
"""Number of rows copied at once when all rows are read or written."""


class ClientStates:
    """Stores the state of every client, by index in the client store.

    Args:
        template: the groups of one client, for names and shapes. All are kept as float32.
        population: number of clients.
        folder: folder of the file; the same for all processes.
        share: broadcasts a string of the first process to every process, and waits for all of them
            (`trainer.strategy.broadcast`); None for a single process.
        first: whether this is the first process.

    Attributes:
        population: number of clients.
        bytes_per_client: size of a client's state.

    Raises:
        ConfigurationError: the folder cannot be written to, or is not shared by all processes.
    """

    def __init__(
        self,
        template: Groups,
        population: int,
        folder: str | Path,
        share: Callable[[str], str] | None = None,
        first: bool = True,
    ) -> None:
        self.population = population
        self._shapes = [(g, key, p.shape) for g, parameters in template.items() for key, p in parameters.items()]
        self._sizes = [shape.numel() for _, _, shape in self._shapes]
        self.bytes_per_client = 4 * sum(self._sizes)
        self._written: list[tuple[int, int]] = []  # clients and places written in this round
        self._folder = Path(folder)
        self._file = _open_shared(self._folder, share, first)
        if first:
            # One byte per client: the place in use (1 or 2; 0: none yet). Then both places of each client.
            self._try(lambda: os.ftruncate(self._file, population * (1 + 2 * self.bytes_per_client)))
        if share is not None:
            share("")

    def __del__(self) -> None:
        """Release the file."""
        if hasattr(self, "_file"):
            os.close(self._file)

    def known(self) -> NDArray[np.int64]:
        """Return the clients with stored state, in ascending order."""
        return np.flatnonzero(np.frombuffer(os.pread(self._file, self.population, 0), dtype=np.uint8))

    def read(self, clients: Tensor, initial: Groups) -> Groups:
        """Read the groups of a chunk of clients, on the device of `initial`.

        Args:
            clients: [C] indices of the clients.
            initial: state of a client that has never been written.

        Returns:
            Groups with a client axis [C, ...], which may be changed.
        """
        start = self._flat(initial, 0)
        rows = start.expand(len(clients), -1).clone()
        for i, client in enumerate(clients.tolist()):
            if self._place(client):
                rows[i] = torch.from_numpy(self._row(client))
        device = next(p.device for group in initial.values() for p in group.values())
        pieces = torch.split(rows.to(device), self._sizes, dim=1)
        groups: Groups = {}
        for (group, key, shape), piece in zip(self._shapes, pieces, strict=True):
            groups.setdefault(group, {})[key] = piece.reshape(len(clients), *shape).contiguous()
        return groups

    def write(self, clients: Tensor, groups: Groups, accepted: Tensor | None = None) -> None:
        """Write the groups [C, ...] of a chunk of clients; they are kept from `commit` on.

        Args:
            clients: [C] indices of the clients.
            groups: the groups that they keep.
            accepted: [C] bool, False for clients whose state stays unchanged; None to accept all.

        Raises:
            ConfigurationError: the groups are not those of the state that clients start with.
            FlowError: the disk is full.
        """
        found = [[g, key, list(p.shape[1:])] for g, parameters in groups.items() for key, p in parameters.items()]
        if sorted(found) != sorted(self._layout()):
            raise ConfigurationError(
                f"a client would keep {_brief(found)}, expected {_brief(self._layout())}, as at the start of a round: "
                "let the groups of the method's `private` have the same tensors at both ends."
            )
        rows = self._flat(groups, 1)
        if accepted is not None:
            clients, rows = clients[accepted], rows[accepted.cpu()]
        self._write(clients.tolist(), rows.numpy())

    def commit(self) -> None:
        """Keep what was written since the last commit."""
        for client, place in self._written:
            self._put(bytes([place]), client)
        self._written.clear()

    def discard(self) -> None:
        """Discard what was written since the last commit: the round was interrupted."""
        self._written.clear()

    def state_dict(self, name: Callable[[int], str]) -> dict[str, Any]:
        """Return a copy of all state, for a checkpoint; the copy is also backed by a file.

        Args:
            name: returns the name of a client, given its index.

        Returns:
            `clients`, their names; `layout`, the groups' names and shapes; `rows` [clients, D] float32.
        """
        known = self.known()
        rows = torch.empty(0, sum(self._sizes))
        if len(known):
            with tempfile.TemporaryFile(dir=self._folder) as copy:
                rows = torch.from_numpy(np.memmap(copy, np.float32, "w+", shape=(len(known), sum(self._sizes))))
                for start in range(0, len(known), ROWS_AT_ONCE):
                    for i, client in enumerate(known[start : start + ROWS_AT_ONCE].tolist(), start):
                        rows[i] = torch.from_numpy(self._row(client))
        return {"clients": [name(client) for client in known.tolist()], "layout": self._layout(), "rows": rows}

    def load_state_dict(self, state: dict[str, Any], index: Callable[[str], int | None]) -> None:
        """Replace all state by that of a checkpoint.

        Args:
            state: from `state_dict`.
            index: returns the index of a client, given its name; None if there is no such client.

        Raises:
            ConfigurationError: the checkpoint's clients keep other groups.
            DataError: none of them is known.
        """
        check_layout(state["layout"], self._layout())
        clients = [index(name) for name in state["clients"]]
        if clients and all(client is None for client in clients):
            raise DataError(
                f"none of the {len(clients)} clients whose state the checkpoint holds (the first is "
                f"'{state['clients'][0]}') is in the data: test on the data that the checkpoint was trained on."
            )
        self._put(bytes(self.population), 0)
        there = [(row, client) for row, client in enumerate(clients) if client is not None]
        for start in range(0, len(there), ROWS_AT_ONCE):
            rows, some = zip(*there[start : start + ROWS_AT_ONCE], strict=True)
            self._write(some, state["rows"][list(rows)].numpy())
        self.commit()

    def _row(self, client: int) -> NDArray[np.float32]:
        offset = self._offset(client, self._place(client))
        return np.frombuffer(bytearray(os.pread(self._file, self.bytes_per_client, offset)), dtype=np.float32)

    def _write(self, clients: Sequence[int], rows: NDArray[np.float32]) -> None:
        for client, row in zip(clients, rows, strict=True):
            place = 2 if self._place(client) == 1 else 1
            self._put(row.tobytes(), self._offset(client, place))
            self._written.append((client, place))

    def _place(self, client: int) -> int:
        return os.pread(self._file, 1, client)[0]

    def _offset(self, client: int, place: int) -> int:
        return self.population + (2 * client + place - 1) * self.bytes_per_client

    def _flat(self, groups: Groups, axes: int) -> Tensor:
        """Concatenate the groups' tensors along the last axis, on the host."""
        tensors = [groups[group][key] for group, key, _ in self._shapes]
        return torch.cat([p.detach().float().reshape(*p.shape[:axes], -1) for p in tensors], dim=-1).cpu()

    def _layout(self) -> list[list[Any]]:
        return [[group, key, list(shape)] for group, key, shape in self._shapes]

    def _put(self, data: bytes, offset: int) -> None:
        def put() -> None:
            done = os.pwrite(self._file, data, offset)
            if done < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self._try(put)

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            raise FlowError(
                f"the clients' state cannot be written ({error}): it takes {self.bytes_per_client} bytes a client; "
                "free space on the disk of trainer.default_root_dir, or sample fewer clients; the last checkpoint is "
                "intact."
            ) from error


def client_state(state: Mapping[str, Any], client: str, template: Groups) -> Groups:
    """Return one client's state from a checkpoint.

    Args:
        state: from `ClientStates.state_dict`.
        client: name of the client.
        template: groups of a client that give the names, shapes and types.

    Returns:
        Its groups, without a client axis, on the device of the template.

    Raises:
        ConfigurationError: the checkpoint's clients keep other groups.
        DataError: the client has no state, since it has not been sampled.
    """
    shapes = [(group, key, p) for group, parameters in template.items() for key, p in parameters.items()]
    check_layout(state["layout"], [[group, key, list(p.shape)] for group, key, p in shapes])
    if client not in state["clients"]:
        known = ", ".join(repr(name) for name in state["clients"][:3])
        raise DataError(
            f"client {client!r} has no state in the checkpoint, which has that of {len(state['clients'])} "
            f"clients{f' ({known}, ...)' if known else ''}: name one of them, or serve it as a client that has not "
            "been sampled."
        )
    row = state["rows"][state["clients"].index(client)]
    groups: Groups = {}
    for (group, key, p), piece in zip(shapes, torch.split(row, [p.numel() for _, _, p in shapes]), strict=True):
        groups.setdefault(group, {})[key] = piece.reshape(p.shape).to(p, copy=True)
    return groups


def check_layout(found: list[list[Any]], expected: list[list[Any]]) -> None:
    """Check that a checkpoint's client states have the layout that the method expects.

    Raises:
        ConfigurationError: they keep other groups.
    """
    if found != expected:
        raise ConfigurationError(
            f"the checkpoint's clients keep {_brief(found)}, expected {_brief(expected)}: use the "
            "settings of the method that the checkpoint was trained with."
        )


def _open_shared(folder: Path, share: Callable[[str], str] | None, first: bool) -> int:
    """Open a nameless file in all processes."""
    name = ""
    try:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            file, name = tempfile.mkstemp(prefix=".client_states-", dir=folder)
        if share is not None:
            name = share(name)
            if not first:
                file = os.open(name, os.O_RDWR)
            share("")  # every process has opened it
    except OSError as error:
        raise ConfigurationError(
            f"the file of the clients' state cannot be opened in {folder} ({error}): set trainer.default_root_dir to a "
            "folder that every process can write to; on several machines, one that they share."
        ) from error
    if first:
        os.unlink(name)
    return file


def _brief(layout: list[list[Any]]) -> str:
    shown = [f"{group}.{key} {shape}" for group, key, shape in layout[:3]]
    return ", ".join(shown) + (f" and {len(layout) - 3} more" if len(layout) > 3 else "") or "nothing"
