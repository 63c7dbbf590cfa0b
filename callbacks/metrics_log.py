"""Keeps one CSV row per round, however often a run is killed and resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from flow_pl.loggers import RunLogger
from flow_pl.module.round_log import round_metrics
from flow_pl.results.run_folder import goes_on
from flow_pl.utils.checkpoints import look_at, resumed_checkpoint


class MetricsLog(Callback):
    """Saves the rows of the `RunLogger`'s file in every checkpoint, and restores them on resuming."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Collect the loggers."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the version of the file and its rows, with the round's metrics: Lightning logs them afterwards."""
        logger = None if self._trainer is None else _logger(self._trainer)
        if logger is None or self._trainer is None:
            return {}
        last = round_metrics(self._trainer)  # in every process
        if not self._trainer.is_global_zero:
            return {}
        return {"version": logger.version, "rows": logger.experiment.text_with(last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows, in the run's file or in that of another run that branches off; only in a fit."""
        trainer = self._trainer
        logger = None if trainer is None else _logger(trainer)
        if trainer is None or logger is None or not trainer.is_global_zero:
            return
        if trainer.state.fn == TrainerFn.FITTING:  # Lightning also restores callbacks for a test
            logger.experiment.restore(state_dict.get("rows"))


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
    if state and logger is not None and goes_on(Path(trainer.default_root_dir), path):
        logger.continue_version(state["version"])


def _logger(trainer: Trainer) -> RunLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
