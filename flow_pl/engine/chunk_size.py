"""Choose how many clients of a loaded chunk are trained side by side: all, or the number measured to be fastest.

More clients at once share the cost of each operation, until their tensors no longer fit into the processor's caches; a
single client runs without vmap. Which of these wins depends on the model and the device, so it is measured. The results
are the same, up to rounding, whatever is chosen.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from flow_pl.data.batch import ClientBatch
from flow_pl.errors import ConfigurationError

T = TypeVar("T")

MEASURED_ROUNDS = 2
"""Rounds for each candidate; the first one warms up (allocations, traces) and is not counted."""

SPACING = 4
"""Ratio of one candidate to the next smaller one."""

COPIES = 6
"""Tensors of a parameter's size for each client: value, gradient, optimizer state and intermediate results."""


class ChunkSize:
    """Runs a function on a loaded chunk in pieces, and finds the fastest size for a piece.

    Args:
        automatic: whether to measure; otherwise a chunk is one piece.
        client_bytes: bytes of the parameters that each client has a copy of; bounds the size by the memory.
    """

    def __init__(self, automatic: bool = False, client_bytes: int = 0) -> None:
        self.automatic = automatic
        self._client_bytes = client_bytes
        self._size: int | None = None  # None: the whole chunk
        self._candidates: list[int] = []
        self._costs: dict[int, list[float]] = {}
        self._seconds, self._examples = 0.0, 0

    @property
    def settled(self) -> bool:
        """Return whether there is nothing left to measure."""
        return not self.automatic or (self._size is not None and not self._candidates)

    def run(self, batch: ClientBatch, fn: Callable[[ClientBatch], T]) -> Iterator[T]:
        """Run a function on each piece of a chunk, at least one client per piece.

        A piece that does not fit into the device's memory is retried in halves; later pieces stay that small.

        Args:
            batch: the loaded chunk.
            fn: trains or evaluates clients; called again with fewer of them if memory runs out.

        Raises:
            ConfigurationError: one client alone does not fit.
        """
        if self.automatic and self._size is None and len(batch):
            self._begin(len(batch), batch.client.device)
        start, total = 0, len(batch)
        while start < total:
            size = total if self._size is None else self._size
            piece = batch if size >= total else batch.clients(start, min(start + size, total))
            before = self._now(batch)
            try:
                result = fn(piece)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                self._halve(piece, error)
                continue
            self._seconds += self._now(batch) - before
            self._examples += sum(piece.train.sizes)
            start += len(piece)
            yield result

    def end_round(self) -> None:
        """Record the round's time and move to the next candidate."""
        if self._examples and not self.settled and self._size is not None:
            costs = self._costs.setdefault(self._size, [])
            costs.append(self._seconds / self._examples)
            if len(costs) == MEASURED_ROUNDS:
                self._candidates.pop(0)
                self._size = self._candidates[0] if self._candidates else min(self._costs, key=self._cost)
        self._seconds, self._examples = 0.0, 0

    def state_dict(self) -> dict[str, int | None]:
        """Return the chosen size for a checkpoint, which a resumed run reuses."""
        return {"size": self._size if self.settled else None}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Restore the size chosen in a checkpoint."""
        self._size, self._candidates = state["size"], []

    def _begin(self, clients: int, device: torch.device) -> None:
        """Set the candidates: the whole chunk, or as many clients as fit; a quarter of it; ...; one."""
        most = max(1, min(clients, _free_memory(device) // 2 // max(1, COPIES * self._client_bytes)))
        self._candidates = [most]
        while self._candidates[-1] > 1:
            self._candidates.append(max(1, self._candidates[-1] // SPACING))
        self._size = self._candidates[0]
        if len(self._candidates) == 1:
            self._candidates = []

    def _cost(self, size: int) -> float:
        return min(self._costs[size][1:])

    def _halve(self, piece: ClientBatch, error: Exception) -> None:
        if len(piece) == 1:
            raise ConfigurationError(
                f"one client, with {piece.train.sizes[0]} training examples, does not fit into the memory of "
                f"{piece.client.device} ({str(error).splitlines()[0]}): lower model.loop.batch_size or "
                "model.loop.evaluation_batch_size, or use a smaller backbone."
            ) from error
        self._size = len(piece) // 2
        self._candidates = [size for size in self._candidates if size <= self._size]
        if piece.client.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"{len(piece)} clients side by side do not fit into the memory of {piece.client.device}: continuing with "
            f"{self._size}. Set data.chunk_size to that, or to auto.",
            stacklevel=3,
        )

    def _now(self, batch: ClientBatch) -> float:
        """Return the time in seconds, having waited for the device while there is something to measure."""
        if not self.settled and batch.client.device.type == "cuda":
            torch.cuda.synchronize(batch.client.device)
        return time.perf_counter()


def _free_memory(device: torch.device) -> int:
    """Return the number of free bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
