"""A personalized model for one client, made from a trained server and the client's own examples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.data.dataset import draw_part
from flow_pl.errors import DataError
from flow_pl.methods.base import Method
from flow_pl.module import FederatedModule
from flow_pl.rng import Stream, generator
from flow_pl.routing import Groups
from flow_pl.server import server_groups


class PersonalModel(nn.Module):
    """What a client predicts with; made by `personalize`.

    Args:
        method: of the run, bound to its backbone.
        groups: the client's parameter groups, personalized.
    """

    def __init__(self, method: Method, groups: Groups) -> None:
        super().__init__()
        self._method = method
        self._groups = groups

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Outputs for instances x [N, ...], as the backbone gives them: [N, classes] or [N, T, tokens].

        With hard routing by the instance, each goes through one copy of a block alone (Flow with `routing: hard`).
        """
        modules = self._method.modules.values()
        modes = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            return self._method.personalized(self._groups, x)
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.train(mode)


def personalize(module: FederatedModule, x: Tensor, y: Tensor, seed: int = 0) -> PersonalModel:
    """Personalize the server's model for a client that need not have been seen in training.

    The same steps are taken as when a client is evaluated (`Method.personalization`).

    Args:
        module: trained; of a checkpoint, say.
        x: the client's examples [N, ...], as a model gets them (`FederatedDataModule.transform`).
        y: their targets [N] or [N, ...].
        seed: of the order in which they are visited, and of dropout.

    Returns:
        The client's model; the module is not changed.

    Raises:
        DataError: there is no example, or not one target for each.
    """
    if len(x) != len(y) or not len(x):
        raise DataError(f"x has {len(x)} examples and y {len(y)} targets, expected one for each, and at least one.")
    n, method = len(x), module.method
    random = generator(seed, Stream.EVALUATION_ORDER, 0)
    orders = np.stack([random.permutation(n) for _ in range(method.epochs)])
    device = next(module.parameters()).device
    batch = ClientBatch(
        client=torch.zeros(1, dtype=torch.int64),
        train=Examples(x[None], y[None], torch.ones(1, n, dtype=torch.bool), (n,)),
        part=torch.from_numpy(draw_part(seed, 0, n))[None],
        order=torch.from_numpy(orders)[None],
        heldout=None,
        round=-1,
        seed=seed,
    ).to(device)
    return PersonalModel(method, module.loop.personalize(method, server_groups(method), batch))
