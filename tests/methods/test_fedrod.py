"""FedRoD against a plain loop of one client."""

import pytest
import torch
from torch.nn import functional as F

from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedRoD
from flow_pl.methods.fedrod import SMALLEST
from tests.methods.helpers import client_of, copied, filled, next_server, on_task
from tests.support import bound, chunk, loop, minibatches, sgd, snapshot

SIZES = (11, 6)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
HEAD = 3


def log_shares(batch, client, classes):
    y = batch.train.y[client][batch.train.mask[client].bool()]
    return (torch.bincount(y, minlength=classes) / len(y)).clamp_min(SMALLEST).log()


def both(w, own, x):
    """Outputs of both heads on w's features; the features are a constant for the own head."""
    features = w[:HEAD](x).detach()
    return w[HEAD](features).detach() + F.linear(features, *own)


def train_own(w, own, batch, client, generic):
    """Steps of the own head, and of w by the balanced softmax where `generic` is true."""
    shares = log_shares(batch, client, len(own[1]))
    steps, of_w = sgd(own), sgd(list(w.parameters()))
    for rows in minibatches(batch, client, 2, 4):
        x, y = batch.train.x[client, rows], batch.train.y[client, rows]
        steps.zero_grad()
        of_w.zero_grad()
        F.cross_entropy(both(w, own, x), y).backward()
        if generic:
            F.cross_entropy(w(x) + shares, y).backward()
            of_w.step()
        steps.step()


def test_two_rounds_and_evaluations_are_those_of_a_plain_loop():
    method, batch, kept = bound(FedRoD()), chunk(SIZES, heldout=20), None
    names = [f"{HEAD}.weight", f"{HEAD}.bias"]
    heads = [[torch.zeros_like(snapshot(method)["global"][name]) for name in names]] * len(SIZES)
    for server in (snapshot(method), next_server(snapshot(method))):
        result = evaluate_clients(loop(), method, server, batch, None if kept is None else copied(kept))
        update = loop().train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        for client in range(len(SIZES)):
            w, own = filled(server["global"]), [p.clone().requires_grad_() for p in heads[client]]
            train_own(w, own, batch, client, generic=False)
            loss = F.cross_entropy(both(w, own, batch.heldout.x[client]), batch.heldout.y[client], reduction="sum")
            torch.testing.assert_close(result.personalized_loss[client], loss, **CLOSE)
            own = [p.clone().requires_grad_() for p in heads[client]]
            train_own(w, own, batch, client, generic=True)
            heads[client] = [p.detach() for p in own]
            torch.testing.assert_close(list(client_of(kept["own"], client).values()), heads[client], **CLOSE)
            sent = {name: p.detach() - server["global"][name] for name, p in w.named_parameters()}
            torch.testing.assert_close(client_of(update.difference["global"], client), sent, **CLOSE)


def test_next_tokens_are_classes():
    update, result = on_task(FedRoD(), "next token")
    assert update.finite()
    assert (result.personalized_loss < result.generalized_loss).all()


def test_several_labels_are_refused():
    with pytest.raises(ConfigurationError, match="use another method"):
        on_task(FedRoD(), "multi-label")
