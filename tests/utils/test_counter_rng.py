"""Random numbers by counter: their quality over units, clients, steps and phases, and their limits.

Keys are of clients 0, 1, 2, ... themselves, as the worst case of keys that are alike. Bounds are four to five standard
deviations of what is measured, for independent draws.
"""

import math

import pytest
import torch

from flow_pl.utils.counter_rng import (
    GOLDEN,
    below,
    ones_below,
    random_bits,
    splitmix64,
    step_keys,
    uniform,
    unit_hashes,
)

CPU = torch.device("cpu")
UNITS, STEPS, CLIENTS = 2000, 20, 20


def bits(phase=0):
    """[steps, clients, units]."""
    keys = step_keys(torch.arange(CLIENTS), phase, STEPS)
    hashes = unit_hashes(0, UNITS, CPU)
    return torch.stack([torch.stack([random_bits(hashes, key) for key in step]) for step in keys])


def correlation(a, b):
    """Of uniform numbers, in standard deviations of that of independent ones."""
    return ((a - 0.5) * (b - 0.5)).mean().item() * 12 * math.sqrt(a.numel())


def reference(x):
    """The finalizer of SplitMix64, in Python's whole numbers; with a sign."""
    mask = 2**64 - 1
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    x ^= x >> 31
    return x - 2**64 if x >> 63 else x


def test_finalizer_and_keys_are_those_of_splitmix64():
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF, *range(100, 120)]
    assert splitmix64(torch.tensor(numbers)).tolist() == [reference(n) for n in numbers]
    # phase 1: each phase has room for 2^32 steps in the counter
    expected = [[reference(client + (2**32 + step) * GOLDEN) for client in numbers] for step in (1, 2, 3)]
    keys = step_keys(torch.tensor(numbers), 1, 3)
    whole = torch.tensor(expected).view(torch.int32).view(3, len(numbers), 2)
    assert torch.equal(keys[..., 0], whole[..., 0])
    assert torch.equal(keys[..., 1], whole[..., 1] | 1)


def test_numbers_are_uniform():
    u = uniform(bits()).double().flatten()
    n = len(u)
    assert abs(u.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = torch.histc(u, 256, 0, 1)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_each_of_a_key_is_as_uniform():
    """By mean, for every single step of a client, and for every unit over clients and steps."""
    u = uniform(bits()).double()
    for axis, n in ((2, UNITS), ((0, 1), STEPS * CLIENTS)):
        z = (u.mean(axis) - 0.5) * math.sqrt(12 * n)
        assert z.abs().max().item() < 5
        assert abs(z.var().item() - 1) < 5 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 20, 64, 150, 500])
def test_neighbouring_units_are_independent(lag):
    u = uniform(bits()).double()
    assert abs(correlation(u[..., lag:], u[..., :-lag])) < 5


@pytest.mark.parametrize("lag", [1, 2, 7])
@pytest.mark.parametrize("axis", [0, 1], ids=["steps", "clients"])
def test_neighbouring_steps_and_clients_are_independent(axis, lag):
    u = uniform(bits()).double()
    n = u.shape[axis] - lag
    assert abs(correlation(u.narrow(axis, lag, n), u.narrow(axis, 0, n))) < 5


def test_phases_are_independent():
    assert abs(correlation(uniform(bits(0)).double(), uniform(bits(1)).double())) < 5


def test_masks_of_two_units_agree_as_often_as_independent_ones():
    """For all pairs of 200 units over 4,000 keys, with a share of 0.3: no pair of units goes together."""
    keys = step_keys(torch.arange(40), 0, 100).view(-1, 2)
    hashes = unit_hashes(0, 200, CPU)
    dropped = torch.stack([~below(random_bits(hashes, key), 0.7) for key in keys]).double()
    both = dropped.T @ dropped / len(keys)
    z = (both - 0.09) * math.sqrt(len(keys) / (0.09 * 0.91))
    pairs = z[torch.ones(200, 200).triu(1).bool()]
    assert pairs.abs().max().item() < 6
    # pairs share units: the variance over 200 units spreads by 0.05
    assert abs(pairs.var().item() - 1) < 0.2


def test_units_do_not_collide():
    hashes = unit_hashes(0, 1_000_000, CPU)
    assert len(hashes.unique()) == 1_000_000
    assert torch.equal(unit_hashes(500, 10, CPU), hashes[500:510])


def test_a_key_does_not_depend_on_the_other_clients_or_the_number_of_steps():
    together = step_keys(torch.tensor([5, -7, 9]), 2, 30)
    assert torch.equal(step_keys(torch.tensor([-7]), 2, 4)[:, 0], together[:4, 1])
    assert len(together.view(-1, 2).unique(dim=0)) == 90
    assert (together[..., 1] & 1).all()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.999, 1.0])
def test_shares_are_exact(share):
    kept = below(bits(), share).double()
    assert kept.mean().item() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / kept.numel()) + 2**-31)


def test_uniform_numbers_keep_away_from_the_ends():
    ends = uniform(torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32))
    assert 0 < ends[0] < 1e-7
    assert 1 - 1e-7 < ends[1] < 1


@pytest.mark.parametrize("share", [0.0, 1e-12, 0.3, 0.7, 1.0])
def test_ones_are_where_bits_are_below(share):
    ends = torch.tensor([-(2**31), 1 - 2**31, -1, 0, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    drawn = torch.cat([ends, bits().flatten()])
    ones = ones_below(drawn, share)
    assert ones.dtype == torch.int32
    assert torch.equal(ones, below(drawn, share).int())
