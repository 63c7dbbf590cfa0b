"""Compute the gradients of a step for all active clients, from a flat list of tensors, so that it can be traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import IntEnum

import torch
from torch import Tensor
from torch.func import vmap

from flow_pl.engine.client_draws import ClientDraws
from flow_pl.errors import ConfigurationError
from flow_pl.kernels.linear import REPLACED, ClientLinears
from flow_pl.methods.steps import Minibatch, Step
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import from_leaves, take
from flow_pl.utils.unit_stream import UnitStream, UnitTable, drawing_from


class Draws(IntEnum):
    """How a step draws, recorded at its first call; like a trace, it assumes that the objective never changes."""

    NOTHING = 0
    BY_MODULES = 1
    """Only by modules of this package."""
    BY_FUNCTIONS = 2
    """Also by torch's functions, which must be replaced."""


@contextmanager
def _drawing(key: Tensor, units: UnitTable, draws: Draws) -> Iterator[None]:
    """Let a single client draw by its key within the context; replace torch's functions if it calls any."""
    stream = UnitStream(key, units)
    with drawing_from(stream), ClientDraws(stream) if draws == Draws.BY_FUNCTIONS else nullcontext():
        yield


def step_gradients(
    step: Step,
    names: Sequence[tuple[str, str]],
    stacked: set[str],
    active: int,
    arguments: Sequence[Tensor],
    options: tuple[bool, bool],
    features: tuple[str, ...] | None,
    draws: Draws,
    units: UnitTable,
) -> list[Tensor]:
    """Compute gradients of the updated group, and losses, from a flat list of tensors.

    Args:
        step: the step.
        names: group and name of each parameter.
        stacked: names of the groups with a client axis.
        active: number of clients (A).
        arguments: the parameters in the order of `names`; the minibatch's features, targets and mask [A, B, ...]; and,
            where `options` says so, the losses' factors [A] and the keys of the clients' draws [A, 2].
        options: whether there are factors, and keys.
        features: names of the features; None for a single tensor.
        draws: how the step draws.
        units: the drawn numbers.

    Returns:
        Gradients of the updated group's tensors [A, ...], and the losses [A].

    Raises:
        ConfigurationError: the objective is not a scalar.
    """
    parameters, data = arguments[: len(names)], arguments[len(names) :]
    parts, (scaled, drawn) = 1 if features is None else len(features), options
    x, (y, mask, *others) = from_leaves(features, data[:parts]), data[parts:]
    minibatch = Minibatch(x, y, mask)
    scale, keys = others[0] if scaled else None, others[-1] if drawn else None
    groups: Groups = {}
    leaves = []
    for (group, key), p in zip(names, parameters, strict=True):
        if group == step.moves:
            p = p.detach().requires_grad_()
            leaves.append(p)
        groups.setdefault(group, {})[key] = p
    # One graph over all clients: their losses are independent, so the sum's gradient is that of each client.
    with torch.enable_grad():
        if active == 1:
            one = Minibatch(take(x, 0), y[0], mask[0])
            with nullcontext() if keys is None else _drawing(keys[0], units, draws):
                losses = step.objective(groups, one).unsqueeze(0)
        elif keys is None:
            dims = {name: 0 if name in stacked else None for name in groups}
            with ClientLinears():
                losses = vmap(step.objective, in_dims=(dims, 0))(groups, minibatch)
        else:
            dims = {name: 0 if name in stacked else None for name in groups}

            def objective(key: Tensor, groups: Groups, minibatch: Minibatch) -> Tensor:
                stream = UnitStream(key, units)
                with drawing_from(stream), ClientDraws(stream, REPLACED):
                    return step.objective(groups, minibatch)

            losses = vmap(objective, in_dims=(0, dims, 0))(keys, groups, minibatch)
        if losses.ndim != 1:
            raise ConfigurationError(
                f"a step that moves the group '{step.moves}' has an objective of shape {list(losses.shape[1:])}, "
                "expected a scalar: average the losses of the real examples, as Method.loss does."
            )
        total = (losses if scale is None else losses * scale).sum()
        grads = list(torch.autograd.grad(total, leaves, materialize_grads=True))
    # Autocast would keep its casts of this step's leaves until its context ends: a round's worth of model copies.
    torch.clear_autocast_cache()
    if active == 1:
        # gradients of convolutions may be in channels-last format, like the images; parameters are not
        grads = [g.contiguous().unsqueeze(0) for g in grads]
    return [*grads, losses.detach()]
