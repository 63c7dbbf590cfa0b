"""Refuse runs that cannot be private, before training starts."""

from __future__ import annotations

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Method


def check_private(method: Method, weighting: str, *, mean: bool, precision: str) -> None:
    """Refuse rounds in which one client moves the server by more than its clipped update.

    Args:
        method: the algorithm.
        weighting: weighting of the clients in the server's mean.
        mean: whether the server averages the updates.
        precision: precision of the trainer.

    Raises:
        ConfigurationError: the round cannot be private.
    """
    name = type(method).__name__
    if not method.shared:
        problem, remedy = f"{name}, whose clients send nothing", "leave model.privacy out: there is nothing to protect"
    elif method.participation is not None:
        problem = f"{name}, whose server learns which groups each client takes part in"
        remedy = "use a method whose clients all take part in every group"
    elif weighting != "uniform":
        problem = f"model.loop.weighting '{weighting}', which lets a client with more examples move the mean further"
        remedy = "set model.loop.weighting to uniform"
    elif not mean:
        problem = "model.aggregation, which looks at single clients' updates"
        remedy = "leave out either model.privacy or model.aggregation"
    elif precision == "16-mixed":
        problem = "trainer.precision 16-mixed, whose loss scale follows from single clients' gradients"
        remedy = "use bf16-mixed or 32-true"
    else:
        return
    raise ConfigurationError(f"model.privacy does not cover {problem}: {remedy}.")
