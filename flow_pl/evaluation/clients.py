"""Personalize and evaluate the clients of a chunk side by side."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.engine.gradients import map_clients
from flow_pl.engine.loop import FederatedLoop
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.counts import ClientEvaluation, ClientPredictions, count_client, predict_client
from flow_pl.kernels.functional import training_mode
from flow_pl.methods.base import Method
from flow_pl.methods.group_names import naming_missing_groups
from flow_pl.methods.steps import Minibatch
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import take


def evaluate_clients(
    loop: FederatedLoop, method: Method, server: Groups, batch: ClientBatch, kept: Groups | None = None
) -> ClientEvaluation:
    """Personalize a chunk of clients, and evaluate w_g and the personalized models on the held-out examples.

    Args:
        loop: the loop that trains clients.
        method: the algorithm.
        server: the server's groups; not changed.
        batch: the clients, with held-out examples.
        kept: groups [C, ...] that the clients kept, by the name of the group they initialize; None if they keep nothing
            yet.

    Raises:
        ConfigurationError: the batch has no held-out examples.
    """
    heldout = _heldout(batch)
    groups, _ = loop.run(method, server, batch, False, kept=kept)
    zeros = torch.zeros(len(batch), device=batch.client.device)
    totals: dict[str, Tensor] = {}
    with naming_missing_groups(method, groups.groups), training_mode(method.modules.values(), False):
        for active, examples in _slices(loop, heldout):
            counts = map_clients(partial(count_client, method), groups, examples, active)
            for name, value in counts.items():
                if name not in totals:
                    totals[name] = zeros.view(-1, *[1] * (value.ndim - 1)).repeat(1, *value.shape[1:])
                totals[name][:active] += value
    if method.route_names:  # also if no client has examples to evaluate
        totals.setdefault("routed", zeros)
        totals.setdefault("routed_local", zeros.new_zeros(len(batch), len(method.route_names)))
    names = ["count", "generalized", "personalized", "both", "generalized_loss", "personalized_loss", "loss_count"]
    if method.objective.subset:
        names += ["subset_count", "subset_generalized", "subset_personalized"]
    always = {name: totals.pop(name, zeros) for name in names}
    return ClientEvaluation(client=batch.client, **always, **totals)


def predict_clients(
    loop: FederatedLoop, method: Method, server: Groups, batch: ClientBatch, kept: Groups | None = None
) -> ClientPredictions:
    """Personalize a chunk of clients and predict each held-out or unlabelled example.

    Args:
        loop: the loop that trains clients.
        method: the algorithm.
        server: the server's groups; not changed.
        batch: the clients, with examples to predict.
        kept: groups [C, ...] that the clients kept, by the name of the group they initialize; None if they keep nothing
            yet.

    Raises:
        ConfigurationError: the batch has no held-out examples.
    """
    heldout = _heldout(batch)
    groups, _ = loop.run(method, server, batch, False, kept=kept)
    with naming_missing_groups(method, groups.groups), training_mode(method.modules.values(), False):
        slices = [
            map_clients(partial(predict_client, method), groups, examples)
            for _, examples in _slices(loop, heldout, prefix=False)
        ]
    if not slices:
        none = heldout.mask
        routes = none.new_zeros(*none.shape, len(method.route_names)) if method.route_names else None
        prediction = none.float() if method.objective.real_valued else none.long()
        return ClientPredictions(batch.client, none, heldout.y, prediction, none, none, routes)
    columns = {name: torch.cat([part[name] for part in slices], dim=1) for name in slices[0]}
    return ClientPredictions(batch.client, **columns)


def _slices(loop: FederatedLoop, examples: Examples, prefix: bool = True) -> Iterator[tuple[int, Minibatch]]:
    """Yield slices of the examples along N, to bound memory, each with its number of active clients."""
    longest = max(examples.sizes, default=0)
    for start in range(0, longest, loop.evaluation_batch_size):
        end = min(start + loop.evaluation_batch_size, longest)
        active = max(i + 1 for i, n in enumerate(examples.sizes) if n > start) if prefix else len(examples.sizes)
        piece = slice(active), slice(start, end)
        yield active, Minibatch(loop.lay_out(take(examples.x, piece)), examples.y[piece], examples.mask[piece])


def _heldout(batch: ClientBatch) -> Examples:
    if batch.heldout is None:
        raise ConfigurationError(
            "the batch has no held-out examples: evaluate on a validation, test or predict loader."
        )
    return batch.heldout
