"""Pass the metrics of a training round to Lightning all at once.

`LightningModule.log` creates a metric for each value, and iterates over, synchronizes and resets all of them several
times per round, which takes a fifth of a small model's round. The metrics of a round are final when logged: summed over
clients and processes. So they are stored beside Lightning's own results, and reach loggers, callbacks, monitors and
checkpoints together with those.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import (  # private, as of Lightning 2.6
    _METRICS,
    _ResultCollection,
)
from torch import Tensor


class RoundResults(_ResultCollection):
    """Lightning's results of a training epoch, extended by the metrics of a round.

    Attributes:
        figures: scalars of the round by name, the same in every process; empty before the round has ended.
    """

    def __init__(self) -> None:
        super().__init__(training=True)
        self.figures: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Return whether there is anything to log."""
        return bool(self.figures) or len(self) > 0

    def metrics(self, on_step: bool) -> _METRICS:
        """Return the logged metrics, for loggers, callbacks and progress bars."""
        metrics: _METRICS = super().metrics(on_step)
        if not on_step:
            metrics["log"].update(self.figures)
            metrics["callback"].update(self.figures)
        return metrics

    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        """Reset the logged metrics, or those of a hook."""
        super().reset(metrics, fx)
        if fx is None and not metrics:
            self.figures = {}


def prepare_log(trainer: Trainer) -> None:
    """Prepare a fit for logging its rounds by `log_round`."""
    trainer.fit_loop.epoch_loop._results = RoundResults()


def log_round(trainer: Trainer, figures: dict[str, Any]) -> None:
    """Log the metrics of a finished round, with the number of completed rounds as the loggers' step.

    Args:
        trainer: trainer of the fit, after the server's step.
        figures: scalars by name, the same in every process.
    """
    results = trainer.fit_loop.epoch_loop._results
    assert isinstance(results, RoundResults)
    named = {"step": float(trainer.global_step), **figures}
    results.figures = {name: torch.as_tensor(value).detach() for name, value in named.items()}


def round_metrics(trainer: Trainer) -> dict[str, float]:
    """Return what Lightning logs at the end of the running round; empty before the server's step.

    To be called in every process: reading metrics may be collective.

    Args:
        trainer: trainer of the fit.
    """
    results = trainer.fit_loop.epoch_loop._results
    if not isinstance(results, RoundResults) or not results.figures:
        return {}
    metrics = {name: torch.as_tensor(value).item() for name, value in results.metrics(on_step=False)["log"].items()}
    return {**metrics, "step": int(metrics["step"])}
