"""w_g of L2-regularized logistic regression, the optimum of which Newton's method gives."""

from itertools import pairwise

import pytest
import torch

from flow_pl.methods import FedAvg
from tests.theory.problems import Logistic
from tests.theory.runs import METHODS, federate, gradient_descent, on_logistic, place, slope


def at_rest(problem, lr, rounds):
    """||grad F||^2 and F - F* at the end of a run that starts at the optimum."""
    method = place(on_logistic(FedAvg(), problem), problem.optimum)
    w = federate(method, gradient_descent(lr, 5, weight_decay=problem.mu), problem.batch(), rounds)[-1]
    return problem.squared_gradient(w), problem.suboptimality(w)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FedAvg", "Flow, parts"])
def test_without_heterogeneity_it_converges_linearly_to_newtons_optimum(name):
    """F - F* falls by (1 - lr mu)^2K a round or more, down to single precision."""
    problem, lr = Logistic.make(0.0, spread=0.0), 0.4
    loop = gradient_descent(lr, 5, weight_decay=problem.mu)
    path = federate(on_logistic(METHODS[name](), problem), loop, problem.batch(), rounds=12)
    gaps = [problem.suboptimality(w) for w in path]
    contraction = (1 - lr * problem.mu) ** 10
    for before, after in pairwise(gaps):
        assert after <= contraction * before + 1e-12
    assert gaps[-1] < 1e-5 * gaps[0]


@pytest.mark.slow
def test_heterogeneity_moves_the_floor():
    """Upwards, and never above lr^2 K^2 beta^2 G^2; not quite in proportion, as the labels change the curvature too."""
    problems = [Logistic.make(h) for h in (0.0, 0.25, 0.5)]
    g2 = [problem.heterogeneity() for problem in problems]
    squares, gaps = zip(*(at_rest(problem, 0.2, 10) for problem in problems), strict=True)
    for figures in (g2, squares, gaps):
        assert sorted(figures) == list(figures)
    for problem, square, g in zip(problems, squares, g2, strict=True):
        hessians = torch.func.hessian(problem.client_losses)(problem.optimum)
        assert square <= (0.2 * 5 * float(torch.linalg.eigvalsh(hessians).max())) ** 2 * g
    assert slope(g2, squares) == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_the_floor_is_of_second_order_in_the_learning_rate():
    """To first order in lr K; the next order makes the slope less than 2."""
    problem = Logistic.make(0.0)
    (long, _), (short, _) = at_rest(problem, 0.1, 20), at_rest(problem, 0.05, 40)
    assert slope((0.1, 0.05), (long, short)) == pytest.approx(2, abs=0.15)
