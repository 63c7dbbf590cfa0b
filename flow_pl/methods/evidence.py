"""Evidence on an instance: how confident a client's three experts are, whether they agree, and what speaks for a class.

The experts are the server's model, the client's local model and the vote of its stored examples (`LocalMemory`). No
number depends on which class it is about, so that one router can serve every client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from flow_pl.data.batch import FOLDS, fold_size
from flow_pl.methods.parts.local_memory import Votes
from flow_pl.methods.steps import Minibatch
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
"""Names of the numbers, in their order."""

OF_CLASS = (*(f"log_probability_{expert}" for expert in EXPERTS), "closeness", "log_frequency", "log_mixture")
"""Names of the numbers on a candidate class, in their order."""
CANDIDATES = 8
"""Classes that are judged, the likeliest of the fixed mixture; the others keep their probabilities."""
LEAST = 1e-4
"""Smaller probabilities of an expert are equal evidence."""
UNSEEN = 0.1
"""Examples that a client is taken to have of each class besides those it has."""


class Evidence(NamedTuple):
    """Holds what the experts say of instances [N, *P].

    Attributes:
        instance: numbers listed in `EVIDENCE` [N, *P, F].
        classes: numbers listed in `OF_CLASS` for each candidate [N, *P, K, G].
        candidates: the candidate classes [N, *P, K], K = min(CANDIDATES, classes).
        log_mixture: logarithms of the candidates' probabilities in the fixed mixture [N, *P, K].
        representation: inputs of w_g's last block with parameters, flattened and layer-normalized [N, *P, D]; D = 0 if
            the router does not see them.
    """

    instance: Tensor
    classes: Tensor
    candidates: Tensor
    log_mixture: Tensor
    representation: Tensor


def gather_evidence(
    probabilities: Sequence[Tensor],
    votes: Votes,
    mixture: Tensor,
    memory: Parameters,
    features: Tensor | None = None,
) -> Evidence:
    """Collect the evidence on instances.

    Args:
        probabilities: of each of `EXPERTS` [N, *P, classes].
        votes: of the stored examples.
        mixture: probabilities of the fixed mixture [N, *P, classes].
        memory: the stored "label" [M], and which of them are "real" [M].
        features: inputs of w_g's last block with parameters [N, *P, ...]; None if the router does not see them.
    """
    best = mixture.topk(min(CANDIDATES, mixture.shape[-1]))
    labels, real = memory["label"], memory["real"].to(mixture.dtype)
    counts = torch.zeros_like(mixture.flatten(0, -2)[0]).scatter_add(0, labels, real)
    frequency = (counts + UNSEEN) / (real.sum() + 1)
    same = votes.labels.unsqueeze(-2) == best.indices.unsqueeze(-1)
    log_mixture = best.values.clamp_min(torch.finfo(mixture.dtype).tiny).log()
    numbers = [p.gather(-1, best.indices).clamp_min(LEAST).log() for p in probabilities]
    numbers.append((votes.closeness.unsqueeze(-2) * same).amax(-1))
    numbers.append(frequency.log()[best.indices])
    numbers.append(log_mixture.clamp_min(math.log(LEAST)))
    if features is None:
        representation = mixture[..., :0]
    else:
        flat = features.reshape(*mixture.shape[:-1], -1).to(mixture.dtype)
        representation = functional.layer_norm(flat, flat.shape[-1:])
    return Evidence(
        instance=evidence(probabilities, votes.distances),
        classes=torch.stack(numbers, dim=-1),
        candidates=best.indices,
        log_mixture=log_mixture,
        representation=representation,
    )


def evidence(probabilities: Sequence[Tensor], distances: Tensor) -> Tensor:
    """Compute the features listed in `EVIDENCE`.

    Args:
        probabilities: of each of `EXPERTS` [..., classes].
        distances: to the nearest stored example, and the mean distance to the voting examples [..., 2].

    Returns:
        [..., len(EVIDENCE)].
    """
    top = [p.topk(min(2, p.shape[-1])).values for p in probabilities]
    # of equals the first, which topk does not promise
    choices = [p.argmax(-1, keepdim=True) for p in probabilities]
    numbers = [-(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1) for p in probabilities]
    numbers += [t[..., 0] for t in top]
    numbers += [t[..., 0] - t[..., 1:].sum(-1) for t in top]
    numbers += list(distances.unbind(-1))
    numbers += [(choices[a] == choices[b]).squeeze(-1).to(distances.dtype) for a, b in ((0, 1), (0, 2), (1, 2))]
    numbers += [p.gather(-1, choices[b]).squeeze(-1) for a, p in enumerate(probabilities) for b in range(3) if a != b]
    return torch.stack(numbers, dim=-1)


def cut_fold(examples: Minibatch, inside: Tensor) -> tuple[Minibatch, Minibatch, Tensor]:
    """Cut a fold out of a client's examples; both parts are as short as their padding allows.

    Args:
        examples: [N, ...].
        inside: [N] bool, which of the real ones are in the fold.

    Returns:
        The fold [ceil(N / FOLDS), ...], the other examples [N - floor(N / FOLDS), ...], and for each of the N examples
        its row in the fold, if it is there.
    """
    rows = len(inside)
    parts = []
    for some, size in ((inside, fold_size(rows, 0)), (examples.mask & ~inside, rows - rows // FOLDS)):
        index = (~some).byte().argsort(stable=True)[:size]
        parts.append(Minibatch(take(examples.x, index), examples.y[index], some[index]))
    return parts[0], parts[1], (inside.cumsum(0) - 1).clamp_min(0)
