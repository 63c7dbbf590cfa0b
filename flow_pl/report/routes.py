"""Count the routing decisions of a set of clients, as the report shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.evaluation.counts import ClientPredictions

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.signedinteger[Any]]

BINS = 20
"""Number of bins in the histogram of probabilities, from 0 to 1."""

OF_A_CLIENT = 3
"""Largest number of instances of one client among the most local or the most global ones."""

TINY = 1e-12
"""Smallest probability whose logarithm is taken."""


class Instance(NamedTuple):
    """Describes one held-out instance and its route through the network.

    Attributes:
        client: index of its client.
        x: features as passed to a model; of several inputs, those that are shown.
        label: [*P], or [labels] for a task with several labels; -1 if missing.
        generalized: whether w_g is right, in the shape of the label.
        personalized: whether the personalized model is right, in the shape of the label.
        mask: [*P], true where a target is predicted.
        local: [*P, blocks] probabilities of the local branch.
    """

    client: int
    x: NDArray[Any]
    label: Ints
    generalized: NDArray[np.bool_]
    personalized: NDArray[np.bool_]
    mask: NDArray[np.bool_]
    local: Floats

    @property
    def share(self) -> float:
        """Return the mean probability of the local branch, over blocks and positions."""
        return float(self.local[self.mask].mean())


class ClientRoutes(NamedTuple):
    """The decisions of one client.

    Attributes:
        client: index of the client.
        decisions: number of decisions in each block.
        local: [blocks] mean probability of the local branch.
        common: [D, blocks] probabilities on the common instances.
    """

    client: int
    decisions: int
    local: Floats
    common: Floats


class Routes:
    """Decisions of clients; counts of several processes can be added.

    Args:
        blocks: number of routed blocks (B).
        classes: number of classes.
        kept: number of most local and of most global instances to keep.

    Attributes:
        histogram: [B, BINS] number of decisions by their probability of the local branch.
        entropy: [B] sum of the decisions' entropies, in bits.
        total: [B] sum of the probabilities.
        local: [B] number of decisions for the local branch.
        decisions: number of decisions in each block.
        class_count: [classes] number of decisions in each block, by target class.
        class_total: [classes, B] sums of their probabilities.
        clients: routes of the clients, in the order in which they were added.
        most_local: the instances with the largest `share`, the largest first, at most `OF_A_CLIENT` of one client.
        most_global: those with the smallest, the smallest first.
    """

    def __init__(self, blocks: int, classes: int, kept: int = 12) -> None:
        self.kept = kept
        self.histogram = np.zeros((blocks, BINS), dtype=np.int64)
        self.entropy, self.total = np.zeros(blocks), np.zeros(blocks)
        self.local = np.zeros(blocks, dtype=np.int64)
        self.decisions = 0
        self.class_count = np.zeros(classes, dtype=np.int64)
        self.class_total = np.zeros((classes, blocks))
        self.clients: list[ClientRoutes] = []
        self.most_local: list[Instance] = []
        self.most_global: list[Instance] = []

    def add(self, predictions: ClientPredictions, features: NDArray[Any], common: int) -> None:
        """Count a chunk of clients.

        Args:
            predictions: of a method with routes.
            features: [C, N, ...] features of the predicted instances.
            common: number of leading instances that are common to all clients and not the client's own.
        """
        if predictions.local_probability is None:  # no client has a target to predict
            return
        found = {
            name: value.numpy(force=True)
            for name, value in vars(predictions).items()
            if value is not None and name != "routes"
        }
        masks, local = found["mask"], found["local_probability"].astype(np.float64)
        for row, client in enumerate(found["client"].tolist()):
            shared = local[row, :common][masks[row, :common]]
            mask, q = masks[row, common:], local[row, common:]
            decided = q[mask]
            if len(decided):
                self._count(decided, mask, found["label"][row, common:], q)
                self.clients.append(ClientRoutes(client, len(decided), decided.mean(0), shared))
                columns = {name: values[row, common:] for name, values in found.items() if values.ndim > 1}
                self._keep(client, features[row, common:], mask, q, columns)

    def merge(self, others: Iterable[Routes]) -> None:
        """Add the counts of other processes."""
        for other in others:
            for name in ("histogram", "entropy", "total", "local", "class_count", "class_total"):
                getattr(self, name).__iadd__(getattr(other, name))
            self.decisions += other.decisions
            self.clients += other.clients
            self._rank(other.most_local, other.most_global)

    @property
    def mean(self) -> Floats:
        """Return the mean probability [B] of the local branch."""
        return self.total / max(self.decisions, 1)

    @property
    def share(self) -> Floats:
        """Return the share [B] of decisions routed locally."""
        return self.local / max(self.decisions, 1)

    @property
    def decision_entropy(self) -> Floats:
        """Return the mean entropy [B] of a decision in bits: 0 if the router is certain, 1 if it is undecided."""
        return self.entropy / max(self.decisions, 1)

    @property
    def explained(self) -> tuple[Floats, Floats]:
        """Compute the bits [B] of the route explained by the client, and the further bits explained by the instance.

        The entropy of the mean route is the sum of both and of the decisions' mean entropy (the chain rule of mutual
        information). Both are 0 if all instances are routed alike; the second is 1 if half of every client's instances
        are routed locally and half globally, with certainty.
        """
        of_clients = np.zeros_like(self.total)
        for client in self.clients:
            of_clients += client.decisions / self.decisions * entropy(client.local)
        by_client, by_instance = entropy(self.mean) - of_clients, of_clients - self.decision_entropy
        return np.maximum(by_client, 0.0), np.maximum(by_instance, 0.0)

    def _count(self, decided: Floats, mask: NDArray[np.bool_], label: Ints, q: Floats) -> None:
        bins = np.minimum((decided * BINS).astype(np.int64), BINS - 1)
        for block, counts in enumerate(self.histogram):
            counts += np.bincount(bins[:, block], minlength=BINS)
        self.entropy += entropy(decided).sum(0)
        self.total += decided.sum(0)
        self.local += (decided > 0.5).sum(0)
        self.decisions += len(decided)
        if label.ndim > mask.ndim:  # several labels: a decision counts for each of them
            rows, classes = np.nonzero((label > 0) & mask[..., None])
            probabilities = q[rows]
        elif label.dtype.kind == "f":  # real values are no classes
            return
        else:
            labelled = mask & (label >= 0)
            classes, probabilities = label[labelled], q[labelled]
        np.add.at(self.class_count, classes, 1)
        np.add.at(self.class_total, classes, probabilities)

    def _keep(
        self, client: int, features: NDArray[Any], mask: NDArray[np.bool_], q: Floats, columns: dict[str, NDArray[Any]]
    ) -> None:
        axes = tuple(range(1, mask.ndim))
        count = mask.sum(axes)
        rows = np.flatnonzero(count)
        shares = (q.mean(-1) * mask).sum(axes)[rows] / count[rows]
        rows = rows[np.argsort(shares, kind="stable")]

        def instance(row: int) -> Instance:
            names = ("label", "generalized_correct", "personalized_correct")
            label, generalized, personalized = (columns[name][row] for name in names)
            return Instance(client, features[row], label, generalized, personalized, mask[row], q[row])

        self._rank(map(instance, rows[-self.kept :]), map(instance, rows[: self.kept]))

    def _rank(self, local: Iterable[Instance], global_: Iterable[Instance]) -> None:
        # break ties by client, so that the order does not depend on the processes
        self.most_local = self._first(sorted([*self.most_local, *local], key=lambda i: (-i.share, i.client)))
        self.most_global = self._first(sorted([*self.most_global, *global_], key=lambda i: (i.share, i.client)))

    def _first(self, ranked: Iterable[Instance]) -> list[Instance]:
        found: list[Instance] = []
        counts: Counter[int] = Counter()
        for instance in ranked:
            counts[instance.client] += 1
            if counts[instance.client] <= OF_A_CLIENT:
                found.append(instance)
        return found[: self.kept]


def entropy(q: Floats) -> Floats:
    """Compute the entropy of a binary choice, in bits, from the probability of one option."""
    p = np.clip(q, TINY, 1 - TINY)
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
