"""What is counted of routing decisions, by hand."""

import math

import numpy as np
import pytest
import torch

from flow_pl.evaluation.counts import ClientPredictions
from flow_pl.report.routes import BINS, Routes, entropy


def predictions(client, local, label, mask=None):
    """Of a chunk of clients; `local` is [C, N, *P, blocks]."""
    local, label = torch.tensor(local), torch.tensor(label)
    mask = torch.ones(local.shape[:-1], dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    wrong = torch.zeros_like(label).bool()
    return ClientPredictions(torch.tensor(client), mask, label, label, wrong, ~wrong, local > 0.5, local)


TWO = predictions(
    [7, 3],
    [[[0.0, 0.5], [1.0, 0.9]], [[0.25, 0.1], [0.6, 0.6]]],
    [[0, 2], [2, 0]],
    [[1, 1], [1, 0]],
)
"""Two clients, two blocks, three decisions; the fourth instance is padding."""

FEATURES = np.arange(4.0).reshape(2, 2, 1)


@pytest.fixture
def two():
    routes = Routes(blocks=2, classes=3, kept=2)
    routes.add(TWO, FEATURES, common=0)
    return routes


def test_shares_and_histogram(two):
    """0.5 is not routed locally; a probability of 1 is in the last bin."""
    assert two.decisions == 3
    assert two.share.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert two.mean.tolist() == pytest.approx([1.25 / 3, 1.5 / 3])
    assert np.flatnonzero(two.histogram[0]).tolist() == [0, BINS // 4, BINS - 1]
    assert two.histogram.sum(1).tolist() == [3, 3]


def test_entropies_add_up(two):
    """Block 1: client 7 halves as a whole and is sure of each instance; client 3 has one instance."""
    assert entropy(np.array([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 1, 0], abs=1e-9)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert two.decision_entropy[0] == pytest.approx(quarter / 3)
    by_client, by_instance = two.explained
    assert by_instance[0] == pytest.approx(2 / 3 * 1)
    assert (by_client + by_instance + two.decision_entropy).tolist() == pytest.approx(entropy(two.mean).tolist())


def test_classes(two):
    assert two.class_count.tolist() == [1, 0, 2]
    assert two.class_total[0].tolist() == pytest.approx([0.0, 0.5])
    assert two.class_total[2].tolist() == pytest.approx([1.25, 1.0])


def test_real_values_are_no_classes():
    """Their decisions count all the same."""
    routes = Routes(blocks=2, classes=1, kept=2)
    routes.add(predictions([7], [[[0.0, 0.5], [1.0, 0.9]]], [[2.5, -0.5]]), FEATURES[:1], common=0)
    assert routes.decisions == 2
    assert routes.class_count.tolist() == [0]
    assert routes.most_local[0].label == -0.5


def test_extremes(two):
    """Means over blocks: 0.25 and 0.95 of client 7, 0.175 of client 3."""
    assert [(i.client, float(i.x[0]), i.share) for i in two.most_local] == [
        (7, 1.0, pytest.approx(0.95)),
        (7, 0.0, pytest.approx(0.25)),
    ]
    assert [(i.client, i.share) for i in two.most_global] == [(3, pytest.approx(0.175)), (7, pytest.approx(0.25))]


def test_extremes_are_not_all_of_one_client():
    """Client 0 has the five most local instances, of which three are shown."""
    routes = Routes(blocks=1, classes=1, kept=5)
    local = [[[0.9 - 0.1 * i] for i in range(5)], [[0.4], [0.3], [0.2], [0.1], [0.0]]]
    routes.add(predictions([0, 1], local, np.zeros((2, 5), dtype=np.int64).tolist()), np.zeros((2, 5, 1)), common=0)
    assert [(i.client, round(i.share, 6)) for i in routes.most_local] == [
        (0, 0.9),
        (0, 0.8),
        (0, 0.7),
        (1, 0.4),
        (1, 0.3),
    ]
    assert [i.client for i in routes.most_global] == [1, 1, 1, 0, 0]


def test_counted_in_pieces_is_the_same(two):
    merged = Routes(2, 3, kept=2)
    for row in (1, 0):
        part = Routes(2, 3, kept=2)
        one = {name: value[row : row + 1] for name, value in vars(TWO).items()}
        part.add(ClientPredictions(**one), FEATURES[row : row + 1], common=0)
        merged.merge([part])
    for name in ("histogram", "entropy", "total", "local", "class_count", "class_total"):
        assert np.allclose(getattr(merged, name), getattr(two, name)), name
    assert merged.decisions == two.decisions
    assert [i.share for i in merged.most_local] == [i.share for i in two.most_local]
    assert [i.client for i in merged.most_global] == [i.client for i in two.most_global]


def test_common_instances_are_no_clients_own(two):
    """The first instance is asked of both: counted nowhere but there."""
    routes = Routes(2, 3)
    routes.add(TWO, FEATURES, common=1)
    assert routes.decisions == 1
    assert [(client.client, client.common.tolist()) for client in routes.clients] == [(7, [[0.0, 0.5]])]


def test_tokens_are_decisions_of_their_own():
    """Padding within a sequence counts nowhere."""
    routes = Routes(blocks=1, classes=5)
    local = [[[[0.2], [0.8], [0.0]], [[1.0], [0.0], [0.0]]]]
    found = predictions([0], local, [[[1, 2, 0], [4, 0, 0]]], [[[1, 1, 0], [1, 0, 0]]])
    routes.add(found, np.zeros((1, 2, 3), dtype=np.int64), common=0)
    assert routes.decisions == 3
    assert routes.class_count.tolist() == [0, 1, 1, 0, 1]
    assert [i.share for i in routes.most_local] == [1.0, pytest.approx(0.5)]


def test_an_instance_counts_for_each_of_its_labels():
    routes = Routes(blocks=1, classes=3)
    found = predictions([0], [[[0.2], [0.8]]], [[[1, 0, 1], [0, 0, 1]]], [[1, 1]])
    routes.add(found, np.zeros((1, 2, 4)), common=0)
    assert routes.class_count.tolist() == [1, 0, 2]
    assert routes.class_total[:, 0].tolist() == pytest.approx([0.2, 0, 1.0])


def test_clients_without_predictions_change_nothing():
    routes = Routes(blocks=1, classes=3)
    empty = torch.zeros(2, 0)
    routes.add(
        ClientPredictions(torch.arange(2), empty.bool(), empty.long(), empty.long(), empty.bool(), empty.bool()),
        np.zeros((2, 0, 4)),
        common=0,
    )
    assert routes.decisions == 0
    assert np.isfinite(routes.explained).all()
