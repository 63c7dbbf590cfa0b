"""The project's dropout is torch's, with a share that is checked."""

import pytest
import torch
from torch import nn

from flow_pl.errors import ConfigurationError
from flow_pl.models import Dropout


def test_it_is_torchs():
    x = torch.ones(1000)
    found = []
    for dropout in (Dropout(0.3), nn.Dropout(0.3)):
        torch.manual_seed(0)
        found.append(dropout(x))
        assert dropout.eval()(x) is x
    assert torch.equal(*found)


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(p):
    with pytest.raises(ConfigurationError, match=f"p is {p}, expected a share"):
        Dropout(p)
