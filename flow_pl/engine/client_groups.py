"""Parameter groups of a chunk's clients: one tensor while all clients share it, stacked [C, ...] where they differ."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flow_pl.utils.groups import Groups, Parameters


class ClientGroups:
    """The parameter groups of a chunk of clients.

    A group that no client has updated yet is shared: the server's copy. An updated group is stacked, [C, ...].

    Args:
        groups: one client's groups, as made by `Method.start` from the server's.
        clients: number of clients (C).
    """

    def __init__(self, groups: Groups, clients: int) -> None:
        self.groups = groups
        self.clients = clients
        self.stacked: set[str] = set()

    def stack(self, name: str) -> list[Tensor]:
        """Give every client its own copy of a group; return its tensors [C, ...]."""
        if name not in self.stacked:
            group = self.groups[name]
            self.groups[name] = {key: p.detach().expand(self.clients, *p.shape).clone() for key, p in group.items()}
            self.stacked.add(name)
        return list(self.groups[name].values())

    def put(self, groups: Groups) -> None:
        """Add or replace groups that are already stacked."""
        shared = {_memory(p) for name, group in self.groups.items() if name not in self.stacked for p in group.values()}
        for name, group in groups.items():
            # A result of shared groups alone is one tensor seen by all clients, which no step may change. For a
            # single client it may be the server's own.
            self.groups[name] = {
                key: p.clone() if p.is_contiguous() and _memory(p) in shared else p.contiguous()
                for key, p in group.items()
            }
        self.stacked.update(groups)

    def take(self, name: str) -> Parameters:
        """Remove a stacked group; return its tensors [C, ...]."""
        self.stacked.remove(name)
        return self.groups.pop(name)

    def prefix(self, active: int) -> Groups:
        """Return views of the first clients' groups; without a client axis if there is one client."""
        if active == self.clients > 1:
            return self.groups
        cut: Callable[[Tensor], Tensor] = (lambda p: p[0]) if active == 1 else (lambda p: p[:active])
        return {
            name: {key: cut(p) for key, p in group.items()} if name in self.stacked else group
            for name, group in self.groups.items()
        }


def _memory(p: Tensor) -> int:
    """Return the address of a tensor's memory."""
    return p.untyped_storage().data_ptr()
