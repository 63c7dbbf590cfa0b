"""The nodes that a server finds: those that cannot take part are left out, by name."""

import re
import warnings

import numpy as np
import pytest

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from flow_pl.data.store.features import READINGS, read_as
from flow_pl.deploy.messages import NUMBERS, TEXTS
from flow_pl.deploy.nodes import FewNodesWarning, NodeLeftOutWarning, Nodes, NodesError
from tests.deploy.grid import run_fit


def test_a_node_with_another_version_method_or_number_is_left_out(start, tmp_path):
    grid = start("fedavg")

    def spoil(client, kind, round_, reply):
        if kind == "query" and client == 2:
            reply.config_records[TEXTS]["version"] = "0.0.1"
        if kind == "query" and client == 1:
            reply.config_records[TEXTS]["method"] = "Ditto"
        return reply

    grid.spoil = spoil
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_fit(grid, tmp_path)
    (few,) = (str(each.message) for each in caught if each.category is FewNodesWarning)
    assert few.startswith("a cohort has 3 clients (data.cohort_size), and 1 can take part")
    said = [str(each.message) for each in caught if each.category is NodeLeftOutWarning]
    assert any("version is 0.0.1" in line for line in said)
    assert any("method is Ditto, expected FedAvg" in line for line in said)
    assert {client for kind, client, _ in grid.asked if kind == "train"} == {0}


def test_without_nodes_the_run_does_not_begin(start, tmp_path):
    grid = start("fedavg")
    grid.numbers = {}
    with pytest.raises(NodesError, match="0 nodes with a client are connected, expected at least 1"):
        run_fit(grid, tmp_path)


def test_a_node_that_is_silent_at_first_is_asked_again(start):
    grid = start("fedavg")
    silent = iter((None, None))
    grid.spoil = lambda client, kind, round_, reply: (
        next(silent, reply) if client == 1 else reply if client == 0 else None
    )
    nodes = Nodes(grid, grid.node(0).module.identity(), timeout=0.05, wait=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert nodes.online(2, 60.0) == [0, 1]
    assert [client for _, client, _ in grid.asked] == [0, 1, 2, 1, 2, 1, 2]
    assert [str(each.message) for each in caught if each.category is NodeLeftOutWarning] == [
        *(f"node {node} does not take part yet: no reply within 0.05 seconds." for node in (101, 102) * 2),
        "node 102 is left out: no reply within 0.05 seconds.",
    ]


def left_out(grid, spoil):
    """The nodes of a grid that changes replies, of which the first is taken; and what is said of the others."""
    grid.spoil = spoil
    nodes = Nodes(grid, grid.node(0).module.identity(), timeout=60.0, wait=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert nodes.online(1) == [0]
    return nodes, [str(each.message) for each in caught if each.category is NodeLeftOutWarning]


def test_a_node_whose_features_are_read_otherwise_is_left_out(start):
    """Its pixels would be 255 times those of the others."""
    grid = start("fedavg")
    stored = grid.node(0).data.federation.store.feature_dtype
    sent = {0: READINGS.index(read_as(stored)), 1: READINGS.index(read_as(np.dtype(np.float32))), 2: len(READINGS)}
    assert stored == np.uint8

    def spoil(client, kind, round_, reply):
        assert reply.metric_records[NUMBERS]["reading"] == sent[0]
        reply.metric_records[NUMBERS]["reading"] = sent[client]
        return reply

    _, (other, unknown) = left_out(grid, spoil)
    assert re.search(r"its examples have shape \[.*\] \(numbers\) and .* \(bytes, scaled to 0..1\) and", other)
    assert "its features are read as number 4, expected less than 4" in unknown


def test_a_node_with_other_class_names_is_left_out(start):
    """Each file numbers its own texts: dog is 1 of (cat, dog), but 0 of (dog, fox)."""
    grid = start("fedavg")
    sent = {0: ["cat", "dog"], 1: ["dog", "fox"], 2: None}

    def spoil(client, kind, round_, reply):
        if sent[client] is not None:
            reply.config_records[TEXTS]["class_names"] = sent[client]
        return reply

    nodes, (other, none) = left_out(grid, spoil)
    assert "its classes are dog, fox, those of client" in other
    assert "cat, dog, so their numbers mean different classes" in other
    assert "its classes are 10 numbers without names" in none
    assert nodes.clients[0].class_names == ("cat", "dog")


def test_a_node_sends_the_names_of_its_classes(start, monkeypatch):
    node = start("fedavg").node(0)
    assert "class_names" not in node.describe().config_records[TEXTS]
    monkeypatch.setattr(type(node.data), "class_names", ("a", "b"))
    assert node.describe().config_records[TEXTS]["class_names"] == ["a", "b"]
