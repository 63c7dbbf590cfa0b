"""The router of evidence routing, and the running statistics that standardize what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flow_pl.methods.evidence import EVIDENCE, OF_CLASS, Evidence
from flow_pl.models.dropout import Dropout
from flow_pl.utils.groups import Parameters

MOMENTUM = 0.1
"""Share of a round's clients in the running statistics."""
LEAST_VARIANCE = 1e-4
"""A number that hardly varies (a flag that is always set) is not blown up."""
FARTHEST = 10.0
"""Standardised evidence is cut off there, so that an odd instance cannot carry the router away."""


class EvidenceRouter(nn.Module):
    """Maps the evidence on an instance and on a candidate class to a score of that class; zero at the start.

    The server takes the mean of the clients' routers directly, whatever its optimizer: steps that suit w_g, of Adam
    say, do not suit the few weights here, which are trained on the clients.

    Args:
        hidden: widths of the hidden layers.
        dropout: share of hidden units dropped in training.
        representation: whether it also sees the instance, by its representation; that layer's input size is inferred
            in the first call.
    """

    averaged = True

    def __init__(self, hidden: Sequence[int], dropout: float, representation: bool = False) -> None:
        super().__init__()
        # one layer on all kinds of numbers, in parts: what is the instance's is computed once for all candidates
        self.instance = nn.Linear(len(EVIDENCE), hidden[0])
        self.of_class = nn.Linear(len(OF_CLASS), hidden[0], bias=False)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(hidden)])
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(hidden[-1], 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.requires_grad_(False)
        self.representation = RepresentationLayer(hidden[0]) if representation else None

    def forward(self, instance: Tensor, classes: Tensor, representation: Tensor) -> Tensor:
        """Compute scores [..., K].

        Args:
            instance: standardized evidence on instances [..., F].
            classes: standardized evidence on candidates [..., K, G].
            representation: of the instances [..., D].
        """
        # evidence is float32, also for a served model in another precision
        precision = self.head.weight.dtype
        h = self.instance(instance.to(precision))
        if self.representation is not None:
            h = h + self.representation(representation.to(precision))
        h = h.unsqueeze(-2) + self.of_class(classes.to(precision))
        for layer in self.layers:
            h = layer(self.dropout(h.relu()))
        scores: Tensor = self.head(self.dropout(h.relu())).squeeze(-1)
        return scores.float()


class RepresentationLayer(nn.LazyLinear):
    """Implements the router's layer on the representation, whose size it infers; becomes an `nn.Linear`."""

    cls_to_become = nn.Linear

    def __init__(self, out_features: int) -> None:
        super().__init__(out_features, bias=False)
        self.weight = nn.parameter.UninitializedParameter(requires_grad=False)


class EvidenceStatistics(nn.Module):
    """Keeps running means and mean squares of evidence over the clients of all rounds, and their total weight.

    The numbers on an instance come first, then those on a class. The server takes their mean over clients directly,
    whatever its optimizer: they require no gradient. As in Adam, they start from zero and are divided by their total
    weight.
    """

    averaged = True

    def __init__(self) -> None:
        super().__init__()
        size = len(EVIDENCE) + len(OF_CLASS)
        self.mean = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.square = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)


def add_to_statistics(statistics: Parameters, found: Evidence, counted: Tensor) -> tuple[Parameters, Parameters]:
    """Return the running statistics updated with a client's evidence, and those of the client alone.

    Args:
        statistics: `EvidenceStatistics` as received.
        found: evidence on instances [N, *P].
        counted: [N, *P] bool, which of them count; if none does, the client's own statistics are zero.
    """
    weight = counted.unsqueeze(-1).to(found.instance.dtype)
    total = weight.sum().clamp_min(1.0)

    def mean(instance: Tensor, classes: Tensor) -> Tensor:
        rows = torch.cat([instance, classes.mean(-2)], dim=-1)
        return (rows * weight).flatten(0, -2).sum(0) / total

    own = {
        "mean": mean(found.instance, found.classes),
        "square": mean(found.instance.square(), found.classes.square()),
        "weight": torch.ones_like(statistics["weight"]),
    }
    return {name: p.lerp(own[name], MOMENTUM) for name, p in statistics.items()}, own


def standardization(statistics: Parameters, before: Parameters | None = None) -> Parameters:
    """Return the "mean" and the "deviation" of each number of evidence.

    Args:
        statistics: running statistics.
        before: statistics to use while the running ones are empty; None to leave the numbers unchanged.
    """
    known = statistics["weight"] > 0
    weight = torch.where(known, statistics["weight"], 1.0)
    mean, square = statistics["mean"] / weight, statistics["square"] / weight
    variance = (square - mean.square()).clamp_min(LEAST_VARIANCE)
    if before is None:
        variance = torch.where(known, variance, 1.0)
    else:
        first = (before["square"] - before["mean"].square()).clamp_min(LEAST_VARIANCE)
        mean, variance = torch.where(known, mean, before["mean"]), torch.where(known, variance, first)
    return {"mean": mean, "deviation": variance.sqrt()}


def standardize(found: Evidence, by: Parameters) -> Evidence:
    """Subtract the mean from evidence and divide by the standard deviation; candidates and mixture stay as they are.

    Args:
        found: evidence.
        by: `standardization`.
    """

    def scaled(rows: Tensor, some: slice) -> Tensor:
        return ((rows - by["mean"][some]) / by["deviation"][some]).clamp(-FARTHEST, FARTHEST)

    size = len(EVIDENCE)
    return found._replace(
        instance=scaled(found.instance, slice(size)), classes=scaled(found.classes, slice(size, None))
    )
