"""FedAvg-FT: FedAvg, followed by fine-tuning on every client."""

from __future__ import annotations

from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.steps import Derive, Part, Phase
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs


class FineTuning(Method):
    """Trains as FedAvg; the personal model is w_g fine-tuned on all of the client's data. Stateless.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for fine-tuning.
    """

    def start(self, server: Groups) -> Groups:
        """Return w_g, and a local model initialized from it."""
        return {**server, "local": self.model.local_copy(server["global"])}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w_g on all the data."""
        return (Phase("all", (self.train_step("global"),)),)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Fine-tune the local model on all the data."""
        return (self.fine_tune("all", "local"),)

    def fine_tune(self, part: Part, group: str) -> Phase:
        """Fine-tune a model initialized from w_g on a part of the data."""
        return Phase(part, (self.personal_step(self.train_step(group)),))

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the fine-tuned model."""
        return {**groups["global"], **groups["local"]}

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the fine-tuned model as the personalized one."""
        local = self.model.plain(x, {**groups["global"], **groups["local"]})
        return Prediction(self.model.plain(x, groups["global"]), local, local=local)
