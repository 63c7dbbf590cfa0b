"""Local training without communication."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from flow_pl.methods.base import Prediction
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.steps import Derive, Phase
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_count


class Local(FineTuning):
    """Trains a model on each client alone; nothing is sent and the server's model never changes.

    A client's model depends only on the common initial weights and its own data, so it is trained when it is
    evaluated, not round by round: `epochs` is the whole budget, to be compared with rounds x cohort / population x
    epochs of a federated method. Rounds of `fit` change nothing; one is enough.

    Args:
        epochs: total epochs of a client's training.
        personal_lr_scale: factor on the client optimizer's learning rate.

    Raises:
        ConfigurationError: a value is not positive.
    """

    shared = MappingProxyType[str, str]({})

    def __init__(self, epochs: int = 30, personal_lr_scale: float = 1.0) -> None:
        super().__init__(personal_lr_scale)
        require_count(epochs=epochs)
        self.epochs = epochs

    def start(self, server: Groups) -> Groups:
        """Return the server's model, and the client's own, including embedding tables."""
        return {**server, "local": server["global"]}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Return no phases: there is no communication."""
        return ()

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Train the client's model for the whole budget."""
        return (replace(self.fine_tune("all", "local"), epochs=self.epochs),)

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the client's own model. The server's is never trained."""
        predicted = super().predict(groups, x)
        return Prediction(predicted.generalized, predicted.personalized)
