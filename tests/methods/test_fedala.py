"""FedALA against a plain loop of one client."""

import pytest
import torch
from torch.nn import functional as F

from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedALA
from tests.methods.helpers import TASKS, client_of, copied, filled, next_server, on_task
from tests.support import bound, chunk, loop, minibatches, snapshot, train_alone

SIZES, EPOCHS = (11, 6), 2
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
HEAD = "3."


def aggregate(w_g, own, weights, batch, client, order):
    """An epoch of W in one of the drawn orders: its gradient is that of the mixture times (w_g - own).

    Returns:
        The weights, and the mixture.
    """
    weights = dict(weights)

    def mixture():
        return {n: own[n] + (p - own[n]) * weights[n] if n in weights else p for n, p in w_g.items()}

    for rows in minibatches(batch, client, 1, 4, first=order):
        model = filled(mixture())
        loss = F.cross_entropy(model(batch.train.x[client, rows]), batch.train.y[client, rows])
        gradients = dict(zip(w_g, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        for name in weights:
            weights[name] = (weights[name] - 0.5 * gradients[name] * (w_g[name] - own[name])).clamp(0, 1)
    return weights, mixture()


def test_two_rounds_and_evaluations_are_those_of_a_plain_loop():
    """In a round the weights visit the order behind those of the model, in evaluation the first one."""
    method, batch, kept = bound(FedALA(weight_lr=0.5)), chunk(SIZES, epochs=EPOCHS + 1, heldout=20), None
    first = snapshot(method)["global"]
    own = [first] * len(SIZES)
    weights = [{n: torch.ones_like(p) for n, p in first.items() if n.startswith(HEAD)}] * len(SIZES)
    for number, server in enumerate((snapshot(method), next_server(snapshot(method)))):
        result = evaluate_clients(loop(), method, server, batch, None if kept is None else copied(kept))
        update = loop().train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        for client in range(len(SIZES)):
            _, start = aggregate(server["global"], own[client], weights[client], batch, client, 0)
            alone = train_alone(filled(start), batch, client, EPOCHS, 4)
            loss = F.cross_entropy(alone(batch.heldout.x[client]), batch.heldout.y[client], reduction="sum")
            torch.testing.assert_close(result.personalized_loss[client], loss, **CLOSE)
            weights[client], start = aggregate(server["global"], own[client], weights[client], batch, client, EPOCHS)
            alone = train_alone(filled(start), batch, client, EPOCHS, 4)
            own[client] = {name: p.detach() for name, p in alone.named_parameters()}
            torch.testing.assert_close(client_of(kept["own"], client), own[client], **CLOSE)
            torch.testing.assert_close(client_of(kept["weights"], client), weights[client], **CLOSE)
            sent = {name: p - server["global"][name] for name, p in own[client].items()}
            torch.testing.assert_close(client_of(update.difference["global"], client), sent, **CLOSE)
            assert all(bool((w == 1).all()) for w in weights[client].values()) == (number == 0)


def test_other_tasks():
    for task in TASKS:
        update, result = on_task(FedALA(), task)
        assert update.finite()
        assert (result.personalized_loss < result.generalized_loss).all()


@pytest.mark.parametrize(
    ("settings", "said"), [({"weight_epochs": 0}, "weight_epochs"), ({"weight_lr": 0.0}, "lr is 0")]
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        FedALA(**settings)
