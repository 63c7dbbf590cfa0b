"""List the runs of each table: what tells a run from the others, and the arguments of its command line."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

METHODS = ("fine_tuning", "flow")
"""FedAvg is not run: fine-tuning trains as FedAvg does, so that its server model is FedAvg's."""

EPSILONS = ("8", "4", "2")

DEPLOYMENTS = {"1,000 of 10,000": (1_000, 10_000), "100 of 1,000": (100, 1_000)}
"""Clients of a round and in total, whose noise and epsilon a run with cohorts of 50 simulates."""

MECHANISMS = {
    "": (["--data.sampling=poisson"], ""),
    "Gaussian": (["--data.sampling=poisson"], "GaussianMechanism"),
    "banded": (["--data.sampling=cyclic_poisson", "--data.cycle_length=4"], "BandedMatrixFactorization"),
}
"""Sampling and mechanism. Cohorts of 50 of 240 clients can be drawn from at most four groups."""

NORMS = (0.3, 1.0, 3.0, 10.0)
"""Clipping norms of which the best on validation examples is chosen, for FedAvg at an epsilon of 4."""

CHOSEN_NORMS = {"1,000 of 10,000": 3.0, "100 of 1,000": 1.0}

AGGREGATIONS = {
    "Mean": [],
    "NormBound": ["NormBound", "norm=1.0"],
    "CoordinateMedian": ["CoordinateMedian"],
    "TrimmedMean": ["TrimmedMean", "share=0.35"],
    "GeometricMedian": ["GeometricMedian"],
    "Krum": ["Krum", "share=0.35"],
    "MultiKrum": ["MultiKrum", "share=0.35"],
}
ATTACKS = {
    "LabelFlip": ["LabelFlip"],
    "SignFlip": ["SignFlip", "scale=3"],
    "GaussianAttack": ["GaussianAttack", "std=0.1"],
    "Backdoor": ["Backdoor", "scale=5"],
}
SHARES = ("0.1", "0.3")

COMPRESSIONS = {
    "none": [],
    "StochasticRounding": ["StochasticRounding"],
    "TopK 0.1": ["TopK", "share=0.1", "error_feedback=false"],
    "TopK 0.01": ["TopK", "share=0.01", "error_feedback=false"],
}


@dataclass(frozen=True)
class Run:
    """A run of the command line.

    Attributes:
        labels: what tells the run from the others of its table.
        arguments: method, and settings beside those of every run.
    """

    labels: Mapping[str, str]
    arguments: tuple[str, ...]


def selected(option: str, words: list[str]) -> list[str]:
    """Return the arguments that select a class of the model and its settings."""
    if not words:
        return []
    name, *settings = words
    return [f"--model.{option}={name}", *(f"--model.{option}.init_args.{setting}" for setting in settings)]


def private_run(method: str, norm: float, epsilon: str = "inf", deployment: str = "", noise: str = "") -> Run:
    """Return a run with cohorts of 50 whose updates are clipped, without noise unless a deployment is simulated."""
    labels = {"method": method, "deployment": deployment, "norm": f"{norm:g}", "noise": noise, "epsilon": epsilon}
    sampling, mechanism = MECHANISMS[noise]
    settings = [*sampling, "--data.cohort_size=50", "--model.loop.init_args.weighting=uniform"]
    if deployment:
        cohort, population = DEPLOYMENTS[deployment]
        words = [f"epsilon={epsilon}", "delta=1e-5", f"noise_cohort_size={cohort}", f"population={population}"]
        clipping = ["clipping=FixedClipping", f"clipping.init_args.norm={norm}"]
        settings += selected("privacy", [mechanism, *words, *clipping])
    elif norm < float("inf"):
        settings += selected("aggregation", ["NormBound", f"norm={norm}"])
    return Run(labels, (method, *settings))


def norms() -> Iterator[Run]:
    """Yield FedAvg with every clipping norm."""
    for deployment, norm in itertools.product(DEPLOYMENTS, NORMS):
        yield private_run("fedavg", norm, "4", deployment, "Gaussian")


def privacy() -> Iterator[Run]:
    """Yield runs of every method at every epsilon, with clipping only, and with neither."""
    for deployment, method in itertools.product(DEPLOYMENTS, METHODS):
        norm = CHOSEN_NORMS[deployment]
        if deployment == next(iter(DEPLOYMENTS)):
            yield private_run(method, float("inf"))
        yield private_run(method, norm)
        for epsilon in EPSILONS:
            yield private_run(method, norm, epsilon, deployment, "Gaussian")
        if importlib.util.find_spec("jax_privacy") is not None:
            for epsilon in EPSILONS:
                yield private_run(method, norm, epsilon, deployment, "banded")


def robustness() -> Iterator[Run]:
    """Yield runs of every aggregation under every attack, for a method without and one with personal models."""
    attacks = [("none", "0"), *itertools.product(ATTACKS, SHARES)]
    for method, (attack, share), aggregation in itertools.product(("fedavg", "flow"), attacks, AGGREGATIONS):
        attacking = [] if attack == "none" else selected("attack", [*ATTACKS[attack], f"share={share}"])
        settings = ["--model.loop.init_args.weighting=uniform", *selected("aggregation", AGGREGATIONS[aggregation])]
        labels = {"method": method, "attack": attack, "share": share, "aggregation": aggregation}
        yield Run(labels, (method, *settings, *attacking))


def volume() -> Iterator[Run]:
    """Yield runs of every compression."""
    methods = {
        "fedavg": COMPRESSIONS,
        "flow": COMPRESSIONS,
        "ditto": {"none": [], "TopK 0.01, error feedback": ["TopK", "share=0.01"]},
    }
    for method, compressions in methods.items():
        for name, words in compressions.items():
            yield Run({"method": method, "compression": name}, (method, *selected("compression", words)))


RUNS: dict[str, Callable[[], Iterator[Run]]] = {
    "norms": norms,
    "privacy": privacy,
    "robustness": robustness,
    "bytes": volume,
}
