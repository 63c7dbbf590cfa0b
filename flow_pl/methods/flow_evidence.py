"""Evidence routing: a router between three models of a client, by how sure they are, trained on unseen examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.kernels.functional import call
from flow_pl.methods.base import Derive, Minibatch, Phase, Prediction, Step
from flow_pl.methods.evidence import (
    EXPERTS,
    EvidenceRouter,
    EvidenceStatistics,
    add_to_statistics,
    evidence,
    halves,
    standardise,
)
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.parts.local_memory import LocalMemory
from flow_pl.methods.parts.pieces import pieces
from flow_pl.utils.groups import Groups
from flow_pl.utils.validation import (
    require_at_least_zero,
    require_count,
    require_counts,
    require_fraction,
    require_positive,
    require_share,
    require_some,
)

LEAST = 1e-8
"""Probability below which an instance that all experts get wrong pulls no harder on the router."""


class EvidenceFlow(FineTuning):
    """For every instance a router weighs three models: w_g, the client's local model and its nearest examples' vote.

    The router sees evidence (confidences, agreement, distances), not the instance. Its shares start as those of a fixed
    mixture, (1 - neighbour_weight) * (1 - alpha), (1 - neighbour_weight) * alpha and neighbour_weight, which is
    `Interpolation` of probabilities with neighbours, and it learns what to change about them. The prediction is the sum
    of the models' probabilities by these shares.

    w_g trains as in FedAvg. The router learns from examples that its experts have not seen: in a round a client cuts
    its data in two, trains a local model from the received w_g on each half, and each half of the data is judged by the
    model and the memory of the other half. A client with a single example does not train the router. The local model
    that predicts is fine-tuned on all the data, and the memory holds all of it. The router takes no steps when a client
    is personalized, so a new client needs nothing but its own local model and memory.

    Sends w_g, the router and running statistics of the evidence; keeps nothing.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the local models.
        alpha: share of the local model beside w_g before anything is learned, 0 to 1.
        neighbours: stored training examples that have a vote (k); where a client has fewer, all of them.
        neighbour_weight: share of the memory before anything is learned, 0 to 1; 0 for no memory.
        hidden: widths of the router's hidden layers.
        dropout: share of the router's hidden units dropped in training.
        router_epochs: epochs of the router over a client's data in a round.
        router_lr: learning rate of the router's AdamW: with Adam's weight decay, a weight whose gradient is zero
            would decay by whole steps.
        router_weight_decay: its weight decay.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    shared = MappingProxyType({"global": "global", "router": "router", "statistics": "statistics"})
    participation = "participation"

    def __init__(
        self,
        personal_lr_scale: float = 1.0,
        alpha: float = 0.5,
        neighbours: int = 10,
        neighbour_weight: float = 0.4,
        hidden: Sequence[int] = (32, 32),
        dropout: float = 0.2,
        router_epochs: int = 1,
        router_lr: float = 0.001,
        router_weight_decay: float = 0.0001,
    ) -> None:
        super().__init__(personal_lr_scale)
        require_share(alpha=alpha)
        require_counts(hidden=hidden)
        require_some(hidden=hidden)
        require_fraction(dropout=dropout)
        require_count(router_epochs=router_epochs)
        require_positive(router_lr=router_lr)
        require_at_least_zero(router_weight_decay=router_weight_decay)
        self.memory = LocalMemory(neighbours, neighbour_weight)
        self.shares = ((1 - neighbour_weight) * (1 - alpha), (1 - neighbour_weight) * alpha, neighbour_weight)
        self.hidden = tuple(hidden)
        self.dropout = dropout
        self.router_epochs = router_epochs
        self.router_lr = router_lr
        self.router_weight_decay = router_weight_decay

    def server_modules(self) -> dict[str, nn.Module]:
        """The router and the statistics of its inputs."""
        self.router = EvidenceRouter(self.hidden, self.dropout)
        return {"router": self.router, "statistics": EvidenceStatistics()}

    def prepare(self) -> None:
        """Give the memory the model and the task.

        Raises:
            ConfigurationError: the task has several labels, which leaves the experts no single choice.
        """
        if self.objective.several_labels:
            raise ConfigurationError(
                f"the task {type(self.objective).__name__} has several labels for an example, {type(self).__name__} "
                "weighs models by what they choose for it: use another method, such as Interpolation or Flow."
            )
        self.memory = self.memory.bind(self.model, self.objective)

    def start(self, server: Groups) -> Groups:
        """w_g as received and to be trained, local models of the whole and of the halves, born from it."""
        local = self.model.local_copy(server["global"])
        return {**server, "received": server["global"], "local": local, "first": dict(local), "second": dict(local)}

    def training(self) -> tuple[Phase | Derive, ...]:
        """w_g as FedAvg; a local model on each half; the evidence on the other one; and the router on that."""
        router = Phase("all", (self._router_step(),), self.router_epochs, examples="evidence")
        return (
            *super().training(),
            Phase("local", (self._half_step("first"),)),
            Phase("global", (self._half_step("second"),)),
            Derive("local", lambda groups, examples: {"half": {"first": examples.mask}}),
            Derive("all", self._collect),
            router,
        )

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """The local model and the memory, of all the data."""
        return (*super().personalization(), *self.memory.stages())

    def predict(self, groups: Groups, x: Tensor) -> Prediction:
        """The experts' probabilities, each instance's by shares of its own."""
        outputs, probabilities, rows = self._consult(groups, x)
        shares = self._shares(groups, standardise(rows, groups["statistics"]))
        pooled = (torch.stack(probabilities, dim=-1) * shares.unsqueeze(-2)).sum(-1)
        return Prediction(
            generalized=outputs[0],
            personalized=self.objective.outputs(pooled),
            local=outputs[1],
            memory=self.objective.outputs(probabilities[2]) if self.memory.share else None,
        )

    def _consult(self, groups: Groups, x: Tensor) -> tuple[tuple[Tensor, Tensor], list[Tensor], Tensor]:
        """Outputs of both models, probabilities of the three experts [N, *P, classes], and evidence [N, *P, F]."""
        outputs = self.model.plain(x, groups["global"]), self.model.plain(x, groups["global"], groups["local"])
        on_global, on_local = (self.objective.probabilities(each) for each in outputs)
        _, alpha, memory = self.shares
        # where nothing is stored, the shares of the models are as they are to each other
        models = on_global.lerp(on_local, alpha / (1 - memory) if memory < 1 else 0.5)
        votes, distances = self.memory.votes(groups, x, models)
        probabilities = [on_global, on_local, votes]
        return outputs, probabilities, evidence(probabilities, distances)

    def _shares(self, groups: Groups, rows: Tensor) -> Tensor:
        """Shares of the experts [..., 3] by standardised evidence [..., F]."""
        correction: Tensor = call(self.router, groups["router"], (rows,))
        start = torch.tensor(self.shares, dtype=correction.dtype, device=correction.device)
        return (correction + start.log()).softmax(-1)

    def _half_step(self, group: str) -> Step:
        """A step of a half's local model; embedding tables are the received ones, not those of the client's w_g."""
        return self.personal_step(
            Step(group, lambda groups, minibatch: self.loss(minibatch, groups["received"], groups[group]))
        )

    def _collect(self, groups: Groups, examples: Minibatch) -> Groups:
        """Evidence on every example by the other half's models, what each expert gives its target, and statistics."""
        parts, place = halves(examples, groups["half"]["first"])
        rows, targets, counted = [], [], []
        for part, other, model in ((parts[0], parts[1], "second"), (parts[1], parts[0], "first")):
            views = {"global": groups["received"], "local": groups[model]}
            views |= self.memory.store(views, other) if self.memory.share else {}
            for piece in pieces(part):
                _, probabilities, found = self._consult(views, piece.x)
                rows.append(found)
                target = piece.y.clamp_min(0).unsqueeze(-1)
                targets.append(torch.cat([p.gather(-1, target) for p in probabilities], dim=-1))
                counted.append(self.objective.in_loss(piece.y, piece.mask))
        # an example that is alone is in both halves
        real = torch.cat(counted) & (examples.mask.sum() > 1)
        statistics, own = add_to_statistics(groups["statistics"], torch.cat(rows), real)
        found = standardise(torch.cat(rows), groups["statistics"], own)
        known = torch.cat([torch.cat(targets), real.unsqueeze(-1).to(found.dtype)], dim=-1)
        some = real.any().to(found.dtype)
        return {
            "statistics": statistics,
            "evidence": {"x": found[place], "y": known[place]},
            "participation": {"router": some, "statistics": some},
            "half": {},
        }

    def _router_step(self) -> Step:
        """A step on the negative log likelihood of the pooled prediction, over collected evidence."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            *_, counted = minibatch.y.unbind(-1)
            shares = self._shares(groups, minibatch.x)
            likelihood = (shares * minibatch.y[..., : len(EXPERTS)]).sum(-1)
            mask = minibatch.mask.view(-1, *[1] * (counted.ndim - 1))
            weight = counted * mask
            return -(likelihood.clamp_min(LEAST).log() * weight).sum() / weight.sum().clamp_min(1.0)

        adam = partial(torch.optim.AdamW, lr=self.router_lr, weight_decay=self.router_weight_decay)
        return Step("router", loss, optimizer=adam)
