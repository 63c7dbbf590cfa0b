"""Coordinate-wise aggregations: Yin et al., Byzantine-Robust Distributed Learning (ICML 2018)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flow_pl.engine.aggregation.cohort import CohortAggregation, CohortUpdates, Combined
from flow_pl.errors import ConfigurationError
from flow_pl.utils.validation import require_at_least_zero


class TrimmedMean(CohortAggregation):
    """Averages each coordinate without its smallest and largest values (Yin et al., Definition 2).

    Of K clients, floor(share * K) are dropped at either end, in each coordinate; all clients weigh the same.

    Args:
        share: share of the clients dropped at either end, at least 0 and less than 0.5. The same share of bad
            clients is tolerated.
        storage: where the cohort is held, "device" or "disk".

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    counts_alike = True

    def __init__(self, share: float = 0.2, storage: Literal["device", "disk"] = "device") -> None:
        super().__init__(storage)
        self.share = require_minority(share)

    def tolerated(self, clients: int) -> int | None:
        """See `Aggregation.tolerated`."""
        return int(self.share * clients + 1e-9)

    def combine(self, cohort: CohortUpdates) -> Combined:
        """See `CohortAggregation.combine`."""
        return _middle(cohort, self.tolerated(len(cohort)) or 0)


class CoordinateMedian(CohortAggregation):
    """Takes the median of each coordinate; for an even number of clients, the mean of the middle two.

    All clients weigh the same. Tolerates any minority of bad clients.

    Args:
        storage: where the cohort is held, "device" or "disk".
    """

    counts_alike = True

    def tolerated(self, clients: int) -> int | None:
        """See `Aggregation.tolerated`."""
        return (clients - 1) // 2

    def combine(self, cohort: CohortUpdates) -> Combined:
        """See `CohortAggregation.combine`."""
        return _middle(cohort, (len(cohort) - 1) // 2)


def require_minority(share: float) -> float:
    """Check that a share of bad clients can be tolerated.

    Raises:
        ConfigurationError: it is negative, or a half or more.
    """
    require_at_least_zero(share=share)
    if share >= 0.5:
        raise ConfigurationError(f"share is {share}, expected less than 0.5: no majority of bad clients is tolerated.")
    return share


def _middle(cohort: CohortUpdates, dropped: int) -> Combined:
    """Average each coordinate without a number of values at either end."""
    kept = len(cohort) - 2 * dropped
    pieces: list[Tensor] = []
    used: list[Tensor] = []
    for block in cohort.columns():
        values, clients = block.sort(dim=0)
        middle = slice(dropped, dropped + kept)
        pieces.append(values[middle].mean(0))
        used.append(torch.bincount(clients[middle].flatten(), minlength=len(cohort)))
    counts = torch.stack(used).sum(0).cpu().double()
    return Combined(torch.cat(pieces), counts / counts.sum())
