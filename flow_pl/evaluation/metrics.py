"""Compute metrics over clients: accuracy, personalization gain and the share routed locally.

Each metric keeps one row of counts per client on the device and reduces the rows at the end of the epoch. The rows of
all processes are gathered first, so the values are the same on every process and do not depend on the assignment of
clients to processes. Clients without evaluated examples do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from flow_pl.evaluation.counts import mixture_shares

MAX_MIXTURES = len(mixture_shares(3))
"""Number of columns for fixed mixtures of w_g, a local model and a memory."""

PERCENTILES = (10, 50, 90)
"""Percentiles over clients reported with each mean."""


class ClientMetric(Metric):
    """Collects a table with one row of numbers per client, gathered over the processes; a base class.

    The table is stored as a flat list, because torchmetrics represents a process without clients by an empty tensor of
    ONE dimension, which cannot be gathered with two-dimensional tables.

    Args:
        columns: number of columns.
    """

    is_differentiable = False
    full_state_update = False
    rows: list[Tensor] | Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def append(self, columns: Sequence[Tensor]) -> None:
        """Add one row per client.

        Args:
            columns: one tensor [C] per column of the table.
        """
        assert len(columns) == self.columns, f"{len(columns)} columns in a table of {self.columns}"
        # always float32, the type of the placeholder of a process without clients
        rows = torch.stack([column.detach().float() for column in columns], dim=1)
        assert isinstance(self.rows, list), "a synchronized metric cannot be updated"
        self.rows.append(rows.flatten())

    def table(self) -> Tensor:
        """Return all rows, column by column.

        Returns:
            [columns, clients] float64 on the host, where sums of counts are exact.
        """
        parts = [self.rows] if isinstance(self.rows, Tensor) else self.rows
        flat = torch.cat(parts) if parts else torch.empty(0)
        return flat.cpu().double().view(-1, self.columns).T


class ClientAccuracy(ClientMetric):
    """Measures accuracy and mean loss of one model over a set of clients.

    `compute` returns scalars, NaN if no client has an evaluated example:

    - `accuracy` (mean over examples), and over clients `accuracy_client_mean`, `accuracy_p10`, `accuracy_p50`,
      `accuracy_p90`;
    - fairness: `accuracy_worst_decile` (mean over the worst tenth of the clients, at least one), `accuracy_client_std`
      (standard deviation over clients) and `accuracy_client_gini` (Gini coefficient: half the mean absolute difference
      of two clients, divided by the mean; 0 if all are equal, NaN if all are 0 or one is negative);
    - `loss` (mean over the targets in the loss);
    - for a task with a second accuracy also `accuracy_<subset>`, `accuracy_<subset>_client_mean` and so on.

    Args:
        subset: `Objective.subset` of the task, the name of the second accuracy; empty for none.
    """

    higher_is_better = True

    def __init__(self, subset: str = "") -> None:
        super().__init__(columns=6 if subset else 4)
        self.subset = subset

    def update(
        self,
        count: Tensor,
        correct: Tensor,
        loss: Tensor,
        loss_count: Tensor,
        subset_count: Tensor | None = None,
        subset_correct: Tensor | None = None,
    ) -> None:
        """Add a chunk of clients.

        Args:
            count: [C] evaluated examples.
            correct: [C] examples the model gets right.
            loss: [C] summed loss of the model.
            loss_count: [C] number of losses in the sum.
            subset_count: [C] evaluated examples of the second accuracy; None for none.
            subset_correct: [C] such examples that the model gets right; None for none.
        """
        second = [column for column in (subset_count, subset_correct) if column is not None]
        self.append((count, correct, loss, loss_count, *second))

    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics over all clients of all processes."""
        count, correct, loss, loss_count, *second = self.table()
        figures = {**_accuracies("accuracy", count, correct), "loss": loss.sum() / loss_count.sum()}
        if second:
            figures |= _accuracies(f"accuracy_{self.subset}", *second)
        return _rounded(figures)


