"""Local memory: a client's training examples, stored as w_g represents them, vote for what is near to them.

Source: Marfoq et al., Personalized Federated Learning through Local Memorization (ICML 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Derive, Minibatch
from flow_pl.methods.parts.pieces import pieces
from flow_pl.models.routed import RoutedModel
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.validation import require_count, require_share

BUDGET = 2**21
"""Distances of a client that are made at once: 16 MiB. Queries beyond that wait for their turn."""
TIE = 1e-10
"""Added to a squared distance for each example stored before: more than float64's error, less than means anything."""


class LocalMemory:
    """Stores a client's training examples and lets the nearest ones vote beside a model.

    Every training example of the client (every token, of a sequence) is stored as what the last block of w_g with
    parameters gets, flattened, and its true label. An instance is given the label of each of its nearest stored
    neighbours with weight exp(-Euclidean distance), divided by the weights' sum.

    A store takes N x D floats (N x T x D, of sequences): 0.1 MB for 200 images in 128 numbers, 8 MB for 1,000
    sentences of 20 words in 96, 82 MB for 1,000 rows of 80 characters in 256. Distances are made for as many
    instances at once as `BUDGET` allows, so their memory does not grow with N x T; their time does.

    Args:
        neighbours: stored examples that have a vote (k); where a client has fewer, all of them.
        share: share of the neighbours in the mixture with the model (lambda), 0 to 1; with 0 nothing is stored.

    Raises:
        ConfigurationError: a value is out of range.
    """

    def __init__(self, neighbours: int, share: float) -> None:
        require_count(neighbours=neighbours)
        require_share(neighbour_weight=share)
        self.neighbours = neighbours
        self.share = share

    def bind(self, model: RoutedModel, objective: Objective) -> None:
        """Take the model and the task of a method.

        Raises:
            ConfigurationError: the task has several labels, where a neighbour has no single one to vote for.
        """
        if self.share and objective.several_labels:
            raise ConfigurationError(
                f"neighbours vote for one label, the task {type(objective).__name__} has several for an example: set "
                "neighbour_weight to 0, or use another method in place of kNN-Per (Interpolation, FineTuning)."
            )
        self._model, self._objective = model, objective

    def stages(self) -> tuple[Derive, ...]:
        """Of personalization: stores the client's training examples; none where they have no share."""
        return (Derive("all", self._memorize),) if self.share else ()

    def mix(self, groups: Groups, x: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of a model, and those of the neighbours.

        Args:
            groups: with w_g and the client's memory.
            x: instances [N, ...].
            outputs: of the model for them [N, *P, classes].

        Returns:
            Outputs for share * p_neighbours + (1 - share) * p_model, and outputs for p_neighbours alone; both are the
            model's where nothing is stored.
        """
        if not self.share:
            return outputs, outputs
        base, memory = self._objective.probabilities(outputs), groups["memory"]
        queries = self._representation(groups, x, outputs.shape[:-1].numel())
        labels, weights = nearest(queries, memory, self.neighbours)
        votes = torch.zeros_like(base).flatten(0, -2).scatter_add(-1, labels, weights).view_as(base)
        votes = torch.where(memory["real"].any(), votes, base)
        return self._objective.outputs(base.lerp(votes, self.share)), self._objective.outputs(votes)

    def _memorize(self, groups: Groups, examples: Minibatch) -> Groups:
        """The store: representations [M, D], labels [M] and which of them are real; M is N, of sequences N x T."""
        real = self._objective.counted(examples.y, examples.mask).flatten()
        stored = [self._representation(groups, piece.x, piece.y.numel()) for piece in pieces(examples)]
        return {
            "memory": {
                # what the padding holds must not spoil a distance
                "representation": torch.cat(stored).masked_fill(~real.unsqueeze(-1), 0),
                "label": examples.y.flatten().masked_fill(~real, 0),
                "real": real,
            }
        }

    def _representation(self, groups: Groups, x: Tensor, rows: int) -> Tensor:
        """What the last block gets for instances x [N, ...]: [rows, D], a row for each thing that is predicted."""
        return self._model.features(x, groups["global"]).reshape(rows, -1).float()


def nearest(queries: Tensor, memory: Parameters, neighbours: int) -> tuple[Tensor, Tensor]:
    """The nearest real stored examples and the weight of each vote.

    Args:
        queries: representations [Q, D].
        memory: "representation" [M, D], "label" [M], "real" [M] bool.
        neighbours: how many (k); at equal distances those that were stored first.

    Returns:
        Labels [Q, min(k, M)] and weights of the same shape: exp(-distance) over their sum, 0 for what is not real.
    """
    # |q - s|^2 = |q|^2 + |s|^2 - 2 q s cancels where the distance is small: half of float64's digits are left
    stored, queries = memory["representation"].double(), queries.double()
    size = stored.shape[0]
    # sentences that begin alike have many representations in common: the order decides
    offset = stored.square().sum(-1) + TIE * torch.arange(size, device=stored.device)
    offset = offset.masked_fill(~memory["real"], torch.inf)
    labels, weights = [], []
    for piece in torch.split(queries, max(1, BUDGET // max(1, size))):
        least, index = (offset - 2 * piece @ stored.t()).topk(min(neighbours, size), largest=False)
        squares = least - TIE * index + piece.square().sum(-1, keepdim=True)
        labels.append(memory["label"][index])
        # not a number where none is real
        weights.append((-squares.clamp_min(0).sqrt()).softmax(-1).nan_to_num(0.0).float())
    return torch.cat(labels), torch.cat(weights)
