"""Dropout by uniform draws: torch's behaviour, from other draws."""

import pytest
import torch

from flow_pl.models import Dropout


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_a_share_is_dropped_and_the_rest_scaled(p):
    torch.manual_seed(0)
    x = torch.full((400, 500), 2.0, requires_grad=True)
    out = Dropout(p)(x)
    assert set(out.unique().tolist()) <= {0.0, torch.tensor(2.0).mul(1 / (1 - p)).item()}
    # 200,000 draws: four standard deviations
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0] * 2, out)


def test_nothing_is_dropped_in_evaluation():
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x


def test_clients_side_by_side_draw_their_own():
    out = torch.vmap(Dropout(0.5), randomness="different")(torch.ones(2, 1000))
    assert not torch.equal(out[0], out[1])


def test_in_bfloat16_the_share_is_as_exact():
    """A draw in bfloat16 would be 1 or more in some cases and lie on 256 values."""
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = Dropout(0.999)(torch.ones(1_000_000, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.count_nonzero().item() == pytest.approx(1000, abs=4 * 1000**0.5)
