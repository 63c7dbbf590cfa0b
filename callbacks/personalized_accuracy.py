"""Accuracy of the clients' personalized models."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from callbacks.base import EvaluationCallback
from flow_pl.evaluation import ClientEvaluation
from flow_pl.metrics import ClientAccuracy


class PersonalizedAccuracy(EvaluationCallback[ClientAccuracy]):
    """Logs how well each client's personalized model does on the client's held-out examples.

    Logs `personalized_accuracy` (mean over examples), `personalized_accuracy_client_mean`,
    `personalized_accuracy_p10`, `_p50`, `_p90` (over clients) and `personalized_loss`, behind `val/` or
    `test/<population>/`. For a method without a personal model they equal the
    generalized ones.
    """

    model = "personalized_"

    def create_metric(self, pl_module: LightningModule) -> ClientAccuracy:
        """A fresh metric for one dataloader."""
        return ClientAccuracy()

    def update_metric(self, metric: ClientAccuracy, evaluation: ClientEvaluation) -> None:
        """Add the counts of the personalized models."""
        metric.update(evaluation.count, evaluation.personalized, evaluation.personalized_loss)
