"""A node: one client with its own data, trained and evaluated by the same loop as in simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from flow_pl.checks import check_fit
from flow_pl.configuration import read_settings
from flow_pl.data.batch import Chunk, ClientBatch
from flow_pl.data.dataset import ClientDataset
from flow_pl.data.federation import Federation, Heldout
from flow_pl.data.store.features import READINGS, read_as
from flow_pl.deploy.messages import (
    CLASSES,
    FEATURES,
    TEXTS,
    MessageError,
    decode_arrays,
    encode,
    flat,
    identity_number,
    keyed,
    number,
)
from flow_pl.deploy.private_state import PrivateState
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods.steps import Phase
from flow_pl.serving import instantiate
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import leaves, take
from flow_pl.utils.validation import require_choice
from flow_pl.version import __version__

ROWS: tuple[Heldout, ...] = ("val", "test")
"""Rows to evaluate on, by the number sent by the server."""

STATE = "~/.local/state/flow_pl"
"""Default folder of the clients' states."""

OWN = ("partition-id", "client", "state", "data-config")
"""Keys of a node's configuration; others are settings of its data, as in `data.cache_dir`."""


class Node:
    """The client of a node.

    Args:
        config: the app's file with the configuration of the run.
        node_config: configuration of the SuperNode. "partition-id" is the client's number, unique to the node; "client"
            its name in data with several clients (default: the one whose index is the number); "data-config" a YAML
            file whose section "data" replaces the app's; "state" the folder of its state. Any other key is a setting of
            the data, such as "data.cache_dir".

    Raises:
        ConfigurationError: a key is unknown, or the configuration cannot be used.
        DataError: the data cannot be used.
    """

    def __init__(self, config: Path, node_config: Mapping[str, Any]) -> None:
        given = node_config.get("partition-id")
        if type(given) is not int or not 0 <= given < 2**31:
            raise ConfigurationError(
                f"partition-id of the node is {given!r}, expected the client's number, 0 or more: start the SuperNode "
                "with --node-config 'partition-id=0'."
            )
        for key in node_config:
            if not key.startswith("data."):
                require_choice((*OWN, "data.<setting>"), **{"key of the node's configuration": key})
        self.number = given
        settings = read_settings(config)
        own = node_config.get("data-config")
        data = settings["data"] if own is None else _data_section(Path(str(own)).expanduser())
        options = [f"--data.init_args.{k.removeprefix('data.')}={v}" for k, v in node_config.items() if k not in OWN]
        self.module, self.data = instantiate({"model": settings["model"], "data": data}, *options)
        self.data.prepare_data()
        self.data.setup()
        self.client = self._find(node_config.get("client"))
        self._state = Path(str(node_config.get("state", STATE))).expanduser()
        self.method, self.loop = self.module.method, self.module.loop
        self.example, store = self.data.example(), self.data.federation.store
        laid_out = take(self.loop.lay_out(take(self.example, None)), 0)
        check_fit(self.method, laid_out, self.data.num_classes, store.label_shape, store.real_valued)
        self.module.eval()

    def describe(self) -> RecordDict:
        """Describe the client to the server: its number and name, sizes, shapes and class names, but no examples."""
        federation, client = self.data.federation, self.client
        features = self.example if isinstance(self.example, dict) else {None: self.example}
        shapes = {keyed("feature_shape", name): [1, *t.shape[1:]] for name, t in features.items()}
        tokens = {keyed("tokens", name): int(not t.is_floating_point()) for name, t in features.items()}
        stored = self.data.federation.store.read(client).x
        readings = {
            keyed("reading", name): READINGS.index(read_as(x.dtype))
            for name, x in zip(features, leaves(stored), strict=True)
        }
        described = encode(
            {},
            {
                "client": self.number,
                "train": int(federation.train_sizes[client]),
                "val": int(federation.val_sizes[client]),
                "test": int(federation.test_sizes[client]),
                "classes": self.data.num_classes,
                **shapes,
                "label_shape": [1, *federation.store.label_shape],
                **tokens,
                **readings,
                "real_valued": int(federation.store.real_valued),
            },
        )
        names = {FEATURES: list(self.example)} if isinstance(self.example, dict) else {}
        if self.data.class_names:
            names[CLASSES] = list(self.data.class_names)
        described[TEXTS] = ConfigRecord(
            {"name": self.data.client_name(client), "version": __version__, **self.module.identity(), **names}
        )
        return described

    def train(self, content: RecordDict) -> RecordDict:
        """Train the client for a round.

        Args:
            content: the server's message.

        Returns:
            The client's reply: the difference of its groups from the server's, its weights, losses and counts.

        Raises:
            MessageError: the message cannot be used, or the client's update is not finite.
            DataError: the client's data or state cannot be used.
        """
        round_ = number(content, "round", least=0)
        server, state, kept = self._receive(content)
        # a node has no information on the others
        self.method.set_cohort_share(number(content, "cohort_share", float, least=0))
        method = self.method.in_round(round_, server)
        update = self.loop.train_clients(method, server, self._batch(content, round_, None), None, kept)
        if not update.finite():
            raise MessageError("its update is not finite")
        if method.private:
            state.write(round_, update.kept, number(content, "taken", least=-1))
        moved = moved_groups(method.phases)
        losses = update.statistics.losses(moved).tolist()
        numbers: dict[str, int | float] = {
            "client": self.number,
            "round": round_,
            "rows": update.statistics.rows,
            "examples": update.statistics.examples,
        }
        numbers |= {f"weight_{name}": float(weight[0]) for name, weight in update.weights.items()}
        for name, (loss, steps) in zip(moved, losses, strict=True):
            numbers |= {f"loss_{name}": loss, f"steps_{name}": steps}
        difference = {name: {key: p[0] for key, p in group.items()} for name, group in update.difference.items()}
        return encode(flat(difference), numbers)

    def evaluate(self, content: RecordDict) -> RecordDict:
        """Personalize the client, and evaluate the server's model and its own.

        Args:
            content: the server's message.

        Returns:
            The counts of `ClientEvaluation`, each [1, ...].

        Raises:
            MessageError: the message cannot be used.
            DataError: the client's data or state cannot be used.
        """
        rows = number(content, "rows", least=0)
        if rows >= len(ROWS):
            raise MessageError(f"rows is {rows}, expected 0 or 1")
        server, _, kept = self._receive(content)
        batch = self._batch(content, -1, ROWS[rows])
        evaluation = evaluate_clients(self.loop, self.method, server, batch, kept)
        counts = {name: t for name, t in vars(evaluation).items() if isinstance(t, Tensor) and name != "client"}
        return encode(counts, {"client": self.number})

    def _receive(self, content: RecordDict) -> tuple[Groups, PrivateState, Groups | None]:
        """Return the server's groups, the client's state file, and the groups that the client kept."""
        if number(content, "identity") != identity_number(self.module.identity()):
            made = " on ".join(list(self.module.identity().values())[:2])
            raise MessageError(
                f"the server runs another version of flow_pl or another method than this node, which has flow_pl "
                f"{__version__} with {made}: install the same version on both sides"
            )
        self.module.load_state_dict(decode_arrays(content, dict(self.module.state_dict())))
        server = server_groups(self.method)
        state = PrivateState(self._state, number(content, "run", least=0), self.number)
        if not self.method.private:
            return server, state, None
        return server, state, state.read(number(content, "taken", least=-1), self.method.initial_state(server))

    def _batch(self, content: RecordDict, round_: int, rows: Heldout | None) -> ClientBatch:
        dataset = NodeDataset(
            self.data.federation, number(content, "seed", least=0), self.number, rows, self.module.orders
        )
        batch = dataset[Chunk(round_, (self.client,))]
        if batch.unusable:
            raise MessageError(batch.unusable[0][1])
        return replace(self.data.on_after_batch_transfer(batch, 0), client=torch.tensor([self.number]))

    def _find(self, name: object) -> int:
        """Return the index of the node's client in its data."""
        names = [self.data.client_name(client) for client in range(len(self.data.federation.store))]
        if name is None and len(names) == 1:
            return 0
        if name is None and self.number < len(names):
            return self.number
        if name in names:
            return names.index(str(name))
        asked = f"there is no client number {self.number}" if name is None else f"there is no client {name!r}"
        raise ConfigurationError(
            f"{asked} in the node's data, which has {len(names)} ({', '.join(map(repr, names[:3]))}, ...): name one of "
            "them by the key client of --node-config."
        )


class NodeDataset(ClientDataset):
    """Data of a node; its client draws by its number in the run rather than its index in the store."""

    def __init__(self, federation: Federation, seed: int, client: int, heldout: Heldout | None, orders: int) -> None:
        super().__init__(federation, seed, heldout, orders)
        self._client = client

    def number(self, client: int) -> int:
        """Return the number of the client in the run."""
        return self._client


def moved_groups(phases: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of the groups that are trained."""
    steps = (step for phase in phases if isinstance(phase, Phase) for step in phase.steps)
    return tuple(dict.fromkeys(step.moves for step in steps))


def _data_section(path: Path) -> Any:
    """Read the section "data" of a node's own YAML file."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"the data-config {path} cannot be read ({error}).") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("data"), dict):
        raise ConfigurationError(f"the data-config {path} has no section 'data': add one as in a run's configuration.")
    return settings["data"]
