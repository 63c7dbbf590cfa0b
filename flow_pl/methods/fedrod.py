"""FedRoD: Chen and Chao, On Bridging Generic and Personalized Federated Learning (ICLR 2022)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Derive, Minibatch, Phase, Prediction, Step
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.parts.pieces import pieces
from flow_pl.utils.groups import Groups, Parameters

SMALLEST = 1e-8
"""Share of a class that a client has no example of: its logarithm must be finite."""


class FedRoD(BodyAndHead):
    """A generic model trained as if every class were as frequent, and a head of its own for each client beside it.

    w_g learns by the balanced softmax: the logarithms of the client's class frequencies are added to its outputs in the
    loss (Equation 8), so that what a client has few examples of is not unlearned. The own head learns on the frozen
    features of w_g by the plain loss of the sum of both heads' outputs, which is the personal model (Equations 9, 10:
    the linear variant, without a hypernetwork).

    Stateful: a client keeps its head. That of a client that has not been sampled yet is zero, so its personal model
    starts as w_g. Its last block with parameters is the head.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the own head.
    """

    private = MappingProxyType({"own": "own"})

    def __init__(self, personal_lr_scale: float = 1.0) -> None:
        super().__init__(1, personal_lr_scale)

    def prepare(self) -> None:
        """Cut the backbone.

        Raises:
            ConfigurationError: it has one block, or the task has several labels, whose frequencies balance nothing.
        """
        super().prepare()
        if self.objective.several_labels:
            raise ConfigurationError(
                f"the task {type(self.objective).__name__} has several labels for an example, FedRoD balances "
                "classes of which an example has one: use another method, such as FedPer or Ditto."
            )

    def start(self, server: Groups) -> Groups:
        """w_g, and an own head that adds nothing."""
        return {**server, "own": {name: torch.zeros_like(server["global"][name]) for name in self._head}}

    def training(self) -> tuple[Phase | Derive, ...]:
        """On every minibatch the steps of the own head and of w_g; w_g last, or the head would see it moved."""

        def balanced(groups: Groups, minibatch: Minibatch) -> Tensor:
            outputs = self.model.plain(minibatch.x, groups["global"])
            return self.objective.loss(outputs + groups["classes"]["log"], minibatch.y, minibatch.mask)

        steps = (self._head_step(), Step("global", balanced))
        return (Derive("all", self._count), Phase("all", steps))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """The own head's steps alone."""
        return (Phase("all", (self._head_step(),)),)

    def personal(self, groups: Groups) -> Parameters | None:
        """None: two heads predict."""
        return None

    def personalized(self, groups: Groups, x: Tensor) -> Tensor:
        """The sum of both heads' outputs."""
        features = self.model.features(x, groups["global"])
        return self.model.head(features, groups["global"]) + self.model.head(features, groups["own"])

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """w_g, and the sum of both heads."""
        personal = self.personalized(groups, x)
        return Prediction(self.model.plain(x, groups["global"]), personal, local=personal)

    def _head_step(self) -> Step:
        """A step of the own head on the loss of the sum."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            return self.objective.loss(self.personalized(groups, minibatch.x), minibatch.y, minibatch.mask)

        return self.personal_step(Step("own", loss))

    def _count(self, groups: Groups, examples: Minibatch) -> Groups:
        """The logarithms of the classes' shares in the client's training examples (or tokens)."""
        first = next(pieces(examples))
        outputs = self.model.plain(first.x, groups["global"])
        counted = self.objective.counted(examples.y, examples.mask).flatten()
        labels = examples.y.flatten().masked_fill(~counted, 0)
        counts = outputs.new_zeros(outputs.shape[-1], dtype=torch.float32)
        counts = counts.scatter_add(0, labels, counted.float())
        shares = counts / counts.sum().clamp_min(1.0)
        return {"classes": {"log": shares.clamp_min(SMALLEST).log()}}
