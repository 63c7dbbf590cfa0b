"""Attention side by side: torch's numbers and derivatives, and no fallback of vmap."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from flow_pl.engine.client_draws import ClientDraws
from flow_pl.kernels import attention as kernel
from flow_pl.kernels.attention import attention
from flow_pl.kernels.linear import REPLACED, ClientLinears
from flow_pl.models.vit import EncoderLayer
from flow_pl.utils.unit_stream import UnitStream, UnitTable

N, HEADS, T, S, E = 2, 4, 5, 3, 6


def masks():
    look = torch.rand(N, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
    look[0, 0, 0] = False  # looks nowhere
    added = torch.zeros(look.shape, dtype=torch.float64).masked_fill(~look, -math.inf)
    return {"none": None, "bool": look, "infinite": added, "added": torch.randn(T, S, dtype=torch.float64)}


def tensors(shared=HEADS):
    shapes = ((N, HEADS, T, E), (N, shared, S, E), (N, shared, S, E))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
def test_numbers_and_gradients_are_torchs(mask, options):
    arguments = tensors(2 if "enable_gqa" in options else HEADS)
    attn_mask = None if "is_causal" in options else masks()[mask]
    found, expected = (f(*arguments, attn_mask, **options) for f in (attention, F.scaled_dot_product_attention))
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=found.dtype)
    found, expected = (torch.autograd.grad((t * weights).sum(), arguments) for t in (found, expected))
    torch.testing.assert_close(found, expected)


def side_by_side(draws):
    stream = UnitStream(torch.zeros(2, dtype=torch.int32), UnitTable())
    return ClientDraws(stream, REPLACED) if draws else ClientLinears()


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer(8, 2, 5, 0.0, batch_first=True), EncoderLayer(8, 2, 5)])
def test_clients_side_by_side_have_no_fallback(layer, draws):
    """Torch's own has one, or this module could go."""
    weights = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in layer.named_parameters()}
    x = torch.randn(2, N, T, 8)

    def run(weights, x):
        return functional_call(layer, weights, (x,))

    with pytest.warns(UserWarning, match="performance drop"):
        vmap(run)(weights, x)
    with warnings.catch_warnings(), side_by_side(draws):
        warnings.simplefilter("error")
        found = vmap(run)(weights, x)
    for client in range(2):
        torch.testing.assert_close(found[client], run({k: p[client] for k, p in weights.items()}, x[client]))


@pytest.mark.parametrize(("device", "written_out"), [("cpu", True), ("meta", False)])
def test_it_is_written_out_on_a_cpu_alone(device, written_out, monkeypatch):
    calls = []
    monkeypatch.setattr(kernel, "attention", lambda *args, **kwargs: calls.append(args) or attention(*args, **kwargs))
    query = torch.randn(2, N, HEADS, T, E, device=device)
    with ClientLinears():
        assert vmap(F.scaled_dot_product_attention)(query, query, query).shape == query.shape
    assert bool(calls) == written_out
