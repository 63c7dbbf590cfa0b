"""Measure the quantities of Flow's convergence analysis on clients (Panchal et al., NeurIPS 2023, Appendix E).

There are two measurements. `gradient_sums` computes the full gradient of the loss at w_g on each client, which gives
||grad F||, the gradient diversity (Definition E.5) and the (G, B)-dissimilarity. `observed` returns a method whose
clients measure their distance from w_g at the end of the round: of the local model (Lemma E.6), of their copy of w_g
(Lemma E.7) and of the personalized model (Lemma E.8), with the routing probabilities. Neither changes the training or
synchronizes with the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from flow_pl.data.batch import ClientBatch
from flow_pl.engine.client_groups import ClientGroups
from flow_pl.engine.gradients import GradientEngine, map_clients
from flow_pl.engine.server_round import sent_parameters
from flow_pl.kernels.functional import differentiable, training_mode
from flow_pl.methods.base import Method
from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import map_inputs

OBSERVED = "observed"
"""Group with a client's measurements in an observed method."""

HEAD = 5
"""Number of scalars before the summed gradient in `gradient_sums`."""


def has_global_model(method: Method) -> bool:
    """Return whether clients send a single w_g, unlike in `Local` (none) and `HypCluster` (several)."""
    return "global" in method.shared and (
        method.participation is None or len(method.shared) == 1 or "global" in method.always
    )


def gradient_sums(
    method: Method, server: Groups, batch: ClientBatch, weighting: Literal["examples", "uniform"]
) -> Tensor:
    """Sum the gradients of f_m at w_g over clients, as input of `gradient_figures`.

    f_m is the task's loss of w_g over all training examples of a client, without dropout. Gradients are with respect to
    the parameters of w_g that clients send.

    Args:
        method: the algorithm, with one global model.
        server: the server's groups.
        batch: the clients, at least one.
        weighting: the weights p_m in F = sum_m p_m f_m, as in the server's mean.

    Returns:
        [5 + P] float32: number of clients, and the sums of p, p^2, p f_m, p ||grad f_m||^2 and p grad f_m. Sums over
        disjoint sets of clients may be added.
    """
    engine, groups = GradientEngine(trace_after=None), ClientGroups(dict(server), len(batch))
    groups.stack("global")
    names = [list(server["global"]).index(name) for name in sent_parameters(method)["global"]]

    def summed(groups: Groups, minibatch: Minibatch) -> Tensor:
        losses = method.objective.losses(method.model.plain(minibatch.x, groups["global"]), minibatch.y)
        return (losses * method.objective.in_loss(minibatch.y, minibatch.mask)).sum()

    def count(groups: Groups, minibatch: Minibatch) -> Tensor:
        return method.objective.in_loss(minibatch.y, minibatch.mask).sum()

    step, views, total = Step("global", summed), groups.prefix(len(batch)), _Total()
    modules = method.modules.values()
    with torch.no_grad(), training_mode(modules, False), differentiable(modules):
        for piece in _pieces(batch):
            grads, losses = engine(step, views, groups.stacked, piece, None)
            total.add([*(grads[i].reshape(len(batch), -1) for i in names), losses, map_clients(count, groups, piece)])
        *grads, losses, targets = total.tensors
        for t in (*grads, losses):
            t /= targets.clamp_min(1).view(-1, *[1] * (t.ndim - 1))
        p = batch.train.mask.sum(1).float() if weighting == "examples" else torch.ones_like(losses)
        squares = torch.stack([g.square().sum(1) for g in grads]).sum(0)
        scalars = torch.stack([torch.ones_like(p), p, p * p, p * losses, p * squares], dim=1).sum(0)
        return torch.cat([scalars, *(torch.mv(g.t(), p) for g in grads)])


def gradient_figures(sums: Tensor, population: int) -> dict[str, Tensor]:
    """Estimate the quantities of a population from `gradient_sums` over a sample of its clients.

    The squared norm of a sample's mean gradient exceeds that of the population by the sampling error of the mean. A
    correction makes it unbiased (for equal weights). If the correction exceeds the squared norm, the estimate of
    ||grad F|| is 0: the sample cannot distinguish it from 0. There is no correction if the sample contains all clients.

    Args:
        sums: sums over the sampled clients of all processes.
        population: number of clients from which the sample was drawn without replacement.

    Returns:
        Scalars: `loss` F(w_g), `gradient_norm` ||grad F(w_g)||, `sample_gradient_norm` (without the correction),
        `client_gradient_norm` (root of the mean of ||grad f_m||^2) and `gradient_diversity`, the mean of
        ||grad f_m - grad F||^2.
    """
    clients, weight, squared_weight, loss, squares = sums[:HEAD]
    mean_square, sample = squares / weight, (sums[HEAD:] / weight).square().sum()
    share = squared_weight / weight.square()  # 1 / S for equal weights
    diversity = (mean_square - sample).clamp_min(0) / (1 - share).clamp_min(torch.finfo(torch.float32).eps)
    # a single client gives no information about the spread
    error = torch.where(clients > 1, diversity * share * (1 - clients / population).clamp_min(0), 0.0)
    square = sample - error
    return {
        "loss": loss / weight,
        "gradient_norm": square.clamp_min(0).sqrt(),
        "sample_gradient_norm": sample.sqrt(),
        "client_gradient_norm": mean_square.sqrt(),
        "gradient_diversity": mean_square - square,
    }


