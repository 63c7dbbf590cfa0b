"""FedAvg: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS 2017)."""

from __future__ import annotations

from flow_pl.methods.base import Derive, Method, Phase
from flow_pl.utils.groups import Groups, Parameters


class FedAvg(Method):
    """E epochs from w_g on all of a client's data; sends w_g. There is no personal model."""

    def training(self) -> tuple[Phase | Derive, ...]:
        """Epochs over all the data, on w_g."""
        return (Phase("all", (self.train_step("global"),)),)

    def personal(self, groups: Groups) -> Parameters | None:
        """w_g."""
        return groups["global"]
