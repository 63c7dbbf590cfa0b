"""Compress the clients' updates with loss: fewer bytes, approximate updates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from flow_pl.engine.counter_random import client_keys, uniform
from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Method
from flow_pl.utils.groups import Groups, client_rows
from flow_pl.utils.validation import require_positive, require_share

RESIDUAL = "compression_residual"
"""The group in which a client keeps what its last compressed update left out."""

ROUNDING = 1
"""Purpose of the random numbers of stochastic rounding."""


class Compression(ABC):
    """Compresses each client's update before it is sent.

    Attributes:
        keeps_residual: whether a client keeps the part of an update that was left out and adds it to the next one.
    """

    keeps_residual: bool = False

    @abstractmethod
    def compress(self, difference: Groups, client: Tensor, seed: int, round_: int) -> None:
        """Replace updates by their compressed values, in place.

        Args:
            difference: the clients' updates, by group and name [C, ...].
            client: [C] indices of the clients.
            seed: seed of the run.
            round_: number of the round.
        """

    @abstractmethod
    def bytes(self, sizes: Sequence[int]) -> int:
        """Return the bytes of a client's compressed update.

        Args:
            sizes: number of values in each tensor that the client sends.
        """

    def check(self, method: Method) -> None:
        """Reject a method that the compression does not support.

        Raises:
            ConfigurationError: its clients would have to keep a residual, but have no state.
        """
        if self.keeps_residual and not method.private:
            raise ConfigurationError(
                f"error_feedback is true, but clients of {type(method).__name__} keep nothing between "
                "rounds: set error_feedback to false, or use StochasticRounding, which is right on average without it."
            )


class StochasticRounding(Compression):
    """Rounds every number to 8 bits, up or down at random so that its expectation is the number itself.

    Each tensor of a client has a scale of its own, its largest absolute value / 127; uniform quantization as in QSGD
    (Alistarh et al., NeurIPS 2017). The random numbers are a function of (seed, round, client).
    """

    levels: ClassVar[int] = 127

    def compress(self, difference: Groups, client: Tensor, seed: int, round_: int) -> None:
        """See `Compression.compress`."""
        keys, first = client_keys(client, seed, round_, ROUNDING), 0
        for p in (p for group in difference.values() for p in group.values()):
            rows = client_rows(p)
            scale = rows.abs().amax(1, keepdim=True) / self.levels
            scale = scale.clamp_min(torch.finfo(p.dtype).tiny)
            rounded = (rows / scale + uniform(keys, rows.shape[1], first)).floor().clamp_(-self.levels, self.levels)
            p.copy_((rounded * scale).view_as(p))
            first += rows.shape[1]

    def bytes(self, sizes: Sequence[int]) -> int:
        """Count one byte per number and four for the scale of each tensor; see `Compression.bytes`."""
        return sum(size + 4 for size in sizes)


class TopK(Compression):
    """Sends the numbers of an update that are largest in absolute value, over all its tensors, and their positions.

    With error feedback, a client keeps what it did not send and adds it to its next update (Stich et al., Sparsified
    SGD with Memory, NeurIPS 2018), so that nothing is lost for good; this needs a method whose clients keep state
    between rounds. Without it the update is biased.

    Args:
        share: share of the numbers that are sent, at least one number.
        error_feedback: whether clients keep what they did not send.

    Raises:
        ConfigurationError: `share` is not in (0, 1].
    """

    def __init__(self, share: float = 0.1, error_feedback: bool = True) -> None:
        require_positive(share=share)
        require_share(share=share)
        self.share = share
        self.keeps_residual = error_feedback

    def compress(self, difference: Groups, client: Tensor, seed: int, round_: int) -> None:
        """See `Compression.compress`."""
        tensors = [p for group in difference.values() for p in group.values()]
        sizes = [p[0].numel() for p in tensors]
        rows = torch.cat([client_rows(p) for p in tensors], dim=1)
        chosen = rows.abs().topk(self._count(sizes), dim=1, sorted=False).indices
        sent = torch.zeros_like(rows).scatter_(1, chosen, rows.gather(1, chosen))
        for p, piece in zip(tensors, torch.split(sent, sizes, dim=1), strict=True):
            p.copy_(piece.view_as(p))

    def bytes(self, sizes: Sequence[int]) -> int:
        """Count four bytes per number that is sent and four for its position; see `Compression.bytes`."""
        return 8 * self._count(sizes)

    def _count(self, sizes: Sequence[int]) -> int:
        return max(1, math.ceil(self.share * sum(sizes) - 1e-9))


def compress_update(
    compression: Compression, difference: Groups, client: Tensor, residual: Groups | None, seed: int, round_: int
) -> Groups:
    """Compress the updates of a chunk in place, after adding what the clients' last updates left out.

    Args:
        compression: the compression.
        difference: the clients' updates, by group and name [C, ...].
        client: [C] indices of the clients.
        residual: what was left out before, as one group with flat names [C, ...]; None if nothing is kept. A
            tensor that it does not have, which is sent in some rounds only, is compressed without.
        seed: seed of the run.
        round_: number of the round.

    Returns:
        The groups that the clients keep: none, or `RESIDUAL`.
    """
    if residual is None:
        compression.compress(difference, client, seed, round_)
        return {}
    kept = residual[RESIDUAL]
    sent = {name: p for name, p in _flat(difference).items() if name in kept}
    for name, p in sent.items():
        p.add_(kept[name])
    wanted = {name: p.clone() for name, p in sent.items()}
    compression.compress(difference, client, seed, round_)
    return {RESIDUAL: {**kept, **{name: wanted[name] - p for name, p in sent.items()}}}


def no_residual(shared: Groups) -> Groups:
    """Return the residual of a client that has sent nothing yet.

    Args:
        shared: tensors in the shape of one client's update, by group and name.
    """
    return {RESIDUAL: {name: torch.zeros_like(p) for name, p in _flat(shared).items()}}


def _flat(groups: Groups) -> dict[str, Tensor]:
    return {f"{group}/{name}": p for group, tensors in groups.items() for name, p in tensors.items()}
