"""Ditto against an independent reference, and its edges."""

import pytest
import torch
from torch.nn import functional as F

from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import Ditto, FedAvg, Local
from tests.methods.helpers import TASKS, client_of, copied, filled, next_server, on_task
from tests.support import bound, chunk, delta, flat, loop, minibatches, sgd, snapshot

SIZES, LAMBDA = (11, 6), 0.7


def reference_personal(v, w, batch, client, epochs, regularization=LAMBDA):
    """Algorithm 1, lines of the personal model: v descends f(v) + lambda / 2 * ||v - w||^2, w as received."""
    steps = sgd(list(v.parameters()))
    for rows in minibatches(batch, client, epochs, 4):
        loss = F.cross_entropy(v(batch.train.x[client, rows]), batch.train.y[client, rows])
        for p, q in zip(v.parameters(), w.parameters(), strict=True):
            loss = loss + regularization / 2 * ((p - q.detach()) ** 2).sum()
        steps.zero_grad()
        loss.backward()
        steps.step()
    return v


@pytest.mark.parametrize("trace_after", [None, 0])
def test_clients_keep_the_personal_models_of_two_rounds(trace_after):
    """The second round starts from the v of the first, and is pulled towards the new w_g."""
    method, batch, kept = bound(Ditto(regularization=LAMBDA)), chunk(SIZES), None
    servers = [snapshot(method), next_server(snapshot(method))]
    expected = [filled(servers[0]["global"]) for _ in SIZES]
    for server in servers:
        update = loop(trace_after=trace_after).train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        assert set(kept) == {"personal"}
        for client, v in enumerate(expected):
            reference_personal(v, filled(server["global"]), batch, client, epochs=2)
            ours, theirs = client_of(kept["personal"], client), dict(v.named_parameters())
            torch.testing.assert_close(flat(ours), flat(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("regularization", [0.0, LAMBDA])
def test_sends_what_fedavg_sends(regularization):
    batch, updates = chunk(SIZES), []
    for method in (Ditto(regularization=regularization), FedAvg()):
        method = bound(method)
        updates.append(delta(loop().train_clients(method, server_groups(method), batch)))
    assert set(updates[0]) == {"global"}
    assert torch.equal(flat(updates[0]["global"]), flat(updates[1]["global"]))


def test_without_regularization_the_personal_model_is_locals():
    batch = chunk(SIZES, heldout=20)
    ditto, local = bound(Ditto(regularization=0.0)), bound(Local(2))
    ours, theirs = (evaluate_clients(loop(), method, server_groups(method), batch) for method in (ditto, local))
    torch.testing.assert_close(ours.personalized_loss, theirs.personalized_loss, rtol=1e-6, atol=0)
    assert torch.equal(ours.personalized, theirs.personalized)
    kept = loop().train_clients(ditto, server_groups(ditto), batch).kept["personal"]
    for client in range(2):
        w_g = filled(snapshot(ditto)["global"])
        alone = reference_personal(filled(w_g.state_dict()), w_g, batch, client, epochs=2, regularization=0.0)
        torch.testing.assert_close(flat(client_of(kept, client)), flat(dict(alone.named_parameters())))


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "new"])
def test_is_evaluated_with_the_kept_model_trained_on(seen):
    """A client never sampled starts from w_g; the server's model stays as it is."""
    method, batch = bound(Ditto(regularization=LAMBDA)), chunk(SIZES, heldout=20)
    server = snapshot(method)
    kept = (
        copied(loop(local_epochs=1, personal_epochs=2).train_clients(method, next_server(server), batch).kept)
        if seen
        else None
    )
    result = evaluate_clients(
        loop(local_epochs=1, personal_epochs=2), method, server, batch, None if kept is None else copied(kept)
    )
    w_g = filled(server["global"])
    for client in range(2):
        start = client_of(kept["personal"], client) if seen else server["global"]
        v = reference_personal(filled(start), w_g, batch, client, epochs=2)
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        for found, model in ((result.personalized_loss, v), (result.generalized_loss, w_g)):
            torch.testing.assert_close(found[client], F.cross_entropy(model(x), y, reduction="sum"))
        right_g, right_v = (model(x).argmax(-1) == y for model in (w_g, v))
        assert result.global_or_local[client] == (right_g | right_v).sum()


@pytest.mark.parametrize("task", TASKS)
def test_trains_on_every_task(task):
    update, result = on_task(Ditto(), task)
    assert flat(delta(update)["global"]).abs().sum() > 0
    assert (result.personalized_loss < result.generalized_loss).all()
    if task == "next token":
        tables = update.kept["personal"]["embedding.weight"]
        assert not torch.equal(tables[0], tables[1]), "embedding tables are the client's own too"


def test_refuses_a_negative_weight():
    with pytest.raises(ConfigurationError, match=r"regularization is -0.1, expected 0 or more"):
        Ditto(regularization=-0.1)
