"""APFL against an independent reference, and its edges."""

import pytest
import torch
from torch.nn import functional as F

from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import APFL, Ditto, FedAvg
from tests.methods.helpers import TASKS, client_of, copied, filled, next_server, on_task
from tests.support import bound, chunk, delta, flat, loop, minibatches, sgd, snapshot
from tests.test_module import fitted

SIZES, ALPHA = (11, 6), 0.4


def mixed(v, w, alpha, x):
    """Outputs of alpha v + (1 - alpha) w, w fixed: tests.support.network written out."""
    one, two, three, four = (
        alpha * p + (1 - alpha) * q.detach() for p, q in zip(v.parameters(), w.parameters(), strict=True)
    )
    return F.linear(F.linear(x, one, two).tanh(), three, four)


def reference(v, w, alpha, batch, client, epochs, adaptive, train_global=True):
    """Algorithm 1: both gradients where v and w stood before the minibatch; then both steps."""
    alpha = alpha.clone().requires_grad_()
    move_v, move_w, move_alpha = sgd(list(v.parameters())), sgd(list(w.parameters())), sgd([alpha])
    for rows in minibatches(batch, client, epochs, 4):
        x, y = batch.train.x[client, rows], batch.train.y[client, rows]
        if adaptive:
            move_alpha.zero_grad()
            F.cross_entropy(mixed(v, w, alpha, x), y).backward()
            move_alpha.step()
            alpha.data.clamp_(0, 1)
        move_v.zero_grad()
        F.cross_entropy(mixed(v, w, alpha.detach(), x), y).backward()
        if train_global:
            move_w.zero_grad()
            F.cross_entropy(w(x), y).backward()
            move_w.step()
        move_v.step()
    return v, w, alpha.detach()


@pytest.mark.parametrize("trace_after", [None, 0])
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_clients_send_and_keep_what_the_paper_says(adaptive, trace_after):
    """Two rounds; the second starts from the v and the alpha of the first."""
    method, batch, kept = bound(APFL(alpha=ALPHA, adaptive=adaptive)), chunk(SIZES), None
    servers = [snapshot(method), next_server(snapshot(method))]
    personal = [filled(servers[0]["global"]) for _ in SIZES]
    alphas = [torch.tensor(ALPHA) for _ in SIZES]
    for server in servers:
        update = loop(trace_after=trace_after).train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        assert set(kept) == ({"personal", "mixing"} if adaptive else {"personal"})
        sent = torch.zeros(len(flat(server["global"])))
        for client, n in enumerate(SIZES):
            w = filled(server["global"])
            _, _, alphas[client] = reference(personal[client], w, alphas[client], batch, client, 2, adaptive)
            sent += n * (flat(dict(w.named_parameters())) - flat(server["global"]))
            ours, theirs = client_of(kept["personal"], client), dict(personal[client].named_parameters())
            torch.testing.assert_close(flat(ours), flat(theirs), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(flat(delta(update)["global"]), sent, atol=1e-5, rtol=1e-5)
        if adaptive:
            torch.testing.assert_close(kept["mixing"]["alpha"], torch.stack(alphas), atol=1e-5, rtol=1e-5)
    assert not adaptive or (torch.stack(alphas) != ALPHA).all()


def test_adaptive_alpha_stays_a_share():
    """Steps far too large take it from one end to the other."""
    method, batch = bound(APFL(alpha=0.1, adaptive=True)), chunk(SIZES)
    far = loop(client_optimizer=lambda params: torch.optim.SGD(params, lr=5.0))
    alpha = far.train_clients(method, snapshot(method), batch).kept["mixing"]["alpha"]
    assert set(alpha.tolist()) <= {0.0, 1.0}


def test_alpha_0_is_fedavg():
    batch, updates, results = chunk(SIZES, heldout=20), [], []
    for method in (APFL(alpha=0.0), FedAvg()):
        method = bound(method)
        updates.append(delta(loop().train_clients(method, server_groups(method), batch)))
        results.append(evaluate_clients(loop(), method, server_groups(method), batch))
    assert set(updates[0]) == {"global"}
    assert torch.equal(flat(updates[0]["global"]), flat(updates[1]["global"]))
    assert torch.equal(results[0].personalized_loss, results[1].personalized_loss)
    assert torch.equal(results[0].personalized, results[1].personalized)


def test_alpha_1_trains_v_alone():
    """As Ditto does without its regularizer."""
    batch, kept = chunk(SIZES), []
    for method in (APFL(alpha=1.0), Ditto(regularization=0.0)):
        method = bound(method)
        kept.append(loop().train_clients(method, server_groups(method), batch).kept["personal"])
    torch.testing.assert_close(flat(kept[0]), flat(kept[1]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "new"])
def test_is_evaluated_mixed_with_the_received_model(seen, adaptive):
    """v (and alpha) go on from what the client kept, w is w_g and stays as it is."""
    method = bound(APFL(alpha=ALPHA, adaptive=adaptive))
    batch, server = chunk(SIZES, heldout=20), snapshot(method)
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
        alpha = kept["mixing"]["alpha"][client] if seen and adaptive else torch.tensor(ALPHA)
        v, _, alpha = reference(filled(start), w_g, alpha, batch, client, 2, adaptive, train_global=False)
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        outputs = mixed(v, w_g, alpha, x)
        for found, expected in ((result.personalized_loss, outputs), (result.generalized_loss, w_g(x))):
            torch.testing.assert_close(found[client], F.cross_entropy(expected, y, reduction="sum"))
        assert result.personalized[client] == (outputs.argmax(-1) == y).sum()
        right_g, right_v = (model(x).argmax(-1) == y for model in (w_g, v))
        assert result.global_or_local[client] == (right_g | right_v).sum()


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("task", TASKS)
def test_trains_on_every_task(task, adaptive):
    update, result = on_task(APFL(adaptive=adaptive), task)
    assert flat(delta(update)["global"]).abs().sum() > 0
    assert (result.personalized_loss < result.generalized_loss).all()
    if task == "next token":
        tables = update.kept["personal"]["embedding.weight"]
        assert not torch.equal(tables[0], tables[1]), "embedding tables are the client's own too"


def test_alpha_is_kept_with_v_from_round_to_round(tmp_path):
    model, _ = fitted(tmp_path, APFL(alpha=ALPHA, adaptive=True), rounds=2)
    state = model.states.state_dict(str)
    assert ["mixing", "alpha", []] in state["layout"]
    place = [group for group, *_ in state["layout"]].index("mixing")
    alphas = state["rows"][:, sum(torch.Size(shape).numel() for *_, shape in state["layout"][:place])]
    assert ((alphas >= 0) & (alphas <= 1)).all()
    assert len(alphas.unique()) == len(alphas) > 6


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_refuses_other_shares(alpha):
    with pytest.raises(ConfigurationError, match=rf"alpha is {alpha}, expected a share from 0 to 1"):
        APFL(alpha=alpha)
