"""The server's optimizer and scheduler, tried before the first round."""

from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from flow_pl.checks import check_server_optimizer
from flow_pl.errors import ConfigurationError

SGD = partial(torch.optim.SGD, lr=1.0)


def check(optimizer=SGD, scheduler=None, rounds=3):
    check_server_optimizer(optimizer, scheduler, [torch.zeros(3, 4), torch.zeros(3), torch.zeros(())], rounds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": partial(torch.optim.SGD, lr=-1.0)}, r"server_optimizer cannot be made \(ValueError.*-1.0"),
        ({"optimizer": partial(torch.optim.SGD, lr=float("nan"))}, "server_optimizer.lr is nan, expected a finite"),
        ({"optimizer": partial(torch.optim.Adam, betas=(0.9, 1.0))}, "server_optimizer cannot be made"),
        ({"optimizer": torch.optim.LBFGS}, r"server_optimizer cannot be stepped once a round \(TypeError"),
        ({"scheduler": partial(lr_scheduler.StepLR, step_size=0)}, "server_scheduler cannot be stepped in round 0"),
        ({"scheduler": lr_scheduler.ReduceLROnPlateau}, "server_scheduler is ReduceLROnPlateau"),
        ({"scheduler": partial(lr_scheduler.ExponentialLR, gamma=1e200)}, "in round 1: server_optimizer.lr is inf"),
        (
            {"optimizer": torch.optim.Adam, "scheduler": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=2)},
            "server_scheduler cannot be stepped in round 2",
        ),
    ],
)
def test_what_cannot_be_stepped_every_round_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        check(**settings)


def test_what_can_be_is_not():
    check()
    check(partial(torch.optim.SGD, lr=torch.tensor(0.5)))
    check(torch.optim.Adam, partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3))
    check(scheduler=partial(lr_scheduler.ExponentialLR, gamma=1e200), rounds=1)
    check(scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=2), rounds=-1)
