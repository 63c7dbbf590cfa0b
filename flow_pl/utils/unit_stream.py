"""The random numbers of one client's step: a stream of units, of which each draw takes the next ones."""

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
    """Hashes of the units of a step, kept from step to step; as long as the longest step has asked for.

    Attributes:
        hashes: the table as it is now; None while no step has drawn anything.
        asked: units of the longest step so far.
        drawn: whether anything has been drawn since this was set to False.
        by_functions: whether any of that was drawn by a function that `ClientDraws` replaces.
    """

    def __init__(self) -> None:
        self.hashes: Tensor | None = None
        self.asked = 0
        self.drawn = False
        self.by_functions = False

    def grow(self, device: torch.device) -> None:
        """Make the table as long as has been asked for; between steps, as in a trace there are no real tensors."""
        if self.asked and (self.hashes is None or len(self.hashes) < self.asked or self.hashes.device != device):
            self.hashes = unit_hashes(0, self.asked, device)


class UnitStream:
    """The draws of one client in one step; the client may be one of many under vmap.

    Each draw takes the next units of the step, as many as it has elements. So the shape of what is drawn must be the
    same for a client alone and beside others, as it is: minibatches are padded to `batch_size`.

    Args:
        key: [2] int32, of the client and the step (`counter_rng.step_keys`).
        table: of hashed units; grows by what is drawn.
    """

    def __init__(self, key: Tensor, table: UnitTable) -> None:
        self._key = key
        self._hashes = table.hashes
        self._drawn = 0
        self.table = table

    def bits(self, shape: Sequence[int]) -> Tensor:
        """Uniform bits [*shape], int32, of the next units."""
        count, start, table = math.prod(shape), self._drawn, self.table
        self._drawn += count
        table.drawn, table.asked = True, max(table.asked, self._drawn)
        if self._hashes is None or len(self._hashes) < self._drawn:
            hashes = unit_hashes(start, count, self._key.device)
        else:
            hashes = self._hashes[start : start + count]
        return random_bits(hashes.view(*shape), self._key)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Float32 numbers [*shape] in (0, 1)."""
        return uniform(self.bits(shape))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers [*shape], float32, by Box and Muller's transform."""
        radius = self.uniform(shape).log().mul(-2).sqrt()
        return radius * self.uniform(shape).mul(2 * math.pi).cos()

    def room(self, shape: Sequence[int], **options: Any) -> Tensor:
        """An empty tensor [*shape]."""
        return self._key.new_empty(shape, **options)


_current: ContextVar[UnitStream | None] = ContextVar("unit_stream", default=None)


def current_stream() -> UnitStream | None:
    """The stream of the step that is being made; None outside of steps."""
    return _current.get()


@contextmanager
def drawing_from(stream: UnitStream) -> Iterator[None]:
    """A context in which a stream is the current one."""
    before = _current.set(stream)
    try:
        yield
    finally:
        _current.reset(before)
