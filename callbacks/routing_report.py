"""Reports a test's results by client and route on a self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer

from flow_pl.callbacks._base import EvaluationCallback
from flow_pl.callbacks._federated import federated_data, federated_module
from flow_pl.callbacks._output_files import check_ending, check_writable
from flow_pl.callbacks._results import Results, ResultsCallback
from flow_pl.callbacks.client_results import ClientCounts
from flow_pl.callbacks.results_table import percent, result_rows
from flow_pl.data.batch import ClientBatch
from flow_pl.evaluation.counts import ClientEvaluation
from flow_pl.loggers import wandb_loggers
from flow_pl.report.agreement import CommonInstances, common_instances, with_common
from flow_pl.report.names import count_classes, shown
from flow_pl.report.routes import Routes
from flow_pl.results.run_folder import LOGS
from flow_pl.utils.files import write_text
from flow_pl.utils.optional import import_optional
from flow_pl.utils.validation import require_count

if TYPE_CHECKING:
    from flow_pl.report.evidence import Evidence


class RoutingReport(EvaluationCallback[ClientCounts], ResultsCallback):
    """Writes a page on a test: its results, the results of clients, and the routing decisions.

    The HTML page is self-contained and also suits phones. It has the table of results; accuracies and
    routes over the rounds, from `LearningCurves` or the run's CSV log; the clients' gains, accuracies from worst
    to best and by size, and the worst clients; and for a method that routes the distribution of the routing
    probabilities by block, their entropy, the shares by client and by class, the agreement of clients on common
    instances, and the most local and most global instances. Figures are also written as PNG files, where `WandbResults`
    finds them; with a `WandbLogger` its tables are logged as `report/clients`, `report/blocks` and `report/classes`.

    Accuracies and shares are those of the test, over all clients. For statistics of single instances, some clients of
    all sizes are personalized once more, with the minibatches and dropout masks of the test. Clients' routes are
    compared on common instances, which each client's own model routes.

    Args:
        path: path of the page (.html), in the run's folder.
        figures: folder for the figures, in the run's folder.
        curve: the table that `LearningCurves` wrote, in the run's folder; if missing, the run's CSV log is used.
        clients: maximum number of clients of each population that are analysed instance by instance, in whole chunks;
            at least one chunk.
        common: number of instances that all of these clients route; 0 to not compare clients.
        instances: number of most local and of most global instances shown.

    Attributes:
        evidence: what the test found, for a subclass's `report`; None before and after.

    Raises:
        ConfigurationError: a number is out of range or `path` has another ending; at the start of a test, a file cannot
            be written, or matplotlib is not installed.
    """

    def __init__(
        self,
        path: str = "report.html",
        figures: str = "figures",
        curve: str = "curve.csv",
        clients: int = 100,
        common: int = 32,
        instances: int = 12,
    ) -> None:
        super().__init__()
        require_count(clients=clients, instances=instances)
        require_count(0, common=common)
        self.path = check_ending(path, (".html",))
        self.figures = figures
        self.curve = curve
        self.clients = clients
        self.common = common
        self.instances = instances
        self._routes: list[Routes] = []
        self._common: CommonInstances | None = None
        self._every: dict[int, int] = {}
        self.evidence: Evidence | None = None
        self._drawn: Mapping[str, Path] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the files before the test runs."""
        import_optional("matplotlib", "compare", "RoutingReport")
        if trainer.is_global_zero:
            root = Path(trainer.default_root_dir)
            check_writable(root / self.path)
            check_writable(root / self.figures / "clients.png")

    def create_metric(self, pl_module: LightningModule) -> ClientCounts | None:
        """Create the counts of one population; None in validation."""
        return ClientCounts(len(federated_module(pl_module).route_names)) if pl_module.trainer.testing else None

    def update_metric(self, metric: ClientCounts, evaluation: ClientEvaluation) -> None:
        """Add the counts of a chunk."""
        metric.update(evaluation)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts, and choose the common instances."""
        super().on_test_epoch_start(trainer, pl_module)
        data, module = federated_data(trainer), federated_module(pl_module)
        blocks = len(module.route_names)
        self._routes, self._common, self._every = [], None, {}
        if blocks:
            classes = count_classes(data, module.objective)
            self._routes = [Routes(blocks, classes, self.instances) for _ in data.test_populations]
            self._common = common_instances(data, self.common)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ClientBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a chunk, and analyse the instances of some chunks."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if not self._routes or not len(batch):
            return
        if dataloader_idx not in self._every:
            # chunks are sorted by decreasing client size: every n-th covers all sizes
            chunks = max(1, self.clients // (len(batch) * trainer.world_size))
            self._every[dataloader_idx] = -(-int(trainer.num_test_batches[dataloader_idx]) // chunks)
        if batch_idx % self._every[dataloader_idx] == 0:
            asked = with_common(batch, self._common)
            assert asked.heldout is not None
            with trainer.precision_plugin.test_step_context():
                predictions = federated_module(pl_module).predict_step(asked, batch_idx, dataloader_idx)
            shared = 0 if self._common is None else len(self._common.y)
            self._routes[dataloader_idx].add(predictions, shown(asked.heldout.x).numpy(force=True), shared)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the report covers only a test."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the clients of all processes, and draw the figures in the first one."""
        # in every process: gathering is collective
        counts = [metric.compute() for metric in self._metrics]
        routes = _gathered(self._routes)
        self._metrics, self._routes, self._common = [], [], None
        if trainer.is_global_zero:
            from flow_pl.report.drawings import draw  # needs matplotlib

            self.evidence = self._collect(trainer, pl_module, counts, routes)
            # before the end of the test, when WandbResults looks for them
            self._drawn = draw(self.evidence, Path(trainer.default_root_dir) / self.figures)

    def report(self, trainer: Trainer, pl_module: LightningModule, rounds: int, results: Results) -> None:
        """Write the page, and log the tables."""
        from flow_pl.report.page import report
        from flow_pl.report.tables import block_table, class_table, client_table

        evidence, drawn = self.evidence, self._drawn
        self.evidence, self._drawn = None, {}
        assert evidence is not None
        text = report(evidence, drawn, result_rows(results, evidence.blocks), _highlights(results))
        write_text(Path(trainer.default_root_dir) / self.path, text)
        tables = {"clients": client_table, "blocks": block_table, "classes": class_table}
        for logger in wandb_loggers(trainer):
            for name, make in tables.items():
                table = make(evidence)
                if table.rows:
                    logger.log_table(f"report/{name}", columns=table.columns, data=table.rows, step=rounds)

    def _collect(
        self, trainer: Trainer, pl_module: LightningModule, counts: list[torch.Tensor], routes: list[Routes]
    ) -> Evidence:
        from flow_pl.report.evidence import Evidence
        from flow_pl.report.names import class_names, kind_of, token_names
        from flow_pl.results.runs import Client, read_curve, read_log

        data, module, root = federated_data(trainer), federated_module(pl_module), Path(trainer.default_root_dir)
        clients: dict[str, list[Client]] = {}
        shares: dict[str, list[list[float]]] = {}
        decisions: dict[str, list[float]] = {}
        for population, table in zip(data.test_populations, counts, strict=True):
            for index, count, generalized, personalized, _, routed, *local in table.T.tolist():
                name, examples = data.client_name(int(index)), int(data.federation.train_sizes[int(index)])
                found = Client(name, population, examples, generalized / count, personalized / count)
                clients.setdefault(population, []).append(found)
                shares.setdefault(population, []).append(local)
                decisions.setdefault(population, []).append(routed)
        return Evidence(
            method=type(module.method).__name__,
            backbone=type(module.backbone).__name__,
            data=type(data).__name__,
            rounds=self.tested_round(trainer),
            blocks=module.route_names,
            clients=clients,
            shares=shares,
            decisions=decisions,
            routes=dict(zip(data.test_populations, routes, strict=False)),
            common=self.common,
            curve=read_curve(root / self.curve) or read_log(root / LOGS),
            kind=kind_of(data, module.objective),
            classes=class_names(data, module.objective),
            tokens=token_names(data),
            names={one.client: data.client_name(one.client) for found in routes for one in found.clients},
            accuracy=module.objective.accuracy or "accuracy",
        )


def _gathered(routes: list[Routes]) -> list[Routes]:
    """Gather the counts of all processes in the first one."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return routes
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, routes)
    first, *others = parts
    for population, found in enumerate(first):
        found.merge(other[population] for other in others)
        found.clients.sort(key=lambda client: client.client)
    return list(first)


_HIGHLIGHTS = (
    ("personalized_accuracy", "Personalized accuracy (%)", False),
    ("gain", "Gain of personalization (points)", True),
    ("clients_harmed", "Clients harmed (%)", False),
    ("personalized_accuracy_worst_decile", "Personalized, worst tenth of clients (%)", False),
    ("routed_local", "Routed local (%)", False),
)


def _highlights(results: Results) -> dict[str, dict[str, str]]:
    """Return key figures by name and population."""
    found = {
        label: {population: percent(m[name], signed) for population, m in results.items() if name in m}
        for name, label, signed in _HIGHLIGHTS
    }
    return {label: values for label, values in found.items() if values}
