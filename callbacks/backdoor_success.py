"""Success rate of a backdoor attack."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torchmetrics import MeanMetric

from flow_pl.callbacks._base import metric_prefixes
from flow_pl.callbacks._federated import federated_module
from flow_pl.engine.attacks import Backdoor
from flow_pl.evaluation.counts import ClientEvaluation


class BackdoorSuccess(Callback):
    """Logs the share of honest clients' held-out examples that the trigger of `Backdoor` turns into its target.

    Excludes examples of the target class. Logs `backdoor_generalized` and `backdoor_personalized`
    under `val/` or `test/<population>/`; nothing under another attack. Clients are personalized once more for this, on
    their own clean examples.
    """

    def __init__(self) -> None:
        self._metrics: list[dict[str, MeanMetric]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the metrics."""
        wanted = isinstance(federated_module(pl_module).attack, Backdoor) and not trainer.sanity_checking
        names = ("backdoor_generalized", "backdoor_personalized")
        self._metrics = [
            {f"{prefix}{name}": MeanMetric().to(pl_module.device) for name in names}
            for prefix in (metric_prefixes(trainer) if wanted else ())
        ]

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate a chunk of clients with the trigger."""
        module = federated_module(pl_module)
        if not self._metrics or not len(batch) or not isinstance(module.attack, Backdoor):
            return
        evaluation: ClientEvaluation = module.validation_step(module.attack.triggered(batch), batch_idx)
        counts = (evaluation.generalized, evaluation.personalized)
        for metric, turned in zip(self._metrics[dataloader_idx].values(), counts, strict=True):
            metric.update(turned / evaluation.count.clamp_min(1), evaluation.count)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the shares over the examples of the clients of all processes."""
        for metrics in self._metrics:
            figures = {name: metric.compute() for name, metric in metrics.items()}
            # already gathered, as in `EvaluationCallback`
            pl_module.log_dict(figures, sync_dist=True, rank_zero_only=True)
        self._metrics = []

    on_test_epoch_end = on_validation_epoch_end
