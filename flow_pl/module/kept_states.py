"""Keep the clients' state between rounds: open its storage, and read what the clients of a chunk start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flow_pl.data import FederatedDataModule
from flow_pl.data.batch import ClientBatch
from flow_pl.engine.client_states import ClientStates
from flow_pl.engine.compression import no_residual
from flow_pl.engine.server_round import sent_parameters, server_groups
from flow_pl.methods.base import Method
from flow_pl.resume import data_record
from flow_pl.utils.groups import Groups

if TYPE_CHECKING:
    from flow_pl.module.federated import FederatedModule


def opened_states(module: FederatedModule, data: FederatedDataModule) -> ClientStates | None:
    """Return storage for the state of all clients: that of an earlier stage, or a new one; None if they keep none.

    Other data have other clients, even if as many, so they get a new one.

    Args:
        module: module attached to a trainer.
        data: the clients.
    """
    if not module.method.private:
        return module.states
    rows: str = data_record(data)["rows"]
    if module.states is not None and module.states_of == rows:
        return module.states
    module.states_of = rows
    population = len(data.federation.store)
    initial = module.initial_state(module.method, server_groups(module.method))
    root, share = module.trainer.default_root_dir, module.trainer.strategy.broadcast
    return ClientStates(initial, population, root, share, first=module.trainer.is_global_zero)


def kept_state(module: FederatedModule, method: Method, server: Groups, batch: ClientBatch) -> Groups | None:
    """Return the state that the clients of a chunk kept from their last round; None if they keep none."""
    if module.states is None or not method.private or not len(batch):
        return None
    return module.states.read(batch.client, module.initial_state(method, server))


def initial_state(module: FederatedModule, method: Method, server: Groups) -> Groups:
    """Return the state of a client that has not been sampled: the method's, and the residual of its compression."""
    initial = method.initial_state(server)
    if module.compression is None or not module.compression.keeps_residual:
        return initial
    return initial | no_residual({name: dict(group) for name, group in sent_parameters(method).items()})
