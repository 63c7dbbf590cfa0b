"""How alike clients route, against a plain loop over pairs."""

from itertools import combinations

import numpy as np
import pytest
import torch

from flow_pl.report.agreement import CommonInstances, agreement, with_common
from flow_pl.report.routes import ClientRoutes
from tests.support import chunk


def client(index, common):
    return ClientRoutes(index, 1, np.zeros(2), np.array(common))


def test_against_a_loop_over_pairs():
    random = np.random.default_rng(0)
    clients = [client(i, random.random((6, 2))) for i in range(5)]
    found = agreement(clients)
    same, chance, distance = [], [], []
    for a, b in combinations(clients, 2):
        ways = a.common > 0.5, b.common > 0.5
        same.append((ways[0] == ways[1]).mean(0))
        p, q = ways[0].mean(0), ways[1].mean(0)
        chance.append(p * q + (1 - p) * (1 - q))
        distance.append(np.abs(a.common - b.common).mean(0))
    assert found.same == pytest.approx(np.mean(same, 0))
    assert found.chance == pytest.approx(np.mean(chance, 0))
    assert found.difference == pytest.approx(np.mean(distance, 0))
    assert found.beyond_chance == pytest.approx((found.same - found.chance) / (1 - found.chance))
    means = [clients[i].common.mean() for i in found.order]
    assert means == sorted(means)
    first, second = (clients[i].common > 0.5 for i in found.order[:2])
    assert found.pairs[0, 1] == pytest.approx((first == second).mean())


def test_clients_that_agree_on_everything():
    """In the second block all go global, so chance leaves nothing open."""
    found = agreement([client(i, [[0.9, 0.1], [0.2, 0.1]]) for i in range(3)])
    assert found.same.tolist() == [1, 1]
    assert found.difference == pytest.approx([0, 0])
    assert found.chance.tolist() == [0.5, 1]
    assert found.beyond_chance[0] == pytest.approx(1)
    assert np.isnan(found.beyond_chance[1])


def test_nothing_to_compare():
    assert agreement([]) is None
    assert agreement([client(0, [[0.1, 0.2]])]) is None
    assert agreement([client(i, np.zeros((0, 2))) for i in range(2)]) is None


def test_common_instances_come_before_the_clients_own():
    batch = chunk((9, 5), heldout=4)
    common = CommonInstances(torch.randn(3, 6, dtype=torch.float64), torch.tensor([2, 1, 0]))
    asked = with_common(batch, common).heldout
    own = batch.heldout
    for row in range(2):
        torch.testing.assert_close(asked.x[row], torch.cat([common.x.float(), own.x[row]]))
        assert asked.y[row].tolist() == [2, 1, 0, *own.y[row].tolist()]
    assert asked.mask.all()
    assert asked.sizes == (7, 7)
    assert with_common(batch, None) is batch
