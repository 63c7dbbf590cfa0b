"""Nodes and server without a network: what is refused, by name, and what a restart does not lose."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

from flwr.app import Array, Error
from flwr.supercore.task_identity import TaskIdentity

from flow_pl.deploy import nodes as nodes_module
from flow_pl.deploy.command import deploy
from flow_pl.deploy.messages import ARRAYS, NUMBERS, TEXTS, MessageError, decode_arrays, encode
from flow_pl.deploy.node import Node
from flow_pl.deploy.nodes import NodeLeftOutWarning, NodesError
from flow_pl.deploy.private_state import PrivateState
from flow_pl.deploy.server_app import RUN_CONFIG, fit
from flow_pl.engine.server_round import DivergenceError
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.module import RejectedClientWarning

SETTINGS = (
    "--data.init_args.num_clients=3",
    "--data.init_args.cohort_size=3",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--model.loop.init_args.batch_size=100",
    "--model.loop.init_args.local_epochs=1",
    "--model.loop.init_args.personal_epochs=1",
)


class Grid:
    """Hands messages to nodes in this process; `spoil` changes the replies of some."""

    def __init__(self, config, folder, clients=3):
        self.config, self.folder = config, folder
        self.numbers = {100 + client: client for client in range(clients)}
        self.made = {}
        self.replies = {}
        self.spoil = lambda client, kind, round_, reply: reply
        self.asked = []

    def node(self, client):
        if client not in self.made:
            self.made[client] = Node(self.config, {"partition-id": client, "state": str(self.folder / f"{client}")})
        return self.made[client]

    def get_node_ids(self):
        return list(self.numbers)

    def push_messages(self, messages):
        names = []
        for message in messages:
            name = f"m{len(self.replies)}-{len(self.asked)}"
            kind, client = message.metadata.message_type, self.numbers[message.metadata.dst_node_id]
            round_ = message.content.metric_records.get(NUMBERS, {}).get("round", -1)
            self.asked.append((kind, client, round_))
            self.replies[name] = self.answer(client, kind, round_, message.content)
            names.append(name)
        return names

    def answer(self, client, kind, round_, content):
        node = self.node(client)
        try:
            reply = {"query": lambda _: node.describe(), "train": node.train, "evaluate": node.evaluate}[kind](content)
        except (MessageError, DataError) as error:
            reply = Error(1000, str(error))
        return self.spoil(client, kind, round_, reply)

    def pull_messages(self, names):
        for name in names:
            reply = self.replies.pop(name, None)
            if reply is None:
                continue
            failed = isinstance(reply, Error)
            yield SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=name),
                content=None if failed else reply,
                error=reply if failed else None,
                has_error=lambda failed=failed: failed,
            )


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOW_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nodes_module, "PAUSE", 0.01)
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower's own process would have set them
        monkeypatch.setattr(TaskIdentity, name, 1)

    def make(method="apfl", *settings):
        deploy(["-c", "task/digits", "-c", f"method/{method}", "--out", str(tmp_path / "app"), *SETTINGS, *settings])
        return Grid(tmp_path / "app" / "flow_app" / "config.yaml", tmp_path / "states")

    return make


def run_fit(grid, tmp_path, **settings):
    given = {"folder": str(tmp_path / "run"), "round-timeout": 0.2, "wait": 0.0, "start-timeout": 0.0, "test": False}
    return fit(grid.config, grid, {**given, **settings})


def changed(reply, name, value):
    """A reply with another value for one of its tensors."""
    arrays = reply.array_records[ARRAYS]
    arrays[name] = Array(value)
    return reply


def first_tensor(reply):
    return next(iter(reply.array_records[ARRAYS]))


BAD = {
    "not finite": lambda reply: changed(reply, first_tensor(reply), np.full((64, 64), np.nan, np.float32)),
    "has shape \\[2\\]": lambda reply: changed(reply, first_tensor(reply), np.zeros(2, np.float32)),
    "of float64": lambda reply: changed(reply, first_tensor(reply), np.zeros((64, 64))),
    "which the other side's model lacks": lambda reply: changed(reply, "more/weight", np.zeros(2, np.float32)),
    "cannot be read": lambda reply: unreadable(reply),
    "weight is": lambda reply: numbered(reply, "weight_global", 1e9),
    "of another round": lambda reply: numbered(reply, "round", 7),
    "the reply is of client 2": lambda reply: numbered(reply, "client", 2),
    "the disk is full": lambda reply: Error(1000, "the disk is full"),
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
    said = [str(each.message) for each in caught if each.category is NodeLeftOutWarning]
    assert any("version is 0.0.1" in line for line in said)
    assert any("method is Ditto, expected FedAvg" in line for line in said)
    assert {client for kind, client, _ in grid.asked if kind == "train"} == {0}


def test_without_nodes_the_run_does_not_begin(start, tmp_path):
    grid = start("fedavg")
    grid.numbers = {}
    with pytest.raises(NodesError, match="0 nodes with a client are connected, expected at least 1"):
        run_fit(grid, tmp_path)


def server_message(node, **numbers):
    from flow_pl.deploy.messages import identity_number

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


def test_private_state_goes_on_from_the_round_that_the_server_has_taken(tmp_path):
    initial = {"personal": {"w": torch.zeros(2)}}
    state = PrivateState(tmp_path, 5, 0)
    assert torch.equal(state.read(-1, initial)["personal"]["w"], torch.zeros(1, 2))
    for round_, taken in ((0, -1), (1, 0), (2, 1)):
        state.write(round_, {"personal": {"w": torch.full((1, 2), float(round_))}}, taken)
    assert sorted(path.name for path in state.folder.iterdir()) == ["round-1.pt", "round-2.pt"]
    assert state.read(1, initial)["personal"]["w"].tolist() == [[1, 1]]
    with pytest.raises(DataError, match="state of round 0 is not in"):
        state.read(0, initial)
    (state.folder / "round-2.pt").write_bytes(b"half")
    with pytest.raises(DataError, match="damaged"):
        state.read(2, initial)
    with pytest.raises(DataError, match="of another method"):
        state.read(1, {"personal": {"w": torch.zeros(3)}})


def test_tensors_arrive_as_they_were_sent():
    sent = {"a/w": torch.randn(2, 3), "a/n": torch.tensor(4), "b/w": torch.zeros(0, 2)}
    received = decode_arrays(encode(sent, {}), sent)
    assert list(received) == list(sent)
    assert all(torch.equal(received[name], sent[name]) and received[name].dtype == sent[name].dtype for name in sent)


def test_an_app_replaces_no_files(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigurationError, match="already exists and is not empty"):
        deploy(["-c", "task/digits", "-c", "method/fedavg", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_flwr_run_may_change_is_in_the_app(start):
    app = start("fedavg").config.parents[1]
    flwr = pytest.importorskip("tomllib").loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flwr["config"] == {**RUN_CONFIG, "folder": flwr["config"]["folder"]}
    assert (app / "LICENSE").read_text().startswith("All rights reserved by local.")


def test_the_licence_of_an_app_is_its_publishers_choice(start, tmp_path):
    licence = tmp_path / "MIT.txt"
    licence.write_text("MIT License\n")
    app = start("fedavg", f"--license={licence}").config.parents[1]
    assert (app / "LICENSE").read_text() == "MIT License\n"
    with pytest.raises(ConfigurationError, match=r"the licence .*absent cannot be read .*give --license a text file"):
        start("fedavg", f"--license={tmp_path / 'absent'}")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("--data.init_args.dropout=0.5", "data.dropout or data.deadline"),
        ("--model.compression=TopK", "model.compression is TopK"),
        ("--trainer.precision=bf16-mixed", "trainer.precision is bf16-mixed"),
    ],
)
def test_what_is_simulated_is_not_deployed(setting, said, start):
    with pytest.raises(ConfigurationError, match=said):
        start("fedavg", setting)
