"""Check that the server's optimizer and scheduler can be stepped."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from flow_pl.engine.client_optimizer import check_numbers
from flow_pl.engine.client_schedule import MOST_ROUNDS, refuse_plateau
from flow_pl.errors import ConfigurationError, FlowError


def check_server_optimizer(
    optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, parameters: Iterable[Tensor], rounds: int
) -> None:
    """Step an optimizer and a scheduler on tiny parameters, as the rounds of a fit would.

    Args:
        optimizer: makes the optimizer.
        scheduler: makes the scheduler; None for none.
        parameters: parameters of the server; only their number and dimensions matter.
        rounds: number of rounds of the fit; -1 for no limit.

    Raises:
        ConfigurationError: one of them cannot be made or stepped, or has a setting that is not finite.
    """
    tiny = [torch.zeros([min(2, n) for n in p.shape], requires_grad=True) for p in parameters]
    setting, doing = "server_optimizer", "made"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = optimizer(tiny)
            check_numbers(made, setting)
            doing = "stepped once a round"
            for p in tiny:
                p.grad = torch.zeros_like(p)
            made.step()
            if scheduler is None:
                return
            setting, doing = "server_scheduler", "made"
            schedule = scheduler(made)
            refuse_plateau(schedule, setting)
            for round_ in range(min(rounds, MOST_ROUNDS) if rounds >= 0 else 1):
                doing = f"stepped in round {round_}"
                schedule.step()
                check_numbers(made, f"server_scheduler, in round {round_}: server_optimizer")
    except FlowError:
        raise
    except Exception as error:  # an optimizer may raise anything
        raise ConfigurationError(
            f"{setting} cannot be {doing} ({type(error).__name__}: {error}): correct its settings, or use another one."
        ) from error
