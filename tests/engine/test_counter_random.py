"""Random numbers of many clients at once: of the right distribution, and functions of their keys alone."""

import numpy as np
import torch

from flow_pl.engine.counter_random import client_keys, normal, uniform

MASK = 2**64 - 1


def splitmix(x):
    """The finalizer of SplitMix64, in Python's whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def test_numbers_are_those_of_splitmix():
    key = 0
    for number in (5, 3, 2, 11):  # seed, round, purpose, client
        key = splitmix((key + 0x9E3779B97F4A7C15 + number) & MASK)
    expected = [(splitmix((key + n * 0x9E3779B97F4A7C15) & MASK) >> 40) / 2**24 for n in range(1, 9)]
    assert uniform(client_keys(torch.tensor([11]), 5, 3, 2), 8)[0].tolist() == expected


def test_a_client_draws_the_same_in_any_chunk_and_from_any_position():
    keys = client_keys(torch.tensor([4, 9, 2]), 1, 0, 0)
    assert torch.equal(uniform(client_keys(torch.tensor([9]), 1, 0, 0), 20)[0], uniform(keys, 20)[1])
    assert torch.equal(uniform(keys, 20)[:, 5:], uniform(keys, 15, first=5))


def test_seeds_rounds_purposes_and_clients_differ():
    client = torch.arange(50)
    keys = [client_keys(client, *where) for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, -1, 0))]
    assert len(set(torch.cat(keys).tolist())) == 250


def test_distributions():
    """Means and deviations of 200,000 numbers, to six standard errors; clients are not correlated."""
    keys = client_keys(torch.arange(4), 3, 0, 0)
    flat, bell = uniform(keys, 50_000).double(), normal(keys, 50_001).double()
    assert abs(flat.mean() - 0.5) < 6 / np.sqrt(12 * flat.numel())
    assert abs(flat.var() - 1 / 12) < 0.001
    assert abs(bell.mean()) < 6 / np.sqrt(bell.numel())
    assert abs(bell.std() - 1) < 6 / np.sqrt(2 * bell.numel())
    assert torch.corrcoef(bell).fill_diagonal_(0).abs().max() < 0.03
    assert 0 <= flat.min() < 1e-4 < 1 - 1e-4 < flat.max() < 1
