"""Parameter groups of the clients of a chunk: one tensor where all agree, stacked [C, ...] where they differ."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flow_pl.utils.groups import Groups, Parameters


class ClientGroups:
    """The parameter groups of a chunk of clients.

    A group that no client has moved yet is shared: one copy, the server's. A group that moves is stacked: [C, ...].

    Args:
        groups: one client's groups, as `Method.start` made them from the server's.
        clients: number of clients (C).
    """

    def __init__(self, groups: Groups, clients: int) -> None:
        self.groups = groups
        self.clients = clients
        self.stacked: set[str] = set()

    def stack(self, name: str) -> list[Tensor]:
        """Give every client its own copy of a group; returns its tensors [C, ...]."""
        if name not in self.stacked:
            group = self.groups[name]
            self.groups[name] = {key: p.detach().expand(self.clients, *p.shape).clone() for key, p in group.items()}
            self.stacked.add(name)
        return list(self.groups[name].values())

    def put(self, groups: Groups) -> None:
        """Add or replace groups that are already stacked."""
        shared = {_memory(p) for name, group in self.groups.items() if name not in self.stacked for p in group.values()}
        for name, group in groups.items():
            # What was made of shared groups alone is one tensor seen by all clients, which no step could move. Of a
            # single client it is the server's own, which none may.
            self.groups[name] = {
                key: p.clone() if p.is_contiguous() and _memory(p) in shared else p.contiguous()
                for key, p in group.items()
            }
        self.stacked.update(groups)

    def take(self, name: str) -> Parameters:
        """Take a stacked group out; returns its tensors [C, ...]."""
        self.stacked.remove(name)
        return self.groups.pop(name)

    def prefix(self, active: int) -> Groups:
        """Views on the first clients' groups; without a client axis where there is one client."""
        if active == self.clients > 1:
            return self.groups
        cut: Callable[[Tensor], Tensor] = (lambda p: p[0]) if active == 1 else (lambda p: p[:active])
        return {
            name: {key: cut(p) for key, p in group.items()} if name in self.stacked else group
            for name, group in self.groups.items()
        }


def _memory(p: Tensor) -> int:
    """Where a tensor's memory begins."""
    return p.untyped_storage().data_ptr()
