"""What an aggregation is, and the mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.methods.base import Method
from flow_pl.utils.groups import Groups


class AggregationError(FlowError):
    """Too few clients have come to a round."""


class Aggregation(ABC):
    """How the server makes one update of those of a cohort.

    Unless it is the mean, it looks at a client's update of all shared groups together.

    Attributes:
        counts_alike: whether every client counts the same, so that `model.loop.weighting` must be "uniform": the number
            of examples is what a client says, and a bad one may say anything.
    """

    counts_alike: ClassVar[bool] = False

    @abstractmethod
    def factors(self, difference: Groups) -> Tensor | None:
        """What each client's update is multiplied by before the weighted mean is taken, [C]; None for 1.

        Args:
            difference: the clients' updates, by group and name [C, ...].
        """

    def tolerated(self, clients: int) -> int | None:
        """How many bad clients among so many the result is made to survive; None where no number is promised.

        Raises:
            AggregationError: there are too few clients.
        """
        return None

    def check(self, method: Method, weighting: str, cohort: int, attackers: int) -> None:
        """Refuse a fit that the aggregation cannot serve.

        Args:
            method: the algorithm.
            weighting: of the clients.
            cohort: number of clients of a round, or its expectation.
            attackers: number of them that are expected to attack.

        Raises:
            ConfigurationError: it cannot.
        """
        name = type(self).__name__
        if method.participation is not None and not isinstance(self, Mean):
            raise ConfigurationError(
                f"model.aggregation is {name}, which needs whole updates, but clients of {type(method).__name__} have "
                "a part in some groups only: leave it out, or take another method."
            )
        if not method.shared and not isinstance(self, Mean):
            raise ConfigurationError(
                f"model.aggregation is {name}, but clients of {type(method).__name__} send nothing: leave it out."
            )
        if self.counts_alike and weighting != "uniform":
            raise ConfigurationError(
                f"model.loop.weighting is {weighting}, but {name} counts every client alike: set it to uniform."
            )
        try:
            most = self.tolerated(cohort)
        except AggregationError as error:
            raise ConfigurationError(f"{error}, in a cohort of {cohort} (data.cohort_size).") from error
        if most is not None and attackers > most:
            raise ConfigurationError(
                f"{attackers} of {cohort} clients are expected to attack (model.attack.share), but {name} as it is set "
                f"survives {most}: raise its share, sample more clients, or let fewer attack."
            )


class Mean(Aggregation):
    """The mean, weighted by `model.loop.weighting`; updates are summed as they come, and none is kept."""

    def factors(self, difference: Groups) -> Tensor | None:
        """None: they count as they come."""
        return None
