"""Make of the clients' updates what they send, where one of their groups may update one of several on the server."""

from __future__ import annotations

from torch import Tensor

from flow_pl.engine.client_update import ClientUpdate
from flow_pl.methods.base import Method
from flow_pl.utils.groups import Groups


def as_sent(method: Method, update: ClientUpdate) -> Groups:
    """Return the clients' updates as they send them, by group and name [C, ...]; may alias the update.

    With `Method.participation`, a client's group may be the update of several of the server's groups, of which it takes
    part in one: that update is sent, once, by the name of the first of them. The differences from the other groups say
    nothing about its training.
    """
    if method.participation is None:
        return update.difference
    first: dict[str, str] = {}
    sent: Groups = {}
    for name, source in method.shared.items():
        group = {key: p.where(_takes_part(update, name, p), 0.0) for key, p in update.difference[name].items()}
        if source in first:
            for key, p in sent[first[source]].items():
                p.add_(group[key])
        else:
            first[source] = name
            sent[name] = group
    return sent


def receive(method: Method, update: ClientUpdate, sent: Groups) -> None:
    """Replace updates, in place, by what the clients have sent; see `as_sent`."""
    if method.participation is None:
        return
    first: dict[str, str] = {}
    for name, source in method.shared.items():
        for key, p in update.difference[name].items():
            p.copy_(sent[first.setdefault(source, name)][key].where(_takes_part(update, name, p), 0.0))


def _takes_part(update: ClientUpdate, name: str, like: Tensor) -> Tensor:
    return (update.weights[name] != 0).view(-1, *[1] * (like.ndim - 1))
