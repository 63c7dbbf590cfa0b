"""Krum: Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (NeurIPS 2017)."""

from __future__ import annotations

from typing import Literal

import torch

from flow_pl.engine.aggregation.base import AggregationError
from flow_pl.engine.aggregation.cohort import CohortAggregation, CohortUpdates, Combined
from flow_pl.engine.aggregation.coordinates import require_minority
from flow_pl.utils.validation import given, require_count


class MultiKrum(CohortAggregation):
    """Averages the updates closest to their neighbours; all clients weigh the same.

    Of K clients f = floor(share * K) may be bad. A client's score is the sum of the squared distances to its K - f - 2
    nearest neighbours; the `selected` clients with the lowest scores are averaged. Needs K >= 2 f + 3.

    Args:
        share: share of the clients that may be bad, at least 0 and less than 0.5.
        selected: number of clients that are averaged (m); null = K - f.
        storage: where the cohort is held, "device" or "disk".

    Raises:
        ConfigurationError: a setting is out of its range.
    """

    counts_alike = True

    def __init__(
        self, share: float = 0.2, selected: int | None = None, storage: Literal["device", "disk"] = "device"
    ) -> None:
        super().__init__(storage)
        require_count(**given(selected=selected))
        self.share = require_minority(share)
        self.selected = selected

    def tolerated(self, clients: int) -> int | None:
        """See `Aggregation.tolerated`."""
        bad = int(self.share * clients + 1e-9)
        least = max(2 * bad + 3, bad + (self.selected or 0))
        if clients < least:
            raise AggregationError(
                f"{type(self).__name__} with share {self.share:g} takes {bad} of {clients} clients to be bad and needs "
                f"at least {least}: lower share{' or selected' if self.selected else ''}, or sample more clients"
            )
        return bad

    def combine(self, cohort: CohortUpdates) -> Combined:
        """See `CohortAggregation.combine`."""
        clients = len(cohort)
        bad = self.tolerated(clients) or 0
        gram = cohort.gram()
        lengths = gram.diagonal()
        squares = (lengths[:, None] + lengths[None, :] - 2 * gram).clamp_min(0)
        squares.fill_diagonal_(torch.inf)  # no client is its own neighbour
        scores = squares.sort(dim=1).values[:, : clients - bad - 2].sum(1)
        # stable: ties go to the first client
        best = scores.argsort(stable=True)[: clients - bad if self.selected is None else self.selected]
        influence = torch.zeros_like(scores)
        influence[best] = 1 / len(best)
        return Combined(cohort.combination(influence), influence)


class Krum(MultiKrum):
    """Selects the one update closest to its neighbours; see `MultiKrum`.

    Args:
        share: share of the clients that may be bad, at least 0 and less than 0.5.
        storage: where the cohort is held, "device" or "disk".
    """

    def __init__(self, share: float = 0.2, storage: Literal["device", "disk"] = "device") -> None:
        super().__init__(share, 1, storage)
