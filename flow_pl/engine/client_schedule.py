"""The factor on the client optimizer's learning rate in each communication round."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.utils.validation import require_at_least_zero

MOST_ROUNDS = 10_000
"""Largest number of rounds of a schedule to check in advance, in half a second."""

SchedulerFactory = Callable[[Optimizer], LRScheduler]
"""Makes a schedule for an optimizer; in YAML a `class_path` with `init_args`."""


class ClientSchedule:
    """Any torch schedule, stepped once a round on a learning rate of 1: what it makes of that is the round's factor.

    A factor depends on the number of the round alone, so a resumed run and every process use the same one.

    Args:
        factory: makes the schedule; None for a constant learning rate.
    """

    def __init__(self, factory: SchedulerFactory | None) -> None:
        self.factory = factory
        self._factors: list[float] = []
        self._schedule: LRScheduler | None = None

    def check(self, rounds: int) -> None:
        """Compute the factors of a fit in advance, of its first `MOST_ROUNDS` rounds.

        Args:
            rounds: number of rounds of the fit; -1 for no limit.

        Raises:
            ConfigurationError: see `factor`.
        """
        self.factor(min(rounds, MOST_ROUNDS) - 1 if rounds >= 0 else 0)

    def factor(self, number: int) -> float:
        """Return the factor on the learning rate.

        Args:
            number: communication round, from 0; a negative one, that of evaluation, has the factor 1.

        Raises:
            ConfigurationError: the schedule cannot be made or stepped, or its factor is negative or not finite.
        """
        if self.factory is None or number < 0:
            return 1.0
        while len(self._factors) <= number:
            try:
                self._append_next(self.factory)
            except FlowError:
                raise
            except Exception as error:  # a schedule may raise anything
                what = f"stepped in round {len(self._factors) - 1}" if self._factors else "made"
                raise ConfigurationError(
                    f"model.loop.client_scheduler cannot be {what} ({type(error).__name__}: {error}): correct its "
                    "settings, or use another one."
                ) from error
        return self._factors[number]

    def _append_next(self, factory: SchedulerFactory) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer is never stepped
            if self._schedule is None:
                self._schedule = factory(torch.optim.SGD([torch.zeros(1)], lr=1.0))
                refuse_plateau(self._schedule, "model.loop.client_scheduler")
            else:
                self._schedule.step()
        factor = float(self._schedule.optimizer.param_groups[0]["lr"])
        require_at_least_zero(**{f"model.loop.client_scheduler in round {len(self._factors)}: factor": factor})
        self._factors.append(factor)


def refuse_plateau(schedule: LRScheduler, setting: str) -> None:
    """Refuse a schedule that is stepped with a metric.

    Args:
        schedule: the schedule.
        setting: name of the setting it comes from.

    Raises:
        ConfigurationError: it is torch's `ReduceLROnPlateau`.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        raise ConfigurationError(
            f"{setting} is ReduceLROnPlateau, expected one that is stepped once a round without a metric: use e.g. "
            "torch.optim.lr_scheduler.CosineAnnealingLR."
        )
