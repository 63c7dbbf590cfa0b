"""Embedding tables of clients side by side: the padding row rests for every one of them, as it does for one alone."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from flow_pl.kernels.linear import ClientLinears

CLIENTS, TOKENS, WIDTH = 3, 5, 4


@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
def test_gradients_are_those_of_each_client_alone(padding_idx):
    torch.manual_seed(0)
    table = nn.Embedding(TOKENS, WIDTH, padding_idx=padding_idx)
    weights = torch.randn(CLIENTS, TOKENS, WIDTH, requires_grad=True)
    ids = torch.randint(TOKENS, (CLIENTS, 7))

    def loss(weight, ids):
        return functional_call(table, {"weight": weight}, (ids,)).square().sum()

    with ClientLinears():
        total = vmap(loss)(weights, ids).sum()
    (found,) = torch.autograd.grad(total, weights)
    for client in range(CLIENTS):
        alone = weights[client].detach().requires_grad_()
        (expected,) = torch.autograd.grad(loss(alone, ids[client]), alone)
        torch.testing.assert_close(found[client], expected)
        if padding_idx is not None:
            assert not found[client, padding_idx].any()
