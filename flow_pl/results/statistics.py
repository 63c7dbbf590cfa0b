"""Means over seeds, and whether two methods differ over clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from flow_pl.utils.optional import import_optional

LEVEL = 0.05
"""Probability of an error of the first kind, over all comparisons of a column."""


class Spread(NamedTuple):
    """Mean and sample standard deviation; None for one value."""

    mean: float
    deviation: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation of the seeds' values; None where there are none."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


def paired_p_value(first: Mapping[str, float], second: Mapping[str, float]) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test over the clients that both have.

    Clients whose values are equal are left out, as Wilcoxon does (Individual Comparisons by Ranking Methods, 1945).

    Args:
        first: a value for each client.
        second: the same for another method.

    Returns:
        The p-value; 1 where all values are equal, None where no client is in both.
    """
    clients = first.keys() & second.keys()
    if not clients:
        return None
    # means over seeds that are equal on paper may differ in the last digit
    differences = np.round([first[client] - second[client] for client in clients], 12)
    if not differences.any():
        return 1.0
    stats = import_optional("scipy.stats", "compare", "comparing methods")
    return float(stats.wilcoxon(differences[differences != 0]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979).

    Args:
        p_values: of several tests.

    Returns:
        In the same order; those below a level may be rejected together at that level.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        corrected[index] = largest
    return corrected
