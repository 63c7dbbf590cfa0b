"""Evidence routing: weighs what a client's three models say of a class by evidence; trained on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from flow_pl.kernels.functional import call
from flow_pl.methods.base import Prediction
from flow_pl.methods.evidence import EVIDENCE, OF_CLASS, Evidence, cut_fold, gather_evidence
from flow_pl.methods.evidence_router import (
    EvidenceRouter,
    EvidenceStatistics,
    add_to_statistics,
    standardization,
    standardize,
)
from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.parts.local_memory import LocalMemory
from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import Inputs, first
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
"""Probability that all classes which are no candidates have at least, for the logarithm."""

EPS = 1e-5
"""Of AdamW: where all classes are candidates, adding a number to all scores changes nothing, and the gradient in that
direction is rounding error, which must not become a step of full size."""


class EvidenceFlow(FineTuning):
    """Weighs what w_g, the client's local model and its nearest examples say for every instance, class by class.

    The prediction starts as a fixed mixture of the three models' probabilities with shares (1 - neighbour_weight) *
    (1 - alpha), (1 - neighbour_weight) * alpha and neighbour_weight, which is `Interpolation` of probabilities with
    neighbours. A router adds a score to the logarithm of each of the likeliest classes. It sees evidence: how confident
    the models are and whether they agree, the probability that each gives to the class, how near the nearest example of
    the class is, and how frequent the class is in the client's data; and the instance, by its representation under w_g.

    w_g trains as in FedAvg. The router learns from examples that its experts have not seen: in a round a client trains
    a local model from the received w_g on three of four folds of its data, and judges the examples of the fourth by
    that model and a memory of the three. The fold changes from round to round. A client with a single example does not
    train the router. The local model that predicts is fine-tuned on all the data, and the memory holds all of it. The
    router takes no steps when a client is personalized, so a new client needs nothing beyond its own local model and
    memory.

    Sends w_g, the router and running statistics of the evidence. Stateless.

    Source of the idea to train a combination on examples that the models have not seen: Wolpert, Stacked
    generalization (Neural Networks 1992).

    Args:
        personal_lr_scale: factor on the client optimizer's learning rate for the local models.
        alpha: share of the local model beside w_g in the fixed mixture, 0 to 1.
        neighbours: number of stored training examples that vote (k); all of them if a client has fewer.
        neighbour_weight: share of the memory in the fixed mixture, 0 to 1; with 0 it is evidence alone.
        hidden: widths of the router's hidden layers.
        dropout: share of the router's hidden units dropped in training.
        router_epochs: epochs of the router over the judged examples in a round.
        router_lr: learning rate of the router's AdamW: with Adam's weight decay, a weight whose gradient is zero
            would decay by whole steps.
        router_weight_decay: weight decay of the router's AdamW.
        representation: whether the router sees the instance, by the input of w_g's last block with parameters.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    shared = MappingProxyType({"global": "global", "router": "router", "statistics": "statistics"})
    participation = "participation"
    always = ("global",)
    needs = "head"
    scratch = ("received", "probe", "statistics")

    def __init__(
        self,
        personal_lr_scale: float = 1.0,
        alpha: float = 0.5,
        neighbours: int = 10,
        neighbour_weight: float = 0.4,
        hidden: Sequence[int] = (32, 32),
        dropout: float = 0.1,
        router_epochs: int = 1,
        router_lr: float = 0.01,
        router_weight_decay: float = 0.0001,
        representation: bool = True,
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
        self.alpha = alpha
        self.hidden = tuple(hidden)
        self.dropout = dropout
        self.router_epochs = router_epochs
        self.router_lr = router_lr
        self.router_weight_decay = router_weight_decay
        self.representation = representation

    def server_modules(self) -> dict[str, nn.Module]:
        """Return the router and the statistics of its inputs."""
        self.router = EvidenceRouter(self.hidden, self.dropout, self.representation)
        return {"router": self.router, "statistics": EvidenceStatistics()}

    def initialize(self, x: Inputs) -> None:
        """Initialize the server's lazy modules, also the router's layer on the representation."""
        super().initialize(x)
        if self.representation:
            w_g = {name: p.detach() for name, p in self.modules["global"].named_parameters()}
            features = self.model.features(x, w_g)
            positions = self.model.head(features, w_g).shape[:-1]
            rows = features.reshape(*positions, -1)
            self.router(rows.new_zeros(*positions, len(EVIDENCE)), rows.new_zeros(*positions, 1, len(OF_CLASS)), rows)

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

    def start(self, server: Groups) -> Groups:
        """Return w_g as received and to be trained, and two local models copied from it, for all data and for folds."""
        local = self.model.local_copy(server["global"])
        return {**server, "received": server["global"], "local": local, "probe": dict(local)}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w_g as FedAvg and a local model on three folds; collect evidence on the fourth to train the router."""
        return (
            *super().training(),
            Phase("other_folds", (self._probe_step(),), "personal"),
            Derive("fold", lambda groups, examples: {"inside": {"inside": examples.mask}}),
            Derive("all", self._collect),
            Phase("fold", (self._router_step(),), self.router_epochs, examples="evidence"),
        )

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Train the local model and fill the memory, on all the data; fix what standardizes the evidence.

        The statistics themselves would not survive half precision, in which their squares overflow.
        """

        def fix(groups: Groups, examples: Minibatch) -> Groups:
            return {"standardization": standardization(groups["statistics"])}

        return (*super().personalization(), Derive("all", self._remember), Derive("all", fix))

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the fixed mixture, the likeliest classes corrected by the router's scores."""
        features = self.model.features(x, groups["global"])
        outputs, probabilities, mixture, found = self._consult(groups, x, features)
        scores = self._scores(groups, standardize(found, groups["standardization"]))
        corrected = mixture.scatter(-1, found.candidates, mixture.gather(-1, found.candidates) * scores.exp())
        return Prediction(
            generalized=outputs[0],
            personalized=self.objective.outputs(corrected / corrected.sum(-1, keepdim=True)),
            local=outputs[1],
            memory=self.objective.outputs(probabilities[2]),
        )

    def _remember(self, groups: Groups, examples: Minibatch) -> Groups:
        """Store the client's examples."""
        stored = [self.model.features(piece.x, groups["global"]) for piece in pieces(examples)]
        return {"memory": self.memory.store(torch.cat(stored), examples)}

    def _consult(
        self, groups: Groups, x: Inputs, features: Tensor
    ) -> tuple[tuple[Tensor, Tensor], list[Tensor], Tensor, Evidence]:
        """Evaluate the experts on instances.

        Args:
            groups: w_g, the local model and the memory.
            x: instances [N, ...].
            features: inputs of w_g's last block with parameters for these instances.

        Returns:
            Outputs of both models, probabilities of the three experts and of the fixed mixture [N, *P, classes], and
            the evidence.
        """
        outputs = (
            self.model.head(features, groups["global"]),
            self.model.plain(x, groups["global"], groups["local"]),
        )
        on_global, on_local = (self.objective.probabilities(each) for each in outputs)
        models = on_global.lerp(on_local, self.alpha)
        votes = self.memory.votes(groups["memory"], features, models)
        probabilities = [on_global, on_local, votes.probabilities]
        mixture = models.lerp(votes.probabilities, self.memory.share)
        seen = features if self.representation else None
        return outputs, probabilities, mixture, gather_evidence(probabilities, votes, mixture, groups["memory"], seen)

    def _scores(self, groups: Groups, found: Evidence) -> Tensor:
        """Compute the scores of the candidates [..., K] from standardized evidence."""
        scores: Tensor = call(self.router, groups["router"], (found.instance, found.classes, found.representation))
        return scores

    def _probe_step(self) -> Step:
        """Create a step of the folds' local model; embedding tables are those received, not the client's w_g's."""
        return self.personal_step(
            Step("probe", lambda groups, minibatch: self.loss(minibatch, groups["received"], groups["probe"]))
        )

    def _collect(self, groups: Groups, examples: Minibatch) -> Groups:
        """Collect evidence on this round's fold from models of the others, and the statistics of it."""
        fold, others, place = cut_fold(examples, groups["inside"]["inside"])
        w_g = groups["received"]
        views = {"global": w_g, "local": groups["probe"], **self._remember({"global": w_g}, others)}
        found, targets, counted = [], [], []
        for piece in pieces(fold):
            *_, evidence = self._consult(views, piece.x, self.model.features(piece.x, w_g))
            found.append(evidence)
            same = evidence.candidates == piece.y.unsqueeze(-1)
            # the last place is that of all other classes
            targets.append(torch.cat([same, ~same.any(-1, keepdim=True)], dim=-1).to(evidence.instance.dtype))
            counted.append(self.objective.in_loss(piece.y, piece.mask))
        whole = Evidence(*(torch.cat(each) for each in zip(*found, strict=True)))
        real = torch.cat(counted) & others.mask.any()
        statistics, own = add_to_statistics(groups["statistics"], whole, real)
        whole = standardize(whole, standardization(groups["statistics"], own))
        some = real.any().to(whole.instance.dtype)
        rows = [whole.representation, whole.instance, whole.classes.flatten(-2), whole.log_mixture]
        x = torch.cat(rows, dim=-1)
        y = torch.cat([torch.cat(targets), real.unsqueeze(-1).to(x.dtype)], dim=-1)
        return {
            "statistics": statistics,
            "evidence": {"x": x[place], "y": y[place]},
            "participation": {"router": some, "statistics": some},
            "inside": {},
            "memory": {},
        }

    def _router_step(self) -> Step:
        """Create a step on the negative log likelihood of the corrected mixture, over collected evidence."""

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            rows, targets, counted = first(minibatch.x), minibatch.y[..., :-1], minibatch.y[..., -1]
            candidates = targets.shape[-1] - 1
            sizes = (len(EVIDENCE), candidates * len(OF_CLASS), candidates)
            representation, instance, flat, log_mixture = torch.split(
                rows, [rows.shape[-1] - sum(sizes), *sizes], dim=-1
            )
            classes = flat.reshape(*flat.shape[:-1], candidates, len(OF_CLASS))
            scores = call(self.router, groups["router"], (instance, classes, representation))
            others = (1 - log_mixture.exp().sum(-1, keepdim=True)).clamp_min(LEAST).log()
            log_likelihood = (torch.cat([log_mixture + scores, others], dim=-1).log_softmax(-1) * targets).sum(-1)
            weight = counted * minibatch.mask.view(-1, *[1] * (counted.ndim - 1))
            return -(log_likelihood * weight).sum() / weight.sum().clamp_min(1.0)

        adam = partial(torch.optim.AdamW, lr=self.router_lr, weight_decay=self.router_weight_decay, eps=EPS)
        return Step("router", loss, optimizer=adam)
