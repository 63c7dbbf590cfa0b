"""The server's view of the nodes: their connections and clients, and messages to them."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flow_pl.data.store.features import READINGS
from flow_pl.deploy.messages import TEXTS, MessageError, class_names, feature_names, keyed, number, shape
from flow_pl.errors import FlowError, brief
from flow_pl.version import __version__

PAUSE = 0.5
"""Seconds between two requests to the SuperLink."""

QUERIES = 3
"""Number of times that a node is asked for its client while it does not reply."""

Reply = RecordDict | str
"""A client's reply, or the reason why it is excluded."""


class Silence(str):
    """The reason of a node that has not replied in time."""


class NodeLeftOutWarning(UserWarning):
    """A node is excluded from a run."""


class FewNodesWarning(UserWarning):
    """Fewer nodes are connected than a cohort has clients."""


class NodesError(FlowError):
    """There are not enough nodes."""


class Feature(NamedTuple):
    """A tensor of an example.

    Attributes:
        name: name of the input; None if an example is one tensor.
        shape: shape for one example.
        tokens: whether it holds integers.
        reading: how the values in the node's file are read, one of `READINGS`.
    """

    name: str | None
    shape: tuple[int, ...]
    tokens: bool
    reading: str


@dataclass(frozen=True)
class NodeClient:
    """A node's description of its client.

    Attributes:
        node: Flower's number of the node.
        name: name of the client.
        train: number of its training examples.
        val: number of its validation examples.
        test: number of its test examples.
        classes: number of classes of its data.
        features: inputs of an example, as passed to a model.
        label_shape: shape of a label.
        real_valued: whether the labels are real values.
        class_names: names of the classes in the order of their numbers; none if the labels are numbers.
    """

    node: int
    name: str
    train: int
    val: int
    test: int
    classes: int
    features: tuple[Feature, ...]
    label_shape: tuple[int, ...]
    real_valued: bool
    class_names: tuple[str, ...] = ()

    def fits(self, other: NodeClient) -> bool:
        """Return whether shapes and readings allow one model for both."""
        return (self.features, self.label_shape, self.real_valued) == (
            other.features,
            other.label_shape,
            other.real_valued,
        )


