"""Personalize the clients of a chunk from what they kept, and evaluate or predict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flow_pl.data.batch import ClientBatch
from flow_pl.engine.server_round import server_groups
from flow_pl.evaluation.clients import evaluate_clients, predict_clients
from flow_pl.evaluation.counts import ClientEvaluation, ClientPredictions, concatenate
from flow_pl.module.kept_states import kept_state

if TYPE_CHECKING:
    from flow_pl.module.federated import FederatedModule


def evaluate(module: FederatedModule, batch: ClientBatch) -> ClientEvaluation:
    """Personalize a chunk of clients and evaluate them on their held-out instances."""
    method, server = module.method, server_groups(module.method)

    def run(piece: ClientBatch) -> ClientEvaluation:
        return evaluate_clients(module.loop, method, server, piece, kept_state(module, method, server, piece))

    return concatenate(list(module.chunks.run(batch, run))) if len(batch) else run(batch)


def predict(module: FederatedModule, batch: ClientBatch) -> ClientPredictions:
    """Personalize a chunk of clients and predict their held-out and unlabelled instances."""
    method, server = module.method, server_groups(module.method)

    def run(piece: ClientBatch) -> ClientPredictions:
        return predict_clients(module.loop, method, server, piece, kept_state(module, method, server, piece))

    pieces = list(module.chunks.run(batch, run)) if len(batch) else [run(batch)]
    # clients without examples have no axes to concatenate
    return concatenate([piece for piece in pieces if piece.mask.numel()] or pieces[:1])
