"""FedAvg-FT: FedAvg, and fine-tuning for every client."""

from __future__ import annotations

from torch import Tensor

from flow_pl.methods.base import Derive, Method, Phase, Prediction
from flow_pl.routing import Groups


class FineTuning(Method):
    """Trains as FedAvg; the personal model is w_g fine-tuned on all of the client's data. Stateless.

    Args:
        local_epochs: epochs over a client's data in a round (E).
        personal_epochs: epochs of fine-tuning; None for `local_epochs`.
    """

    def start(self, server: Groups) -> Groups:
        """w_g, and a local model born from it."""
        return {**server, "local": self.model.local_copy(server["global"])}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Epochs over all the data, on w_g."""
        return (Phase("all", self.local_epochs, (self.train_step("global"),)),)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Epochs over all the data, on the local model."""
        return (Phase("all", self.personal_epochs, (self.train_step("local"),)),)

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """The fine-tuned model is the personalized one."""
        local = self.model.plain(x, groups["global"], groups["local"])
        return Prediction(self.model.plain(x, groups["global"]), local, local=local)
