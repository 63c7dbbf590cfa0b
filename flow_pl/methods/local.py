"""Local training without communication."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from flow_pl.methods.base import Derive, Phase, Prediction
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.routing import Groups


class Local(FineTuning):
    """Every client trains its own model alone; nothing is sent and the server's model never moves.

    A client's model depends on nothing but the common initial weights and its own data, so it is trained when it is
    evaluated, not round by round: `local_epochs` is the whole budget, to be compared with rounds x cohort /
    population x epochs of a federated method. Rounds of `fit` change nothing; one is enough.

    Args:
        local_epochs: epochs of a client's own training in all.
        personal_lr_scale: factor on the client optimizer's learning rate.
    """

    shared = MappingProxyType[str, str]({})

    def __init__(self, local_epochs: int = 30, personal_lr_scale: float = 1.0) -> None:
        super().__init__(local_epochs, personal_lr_scale=personal_lr_scale)

    def training(self) -> tuple[Phase | Derive, ...]:
        """Nothing: there is no communication."""
        return ()

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """The client's own model predicts. The server's is never trained."""
        predicted = super().predict(groups, x)
        return Prediction(predicted.generalized, predicted.personalized)
