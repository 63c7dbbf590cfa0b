"""FedProx, FedPer, FedBABU and LP-FT against plain loops of one client."""

import copy

import pytest
import torch
from torch.nn import functional as F

from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import LPFT, FedAvg, FedBABU, FedPer, FedProx
from tests.methods.helpers import client_of, copied, filled, next_server
from tests.support import bound, chunk, delta, flat, loop, minibatches, sgd, snapshot, train_alone

SIZES = (11, 6)
BODY, HEAD = 0, 3
"""Children of `tests.support.network` with parameters."""


def block(backbone, *children):
    return [p for child in children for p in backbone[child].parameters()]


def train(backbone, batch, client, epochs, *children):
    """Plain training of some blocks, the others frozen."""
    return train_alone(backbone, batch, client, epochs, 4, optimizer=lambda _: sgd(block(backbone, *children)))


def check_losses(result, batch, client, personalized):
    loss = F.cross_entropy(personalized(batch.heldout.x[client]), batch.heldout.y[client], reduction="sum")
    torch.testing.assert_close(result.personalized_loss[client], loss, rtol=1e-4, atol=1e-5)


def test_fedprox_takes_the_steps_of_the_proximal_loss():
    method, batch = bound(FedProx(mu=0.5)), chunk(SIZES)
    server = snapshot(method)
    update = loop().train_clients(method, server, batch)
    for client in range(len(SIZES)):
        w = filled(server["global"])
        start = [p.detach().clone() for p in w.parameters()]
        steps = sgd(list(w.parameters()))
        for rows in minibatches(batch, client, 2, 4):
            loss = F.cross_entropy(w(batch.train.x[client, rows]), batch.train.y[client, rows])
            loss = loss + 0.25 * sum((p - q).square().sum() for p, q in zip(w.parameters(), start, strict=True))
            steps.zero_grad()
            loss.backward()
            steps.step()
        moved = client_of(update.difference["global"], client)
        expected = flat(dict(w.named_parameters())) - flat(server["global"])
        torch.testing.assert_close(flat(moved), expected, atol=1e-5, rtol=1e-4)


def test_fedprox_without_the_term_is_fedavg():
    sent = []
    for method in (bound(FedProx(mu=0.0)), bound(FedAvg())):
        sent.append(delta(loop().train_clients(method, server_groups(method), chunk(SIZES)))["global"])
    torch.testing.assert_close(sent[0], sent[1])


def test_fedper_trains_body_and_own_head_together_and_sends_the_body():
    """Two rounds, the second from the kept heads."""
    method, batch, kept = bound(FedPer()), chunk(SIZES, heldout=20), None
    heads = [{k: p for k, p in snapshot(method)["global"].items() if k.startswith(f"{HEAD}.")}] * len(SIZES)
    for server in (snapshot(method), next_server(snapshot(method))):
        result = evaluate_clients(loop(), method, server, batch, None if kept is None else copied(kept))
        update = loop().train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        for client in range(len(SIZES)):
            alone = train(filled({**server["global"], **heads[client]}), batch, client, 2, BODY, HEAD)
            check_losses(result, batch, client, alone)
            trained = {name: p.detach() for name, p in alone.named_parameters()}
            heads[client] = {name: trained[name] for name in heads[client]}
            torch.testing.assert_close(client_of(kept["head"], client), heads[client], atol=1e-5, rtol=1e-4)
            for name, p in client_of(update.difference["global"], client).items():
                assert name.startswith(f"{BODY}.")
                torch.testing.assert_close(p, trained[name] - server["global"][name], atol=1e-5, rtol=1e-4)


def test_fedbabu_trains_the_body_under_the_initial_head_and_fine_tunes_all():
    method, batch = bound(FedBABU(personal_lr_scale=1.0)), chunk(SIZES, heldout=20)
    server = snapshot(method)
    update, result = loop().train_clients(method, server, batch), evaluate_clients(loop(), method, server, batch)
    for client in range(len(SIZES)):
        alone = train(filled(server["global"]), batch, client, 2, BODY)
        moved = client_of(update.difference["global"], client)
        torch.testing.assert_close(
            flat(moved), flat(dict(alone.named_parameters())) - flat(server["global"]), atol=1e-5, rtol=1e-4
        )
        assert not any(moved[name].any() for name in moved if name.startswith(f"{HEAD}."))
        check_losses(result, batch, client, train(filled(server["global"]), batch, client, 2, BODY, HEAD))


def test_lp_ft_fine_tunes_the_head_before_all():
    method, batch = bound(LPFT(head_epochs=1)), chunk(SIZES, heldout=20)
    server, fedavg = snapshot(method), bound(FedAvg())
    sent = [delta(loop().train_clients(m, server, batch))["global"] for m in (method, fedavg)]
    torch.testing.assert_close(sent[0], sent[1])
    result = evaluate_clients(loop(), method, server, batch)
    for client in range(len(SIZES)):
        probed = train(filled(server["global"]), batch, client, 1, HEAD)
        check_losses(result, batch, client, train(copy.deepcopy(probed), batch, client, 2, BODY, HEAD))


@pytest.mark.parametrize(
    ("make", "said"), [(lambda: FedProx(-1.0), "mu is -1.0"), (lambda: LPFT(1, -1), "head_epochs")]
)
def test_bad_settings_are_refused(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()


def test_fedbabus_untrained_head_is_not_taken_for_the_clients_own():
    """Of one client alone the head is the server's own memory, from which a difference in place would be taken."""
    method = bound(FedBABU())
    server = snapshot(method)
    before = copied(server)["global"]
    update = loop().train_clients(method, server, chunk(SIZES[:1]))
    assert all(torch.equal(p, before[name]) for name, p in server["global"].items())
    moved = {name: float(p.abs().max()) for name, p in update.difference["global"].items()}
    assert [name for name, most in moved.items() if most == 0] == [
        name for name in moved if name.startswith(f"{HEAD}.")
    ]
