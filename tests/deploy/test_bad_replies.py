"""A node that sends NaN or a wrong shape over a real network: it is left out by name, and the rounds go on."""

import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from flow_pl.deploy.command import deploy
from tests.deploy.grid import run_fit
from tests.deploy.network import Network
from tests.deploy.test_network import SETTINGS, wait_for_rounds

CLIENT_APP = '''\
"""The client's side of an app whose second node sends NaN in its first round, and a wrong shape in the next."""

from pathlib import Path

import numpy as np
from flwr.app import Array

from flow_pl.deploy.client_app import make_client_app
from flow_pl.deploy.node import Node

honest = Node.train


def train(self, content):
    reply = honest(self, content)
    arrays, round_ = reply.array_records["arrays"], content.metric_records["numbers"]["round"]
    name = next(iter(arrays))
    if self.number == 1 and round_ == 0:
        arrays[name] = Array(np.full(arrays[name].shape, np.nan, np.float32))
    if self.number == 1 and round_ == 1:
        arrays[name] = Array(np.zeros(2, np.float32))
    return reply


Node.train = train
app = make_client_app(Path(__file__).with_name("config.yaml"))
'''

SAID = (
    "round 0: client 'writer_0001' is left out: the tensor global/linear1.weight is not finite",
    "round 1: client 'writer_0001' is left out: the tensor global/linear1.weight has shape [2] of float32",
)


@pytest.mark.slow
@pytest.mark.deploy
def test_a_bad_reply_over_a_network_is_left_out_as_without_one(tmp_path, start):
    settings = (*SETTINGS, "--trainer.limit_val_batches=0")
    grid = start("fedavg", *settings)
    deploy(["-c", "task/digits", "-c", "method/fedavg", "--out", str(tmp_path / "spoiled"), *settings])
    (tmp_path / "spoiled" / "flow_app" / "client_app.py").write_text(CLIENT_APP)
    folder = tmp_path / "deployed"
    with Network(tmp_path / "network") as network:
        network.start_node(0)
        network.start_node(1)
        run = network.run(tmp_path / "spoiled", folder=str(folder), round_timeout=300.0, test=False)
        wait_for_rounds(folder / "checkpoints" / "last.ckpt", 3, 600, network)
        log = " ".join(network.run_log(run).split())
    for line in SAID:
        assert line in log, log[-3000:]
    # the same two nodes in this process, and the second one has no reply in its first two rounds
    grid.numbers = {100: 0, 101: 1}
    grid.spoil = lambda client, kind, round_, reply: None if client and kind == "train" and round_ < 2 else reply
    expected = run_fit(grid, tmp_path).model.state_dict()
    found = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert found["nodes"]["taken"] == {0: 2, 1: 2}
    for name, tensor in expected.items():
        torch.testing.assert_close(found["state_dict"][name], tensor, rtol=0, atol=1e-6)
