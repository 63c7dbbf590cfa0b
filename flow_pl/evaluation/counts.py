"""What evaluating a chunk of clients yields: counts per client, from which every metric is made."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from flow_pl.methods.base import Method, Minibatch
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups

T = TypeVar("T", bound="_OnDevice")

MIXTURE_STEPS = 5
"""Shares of a fixed mixture are multiples of a fifth: 6 mixtures of two models, 21 of three."""


class _OnDevice:
    """Tensors that move together; Lightning moves what a step returns."""

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """Move every tensor, as `torch.Tensor.to` does."""
        moved = {name: t.to(*args, **kwargs) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class ClientEvaluation(_OnDevice):
    """Counts of one chunk of clients, on the device; C may be 0 (a process with nothing left to do).

    Every reported accuracy follows from these counts.

    Attributes:
        client: [C] int64, indices into the client store.
        count: [C] float, evaluated targets (held-out examples, or tokens).
        generalized: [C] float, targets that the server's model w_g gets right.
        personalized: [C] float, targets that the client's personalized model gets right.
        both: [C] float, targets that both get right.
        generalized_loss: [C] float, summed loss of w_g.
        personalized_loss: [C] float, summed loss of the personalized model.
        loss_count: [C] float, targets that these sums are over, which need not be those that count in an accuracy.
        global_or_local: [C] float, targets that w_g or the client's local model gets right; None for a method without
            a local model.
        mixtures: [C, K] float, targets that fixed mixtures of the probabilities of w_g, the local model and, where the
            method has one, the client's memory get right, one for each of `mixture_shares`; None for a method without
            a local model.
        routed: [C] float, number of routing decisions per block; None for a method without routes.
        routed_local: [C, blocks] float, decisions that chose the local block; None for a method without routes.
        subset_count: [C] float, evaluated targets of the task's second accuracy (`Objective.subset`); None, as the
            next two, for a task with one accuracy.
        subset_generalized: [C] float, those that w_g gets right.
        subset_personalized: [C] float, those that the personalized model gets right.
    """

    client: Tensor
    count: Tensor
    generalized: Tensor
    personalized: Tensor
    both: Tensor
    generalized_loss: Tensor
    personalized_loss: Tensor
    loss_count: Tensor
    global_or_local: Tensor | None = None
    mixtures: Tensor | None = None
    routed: Tensor | None = None
    routed_local: Tensor | None = None
    subset_count: Tensor | None = None
    subset_generalized: Tensor | None = None
    subset_personalized: Tensor | None = None


@dataclass(frozen=True)
class ClientPredictions(_OnDevice):
    """Predictions of one chunk of clients, for `predict`; N is padded to the longest client.

    P stands for the positions of an example at which something is predicted: no axis where that is one thing for the
    example, T for the tokens of a sequence. Where it is several labels, those have an axis of their own behind.

    Attributes:
        client: [C] int64, indices into the client store.
        mask: [C, N, *P] bool, True where there is a prediction; [C, N] where no client has any.
        label: [C, N, *P] or [C, N, labels] int64 as in the data, -1 where there is none; real values [C, N] float32,
            NaN where there is none.
        prediction: [C, N, *P] or [C, N, k] int64, of the personalized model; real values [C, N] float32.
        generalized_correct: in the shape of `label`, `Objective.correct` of w_g; meaningless where there is no label.
        personalized_correct: in the shape of `label`, the same of the personalized model.
        routes: [C, N, *P, blocks] bool, True where the local block was chosen; None for a method without
            routes.
        local_probability: [C, N, *P, blocks] float, the router's probabilities of the local blocks; None for a method
            without routes, and where no client has any prediction.
    """

    client: Tensor
    mask: Tensor
    label: Tensor
    prediction: Tensor
    generalized_correct: Tensor
    personalized_correct: Tensor
    routes: Tensor | None = None
    local_probability: Tensor | None = None


def concatenate(parts: Sequence[T]) -> T:
    """Concatenate pieces of a chunk of clients; examples are padded to the longest client of all.

    Args:
        parts: at least one, of the same kind.
    """
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Tensor | None] = {}
    for name, first in vars(parts[0]).items():
        tensors = [getattr(part, name) for part in parts]
        if isinstance(first, Tensor) and first.ndim > 1:
            longest = max(t.shape[1] for t in tensors)
            tensors = [functional.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]
        columns[name] = None if first is None else torch.cat(tensors)
    return replace(parts[0], **columns)  # type: ignore[type-var]


def count_client(method: Method, groups: Groups, examples: Minibatch) -> dict[str, Tensor]:
    """Counts of one client, by field of `ClientEvaluation`; fields the method does not have are left out.

    Args:
        method: the algorithm.
        groups: the client's groups, personalized.
        examples: to evaluate on [N, ...].
    """
    predicted = method.predict(groups, examples.x)
    counted = method.objective.counted(examples.y, examples.mask)
    in_loss = method.objective.in_loss(examples.y, examples.mask)
    in_subset = method.objective.in_subset(examples.y)

    def right(outputs: Tensor) -> Tensor:
        correct = method.objective.correct(outputs, examples.y)
        return correct.where(counted, torch.zeros_like(correct))

    def loss(outputs: Tensor) -> Tensor:
        return (method.objective.losses(outputs, examples.y) * in_loss).sum()

    generalized, personalized = right(predicted.generalized), right(predicted.personalized)
    counts = {
        "count": counted.sum(),
        "generalized": generalized.sum(),
        "personalized": personalized.sum(),
        "both": _both(generalized, personalized).sum(),
        "generalized_loss": loss(predicted.generalized),
        "personalized_loss": loss(predicted.personalized),
        "loss_count": in_loss.sum(),
    }
    if in_subset is not None:
        counts["subset_count"] = (counted & in_subset).sum()
        counts["subset_generalized"] = (generalized & in_subset).sum()
        counts["subset_personalized"] = (personalized & in_subset).sum()
    if predicted.local is not None:
        if not method.objective.real_valued:
            counts["global_or_local"] = (generalized | right(predicted.local)).sum()
        experts = [predicted.generalized, predicted.local, *([] if predicted.memory is None else [predicted.memory])]
        counts["mixtures"] = torch.stack([right(outputs).sum() for outputs in _mixtures(method.objective, experts)])
    if predicted.routes is not None:
        # per token where blocks are routed per token, else per instance, however many labels it has
        decided = counted if counted.shape == predicted.routes.shape[:-1] else examples.mask
        counts["routed"] = decided.sum()
        counts["routed_local"] = (predicted.routes & decided.unsqueeze(-1)).flatten(0, -2).sum(0)
    return {name: value.float() for name, value in counts.items()}


def _both(generalized: Tensor, personalized: Tensor) -> Tensor:
    """Which targets both models get right; NaN for scores in place of truth values."""
    if generalized.dtype == torch.bool:
        return generalized & personalized
    return torch.full_like(generalized, torch.nan)


def mixture_shares(experts: int) -> list[tuple[int, ...]]:
    """Shares of experts in a fixed mixture, in units of 1 / `MIXTURE_STEPS`: all possible divisions.

    Args:
        experts: how many there are.
    """
    shares = itertools.product(range(MIXTURE_STEPS + 1), repeat=experts)
    return [share for share in shares if sum(share) == MIXTURE_STEPS]


def _mixtures(objective: Objective, experts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Outputs of each fixed mixture of the experts' probabilities, one at a time: a vocabulary takes much memory."""
    probabilities = [objective.probabilities(outputs) for outputs in experts]
    for shares in mixture_shares(len(experts)):
        mixed = (p * (share / MIXTURE_STEPS) for p, share in zip(probabilities, shares, strict=True) if share)
        yield objective.outputs(functools.reduce(torch.add, mixed))


def predict_client(method: Method, groups: Groups, examples: Minibatch) -> dict[str, Tensor]:
    """Predictions for one client's instances, by field of `ClientPredictions`.

    Args:
        method: the algorithm.
        groups: the client's groups, personalized.
        examples: instances [N, ...]; the label is -1 where there is none.
    """
    predicted = method.predict(groups, examples.x)
    mask = method.objective.to_predict(*examples)
    columns = {
        "mask": mask,
        "label": examples.y,
        "prediction": method.objective.predictions(predicted.personalized),
        "generalized_correct": method.objective.correct(predicted.generalized, examples.y),
        "personalized_correct": method.objective.correct(predicted.personalized, examples.y),
    }
    for name in ("routes", "local_probability"):
        decided: Tensor | None = getattr(predicted, name)
        if decided is not None:
            # a decision per instance holds at each of its positions
            columns[name] = decided if decided.ndim > mask.ndim else decided.unsqueeze(1).expand(*mask.shape, -1)
    return columns
