"""What cannot be private, found before any training starts."""

from __future__ import annotations

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Method


def check_private(method: Method, weighting: str, *, mean: bool, precision: str) -> None:
    """Refuse rounds in which one client moves the server by more than its clipped update.

    Args:
        method: the algorithm.
        weighting: of the clients in the server's mean.
        mean: whether the server takes the mean of the updates.
        precision: of the trainer.

    Raises:
        ConfigurationError: the round cannot be private.
    """
    name = type(method).__name__
    if not method.shared:
        problem, remedy = f"{name}, whose clients send nothing", "leave model.privacy out: there is nothing to protect"
    elif method.participation is not None:
        problem = f"{name}, whose server learns from each client which groups it has a part in"
        remedy = "take a method whose clients all have a part in every group"
    elif weighting != "uniform":
        problem = f"model.loop.weighting '{weighting}', by which a client with more examples moves the mean further"
        remedy = "set model.loop.weighting to uniform"
    elif not mean:
        problem = "model.aggregation, which looks at single clients' updates"
        remedy = "leave one of model.privacy and model.aggregation out"
    elif precision == "16-mixed":
        problem = "trainer.precision 16-mixed, whose loss scale follows from single clients' gradients"
        remedy = "use bf16-mixed or 32-true"
    else:
        return
    raise ConfigurationError(f"model.privacy does not cover {problem}: {remedy}.")
