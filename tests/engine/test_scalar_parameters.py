"""A parameter without axes, such as a learned temperature, is one number of a client's update everywhere."""

import pytest
import torch
from torch import nn

from flow_pl.engine.aggregation import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from flow_pl.engine.compression import StochasticRounding, TopK, compress_update
from flow_pl.engine.privacy import GaussianMechanism, Sampling
from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.methods import FedAvg
from tests.support import bound, chunk, loop

SIZES = (9, 8, 7, 6, 5)


class Scaled(nn.Module):
    """A linear layer with a temperature of a given shape."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5)
        self.temperature = nn.Parameter(torch.full(shape, 1.5))

    def forward(self, x):
        return self.layer(x) * self.temperature


def trained(shape, compression=None, loss_scale=None, settings=None, **server):
    """What the server's optimizer is given after a round."""
    method = bound(FedAvg(), nn.Sequential(Scaled(shape)))
    scale = None if loss_scale is None else torch.tensor(loss_scale)
    engine = loop(weighting="uniform", **(settings or {}))
    update = engine.train_clients(method, server_groups(method), chunk(SIZES), scale)
    if compression is not None:
        compress_update(compression, update.difference, update.client, None, 0, 0)
    round_ = ServerRound(method, **server)
    round_.add(update)
    round_.finish(lambda total: total, 0)
    grads = {name: p.grad for name, p in method.modules["global"].named_parameters()}
    assert [g.shape for name, g in grads.items() if "temperature" in name] == [torch.Size(shape)]
    return torch.cat([g.flatten() for g in grads.values()])


def private():
    mechanism = GaussianMechanism(0.1, noise_multiplier=1e-6, accountant="rdp")
    mechanism.plan(Sampling("poisson", 100, 10), 10, 0)
    return mechanism


@pytest.mark.parametrize(
    "settings",
    [
        lambda: {"settings": {"max_grad_norm": 0.1}},
        lambda: {"loss_scale": 1024.0},
        lambda: {"compression": StochasticRounding()},
        lambda: {"compression": TopK(0.5, error_feedback=False)},
        lambda: {"privacy": private()},
        *(
            lambda each=each: {"aggregation": each}
            for each in (
                Mean(), NormBound(0.1), CoordinateMedian(), TrimmedMean(), GeometricMedian(), Krum(), MultiKrum()
            )
        ),
    ],
    ids=["clipped", "scaled", "rounded", "largest", "private", "mean", "norm", "median", "trimmed", "geometric", "krum",
         "multikrum"],
)  # fmt: skip
def test_it_is_treated_as_a_vector_of_one_number(settings):
    scalar, vector = trained((), **settings()), trained((1,), **settings())
    assert scalar.abs().sum() > 0
    torch.testing.assert_close(scalar, vector)