def observed(method: Method, server: Groups) -> Method:
    """Return a method that trains like the given one and stores the clients' measurements in the group `OBSERVED`.

    It adds a stage at the end of the round, which draws no random numbers. The group is among those that
    `FederatedLoop.train_clients` returns as kept.

    Args:
        method: the algorithm, with one global model.
        server: the server's groups at the start of the round.

    Returns:
        The method. Its clients measure `global_progress` ||w_g,m - w_g||^2; if the method trains a local model,
            `local_progress` ||w_l - w_g||^2; and if it routes, the means over the client's training examples of the
            probability of each local block, `q_local` [blocks], and of ||w_p - w_g||^2, `deviation`.
    """
    watching = copy.copy(method)
    measure = partial(_measure, method, server["global"], _local_group(method, server))
    watching.phases = (*method.phases, Derive("all", measure))
    watching.private = MappingProxyType({**method.private, OBSERVED: OBSERVED})
    return watching


def dissimilarity_bound(gradients: Sequence[float], clients: Sequence[float]) -> tuple[float, float]:
    """Return the pair (G, B) with mean_m ||grad f_m||^2 <= G^2 + B^2 ||grad F||^2 at all points, tightest on average.

    B is at least 1: the left side is never smaller than ||grad F||^2.

    Args:
        gradients: ||grad F||^2 at one or more w.
        clients: the mean of ||grad f_m||^2 at the same w.

    Returns:
        G and B.
    """
    points = sorted(zip(gradients, clients, strict=True))
    hull = [(0.0, 0.0)]  # G^2 is not negative
    for x, y in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], (x, y)):
            hull.pop()
        hull.append((x, y))
    mean = sum(gradients) / len(gradients)

    def offset(slope: float) -> float:
        return max(y - slope * x for x, y in hull)

    # the best line contains an edge of the upper hull or has the smallest slope
    slopes = [1.0, *(slope for slope in (_slope(a, b) for a, b in pairwise(hull)) if 1 < slope < float("inf"))]
    best = min(slopes, key=lambda slope: offset(slope) + slope * mean)
    return float(offset(best) ** 0.5), float(best**0.5)


class _Total:
    """Accumulates sums of lists of tensors in place."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
        if self.tensors:
            for total, t in zip(self.tensors, tensors, strict=True):
                total += t
        else:
            self.tensors = [t.clone() for t in tensors]


def _pieces(batch: ClientBatch) -> Iterator[Minibatch]:
    """Yield the clients' training examples in pieces [C, n, ...]."""
    for piece in pieces(_transposed(Minibatch(batch.train.x, batch.train.y, batch.train.mask))):
        yield _transposed(piece)


def _transposed(examples: Minibatch) -> Minibatch:
    x = map_inputs(lambda t: t.transpose(0, 1), examples.x)
    return Minibatch(x, examples.y.transpose(0, 1), examples.mask.transpose(0, 1))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else float("inf") if b[1] > a[1] else float("-inf")


def _local_group(method: Method, server: Groups) -> str | None:
    """Return the group that is trained in a round but not sent: the local model, or the one kept."""
    start, moved = method.start(server), [s for p in method.phases if isinstance(p, Phase) for s in p.steps]
    sent, whole = set(method.shared.values()), server["global"].keys()
    for step in moved:
        if step.moves not in sent and start.get(step.moves, {"": None}).keys() <= whole:
            return step.moves
    return None


def _measure(method: Method, w_g: Parameters, local: str | None, groups: Groups, examples: Minibatch) -> Groups:
    """Measure a client's progress in its round."""
    figures = {"global_progress": _squares(groups[method.shared["global"]], w_g)}
    if local is not None:
        figures["local_progress"] = _squares(groups[local], w_g)
    if local is not None and method.route_names:
        blocks = [
            _squares({k: p for k, p in groups[local].items() if k.startswith(f"{block}.")}, w_g)
            for block in method.route_names
        ]
        figures |= _routes(method, {**groups, "global": w_g, "local": groups[local]}, examples, torch.stack(blocks))
    return {OBSERVED: {name: value.float() for name, value in figures.items()}}


def _routes(method: Method, groups: Groups, examples: Minibatch, blocks: Tensor) -> dict[str, Tensor]:
    """Average q_local [blocks] and the deviation sum_b q_b^2 ||w_l,b - w_g,b||^2 over a client's training examples."""
    total = _Total()
    for piece in pieces(examples):
        q = method.local_probability(groups, piece.x)
        assert q is not None, "a method with routes returns their probabilities"
        weight = method.objective.decided(piece.y, piece.mask, q.shape[:-1]).float().flatten()
        q = q.flatten(0, -2)
        # no matrix products, which autocast would compute in half precision
        deviations = (q.square() * blocks).sum(-1)
        total.add([(weight.unsqueeze(-1) * q).sum(0), (weight * deviations).sum(), weight.sum()])
    q_local, deviation, count = total.tensors
    return {"q_local": q_local / count.clamp_min(1), "deviation": deviation / count.clamp_min(1)}


def _squares(parameters: Mapping[str, Tensor], base: Parameters) -> Tensor:
    """Return ||w - base||^2 over the parameters of w."""
    return torch.stack([(p - base[name]).square().sum() for name, p in parameters.items()]).sum()
