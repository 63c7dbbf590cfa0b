"""Local memory: a client's training examples, stored by their w_g representations, vote on nearby instances.

Source: Marfoq et al., Personalized Federated Learning through Local Memorization (ICML 2022).
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.steps import Derive, Minibatch
from flow_pl.models.routed import RoutedModel
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_count, require_share

BUDGET = 2**21
"""Number of a client's distances computed at once: 16 MiB. Further queries follow in turns."""
NEAR = 1e-3
"""Added to distances before their ratio is taken: two examples at the instance's own place are equally near."""
TIE = 1e-10
"""Added to a squared distance per earlier stored example: above float64's error, below any meaningful difference."""


class Votes(NamedTuple):
    """Holds what a client's nearest stored examples say of its instances [N, *P].

    Attributes:
        probabilities: [N, *P, classes].
        distances: to the nearest example, and the mean of those to the voting examples [N, *P, 2]; 0 if nothing is
            stored.
        labels: of the voting examples, the nearest first [N, *P, min(k, M)].
        closeness: the distance to the nearest example over that to each voting one, 0 to 1 [N, *P, min(k, M)]; 0 where
            there is none.
    """

    probabilities: Tensor
    distances: Tensor
    labels: Tensor
    closeness: Tensor


class LocalMemory:
    """Stores a client's training examples and lets the nearest ones vote beside a model.

    Every training example of the client (every token, of a sequence) is stored as the input of w_g's last block with
    parameters, flattened, and its true label. An instance receives the label of each of its nearest stored
    neighbours with weight exp(-Euclidean distance), divided by the weights' sum.

    A store takes N x D floats (N x T x D for sequences): 0.1 MB for 200 images in 128 numbers, 8 MB for 1,000
    sentences of 20 words in 96, 82 MB for 1,000 rows of 80 characters in 256. Distances are computed for as many
    instances at once as `BUDGET` allows, so their memory does not grow with N x T; their time does.

    Args:
        neighbours: number of stored examples that vote (k); all of them if a client has fewer.
        share: share of the neighbours in the mixture with the model (lambda), 0 to 1; with 0 nothing is stored.

    Raises:
        ConfigurationError: a value is out of range.
    """

    model: RoutedModel
    _objective: Objective

    def __init__(self, neighbours: int, share: float) -> None:
        require_count(neighbours=neighbours)
        require_share(neighbour_weight=share)
        self.neighbours = neighbours
        self.share = share

    def bind(self, model: RoutedModel, objective: Objective) -> LocalMemory:
        """Return a copy for the model and the task of a method.

        Raises:
            ConfigurationError: the task has no classes to vote for.
        """
        if self.share:
            objective.require_one_class(
                "neighbours vote for a class: set neighbour_weight to 0, or use another method in place of kNN-Per "
                "(Interpolation, FineTuning)."
            )
        bound = copy.copy(self)
        bound.model, bound._objective = model, objective
        return bound

    def stages(self) -> tuple[Derive, ...]:
        """Return the personalization stages that store the client's training examples; none if they have no share."""

        def store(groups: Groups, examples: Minibatch) -> Groups:
            stored = [self.model.features(piece.x, groups["global"]) for piece in pieces(examples)]
            return {"memory": self.store(torch.cat(stored), examples)}

        return (Derive("all", store),) if self.share else ()

    def mix(self, groups: Groups, x: Inputs, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the outputs of a model with the neighbours' vote.

        Args:
            groups: w_g and the client's memory.
            x: instances [N, ...].
            outputs: the model's outputs for them [N, *P, classes].

        Returns:
            Outputs for share * p_neighbours + (1 - share) * p_model, and outputs for p_neighbours alone; both are the
            model's if nothing is stored.
        """
        if not self.share:
            return outputs, outputs
        base = self._objective.probabilities(outputs)
        votes = self.votes(groups["memory"], self.model.features(x, groups["global"]), base).probabilities
        return self._objective.outputs(base.lerp(votes, self.share)), self._objective.outputs(votes)

    def votes(self, memory: Parameters, features: Tensor, fallback: Tensor) -> Votes:
        """Compute the probabilities that the nearest stored examples give, and how near these are.

        Args:
            memory: the client's memory; see `store`.
            features: inputs of w_g's last block with parameters for the instances, [N, ...] or [N, T, ...].
            fallback: probabilities [N, *P, classes] that replace the vote if nothing is stored.
        """
        positions = fallback.shape[:-1]
        queries = features.reshape(math.prod(positions), -1).float()
        labels, weights, distances = nearest(queries, memory, self.neighbours)
        votes = torch.zeros_like(fallback).flatten(0, -2).scatter_add(-1, labels, weights).view_as(fallback)
        real = distances.isfinite()
        distances = distances.masked_fill(~real, 0)
        mean = distances.sum(-1) / real.sum(-1).clamp_min(1)
        closeness = (distances[..., :1] + NEAR) / (distances + NEAR) * real
        return Votes(
            probabilities=torch.where(memory["real"].any(), votes, fallback),
            distances=torch.stack([distances[..., 0], mean], dim=-1).view(*positions, 2),
            labels=labels.view(*positions, -1),
            closeness=closeness.view(*positions, -1),
        )

    def store(self, features: Tensor, examples: Minibatch) -> Parameters:
        """Build the memory from examples.

        Args:
            features: inputs of w_g's last block with parameters for them, [N, ...] or [N, T, ...].
            examples: examples [N, ...].

        Returns:
            "representation" [M, D], "label" [M] and "real" [M], which are real; M is N, or N x T for sequences.
        """
        real = self._objective.counted(examples.y, examples.mask).flatten()
        representation = features.reshape(examples.y.numel(), -1).float()
        return {
            # padding values must not affect a distance
            "representation": representation.masked_fill(~real.unsqueeze(-1), 0),
            "label": examples.y.flatten().masked_fill(~real, 0),
            "real": real,
        }


def nearest(queries: Tensor, memory: Parameters, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the nearest real stored examples, the weight of each vote, and their distances.

    Args:
        queries: representations [Q, D].
        memory: "representation" [M, D], "label" [M], "real" [M] bool.
        neighbours: number of neighbours (k); at equal distances, those stored first. Where representations that should
            be equal differ in float32's last digit, which depends on how many are computed at once, rounding decides.

    Returns:
        Labels [Q, min(k, M)], the nearest first, and in the same shape weights, exp(-distance) over their sum, and
        Euclidean distances; 0 and infinite for padding.
    """
    # |q - s|^2 = |q|^2 + |s|^2 - 2 q s cancels where the distance is small: half of float64's digits are left
    stored, queries = memory["representation"].double(), queries.double()
    size = stored.shape[0]
    # sentences with equal beginnings share many representations: their order decides
    offset = stored.square().sum(-1) + TIE * torch.arange(size, device=stored.device)
    offset = offset.masked_fill(~memory["real"], torch.inf)
    labels, weights, distances = [], [], []
    # in an exported program, the number of queries, and so of pieces, is dynamic
    rows = max(1, BUDGET // max(1, size))
    for piece in (queries,) if torch.compiler.is_exporting() else torch.split(queries, rows):
        least, index = (offset - 2 * piece @ stored.t()).topk(min(neighbours, size), largest=False)
        if torch.compiler.is_exporting():  # a runtime may use float32 in place of float64, which this tolerates
            squares = (piece.unsqueeze(1) - stored[index]).square().sum(-1)
        else:
            squares = least - TIE * index + piece.square().sum(-1, keepdim=True)
        labels.append(memory["label"][index])
        distance = squares.clamp_min(0).sqrt()
        # NaN if no example is real
        weights.append((-distance).softmax(-1).nan_to_num(0.0).float())
        distances.append(distance.float())
    return torch.cat(labels), torch.cat(weights), torch.cat(distances)
