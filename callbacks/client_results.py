"""Per-client results of a test, written to a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from flow_pl.callbacks._base import EvaluationCallback
from flow_pl.callbacks._federated import federated_data, federated_module
from flow_pl.callbacks._output_files import check_ending, check_writable, in_run_folder
from flow_pl.evaluation.counts import ClientEvaluation
from flow_pl.evaluation.metrics import ClientMetric
from flow_pl.utils.files import write_text

_BASE = 1 << 12
"""A client index is stored as two digits of this base, since single precision would round one above 2^24."""


class ClientCounts(ClientMetric):
    """Collects the counts of every client.

    `compute` returns [columns, clients] float64, in the order of the clients' indices, without those that have no
    evaluated example: index, evaluated targets, how many w_g, the personalized model, and w_g or the local model
    get right (NaN for a method without a local model), decisions of each routed block (NaN without one), and for each
    routed block the share routed locally.

    Args:
        blocks: number of routed blocks.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__(columns=7 + blocks)

    def update(self, evaluation: ClientEvaluation) -> None:
        """Add a chunk of clients."""
        either, routed, local = evaluation.global_or_local, evaluation.routed, evaluation.routed_local
        nowhere = torch.full_like(evaluation.count.float(), torch.nan)
        # every process has every column, even without any client
        blocks = self.columns - 7
        shares = [nowhere] * blocks if local is None else local.unbind(dim=1)
        self.append(
            (
                evaluation.client // _BASE,
                evaluation.client % _BASE,
                evaluation.count,
                evaluation.generalized,
                evaluation.personalized,
                nowhere if either is None else either,
                nowhere if routed is None else routed,
                *shares,
            )
        )

    def compute(self) -> Tensor:
        """Gather the counts of the clients of all processes."""
        table = self.table()
        table = table[:, table[2] > 0]
        high, low, count, generalized, personalized, either, routed, *local = table
        client = high * _BASE + low
        shares = (share / routed for share in local)
        columns = torch.stack([client, count, generalized, personalized, either, routed, *shares])
        return columns[:, client.argsort(stable=True)]


class ClientResults(EvaluationCallback[ClientCounts]):
    """Writes the results of a test to a CSV file, one row for each client that has evaluated targets.

    Columns: `client` (name), `population` (`seen` or `new`), `train_examples`, `evaluated` (targets: held-out examples,
    or tokens), `generalized_accuracy`, `personalized_accuracy`, for a method that has a local model
    `global_or_local_accuracy` (w_g or the local model is right), and `routed_local/<block>` for each routed block. The
    file appears only once it is complete.

    Args:
        path: the file (.csv), in the run's folder; folders are created.

    Raises:
        ConfigurationError: `path` has another ending; at the start of a test, it cannot be written.
    """

    def __init__(self, path: str = "clients.csv") -> None:
        super().__init__()
        self.path = check_ending(path, (".csv",))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the file before the test runs."""
        if trainer.is_global_zero:
            check_writable(in_run_folder(trainer, self.path))

    def create_metric(self, pl_module: LightningModule) -> ClientCounts | None:
        """Create the counts of one population; None in validation."""
        return ClientCounts(len(federated_module(pl_module).route_names)) if pl_module.trainer.testing else None

    def update_metric(self, metric: ClientCounts, evaluation: ClientEvaluation) -> None:
        """Add the counts of a chunk."""
        metric.update(evaluation)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: validation writes no file."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the clients of all processes, and write them in the first one."""
        # computed in every process: gathering is collective
        counts = [metric.compute() for metric in self._metrics]
        self._metrics = []
        if trainer.is_global_zero:
            blocks = federated_module(pl_module).route_names
            # a local model belongs to the method: all clients have one, or none
            has_local = not any(bool(table[4].isnan().any()) for table in counts)
            header = ["client", "population", "train_examples", "evaluated", *_ACCURACIES]
            header += ["global_or_local_accuracy"] * has_local + [f"routed_local/{block}" for block in blocks]
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(header)
            for population, table in zip(federated_data(trainer).test_populations, counts, strict=True):
                writer.writerows(_rows(trainer, population, table, has_local))
            write_text(in_run_folder(trainer, self.path), text.getvalue())


_ACCURACIES = ("generalized_accuracy", "personalized_accuracy")


def _rows(trainer: Trainer, population: str, table: Tensor, has_local: bool) -> Iterator[list[object]]:
    data = federated_data(trainer)
    for client, count, generalized, personalized, either, _, *shares in table.T.tolist():
        index = int(client)
        accuracies = [generalized / count, personalized / count] + [either / count] * has_local
        examples = int(data.federation.train_sizes[index])
        yield [data.client_name(index), population, examples, int(count), *accuracies, *shares]
