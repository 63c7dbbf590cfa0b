"""A node: what it refuses, of a message and of its configuration."""

import numpy as np
import pytest

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from flow_pl.deploy.messages import ARRAYS, NUMBERS, MessageError, encode, identity_number
from flow_pl.deploy.node import Node
from flow_pl.errors import ConfigurationError
from tests.deploy.grid import changed, first_tensor


def server_message(node, **numbers):
    common = {"seed": 0, "identity": identity_number(node.module.identity()), "run": 1, "taken": -1, "round": 0}
    common["cohort_share"] = 1.0
    return encode(dict(node.module.state_dict()), {**common, **numbers})


def test_a_node_refuses_what_it_cannot_use(start):
    node = start("fedavg").node(0)
    spoiled = server_message(node)
    name = first_tensor(spoiled)
    with pytest.raises(MessageError, match="another version of flow_pl or another method"):
        node.train(server_message(node, identity=1))
    message = server_message(node)
    del message.metric_records[NUMBERS]["seed"]
    with pytest.raises(MessageError, match="seed is None, expected int"):
        node.train(message)
    shape = spoiled.array_records[ARRAYS][name].shape
    for value, said in ((np.full(shape, np.inf, np.float32), "not finite"), (np.zeros(3, np.float32), "shape")):
        with pytest.raises(MessageError, match=said):
            node.train(changed(server_message(node), name, value))


def test_a_node_names_what_is_wrong_with_its_configuration(start, tmp_path):
    config = start("fedavg").config
    for given, said in (
        ({}, "partition-id of the node is None"),
        ({"partition-id": -1}, "partition-id of the node is -1"),
        ({"partition-id": 0, "stat": "x"}, "key of the node's configuration"),
        ({"partition-id": 0, "client": "nobody"}, "there is no client 'nobody'"),
        ({"partition-id": 9}, "there is no client number 9"),
        ({"partition-id": 0, "data-config": "/none.yaml"}, "cannot be read"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            Node(config, given)
