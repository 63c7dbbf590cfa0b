"""The model of the server: a `FederatedModule` whose clients train and are evaluated on their nodes."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from flow_pl.data import FederatedDataModule
from flow_pl.data.batch import ClientBatch
from flow_pl.deploy.messages import (
    MessageError,
    ReceivedStatistics,
    array_bytes,
    decode_arrays,
    decode_counts,
    encode,
    flat,
    grouped,
    identity_number,
    number,
)
from flow_pl.deploy.node import ROWS, moved_groups
from flow_pl.deploy.nodes import NodesError, Reply
from flow_pl.deploy.nodes_data import NodesData
from flow_pl.deploy.released_rounds import record_rounds, recorded_rounds
from flow_pl.engine.client_states import ClientStates
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.evaluation.counts import ClientEvaluation, concatenate
from flow_pl.methods.base import Method
from flow_pl.module import FederatedModule, RejectedClientWarning
from flow_pl.utils.groups import Groups


class RemoteModule(FederatedModule):
    """A `FederatedModule` whose clients train and are evaluated on their nodes.

    The states of clients stay on the nodes. The module remembers for each client the last round whose update it has
    accepted, and the nodes resume from there.
    """

    _taken: dict[int, int]
    _run: int
    _pending: list[int]
    _bytes: list[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._taken = {}
        self._run = int.from_bytes(os.urandom(7), "big")  # not from the run's seed: two runs with one seed must differ
        self._pending = []
        self._bytes = [0, 0]

    def open_states(self, data: FederatedDataModule) -> None:
        """Do nothing, since states are on the nodes."""

    def data_record(self) -> None:
        """Return None, since the rows are on the nodes."""

    def on_train_epoch_start(self) -> None:
        """Reset the round."""
        super().on_train_epoch_start()
        self._pending = []
        self._bytes = [0, 0]

    def _train(self, method: Method, server: Groups, scale: Tensor | None, piece: ClientBatch) -> ClientUpdate:
        """Let the nodes train; clients without a usable reply count as excluded."""
        assert self._round is not None
        replies = self._ask("train", piece.client.tolist(), round=piece.round)
        expected = flat(dict(self._sent(method).items()))
        moved = moved_groups(method.phases)
        statistics = ReceivedStatistics(self.device)
        clients, differences, weights = [], [], []
        left_out: list[tuple[int, str]] = []
        for client, reply in replies.items():
            try:
                content = _usable(reply)
                if number(content, "round", least=0) != piece.round:
                    raise MessageError("the reply is of another round")
                difference = decode_arrays(content, expected)
                weight = {name: self._weight(content, name, client) for name in method.shared}
                statistics.add(content, moved)
            except MessageError as error:
                left_out.append((client, str(error)))
                continue
            self._bytes[1] += array_bytes(content)
            clients.append(client)
            differences.append(difference)
            weights.append(weight)
        self._round.reject(left_out)
        self._pending += clients
        stacked = {
            name: torch.stack([d[name] for d in differences]).to(self.device)
            if differences
            else torch.zeros(0, *like.shape, device=self.device)
            for name, like in expected.items()
        }
        return ClientUpdate(
            torch.tensor(clients, dtype=torch.int64, device=self.device),
            {name: {} for name in method.shared} | grouped(stacked),
            {name: torch.tensor([w[name] for w in weights], device=self.device) for name in method.shared},
            statistics,
            {},
        )

    def _server_step(self, round_: ServerRound) -> None:
        super()._server_step(round_)
        if self.privacy is not None:
            # nodes may receive the model of this round before the next checkpoint is written
            record_rounds(Path(self.trainer.default_root_dir), self.privacy.ledger)
        # only now has the server accepted them
        self._taken |= dict.fromkeys(self._pending, self.current_epoch)
        self.log_dict(
            {
                "train/tensor_bytes_down": torch.tensor(self._bytes[0], dtype=torch.float64),
                "train/tensor_bytes_up": torch.tensor(self._bytes[1], dtype=torch.float64),
            },
            on_step=False,
            on_epoch=True,
            batch_size=1,
        )

    def validation_step(  # type: ignore[override]
        self, batch: ClientBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ClientEvaluation:
        """Let the nodes personalize and evaluate their clients; those without a usable reply are excluded by name.

        Raises:
            NodesError: no client has replied.
        """
        rows = ROWS.index("test" if self.trainer.testing else "val")
        fits = {field.name: field.default is not None for field in fields(ClientEvaluation) if field.name != "client"}
        found: list[ClientEvaluation] = []
        for client, reply in self._ask("evaluate", batch.client.tolist(), rows=rows).items():
            try:
                counts = decode_counts(_usable(reply), fits)
                evaluation = ClientEvaluation(client=torch.tensor([client]), **counts).to(self.device)
                if found and _layout(found[0]) != _layout(evaluation):
                    raise MessageError("its counts are not those of the other clients")
                found.append(evaluation)
            except MessageError as error:
                name = self._data.client_name(client)
                warnings.warn(f"client '{name}' is not evaluated: {error}.", RejectedClientWarning, stacklevel=2)
        if not found:
            raise NodesError("no client could be evaluated: see the warning for each. The last checkpoint is intact.")
        return concatenate(found)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the last accepted round of each client to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["nodes"] = {"run": self._run, "taken": dict(self._taken)}
        if self.method.private:
            # a test elsewhere treats all clients as never sampled, since their states are on the nodes
            initial = self.initial_state(self.method, server_groups(self.method))
            states = ClientStates(initial, 1, self.trainer.default_root_dir)
            checkpoint["client_states"] = states.state_dict(str)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the accepted rounds, so that the nodes resume from the same states.

        Private rounds after the checkpoint count, too: their models may have reached nodes.

        Raises:
            ConfigurationError: see `FederatedModule.on_load_checkpoint`; or the record of private rounds is damaged.
        """
        super().on_load_checkpoint(checkpoint)
        if self.privacy is not None and self.trainer.state.fn == "fit":
            released = recorded_rounds(Path(self.trainer.default_root_dir))
            lost = released.rounds - self.privacy.ledger.rounds
            if lost > 0:
                self.privacy.ledger = released
                rank_zero_info(f"private rounds after the checkpoint, which count against the budget: {lost}")
        nodes = checkpoint.get("nodes")
        if nodes is not None:
            self._run = int(nodes["run"])
            self._taken = {int(client): int(round_) for client, round_ in nodes["taken"].items()}

    @property
    def _data(self) -> NodesData:
        return cast(NodesData, self.trainer.datamodule)  # type: ignore[attr-defined]

    def _sent(self, method: Method) -> Groups:
        """Return the server's parameters for which clients send updates."""
        server, client = server_groups(method), method.start(server_groups(method))
        return {name: {key: server[name][key] for key in client[source]} for name, source in method.shared.items()}

    def _ask(self, kind: str, clients: list[int], **numbers: int) -> dict[int, Reply]:
        """Send the server's model to clients and return the replies."""
        state = dict(self.state_dict())
        common = {
            "seed": self._data.run_seed,
            "identity": identity_number(self.identity()),
            "run": self._run,
            "cohort_share": float(self.method.cohort_share),
            **numbers,
        }
        contents = {client: encode(state, {**common, "taken": self._taken.get(client, -1)}) for client in clients}
        if kind == "train":
            self._bytes[0] += sum(map(array_bytes, contents.values()))
        return self._data.nodes.ask(kind, contents)

    def _weight(self, content: Any, name: str, client: int) -> float:
        """Return a client's weight in the server's mean, at most its number of examples."""
        weight: float = number(content, f"weight_{name}", float, 0)
        most = self._data.nodes.clients[client].train if self.loop.weighting == "examples" else 1
        if weight > most:
            raise MessageError(f"its weight is {weight:g}, expected {most} at most")
        return weight


def _usable(reply: Reply) -> Any:
    if isinstance(reply, str):
        raise MessageError(reply)
    return reply


def _layout(evaluation: ClientEvaluation) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape[1:]) for name, t in vars(evaluation).items() if isinstance(t, Tensor)}
