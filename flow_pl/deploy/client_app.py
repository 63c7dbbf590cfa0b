"""The client's side of the app: Flower's ClientApp around a `Node`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from flow_pl.errors import FlowError, brief
from flow_pl.utils.lean_imports import lean_imports

# each message starts a process, most of whose time is spent here
with lean_imports():
    from flow_pl.deploy.node import Node

REFUSED = 1000
"""Error code of a node's one-line reason for having no reply."""


def make_client_app(config: Path) -> ClientApp:
    """Create a ClientApp for a run.

    Args:
        config: the app's file with the configuration of the run.
    """
    app = ClientApp()

    def answer(message: Message, context: Context, reply: Callable[[Node], RecordDict]) -> Message:
        try:
            return Message(reply(Node(config, context.node_config)), reply_to=message)
        except FlowError as error:
            return Message(Error(REFUSED, brief(error).rstrip(".")), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return answer(message, context, Node.describe)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, lambda node: node.train(message.content))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, lambda node: node.evaluate(message.content))

    return app
