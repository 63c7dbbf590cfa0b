"""FedPer: Arivazhagan et al., Federated Learning with Personalization Layers (arXiv 1912.00818, 2019)."""

from __future__ import annotations

from types import MappingProxyType

from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.steps import Derive, Phase


class FedPer(BodyAndHead):
    """Shares the body among all clients and keeps a head on each, trained together (Algorithms 1 and 2).

    In a round a client trains all parameters in the same steps, from the body it received and its own head, and sends
    the body. Stateful: a client keeps its head. Personalization trains as in a round, from the server's body
    and the client's head. The server's head is never trained, so *generalized* accuracy has little meaning.

    Args:
        head_blocks: how many of the last blocks with parameters are the head (the paper's K_P).
        personal_lr_scale: factor on the client optimizer's learning rate when a client is evaluated; in a round body
            and head are trained together.
    """

    shared = MappingProxyType({"global": "body"})
    private = MappingProxyType({"head": "head"})

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train the whole model."""
        return self.train_jointly(self.train_step("model"))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Do the same as in a round."""
        return self.train_jointly(self.personal_step(self.train_step("model")))
