"""w_g on quadratics: where the theory says that it converges, at the order it promises (Theorems 4.1 and E.9).

All gradients but those of the noise test are exact, so that the terms of the bounds can be told apart: the rate (from
F - F*), the heterogeneity (G^2) and the noise (sigma_l^2).
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flow_pl.engine.server_round import server_groups
from flow_pl.evaluation.convergence import gradient_figures, gradient_sums
from flow_pl.methods import FedAvg
from tests.support import bound, chunk
from tests.theory.problems import Quadratics
from tests.theory.runs import METHODS, federate, gradient_descent, on_quadratics, place, slope

EIGENVALUES = (1.0, 0.8, 0.6, 0.5)


def floor(heterogeneity, lr, steps):
    """||grad F||^2 and F - F* where w_g comes to rest: it must stay at the fixed point of the closed form."""
    problem = Quadratics.make(heterogeneity, EIGENVALUES)
    method = place(on_quadratics(FedAvg(), problem), problem.fixed_point(lr, steps))
    before, *_, after = federate(method, gradient_descent(lr, steps), problem.batch(), rounds=3)
    assert (after - before).norm() < 1e-6
    return problem.squared_gradient(after), problem.suboptimality(after), problem.dissimilarity()


@pytest.mark.parametrize("name", METHODS)
def test_every_round_is_that_of_the_closed_form(name):
    """w <- mean_m [c_m + (I - lr A_m)^K (w - c_m)], for FedAvg and for Flow, whose router and w_l change nothing."""
    problem = Quadratics.make(0.5, EIGENVALUES)
    method = on_quadratics(METHODS[name](), problem)
    expected = torch.zeros(4, dtype=torch.float64)
    for w in federate(method, gradient_descent(0.2, 4), problem.batch(), rounds=6)[1:]:
        expected = problem.trained(expected, 0.2, 4).mean(0)
        torch.testing.assert_close(w, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["FedAvg", "Flow, parts"])
def test_strongly_convex_without_heterogeneity_converges_linearly(name):
    """F - F* falls by (1 - lr mu)^2K a round or more; in the end by the slowest direction's mean."""
    problem = Quadratics.make(0.0, EIGENVALUES)
    path = federate(on_quadratics(METHODS[name](), problem), gradient_descent(0.1, 4), problem.batch(), rounds=25)
    gaps = [problem.suboptimality(w) for w in path]
    mu, _ = problem.curvature()
    assert all(after <= (1 - 0.1 * mu) ** 8 * before for before, after in pairwise(gaps))
    slowest = float(torch.linalg.eigvalsh(problem.local_steps(0.1, 4).mean(0)).max())
    assert math.log(gaps[25] / gaps[20]) / 5 == pytest.approx(2 * math.log(slowest), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FedAvg", "Flow, parts"])
def test_general_convex_converges_at_the_order_of_one_over_rounds(name):
    """Curvatures from 1 to 1e-3, evenly on a log scale, with equal errors: sum_j a_j exp(-2 lr K a_j R) ~ 1 / R.

    That is the order of the bound, which is thus not loose; it holds in the whole range of rounds in which the smallest
    curvature is not felt (lr K R a < 1). The tolerance of 0.1 is for the sum in place of the integral. The mean over
    rounds of ||grad F||^2, which Theorem 4.1 bounds, is of the same order.
    """
    lr, steps = 0.5, 2
    problem = Quadratics.make(0.0, torch.logspace(-3, 0, 19, dtype=torch.float64).tolist())
    path = federate(on_quadratics(METHODS[name](), problem), gradient_descent(lr, steps), problem.batch(), rounds=60)
    rounds = range(6, 61)
    gaps = [problem.suboptimality(path[r]) for r in rounds]
    squares = torch.tensor([problem.squared_gradient(w) for w in path])
    means = [float(squares[:r].mean()) for r in rounds]
    assert slope(rounds, gaps) == pytest.approx(-1, abs=0.1)
    assert slope(rounds, means) == pytest.approx(-1, abs=0.1)
    # gradient descent's bound ||w_0 - w*||^2 / (2 lr K R), where no client is flatter than a quarter of the mean
    flattest = float((torch.diagonal(problem.A, 0, 1, 2) / torch.diagonal(problem.A.mean(0))).min())
    assert all(gap <= 19 / (2 * lr * flattest * steps * r) for r, gap in zip(rounds, gaps, strict=True))


def test_non_convex_mean_of_the_squared_gradients_is_of_the_order_of_one_over_rounds():
    """With small steps lr K mean_r ||grad F||^2 = (F_0 - F_R) / R, which is half of what the descent lemma allows.

    The tolerance is for the steps' length: it shrinks with the learning rate.
    """
    lr, steps, rounds = 0.1, 3, 30
    method, batch = bound(FedAvg()), chunk((12, 12, 9), epochs=steps)
    figures = []
    for _ in range(rounds + 1):
        sums = gradient_sums(method, server_groups(method), batch, "uniform")
        figures.append(gradient_figures(sums, population=3))
        federate(method, gradient_descent(lr, steps), batch, rounds=1)
    mean = sum(float(figure["gradient_norm"]) ** 2 for figure in figures[:-1]) / rounds
    descent = float(figures[0]["loss"] - figures[-1]["loss"])
    assert mean == pytest.approx(descent / (lr * steps * rounds), rel=0.1)
    assert mean <= 2 * descent / (lr * steps * rounds)


def test_the_floor_is_proportional_to_the_heterogeneity():
    """The term of G^2: both figures at rest grow with slope 1 over G^2, exactly."""
    squares, gaps, g2 = zip(*(floor(h, lr=0.1, steps=5) for h in (0.25, 0.5, 1.0)), strict=True)
    assert g2 == pytest.approx((0.0625, 0.25, 1.0))
    assert slope(g2, squares) == pytest.approx(1, abs=0.01)
    assert slope(g2, gaps) == pytest.approx(1, abs=0.01)


def test_the_floor_is_of_second_order_in_the_length_of_the_local_path():
    """The bound on the heterogeneity's term is lr^2 K^2 G^2 beta^2; with K = 1 FedAvg is gradient descent.

    Curvatures reach 1.75, so lr K beta is 0.4 at most and the higher orders change the slope by less than 0.15.
    """
    rates = (0.0125, 0.025, 0.05)
    assert slope(rates, [floor(0.5, lr, steps=5)[0] for lr in rates]) == pytest.approx(2, abs=0.15)
    steps = (2, 3, 5)
    found = [floor(0.5, 0.0125, k) for k in steps]
    assert slope([k - 1 for k in steps], [square for square, _, _ in found]) == pytest.approx(2, abs=0.15)
    _, beta = Quadratics.make(0.5, EIGENVALUES).curvature()
    for k, (square, _, g2) in zip(steps, found, strict=True):
        assert square <= (0.0125 * k * beta) ** 2 * g2
    assert floor(0.5, 0.05, 1)[0] < 1e-12


@pytest.mark.slow
def test_the_floor_of_noise_is_proportional_to_its_variance_and_falls_with_the_learning_rate():
    """The term of sigma_l^2: at least of first order in the learning rate; epochs over fixed data do better."""

    def noisy(noise, lr):
        problem = Quadratics.make(0.0, EIGENVALUES)
        batch = problem.batch()
        y = batch.train.y + noise * torch.randn(batch.train.y.shape, generator=torch.Generator().manual_seed(0))
        targets = torch.einsum("cnd,cn->d", batch.train.x, y).double() / y.numel()
        optimum = torch.linalg.solve(problem.A.mean(0), targets)
        method = place(on_quadratics(FedAvg(), problem), optimum)
        batch = replace(batch, train=replace(batch.train, y=y))
        path = federate(method, gradient_descent(lr, 1, batch_size=1), batch, rounds=15, shuffle=True)
        errors = torch.stack(path[5:]) - optimum
        return float(torch.einsum("ri,ij,rj->r", errors, problem.A.mean(0), errors).mean())

    base = noisy(1.0, 0.1)
    assert noisy(0.5, 0.1) == pytest.approx(base / 4, rel=0.02)
    assert noisy(1.0, 0.05) < base / 2
