"""FedAvg, FineTuning, Interpolation and Local: what they send and what predicts."""

import copy

import pytest
import torch
from torch.nn import functional as F

from flow_pl.data.batch import GLOBAL, LOCAL
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.evaluation.counts import mixture_shares
from flow_pl.methods import FedAvg, FedRep, FineTuning, Interpolation, KNNPer, LGFedAvg, Local
from flow_pl.tasks import MultiLabel
from tests.support import CLASSES, bound, chunk, delta, flat, loop, minibatches, network, sgd, train_alone

SIZES = (11, 6)


def evaluated(method, batch):
    return evaluate_clients(loop(), method, server_groups(method), batch)


def fine_tuned(method, batch, client, epochs, bit=0):
    return train_alone(copy.deepcopy(method.modules["global"]), batch, client, epochs, 4, bit=bit)


def test_fedavg_has_no_personal_model():
    method, batch = bound(FedAvg()), chunk(SIZES, heldout=20)
    result = evaluated(method, batch)
    assert torch.equal(result.generalized, result.personalized)
    assert torch.equal(result.generalized, result.both)
    assert result.global_or_local is None
    assert result.routed_local is None
    right = method.modules["global"](batch.heldout.x).argmax(-1) == batch.heldout.y
    assert torch.equal(result.generalized, right.sum(1).float())


def test_methods_built_on_fedavg_send_what_it_sends():
    batch, updates = chunk(SIZES), []
    for method in (FedAvg(), FineTuning(), Interpolation()):
        method = bound(method, network())
        updates.append(flat(delta(loop().train_clients(method, server_groups(method), batch))["global"]))
    assert torch.equal(updates[0], updates[1])
    assert torch.equal(updates[0], updates[2])


def test_fine_tuning_predicts_with_w_g_trained_on_the_client():
    method, batch = bound(FineTuning()), chunk(SIZES, heldout=20)
    result = evaluated(method, batch)
    for client in range(2):
        tuned = fine_tuned(method, batch, client, epochs=2)
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        torch.testing.assert_close(
            result.personalized_loss[client], F.cross_entropy(tuned(x), y, reduction="sum"), rtol=1e-4, atol=1e-5
        )
        right_g = method.modules["global"](x).argmax(-1) == y
        assert result.global_or_local[client] == (right_g | (tuned(x).argmax(-1) == y)).sum()


def test_fixed_mixtures_are_counted_where_there_are_two_trained_models():
    method, batch = bound(FineTuning()), chunk(SIZES, heldout=40)
    result = evaluated(method, batch)
    assert result.mixtures.shape == (2, 6)
    for client in range(2):
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        w_g, w_l = (model(x).softmax(-1) for model in (method.modules["global"], fine_tuned(method, batch, client, 2)))
        for i, (global_, local) in enumerate(mixture_shares(2)):
            right = (global_ / 5 * w_g + local / 5 * w_l).argmax(-1) == y
            assert result.mixtures[client, i] == right.sum()
    assert len(mixture_shares(3)) == 21


@pytest.mark.parametrize("make", [Local, FedRep, LGFedAvg])
def test_nothing_is_mixed_with_a_server_model_that_is_not_trained(make):
    result = evaluated(bound(make()), chunk(SIZES, epochs=15))
    assert result.global_or_local is None
    assert result.mixtures is None
    assert result.personalized is not None


