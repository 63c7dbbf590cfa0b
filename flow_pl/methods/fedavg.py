"""FedAvg: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS 2017)."""

from __future__ import annotations

from flow_pl.methods.base import Method
from flow_pl.methods.steps import Derive, Phase
from flow_pl.utils.groups import Groups, Parameters


class FedAvg(Method):
    """Trains w_g for E epochs on all of a client's data and sends it. There is no personal model."""

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w_g on all the data."""
        return (Phase("all", (self.train_step("global"),)),)

    def personal(self, groups: Groups) -> Parameters | None:
        """Return w_g."""
        return groups["global"]
