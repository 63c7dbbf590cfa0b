"""APFL: Deng, Kamani, Mahdavi, Adaptive Personalized Federated Learning (arXiv 2003.13461, 2020)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_share


class APFL(Method):
    """Keeps a model v on every client; its personal model is alpha v + (1 - alpha) w (Algorithm 1).

    On every minibatch v takes a step on f(alpha v + (1 - alpha) w) and w one on f(w), both from their values
    before it, as in the paper. In a round, the mixture's w is the client's current copy of w_g. In evaluation it is the
    received w_g, which stays fixed while v adapts to it: the prediction mixes v with the server's model, as in the
    paper's analysis.

    Stateful: a client keeps v and, if adaptive, alpha. A client that has not been sampled yet has v = w_g
    and the alpha given here.

    Args:
        alpha: share of v, 0 to 1 (published by Flow's authors for this baseline: 0.25). 0 is FedAvg, and v never
            changes; 1 trains only v.
        adaptive: whether every client learns its own alpha, starting from `alpha`: before each step of v, alpha takes
            one on the same loss, with the same optimizer and learning rate, and is clamped to 0 to 1.
        personal_lr_scale: factor on the client optimizer's learning rate for v, and for alpha.
    """

    private = MappingProxyType({"personal": "personal"})

    def __init__(
        self,
        alpha: float = 0.25,
        adaptive: bool = False,
        personal_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(personal_lr_scale)
        require_share(alpha=alpha)
        self.alpha = alpha
        self.adaptive = adaptive
        if adaptive:
            self.private = MappingProxyType({**self.private, "mixing": "mixing"})

    def start(self, server: Groups) -> Groups:
        """Return w_g, v as a copy of it, and alpha."""
        some = next(iter(server["global"].values()))
        alpha = torch.full((), self.alpha, dtype=some.dtype, device=some.device)
        return {**server, "personal": server["global"], "mixing": {"alpha": alpha}}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Take the steps of alpha, v and w on every minibatch; w last, so that the others see it unchanged."""
        return (Phase("all", (*self._personal_steps(), self.train_step("global"))),)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Take the steps of alpha and v only."""
        return (Phase("all", self._personal_steps()),)

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the mixture of v and w."""
        return self._mixture(groups)

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the mixture; v is the client's local model."""
        return Prediction(
            generalized=self.model.plain(x, groups["global"]),
            personalized=self.personalized(groups, x),
            local=self.model.plain(x, groups["personal"]),
        )

    def _personal_steps(self) -> tuple[Step, ...]:
        """Create the steps on the mixture's loss: of alpha if it is adaptive, and of v."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            return self.loss(minibatch, self._mixture(groups))

        mixing = (Step("mixing", loss, bounds=(0.0, 1.0)),) if self.adaptive else ()
        return tuple(map(self.personal_step, (*mixing, Step("personal", loss))))

    @staticmethod
    def _mixture(groups: Groups) -> Parameters:
        """Compute the parameters alpha v + (1 - alpha) w."""
        alpha = groups["mixing"]["alpha"]
        return {name: w.lerp(groups["personal"][name], alpha) for name, w in groups["global"].items()}
