"""Evidence routing: routes between a client's three models by their confidence; trained on held-out examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from flow_pl.kernels.functional import call
from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.evidence import (
    EVIDENCE,
    EXPERTS,
    EvidenceRouter,
    EvidenceStatistics,
    add_to_statistics,
    evidence,
    halves,
    standardize,
)
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.parts.local_memory import LocalMemory
from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.steps import Derive, Minibatch, Part, Phase, Step
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import Inputs, first
from flow_pl.utils.validation import (
    require_at_least_zero,
    require_choice,
    require_count,
    require_counts,
    require_fraction,
    require_positive,
    require_share,
    require_some,
)

HALVES: tuple[tuple[Part, str], ...] = (("local", "first"), ("global", "second"))
"""The two halves of a client's data, each with the group of the local model that is trained on it."""

LEAST = 1e-8
"""Smallest probability in the loss, which bounds the gradient of an instance that all experts get wrong."""


class EvidenceFlow(FineTuning):
    """Weights three models for every instance: w_g, the client's local model and the vote of its nearest examples.

    The router sees evidence (confidences, agreement, distances), not the instance. Its shares start as those of a fixed
    mixture, (1 - neighbour_weight) * (1 - alpha), (1 - neighbour_weight) * alpha and neighbour_weight, which is
    `Interpolation` of probabilities with neighbours, and it learns corrections to them. The prediction is the sum
    of the models' probabilities weighted by these shares.

    w_g trains as in FedAvg. The router learns from examples that its experts have not seen: in a round a client splits
    its data into halves, trains a local model from the received w_g on one, and evaluates the examples of the other by
    this model and a memory of the first half only (`cross_fit`: both directions, or alternating by round). A client
    with a single example does not train the router. The local model that predicts is fine-tuned on all the data, and
    the memory holds all of it. The router takes no steps when a client is personalized, so a new client needs nothing
    beyond its own local model and memory.

    Sends w_g, the router and running statistics of the evidence. Stateless.

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the local models.
        alpha: initial share of the local model beside w_g, 0 to 1.
        neighbours: number of stored training examples that vote (k); all of them if a client has fewer.
        neighbour_weight: initial share of the memory, 0 to 1; 0 for no memory.
        hidden: widths of the router's hidden layers.
        dropout: share of the router's hidden units dropped in training.
        cross_fit: "both" halves are evaluated in each round, or they "alternate" from round to round, at half the cost.
        router_epochs: epochs of the router over the evaluated examples in a round.
        router_lr: learning rate of the router's AdamW: with Adam's weight decay, a weight whose gradient is zero
            would decay by whole steps.
        router_weight_decay: weight decay of the router's AdamW.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    shared = MappingProxyType({"global": "global", "router": "router", "statistics": "statistics"})
    participation = "participation"
    needs = "head"
    training_only = (*FineTuning.training_only, "_in_odd_rounds")

    def __init__(
        self,
        personal_lr_scale: float = 1.0,
        alpha: float = 0.5,
        neighbours: int = 10,
        neighbour_weight: float = 0.4,
        hidden: Sequence[int] = (32, 32),
        dropout: float = 0.2,
        cross_fit: Literal["both", "alternate"] = "alternate",
        router_epochs: int = 1,
        router_lr: float = 0.003,
        router_weight_decay: float = 0.0001,
    ) -> None:
        super().__init__(personal_lr_scale)
        require_share(alpha=alpha)
        require_counts(hidden=hidden)
        require_some(hidden=hidden)
        require_fraction(dropout=dropout)
        require_choice(("both", "alternate"), cross_fit=cross_fit)
        require_count(router_epochs=router_epochs)
        require_positive(router_lr=router_lr)
        require_at_least_zero(router_weight_decay=router_weight_decay)
        self.memory = LocalMemory(neighbours, neighbour_weight)
        self.shares = ((1 - neighbour_weight) * (1 - alpha), (1 - neighbour_weight) * alpha, neighbour_weight)
        self.hidden = tuple(hidden)
        self.dropout = dropout
        self.cross_fit = cross_fit
        self.router_epochs = router_epochs
        self.router_lr = router_lr
        self.router_weight_decay = router_weight_decay

    def server_modules(self) -> dict[str, nn.Module]:
        """Return the router and the statistics of its inputs."""
        self.router = EvidenceRouter(self.hidden, self.dropout)
        return {"router": self.router, "statistics": EvidenceStatistics()}

    def prepare(self) -> None:
        """Bind the memory to the model and the task.

        Raises:
            ConfigurationError: the experts choose no single class.
        """
        self.objective.require_one_class(
            f"{type(self).__name__} weights models by the class they choose: use another method, such as Interpolation "
            "or Flow."
        )
        self.memory = self.memory.bind(self.model, self.objective)

    def plan(self) -> None:
        """Also plan the rounds in which the other half is evaluated."""
        super().plan()
        self._in_odd_rounds = copy.copy(self)
        if self.cross_fit == "alternate":
            self._in_odd_rounds.phases = self._training((0,))

    def in_round(self, number: int) -> Method:
        """Evaluate the second half in even rounds and the first in odd rounds, or both in each."""
        return self._in_odd_rounds if number % 2 else self

    def start(self, server: Groups) -> Groups:
        """Return w_g as received and to be trained, and local models of the whole and of the halves, copied from it."""
        local = self.model.local_copy(server["global"])
        return {**server, "received": server["global"], "local": local, "first": dict(local), "second": dict(local)}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w_g as FedAvg and a local model on one half; collect evidence on the other to train the router."""
        return self._training((0, 1) if self.cross_fit == "both" else (1,))

    def _training(self, judged: tuple[int, ...]) -> tuple[Phase | Derive, ...]:
        """Create a round in which one or both of the halves are evaluated."""
        trained = [HALVES[1 - half] for half in judged]
        part = "all" if len(judged) == len(HALVES) else HALVES[judged[0]][0]
        return (
            *super().training(),
            *(Phase(half, (self._half_step(group),), "personal") for half, group in trained),
            Derive("local", lambda groups, examples: {"half": {"first": examples.mask}}),
            Derive("all", partial(self._collect, judged)),
            Phase(part, (self._router_step(),), self.router_epochs, examples="evidence"),
        )

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Train the local model and fill the memory, on all the data."""
        return (*super().personalization(), *self.memory.stages())

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the experts' probabilities, weighted by each instance's shares."""
        features = self.model.features(x, groups["global"])
        outputs, probabilities, rows = self._consult(groups, x, features)
        shares = self._shares(groups, standardize(rows, groups["statistics"]))
        pooled = (torch.stack(probabilities, dim=-1) * shares.unsqueeze(-2)).sum(-1)
        return Prediction(
            generalized=outputs[0],
            personalized=self.objective.outputs(pooled),
            local=outputs[1],
            memory=self.objective.outputs(probabilities[2]) if self.memory.share else None,
        )

    def _consult(
        self, groups: Groups, x: Inputs, features: Tensor
    ) -> tuple[tuple[Tensor, Tensor], list[Tensor], Tensor]:
        """Evaluate the experts on instances.

        Args:
            groups: w_g, the local model and, if it has a share, the memory.
            x: instances [N, ...].
            features: inputs of w_g's last block with parameters for these instances.

        Returns:
            Outputs of both models, probabilities of the three experts [N, *P, classes], and evidence [N, *P, F].
        """
        outputs = (
            self.model.head(features, groups["global"]),
            self.model.plain(x, groups["global"], groups["local"]),
        )
        on_global, on_local = (self.objective.probabilities(each) for each in outputs)
        _, alpha, memory = self.shares
        # if nothing is stored, the models' shares keep their ratio
        models = on_global.lerp(on_local, alpha / (1 - memory) if memory < 1 else 0.5)
        if self.memory.share:
            votes, distances = self.memory.votes(groups["memory"], features, models)
        else:
            votes, distances = models, models.new_zeros(*models.shape[:-1], 2)
        probabilities = [on_global, on_local, votes]
        return outputs, probabilities, evidence(probabilities, distances)

    def _shares(self, groups: Groups, rows: Tensor) -> Tensor:
        """Compute the shares of the experts [..., 3] from standardized evidence [..., F]."""
        correction: Tensor = call(self.router, groups["router"], (rows,))
        start = torch.tensor(self.shares, dtype=correction.dtype, device=correction.device)
        return (correction + start.log()).softmax(-1)

    def _half_step(self, group: str) -> Step:
        """Create a step of a half's local model; embedding tables are those received, not those of the client's w_g."""
        return self.personal_step(
            Step(group, lambda groups, minibatch: self.loss(minibatch, groups["received"], groups[group]))
        )

    def _collect(self, judged: tuple[int, ...], groups: Groups, examples: Minibatch) -> Groups:
        """Collect evidence from the other half's models, each expert's target probability, and statistics."""
        parts, place = halves(examples, groups["half"]["first"])
        w_g = groups["received"]
        features = [[self.model.features(piece.x, w_g) for piece in pieces(part)] for part in parts]
        rows, targets, counted = [], [], []
        for i in range(len(HALVES)):
            if i not in judged:  # its rows are present but have no weight
                labels = parts[i].y
                rows.append(labels.new_zeros(*labels.shape, len(EVIDENCE), dtype=torch.float32))
                targets.append(labels.new_zeros(*labels.shape, len(EXPERTS), dtype=torch.float32))
                counted.append(torch.zeros_like(labels, dtype=torch.bool))
                continue
            memory = self.memory.store(torch.cat(features[1 - i]), parts[1 - i])
            views = {"global": w_g, "local": groups[HALVES[1 - i][1]], "memory": memory}
            for piece, seen in zip(pieces(parts[i]), features[i], strict=True):
                _, probabilities, found = self._consult(views, piece.x, seen)
                rows.append(found)
                target = piece.y.clamp_min(0).unsqueeze(-1)
                targets.append(torch.cat([p.gather(-1, target) for p in probabilities], dim=-1))
                counted.append(self.objective.in_loss(piece.y, piece.mask))
        # a single example is in both halves
        real = torch.cat(counted) & (examples.mask.sum() > 1)
        statistics, own = add_to_statistics(groups["statistics"], torch.cat(rows), real)
        found = standardize(torch.cat(rows), groups["statistics"], own)
        known = torch.cat([torch.cat(targets), real.unsqueeze(-1).to(found.dtype)], dim=-1)
        some = real.any().to(found.dtype)
        return {
            "statistics": statistics,
            "evidence": {"x": found[place], "y": known[place]},
            "participation": {"router": some, "statistics": some},
            "half": {},
        }

    def _router_step(self) -> Step:
        """Create a step on the negative log likelihood of the pooled prediction, over collected evidence."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            *_, counted = minibatch.y.unbind(-1)
            shares = self._shares(groups, first(minibatch.x))
            likelihood = (shares * minibatch.y[..., : len(EXPERTS)]).sum(-1)
            mask = minibatch.mask.view(-1, *[1] * (counted.ndim - 1))
            weight = counted * mask
            return -(likelihood.clamp_min(LEAST).log() * weight).sum() / weight.sum().clamp_min(1.0)

        adam = partial(torch.optim.AdamW, lr=self.router_lr, weight_decay=self.router_weight_decay)
        return Step("router", loss, optimizer=adam)
