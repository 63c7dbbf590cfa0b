"""Accuracy of the server's model on the clients."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from flow_pl.callbacks._base import EvaluationCallback
from flow_pl.callbacks._federated import federated_module
from flow_pl.evaluation.counts import ClientEvaluation
from flow_pl.evaluation.metrics import ClientAccuracy


class GeneralizedAccuracy(EvaluationCallback[ClientAccuracy]):
    """Logs the accuracy of the unmodified global model w_g on the clients' held-out examples.

    Logs `generalized_accuracy` (mean over examples), `generalized_accuracy_client_mean`,
    `generalized_accuracy_p10`, `_p50`, `_p90` (over clients), `generalized_accuracy_worst_decile`,
    `_client_std`, `_client_gini` (how evenly it is spread over clients) and `generalized_loss`, under `val/` or
    `test/<population>/`. For next-token prediction the accuracies are also logged without the special
    tokens: `generalized_accuracy_without_oov_eos`, `generalized_accuracy_without_oov_eos_client_mean` and so on.
    """

    model = "generalized_"

    def create_metric(self, pl_module: LightningModule) -> ClientAccuracy:
        """Create the metric for one dataloader."""
        return ClientAccuracy(federated_module(pl_module).objective.subset)

    def update_metric(self, metric: ClientAccuracy, evaluation: ClientEvaluation) -> None:
        """Add the counts of w_g."""
        metric.update(
            evaluation.count,
            evaluation.generalized,
            evaluation.generalized_loss,
            evaluation.loss_count,
            evaluation.subset_count,
            evaluation.subset_generalized,
        )
