"""The GRU cell side by side: torch's numbers for every client, without its loop over clients."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from flow_pl.kernels.linear import ClientLinears

C, N, D, H = 3, 5, 4, 6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(N,), ()], ids=["batch", "single"])
def test_states_and_gradients_are_those_of_each_client_alone(rows, bias):
    generator = torch.Generator().manual_seed(0)
    cell = nn.GRUCell(D, H, bias=bias).double()
    weights = {
        name: torch.randn(C, *p.shape, generator=generator, dtype=p.dtype).requires_grad_()
        for name, p in cell.named_parameters()
    }
    x, h = (torch.randn(C, *rows, size, generator=generator, dtype=torch.float64) for size in (D, H))

    def two_steps(w, x, h):
        return functional_call(cell, w, (x, functional_call(cell, w, (x, h))))

    with ClientLinears(), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of its loop over clients
        together = vmap(two_steps)(weights, x, h)
    alone = torch.stack([two_steps({k: p[i] for k, p in weights.items()}, x[i], h[i]) for i in range(C)])
    torch.testing.assert_close(together, alone)
    mix = torch.randn(together.shape, generator=generator, dtype=torch.float64)
    leaves = list(weights.values())
    ours, theirs = (torch.autograd.grad((out * mix).sum(), leaves) for out in (together, alone))
    torch.testing.assert_close(ours, theirs)
