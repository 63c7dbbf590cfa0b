"""The recurrence's derivatives: first ones, and no wrong second ones."""

import pytest
import torch
from torch.func import grad, vmap

from flow_pl.errors import FlowError
from flow_pl.kernels.lstm import recur

HIDDEN = 3


def plain(gates, weight):
    """Autograd's own recurrence, [T, C, N, 4 H] and [C, 4 H, H]."""
    hidden = gates.shape[-1] // 4
    h = c = gates.new_zeros(*gates.shape[1:-1], hidden)
    out = []
    for step in gates:
        i, f, g, o = (step + h @ weight.transpose(1, 2)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out)


def inputs(*mapped, steps=4, rows=2, clients=1):
    torch.manual_seed(0)
    gates = torch.randn(*mapped, steps, clients, rows, 4 * HIDDEN, dtype=torch.float64)
    return gates, torch.randn(*mapped, clients, 4 * HIDDEN, HIDDEN, dtype=torch.float64)


def loss(function):
    return lambda gates, weight: function(gates, weight).square().sum()


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("steps", [1, 4])
def test_first_derivatives_are_autograds(steps, clients):
    gates, weight = inputs(steps=steps, clients=clients)
    for argument in (0, 1, (0, 1)):
        found = grad(loss(recur), argnums=argument)(gates, weight)
        torch.testing.assert_close(found, grad(loss(plain), argnums=argument)(gates, weight))


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_first_derivatives_of_mapped_clients(in_dims):
    gates, weight = inputs(5)
    arguments = [t if dim == 0 else t[0] for t, dim in zip((gates, weight), in_dims, strict=True)]
    found, expected = (vmap(grad(loss(f), argnums=(0, 1)), in_dims)(*arguments) for f in (recur, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("empty", [{"rows": 0}, {"steps": 0}])
def test_nothing_to_recur_over(empty):
    gates, weight = inputs(5, **empty)
    of_gates, of_weight = vmap(grad(lambda g, w: recur(g, w).sum(), argnums=(0, 1)))(gates, weight)
    assert of_gates.shape == gates.shape
    assert not of_weight.any()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mapped", [(), (2,)])
def test_second_derivatives_are_refused(steps, mapped):
    """They would be wrong: the backward pass takes the gates as constants."""
    gates, weight = inputs(*mapped, steps=steps)

    def second(gates, weight):
        return grad(lambda w: grad(loss(recur), argnums=1)(gates, w).square().sum())(weight)

    with pytest.raises(FlowError, match="no second derivatives"):
        (vmap(second) if mapped else second)(gates, weight)


def test_second_derivatives_by_autograd_are_refused():
    gates, weight = inputs()
    weight.requires_grad_()
    (of_weight,) = torch.autograd.grad(loss(recur)(gates, weight), weight, create_graph=True)
    with pytest.raises(FlowError, match="no second derivatives"):
        of_weight.square().sum().backward()
