"""Compute means over runs, and test whether two methods differ over clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Probability of a type I error over all comparisons of a column."""

EXACT = 13
"""Largest number of clients for which all sign assignments are tried: at most 8,192."""

DRAWS = 9999
"""Number of sign assignments drawn for more clients."""


class Spread(NamedTuple):
    """Mean and sample standard deviation; the deviation of a single value is None."""

    mean: float
    deviation: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and sample standard deviation of the runs' values; None if there are none."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


def sign_flip_p_values(differences: NDArray[np.float64]) -> list[float]:
    """Return two-sided p-values of sums of paired differences, under random signs of each client's difference.

    Fisher's randomization test (The Design of Experiments, 1935, section 21): the p-value is the share of sign
    assignments whose sum is at least as far from zero as the observed one. The test is of the sum itself, not of ranks,
    and assumes nothing about the differences' distribution. It uses all assignments for up to 13 clients; for more, the
    observed one and `DRAWS` random ones, always the same draws (Phipson and Smyth, Permutation P-values Should Never Be
    Zero, 2010).

    Args:
        differences: [clients, tests], one test per column; a client's sign is shared by all columns.

    Returns:
        The p-value of each column; 1 for a column of zeros.
    """
    clients, tests = differences.shape
    # sums that are equal in exact arithmetic may differ in the last digits
    limit = np.abs(differences.sum(0)) - 1e-9 * np.abs(differences).sum(0)
    counted, as_far = 0, np.zeros(tests)
    for signs in _signs(clients):
        counted += len(signs)
        as_far += (np.abs(signs @ differences) >= limit).sum(0)
    exact = clients <= EXACT
    return [float(p) for p in (as_far + (not exact)) / (counted + (not exact))]


def _signs(clients: int) -> Iterator[NDArray[np.float64]]:
    """Yield sign assignments in chunks [assignments, clients] of -1 and 1."""
    if clients <= EXACT:
        negative = np.arange(1 << clients)[:, None] >> np.arange(clients) & 1
        yield np.where(negative, -1.0, 1.0)
        return
    random, at_once = np.random.default_rng(0), max(1, (1 << 21) // clients)
    for start in range(0, DRAWS, at_once):
        negative = random.integers(0, 2, (min(at_once, DRAWS - start), clients), dtype=np.int8)
        yield np.where(negative, -1.0, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple testing (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979).

    Args:
        p_values: p-values of several tests.

    Returns:
        The corrected p-values in the same order; those below a level may be rejected together at that level.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        corrected[index] = largest
    return corrected
