"""The base of the callbacks that measure clients: one metric per dataloader, logged at the end of the epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flow_pl.callbacks._federated import federated_data
from flow_pl.evaluation.counts import ClientEvaluation
from flow_pl.evaluation.metrics import ClientMetric

M = TypeVar("M", bound=ClientMetric)


def metric_prefixes(trainer: Trainer) -> tuple[str, ...]:
    """Return the prefix of the metric names for each dataloader of the running evaluation.

    Args:
        trainer: a trainer in validation (also within a fit) or test.

    Returns:
        `("val/",)` in validation; `test/<population>/` for each test dataloader.
    """
    if trainer.testing:
        return tuple(f"test/{population}/" for population in federated_data(trainer).test_populations)
    return ("val/",)


class EvaluationCallback(Callback, ABC, Generic[M]):
    """Accumulates one metric per dataloader from the `ClientEvaluation` of each step, and logs it; a base class.

    The metrics reach loggers, ModelCheckpoint and EarlyStopping like anything that a module logs. Nothing is
    read from the device before the end of the epoch, and nothing is logged in the sanity check.
    """

    model: ClassVar[str] = ""
    """Prefix of the metric names, after that of the dataloader."""

    def __init__(self) -> None:
        self._metrics: list[M] = []

    @abstractmethod
    def create_metric(self, pl_module: LightningModule) -> M | None:
        """Create the metric for one dataloader; None if the module has nothing to measure."""

    @abstractmethod
    def update_metric(self, metric: M, evaluation: ClientEvaluation) -> None:
        """Add the counts of a chunk of clients."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the metrics."""
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the metrics."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a chunk of clients."""
        self._update(outputs, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a chunk of clients."""
        self._update(outputs, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics over the clients of all processes."""
        self._log(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics over the clients of all processes."""
        self._log(trainer, pl_module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # created for every dataloader in every process, with or without clients: gathering is collective
        created = [] if trainer.sanity_checking else [self.create_metric(pl_module) for _ in metric_prefixes(trainer)]
        self._metrics = [metric.to(pl_module.device) for metric in created if metric is not None]

    def _update(self, evaluation: ClientEvaluation, dataloader_idx: int) -> None:
        if self._metrics:
            self.update_metric(self._metrics[dataloader_idx], evaluation)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # no metrics exist in the sanity check, or if the module has nothing to measure
        for prefix, metric in zip(metric_prefixes(trainer), self._metrics, strict=False):
            figures = {f"{prefix}{self.model}{name}": value for name, value in metric.compute().items()}
            # The metric has gathered the clients of all processes, and every process logs the same value:
            # rank_zero_only disables Lightning's own reduction, sync_dist keeps it from warning about that.
            pl_module.log_dict(figures, sync_dist=True, rank_zero_only=True)
        self._metrics = []
