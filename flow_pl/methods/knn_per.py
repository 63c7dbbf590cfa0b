"""kNN-Per: Marfoq et al., Personalized Federated Learning through Local Memorization (ICML 2022)."""

from __future__ import annotations

from flow_pl.methods.base import Prediction
from flow_pl.methods.fedavg import FedAvg
from flow_pl.methods.parts.local_memory import LocalMemory
from flow_pl.methods.steps import Derive, Phase
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs


class KNNPer(FedAvg):
    """Trains as FedAvg; in evaluation the client's training examples vote beside w_g. Stateless.

    p = neighbour_weight * p_kNN + (1 - neighbour_weight) * p_w_g; see `LocalMemory` for p_kNN and what it costs.

    Args:
        neighbours: number of stored examples that vote (k); all of them if a client has fewer.
        neighbour_weight: share of the neighbours in the mixture (lambda), 0 to 1; 0 is FedAvg.

    Raises:
        ConfigurationError: `neighbours` or `neighbour_weight` is out of range.
    """

    def __init__(self, neighbours: int = 10, neighbour_weight: float = 0.4) -> None:
        self.memory = LocalMemory(neighbours, neighbour_weight)
        self.needs = "features" if neighbour_weight else "outputs"

    def prepare(self) -> None:
        """Bind the memory to the model and the task.

        Raises:
            ConfigurationError: the task is multi-label, so a neighbour has no single label to vote for.
        """
        self.memory = self.memory.bind(self.model, self.objective)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Store the client's training examples, unless they have no share."""
        return self.memory.stages()

    def personal(self, groups: Groups) -> Parameters | None:
        """Return w_g if no neighbour votes."""
        return None if self.memory.share else groups["global"]

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the neighbours' vote, as the local model, mixed with w_g; w_g alone if nothing is stored."""
        outputs = self.model.plain(x, groups["global"])
        mixture, votes = self.memory.mix(groups, x, outputs)
        return Prediction(outputs, mixture, local=votes if self.memory.share else None)
