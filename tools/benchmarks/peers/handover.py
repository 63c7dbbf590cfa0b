"""The common start of all contenders in one `.npz` file: the clients' examples, the initial model and the settings."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np


class Handover(NamedTuple):
    """Describes a workload without torch.

    Attributes:
        workload: name of the workload.
        kind: kind of the model: mlp, cnn or lstm.
        clients: features and labels of each client, the largest client first.
        parameters: parameters of the initial model, in torch's order and layout.
        batch_size: number of examples in a minibatch, in the order of the data.
        lr: learning rate of the clients' SGD.
        momentum: momentum of the clients' SGD.
    """

    workload: str
    kind: str
    clients: list[tuple[np.ndarray, np.ndarray]]
    parameters: list[np.ndarray]
    batch_size: int
    lr: float
    momentum: float


def save(path: str, handover: Handover) -> None:
    """Write a handover."""
    arrays = {f"x{i}": x for i, (x, _) in enumerate(handover.clients)}
    arrays |= {f"y{i}": y for i, (_, y) in enumerate(handover.clients)}
    arrays |= {f"p{i}": p for i, p in enumerate(handover.parameters)}
    np.savez(
        path,
        **arrays,
        names=np.array([handover.workload, handover.kind]),
        counts=np.array([len(handover.clients), len(handover.parameters), handover.batch_size]),
        rates=np.array([handover.lr, handover.momentum]),
    )


def load(path: str | None = None) -> Handover:
    """Read a handover; by default from the path in this process's first argument."""
    with np.load(path or sys.argv[1]) as file:
        clients, parameters, batch_size = file["counts"].tolist()
        return Handover(
            *file["names"].tolist(),
            [(file[f"x{i}"], file[f"y{i}"]) for i in range(clients)],
            [file[f"p{i}"] for i in range(parameters)],
            batch_size,
            *file["rates"].tolist(),
        )
