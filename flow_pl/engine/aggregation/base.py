"""The base class of aggregations, and the mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.methods.base import Method
from flow_pl.utils.groups import Groups


class AggregationError(FlowError):
    """Too few clients sent updates in a round."""


class Aggregation(ABC):
    """Combines the updates of a cohort into one.

    Except for the mean, it treats a client's update of all shared groups as one vector.

    Attributes:
        counts_alike: whether all clients weigh the same, so that `model.loop.weighting` must be "uniform":
            clients report their number of examples, and a bad client may report any number.
    """

    counts_alike: ClassVar[bool] = False

    @abstractmethod
    def factors(self, difference: Groups) -> Tensor | None:
        """Return factors [C] on the clients' updates before the weighted mean; None for 1.

        Args:
            difference: the clients' updates, by group and name [C, ...].
        """

    def tolerated(self, clients: int) -> int | None:
        """Return how many bad clients the result tolerates in a cohort of this size; None if no number is guaranteed.

        Raises:
            AggregationError: there are too few clients.
        """
        return None

    def check(self, method: Method, weighting: str, cohort: int, attackers: int) -> None:
        """Reject a fit that the aggregation does not support.

        Args:
            method: the algorithm.
            weighting: weighting of the clients.
            cohort: number of clients of a round, or its expectation.
            attackers: number of them that are expected to attack.

        Raises:
            ConfigurationError: the fit is not supported.
        """
        name = type(self).__name__
        if method.participation is not None and not isinstance(self, Mean):
            raise ConfigurationError(
                f"model.aggregation is {name}, which needs whole updates, but clients of {type(method).__name__} take "
                "part in some groups only: leave it out, or use another method."
            )
        if not method.shared and not isinstance(self, Mean):
            raise ConfigurationError(
                f"model.aggregation is {name}, but clients of {type(method).__name__} send nothing: leave it out."
            )
        if self.counts_alike and weighting != "uniform":
            raise ConfigurationError(
                f"model.loop.weighting is {weighting}, but {name} weighs all clients equally: set it to uniform."
            )
        try:
            most = self.tolerated(cohort)
        except AggregationError as error:
            raise ConfigurationError(f"{error}, in a cohort of {cohort} (data.cohort_size).") from error
        if most is not None and attackers > most:
            raise ConfigurationError(
                f"{attackers} of {cohort} clients are expected to attack (model.attack.share), but {name} with "
                f"its settings tolerates {most}: raise its share, sample more clients, or lower the share of attackers."
            )


class Mean(Aggregation):
    """Averages, weighted by `model.loop.weighting`; updates are summed as they arrive, and none is kept."""

    def factors(self, difference: Groups) -> Tensor | None:
        """Return None: updates are used unscaled."""
        return None
