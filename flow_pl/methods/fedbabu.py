"""FedBABU: Oh, Kim, Yun, FedBABU: Toward Enhanced Representation for Federated Image Classification (ICLR 2022)."""

from __future__ import annotations

from typing import ClassVar

from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.steps import Derive, Phase, Step


class FedBABU(BodyAndHead):
    """Trains the body alone under a fixed, untrained head; then each client fine-tunes the whole model (Algorithm 1).

    Sends w_g, whose head never changes. Stateless. The personal model is w_g fine-tuned as a whole.

    Args:
        head_blocks: how many of the last blocks with parameters are the head.
        personal_lr_scale: factor on the client optimizer's learning rate for fine-tuning.
    """

    server_is_trained: ClassVar[bool] = True

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train the body, then reassemble the whole model."""
        step = Step("body", lambda groups, minibatch: self.loss(minibatch, groups["body"], groups["head"]))
        return (
            Phase("all", (step,)),
            Derive("all", lambda groups, examples: {"global": {**groups["global"], **groups["body"]}}),
        )

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Fine-tune the whole model."""
        return self.train_jointly(self.personal_step(self.train_step("model")))
