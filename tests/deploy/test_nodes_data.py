"""Cohorts of nodes that come and go."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("flwr")

from flow_pl.data import DigitsData
from flow_pl.deploy.nodes import Feature, NodeClient
from flow_pl.deploy.nodes_data import NodesData


class Nodes:
    """Nodes that are connected or not, as a test says."""

    def __init__(self, clients):
        features = (Feature(None, (4,), False, "numbers"),)
        self.clients = {c: NodeClient(100 + c, f"{c}", 10 + c, 1, 1, 2, features, (), False) for c in range(clients)}
        self.connected = list(self.clients)

    def online(self, wanted, wait=None):
        return sorted(self.connected)


def node_cohorts(connected, rounds=40, registered=None, **settings):
    """Draw cohorts; the nodes in `connected` are there after the first one."""
    source = DigitsData(**{"cohort_size": 2, "seed": 0, **settings})
    data = NodesData(source, Nodes(8), 0.0, registered)
    data.trainer = SimpleNamespace(lightning_module=None)
    data.nodes.connected = [0, 1, 2, 3]
    data.setup()
    sampler = data.train_dataloader().sampler
    drawn = []
    for round_ in range(rounds):
        sampler.set_epoch(round_)
        drawn.append([client for chunk in sampler for client in chunk.clients])
        data.nodes.connected = connected
    return drawn[1:]


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
@pytest.mark.parametrize("connected", [[0, 1, 2], [2, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_cohorts_are_of_the_nodes_that_are_connected(connected, sampling):
    cohorts = node_cohorts(connected, sampling=sampling)
    assert {client for cohort in cohorts for client in cohort} == set(connected)
    if sampling == "fixed":
        assert {len(set(cohort)) for cohort in cohorts} == {2}
    else:
        assert np.mean([len(cohort) for cohort in cohorts]) == pytest.approx(2, abs=0.6)
