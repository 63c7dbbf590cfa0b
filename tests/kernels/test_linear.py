"""Linear layers side by side: torch's numbers, and gradients that lie in memory as the weights do."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from flow_pl.kernels.linear import ClientLinears

C, IN, OUT = 4, 5, 3


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def results(fn, dims, arguments, mode=True):
    """Outputs of every client and gradients of a sum with weights."""
    if mode:
        with ClientLinears():
            out = vmap(fn, dims)(*arguments)
    else:
        out = vmap(fn, dims)(*arguments)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out, torch.autograd.grad((out * weights).sum(), arguments)


@pytest.mark.parametrize("rows", [(), (7,), (2, 7), (0,)], ids=str)
@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, 0), (0, None, 0), (0, 0, None), (0, 0), (None, 0), (0, None)])
def test_numbers_are_torchs(rows, dims):
    """With and without a bias, and with one of the arguments the same for all clients."""
    shapes = ((*rows, IN), (OUT, IN), (OUT,))
    arguments = tensors(*(shape if dim is None else (C, *shape) for dim, shape in zip(dims, shapes, strict=False)))
    ours, theirs = results(F.linear, dims, arguments), results(F.linear, dims, arguments, mode=False)
    torch.testing.assert_close(ours, theirs)


def test_gradients_lie_as_the_weights_do():
    """With torch's own they do not, or this module could go."""
    arguments = tensors((C, 7, IN), (C, OUT, IN), (C, OUT))
    for mode in (True, False):
        grads = results(F.linear, 0, arguments, mode)[1]
        assert grads[1].is_contiguous() == mode


@pytest.mark.parametrize(
    "shapes",
    [((C, IN), (IN,)), ((C, C, IN), (OUT, IN), ()), ((C, C, IN), (OUT, IN), (C, OUT)), ((C, 7, IN), (1, IN), (1,))],
    ids=["a vector of weights", "a scalar bias", "a bias for each row", "one output"],
)
def test_what_else_torch_allows(shapes):
    arguments = tensors(*((C, *shape) if i else shape for i, shape in enumerate(shapes)))
    torch.testing.assert_close(results(F.linear, 0, arguments), results(F.linear, 0, arguments, mode=False))


def test_what_follows_may_change_outputs_in_place():
    def fn(x, weight, bias):
        return F.relu(F.linear(x, weight, bias).add_(1), inplace=True)

    arguments = tensors((C, 7, IN), (C, OUT, IN), (C, OUT))
    torch.testing.assert_close(results(fn, 0, arguments), results(fn, 0, arguments, mode=False))


def test_second_derivatives():
    arguments = tensors((C, 7, IN), (C, OUT, IN), (C, OUT))

    def penalty(mode):
        with ClientLinears() if mode else nullcontext():
            out = vmap(lambda *one: F.linear(*one).tanh())(*arguments)
        grads = torch.autograd.grad(out.square().sum(), arguments, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), arguments)

    torch.testing.assert_close(penalty(True), penalty(False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_autocast_leaves_other_types_alone(dtype):
    x, weight = (t.detach().to(dtype) for t in tensors((C, 7, IN), (C, OUT, IN)))
    with torch.autocast("cpu", torch.bfloat16), ClientLinears():
        assert vmap(F.linear)(x, weight).dtype == dtype


@pytest.mark.parametrize("rows", [7, 0])
def test_a_vmap_inside_a_vmap(rows):
    x, weight, bias = tensors((2, C, rows, IN), (C, OUT, IN), (C, OUT))

    def inner(x):
        return vmap(F.linear)(x, weight, bias)

    ours, theirs = (results(inner, 0, [x], mode) for mode in (True, False))
    torch.testing.assert_close(ours, theirs)


def test_a_module_under_autocast_is_that_of_a_client_alone():
    """Products in bfloat16, gradients in float32; torch's own gives some of both under vmap."""
    module = nn.Linear(IN, OUT)
    arguments = [t.detach().float().requires_grad_() for t in tensors((C, 7, IN), (C, OUT, IN), (C, OUT))]

    def fn(x, weight, bias):
        return functional_call(module, {"weight": weight, "bias": bias}, (x,))

    with torch.autocast("cpu", torch.bfloat16):
        out, grads = results(fn, 0, arguments)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        alone = torch.stack([fn(*(t[i] for t in arguments)) for i in range(C)])
        expected = torch.autograd.grad((alone * weights).sum(), arguments)
    torch.testing.assert_close(out, alone)
    torch.testing.assert_close(grads, expected)
    assert grads[1].is_contiguous()
