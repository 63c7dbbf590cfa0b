"""Interpolation: Wortsman et al., Robust fine-tuning of zero-shot models (CVPR 2022; WiSE-FT), per client."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flow_pl.methods.base import Derive, Minibatch, Phase, Prediction
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.utils.groups import Groups
from flow_pl.utils.validation import require_choice, require_share

GRID = 11
"""Candidates for a chosen alpha: 0, 0.1, ..., 1."""


class Interpolation(FineTuning):
    """A fixed mixture of w_g and the fine-tuned model: the control for every routing claim, as it has no router.

    Trains as FedAvg. The personal model is (1 - alpha) w_g + alpha * fine-tuned, in weights or in probabilities.

    Args:
        local_epochs: epochs over a client's data in a round (E).
        personal_epochs: epochs of fine-tuning; None for `local_epochs`.
        alpha: share of the fine-tuned model, 0 to 1, or "chosen": each client picks the value of 0, 0.1, ..., 1 that
            has the lowest loss on the global half of its data for a model fine-tuned on the local half.
        average: what is averaged.
        personal_lr_scale: factor on the client optimizer's learning rate for fine-tuning.
    """

    def __init__(
        self,
        local_epochs: int = 3,
        personal_epochs: int | None = None,
        alpha: float | Literal["chosen"] = 0.5,
        average: Literal["weights", "probabilities"] = "weights",
        personal_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(local_epochs, personal_epochs, personal_lr_scale)
        if isinstance(alpha, str):
            require_choice(("chosen",), alpha=alpha)
        else:
            require_share(alpha=alpha)
        require_choice(("weights", "probabilities"), average=average)
        self.alpha = alpha
        self.average = average

    def start(self, server: Groups) -> Groups:
        """As FineTuning; where alpha is chosen, also a probe that is fine-tuned on half of the data."""
        groups = super().start(server)
        if self.alpha == "chosen":
            groups["probe"] = dict(groups["local"])
        return groups

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Fine-tunes; where alpha is chosen, first fine-tunes the probe and compares the candidates."""
        if self.alpha != "chosen":
            return super().personalization()
        return (self.fine_tune("local", "probe"), Derive("global", self._choose_alpha), *super().personalization())

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """The average of w_g and the fine-tuned model."""
        tuned = super().predict(groups, x)
        alpha = groups["alpha"]["alpha"] if isinstance(self.alpha, str) else self.alpha
        return Prediction(tuned.generalized, self._mixed(groups, x, "local", alpha), local=tuned.local)

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
