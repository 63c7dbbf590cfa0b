"""Draw docs/figures/convergence.png: `python -m tests.theory.figure [path]`, on one core in a minute."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flow_pl.methods import FedAvg
from flow_pl.results.plotting import COLORS, save
from tests.theory.problems import Logistic, Quadratics, noisy_local_part
from tests.theory.runs import METHODS, federate, flow, gradient_descent, on_logistic, on_quadratics, place, slope
from tests.theory.test_personalized_model import EIGENVALUES, LR, STEPS, personalized

PATH = Path(__file__).parents[2] / "docs" / "figures" / "convergence.png"

NOTE = {"fontsize": 8, "color": "#444444"}


def strongly_convex(axes: Axes) -> None:
    """F - F* of FedAvg and Flow, and of the closed form."""
    rounds = 30
    for color, heterogeneity in zip(COLORS, (0.0, 0.1, 0.3, 1.0), strict=False):
        problem = Quadratics.make(heterogeneity, EIGENVALUES)
        w, exact = torch.zeros(4, dtype=torch.float64), []
        for _ in range(rounds + 1):
            exact.append(problem.suboptimality(w))
            w = problem.trained(w, LR, STEPS).mean(0)
        axes.plot(exact, color=color, linewidth=1.2, label=f"G = {heterogeneity:g}")
        for name, marker, start in (("FedAvg", "o", 0), ("Flow, parts", "x", 2)):
            method = on_quadratics(METHODS[name](), problem)
            path = federate(method, gradient_descent(LR, STEPS), problem.batch(), rounds)
            every = range(start, rounds + 1, 4)
            axes.plot(every, [problem.suboptimality(path[r]) for r in every], marker, color=color, markersize=4.5)
    axes.set(yscale="log", title="Strongly convex: linear, down to a floor", xlabel="round", ylabel="$F(w_g) - F^*$")
    axes.plot([], [], "-", color="#777777", label="closed form")
    axes.plot([], [], "o", color="#777777", markersize=4.5, label="FedAvg")
    axes.plot([], [], "x", color="#777777", markersize=4.5, label="Flow")
    axes.legend(fontsize=7.5, ncols=2, loc="upper right")


def general_convex(axes: Axes) -> None:
    """Powers of the number of rounds."""
    rounds, problem = 100, Quadratics.make(0.0, torch.logspace(-3.5, 0, 22, dtype=torch.float64).tolist())
    path = federate(on_quadratics(FedAvg(), problem), gradient_descent(0.5, 2), problem.batch(), rounds)
    r = list(range(1, rounds + 1))
    squares = torch.tensor([problem.squared_gradient(w) for w in path])
    shown = {
        r"$F(w_g) - F^*$": [problem.suboptimality(path[i]) for i in r],
        r"mean over rounds of $\|\nabla F\|^2$": [float(squares[:i].mean()) for i in r],
        r"$\|\nabla F(w_g)\|^2$": [float(squares[i]) for i in r],
    }
    for color, (label, values) in zip(COLORS, shown.items(), strict=False):
        exponent = slope(r[9:], values[9:])
        axes.plot(r, values, color=color, label=f"{label}:  slope {exponent:.2f}")
    axes.plot(r, [1.5 / i for i in r], "--", color="#777777", linewidth=1, label="order 1 / R, as promised")
    axes.set(xscale="log", yscale="log", title="General convex: order 1 / R", xlabel="round R")
    axes.legend(fontsize=7.5, loc="lower left")


def floors(axes: Axes) -> None:
    """||grad F||^2 at rest over G^2."""
    heterogeneities = (0.1, 0.25, 0.5, 1.0)
    for color, lr in zip(COLORS, (0.025, 0.05, 0.1), strict=False):
        points = []
        for heterogeneity in heterogeneities:
            problem = Quadratics.make(heterogeneity, EIGENVALUES)
            rest = problem.fixed_point(lr, STEPS)
            method = place(on_quadratics(FedAvg(), problem), rest)
            w = federate(method, gradient_descent(lr, STEPS), problem.batch(), 3)[-1]
            points.append((problem.dissimilarity(), problem.squared_gradient(w), problem.squared_gradient(rest)))
        g2, measured, exact = zip(*points, strict=True)
        axes.plot(g2, exact, color=color, linewidth=1.2)
        axes.plot(g2, measured, "o", color=color, markersize=4.5)
        label = f"$\\eta$ = {lr:g}: slope {slope(g2, measured):.2f}"
        axes.plot([], [], "o-", color=color, markersize=4.5, label=label)
    axes.set(xscale="log", yscale="log", title="Floor: in proportion to $G^2$ and $\\eta^2$", xlabel="$G^2$")
    axes.set_ylabel(r"$\|\nabla F(w_g)\|^2$ at rest")
    axes.legend(fontsize=7.5, loc="upper left")


def logistic(axes: Axes) -> None:
    """F - F* for three learning rates."""
    problem, rounds = Logistic.make(0.0), 40
    for color, lr in zip(COLORS, (0.1, 0.2, 0.4), strict=False):
        loop = gradient_descent(lr, STEPS, weight_decay=problem.mu)
        path = federate(on_logistic(FedAvg(), problem), loop, problem.batch(), rounds)
        axes.plot([problem.suboptimality(w) for w in path], color=color, label=f"$\\eta$ = {lr:g}")
    axes.set(yscale="log", title="Logistic regression with $L_2$: the same", xlabel="round", ylabel="$F(w_g) - F^*$")
    axes.legend(fontsize=7.5)


def probabilities(axes: Axes) -> None:
    """The loss of w_p at rest over the probability of the local block."""
    problem = Quadratics.make(0.5, EIGENVALUES)
    w = problem.fixed_point(LR, STEPS)
    for color, steps in zip(COLORS, (2, 5, 15), strict=False):
        own, grid = problem.trained(w, LR, steps), torch.linspace(0, 1, 41, dtype=torch.float64)
        axes.plot(grid, [float(problem.losses(w.lerp(own, float(q))).mean()) for q in grid], color=color)
        for q in (0.01, 0.25, 0.5, 0.75, 0.99):
            method = place(on_quadratics(flow(q, split="none"), problem), w)
            axes.plot(q, personalized(method, problem.batch(), steps)[2], "o", color=color, markersize=4.5)
        axes.plot([], [], "o-", color=color, markersize=4.5, label=f"{steps} local steps")
    axes.set(title="Personalized model: floor moved by routing", ylabel="mean of $f_m(w_p)$", ylim=(0, 0.22))
    axes.set_xlabel("$q_{local}$  (0: the global model, 1: the local one)")
    axes.legend(fontsize=7.5, loc="lower left")


def regularization(axes: Axes) -> None:
    """The loss of w_p over lambda, where the local part's targets are off."""
    problem = Quadratics.make(0.5, EIGENVALUES)
    batch, w = noisy_local_part(problem, 0.6), problem.fixed_point(LR, STEPS)
    strengths = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    for color, encourage in zip(COLORS, ("local", "global"), strict=False):
        losses = []
        for strength in strengths:
            settings = {"split": "parts", "encourage": encourage, "regularization": strength, "adapt_router": True}
            method = flow(0.6, router_lr_scale=50.0 if strength <= 0.1 else 5.0, **settings)
            groups, generalized, loss = personalized(place(on_quadratics(method, problem), w), batch)
            losses.append(loss)
        axes.plot(strengths, losses, "o-", color=color, markersize=4.5, label=f"encourage: {encourage}")
    local = float(problem.losses(groups["local"]["0.weight"][:, 0].double()).mean())
    for height, text in ((local, "local model"), (generalized, "global model")):
        axes.axhline(height, color="#777777", linewidth=1, linestyle="--")
        axes.text(strengths[0], height * 1.01, text, va="bottom", **NOTE)
    axes.set(xscale="log", title="Personalized model: floor moved by $\\lambda$", xlabel="$\\lambda$")
    axes.set(ylabel="mean of $f_m(w_p)$", ylim=(0.1, 0.54))
    axes.legend(fontsize=7.5, loc="center left")


def draw() -> Figure:
    """All panels."""
    figure = Figure(figsize=(13.2, 7.4), layout="constrained")
    panels = (strongly_convex, general_convex, floors, logistic, probabilities, regularization)
    for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        panel(axes)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    save(draw, path)
    print(path)
