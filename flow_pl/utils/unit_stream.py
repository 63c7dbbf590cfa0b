"""Draw the random numbers of one client's step from a stream of units; each draw consumes the next ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from flow_pl.utils.counter_rng import random_bits, uniform, unit_hashes


class UnitTable:
    """Hashes of the units of a step, kept across steps and as long as the longest step needs.

    Attributes:
        hashes: the current table; None until a step has drawn something.
        asked: number of units of the longest step so far.
        drawn: whether anything was drawn since this was set to False.
        by_functions: whether any of that was drawn by a function that `ClientDraws` replaces.
    """

    def __init__(self) -> None:
        self.hashes: Tensor | None = None
        self.asked = 0
        self.drawn = False
        self.by_functions = False

    def grow(self, device: torch.device) -> None:
        """Extend the table to the requested length; call between steps, since a trace has no real tensors."""
        if self.asked and (self.hashes is None or len(self.hashes) < self.asked or self.hashes.device != device):
            self.hashes = unit_hashes(0, self.asked, device)


class UnitStream:
    """The draws of one client in one step; the client may be one of many under vmap.

    Each draw consumes the next units of the step, one per element. So a draw must have the same shape whether a client
    is trained alone or beside others, which holds because minibatches are padded to `batch_size`.

    Args:
        key: [2] int32 key of the client and step (`counter_rng.step_keys`).
        table: table of hashed units; its requested length grows with the draws.
    """

    def __init__(self, key: Tensor, table: UnitTable) -> None:
        self._key = key
        self._hashes = table.hashes
        self._drawn = 0
        self.table = table

    def bits(self, shape: Sequence[int]) -> Tensor:
        """Return uniform bits [*shape], int32, from the next units."""
        count, start, table = math.prod(shape), self._drawn, self.table
        self._drawn += count
        table.drawn, table.asked = True, max(table.asked, self._drawn)
        if self._hashes is None or len(self._hashes) < self._drawn:
            hashes = unit_hashes(start, count, self._key.device)
        else:
            hashes = self._hashes[start : start + count]
        return random_bits(hashes.view(*shape), self._key)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Return uniform float32 numbers [*shape] in (0, 1)."""
        return uniform(self.bits(shape))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return standard normal float32 numbers [*shape], by the Box-Muller transform."""
        radius = self.uniform(shape).log().mul(-2).sqrt()
        return radius * self.uniform(shape).mul(2 * math.pi).cos()

    def room(self, shape: Sequence[int], **options: Any) -> Tensor:
        """Return an uninitialized tensor [*shape]."""
        return self._key.new_empty(shape, **options)


_current: ContextVar[UnitStream | None] = ContextVar("unit_stream", default=None)


def current_stream() -> UnitStream | None:
    """Return the stream of the current step; None outside of steps."""
    return _current.get()


@contextmanager
def drawing_from(stream: UnitStream) -> Iterator[None]:
    """Make a stream the current one within the context."""
    before = _current.set(stream)
    try:
        yield
    finally:
        _current.reset(before)
