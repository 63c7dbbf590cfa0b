"""FedProx: Li et al., Federated Optimization in Heterogeneous Networks (MLSys 2020)."""

from __future__ import annotations

from torch import Tensor

from flow_pl.methods.fedavg import FedAvg
from flow_pl.methods.parts.regularizers import half_squared_distance
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups
from flow_pl.utils.validation import require_at_least_zero


class FedProx(FedAvg):
    """Adds to FedAvg a proximal term that keeps w close to the w_g a client received (Algorithm 2).

    Sends w. Stateless. There is no personal model. The paper also varies the work of a client; here every client
    trains for the same number of epochs.

    Args:
        mu: weight of the proximal term, mu / 2 * ||w - w_g||^2 (published: 0.001 to 1, by data set); 0 is FedAvg.

    Raises:
        ConfigurationError: `mu` is negative.
    """

    def __init__(self, mu: float = 0.01) -> None:
        super().__init__()
        require_at_least_zero(mu=mu)
        self.mu = mu

    def start(self, server: Groups) -> Groups:
        """Return w_g, to be trained and as received."""
        return {**server, "received": server["global"]}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w_g with the proximal term on all the data."""
        mu = self.mu  # fixed now: a traced step could not follow a change

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            distance = half_squared_distance(groups["global"], groups["received"])
            return self.loss(minibatch, groups["global"]) + mu * distance

        return (Phase("all", (Step("global", loss),)),)
