"""FedRep: Collins et al., Exploiting Shared Representations for Personalized Federated Learning (ICML 2021)."""

from __future__ import annotations

from types import MappingProxyType

from flow_pl.methods.base import Derive, Phase, Step
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.utils.validation import require_count


class FedRep(BodyAndHead):
    """A body for all clients, and a head of its own for each (Algorithm 1).

    In a round a client trains its head on the body it received, then the body below that head, and sends the body.
    Stateful: a client keeps its head. The personal model is the server's body under the client's head.

    The server's head is never trained, it stays as initialised: *generalized* accuracy is that of the trained body
    under an untrained head, and says little. A client that has not been sampled yet starts from that head.

    Args:
        local_epochs: epochs of the body in a round (published: 1 or 5, by data set).
        personal_epochs: epochs of the head when a client is evaluated, on the server's body; None for `head_epochs`,
            or for `local_epochs` where those are 0.
        head_epochs: epochs of the head in a round, before those of the body (published: 10). 0 leaves it as initialised
            until a client is evaluated: FedBABU (Oh et al., ICLR 2022).
        head_blocks: how many of the last blocks with parameters are the head.
    """

    shared = MappingProxyType({"global": "body"})
    private = MappingProxyType({"head": "head"})

    def __init__(
        self,
        local_epochs: int = 3,
        personal_epochs: int | None = None,
        head_epochs: int = 3,
        head_blocks: int = 1,
    ) -> None:
        require_count(0, head_epochs=head_epochs)
        if personal_epochs is None and head_epochs:
            personal_epochs = head_epochs
        super().__init__(local_epochs, personal_epochs, head_blocks)
        self.head_epochs = head_epochs

    def training(self) -> tuple[Phase | Derive, ...]:
        """The head on a frozen body, then the body below the frozen head."""
        head = (Phase("all", self.head_epochs, (self._step("head"),)),) if self.head_epochs else ()
        return (*head, Phase("all", self.local_epochs, (self._step("body"),)))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """The head's steps alone: the body is the server's."""
        return (Phase("all", self.personal_epochs, (self._step("head"),)),)

    def _step(self, moves: str) -> Step:
        """A step of one part on the loss of both."""
        return Step(moves, lambda groups, minibatch: self.loss(minibatch, groups["body"], groups["head"]))
