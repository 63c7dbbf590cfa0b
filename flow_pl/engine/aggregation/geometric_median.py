"""The geometric median: Pillutla et al., Robust Aggregation for Federated Learning (IEEE TSP 2022)."""

from __future__ import annotations

from typing import Literal

from flow_pl.engine.aggregation.cohort import CohortAggregation, CohortUpdates, Combined
from flow_pl.utils.validation import require_count, require_positive


class GeometricMedian(CohortAggregation):
    """Minimizes the weighted sum of distances to the updates by the smoothed Weiszfeld algorithm.

    Clients are weighted by `model.loop.weighting`. Every iterate is a weighted mean of the updates, so all distances
    follow from their inner products, and the updates are read twice whatever the number of iterations. It tolerates bad
    clients with less than half of the weight.

    Args:
        iterations: number of iterations of Weiszfeld's algorithm (the paper's 3 come close; more are cheap here).
        smoothing: lower bound on the distances that weights are divided by (nu in Algorithm 2).
        storage: where the cohort is held, "device" or "disk".

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    def __init__(
        self, iterations: int = 32, smoothing: float = 1e-6, storage: Literal["device", "disk"] = "device"
    ) -> None:
        super().__init__(storage)
        require_count(iterations=iterations)
        require_positive(smoothing=smoothing)
        self.iterations = iterations
        self.smoothing = smoothing

    def tolerated(self, clients: int) -> int | None:
        """See `Aggregation.tolerated`."""
        return (clients - 1) // 2

    def combine(self, cohort: CohortUpdates) -> Combined:
        """See `CohortAggregation.combine`."""
        gram, weight = cohort.gram(), cohort.weight
        share = weight / weight.sum()
        for _ in range(self.iterations):
            inner = gram @ share
            squares = gram.diagonal() - 2 * inner + share @ inner
            pull = weight / squares.clamp_min(0).sqrt().clamp_min(self.smoothing)
            share = pull / pull.sum()
        return Combined(cohort.combination(share), share)
