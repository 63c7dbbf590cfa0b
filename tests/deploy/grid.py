"""Nodes in this process: a grid that hands messages to them without a network."""

from types import SimpleNamespace

from flwr.app import Array, Error

from flow_pl.deploy.messages import ARRAYS, NUMBERS, MessageError
from flow_pl.deploy.node import Node
from flow_pl.deploy.server_app import fit
from flow_pl.errors import DataError

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
