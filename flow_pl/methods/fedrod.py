"""FedRoD: Chen and Chao, On Bridging Generic and Personalized Federated Learning (ICLR 2022)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from flow_pl.methods.base import Prediction
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs

SMALLEST = 1e-8
"""Share of a class without examples on a client, so that its logarithm is finite."""


class FedRoD(BodyAndHead):
    """Trains a class-balanced generic model, and a personal head for each client beside it.

    w_g learns by the balanced softmax: the logarithms of the client's class frequencies are added to its outputs in the
    loss (Equation 8), so that classes rare on a client are not forgotten. The own head learns on the frozen
    features of w_g by the plain loss of the sum of both heads' outputs, which is the personal model (Equations 9, 10:
    the linear variant, without a hypernetwork).

    Stateful: a client keeps its head, which is zero before the client is first sampled, so its personal model
    starts as w_g. The head is the last block with parameters.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the own head.
    """

    private = MappingProxyType({"own": "own"})
    needs = "head"

    def __init__(self, personal_lr_scale: float = 1.0) -> None:
        super().__init__(1, personal_lr_scale)

    def prepare(self) -> None:
        """Split the backbone.

        Raises:
            ConfigurationError: the backbone has a single block, or the task has no classes to balance.
        """
        super().prepare()
        self.objective.require_one_class(
            "FedRoD balances classes, and examples need a single one: use another method, such as FedPer or Ditto."
        )

    def start(self, server: Groups) -> Groups:
        """Return w_g, and a zero head of the client's own."""
        return {**server, "own": {name: torch.zeros_like(server["global"][name]) for name in self._head}}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Take the steps of the own head and of w_g on every minibatch; w_g last: the head sees it unchanged."""

        def balanced(groups: Groups, minibatch: Minibatch) -> Tensor:
            outputs = self.model.plain(minibatch.x, groups["global"])
            return self.objective.loss(outputs + groups["classes"]["log"], minibatch.y, minibatch.mask)

        steps = (self._head_step(), Step("global", balanced))
        return (Derive("all", self._count), Phase("all", steps))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Take the own head's steps only."""
        return (Phase("all", (self._head_step(),)),)

    def personal(self, groups: Groups) -> Parameters | None:
        """Return None: two heads predict."""
        return None

    def personalized(self, groups: Groups, x: Inputs) -> Tensor:
        """Compute the sum of both heads' outputs."""
        features = self.model.features(x, groups["global"])
        return self.model.head(features, groups["global"]) + self.model.head(features, groups["own"])

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with w_g, and with the sum of both heads."""
        personal = self.personalized(groups, x)
        return Prediction(self.model.plain(x, groups["global"]), personal, local=personal)

    def _head_step(self) -> Step:
        """Create a step of the own head on the loss of the sum."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            return self.objective.loss(self.personalized(groups, minibatch.x), minibatch.y, minibatch.mask)

        return self.personal_step(Step("own", loss))

    def _count(self, groups: Groups, examples: Minibatch) -> Groups:
        """Compute the log class frequencies of the client's training examples (or tokens)."""
        first = next(pieces(examples))
        outputs = self.model.plain(first.x, groups["global"])
        counted = self.objective.counted(examples.y, examples.mask).flatten()
        labels = examples.y.flatten().masked_fill(~counted, 0)
        counts = outputs.new_zeros(outputs.shape[-1], dtype=torch.float32)
        counts = counts.scatter_add(0, labels, counted.float())
        shares = counts / counts.sum().clamp_min(1.0)
        return {"classes": {"log": shares.clamp_min(SMALLEST).log()}}
