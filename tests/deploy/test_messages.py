"""Messages between the server and a node."""

import pytest
import torch

pytest.importorskip("flwr")

from flow_pl.deploy.messages import decode_arrays, encode


def test_tensors_arrive_as_they_were_sent():
    sent = {"a/w": torch.randn(2, 3), "a/n": torch.tensor(4), "b/w": torch.zeros(0, 2)}
    received = decode_arrays(encode(sent, {}), sent)
    assert list(received) == list(sent)
    assert all(torch.equal(received[name], sent[name]) and received[name].dtype == sent[name].dtype for name in sent)
