"""Keeps one CSV row per round, however often a run is killed and resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flow_pl.loggers import RunLogger
from flow_pl.utils.checkpoints import look_at, resumed_checkpoint


class MetricsLog(Callback):
    """Saves the round of the `RunLogger`s' files in every checkpoint, and truncates them to it on resuming."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Collect the loggers."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the version of the file, the round, and its metrics that are not written yet."""
        logger = None if self._trainer is None else _logger(self._trainer)
        if logger is None or self._trainer is None:
            return {}
        logged = self._trainer.logged_metrics if self._ended else {}  # in every process: reading them may be collective
        last = {name: float(value) for name, value in logged.items() if name.startswith(("train/", "privacy/"))}
        if not self._trainer.is_global_zero:
            return {}
        return {"version": logger.version, "step": self._trainer.global_step, "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Truncate the file to the checkpoint if the fit continues it."""
        trainer = self._trainer
        logger = None if trainer is None else _logger(trainer)
        if trainer is not None and logger is not None and logger.continued and trainer.is_global_zero:
            logger.experiment.keep(state_dict["step"], state_dict["last"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record that the round has no metrics yet."""
        self._ended = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the round's metrics: Lightning logs them only after the checkpoint."""
        self._ended = True


def continue_log(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> None:
    """Let a fit that resumes its own run append to that run's log.

    Args:
        trainer: trainer of the fit.
        ckpt_path: the value given on the command line.

    Raises:
        ConfigurationError: the checkpoint cannot be used.
    """
    path = resumed_checkpoint(trainer, ckpt_path)
    if path is None:
        return
    state = look_at(path).get("callbacks", {}).get(MetricsLog.__qualname__)
    logger = _logger(trainer)
    if state and logger is not None and path.resolve().is_relative_to(Path(trainer.default_root_dir).resolve()):
        logger.continue_version(state["version"])


def _logger(trainer: Trainer) -> RunLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
