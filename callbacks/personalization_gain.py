"""Personalization gain: the difference that personalization makes for clients."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from flow_pl.callbacks._base import EvaluationCallback
from flow_pl.evaluation.counts import ClientEvaluation
from flow_pl.evaluation.metrics import ClientGain


class PersonalizationGain(EvaluationCallback[ClientGain]):
    """Logs the personalization gain (personalized minus generalized accuracy), for clients and for examples.

    Logs `gain`, `gain_client_mean`, `clients_helped`, `clients_unchanged`, `clients_harmed`, the four-fold table
    `examples_both_right`, `examples_only_generalized`, `examples_only_personalized`, `examples_neither` and, for a
    method with a local model, `global_or_local_accuracy`, `best_mixture_accuracy` and `gain_over_mixture`, under
    `val/` or `test/<population>/`.
    """

    def create_metric(self, pl_module: LightningModule) -> ClientGain:
        """Create the metric for one dataloader."""
        return ClientGain()

    def update_metric(self, metric: ClientGain, evaluation: ClientEvaluation) -> None:
        """Add the counts of both models."""
        metric.update(
            evaluation.count,
            evaluation.generalized,
            evaluation.personalized,
            evaluation.both,
            evaluation.global_or_local,
            evaluation.mixtures,
        )
