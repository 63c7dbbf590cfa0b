"""Accuracy of the clients' personalized models."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from flow_pl.callbacks._base import EvaluationCallback
from flow_pl.callbacks._federated import federated_module
from flow_pl.evaluation.counts import ClientEvaluation
from flow_pl.evaluation.metrics import ClientAccuracy


class PersonalizedAccuracy(EvaluationCallback[ClientAccuracy]):
    """Logs the accuracy of each client's personalized model on the client's held-out examples.

    Logs `personalized_accuracy` (mean over examples), `personalized_accuracy_client_mean`,
    `personalized_accuracy_p10`, `_p50`, `_p90` (over clients), `personalized_accuracy_worst_decile`,
    `_client_std`, `_client_gini` (how evenly it is spread over clients) and `personalized_loss`, under `val/` or
    `test/<population>/`. For next-token prediction the accuracies are also logged without the special
    tokens: `personalized_accuracy_without_oov_eos`, `personalized_accuracy_without_oov_eos_client_mean` and so on.
    For a method without a personal model they equal the generalized ones.
    """

    model = "personalized_"

    def create_metric(self, pl_module: LightningModule) -> ClientAccuracy:
        """Create the metric for one dataloader."""
        return ClientAccuracy(federated_module(pl_module).objective.subset)

    def update_metric(self, metric: ClientAccuracy, evaluation: ClientEvaluation) -> None:
        """Add the counts of the personalized models."""
        metric.update(
            evaluation.count,
            evaluation.personalized,
            evaluation.personalized_loss,
            evaluation.loss_count,
            evaluation.subset_count,
            evaluation.subset_personalized,
        )
