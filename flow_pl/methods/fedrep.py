"""FedRep: Collins et al., Exploiting Shared Representations for Personalized Federated Learning (ICML 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.steps import Derive, Phase, Step
from flow_pl.utils.validation import given, require_count


class FedRep(BodyAndHead):
    """Shares the body among all clients and keeps a head on each (Algorithm 1).

    In a round a client trains its head on the body it received, then the body below that head, and sends the body.
    Stateful: a client keeps its head. The personal model is the server's body under the client's head.

    The server's head is never trained: *generalized* accuracy is that of the trained body under an untrained head, and
    has little meaning. A client that has not been sampled yet starts from that head.

    Args:
        head_epochs: epochs of the head in a round, before those of the body (published: 10); None for as many as the
            body gets. 0 leaves it untrained until a client is evaluated.
        head_blocks: how many of the last blocks with parameters are the head, or the names of the submodules
            that are.
        personal_lr_scale: factor on the client optimizer's learning rate for the head.
    """

    shared = MappingProxyType({"global": "body"})
    private = MappingProxyType({"head": "head"})

    def __init__(
        self,
        head_epochs: int | None = None,
        head_blocks: int | Sequence[str] = 1,
        personal_lr_scale: float = 1.0,
    ) -> None:
        require_count(0, **given(head_epochs=head_epochs))
        super().__init__(head_blocks, personal_lr_scale)
        self.head_epochs = head_epochs

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train the head on a frozen body, then the body below the frozen head."""
        head = () if self.head_epochs == 0 else (Phase("all", (self._head_step(),), self.head_epochs),)
        return (*head, Phase("all", (self._step("body"),)))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Train the head only: the body is the server's."""
        return (Phase("all", (self._head_step(),)),)

    def _head_step(self) -> Step:
        """Create a step of the client's head."""
        return self.personal_step(self._step("head"))

    def _step(self, moves: str) -> Step:
        """Create a step of one part on the loss of both."""
        return Step(moves, lambda groups, minibatch: self.loss(minibatch, groups["body"], groups["head"]))
