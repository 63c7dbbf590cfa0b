"""FedAvg, FineTuning, Interpolation and Local: what they send and what predicts."""

import copy

import pytest
import torch
from torch.nn import functional as F

from flow_pl.data.batch import GLOBAL, LOCAL
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg, FineTuning, Interpolation, Local
from flow_pl.tasks import MultiLabel
from tests.support import CLASSES, bound, chunk, delta, flat, loop, network, train_alone

SIZES = (11, 6)


def evaluated(method, batch):
    return loop().evaluate_clients(method, server_groups(method), batch)


def fine_tuned(method, batch, client, epochs, bit=0):
    return train_alone(copy.deepcopy(method.modules["global"]), batch, client, epochs, 4, bit=bit)


def test_fedavg_has_no_personal_model():
    method, batch = bound(FedAvg(2)), chunk(SIZES, heldout=20)
    result = evaluated(method, batch)
    assert torch.equal(result.generalized, result.personalized)
    assert torch.equal(result.generalized, result.both)
    assert result.oracle is None
    assert result.routed_local is None
    right = method.modules["global"](batch.heldout.x).argmax(-1) == batch.heldout.y
    assert torch.equal(result.generalized, right.sum(1).float())


def test_methods_built_on_fedavg_send_what_it_sends():
    batch, updates = chunk(SIZES), []
    for method in (FedAvg(2), FineTuning(2), Interpolation(2)):
        bound(method, network())
        updates.append(flat(delta(loop().train_clients(method, server_groups(method), batch))["global"]))
    assert torch.equal(updates[0], updates[1])
    assert torch.equal(updates[0], updates[2])


def test_fine_tuning_predicts_with_w_g_trained_on_the_client():
    method, batch = bound(FineTuning(1, personal_epochs=2)), chunk(SIZES, heldout=20)
    result = evaluated(method, batch)
    for client in range(2):
        tuned = fine_tuned(method, batch, client, epochs=2)
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        torch.testing.assert_close(
            result.personalized_loss[client], F.cross_entropy(tuned(x), y, reduction="sum"), rtol=1e-4, atol=1e-5
        )
        right_g = method.modules["global"](x).argmax(-1) == y
        assert result.oracle[client] == (right_g | (tuned(x).argmax(-1) == y)).sum()


def test_fine_tuning_may_take_smaller_steps():
    method, batch = bound(FineTuning(2, personal_lr_scale=0.3)), chunk(SIZES, heldout=20)
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
    method, batch = bound(Interpolation(2, alpha=0.25, average=average)), chunk(SIZES, heldout=20)
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
    result = evaluated(bound(Interpolation(2, alpha=alpha)), batch)
    tuned = evaluated(bound(FineTuning(2)), batch).personalized_loss
    expected = tuned if equal_to == "fine_tuned" else result.generalized_loss
    torch.testing.assert_close(result.personalized_loss, expected)


def test_interpolation_chooses_alpha_on_data_its_probe_has_not_seen():
    method, batch = bound(Interpolation(2, alpha="chosen")), chunk(SIZES, heldout=20)
    groups, _ = loop()._run(method, server_groups(method), method.personal_phases, batch)
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


def test_an_average_of_label_probabilities_has_their_loss():
    """With several labels an output is a log-odds, not a log-probability."""
    method, batch = Interpolation(1, alpha=0.0, average="probabilities"), chunk(SIZES, heldout=20)
    method.bind(network(), MultiLabel(k=2))
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
    method, batch = bound(Local(local_epochs=2)), chunk(SIZES, heldout=20)
    assert delta(loop().train_clients(method, server_groups(method), batch)) == {}
    result = evaluated(method, batch)
    x, y = batch.heldout.x[0], batch.heldout.y[0]
    loss = F.cross_entropy(fine_tuned(method, batch, 0, epochs=2)(x), y, reduction="sum")
    torch.testing.assert_close(result.personalized_loss[0], loss, rtol=1e-4, atol=1e-5)