class Nodes:
    """The nodes of a run.

    Args:
        grid: Flower's grid.
        identity: class names of the method and the backbone.
        timeout: seconds to wait for a reply.
        wait: seconds to wait in a round for as many nodes as its cohort has clients.
        least: number of nodes below which the run stops.

    Attributes:
        clients: descriptions of the known clients, by number.
    """

    def __init__(self, grid: Grid, identity: Mapping[str, str], timeout: float, wait: float, least: int = 1) -> None:
        self.clients: dict[int, NodeClient] = {}
        self._grid = grid
        self._identity = identity
        self._timeout = timeout
        self._wait = wait
        self._least = least
        self._known: set[int] = set()
        self._silent: Counter[int] = Counter()

    def online(self, wanted: int, wait: float | None = None) -> list[int]:
        """Return the clients whose nodes are connected, in ascending order, after waiting for the wanted number.

        Args:
            wanted: number of clients.
            wait: seconds to wait for them; None for the waiting time of a round.

        Raises:
            NodesError: there are too few nodes.
        """
        end = time.monotonic() + (self._wait if wait is None else wait)
        while True:
            nodes = set(self._grid.get_node_ids())
            self._meet(sorted(nodes - self._known))
            found = sorted(client for client, known in self.clients.items() if known.node in nodes)
            if len(found) >= wanted:
                return found
            if time.monotonic() >= end:
                break
            time.sleep(PAUSE)
        if len(found) < self._least:
            raise NodesError(
                f"{len(found)} nodes with a client are connected, expected at least {self._least}: start SuperNodes "
                "with `flower-supernode --superlink ADDRESS --node-config 'partition-id=0'`, each with its "
                "own number. The last checkpoint is intact; ckpt-path resumes from it."
            )
        return found

    def ask(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, Reply]:
        """Send messages to clients and wait for the replies.

        Args:
            kind: "train" or "evaluate".
            contents: messages by the number of the client.

        Returns:
            For each client, its reply or the reason why there is none.
        """
        nodes = {self.clients[client].node: client for client in contents}
        replies = self._exchange(kind, {node: contents[client] for node, client in nodes.items()})
        return {client: _checked(replies[node], client) for node, client in nodes.items()}

    def _meet(self, nodes: list[int]) -> None:
        """Query new nodes for their clients; a node that cannot take part is excluded by name."""
        if not nodes:
            return
        for node, reply in self._exchange("query", {node: RecordDict() for node in nodes}).items():
            self._silent[node] += isinstance(reply, Silence)
            if isinstance(reply, Silence) and self._silent[node] < QUERIES:
                # a busy node, which may be ready a little later
                warnings.warn(f"node {node} does not take part yet: {reply}.", NodeLeftOutWarning, stacklevel=2)
                continue
            self._known.add(node)
            try:
                if isinstance(reply, str):
                    raise MessageError(reply)
                client, known = self._described(node, reply)
            except MessageError as error:
                warnings.warn(f"node {node} is left out: {error}.", NodeLeftOutWarning, stacklevel=2)
                continue
            self.clients[client] = known

    def _described(self, node: int, reply: RecordDict) -> tuple[int, NodeClient]:
        texts = reply.config_records.get(TEXTS) or ConfigRecord()
        mine = {"version": __version__, **self._identity}
        for key, value in mine.items():
            if texts.get(key) != value:
                raise MessageError(
                    f"its {key} is {brief(texts.get(key))}, expected {value}: install the same version of flow_pl on "
                    "both sides, and run one app"
                )
        client = number(reply, "client", least=0)
        features = tuple(_feature(reply, each) for each in feature_names(texts) or (None,))
        known = NodeClient(
            node,
            brief(texts.get("name")),
            number(reply, "train", least=1),
            number(reply, "val", least=0),
            number(reply, "test", least=0),
            number(reply, "classes", least=1),
            features,
            shape(reply, "label_shape"),
            bool(number(reply, "real_valued", least=0)),
            class_names(texts),
        )
        other = next(iter(self.clients.values()), known)
        if not known.fits(other):
            raise MessageError(
                f"its examples have shape {_shapes(known)} and labels {list(known.label_shape)}, those of "
                f"client '{other.name}' {_shapes(other)} and {list(other.label_shape)}"
            )
        if known.class_names != other.class_names:
            raise MessageError(
                f"its classes are {_classes(known)}, those of client '{other.name}' {_classes(other)}, so their "
                "numbers mean different classes: list all classes in data.classes, the same on every node, or "
                "number them alike in all files"
            )
        before = self.clients.get(client)
        if before is not None and before.node in set(self._grid.get_node_ids()):
            raise MessageError(f"its partition-id is {client}, which node {before.node} uses: choose another one")
        return client, known

    def _exchange(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, Reply]:
        """Send messages and return the replies by node."""
        late = Silence(f"no reply within {self._timeout:g} seconds")
        replies: dict[int, Reply] = dict.fromkeys(contents, late)
        messages = [Message(content, node, kind, ttl=self._timeout) for node, content in contents.items()]
        sent = list(self._grid.push_messages(messages))
        # a SuperLink answers in the order of the messages; an empty id means that it has not accepted one
        waiting = {message: node for message, node in zip(sent, contents, strict=False) if message}
        for node in contents.keys() - waiting.values():
            replies[node] = "the SuperLink has not accepted the message"
        end = time.monotonic() + self._timeout
        while waiting and time.monotonic() < end:
            for reply in self._grid.pull_messages(list(waiting)):
                asked = waiting.pop(reply.metadata.reply_to_message_id, None)
                if asked is not None:
                    replies[asked] = _reason(reply.error.reason) if reply.has_error() else reply.content
            if waiting:
                time.sleep(PAUSE)
        return replies


def _reason(text: str | None) -> str:
    """Return the reason of an error reply, by a node or by Flower, as the end of a sentence."""
    return brief(text).removeprefix("Error: ").rstrip(".")


def _feature(reply: RecordDict, name: str | None) -> Feature:
    tokens = number(reply, keyed("tokens", name), least=0)
    reading = number(reply, keyed("reading", name), least=0)
    if reading >= len(READINGS):
        raise MessageError(f"its features are read as number {reading}, expected less than {len(READINGS)}")
    return Feature(name, shape(reply, keyed("feature_shape", name)), bool(tokens), READINGS[reading])


def _classes(client: NodeClient) -> str:
    return brief(", ".join(client.class_names)) if client.class_names else f"{client.classes} numbers without names"


def _shapes(client: NodeClient) -> str:
    features = client.features
    shapes = (f"{'' if each.name is None else f'{each.name} '}{list(each.shape)} ({each.reading})" for each in features)
    return ", ".join(shapes)


def _checked(reply: Reply, client: int) -> Reply:
    """Check that a reply is from the client that was asked."""
    if isinstance(reply, str):
        return reply
    try:
        found = number(reply, "client", least=0)
    except MessageError as error:
        return str(error)
    return reply if found == client else f"the reply is of client {found}"