class ClientGain(ClientMetric):
    """Measures what personalization changes, for clients and for examples.

    `compute` returns scalars, NaN if undefined:

    - `gain`, `gain_client_mean`: personalized minus generalized accuracy, over examples and over clients;
    - `clients_helped`, `clients_unchanged`, `clients_harmed`: shares of clients;
    - `examples_both_right`, `examples_only_generalized`, `examples_only_personalized`, `examples_neither`: shares of
      examples;
    - for a method with a local model: `global_or_local_accuracy`, w_g or w_l right (not an upper bound for mixtures,
      which may be right where both models are wrong); `best_mixture_accuracy`, the accuracy of the best fixed mixture
      of the method's models, the same for all clients and chosen on these very examples; and `gain_over_mixture`,
      personalized accuracy minus that, the value of deciding per instance.
    """

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__(columns=5 + MAX_MIXTURES)

    def update(
        self,
        count: Tensor,
        generalized: Tensor,
        personalized: Tensor,
        both: Tensor,
        global_or_local: Tensor | None = None,
        mixtures: Tensor | None = None,
    ) -> None:
        """Add a chunk of clients.

        Args:
            count: [C] evaluated examples.
            generalized: [C] examples that w_g gets right.
            personalized: [C] examples that the personalized model gets right.
            both: [C] examples that both get right.
            global_or_local: [C] examples that w_g or the local model gets right; None for a method without a local
                model.
            mixtures: [C, K] examples that each fixed mixture gets right; None for a method without a local model.
        """
        # always add these columns, so that a process without clients gathers a table of the same width
        unknown = torch.full_like(count, torch.nan, dtype=torch.float32)
        mixed = () if mixtures is None else mixtures.unbind(1)
        known = [unknown if global_or_local is None else global_or_local, *mixed]
        self.append((count, generalized, personalized, both, *known, *[unknown] * (MAX_MIXTURES - len(mixed))))

    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics over all clients of all processes."""
        table = self.table()
        count, generalized, personalized, both, either, *mixtures = table[:, table[0] > 0]
        gain = personalized - generalized
        examples = count.sum()
        figures = {
            "gain": gain.sum() / examples,
            "gain_client_mean": (gain / count).mean(),
            "clients_helped": _share(gain > 0, gain),
            "clients_unchanged": _share(gain == 0, gain),
            "clients_harmed": _share(gain < 0, gain),
            "examples_both_right": both.sum() / examples,
            "examples_only_generalized": (generalized - both).sum() / examples,
            "examples_only_personalized": (personalized - both).sum() / examples,
            "examples_neither": (count - generalized - personalized + both).sum() / examples,
        }
        if not either.isnan().all():
            figures["global_or_local_accuracy"] = either.sum() / examples
        known = [mixture.sum() for mixture in mixtures if not mixture.isnan().all()]
        if known:
            best = torch.stack(known).max()
            figures["best_mixture_accuracy"] = best / examples
            figures["gain_over_mixture"] = (personalized.sum() - best) / examples
        return _rounded(figures)


class RoutedShare(ClientMetric):
    """Measures the share of decisions routed locally, per block and overall.

    `compute` returns scalars, NaN if no decision was made: `routed_local` (over all decisions),
    `routed_local_p10`, `routed_local_p50`, `routed_local_p90` (of the share of each client) and
    `routed_local/<block>` for each block.

    Args:
        blocks: names of the routed blocks, in the order of the columns of `routed_local`.
    """

    def __init__(self, blocks: Sequence[str]) -> None:
        super().__init__(columns=1 + len(blocks))
        self.blocks = tuple(blocks)

    def update(self, routed: Tensor, routed_local: Tensor) -> None:
        """Add a chunk of clients.

        Args:
            routed: [C] number of decisions per block.
            routed_local: [C, blocks] decisions for the local branch.
        """
        self.append((routed, *routed_local.unbind(dim=1)))

    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics over all clients of all processes."""
        table = self.table()
        routed, *routed_local = table[:, table[0] > 0]
        per_client = torch.stack(routed_local).mean(dim=0) / routed
        shares = [local.sum() / routed.sum() for local in routed_local]
        return _rounded(
            {
                "routed_local": torch.stack(shares).mean(),
                **_percentiles("routed_local", per_client),
                **{f"routed_local/{block}": share for block, share in zip(self.blocks, shares, strict=True)},
            }
        )


def _share(condition: Tensor, value: Tensor) -> Tensor:
    """Return the share of clients for which a condition on their value [clients] holds; NaN if a value is."""
    return condition.double().where(~value.isnan(), torch.nan).mean()


def _accuracies(name: str, count: Tensor, correct: Tensor) -> dict[str, Tensor]:
    """Compute accuracy over examples and over clients from counts [clients]; NaN if nothing was evaluated."""
    count, correct = count[count > 0], correct[count > 0]
    return {
        name: correct.sum() / count.sum(),
        f"{name}_client_mean": (correct / count).mean(),
        **_percentiles(name, correct / count),
        **_fairness(name, correct / count),
    }


def _fairness(name: str, value: Tensor) -> dict[str, Tensor]:
    """Compute how unevenly a value [clients] is spread over clients; NaN without clients, or if a value is NaN."""
    clients = len(value)
    ordered = value.sort().values
    # Sum of |a - b| over all pairs: the i-th smallest value is added i times and subtracted clients - 1 - i times.
    rank = torch.arange(clients, dtype=value.dtype)
    differences = ((2 * rank - clients + 1) * ordered).sum()
    worst, nan = ordered[: -(-clients // 10)].mean(), value.new_tensor(torch.nan)
    return {
        f"{name}_worst_decile": nan if value.isnan().any() else worst,  # sorting puts NaN last, among the best
        f"{name}_client_std": value.std(correction=0) if clients else nan,
        # relative to the mean, so of no meaning for R2 below 0
        f"{name}_client_gini": nan if (value < 0).any() else differences / (clients * ordered.sum()),
    }


def _percentiles(name: str, value: Tensor) -> dict[str, Tensor]:
    """Compute percentiles of a value [clients] over the clients; NaN without clients."""
    if not len(value):
        value = value.new_full((1,), torch.nan)
    levels = value.quantile(value.new_tensor(PERCENTILES) / 100)
    return {f"{name}_p{percentile}": level for percentile, level in zip(PERCENTILES, levels, strict=True)}


def _rounded(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to single precision, since not every device can log doubles."""
    return {name: figure.float() for name, figure in figures.items()}
