"""FedAvg-FT: FedAvg, and fine-tuning for every client."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flow_pl.methods.base import Derive, Method, Part, Phase, Prediction
from flow_pl.utils.groups import Groups
from flow_pl.utils.validation import require_positive


class FineTuning(Method):
    """Trains as FedAvg; the personal model is w_g fine-tuned on all of the client's data. Stateless.

    Args:
        local_epochs: epochs over a client's data in a round (E).
        personal_epochs: epochs of fine-tuning; None for `local_epochs`.
        personal_lr_scale: factor on the client optimizer's learning rate for fine-tuning.
    """

    def __init__(
        self, local_epochs: int = 3, personal_epochs: int | None = None, personal_lr_scale: float = 1.0
    ) -> None:
        super().__init__(local_epochs, personal_epochs)
        require_positive(personal_lr_scale=personal_lr_scale)
        self.personal_lr_scale = personal_lr_scale

    def start(self, server: Groups) -> Groups:
        """w_g, and a local model born from it."""
        return {**server, "local": self.model.local_copy(server["global"])}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Epochs over all the data, on w_g."""
        return (Phase("all", self.local_epochs, (self.train_step("global"),)),)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Epochs over all the data, on the local model."""
        return (self.fine_tune("all", "local"),)

    def fine_tune(self, part: Part, group: str) -> Phase:
        """Epochs over a part of the data, on a model born from w_g."""
        step = replace(self.train_step(group), lr_scale=self.personal_lr_scale)
        return Phase(part, self.personal_epochs, (step,))

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """The fine-tuned model is the personalized one."""
        local = self.model.plain(x, groups["global"], groups["local"])
        return Prediction(self.model.plain(x, groups["global"]), local, local=local)
