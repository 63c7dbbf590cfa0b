"""Accuracy of the server's model on the clients."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from callbacks.base import EvaluationCallback
from flow_pl.evaluation import ClientEvaluation
from flow_pl.metrics import ClientAccuracy


class GeneralizedAccuracy(EvaluationCallback[ClientAccuracy]):
    """Logs how well the server's model w_g, untouched, does on the clients' held-out examples.

    Logs `generalized_accuracy` (mean over examples), `generalized_accuracy_client_mean`,
    `generalized_accuracy_p10`, `_p50`, `_p90` (over clients) and `generalized_loss`, behind `val/` or
    `test/<population>/`.
    """

    model = "generalized_"

    def create_metric(self, pl_module: LightningModule) -> ClientAccuracy:
        """A fresh metric for one dataloader."""
        return ClientAccuracy()

    def update_metric(self, metric: ClientAccuracy, evaluation: ClientEvaluation) -> None:
        """Add the counts of w_g."""
        metric.update(evaluation.count, evaluation.generalized, evaluation.generalized_loss)
