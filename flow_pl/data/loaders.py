"""Load the clients of a stage in chunks: which of them have rows, how many at once, in which process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from torch.utils.data import DataLoader

from flow_pl.data.batch import ClientBatch
from flow_pl.data.dataset import ClientDataset
from flow_pl.data.federation import Heldout, Ints, Population
from flow_pl.data.sampler import CohortSampler
from flow_pl.errors import ConfigurationError

if TYPE_CHECKING:
    from flow_pl.data.datamodule import FederatedDataModule

Loader = DataLoader[ClientBatch]

MOST_LOADED = 64
"""Number of clients loaded at once if `chunk_size` is "auto"."""


def with_rows(data: FederatedDataModule, clients: Ints, rows: Heldout) -> Ints:
    """Return the clients that are evaluated on some rows: those that have any, and are not left out."""
    clients = clients[data.federation.heldout_sizes(rows)[clients] > 0]
    return clients if rows == "predict" else np.setdiff1d(clients, data.unevaluated, assume_unique=True)


def clients_to_validate(data: FederatedDataModule) -> Ints:
    """Return the clients with validation rows: those that the data marks for validation, if any, or the seen ones.

    Raises:
        ConfigurationError: there are none, and only validation is requested.
    """
    federation, trainer = data.federation, data.trainer
    clients = with_rows(data, federation.validation if len(federation.validation) else federation.seen, "val")
    if not len(clients) and trainer is not None and trainer.state.fn == "validate":
        raise nothing_to_evaluate(data, "validation", "val_fraction")
    return clients


def clients_to_test(data: FederatedDataModule) -> dict[Population, Ints]:
    """Return the clients of each population that has test rows."""
    populations: dict[Population, Ints] = {"seen": data.federation.seen, "new": data.federation.new}
    clients = {name: with_rows(data, members, "test") for name, members in populations.items()}
    return {name: members for name, members in clients.items() if len(members)}


def clients_to_predict(data: FederatedDataModule) -> Ints:
    """Return the clients of all populations that have test rows or unlabelled rows.

    Raises:
        ConfigurationError: there are none.
    """
    federation = data.federation
    clients = with_rows(data, np.concatenate([federation.seen, federation.new, federation.validation]), "predict")
    if not len(clients):
        raise nothing_to_evaluate(data, "test", "test_fraction", " and none without a label")
    return clients


def nothing_to_evaluate(data: FederatedDataModule, rows: str, setting: str, besides: str = "") -> ConfigurationError:
    """Create the error for the case that no client has rows of a kind.

    Args:
        data: the data.
        rows: name of the kind.
        setting: setting that splits such rows off.
        besides: what else would do.
    """
    return ConfigurationError(
        f"no client has {rows} examples{besides}: there is nothing to evaluate. Set data.{setting}, which is "
        f"{getattr(data, setting)}, to more than 0, or give data with {rows} examples."
    )


def make_loader(
    data: FederatedDataModule, clients: Ints, heldout: Heldout | None, cohort_size: int | None, setting: str
) -> Loader:
    """Create the loader of this process.

    Args:
        data: the data, set up.
        clients: indices of the clients to sample from.
        heldout: rows to evaluate on; None in training.
        cohort_size: number of clients to sample; None for all.
        setting: name of the setting of `cohort_size`, for messages.
    """
    seed, trainer = data.run_seed, data.trainer
    sampler = CohortSampler(
        clients,
        data.federation.train_sizes[clients],
        cohort_size=cohort_size,
        chunk_size=_loaded_at_once(data, len(clients) if cohort_size is None else cohort_size),
        seed=seed,
        rank=trainer.global_rank if trainer else 0,
        world_size=trainer.world_size if trainer else 1,
        training=heldout is None,
        setting=setting,
        sampling=data.sampling if heldout is None else "fixed",
        cycle_length=data.cycle_length if heldout is None else 1,
        availability=None if heldout is not None or data.availability.all_arrive else data.availability,
    )
    return DataLoader(
        ClientDataset(data.federation, seed, heldout, data.orders),
        sampler=sampler,
        batch_size=None,  # the sampler yields whole chunks
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
        pin_memory=trainer is not None and isinstance(trainer.accelerator, CUDAAccelerator),
        generator=torch.Generator(),  # a separate generator: a loader must not draw from that of the model
    )


def _loaded_at_once(data: FederatedDataModule, clients: int) -> int:
    """Return the number of clients in a chunk; with "auto", the module cuts chunks from them."""
    if data.chunk_size != "auto":
        return data.chunk_size
    world_size = data.trainer.world_size if data.trainer else 1
    return max(1, min(MOST_LOADED, -(-clients // world_size)))
