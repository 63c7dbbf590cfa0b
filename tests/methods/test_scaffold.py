"""SCAFFOLD against a plain loop of one client."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.engine.server_round import server_groups
from flow_pl.methods import FedAvg, Scaffold
from flow_pl.models import LSTM
from flow_pl.tasks import MultiLabel
from tests.methods.helpers import TAGS, TASKS, client_of, copied, filled, next_server, on_task, with_tags
from tests.models import test_sequences
from tests.support import FEATURES, bound, chunk, delta, flat, loop, minibatches, sgd, snapshot
from tests.test_module import fitted

SIZES = (11, 6)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def gradient(parameters, batch, client):
    """Of the mean loss of all of a client's examples."""
    w, real = filled(parameters), batch.train.mask[client].bool()
    loss = F.cross_entropy(w(batch.train.x[client][real]), batch.train.y[client][real])
    return dict(zip(parameters, torch.autograd.grad(loss, list(w.parameters())), strict=True))


def test_two_rounds_are_those_of_a_plain_loop():
    """The second round with the kept controls, another model and another control of the server."""
    method, batch, kept = bound(Scaffold()), chunk(SIZES), None
    method.cohort_share = 0.25
    own = [{name: torch.zeros_like(p) for name, p in server_groups(method)["global"].items()}] * len(SIZES)
    for server in (snapshot(method), next_server(snapshot(method))):
        update = loop().train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        for client in range(len(SIZES)):
            w, c = filled(server["global"]), server["control"]
            steps = sgd(list(w.parameters()))
            for rows in minibatches(batch, client, 2, 4):
                steps.zero_grad()
                F.cross_entropy(w(batch.train.x[client, rows]), batch.train.y[client, rows]).backward()
                for name, p in w.named_parameters():
                    p.grad += c[name] - own[client][name]
                steps.step()
            moved = client_of(update.difference["global"], client)
            torch.testing.assert_close(flat(moved), flat(dict(w.named_parameters())) - flat(server["global"]), **CLOSE)
            new = gradient(server["global"], batch, client)
            change = {name: 0.25 * (p - own[client][name]) for name, p in new.items()}
            torch.testing.assert_close(client_of(update.difference["control"], client), change, **CLOSE)
            torch.testing.assert_close(client_of(kept["own"], client), new, **CLOSE)
            own[client] = new


@pytest.mark.parametrize("cohorts", [{}, {"dropout": 0.7}, {"sampling": "poisson", "cohort_size": 2}])
def test_the_servers_control_is_the_mean_of_the_clients_whoever_reports_back(tmp_path, cohorts):
    """Also where cohorts are smaller or larger than expected, and some are empty."""
    model, run = fitted(
        tmp_path,
        Scaffold(),
        rounds=8,
        module_settings={"weighting": "uniform"},
        trainer_settings={"limit_val_batches": 0, "default_root_dir": tmp_path},
        **cohorts,
    )
    kept = model.states.state_dict(str)
    assert len(kept["clients"]) > 2
    mean = kept["rows"].sum(0) / run.datamodule.population_size
    torch.testing.assert_close(flat(dict(model.server["control"].named_parameters())), mean, atol=1e-6, rtol=1e-4)


def test_the_first_round_is_that_of_fedavg():
    """All controls are zero."""
    sent = []
    for method in (bound(Scaffold()), bound(FedAvg())):
        sent.append(delta(loop().train_clients(method, server_groups(method), chunk(SIZES)))["global"])
    torch.testing.assert_close(sent[0], sent[1])


def test_many_examples_are_taken_piece_by_piece():
    """The mean over 150 examples is not the mean of three pieces' means."""
    method, batch = bound(Scaffold()), chunk((150, 70))
    update = loop().train_clients(method, snapshot(method), batch)
    for client in range(2):
        expected = gradient(server_groups(method)["global"], batch, client)
        torch.testing.assert_close(client_of(update.kept["own"], client), expected, **CLOSE)


class TorchsLSTM(nn.LSTM):
    """torch's own, without the last state, which a backbone does not return."""

    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.parametrize("make", [LSTM, partial(TorchsLSTM, batch_first=True)])
def test_a_client_that_is_trained_alone_has_the_gradient_of_a_recurrent_model(make):
    """It runs torch's fused kernel, which keeps what a gradient needs only if asked to."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Embedding(test_sequences.TOKENS, 4), make(4, 6), nn.Linear(6, test_sequences.TOKENS))
    method, batch = test_sequences.bound(Scaffold(), backbone), test_sequences.batch((5,), 2)
    kept = loop().train_clients(method, snapshot(method), batch).kept["own"]
    x, y = batch.train.x[0], batch.train.y[0]
    loss = F.cross_entropy(backbone(x)[y > 0], y[y > 0])
    expected = torch.autograd.grad(loss, list(backbone.parameters()))
    torch.testing.assert_close(list(client_of(kept, 0).values()), list(expected))


@pytest.mark.parametrize("sizes", [(12, 8), (132, 68)])
def test_a_sum_as_the_loss_with_a_smaller_learning_rate_is_a_mean(sizes):
    """Minibatches of 4 examples with TAGS labels each; the second round follows controls."""
    batch, found = with_tags(chunk(sizes)), []
    for reduction, targets in (("mean", 1), ("sum", 4 * TAGS)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, TAGS))
        method, kept = Scaffold().bind(net, MultiLabel(k=2, reduction=reduction)), None
        trains = loop(client_optimizer=partial(torch.optim.SGD, lr=0.1 / targets))
        for server in (snapshot(method), next_server(snapshot(method))):
            update = trains.train_clients(method, server, batch, kept=kept)
            kept = copied(update.kept)
            found.append({**delta(update), **kept})
    for mean, summed in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(summed, mean, **CLOSE)


def test_other_tasks():
    for task in TASKS:
        update, result = on_task(Scaffold(), task)
        assert update.finite()
        torch.testing.assert_close(result.personalized_loss, result.generalized_loss)
