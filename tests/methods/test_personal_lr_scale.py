"""One factor on the learning rate of what makes the personal model, for every method that has one."""

import pytest
import torch

from flow_pl.engine.server_round import server_groups
from flow_pl.methods import (
    APFL,
    Ditto,
    FedALA,
    FedBABU,
    FedCP,
    FedDBE,
    FedPer,
    FedRep,
    FedRoD,
    FineTuning,
    Flow,
    Interpolation,
    LGFedAvg,
    Local,
    PartialFed,
    PFedMe,
)
from tests.support import PublishedFlow, bound, chunk, delta, loop

PERSONAL = {
    APFL: "personal",
    Ditto: "personal",
    FedALA: "model",
    FedBABU: "model",
    FedCP: "whole",
    FedDBE: "whole",
    FedPer: "model",
    FedRep: "head",
    FedRoD: "own",
    FineTuning: "local",
    Flow: "local",
    Interpolation: "local",
    LGFedAvg: "model",
    Local: "local",
    PFedMe: "personal",
    PartialFed: "model",
    PublishedFlow: "local",
}
"""The group that makes a client's personal model, by method."""


def make(method, scale):
    single = {PFedMe: {"inner_steps": 1}, Local: {"epochs": 1}}
    return bound(method(personal_lr_scale=scale, **single.get(method, {})))


def plain(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("method", PERSONAL, ids=lambda method: getattr(method, "__name__", "PublishedFlow"))
def test_a_first_step_is_proportional_to_it(method):
    """One example and plain SGD, so that personalization is one step from w_g."""
    moved = []
    for scale in (1.0, 0.25):
        one = make(method, scale)
        groups, _ = loop(local_epochs=1, client_optimizer=plain).run(
            one, server_groups(one), chunk((1,)), training=False
        )
        server = server_groups(one)
        start = one.start(server).get(PERSONAL[method], server["global"])
        found = groups.groups[PERSONAL[method]]
        moved.append({name: found[name][0] - p for name, p in start.items() if name in found})
    assert all(p.abs().sum() > 0 for p in moved[0].values())
    torch.testing.assert_close(moved[1], {name: 0.25 * p for name, p in moved[0].items()}, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in PERSONAL if m not in (FedRep, PFedMe)])
def test_what_is_sent_of_w_g_does_not_depend_on_it(method):
    """But for FedRep, whose body learns under the head, and pFedMe, whose w follows theta."""
    sent = []
    for scale in (1.0, 0.25):
        one = make(method, scale)
        sent.append(delta(loop().train_clients(one, server_groups(one), chunk((11, 6)))).get("global", {}))
    torch.testing.assert_close(sent[0], sent[1], rtol=0, atol=0)


def test_it_counts_in_a_round_where_clients_keep_what_it_makes():
    for method in (APFL, Ditto):
        kept = [loop().train_clients(one, server_groups(one), chunk((11, 6))).kept["personal"]
                for one in (make(method, 1.0), make(method, 0.25))]  # fmt: skip
        assert not any(torch.allclose(kept[0][name], kept[1][name]) for name in kept[0])
