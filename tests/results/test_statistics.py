"""Significance against numbers that can be counted by hand."""

import numpy as np
import pytest

from flow_pl.results.statistics import Spread, holm, sign_flip_p_values, spread


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        # of the 2^n choices of signs, those whose sum is as large; twice, for both sides
        ([1, 2, 3, 4, 5, 6], 2 * 1 / 2**6),
        ([-1, 2, 3, 4, 5, 6], 2 * 2 / 2**6),  # +-1
        ([-3, 1, 1], 1.0),  # the sum is -1, and no sum is nearer to zero
        ([9, -1, 1, -1, 1], 1.0 * 22 / 32),  # 9 + at least 0 of the others: 11 of their 16 choices, on both sides
        ([1, 0, 2, 0, 3, 4, 5, 6], 2 * 1 / 2**6),  # equal clients change nothing
        ([0, 0, 0], 1.0),
        ([3], 1.0),
    ],
)
def test_the_signs_of_few_clients_are_all_tried(differences, p_value):
    """Several tests at once are those of each alone."""
    column = np.array(differences)[:, None] / 100
    assert sign_flip_p_values(np.hstack([column, -column, 0 * column])) == pytest.approx([p_value, p_value, 1.0])


def test_a_sum_over_many_clients_is_nearly_normal():
    """The sum of d_i with random signs has the variance sum d_i^2: at 1.96 deviations, p is 0.05."""
    sizes = np.linspace(1, 2, 400)
    signs = np.where(np.arange(400) % 2, 1.0, -1.0)
    even = signs * sizes - (signs * sizes).mean()
    for deviations, p_value in ((1.96, 0.05), (0.6745, 0.5)):
        shift = deviations / np.sqrt(400 - deviations**2) * np.sqrt((even**2).mean())
        (found,) = sign_flip_p_values((even + shift)[:, None])
        assert found == pytest.approx(p_value, abs=0.015)


def test_what_never_happens_by_chance_is_not_zero():
    assert sign_flip_p_values(np.ones((40, 1))) == [1 / 10_000]


def test_rounding_of_sums_is_no_difference():
    """All sums but the 6 of 16 that are 0 are as far from it as 0.2, or farther; in floating point, few of them."""
    assert sign_flip_p_values(np.array([[0.1], [0.1], [0.1], [-0.1]])) == [10 / 16]


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
