"""Compute evidence on an instance: how confident a client's three experts are, and whether they agree.

The experts are the server's model, the client's local model and the vote of its stored examples (`LocalMemory`). The
features do not depend on the class, so that one router can serve every client.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flow_pl.methods.steps import Minibatch
from flow_pl.models.dropout import Dropout
from flow_pl.utils.groups import Parameters
from flow_pl.utils.inputs import take

EXPERTS = ("global", "local", "memory")
EVIDENCE = (
    *(f"entropy_{expert}" for expert in EXPERTS),
    *(f"largest_{expert}" for expert in EXPERTS),
    *(f"margin_{expert}" for expert in EXPERTS),
    "nearest_distance",
    "mean_distance",
    *(f"{a}_agrees_with_{b}" for a, b in (("global", "local"), ("global", "memory"), ("local", "memory"))),
    *(f"{a}_at_choice_of_{b}" for a in EXPERTS for b in EXPERTS if a != b),
)
"""Names of the features, in order."""

MOMENTUM = 0.1
"""Share of a round's clients in the running statistics."""
LEAST_VARIANCE = 1e-4
"""Smallest variance to divide by, so that a nearly constant feature is not amplified."""
FARTHEST = 10.0
"""Bound on standardized evidence, so that an unusual instance does not dominate the router's training."""


def evidence(probabilities: Sequence[Tensor], distances: Tensor) -> Tensor:
    """Compute the features listed in `EVIDENCE`.

    Args:
        probabilities: probabilities of each of `EXPERTS` [..., classes].
        distances: distance to the nearest stored example, and the mean distance to the voting examples [..., 2].

    Returns:
        [..., len(EVIDENCE)] the features.
    """
    top = [p.topk(min(2, p.shape[-1])).values for p in probabilities]
    # the first of equal values, which topk does not guarantee
    choices = [p.argmax(-1, keepdim=True) for p in probabilities]
    numbers = [-(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1) for p in probabilities]
    numbers += [t[..., 0] for t in top]
    numbers += [t[..., 0] - t[..., 1:].sum(-1) for t in top]
    numbers += list(distances.unbind(-1))
    numbers += [(choices[a] == choices[b]).squeeze(-1).to(distances.dtype) for a, b in ((0, 1), (0, 2), (1, 2))]
    numbers += [p.gather(-1, choices[b]).squeeze(-1) for a, p in enumerate(probabilities) for b in range(3) if a != b]
    return torch.stack(numbers, dim=-1)


class EvidenceRouter(nn.Module):
    """Maps standardized evidence to a correction of the experts' log shares by an MLP; zero at the start.

    The server takes the mean of the clients' routers directly, whatever its optimizer: steps
    that suit w_g, such as Adam's, do not suit the few weights here, which are trained on the clients.

    Args:
        hidden: widths of the hidden layers.
        dropout: share of hidden units dropped in training.
    """

    averaged = True

    def __init__(self, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        widths = (len(EVIDENCE), *hidden)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(widths[-1], len(EXPERTS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        """Compute corrections [..., 3] for standardized evidence [..., F]."""
        for layer in self.layers:
            h = self.dropout(layer(h).relu())
        corrections: Tensor = self.head(h)
        return corrections.float()


class EvidenceStatistics(nn.Module):
    """Keeps running means and mean squares of evidence over the clients of all rounds, and their total weight.

    The server takes their mean over clients directly, whatever its optimizer: they require no gradient. As in Adam,
    they start from zero and are divided by their total weight.
    """

    averaged = True

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(len(EVIDENCE)), requires_grad=False)
        self.square = nn.Parameter(torch.zeros(len(EVIDENCE)), requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)


def add_to_statistics(statistics: Parameters, rows: Tensor, counted: Tensor) -> tuple[Parameters, Parameters]:
    """Return the running statistics updated with a client's evidence, and those of the client alone.

    Args:
        statistics: `EvidenceStatistics` as received.
        rows: evidence [..., F].
        counted: [...] bool, which rows count; if none does, the client's own statistics are zero.
    """
    weight = counted.unsqueeze(-1).to(rows.dtype)
    total = weight.sum().clamp_min(1.0)
    own = {
        "mean": (rows * weight).flatten(0, -2).sum(0) / total,
        "square": (rows.square() * weight).flatten(0, -2).sum(0) / total,
        "weight": torch.ones_like(statistics["weight"]),
    }
    return {name: p.lerp(own[name], MOMENTUM) for name, p in statistics.items()}, own


def standardize(rows: Tensor, statistics: Parameters, before: Parameters | None = None) -> Tensor:
    """Subtract the mean from evidence and divide by the standard deviation.

    Args:
        rows: evidence [..., F].
        statistics: running statistics.
        before: statistics to use while the running ones are empty; None to leave the rows unchanged.
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
    return ((rows - mean) / variance.sqrt()).clamp(-FARTHEST, FARTHEST)


def halves(examples: Minibatch, first: Tensor) -> tuple[tuple[Minibatch, Minibatch], Tensor]:
    """Split a client's examples in two, each half as short as its padding allows.

    Args:
        examples: examples [N, ...].
        first: [N] bool, which of the real examples are in the first half.

    Returns:
        The halves, [H, ...] each with H = ceil(N / 2), and for each of the N examples its index in the concatenation
        of both halves.
    """
    rows = len(first)
    size = (rows + 1) // 2
    second = examples.mask & ~first
    picked = [(~half).byte().argsort(stable=True)[:size] for half in (first, second)]
    cut = [
        Minibatch(take(examples.x, index), examples.y[index], half[index])
        for index, half in zip(picked, (first, second), strict=True)
    ]
    place = torch.where(first, first.cumsum(0) - 1, size + second.cumsum(0) - 1).clamp_min(0)
    return (cut[0], cut[1]), place
