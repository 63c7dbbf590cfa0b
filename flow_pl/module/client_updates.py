"""Make the updates that a chunk's clients send: trained from what they kept, attacked, compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flow_pl.data.batch import ClientBatch
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.compression import RESIDUAL, compress_update
from flow_pl.engine.sent_updates import as_sent, receive
from flow_pl.methods.base import Method
from flow_pl.module.kept_states import kept_state
from flow_pl.utils.groups import Groups

if TYPE_CHECKING:
    from flow_pl.module.federated import FederatedModule


def train_clients(
    module: FederatedModule, method: Method, server: Groups, scale: Tensor | None, piece: ClientBatch
) -> ClientUpdate:
    """Train some clients side by side and return what they send.

    Args:
        module: module attached to the trainer of a fit.
        method: the method in this round.
        server: the server's groups.
        scale: factor on the loss in 16-bit precision; None in other precisions.
        piece: the clients.
    """
    kept, residual = kept_state(module, method, server, piece), None
    if kept is not None and RESIDUAL in kept:
        residual = {RESIDUAL: kept.pop(RESIDUAL)}
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    if module.attack is not None:
        piece = module.attack.poison(piece, data.num_classes)
    update = module.loop.train_clients(method, server, piece, scale, kept)
    if module.attack is not None:
        module.attack.corrupt(update.difference, update.client, piece.round)
    if module.compression is not None:
        sent = as_sent(method, update)
        left_out = compress_update(module.compression, sent, update.client, residual, data.run_seed, piece.round)
        receive(method, update, sent)
        update.kept.update(left_out)
    return update
