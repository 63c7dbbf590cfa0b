"""Interpolation: Wortsman et al., Robust fine-tuning of zero-shot models (CVPR 2022; WiSE-FT), per client."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from flow_pl.methods.base import Prediction
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.parts.local_memory import LocalMemory
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_choice, require_share

GRID = 11
"""Candidates for a chosen alpha: 0, 0.1, ..., 1."""


class Interpolation(FineTuning):
    """Mixes w_g and the fine-tuned model in fixed shares: the control for every routing claim, as it has no router.

    Trains as FedAvg. The personal model is (1 - alpha) w_g + alpha * fine-tuned, in weights or in probabilities. With a
    `neighbour_weight` the client's nearest training examples vote beside it, as in kNN-Per: the control for routing
    between w_g, the fine-tuned model and the client's memory. Stateless.

    Args:
        alpha: share of the fine-tuned model, 0 to 1. Or each client finds its own by the loss, on the global half of
            its data, of the average with a model fine-tuned on the local half: "chosen", the best of 0, 0.1, ..., 1, or
            "learned", by `personal_epochs` of the client optimizer's steps from 0.5, within 0 to 1.
        average: whether weights or probabilities are averaged.
        personal_lr_scale: factor on the client optimizer's learning rate for fine-tuning.
        neighbours: number of stored training examples that vote (k); all of them if a client has fewer.
        neighbour_weight: share of the neighbours in the prediction, 0 to 1; 0 for no memory. If a client finds
            alpha itself, it does so without them.
    """

    scratch: ClassVar[tuple[str, ...]] = ("probe",)

    def __init__(
        self,
        alpha: float | Literal["chosen", "learned"] = 0.5,
        average: Literal["weights", "probabilities"] = "weights",
        personal_lr_scale: float = 1.0,
        neighbours: int = 10,
        neighbour_weight: float = 0.0,
    ) -> None:
        super().__init__(personal_lr_scale)
        if isinstance(alpha, str):
            require_choice(("chosen", "learned"), alpha=alpha)
        else:
            require_share(alpha=alpha)
        require_choice(("weights", "probabilities"), average=average)
        self.alpha = alpha
        self.average = average
        self.memory = LocalMemory(neighbours, neighbour_weight)
        self.needs = "features" if neighbour_weight else "outputs"

    def prepare(self) -> None:
        """Bind the memory to the model and the task.

        Raises:
            ConfigurationError: neighbours would vote in a multi-label task.
        """
        self.memory = self.memory.bind(self.model, self.objective)

    def start(self, server: Groups) -> Groups:
        """Start as FineTuning; if a client finds alpha, add alpha and a probe to fine-tune on half of the data."""
        groups = super().start(server)
        if isinstance(self.alpha, str):
            some = next(iter(server["global"].values()))
            groups["probe"] = dict(groups["local"])
            groups["alpha"] = {"alpha": torch.full((), 0.5, dtype=some.dtype, device=some.device)}
        return groups

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Fine-tune and store; if a client finds alpha, fine-tune the probe first and determine alpha with it."""
        stages = (*super().personalization(), *self.memory.stages())
        if not isinstance(self.alpha, str):
            return stages
        choose = Derive("global", self._choose_alpha)
        learn = Phase("global", (self._alpha_step(),))
        return (self.fine_tune("local", "probe"), choose if self.alpha == "chosen" else learn, *stages)

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the average of the weights; None if probabilities are averaged, or neighbours vote."""
        if self.average != "weights" or self.memory.share:
            return None
        return self._mean(groups, "local", self._alpha(groups))

    def personalized(self, groups: Groups, x: Inputs) -> Tensor:
        """Compute the outputs of the average of w_g and the fine-tuned model, mixed with the neighbours' vote."""
        return self._voted(groups, x)[0]

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the average of w_g and the fine-tuned model, and the neighbours' vote if they have a share."""
        tuned = super().predict(groups, x)
        personalized, votes = self._voted(groups, x)
        memory = votes if self.memory.share else None
        return Prediction(tuned.generalized, personalized, local=tuned.local, memory=memory)

    def _voted(self, groups: Groups, x: Inputs) -> tuple[Tensor, Tensor]:
        """Compute the outputs of the average mixed with the neighbours' vote, and of the neighbours alone."""
        return self.memory.mix(groups, x, self._mixed(groups, x, "local", self._alpha(groups)))

    def _alpha_step(self) -> Step:
        """Create a step of alpha on the loss of the average with the probe."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            mixture = self._mixed(groups, minibatch.x, "probe", groups["alpha"]["alpha"])
            return self.objective.loss(mixture, minibatch.y, minibatch.mask)

        return Step("alpha", loss, bounds=(0.0, 1.0))

    def _alpha(self, groups: Groups) -> float | Tensor:
        """Return the share of the fine-tuned model."""
        return groups["alpha"]["alpha"] if isinstance(self.alpha, str) else self.alpha

    @staticmethod
    def _mean(groups: Groups, other: str, alpha: float | Tensor) -> Parameters:
        """Average the weights of w_g and of another group."""
        w = groups["global"]
        return {**w, **{name: w[name].lerp(p, torch.as_tensor(alpha).to(p)) for name, p in groups[other].items()}}

    def _mixed(self, groups: Groups, x: Inputs, other: str, alpha: float | Tensor) -> Tensor:
        """Compute the outputs of the average of w_g and another group, in weights or in probabilities."""
        if self.average == "weights":
            return self.model.plain(x, self._mean(groups, other, alpha))
        base = self.objective.probabilities(self.model.plain(x, groups["global"]))
        tuned = self.objective.probabilities(self.model.plain(x, groups["global"], groups[other]))
        return self.objective.outputs((1 - alpha) * base + alpha * tuned)

    def _choose_alpha(self, groups: Groups, examples: Minibatch) -> Groups:
        """Choose the candidate with the lowest loss on data that the probe has not seen."""
        grid = [i / (GRID - 1) for i in range(GRID)]
        losses = torch.stack(
            [
                self.objective.loss(self._mixed(groups, examples.x, "probe", alpha), examples.y, examples.mask)
                for alpha in grid
            ]
        )
        return {"alpha": {"alpha": losses.argmin() / (GRID - 1)}}
