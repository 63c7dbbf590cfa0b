"""The server's rounds with nodes in this process: what is left out, by name, and what a restart does not lose."""

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from flwr.app import Array, Error

from flow_pl.deploy.messages import ARRAYS, NUMBERS
from flow_pl.engine.server_round import DivergenceError
from flow_pl.module import RejectedClientWarning
from tests.deploy.grid import changed, first_tensor, run_fit

BAD = {
    "not finite": lambda reply: changed(reply, first_tensor(reply), np.full((64, 64), np.nan, np.float32)),
    "has shape \\[2\\]": lambda reply: changed(reply, first_tensor(reply), np.zeros(2, np.float32)),
    "of float64": lambda reply: changed(reply, first_tensor(reply), np.zeros((64, 64))),
    "which the other side's model lacks": lambda reply: changed(reply, "more/weight", np.zeros(2, np.float32)),
    "cannot be read": lambda reply: unreadable(reply),
    "weight is": lambda reply: numbered(reply, "weight_global", 1e9),
    "of another round": lambda reply: numbered(reply, "round", 7),
    "the reply is of client 2": lambda reply: numbered(reply, "client", 2),
    r"the disk is full\.$": lambda reply: Error(1000, "Error: the disk is full."),
    "no reply within 0.2 seconds": lambda reply: None,
}


def unreadable(reply):
    name = first_tensor(reply)
    array = reply.array_records[ARRAYS][name]
    reply.array_records[ARRAYS][name] = Array(array.dtype, array.shape, array.stype, b"\x80\x04pickled")
    return reply


def numbered(reply, name, value):
    reply.metric_records[NUMBERS][name] = value
    return reply


@pytest.mark.slow
@pytest.mark.parametrize("said", BAD)
def test_a_bad_reply_is_left_out_by_name_and_the_rest_goes_on(said, start, tmp_path):
    grid = start()
    grid.spoil = lambda client, kind, round_, reply: (
        BAD[said](reply) if (client, kind, round_) == (1, "train", 0) else reply
    )
    with pytest.warns(RejectedClientWarning, match=f"round 0: client 'writer_0001' is left out: .*{said}"):
        cli = run_fit(grid, tmp_path)
    assert cli.trainer.global_step == 2
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["nodes"]["taken"] == {0: 1, 1: 1, 2: 1}
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


@pytest.mark.slow
def test_too_many_bad_replies_stop_the_run(start, tmp_path):
    grid = start("fedavg")
    grid.spoil = lambda client, kind, round_, reply: (
        Error(1000, "gone") if kind == "train" and client and round_ == 1 else reply
    )
    with pytest.raises(DivergenceError, match="2 of 3 clients"):
        run_fit(grid, tmp_path)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_never_broken_off(start, tmp_path):
    grid = start()
    whole = run_fit(grid, tmp_path).model.state_dict()
    grid.folder = tmp_path / "others"
    grid.made.clear()
    grid.spoil = lambda client, kind, round_, reply: Error(1000, "gone") if client and round_ == 1 else reply
    with pytest.raises(DivergenceError):
        run_fit(grid, tmp_path, folder=str(tmp_path / "broken"))
    grid.made.clear()  # the nodes have been started again
    grid.spoil = lambda client, kind, round_, reply: reply
    resumed = run_fit(grid, tmp_path, folder=str(tmp_path / "broken"), **{"ckpt-path": "last"}).model.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_the_server_tells_the_nodes_what_share_of_them_is_in_a_cohort(start, tmp_path):
    grid = start("scaffold", "--data.init_args.cohort_size=1", "--trainer.max_epochs=1")
    method = run_fit(grid, tmp_path).model.method
    assert method.cohort_share == pytest.approx(1 / 3)
    (node,) = [node for client, node in grid.made.items() if ("train", client, 0) in grid.asked]
    assert node.method.cohort_share == method.cohort_share


@pytest.mark.slow
def test_nodes_are_evaluated_on_their_own_rows(start, tmp_path):
    grid = start("flow")
    cli = run_fit(grid, tmp_path, test=True)
    assert [kind for kind, _, _ in grid.asked].count("evaluate") == 3 * 3  # after both rounds, and the test
    federation = grid.node(0).data.federation
    assert {"test/seen/generalized_accuracy", "test/seen/personalized_accuracy", "test/seen/gain"} <= set(
        cli.trainer.callback_metrics
    )
    assert federation.test_sizes.sum() > 0
