"""Normalization layers of several clients in mixed precision on a CPU."""

import pytest
import torch
from torch import nn

from flow_pl.methods import FedAvg, PerFedAvg, Scaffold
from tests.support import CLASSES, FEATURES, bound, chunk, flat, loop, snapshot


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.Sequential(nn.Unflatten(1, (2, 3)),
                         nn.InstanceNorm1d(2, affine=True), nn.Flatten())])  # fmt: skip
@pytest.mark.parametrize("method", [FedAvg, PerFedAvg, Scaffold])
def test_several_clients_are_trained_in_mixed_precision(method, norm):
    """The last two take a gradient within a step, for all clients at once."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(FEATURES, 6), norm, nn.ReLU(), nn.Linear(6, CLASSES))
    made, batch = bound(method(), backbone), chunk((7, 5))
    exact = loop().train_clients(made, snapshot(made), batch).difference["global"]
    with torch.autocast("cpu", torch.bfloat16):
        found = loop().train_clients(made, snapshot(made), batch).difference["global"]
    torch.testing.assert_close(flat(found), flat(exact), atol=0.05, rtol=0.05)