def test_fine_tuning_may_take_smaller_steps():
    method, batch = bound(FineTuning(personal_lr_scale=0.3)), chunk(SIZES, heldout=20)
    result = evaluated(method, batch)
    x, y = batch.heldout.x[0], batch.heldout.y[0]
    tuned = train_alone(
        copy.deepcopy(method.modules["global"]), batch, 0, 2, 4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, weight_decay=0.01),
    )  # fmt: skip
    loss = F.cross_entropy(tuned(x), y, reduction="sum")
    torch.testing.assert_close(result.personalized_loss[0], loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", ["weights", "probabilities"])
def test_interpolation_averages_both_models(average):
    method, batch = bound(Interpolation(alpha=0.25, average=average)), chunk(SIZES, heldout=20)
    result = evaluated(method, batch)
    for client in range(2):
        w_g, tuned = method.modules["global"], fine_tuned(method, batch, client, epochs=2)
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        if average == "weights":
            mean = copy.deepcopy(w_g)
            for p, a, b in zip(mean.parameters(), w_g.parameters(), tuned.parameters(), strict=True):
                p.data = 0.75 * a.data + 0.25 * b.data
            loss = F.cross_entropy(mean(x), y, reduction="sum")
        else:
            p = 0.75 * w_g(x).softmax(-1) + 0.25 * tuned(x).softmax(-1)
            loss = F.nll_loss(p.log(), y, reduction="sum")
        torch.testing.assert_close(result.personalized_loss[client], loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("alpha", "equal_to"), [(0.0, "generalized_loss"), (1.0, "fine_tuned")])
def test_interpolation_at_its_edges(alpha, equal_to):
    batch = chunk(SIZES, heldout=20)
    result = evaluated(bound(Interpolation(alpha=alpha)), batch)
    tuned = evaluated(bound(FineTuning()), batch).personalized_loss
    expected = tuned if equal_to == "fine_tuned" else result.generalized_loss
    torch.testing.assert_close(result.personalized_loss, expected)


def test_interpolation_chooses_alpha_on_data_its_probe_has_not_seen():
    method, batch = bound(Interpolation(alpha="chosen")), chunk(SIZES, heldout=20)
    groups, _ = loop().run(method, server_groups(method), batch, training=False)
    for client in range(2):
        probe = fine_tuned(method, batch, client, epochs=2, bit=LOCAL)
        rows = (batch.part[client] & GLOBAL).bool()
        x, y = batch.train.x[client, rows], batch.train.y[client, rows]
        losses = []
        for i in range(11):
            mean = copy.deepcopy(method.modules["global"])
            for p, a, b in zip(mean.parameters(), mean.parameters(), probe.parameters(), strict=True):
                p.data = (1 - i / 10) * a.data + i / 10 * b.data
            losses.append(F.cross_entropy(mean(x), y))
        assert groups.groups["alpha"]["alpha"][client] == pytest.approx(torch.stack(losses).argmin().item() / 10)
    assert evaluated(method, batch).personalized.shape == (2,)


@pytest.mark.parametrize("average", ["weights", "probabilities"])
def test_interpolation_learns_alpha_on_data_its_probe_has_not_seen(average):
    """By the client optimizer's steps on one number, clamped after each."""
    method, batch = bound(Interpolation(alpha="learned", average=average)), chunk((11, 6), heldout=20)
    groups, _ = loop().run(method, server_groups(method), batch, training=False)
    for client in range(2):
        w_g, probe = method.modules["global"], fine_tuned(method, batch, client, epochs=2, bit=LOCAL)
        alpha = torch.tensor(0.5, requires_grad=True)
        steps = sgd([alpha])
        for rows in minibatches(batch, client, 2, 4, bit=GLOBAL):
            x, y = batch.train.x[client, rows], batch.train.y[client, rows]
            if average == "weights":
                pairs = zip(w_g.named_parameters(), probe.parameters(), strict=True)
                mean = {name: (1 - alpha) * p.detach() + alpha * q.detach() for (name, p), q in pairs}
                loss = F.cross_entropy(torch.func.functional_call(w_g, mean, x), y)
            else:
                p = (1 - alpha) * w_g(x).softmax(-1).detach() + alpha * probe(x).softmax(-1).detach()
                loss = F.nll_loss(p.log(), y)
            steps.zero_grad()
            loss.backward()
            steps.step()
            alpha.data.clamp_(0, 1)
        assert groups.groups["alpha"]["alpha"][client].item() == pytest.approx(alpha.item(), abs=1e-5)
        assert alpha.item() != 0.5
    tuned = evaluated(bound(FineTuning()), batch)
    assert torch.equal(evaluated(method, batch).global_or_local, tuned.global_or_local), (
        "the local model is tuned on all the data"
    )


def test_neighbours_vote_beside_the_average():
    """Shares of 0.3, 0.3 and 0.4 of three models, each of which has a method of its own."""
    batch = chunk(SIZES, heldout=20)
    control = bound(Interpolation(alpha=0.5, average="probabilities", neighbours=3, neighbour_weight=0.4))
    tuned, votes = bound(FineTuning()), bound(KNNPer(neighbours=3, neighbour_weight=1.0))
    result, losses = evaluated(control, batch), torch.zeros(len(SIZES))
    predicted = {}
    for name, method in (("tuned", tuned), ("votes", votes)):
        groups, _ = loop().run(method, server_groups(method), batch, training=False)
        for client in range(2):
            views = {group: {k: p[client] if group in groups.stacked else p for k, p in parameters.items()}
                     for group, parameters in groups.groups.items()}  # fmt: skip
            predicted[name, client] = method.predict(views, batch.heldout.x[client])
    for client in range(2):
        w_g, w_l = predicted["tuned", client].generalized, predicted["tuned", client].personalized
        p = 0.3 * w_g.softmax(-1) + 0.3 * w_l.softmax(-1) + 0.4 * predicted["votes", client].personalized.softmax(-1)
        losses[client] = F.nll_loss(p.log(), batch.heldout.y[client], reduction="sum")
    torch.testing.assert_close(result.personalized_loss, losses, rtol=1e-4, atol=1e-5)
    assert result.mixtures.shape == (2, 21), "the memory is one of three models"
    assert torch.equal(result.mixtures[:, mixture_shares(3).index((0, 0, 5))], evaluated(votes, batch).personalized)


def test_neighbours_beside_w_g_alone_are_knn_per():
    settings, batch = {"neighbours": 3, "neighbour_weight": 0.4}, chunk(SIZES, heldout=20)
    control, knn = bound(Interpolation(alpha=0.0, **settings)), bound(KNNPer(**settings))
    ours, theirs = evaluated(control, batch), evaluated(knn, batch)
    torch.testing.assert_close(ours.personalized_loss, theirs.personalized_loss)
    assert torch.equal(ours.personalized, theirs.personalized)


def test_nothing_is_stored_for_neighbours_without_a_share():
    method, batch = bound(Interpolation()), chunk(SIZES)
    groups, _ = loop(local_epochs=1).run(method, server_groups(method), batch, training=False)
    assert "memory" not in groups.groups


def test_neighbours_of_several_labels_are_refused():
    with pytest.raises(ConfigurationError, match=r"the task MultiLabel.*neighbours vote for a class"):
        Interpolation(neighbour_weight=0.1).bind(network(), MultiLabel(k=2))


def test_an_average_of_label_probabilities_has_their_loss():
    """With several labels an output is a log-odds, not a log-probability."""
    method, batch = Interpolation(alpha=0.0, average="probabilities"), chunk(SIZES, heldout=20)
    method = method.bind(network(), MultiLabel(k=2))
    assert batch.heldout is not None
    for part in (batch.train, batch.heldout):
        part.y = F.one_hot(part.y, CLASSES)
    result = evaluated(method, batch)
    torch.testing.assert_close(result.personalized_loss, result.generalized_loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_interpolation_refuses_other_shares(alpha):
    with pytest.raises(ConfigurationError, match=f"alpha is {alpha}"):
        Interpolation(alpha=alpha)


def test_local_sends_nothing_and_trains_alone():
    method, batch = bound(Local(epochs=2)), chunk(SIZES, heldout=20)
    assert delta(loop().train_clients(method, server_groups(method), batch)) == {}
    result = evaluated(method, batch)
    x, y = batch.heldout.x[0], batch.heldout.y[0]
    loss = F.cross_entropy(fine_tuned(method, batch, 0, epochs=2)(x), y, reduction="sum")
    torch.testing.assert_close(result.personalized_loss[0], loss, rtol=1e-4, atol=1e-5)
