"""The updates of a whole cohort, held once on the device or on disk, for aggregations that must see them together."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flow_pl.engine.aggregation.base import Aggregation
from flow_pl.errors import FlowError
from flow_pl.utils.groups import Groups, client_rows
from flow_pl.utils.validation import require_choice

BLOCK = 1 << 23
"""How many of a cohort's numbers are processed at once: 32 MB."""

Reduce = Callable[[Tensor], Tensor]


class CohortUpdates:
    """Holds the updates of a round's clients, one row each.

    Args:
        size: length of a client's update (D).
        device: device of the rows and of results.
        folder: folder of the file that holds the rows; None to hold them on the device.

    Attributes:
        client: [K] int64, the clients of all processes in ascending order, once the round is `gathered`; on the host.
        weight: [K] float64, their weights; on the host.
    """

    def __init__(self, size: int, device: torch.device, folder: Path | None = None) -> None:
        self.size = size
        self._device = device
        self._rows: list[Tensor] = []
        self._notes: list[tuple[Tensor, Tensor, Tensor]] = []  # clients, weights, accepted
        self._file: IO[bytes] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            # without a name, so it vanishes with the process, however that ends
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the round)

    def add(self, client: Tensor, difference: Groups, weight: Tensor, accepted: Tensor | None) -> None:
        """Keep the updates of a chunk.

        Args:
            client: [C] indices of the clients.
            difference: the clients' updates, by group and name [C, ...].
            weight: [C] weights of the clients.
            accepted: [C] bool, False for clients to leave out; None to accept all.

        Raises:
            FlowError: the disk is full.
        """
        rows = torch.cat([client_rows(p) for group in difference.values() for p in group.values()], dim=1)
        kept = torch.ones_like(client, dtype=torch.bool) if accepted is None else accepted
        self._notes.append((client, weight, kept))
        if self._file is None:
            self._rows.append(rows)
            return
        try:
            self._file.write(rows.cpu().numpy().tobytes())
        except OSError as error:
            raise FlowError(
                f"the updates of the cohort cannot be written ({error}): they take {4 * self.size} bytes a client, "
                "free space on the disk of trainer.default_root_dir; the last checkpoint is intact."
            ) from error

    def gathered(self, reduce: Reduce, rank: int, world_size: int) -> CohortUpdates:
        """Gather the clients of all processes; the rows stay in place. Reads from the device."""
        columns = zip(*self._notes, strict=True) if self._notes else [(torch.zeros(0),)] * 3
        notes = torch.stack([torch.cat(column).cpu().double() for column in columns])
        self._own = notes[2].nonzero()[:, 0]
        self._first, everyone = 0, notes[:2, self._own]
        if world_size > 1:
            counts = torch.zeros(world_size, device=self._device)
            counts[rank] = len(self._own)
            counts = reduce(counts).long().cpu()
            self._first = int(counts[:rank].sum())
            shared = torch.zeros(2, int(counts.sum()), dtype=torch.float64, device=self._device)
            shared[:, self._first : self._first + len(self._own)] = everyone.to(self._device)
            everyone = reduce(shared).cpu()
        # sorted by client, so that nothing depends on chunks and processes
        order = everyone[0].argsort()
        self._order = order.to(self._device)
        self.client, self.weight = everyone[0, order].long(), everyone[1, order]
        self._reduce = reduce if world_size > 1 else None
        if self._file is not None:
            self._file.flush()
            shape = (notes.shape[1], self.size)
            stored = np.memmap(self._file, np.float32, "r", shape=shape) if shape[0] else np.zeros(shape, np.float32)
            self._stored = stored
        return self

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.client)

    def columns(self) -> Iterator[Tensor]:
        """Yield the matrix of updates, on the device, in blocks of columns [K, d]."""
        width = max(1, BLOCK // max(1, len(self)))
        for start in range(0, self.size, width):
            yield self._block(start, min(start + width, self.size))

    def gram(self) -> Tensor:
        """Compute the inner products of all pairs of updates, [K, K] float64, on the host."""
        return torch.stack([block @ block.t() for block in self.columns()]).cpu().double().sum(0)

    def combination(self, weights: Tensor) -> Tensor:
        """Compute the sum [D] of the updates with weights [K]."""
        weights = weights.float().to(self._device)
        return torch.cat([weights @ block for block in self.columns()])

    def _block(self, start: int, stop: int) -> Tensor:
        if self._file is not None:
            own = torch.from_numpy(np.ascontiguousarray(self._stored[self._own.numpy(), start:stop])).to(self._device)
        elif self._rows:
            own = torch.cat([rows[:, start:stop] for rows in self._rows])[self._own.to(self._device)]
        else:
            own = torch.zeros(0, stop - start, device=self._device)
        if self._reduce is None:
            return own[self._order]
        block = own.new_zeros(len(self), stop - start)
        block[self._first : self._first + len(own)] = own
        return self._reduce(block)[self._order]


class Combined(NamedTuple):
    """Holds the result of an aggregation.

    Attributes:
        update: [D] the combined update.
        influence: [K] influence of each client, on the host, summing to 1; 0 for those left out. Over coordinates,
            their mean.
    """

    update: Tensor
    influence: Tensor


class CohortAggregation(Aggregation):
    """Holds the updates of a cohort (cohort x parameters x 4 bytes over all processes); a base class.

    Args:
        storage: where they are held: on the "device", or on "disk", in a file without a name in
            `trainer.default_root_dir` that is mapped into memory.

    Raises:
        ConfigurationError: `storage` is something else.
    """

    def __init__(self, storage: Literal["device", "disk"] = "device") -> None:
        require_choice(("device", "disk"), storage=storage)
        self.storage = storage

    def factors(self, difference: Groups) -> Tensor | None:
        """Return None: the updates are stored unscaled."""
        return None

    @abstractmethod
    def combine(self, cohort: CohortUpdates) -> Combined:
        """Combine the updates of a cohort of at least one client.

        Raises:
            AggregationError: there are too few clients.
        """
