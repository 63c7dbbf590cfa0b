"""Significance against numbers that can be counted by hand."""

import pytest

from flow_pl.results.statistics import Spread, holm, paired_p_value, spread


def pair(differences):
    """Two methods whose clients differ by the given hundredths."""
    return (
        {f"client {i}": 0.5 + d / 100 for i, d in enumerate(differences)},
        {f"client {i}": 0.5 for i in range(len(differences))},
    )


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        # of the 2^n equally probable signs, those whose smaller rank sum is as small; twice, for both sides
        ([1, 2, 3, 4, 5, 6], 2 * 1 / 2**6),
        ([-1, 2, 3, 4, 5, 6], 2 * 2 / 2**6),  # {} and {1}
        ([1, 2, -3, 4, 5, 6, 7, 8], 2 * 5 / 2**8),  # {}, {1}, {2}, {3} and {1, 2}
        ([1, 0, 2, 0, 3, 4, 5, 6], 2 * 1 / 2**6),  # equal clients are left out
        ([0, 0, 0], 1.0),
        ([3], 1.0),
    ],
)
def test_wilcoxon(differences, p_value):
    first, second = pair(differences)
    assert paired_p_value(first, second) == pytest.approx(p_value)
    assert paired_p_value(second, first) == pytest.approx(p_value)


def test_only_clients_of_both_are_compared():
    first, second = pair([1, 2, 3, 4, 5, 6])
    assert paired_p_value(first | {"another": 0.0}, second | {"a third": 1.0}) == pytest.approx(2 / 2**6)
    assert paired_p_value(first, {"nobody": 1.0}) is None


def test_rounding_of_means_is_no_difference():
    """(0.1 + 0.2) and 0.3 are not the same number."""
    assert paired_p_value({"a": 0.1 + 0.2, "b": 0.5}, {"a": 0.3, "b": 0.5}) == 1.0


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # 3 x 0.01; max(2 x 0.02, 0.03); max(1 x 0.03, 0.04)
        ([0.03, 0.01, 0.02], [0.04, 0.03, 0.04]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected)


def test_spread():
    """The sample standard deviation of 1, 2, 3 is 1."""
    assert spread([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)
    assert spread([0.5]) == Spread(0.5, None)
    assert spread([]) is None
