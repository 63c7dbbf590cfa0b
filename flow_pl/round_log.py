"""What a round of training logs, handed to Lightning at once.

`LightningModule.log` makes a metric of each value, and walks, synchronizes and resets all of them several times a
round, which takes a fifth of a small model's round. Its figures are final when they are logged: summed over clients and
processes. So they wait beside Lightning's own results, and go where those go, at the same time: to loggers, callbacks,
monitors and checkpoints.
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
    """Lightning's results of a training epoch, with the figures of a round beside them.

    Attributes:
        figures: scalars of the round by name, the same in every process; none before it has ended.
    """

    def __init__(self) -> None:
        super().__init__(training=True)
        self.figures: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to log."""
        return bool(self.figures) or len(self) > 0

    def metrics(self, on_step: bool) -> _METRICS:
        """Return what is logged, for loggers, callbacks and progress bars."""
        metrics: _METRICS = super().metrics(on_step)
        if not on_step:
            metrics["log"].update(self.figures)
            metrics["callback"].update(self.figures)
        return metrics

    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        """Forget what has been logged, or what a hook has logged."""
        super().reset(metrics, fx)
        if fx is None and not metrics:
            self.figures = {}


def prepare_log(trainer: Trainer) -> None:
    """Let a fit's rounds be logged by `log_round`."""
    trainer.fit_loop.epoch_loop._results = RoundResults()


def log_round(trainer: Trainer, figures: dict[str, Any]) -> None:
    """Log the figures of a round that has ended, at the number of rounds done as the loggers' step.

    Args:
        trainer: of the fit, behind the server's step.
        figures: scalars by name, the same in every process.
    """
    results = trainer.fit_loop.epoch_loop._results
    assert isinstance(results, RoundResults)
    named = {"step": float(trainer.global_step), **figures}
    results.figures = {name: torch.as_tensor(value).detach() for name, value in named.items()}
