"""pFedMe against an independent reference, and its edges."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedAvg, PFedMe
from tests.methods.helpers import TASKS, filled, on_task
from tests.support import bound, chunk, delta, flat, loop, minibatches, sgd, snapshot

SIZES, LAMBDA, K = (11, 6), 2.0, 3
LR, INNER, ETA = 0.1, 0.5, 0.04

plain_sgd = partial(torch.optim.SGD, lr=LR)


def reference(w, batch, client, epochs, optimizer, train_global=True):
    """Algorithm 1: K steps on f(theta) + lambda / 2 * ||theta - w||^2, then w <- w - eta lambda (w - theta)."""
    theta = filled(w.state_dict())
    steps = optimizer(list(theta.parameters()))
    steps.param_groups[0]["lr"] = LR * INNER
    for rows in minibatches(batch, client, epochs, 4):
        for _ in range(K):
            loss = F.cross_entropy(theta(batch.train.x[client, rows]), batch.train.y[client, rows])
            for p, q in zip(theta.parameters(), w.parameters(), strict=True):
                loss = loss + LAMBDA / 2 * ((p - q.detach()) ** 2).sum()
            steps.zero_grad()
            loss.backward()
            steps.step()
        if train_global:
            for p, q in zip(theta.parameters(), w.parameters(), strict=True):
                q.data -= ETA * LAMBDA * (q.data - p.data)
    return theta


def pfedme(**settings):
    scales = {"personal_lr_scale": INNER, "global_lr_scale": ETA / LR}
    return bound(PFedMe(regularization=LAMBDA, inner_steps=K, **scales, **settings))


@pytest.mark.parametrize("trace_after", [None, 0])
def test_clients_send_what_the_paper_says(trace_after):
    method, batch = pfedme(), chunk(SIZES)
    server = snapshot(method)
    update = loop(client_optimizer=plain_sgd, trace_after=trace_after).train_clients(method, server, batch)
    expected = torch.zeros(len(flat(server["global"])))
    for client, n in enumerate(SIZES):
        w = filled(server["global"])
        reference(w, batch, client, epochs=2, optimizer=plain_sgd)
        expected += n * (flat(dict(w.named_parameters())) - flat(server["global"]))
    torch.testing.assert_close(flat(delta(update)["global"]), expected, atol=1e-5, rtol=1e-5)
    assert set(delta(update)) == {"global"}


def test_clients_keep_nothing():
    method = pfedme()
    assert not method.private
    assert loop().train_clients(method, snapshot(method), chunk(SIZES)).kept == {}


@pytest.mark.parametrize("optimizer", [plain_sgd, sgd], ids=["plain", "momentum"])
def test_is_evaluated_with_theta_made_anew(optimizer):
    """From w_g, which stays as it is; the K steps on all minibatches have one momentum."""
    method, batch = pfedme(), chunk(SIZES, heldout=20)
    result = evaluate_clients(
        loop(local_epochs=1, personal_epochs=2, client_optimizer=optimizer), method, snapshot(method), batch
    )
    w_g = filled(snapshot(method)["global"])
    for client in range(2):
        theta = reference(w_g, batch, client, epochs=2, optimizer=optimizer, train_global=False)
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        for found, model in ((result.personalized_loss, theta), (result.generalized_loss, w_g)):
            torch.testing.assert_close(found[client], F.cross_entropy(model(x), y, reduction="sum"))
        right_g, right_p = (model(x).argmax(-1) == y for model in (w_g, theta))
        assert result.global_or_local[client] == (right_g | right_p).sum()


def test_one_inner_step_and_eta_lambda_1_is_fedavg():
    """theta = w - eta grad f(w), and w <- theta: the distance is always 0 where theta's gradient is taken."""
    batch, sent = chunk(SIZES), []
    for method in (PFedMe(regularization=1 / LR, inner_steps=1, personal_lr_scale=1.0), FedAvg()):
        method = bound(method)
        update = loop(client_optimizer=plain_sgd).train_clients(method, server_groups(method), batch)
        sent.append(flat(delta(update)["global"]))
    torch.testing.assert_close(sent[0], sent[1], atol=1e-5, rtol=1e-5)


def test_the_servers_learning_rate_is_beta():
    """w_g <- (1 - beta) w_g + beta * mean over clients of their w."""
    beta, method, batch = 0.3, pfedme(), chunk(SIZES)
    server, backbone = snapshot(method), method.modules["global"]
    update = loop(client_optimizer=plain_sgd, weighting="uniform").train_clients(method, server, batch)
    clients = [filled(server["global"]) for _ in SIZES]
    for client, w in enumerate(clients):
        reference(w, batch, client, epochs=2, optimizer=plain_sgd)
    mean = torch.stack([flat(dict(w.named_parameters())) for w in clients]).mean(0)
    round_ = ServerRound(method)
    round_.add(update)
    round_.finish(lambda tensor: tensor, 0)
    torch.optim.SGD(backbone.parameters(), lr=beta).step()
    expected = (1 - beta) * flat(server["global"]) + beta * mean
    torch.testing.assert_close(flat(dict(backbone.named_parameters())), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_trains_on_every_task(task):
    update, result = on_task(PFedMe(), task)
    assert flat(delta(update)["global"]).abs().sum() > 0
    assert (result.personalized_loss < result.generalized_loss).all()


@pytest.mark.parametrize("setting", ["regularization", "inner_steps", "personal_lr_scale", "global_lr_scale"])
def test_refuses_settings_that_leave_nothing_to_learn(setting):
    with pytest.raises(ConfigurationError, match=rf"{setting} is 0, expected a .*number"):
        PFedMe(**{setting: 0})
