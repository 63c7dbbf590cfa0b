"""The personalized model on quadratics: where routing and lambda put its floor (Theorem 4.2, Lemma E.8)."""

import pytest
import torch

from flow_pl.engine.server_round import server_groups
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.evaluation.convergence import OBSERVED, gradient_figures, gradient_sums, observed
from tests.theory.problems import Quadratics, noisy_local_part
from tests.theory.runs import flow, gradient_descent, on_quadratics, place, weights

EIGENVALUES = (1.0, 0.8, 0.6, 0.5)
LR, STEPS = 0.1, 5


def personalized(method, batch, steps=STEPS):
    """The clients' groups after personalization, and the means over clients of the losses of w_g and w_p."""
    loop = gradient_descent(LR, steps)
    groups, _ = loop.run(method, server_groups(method), batch, training=False)
    counts = evaluate_clients(loop, method, server_groups(method), batch)
    n = counts.loss_count
    return groups.groups, float((counts.generalized_loss / n).mean()), float((counts.personalized_loss / n).mean())


def test_the_routing_probability_moves_the_floor_from_the_global_to_the_local_one():
    """w_p - c_m = [(1 - q) I + q (I - lr A_m)^K] (w_g - c_m): loss and gradient of w_p at rest, exactly, for each q."""
    problem = Quadratics.make(0.5, EIGENVALUES)
    w = problem.fixed_point(LR, STEPS)
    own = problem.trained(w, LR, STEPS)
    losses, squares = [], []
    for q in (1e-5, 0.25, 0.5, 0.75, 1 - 1e-5):
        method = place(on_quadratics(flow(q, split="none"), problem), w)
        groups, generalized, loss = personalized(method, problem.batch())
        local = groups["local"]["0.weight"][:, 0].double()
        torch.testing.assert_close(local, own, atol=1e-6, rtol=0)
        mixed = w.lerp(local, q)
        assert loss == pytest.approx(float(problem.losses(mixed).mean()), rel=1e-4)
        assert generalized == pytest.approx(float(problem.losses(w).mean()), rel=1e-4)
        losses.append(loss)
        squares.append(float(problem.gradients(mixed).square().sum(1).mean()))
    assert losses == sorted(losses, reverse=True)
    assert squares == sorted(squares, reverse=True)
    assert losses[0] == pytest.approx(float(problem.losses(w).mean()), rel=1e-3)
    assert losses[-1] == pytest.approx(float(problem.losses(own).mean()), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("encourage", ["local", "global"])
def test_lambda_moves_the_probability_to_where_the_regularized_loss_is_least(encourage):
    """The adapted router's q minimizes f_m(w_p) + lambda reg(q) on the global part, by a fine grid in double precision.

    The local part's targets are off, so neither model is best; with lambda the loss of w_p goes to that of the model
    that is encouraged.
    """
    problem = Quadratics.make(0.5, EIGENVALUES)
    batch, w = noisy_local_part(problem, 0.6), problem.fixed_point(LR, STEPS)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[1:-1]
    chosen, losses = [], []
    for strength in (0.0, 0.02, 0.1, 10.0):
        settings = {"split": "parts", "encourage": encourage, "regularization": strength, "adapt_router": True}
        scale = 50.0 if strength <= 0.1 else 2.0
        method = flow(0.6, router_lr_scale=scale, **settings)
        groups, generalized, loss = personalized(place(on_quadratics(method, problem), w), batch, 60)
        q = groups["router"]["logit"][:, 0].double().sigmoid()
        local = groups["local"]["0.weight"][:, 0].double()
        if strength <= 0.1:
            taken = grid if encourage == "local" else 1 - grid
            mixtures = torch.stack([problem.losses(w.lerp(local, float(share))) for share in grid], dim=1)
            best = grid[(mixtures - strength * (taken**2 + 1e-6).log()).argmin(1)]
            # without regularizer the best q of a client may be 0 or 1, which a softmax comes to slowly
            torch.testing.assert_close(q, best, atol=0.03 if strength else 0.06, rtol=0)
        chosen.append(float(q.mean()))
        losses.append(loss)
    alone = float(problem.losses(local).mean()) if encourage == "local" else generalized
    assert chosen == sorted(chosen, reverse=encourage == "global")
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(alone, rel=0.02)


@pytest.mark.parametrize("heterogeneity", [0.0, 0.5, 1.0])
def test_progress_and_deviation_are_within_the_bounds_of_the_lemmas(heterogeneity):
    """||w_l - w_g||^2 <= lr^2 K^2 (G^2 + ||grad F||^2) (E.6, without noise), nearly reached by short paths.

    Where all Hessians are the same, mean ||grad f_m||^2 = G^2 + ||grad F||^2 exactly, so B = 1, and gradients do not
    grow along a client's path. ||w_p - w_g|| = q ||w_l - w_g|| (E.8).
    """
    lr = 0.01
    problem = Quadratics.make(heterogeneity, EIGENVALUES, spread=0.0)
    method = place(on_quadratics(flow(0.3, split="none"), problem), torch.tensor([0.0, 0.5, 2.0, 1.0]))
    server, batch, w = server_groups(method), problem.batch(), weights(method)
    figures = gradient_figures(gradient_sums(method, server, batch, "uniform"), len(batch))
    g2, square = problem.dissimilarity(), problem.squared_gradient(w)
    assert float(figures["loss"]) == pytest.approx(float(problem.losses(w).mean()), rel=1e-5)
    assert float(figures["gradient_norm"]) ** 2 == pytest.approx(square, rel=1e-5)
    assert float(figures["gradient_diversity"]) == pytest.approx(g2, rel=1e-5, abs=1e-6)
    assert float(figures["client_gradient_norm"]) ** 2 == pytest.approx(g2 + square, rel=1e-5)
    seen = gradient_descent(lr, STEPS).train_clients(observed(method, server), server, batch).kept[OBSERVED]
    bound = (lr * STEPS) ** 2 * (g2 + square)
    exact = (problem.trained(w, lr, STEPS) - w).square().sum(1)
    for name in ("local_progress", "global_progress"):
        torch.testing.assert_close(seen[name].double(), exact, rtol=1e-4, atol=0)
        assert 0.9 * bound < float(seen[name].mean()) <= bound
    q = seen["q_local"][:, 0]
    torch.testing.assert_close(q, torch.full_like(q, 0.3), atol=0.01, rtol=0)
    torch.testing.assert_close(seen["deviation"], q.square() * seen["local_progress"], rtol=1e-4, atol=0)
