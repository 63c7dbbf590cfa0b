"""LG-FedAvg: Liang et al., Think Locally, Act Globally (NeurIPS 2019 workshop, arXiv 2001.01523)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from flow_pl.methods.base import Method
from flow_pl.methods.fedavg import FedAvg
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.steps import Derive, Phase
from flow_pl.utils.groups import Groups
from flow_pl.utils.validation import require_count


class LGFedAvg(BodyAndHead):
    """Keeps a body (local representation) on each client and shares the head among all (Algorithm 1).

    In a round a client trains all parameters together, from its own body and the head it received, and sends the
    head. Stateful: a client keeps its body, including embedding tables. The personal model is the client's own body
    and the server's head, trained further as in a round.

    The authors start from a model trained by FedAvg; so does a run with `pretrain_rounds`, which run FedAvg, with all
    parameters sent and nothing kept. They count among the run's rounds, so the budget stays that of the other
    methods. The server's body is not trained outside of these rounds: *generalized* accuracy is that
    of a head on a body it was not trained with, and has little meaning. A client not sampled since then starts from
    that body.

    Args:
        head_blocks: how many of the last blocks with parameters are the head, or the names of the submodules
            that are.
        personal_lr_scale: factor on the client optimizer's learning rate when a client is evaluated; in a round body
            and head are trained together.
        pretrain_rounds: number of initial rounds that run FedAvg.
    """

    shared = MappingProxyType({"global": "head"})
    private = MappingProxyType({"body": "body"})
    training_only = (*BodyAndHead.training_only, "_pretraining")

    def __init__(
        self, head_blocks: int | Sequence[str] = 1, personal_lr_scale: float = 1.0, pretrain_rounds: int = 0
    ) -> None:
        super().__init__(head_blocks, personal_lr_scale)
        require_count(0, pretrain_rounds=pretrain_rounds)
        self.pretrain_rounds = pretrain_rounds

    def plan(self) -> None:
        """Also plan the first rounds."""
        super().plan()
        self._pretraining = FedAvg().bind(self.modules["global"], self.objective)

    def in_round(self, number: int, server: Groups) -> Method:
        """Return FedAvg in the first rounds."""
        return self._pretraining if number < self.pretrain_rounds else self

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train the whole model."""
        return self.train_jointly(self.train_step("model"))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Do the same as in a round."""
        return self.train_jointly(self.personal_step(self.train_step("model")))
