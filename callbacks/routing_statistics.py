"""Share of decisions routed locally."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from flow_pl.callbacks._base import EvaluationCallback
from flow_pl.callbacks._federated import federated_module
from flow_pl.evaluation.counts import ClientEvaluation
from flow_pl.evaluation.metrics import RoutedShare


class RoutingStatistics(EvaluationCallback[RoutedShare]):
    """Logs the share of decisions routed locally; nothing for a method without routes.

    Logs `routed_local` (all decisions), `routed_local/<block>` for each routed block and, over clients,
    `routed_local_p10`, `_p50`, `_p90`, under `val/` or `test/<population>/`.
    """

    def create_metric(self, pl_module: LightningModule) -> RoutedShare | None:
        """Create the metric for one dataloader; None for a method without routes."""
        names = federated_module(pl_module).route_names
        return RoutedShare(names) if names else None

    def update_metric(self, metric: RoutedShare, evaluation: ClientEvaluation) -> None:
        """Add the routing decisions."""
        assert evaluation.routed is not None
        assert evaluation.routed_local is not None
        metric.update(evaluation.routed, evaluation.routed_local)
