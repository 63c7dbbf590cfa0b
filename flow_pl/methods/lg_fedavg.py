"""LG-FedAvg: Liang et al., Think Locally, Act Globally (NeurIPS 2019 workshop, arXiv 2001.01523)."""

from __future__ import annotations

from types import MappingProxyType

from flow_pl.methods.base import Derive, Minibatch, Phase
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.utils.groups import Groups


class LGFedAvg(BodyAndHead):
    """A body (local representation) of its own for each client, and a head for all (Algorithm 1).

    In a round a client trains all parameters together, from its own body and the head it received, and sends the
    head. Stateful: a client keeps its body, embedding tables included. The personal model is the client's own body
    and the server's head, trained on as in a round.

    The server's body is never trained, it stays as initialised: *generalized* accuracy is that of the trained head on
    an untrained body, and says little. A client that has not been sampled yet starts from that body.

    Args:
        local_epochs: epochs over a client's data in a round (E).
        personal_epochs: epochs when a client is evaluated; None for `local_epochs`.
        head_blocks: how many of the last blocks with parameters are the head.
    """

    shared = MappingProxyType({"global": "head"})
    private = MappingProxyType({"body": "body"})

    def training(self) -> tuple[Phase | Derive, ...]:
        """Epochs on the whole model."""
        return self._train(self.local_epochs)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """As in a round."""
        return self._train(self.personal_epochs)

    def _train(self, epochs: int) -> tuple[Phase | Derive, ...]:
        """Both parts as one group, since they move in the same steps."""
        return (Derive("all", _join), Phase("all", epochs, (self.train_step("model"),)), Derive("all", self._part))

    def _part(self, groups: Groups, examples: Minibatch) -> Groups:
        return self.parts(groups["model"])


def _join(groups: Groups, examples: Minibatch) -> Groups:
    """Body and head in one group, a copy: steps write to it."""
    return {"model": {name: p.clone() for name, p in {**groups["body"], **groups["head"]}.items()}}
