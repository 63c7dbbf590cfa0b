"""A module and a data module that yield evaluations made by hand, for a real Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from flow_pl.evaluation.counts import ClientEvaluation, ClientPredictions
from flow_pl.models import MLP
from flow_pl.tasks import Classification, Objective


@dataclass
class Chunk:
    """A batch: what the step returns for it, and how many clients it has."""

    value: Any
    clients: int

    def __len__(self) -> int:
        return self.clients

    def to(self, *args: Any, **kwargs: Any) -> Chunk:
        return self


class Flow: ...


class FakeModule(LightningModule):
    """Returns what is in the batch; makes one optimizer step a round."""

    def __init__(self, route_names: tuple[str, ...] = (), objective: Objective | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.method, self.backbone, self.route_names = Flow(), MLP(1, 1, ()), list(route_names)
        self.objective = Classification() if objective is None else objective
        self.privacy = None

    def data_record(self) -> dict[str, Any]:
        return {"rows": "rows", "split": "split", "settings": {}}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch: Chunk, batch_idx: int) -> None:
        if self.trainer.is_last_batch:
            self.optimizers().step()
            self.log("train/global_loss", 0.5, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def validation_step(self, batch: Chunk, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch.value

    test_step = predict_step = validation_step


class FakeData(LightningDataModule):
    """Chunks in lists: one for training and validation, one for each test population."""

    cohort_size = 4

    def __init__(self, chunks: list[Chunk], **test: list[Chunk]) -> None:
        super().__init__()
        self.chunks, self.test = chunks, test
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def test_populations(self) -> tuple[str, ...]:
        return tuple(self.test)

    @property
    def federation(self) -> SimpleNamespace:
        return SimpleNamespace(train_sizes=[10 * (client + 1) for client in range(10)])

    class_names = ()

    def client_name(self, client: int) -> str:
        return f"client, {client}"

    def population(self, client: int) -> str:
        return "seen" if client < 10 else "new"

    def train_dataloader(self) -> DataLoader[Chunk]:
        return _loader(self.chunks)

    val_dataloader = predict_dataloader = train_dataloader

    def test_dataloader(self) -> list[DataLoader[Chunk]]:
        return [_loader(chunks) for chunks in self.test.values()]


def evaluation_chunk(
    clients: list[tuple[float, ...]], blocks: int = 0, subset: list[tuple[float, float, float]] | None = None
) -> Chunk:
    """A chunk of clients; each counted target has two losses, of 2 for w_g and of 1 for the personalized model.

    The fixed mixtures are w_g and the personalized model.

    Args:
        clients: count, generalized, personalized, both, right by w_g or the local model, and then, for each block,
            decisions for the local one.
        blocks: number of routed blocks.
        subset: for a task with a second accuracy, its count, generalized and personalized for each client.
    """
    rows = torch.tensor(clients).view(len(clients), 5 + blocks)
    count, generalized, personalized, both, either = rows[:, :5].unbind(1)
    optional = {"routed": count, "routed_local": rows[:, 5:]} if blocks else {}
    if subset is not None:
        names = ("subset_count", "subset_generalized", "subset_personalized")
        optional |= dict(zip(names, torch.tensor(subset).view(-1, 3).unbind(1), strict=True))
    value = ClientEvaluation(
        client=torch.arange(len(clients)),
        count=count,
        generalized=generalized,
        personalized=personalized,
        both=both,
        generalized_loss=count * 4,
        personalized_loss=count * 2,
        loss_count=count * 2,
        global_or_local=either,
        mixtures=None if either.isnan().all() else torch.stack([generalized, personalized], dim=1),
        **optional,
    )
    return Chunk(value, len(clients))


def prediction_chunk(
    clients: list[int],
    label: list[list[int]],
    prediction: list[list[int]],
    mask: list[list[int]],
    local: Tensor | None = None,
) -> Chunk:
    """A chunk of clients; every prediction that equals its label is right, and w_g is right where the label is 1."""
    shape = (len(clients), max(map(len, mask), default=0))
    labels, predictions = (torch.tensor(values, dtype=torch.int64).view(shape) for values in (label, prediction))
    value = ClientPredictions(
        client=torch.tensor(clients, dtype=torch.int64),
        mask=torch.tensor(mask, dtype=torch.bool).view(shape),
        label=labels,
        prediction=predictions,
        generalized_correct=labels == 1,
        personalized_correct=labels == predictions,
        routes=local,
    )
    return Chunk(value, len(clients))


def make_trainer(*callbacks: Any, **settings: Any) -> Trainer:
    """A quiet trainer on one CPU process."""
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "inference_mode": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    if not any(hasattr(callback, "is_enabled") for callback in callbacks):
        defaults["enable_progress_bar"] = False
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def _loader(chunks: list[Chunk]) -> DataLoader[Chunk]:
    return DataLoader(chunks, batch_size=None)
