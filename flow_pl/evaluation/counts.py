"""Count predictions per client when evaluating a chunk; every metric is computed from these counts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from flow_pl.methods.base import Method
from flow_pl.methods.steps import Minibatch
from flow_pl.tasks import Objective
from flow_pl.utils.groups import Groups

T = TypeVar("T", bound="_OnDevice")

MIXTURE_STEPS = 5
"""Shares of a fixed mixture are multiples of 1/5: 6 mixtures of two models, 21 of three."""


class _OnDevice:
    """Tensors that move to a device together; Lightning moves a step's results."""

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """Move every tensor, as `torch.Tensor.to` does."""
        moved = {name: t.to(*args, **kwargs) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class ClientEvaluation(_OnDevice):
    """Counts of one chunk of clients, on the device; C may be 0 on a process without clients.

    Every reported accuracy follows from these counts.

    Attributes:
        client: [C] int64, indices into the client store.
        count: [C] float, evaluated targets (held-out examples, or tokens).
        generalized: [C] float, targets that the server's model w_g gets right.
        personalized: [C] float, targets that the client's personalized model gets right.
        both: [C] float, targets that both get right.
        generalized_loss: [C] float, summed loss of w_g.
        personalized_loss: [C] float, summed loss of the personalized model.
        loss_count: [C] float, targets in these sums, which may differ from those that count in an accuracy.
        global_or_local: [C] float, targets that w_g or the client's local model gets right; None for a method without
            a local model.
        mixtures: [C, K] float, targets that fixed mixtures of the probabilities of w_g, the local model and the
            client's memory (if the method has one) get right, one for each of `mixture_shares`; None for a method
            without a local model.
        routed: [C] float, number of routing decisions per block; None for a method without routes.
        routed_local: [C, blocks] float, decisions for the local branch; None for a method without routes.
        subset_count: [C] float, evaluated targets of the task's second accuracy (`Objective.subset`); None for a task
            with one accuracy, like the next two.
        subset_generalized: [C] float, such targets that w_g gets right.
        subset_personalized: [C] float, such targets that the personalized model gets right.
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

    P stands for the positions of an example at which something is predicted: no axis for one prediction per example, T
    for the tokens of a sequence. Several labels have an additional last axis.

    Attributes:
        client: [C] int64, indices into the client store.
        mask: [C, N, *P] bool, True where there is a prediction; [C, N] if no client has any.
        label: [C, N, *P] or [C, N, labels] int64 as in the data, -1 if missing; real values [C, N] float32, NaN if
            missing.
        prediction: [C, N, *P] or [C, N, k] int64, of the personalized model; real values [C, N] float32.
        generalized_correct: in the shape of `label`, `Objective.correct` of w_g; undefined without a label.
        personalized_correct: in the shape of `label`, the same of the personalized model.
        routes: [C, N, *P, blocks] bool, True where the local branch was chosen, for a sequence with one prediction
            by more than half of its tokens; None for a method without routes.
        local_probability: [C, N, *P, blocks] float, the router's probabilities of the local branches, for a sequence
            with one prediction the mean over its tokens; None for a method without routes, or if no client has any
            prediction.
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
    """Concatenate pieces of a chunk of clients; examples are padded to the longest client.

    Args:
        parts: one or more pieces of the same type.
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
    """Count one client's predictions, by field of `ClientEvaluation`; fields that the method lacks are omitted.

    Args:
        method: the algorithm.
        groups: the client's groups, personalized.
        examples: examples to evaluate on [N, ...].
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
        decided = method.objective.decided(examples.y, examples.mask, predicted.routes.shape[:-1])
        counts["routed"] = decided.sum()
        counts["routed_local"] = (predicted.routes & decided.unsqueeze(-1)).flatten(0, -2).sum(0)
    return {name: value.float() for name, value in counts.items()}


def _both(generalized: Tensor, personalized: Tensor) -> Tensor:
    """Return which targets both models get right; NaN for scores instead of truth values."""
    if generalized.dtype == torch.bool:
        return generalized & personalized
    return torch.full_like(generalized, torch.nan)


def mixture_shares(experts: int) -> list[tuple[int, ...]]:
    """Return all possible shares of experts in a fixed mixture, in units of 1 / `MIXTURE_STEPS`.

    Args:
        experts: number of experts.
    """
    shares = itertools.product(range(MIXTURE_STEPS + 1), repeat=experts)
    return [share for share in shares if sum(share) == MIXTURE_STEPS]


def _mixtures(objective: Objective, experts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the outputs of each fixed mixture of the experts' probabilities, one at a time to save memory."""
    probabilities = [objective.probabilities(outputs) for outputs in experts]
    for shares in mixture_shares(len(experts)):
        mixed = (p * (share / MIXTURE_STEPS) for p, share in zip(probabilities, shares, strict=True) if share)
        yield objective.outputs(functools.reduce(torch.add, mixed))


def predict_client(method: Method, groups: Groups, examples: Minibatch) -> dict[str, Tensor]:
    """Predict one client's instances, by field of `ClientPredictions`.

    Args:
        method: the algorithm.
        groups: the client's groups, personalized.
        examples: instances [N, ...]; a missing label is -1.
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
    if predicted.routes is not None:
        columns["routes"] = _by_position(predicted.routes.float(), mask) > 0.5
    if predicted.local_probability is not None:
        columns["local_probability"] = _by_position(predicted.local_probability, mask)
    return columns


def _by_position(decisions: Tensor, mask: Tensor) -> Tensor:
    """Return [N, *P, blocks] for decisions [N, blocks] or [N, T, blocks] and a mask [N, *P] of predictions.

    A decision for an instance applies to all of its positions; decisions for the tokens of an instance with a single
    prediction are averaged.
    """
    if decisions.ndim > mask.ndim + 1:
        return decisions.mean(1)
    return decisions if decisions.ndim > mask.ndim else decisions.unsqueeze(1).expand(*mask.shape, -1)
