"""What clients send to the server after a round, and what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_pl.engine.training_statistics import TrainingStatistics
from flow_pl.utils.groups import Groups, client_rows


@dataclass(frozen=True)
class ClientUpdate:
    """Holds what a chunk of clients sends to the server, and what it keeps.

    Attributes:
        client: [C] int64, indices into the client store.
        difference: for each shared group of the server, what each client sends minus what it received [C, ...].
        weights: for each shared group of the server, the clients' weights in the server's mean [C].
        statistics: statistics of their training.
        kept: each client's state [C, ...], by the group it starts its next round with.
    """

    client: Tensor
    difference: Groups
    weights: dict[str, Tensor]
    statistics: TrainingStatistics
    kept: Groups

    def add_to(self, sums: Sequence[Tensor]) -> None:
        """Add the weighted sum over clients to tensors in the shape of what they send, in place."""
        stacked = [(name, p) for name, group in self.difference.items() for p in group.values()]
        for total, (name, p) in zip(sums, stacked, strict=True):
            total.view(-1).addmv_(client_rows(p).t(), self.weights[name])

    def finite(self) -> Tensor:
        """Return whether all values that the clients send and keep are finite, as a scalar tensor."""
        groups = (*self.difference.values(), *self.kept.values())
        # a sum is finite only if all of its terms are
        sums = [p.sum() for group in groups for p in group.values()]
        return torch.stack(sums).isfinite().all() if sums else torch.tensor(True)

    def reject(self) -> Tensor:
        """Exclude clients with a value that is not finite: they send zeros with weight zero.

        Returns:
            [C] bool, False for the excluded clients, whose state stays as it was.
        """
        accepted = torch.ones_like(self.client, dtype=torch.bool)
        sent = [p for group in self.difference.values() for p in group.values()]
        for p in (*sent, *(p for group in self.kept.values() for p in group.values())):
            accepted &= p.reshape(len(p), -1).sum(1).isfinite()
        for p in sent:
            p.masked_fill_(~accepted.view(-1, *[1] * (p.ndim - 1)), 0)
        for weights in self.weights.values():
            weights.masked_fill_(~accepted, 0)
        return accepted
