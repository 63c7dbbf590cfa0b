"""Decide which clients take part, and split each client's rows into training, validation and test rows.

Sizes follow from the number of rows by a formula, for all clients at once and without reading a row; the rows
themselves are drawn when a client is read, from (split seed, client).
"""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.data.store.client_store import ROLES, ClientStore
from flow_pl.errors import ConfigurationError
from flow_pl.utils.rng import Stream, generator
from flow_pl.utils.validation import require_count, require_fraction

Heldout = Literal["val", "test", "predict"]
"""Rows that a client is evaluated on; "predict" = its test rows and its unlabelled rows."""

Population = Literal["seen", "new", "validation", "left out"]
"""Seen clients are trained on; new clients are only tested; validation clients, if the data has any, are only evaluated
after rounds; clients with fewer examples than `min_examples` are left out."""

POPULATIONS: tuple[Population, ...] = ("seen", "new", "validation", "left out")

Ints = NDArray[np.signedinteger[Any]]

_log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Holds the split of one client, as ascending indices into its rows in the store.

    Attributes:
        train: rows to train or to personalize on; at least one.
        val: rows for validation.
        test: rows for testing.
        unlabelled: rows without a label, to predict.
    """

    train: Ints
    val: Ints
    test: Ints
    unlabelled: Ints

    def heldout(self, rows: Heldout) -> Ints:
        """Return the rows to evaluate on."""
        return np.concatenate([self.test, self.unlabelled]) if rows == "predict" else getattr(self, rows)


class Federation:
    """Describes the clients of a store, their splits, and which clients are new.

    Holds a few integers per client.

    Args:
        store: the clients' rows.
        val_fraction: share of a client's labelled rows for validation; unless it is 0, a client with at least 3
            labelled rows has at least one. Without effect if the data specifies its validation rows.
        test_fraction: share of a client's labelled rows for testing; unless it is 0, a client with at least 2 labelled
            rows has at least one. Without effect if the data specifies its test rows.
        new_client_fraction: share of the clients that are new, that is, never sampled in training. Without effect if
            the data names its test clients, which are then the new ones.
        min_examples: clients with fewer labelled rows are left out.
        split_seed: seed of the splits and of the choice of new clients.

    Attributes:
        store: the clients' rows.
        train_sizes: [M] int32 number of training rows of each client, at least 1.
        val_sizes: [M] int32 number of validation rows.
        test_sizes: [M] int32 number of test rows.
        seen: indices of the clients to train on, ascending.
        new: indices of the new clients, ascending.
        validation: indices of the clients that the data marks for validation only, ascending.

    Raises:
        ConfigurationError: a share is not in [0, 1), validation and test leave nothing to train on, the seed is
            negative, or `min_examples` leaves no client.
    """

    def __init__(
        self,
        store: ClientStore,
        *,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        new_client_fraction: float = 0.1,
        min_examples: int = 1,
        split_seed: int = 0,
    ) -> None:
        check_split(val_fraction, test_fraction, new_client_fraction, min_examples, split_seed)
        self.store = store
        self._seed = split_seed
        labelled, fixed_val, fixed_test = map(np.asarray, (store.labelled, store.val_rows, store.test_rows))
        sizes = _split_sizes(labelled, fixed_val, fixed_test, val_fraction, test_fraction)
        self.train_sizes, self.val_sizes, self.test_sizes = (part.astype(np.int32) for part in sizes)
        self._unlabelled = (store.sizes - store.labelled).astype(np.int32)
        self._population = self._draw_populations(new_client_fraction, min_examples)
        self.seen = np.flatnonzero(self._population == POPULATIONS.index("seen"))
        self.new = np.flatnonzero(self._population == POPULATIONS.index("new"))
        self.validation = np.flatnonzero(self._population == POPULATIONS.index("validation"))

    def heldout_sizes(self, rows: Heldout) -> Ints:
        """Return the number of rows [M] that each client is evaluated on."""
        sizes = {"val": self.val_sizes, "test": self.test_sizes, "predict": self.test_sizes + self._unlabelled}
        return sizes[rows]

    def population(self, client: int) -> Population:
        """Return the population that a client belongs to."""
        return POPULATIONS[int(self._population[client])]

    def split(self, client: int) -> Split:
        """Return the split of a client's rows: disjoint, complete, and the same in every call.

        Args:
            client: index of the client in the store.

        Returns:
            The rows of each part.
        """
        labelled = int(self.store.labelled[client])
        fixed_val, fixed_test = (max(int(rows[client]), 0) for rows in (self.store.val_rows, self.store.test_rows))
        # rows that the data specifies for validation and testing stay in place after the drawn ones
        drawn = labelled - fixed_val - fixed_test
        rows = np.arange(labelled)
        rows[:drawn] = generator(self._seed, Stream.SPLIT, client).permutation(drawn)
        train, val = int(self.train_sizes[client]), int(self.val_sizes[client]) - fixed_val
        free, in_place = rows[train:drawn], rows[drawn:]
        return Split(
            train=np.sort(rows[:train]),
            val=np.sort(np.concatenate([free[:val], in_place[:fixed_val]])),
            test=np.sort(np.concatenate([free[val:], in_place[fixed_val:]])),
            unlabelled=np.arange(labelled, labelled + int(self._unlabelled[client])),
        )

    def _draw_populations(self, new_client_fraction: float, min_examples: int) -> NDArray[np.int8]:
        labelled = np.asarray(self.store.labelled)
        eligible = np.flatnonzero(labelled >= min_examples)
        if len(eligible) == 0:
            raise ConfigurationError(
                f"min_examples is {min_examples}, but no client has more than {labelled.max()} labelled rows: lower it."
            )
        if len(eligible) < len(labelled):
            left_out = len(labelled) - len(eligible)
            _log.info("%d of %d clients have fewer than %d examples: left out", left_out, len(labelled), min_examples)
        population = np.full(len(labelled), POPULATIONS.index("left out"), dtype=np.int8)
        roles = np.asarray(self.store.roles)
        train, validation, test = (eligible[roles[eligible] == role] for role in range(len(ROLES)))
        if len(train) == 0:
            raise ConfigurationError(
                f"min_examples is {min_examples}, but no client to train on has as many labelled rows: lower it."
            )
        if not (roles == ROLES.index("test")).any():
            count = min(_share(len(train), new_client_fraction), len(train) - 1)
            test = generator(self._seed, Stream.POPULATION).permutation(train)[:count]
        # in this order, since new clients may be drawn from those to train on
        for name, members in (("seen", train), ("validation", validation), ("new", test)):
            population[members] = POPULATIONS.index(name)
        return population


def check_split(
    val_fraction: float, test_fraction: float, new_client_fraction: float, min_examples: int, split_seed: int
) -> None:
    """Check the settings of a `Federation`, which documents them.

    Raises:
        ConfigurationError: a setting is out of range, or validation and test leave nothing to train on.
    """
    require_fraction(val_fraction=val_fraction, test_fraction=test_fraction, new_client_fraction=new_client_fraction)
    require_count(min_examples=min_examples)
    require_count(0, split_seed=split_seed)
    if val_fraction + test_fraction >= 1:
        raise ConfigurationError(
            f"val_fraction is {val_fraction} and test_fraction is {test_fraction}, which leave nothing to train on: "
            "their sum must be less than 1."
        )


def _split_sizes(
    labelled: Ints, fixed_val: Ints, fixed_test: Ints, val_fraction: float, test_fraction: float
) -> tuple[Ints, Ints, Ints]:
    """Compute the numbers [M] of training, validation and test rows; the data may fix some, -1 = not fixed."""
    val, test = np.maximum(fixed_val, 0), np.maximum(fixed_test, 0)
    if test_fraction > 0:
        # one row to train on, and one for validation
        spared = np.where((labelled >= 3) & (val_fraction > 0) & (fixed_val < 0), 2, 1)
        drawn = np.clip(np.maximum(_share(labelled, test_fraction), 1), 0, labelled - val - spared)
        test = np.where(fixed_test < 0, drawn, test)
    if val_fraction > 0:
        drawn = np.clip(np.maximum(_share(labelled, val_fraction), 1), 0, labelled - test - 1)
        val = np.where((fixed_val < 0) & (labelled >= 3), drawn, val)
    return labelled - val - test, val, test


def _share(count: Any, fraction: float) -> Any:
    """Compute a share of a count, rounded half up."""
    return np.floor(count * fraction + 0.5).astype(np.int64)
