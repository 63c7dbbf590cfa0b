"""What evaluating a chunk of clients yields: counts per client, from which every metric is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from flow_pl.methods.base import Method, Minibatch
from flow_pl.routing import Groups

T = TypeVar("T", bound="_OnDevice")


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
        oracle: [C] float, targets that w_g or the client's local model gets right; None for a method without a
            local model.
        routed: [C] float, number of routing decisions per block; None for a method without routes.
        routed_local: [C, blocks] float, decisions that chose the local block; None for a method without routes.
    """

    client: Tensor
    count: Tensor
    generalized: Tensor
    personalized: Tensor
    both: Tensor
    generalized_loss: Tensor
    personalized_loss: Tensor
    oracle: Tensor | None = None
    routed: Tensor | None = None
    routed_local: Tensor | None = None


@dataclass(frozen=True)
class ClientPredictions(_OnDevice):
    """Predictions of one chunk of clients, for `predict`; N is padded to the longest client.

    Attributes:
        client: [C] int64, indices into the client store.
        mask: [C, N] bool, True where the example is real.
        label: [C, N] int64, -1 where there is none.
        prediction: [C, N] int64, of the personalized model.
        generalized_correct: [C, N] bool; meaningless where there is no label.
        personalized_correct: [C, N] bool; meaningless where there is no label.
        routes: [C, N, blocks] bool, True where the instance went through the local block; None for a method
            without routes.
    """

    client: Tensor
    mask: Tensor
    label: Tensor
    prediction: Tensor
    generalized_correct: Tensor
    personalized_correct: Tensor
    routes: Tensor | None = None


def count_client(method: Method, groups: Groups, examples: Minibatch) -> dict[str, Tensor]:
    """Counts of one client, by field of `ClientEvaluation`; fields the method does not have are left out.

    Args:
        method: the algorithm.
        groups: the client's groups, personalized.
        examples: to evaluate on [N, ...].
    """
    predicted = method.predict(groups, examples.x)
    counted = method.objective.counted(examples.y, examples.mask)

    def right(outputs: Tensor) -> Tensor:
        return method.objective.correct(outputs, examples.y) & counted

    def loss(outputs: Tensor) -> Tensor:
        return (method.objective.losses(outputs, examples.y) * counted).sum()

    generalized, personalized = right(predicted.generalized), right(predicted.personalized)
    counts = {
        "count": counted.sum(),
        "generalized": generalized.sum(),
        "personalized": personalized.sum(),
        "both": (generalized & personalized).sum(),
        "generalized_loss": loss(predicted.generalized),
        "personalized_loss": loss(predicted.personalized),
    }
    if predicted.local is not None:
        counts["oracle"] = (generalized | right(predicted.local)).sum()
    if predicted.routes is not None:
        # per token where blocks are routed per token, else per instance, however many labels it has
        decided = counted if counted.shape == predicted.routes.shape[:-1] else examples.mask
        counts["routed"] = decided.sum()
        counts["routed_local"] = (predicted.routes & decided.unsqueeze(-1)).flatten(0, -2).sum(0)
    return {name: value.float() for name, value in counts.items()}


def predict_client(method: Method, groups: Groups, examples: Minibatch) -> dict[str, Tensor]:
    """Predictions of one client's instances, by field of `ClientPredictions`.

    Args:
        method: the algorithm.
        groups: the client's groups, personalized.
        examples: instances [N, ...]; the label is -1 where there is none.
    """
    predicted = method.predict(groups, examples.x)
    columns = {
        "prediction": method.objective.predictions(predicted.personalized),
        "generalized_correct": method.objective.correct(predicted.generalized, examples.y),
        "personalized_correct": method.objective.correct(predicted.personalized, examples.y),
    }
    if predicted.routes is not None:
        columns["routes"] = predicted.routes
    return columns
