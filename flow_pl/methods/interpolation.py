"""Interpolation: Wortsman et al., Robust fine-tuning of zero-shot models (CVPR 2022; WiSE-FT), per client."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from flow_pl.errors import require_choice, require_share
from flow_pl.methods.base import Derive, Minibatch, Phase, Prediction, Step
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.memory import LocalMemory
from flow_pl.objective import Objective
from flow_pl.routing import Groups

GRID = 11
"""Candidates for a chosen alpha: 0, 0.1, ..., 1."""


class Interpolation(FineTuning):
    """A fixed mixture of w_g and the fine-tuned model: the control for every routing claim, as it has no router.

    Trains as FedAvg. The personal model is (1 - alpha) w_g + alpha * fine-tuned, in weights or in probabilities. With a
    `neighbour_weight` the client's nearest training examples vote beside it, as in kNN-Per: the control for routing
    between w_g, the fine-tuned model and the client's memory. Stateless.

    Args:
        local_epochs: epochs over a client's data in a round (E).
        personal_epochs: epochs of fine-tuning; None for `local_epochs`.
        alpha: share of the fine-tuned model, 0 to 1. Or each client finds its own, by the loss on the global half of
            its data of the average with a model fine-tuned on the local half: "chosen", the best of 0, 0.1, ..., 1, or
            "learned", by `personal_epochs` of the client optimizer's steps from 0.5, within 0 to 1.
        average: what is averaged.
        personal_lr_scale: factor on the client optimizer's learning rate for fine-tuning.
        neighbours: stored training examples that have a vote (k); where a client has fewer, all of them.
        neighbour_weight: share of the neighbours in the prediction, 0 to 1; 0 for no memory. Where a client finds
            alpha itself, it does so without them.
    """

    def __init__(
        self,
        local_epochs: int = 3,
        personal_epochs: int | None = None,
        alpha: float | Literal["chosen", "learned"] = 0.5,
        average: Literal["weights", "probabilities"] = "weights",
        personal_lr_scale: float = 1.0,
        neighbours: int = 10,
        neighbour_weight: float = 0.0,
    ) -> None:
        super().__init__(local_epochs, personal_epochs, personal_lr_scale)
        if isinstance(alpha, str):
            require_choice(("chosen", "learned"), alpha=alpha)
        else:
            require_share(alpha=alpha)
        require_choice(("weights", "probabilities"), average=average)
        self.alpha = alpha
        self.average = average
        self.memory = LocalMemory(neighbours, neighbour_weight)

    def bind(self, backbone: nn.Module, objective: Objective) -> dict[str, nn.Module]:
        """As `Method.bind`.

        Raises:
            ConfigurationError: neighbours are to vote where a task has several labels.
        """
        modules = super().bind(backbone, objective)
        self.memory.bind(self.model, objective)
        return modules

    def start(self, server: Groups) -> Groups:
        """As FineTuning; where a client finds alpha, also that and a probe, which is fine-tuned on half of the data."""
        groups = super().start(server)
        if isinstance(self.alpha, str):
            some = next(iter(server["global"].values()))
            groups["probe"] = dict(groups["local"])
            groups["alpha"] = {"alpha": torch.full((), 0.5, dtype=some.dtype, device=some.device)}
        return groups

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Fine-tunes and stores; where a client finds alpha, first fine-tunes the probe and compares with its help."""
        stages = (*super().personalization(), *self.memory.stages())
        if not isinstance(self.alpha, str):
            return stages
        choose = Derive("global", self._choose_alpha)
        learn = Phase("global", self.personal_epochs, (self._alpha_step(),))
        return (self.fine_tune("local", "probe"), choose if self.alpha == "chosen" else learn, *stages)

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """The average of w_g and the fine-tuned model, and the neighbours' vote where they have a share."""
        tuned = super().predict(groups, x)
        alpha = groups["alpha"]["alpha"] if isinstance(self.alpha, str) else self.alpha
        mixture, votes = self.memory.mix(groups, x, self._mixed(groups, x, "local", alpha))
        memory = votes if self.memory.share else None
        return Prediction(tuned.generalized, mixture, local=tuned.local, memory=memory)

    def _alpha_step(self) -> Step:
        """A step of alpha on the loss of the average with the probe."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            mixture = self._mixed(groups, minibatch.x, "probe", groups["alpha"]["alpha"])
            return self.objective.loss(mixture, minibatch.y, minibatch.mask)

        return Step("alpha", loss, bounds=(0.0, 1.0))

    def _mixed(self, groups: Groups, x: Tensor, other: str, alpha: float | Tensor) -> Tensor:
        """Outputs of the average of w_g and another group; of probabilities where these are averaged."""
        if self.average == "weights":
            mean = {
                name: groups["global"][name].lerp(p, torch.as_tensor(alpha).to(p)) for name, p in groups[other].items()
            }
            return self.model.plain(x, groups["global"], mean)
        base = self.objective.probabilities(self.model.plain(x, groups["global"]))
        tuned = self.objective.probabilities(self.model.plain(x, groups["global"], groups[other]))
        return self.objective.outputs((1 - alpha) * base + alpha * tuned)

    def _choose_alpha(self, groups: Groups, examples: Minibatch) -> Groups:
        """The candidate with the lowest loss on data that the probe has not seen."""
        grid = [i / (GRID - 1) for i in range(GRID)]
        losses = torch.stack(
            [
                self.objective.loss(self._mixed(groups, examples.x, "probe", alpha), examples.y, examples.mask)
                for alpha in grid
            ]
        )
        return {"alpha": {"alpha": losses.argmin() / (GRID - 1)}}
