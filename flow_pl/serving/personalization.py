"""Personalize the server's model for a client by its own examples."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flow_pl.checks import check_checkpoint, check_fit, check_several_labels
from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.data.dataset import draw_part
from flow_pl.engine.client_states import client_state
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.methods.base import Method
from flow_pl.module import FederatedModule
from flow_pl.serving.inputs import as_inputs, as_tensor, labelled
from flow_pl.serving.models import PersonalModel
from flow_pl.utils.checkpoints import look_at
from flow_pl.utils.groups import Groups
from flow_pl.utils.inputs import map_inputs, take
from flow_pl.utils.rng import Stream, generator, key


def personalize(
    module: FederatedModule,
    x: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike],
    y: Tensor | ArrayLike,
    seed: int = 0,
    kept: Groups | None = None,
) -> PersonalModel:
    """Personalize the server's model for a client, which need not have been seen in training.

    The same steps are taken as when a client is evaluated (`Method.personalization`).

    Args:
        module: trained module, for instance from a checkpoint.
        x: the client's examples [N, ...], as passed to a model (`FederatedDataModule.transform`); a mapping for
            several inputs by name.
        y: their targets [N] or [N, ...], integers; -1 for an example without a label, which is ignored. For a
            regression, real values [N], NaN without a label.
        seed: seed of the order of the examples, and of dropout.
        kept: state of a client of a stateful method, without a client axis, from `load_kept`; None for a client that
            has not been sampled.

    Returns:
        The client's model; the module is not changed.

    Raises:
        DataError: there is no example with a label, the number of targets is another, or a value cannot be used.
        ConfigurationError: the examples or `kept` do not fit the model.
    """
    device = next(module.parameters()).device
    method = module.method
    real_valued = method.objective.real_valued
    inputs, y = labelled(as_inputs("x", x), as_tensor("y", y), real_valued)
    n = len(y)
    classes = 1 if real_valued else y.shape[-1] if method.objective.several_labels else int(y.max()) + 1
    example = map_inputs(lambda t: t[:1].to(device), inputs)
    if y.shape[1:] == (1,) and check_fit(method, example, classes, None, real_valued) == ():
        y = y[:, 0]  # a single label, which tables store as [N, 1], not a sequence of one
    check_fit(method, example, classes, tuple(y.shape[1:]), real_valued)
    check_several_labels(method.objective, int(y.max()), "y")
    server = server_groups(method)
    if kept is not None:
        _check_kept(method, method.initial_state(server), kept)
        kept = {name: {key: p.to(device)[None].clone() for key, p in group.items()} for name, group in kept.items()}
    random = generator(seed, Stream.EVALUATION_ORDER, 0)
    orders = np.stack([random.permutation(n) for _ in range(module.loop.orders(method))])
    device = next(module.parameters()).device
    batch = ClientBatch(
        client=torch.zeros(1, dtype=torch.int64),
        train=Examples(take(inputs, None), y[None], torch.ones(1, n, dtype=torch.bool), (n,)),
        part=torch.from_numpy(draw_part(seed, 0, n))[None],
        order=torch.from_numpy(orders)[None],
        heldout=None,
        round=-1,
        key=torch.tensor([key(seed, Stream.DROPOUT, 0, 0)]),
    ).to(device)
    return PersonalModel(method, module.loop.personalize(method, server, batch, kept))


def load_kept(module: FederatedModule, checkpoint: str | os.PathLike[str], client: str) -> Groups:
    """Load the state of a client of a stateful method, for `personalize`.

    Args:
        module: module of the same run, from `load`.
        checkpoint: checkpoint of the run.
        client: name of the client in the data.

    Returns:
        Its groups, without a client axis, on the module's device.

    Raises:
        ConfigurationError: the method keeps no state, or the checkpoint is missing, damaged, or of another method.
        DataError: the client has no state, since it has not been sampled.
    """
    method = module.method
    if not method.private:
        raise ConfigurationError(_stateless(method))
    saved = look_at(checkpoint)
    check_checkpoint(saved["flow_pl"], module.identity(), saved["state_dict"], dict(module.state_dict()))
    return client_state(saved["client_states"], client, method.initial_state(server_groups(method)))


def _stateless(method: Method) -> str:
    return (
        f"clients of {type(method).__name__} keep nothing between rounds: leave out the client's state; its "
        "personalized model is made from the server's and its examples."
    )


def _check_kept(method: Method, expected: Groups, kept: Groups) -> None:
    """Check that a client's state has the groups and shapes of its method."""
    if not expected:
        raise ConfigurationError(_stateless(method))
    shapes, found = (
        {f"{name}.{key}": list(p.shape) for name, group in groups.items() for key, p in group.items()}
        for groups in (expected, kept)
    )
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            given = f"{name} of shape {found[name]}" if name in found else f"no {name}"
            some = ", ".join(f"{key} {shape}" for key, shape in list(shapes.items())[:3])
            raise ConfigurationError(
                f"kept has {given}, a client of {type(method).__name__} keeps {some}"
                f"{', ...' if len(shapes) > 3 else ''}: give what load_kept returns."
            )
