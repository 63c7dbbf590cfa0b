"""The types of a federated run: Lightning's hooks name only the base classes of the module and the data module."""

from __future__ import annotations

from typing import cast

from lightning.pytorch import LightningModule, Trainer

from flow_pl.data import FederatedDataModule
from flow_pl.module import FederatedModule


def federated_module(pl_module: LightningModule) -> FederatedModule:
    """Return the module of a run, with its method and its routed blocks."""
    return cast(FederatedModule, pl_module)


def federated_data(trainer: Trainer) -> FederatedDataModule:
    """Return the data module of a run, with the clients' names; `FederatedModule.setup` ensures that it exists."""
    return cast(FederatedDataModule, trainer.datamodule)  # type: ignore[attr-defined]  # Lightning sets it by name
