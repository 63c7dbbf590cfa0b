"""The client optimizer's learning rate over rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

from flow_pl.engine.client_schedule import ClientSchedule
from flow_pl.errors import ConfigurationError
from flow_pl.methods import Ditto, EvidenceFlow, FedAvg, FineTuning, Flow
from flow_pl.methods.base import Method
from tests.support import bound, chunk, flat, loop, network, sgd, snapshot, train_alone

HALVED: Callable[[Any], LRScheduler] = partial(schedules.ExponentialLR, gamma=0.5)
STOPPED: Callable[[Any], LRScheduler] = partial(schedules.LambdaLR, lr_lambda=lambda number: 0.0)


def test_factors_are_those_of_the_schedule_in_any_order() -> None:
    schedule = ClientSchedule(partial(schedules.CosineAnnealingLR, T_max=8))
    expected = [(1 + math.cos(math.pi * number / 8)) / 2 for number in range(9)]
    assert [schedule.factor(number) for number in (8, 3, 0, 5)] == pytest.approx([expected[n] for n in (8, 3, 0, 5)])


def test_evaluation_and_no_schedule_leave_the_learning_rate() -> None:
    assert ClientSchedule(HALVED).factor(-1) == 1
    assert ClientSchedule(None).factor(7) == 1


def test_a_round_takes_the_steps_of_its_learning_rate() -> None:
    method, batch = bound(FedAvg()), chunk([7, 4])
    batch.round = 3
    update = loop(client_scheduler=HALVED).train_clients(method, snapshot(method), batch)

    def an_eighth(parameters: Any) -> torch.optim.Optimizer:
        optimizer = sgd(parameters)
        optimizer.param_groups[0]["lr"] /= 8
        return optimizer

    for client in range(2):
        backbone = network()
        before = nn.utils.parameters_to_vector(backbone.parameters()).detach().clone()
        train_alone(backbone, batch, client, 2, 4, optimizer=an_eighth)
        after = nn.utils.parameters_to_vector(backbone.parameters()).detach()
        sent = {key: p[client] for key, p in update.difference["global"].items()}
        assert torch.allclose(flat(sent), after - before, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "moving", "still"), [(Flow(), "local", ("global", "router")), (EvidenceFlow(), "probe", ("global",))]
)
def test_a_model_made_anew_keeps_the_learning_rate(method: Method, moving: str, still: tuple[str, ...]) -> None:
    """With a factor of zero a round moves nothing that it sends; the local model it is judged by moves from w_g."""
    method, batch = bound(method), chunk([8, 8])
    start = method.start(snapshot(method))
    groups = loop(client_scheduler=STOPPED).run(method, snapshot(method), batch, True)[0].groups
    for name in still:
        assert all(torch.equal(p, start[name][key].expand_as(p)) for key, p in groups[name].items())
    assert not any(torch.equal(p, start["global"][key].expand_as(p)) for key, p in groups[moving].items())


def test_a_kept_model_follows_the_schedule() -> None:
    method, batch = bound(Ditto()), chunk([8, 8])
    update = loop(client_scheduler=STOPPED).train_clients(method, snapshot(method), batch)
    (kept,) = update.kept.values()
    start = snapshot(method)["global"]
    assert all(torch.equal(p, start[key].expand_as(p)) for key, p in kept.items())


def test_personalization_keeps_the_learning_rate() -> None:
    method, batch = bound(FineTuning()), chunk([8])
    batch.round = -1
    scheduled, constant = (
        loop(client_scheduler=each).personalize(method, snapshot(method), batch) for each in (STOPPED, None)
    )
    assert all(torch.equal(p, constant["local"][key]) for key, p in scheduled["local"].items())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (schedules.ReduceLROnPlateau, "client_scheduler is ReduceLROnPlateau.*without a metric"),
        (partial(schedules.LambdaLR, lr_lambda=lambda number: 1.0 - number), "in round 2: factor is -1.0"),
        (partial(schedules.CosineAnnealingLR, T_max=0), "cannot be made|cannot be stepped"),
        (partial(schedules.StepLR, step_size="often"), "cannot be"),
    ],
)
def test_a_schedule_that_gives_no_factor_is_refused(factory: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClientSchedule(factory).check(4)
