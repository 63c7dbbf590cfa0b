"""FedBABU: Oh, Kim, Yun, FedBABU: Toward Enhanced Representation for Federated Image Classification (ICLR 2022)."""

from __future__ import annotations

from typing import ClassVar

from flow_pl.methods.base import Derive, Phase, Step
from flow_pl.methods.parts.body_and_head import BodyAndHead


class FedBABU(BodyAndHead):
    """Trains the body alone, under a head that stays as initialised; then each client fine-tunes all (Algorithm 1).

    Sends w_g, of which the head never moves; keeps nothing. The personal model is w_g fine-tuned as a whole.

    Args:
        head_blocks: how many of the last blocks with parameters are the head.
        personal_lr_scale: factor on the client optimizer's learning rate for fine-tuning.
    """

    server_is_trained: ClassVar[bool] = True

    def training(self) -> tuple[Phase | Derive, ...]:
        """Epochs on the body, then the whole model is put together again."""
        step = Step("body", lambda groups, minibatch: self.loss(minibatch, groups["body"], groups["head"]))
        return (
            Phase("all", (step,)),
            Derive("all", lambda groups, examples: {"global": {**groups["global"], **groups["body"]}}),
        )

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Epochs on the whole model."""
        return self.train_jointly(self.personal_step(self.train_step("model")))
