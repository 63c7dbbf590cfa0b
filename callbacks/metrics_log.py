"""The metrics of every round in one CSV file, each row once, however often a run is killed and resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flow_pl.loggers import RunLogger
from flow_pl.utils.checkpoints import look_at, resumed_checkpoint


class MetricsLog(Callback):
    """Notes in every checkpoint how far the `RunLogger`s' files have come, and takes them back to there on resuming."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know the loggers."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Version and rows of the file, and what is not in it yet."""
        logger = None if self._trainer is None else _logger(self._trainer)
        if logger is None or self._trainer is None:
            return {}
        logged = self._trainer.logged_metrics if self._ended else {}  # in every process: it may be collective
        last = {name: float(value) for name, value in logged.items() if name.startswith(("train/", "privacy/"))}
        if not self._trainer.is_global_zero:
            return {}
        rows = logger.experiment.rows
        return {"version": logger.version, "rows": rows, "step": self._trainer.global_step, "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the file back to the checkpoint, where the fit goes on with it."""
        trainer = self._trainer
        logger = None if trainer is None else _logger(trainer)
        if trainer is not None and logger is not None and logger.continued and trainer.is_global_zero:
            logger.experiment.keep(state_dict["rows"], state_dict["step"], state_dict["last"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The round has no metrics yet."""
        self._ended = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The round's metrics are there; Lightning logs them behind the checkpoint."""
        self._ended = True


def continue_log(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> None:
    """Let a fit that goes on from a checkpoint of its own run write to that run's log.

    Args:
        trainer: of the fit.
        ckpt_path: as given on the command line.

    Raises:
        ConfigurationError: the checkpoint cannot be used.
    """
    path = resumed_checkpoint(trainer, ckpt_path)
    if path is None:
        return
    state = look_at(path).get("callbacks", {}).get(MetricsLog.__qualname__)
    logger = _logger(trainer)
    if state and logger is not None and path.resolve().is_relative_to(Path(trainer.default_root_dir).resolve()):
        logger.go_on(state["version"])


def _logger(trainer: Trainer) -> RunLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
