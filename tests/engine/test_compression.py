"""Compressed updates: what arrives, how many bytes it takes, and what a client keeps of the rest."""

import pytest
import torch

from flow_pl.engine.compression import (
    RESIDUAL,
    StochasticRounding,
    TopK,
    compress_update,
    no_residual,
)
from flow_pl.errors import ConfigurationError
from flow_pl.methods import Ditto, FedAvg
from tests.support import bound


def difference(clients=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        "global": {"a": torch.randn(clients, 5, 4, generator=random), "b": torch.randn(clients, 3, generator=random)},
        "router": {"c": 0.01 * torch.randn(clients, 6, generator=random)},
    }


def clone(groups):
    return {name: {key: p.clone() for key, p in group.items()} for name, group in groups.items()}


def rows(groups):
    return torch.cat([p.flatten(1) for group in groups.values() for p in group.values()], 1)


def test_stochastic_rounding_takes_one_of_the_two_nearest_levels_of_each_tensor():
    updates = difference()
    sent = clone(updates)
    StochasticRounding().compress(sent, torch.arange(3), 0, 0)
    for name, group in updates.items():
        for key, p in group.items():
            scale = p.flatten(1).abs().amax(1).view(-1, *[1] * (p.ndim - 1)) / 127
            levels = sent[name][key] / scale
            torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
            assert ((sent[name][key] - p).abs() <= scale * 1.001).all()
            assert levels.abs().max() <= 127.001


def test_stochastic_rounding_is_unbiased():
    """The mean error over 4,000 rounds is within six standard errors of 0 in every coordinate."""
    updates, rounds = difference(1), 4000
    many = {n: {k: p.repeat(rounds, *[1] * (p.ndim - 1)) for k, p in g.items()} for n, g in updates.items()}
    StochasticRounding().compress(many, torch.arange(rounds), 0, 0)
    error = rows(many) - rows(updates)
    spread = error.std(0)
    assert (error.mean(0).abs() <= 6 * spread / rounds**0.5 + 1e-7).all()
    assert (spread > 0).float().mean() > 0.7
    # rounding to the nearest would be biased
    assert not (error[0].abs() <= 6 * spread / rounds**0.5 + 1e-7).all()


def test_rounding_follows_from_seed_round_and_client_alone():
    updates = difference()

    def sent(index, seed=0, round_=0):
        index = torch.tensor(index)
        groups = {n: {k: p[index].clone() for k, p in g.items()} for n, g in updates.items()}
        StochasticRounding().compress(groups, index, seed, round_)
        return rows(groups)

    assert torch.equal(sent([0, 1, 2])[[2, 1]], sent([2, 1]))
    assert not torch.equal(sent([0, 1, 2]), sent([0, 1, 2], seed=1))
    assert not torch.equal(sent([0, 1, 2]), sent([0, 1, 2], round_=1))


def test_an_update_of_nothing_stays_nothing():
    zero = {"global": {"a": torch.zeros(2, 4)}}
    StochasticRounding().compress(zero, torch.arange(2), 0, 0)
    assert not zero["global"]["a"].any()


def test_top_k_sends_the_largest_over_all_tensors():
    updates = difference()
    sent = clone(updates)
    TopK(0.25, error_feedback=False).compress(sent, torch.arange(3), 0, 0)
    whole, arrived = rows(updates), rows(sent)
    least = whole.abs().sort(dim=1, descending=True).values[:, 7]  # ceil(0.25 * 29) = 8 of each
    torch.testing.assert_close(arrived, torch.where(whole.abs() >= least[:, None], whole, 0.0))


def test_error_feedback_loses_nothing():
    """What has arrived and what is kept sum to all updates so far."""
    residual, arrived, wanted = None, 0.0, 0.0
    first = {name: {key: p[0] for key, p in group.items()} for name, group in difference().items()}
    residual = {RESIDUAL: {k: p.repeat(3, *[1] * p.ndim) for k, p in no_residual(first)[RESIDUAL].items()}}
    for round_ in range(5):
        updates = difference(seed=round_)
        wanted = wanted + rows(updates)
        residual = compress_update(TopK(0.1), updates, torch.arange(3), residual, 0, round_)
        arrived = arrived + rows(updates)
        assert ((rows(updates) != 0).sum(1) == 3).all()
        torch.testing.assert_close(arrived + rows(residual), wanted)


def test_what_has_no_residual_is_compressed_without():
    """A group that is sent in some rounds only; and what is not sent in a round stays kept."""
    kept = {"global/a": torch.ones(3, 5, 4), "global/b": torch.ones(3, 3), "other/d": torch.full((3, 2), 7.0)}
    updates = difference()
    wanted = rows({"global": {key: p + 1 for key, p in updates["global"].items()}, "router": updates["router"]})
    left_out = compress_update(TopK(0.25), updates, torch.arange(3), {RESIDUAL: kept}, 0, 0)[RESIDUAL]
    assert list(left_out) == list(kept)
    assert torch.equal(left_out["other/d"], kept["other/d"])
    sent = rows(updates)
    assert torch.equal(sent, torch.where(sent != 0, wanted, 0.0))
    remains = torch.cat([left_out["global/a"].flatten(1), left_out["global/b"]], dim=1)
    torch.testing.assert_close(sent[:, :23] + remains, wanted[:, :23])


def test_bytes():
    sizes = [20, 3, 6]
    assert StochasticRounding().bytes(sizes) == 29 + 3 * 4
    assert TopK(0.1).bytes(sizes) == 8 * 3
    assert TopK(1e-6).bytes(sizes) == 8


def test_error_feedback_needs_a_method_whose_clients_keep_something():
    TopK().check(bound(Ditto()))
    TopK(error_feedback=False).check(bound(FedAvg()))
    with pytest.raises(ConfigurationError, match="error_feedback is true, but clients of FedAvg keep nothing"):
        TopK().check(bound(FedAvg()))


@pytest.mark.parametrize("share", [0.0, 1.1, -0.1])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ConfigurationError, match="share is"):
        TopK(share)
