"""The base of callbacks that report a test: its metrics by population, and the round of the tested model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from flow_pl.callbacks._base import metric_prefixes
from flow_pl.callbacks._federated import federated_data

Results = dict[str, dict[str, float | None]]
"""For each population, its metrics by name; None if undefined."""


class ResultsCallback(Callback, ABC):
    """Receives the results of a test at its end, in the first process; a base class."""

    _checkpoint_round: int | None = None

    @abstractmethod
    def report(self, trainer: Trainer, pl_module: LightningModule, rounds: int, results: Results) -> None:
        """Report the results of the model after `rounds` rounds; called in the first process only."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the round of the checkpoint that is evaluated, which the trainer itself does not restore."""
        if trainer.state.fn in ("validate", "test"):
            self._checkpoint_round = checkpoint["global_step"]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the metrics and pass them to `report`."""
        metrics = trainer.callback_metrics  # in every process: reading them may be collective
        if trainer.is_global_zero:
            tested = zip(federated_data(trainer).test_populations, metric_prefixes(trainer), strict=True)
            results: Results = {population: figures(metrics, prefix) for population, prefix in tested}
            self.report(trainer, pl_module, self.tested_round(trainer), results)
        self._checkpoint_round = None

    def tested_round(self, trainer: Trainer) -> int:
        """Return the number of rounds that the tested model was trained for."""
        return trainer.current_epoch if self._checkpoint_round is None else self._checkpoint_round


def figures(metrics: Mapping[str, Tensor], prefix: str) -> dict[str, float | None]:
    """Return the metrics whose names start with a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): _defined(value) for name, value in metrics.items() if name.startswith(prefix)}


def metric_rows(results: Results) -> list[list[str | float | None]]:
    """Return a row for each metric: its name and its value for each population."""
    names = dict.fromkeys(name for metrics in results.values() for name in metrics)
    return [[name, *(metrics.get(name) for metrics in results.values())] for name in names]


def _defined(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
