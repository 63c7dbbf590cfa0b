"""PartialFed: how the strategy is learned, what is chosen, trained, sent and kept."""

import copy

import pytest
import torch
from torch.nn import functional as F

from flow_pl.checks import check_fit
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedAvg, FineTuning, PartialFed
from flow_pl.models import MLP
from flow_pl.tasks import MultiLabel
from flow_pl.utils.counter_rng import random_bits, step_keys, uniform, unit_hashes
from flow_pl.utils.groups import Groups
from tests.models import test_sequences as sequences
from tests.support import bound, chunk, delta, flat, loop, minibatches, network, select, sgd, train_alone

SIZES = (11, 6)
BLOCKS = (("0.weight", "0.bias"), ("3.weight", "3.bias"))


def kept_by(method, batch, logits=((0.0, 0.0), (0.0, 0.0))) -> Groups:
    """What the clients keep: models of their own, and a strategy."""
    models = []
    for client in range(len(batch)):
        torch.manual_seed(10 + client)
        models.append({name: p + 0.3 * torch.randn_like(p) for name, p in server_groups(method)["global"].items()})
    return {
        "kept": {name: torch.stack([m[name] for m in models]) for name in models[0]},
        "strategy": {"logits": torch.tensor(logits).repeat(len(batch), 1, 1)},
    }


def one(groups, client):
    return {key: p[client].clone() for key, p in groups.items()}


def learned_logits(method, batch, kept, epochs, temperature):
    """The strategies of all clients, step by step."""
    w_g = server_groups(method)["global"]
    model = copy.deepcopy(method.modules["global"])
    logits = [one(kept["strategy"], client)["logits"].requires_grad_() for client in range(len(batch))]
    optimizers = [sgd([p]) for p in logits]
    plans = [list(minibatches(batch, client, epochs, 4, first=2)) for client in range(len(batch))]
    drawn, units = step_keys(batch.key, 0, len(plans[0])), unit_hashes(0, 4, torch.device("cpu")).view(2, 2)
    for t in range(len(plans[0])):
        active = sum(len(plan) > t for plan in plans)
        noise = [-(-uniform(random_bits(units, key)).log()).log() for key in drawn[t]]
        for client in range(active):
            q = ((logits[client] + noise[client]) / temperature).softmax(-1)
            mixture = {}
            for block, keys in enumerate(BLOCKS):
                for key in keys:
                    mixture[key] = q[block, 0] * w_g[key] + q[block, 1] * kept["kept"][key][client]
            rows = plans[client][t]
            outputs = torch.func.functional_call(model, mixture, (batch.train.x[client, rows],))
            optimizers[client].zero_grad()
            F.cross_entropy(outputs, batch.train.y[client, rows]).backward()
            optimizers[client].step()
    return [p.detach() for p in logits]


def trained(method, batch, kept, client, logits, epochs):
    """The model assembled by the logits, trained alone."""
    model = copy.deepcopy(method.modules["global"])
    for block, keys in enumerate(BLOCKS):
        if logits[block, 0] < logits[block, 1]:
            for key in keys:
                model.get_parameter(key).data = kept["kept"][key][client].clone()
    return train_alone(model, batch, client, epochs, 4)


@pytest.mark.parametrize("clients", [[0, 1], [0]])
def test_a_round_equals_plain_loops(clients):
    """Strategy steps with frozen weights, the choice, weight steps; all of the model is sent, and kept."""
    method = bound(PartialFed(strategy_epochs=2, temperature=0.5))
    batch = select(chunk(SIZES), clients)
    kept = kept_by(method, batch, ((0.5, -0.5), (-0.5, 0.5)))
    before = copy.deepcopy(kept)
    server = server_groups(method)
    update = loop().train_clients(method, server, batch, kept=kept)
    logits = learned_logits(method, batch, before, 2, 0.5)
    total = torch.zeros(len(flat(server["global"])))
    choices = set()
    for client in clients:
        model = dict(trained(method, batch, before, client, logits[client], 2).named_parameters())
        torch.testing.assert_close(update.kept["strategy"]["logits"][client], logits[client], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(flat(one(update.kept["kept"], client)), flat(model), atol=1e-5, rtol=1e-4)
        total += SIZES[client] * (flat(model) - flat(server["global"]))
        choices |= {bool(a < b) for a, b in logits[client]}
    assert choices == {True, False}, "the test is to choose both ways"
    torch.testing.assert_close(flat(delta(update)["global"]), total, atol=1e-4, rtol=1e-4)
    assert update.kept.keys() == {"kept", "strategy"}


def test_personalization_is_a_round_from_what_the_client_keeps():
    method, batch = bound(PartialFed()), chunk(SIZES, heldout=20)
    kept = kept_by(method, batch, ((0.1, -0.1), (-0.1, 0.1)))
    before = copy.deepcopy(kept)
    server = {name: {key: p.clone() for key, p in group.items()} for name, group in server_groups(method).items()}
    result = evaluate_clients(loop(local_epochs=1, personal_epochs=2), method, server_groups(method), batch, kept=kept)
    logits = learned_logits(method, batch, before, 1, 1.0)
    for client in range(2):
        model = trained(method, batch, before, client, logits[client], 2)
        loss = F.cross_entropy(model(batch.heldout.x[client]), batch.heldout.y[client], reduction="sum")
        torch.testing.assert_close(result.personalized_loss[client], loss, rtol=1e-4, atol=1e-5)
    w_g = method.modules["global"](batch.heldout.x).argmax(-1) == batch.heldout.y
    assert torch.equal(result.generalized, w_g.sum(1).float())
    assert torch.equal(flat(server_groups(method)["global"]), flat(server["global"]))


def test_with_everything_received_it_is_fedavg_with_fine_tuning():
    """The update is FedAvg's and the personal model FedAvg-FT's, whatever the client kept."""
    batch = chunk(SIZES, heldout=20)
    method, fedavg, tuned = bound(PartialFed()), bound(FedAvg()), bound(FineTuning())
    received = ((20.0, -20.0), (20.0, -20.0))
    update = loop().train_clients(method, server_groups(method), batch, kept=kept_by(method, batch, received))
    expected = loop().train_clients(fedavg, server_groups(fedavg), batch)
    assert torch.equal(flat(delta(update)["global"]), flat(delta(expected)["global"]))
    result = evaluate_clients(loop(), method, server_groups(method), batch, kept=kept_by(method, batch, received))
    reference = evaluate_clients(loop(), tuned, server_groups(tuned), batch)
    for name in ("personalized", "personalized_loss", "global_or_local"):
        assert torch.equal(getattr(result, name), getattr(reference, name))


def test_with_everything_kept_a_client_trains_alone():
    method, batch = bound(PartialFed()), chunk(SIZES)
    kept = kept_by(method, batch, ((-20.0, 20.0), (-20.0, 20.0)))
    before = copy.deepcopy(kept)
    update = loop().train_clients(method, server_groups(method), batch, kept=kept)
    for client in range(2):
        alone = trained(method, batch, before, client, torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 2)
        parameters = dict(alone.named_parameters())
        torch.testing.assert_close(flat(one(update.kept["kept"], client)), flat(parameters), atol=1e-5, rtol=1e-4)


def test_a_client_never_sampled_is_fine_tuned():
    """It keeps w_g: received and kept are the same, and the strategy does not move."""
    batch = chunk(SIZES, heldout=20)
    method, tuned = bound(PartialFed()), bound(FineTuning())
    result = evaluate_clients(loop(), method, server_groups(method), batch)
    reference = evaluate_clients(loop(), tuned, server_groups(tuned), batch)
    assert torch.equal(result.personalized_loss, reference.personalized_loss)
    state = method.initial_state(server_groups(method))
    assert torch.equal(flat(state["kept"]), flat(server_groups(method)["global"]))
    assert state["strategy"]["logits"].tolist() == [[0, 0], [0, 0]]
    update = loop().train_clients(method, server_groups(method), batch)
    assert update.kept["strategy"]["logits"].abs().max() < 1e-6


def test_the_strategy_finds_the_better_model():
    """The client's own model fits its data, w_g is random: all blocks lean to what was kept, and the reverse."""
    method, batch = bound(PartialFed(strategy_epochs=8)), select(chunk(SIZES, epochs=8), [0])
    good = train_alone(network(3), batch, 0, 8, 4, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    kept = {name: p.detach()[None] for name, p in good.named_parameters()}
    start = {"kept": kept, "strategy": {"logits": torch.zeros(1, 2, 2)}}
    leaning = (
        loop(local_epochs=1)
        .train_clients(method, server_groups(method), batch, kept=start)
        .kept["strategy"]["logits"][0]
    )
    assert (leaning[:, 1] > leaning[:, 0]).all()
    swapped = bound(PartialFed(strategy_epochs=8), good)
    start = {
        "kept": {name: p.detach()[None].clone() for name, p in network().named_parameters()},
        "strategy": {"logits": torch.zeros(1, 2, 2)},
    }
    leaning = (
        loop(local_epochs=1)
        .train_clients(swapped, server_groups(swapped), batch, kept=start)
        .kept["strategy"]["logits"][0]
    )
    assert (leaning[:, 0] > leaning[:, 1]).all()


def test_a_traced_strategy_step_draws_anew():
    batch = chunk((16, 16, 16), epochs=4)
    method = bound(PartialFed(strategy_epochs=4))
    eager = loop(local_epochs=4, trace_after=None).train_clients(
        method, server_groups(method), batch, kept=kept_by(method, batch)
    )
    engine = loop(local_epochs=4, trace_after=2)
    traced = engine.train_clients(method, server_groups(method), batch, kept=kept_by(method, batch))
    assert engine.engine.traced == 2
    for name in ("kept", "strategy"):
        assert torch.equal(flat(eager.kept[name]), flat(traced.kept[name]))


def test_it_does_not_route_instances():
    method, batch = bound(PartialFed()), chunk(SIZES)
    assert method.route_names == []
    groups = method.start(server_groups(method))
    assert method.predict(groups, batch.heldout.x[0]).routes is None
    assert evaluate_clients(loop(local_epochs=1), method, server_groups(method), batch).routed_local is None


def test_it_trains_on_sequences_with_an_embedding_table_of_its_own():
    """Blocks: embedding, lstm, linear, head."""
    method, batch = sequences.bound(PartialFed()), sequences.batch((6, 5))
    state = method.initial_state(server_groups(method))
    assert state["strategy"]["logits"].shape == (4, 2)
    assert state["kept"].keys() == server_groups(method)["global"].keys()
    first = loop(local_epochs=1).train_clients(method, server_groups(method), batch)
    assert (first.kept["kept"]["embedding.weight"] != server_groups(method)["global"]["embedding.weight"]).any()
    second = loop(local_epochs=1).train_clients(method, server_groups(method), batch, kept=first.kept)
    assert second.kept["strategy"]["logits"].abs().amin() > 0, "received and kept differ in every block"
    assert delta(second)["global"]["embedding.weight"].abs().sum() > 0
    assert torch.isfinite(
        evaluate_clients(loop(local_epochs=1), method, server_groups(method), batch).personalized_loss
    ).all()


def test_it_trains_on_several_labels():
    method, batch = PartialFed(), chunk(SIZES)
    method = method.bind(MLP(6, 3, (5,)), MultiLabel(k=1))
    check_fit(method, torch.zeros(1, 6), 3)
    for part in (batch.train, batch.heldout):
        part.y = F.one_hot(part.y, 3)
    update = loop(local_epochs=1).train_clients(method, server_groups(method), batch, kept=None)
    assert flat(delta(update)["global"]).abs().sum() > 0
    assert evaluate_clients(loop(local_epochs=1), method, server_groups(method), batch).personalized.shape == (2,)


@pytest.mark.parametrize("name", ["strategy_epochs", "temperature", "strategy_lr_scale"])
def test_bad_settings_are_refused(name):
    with pytest.raises(ConfigurationError, match=f"{name} is 0"):
        PartialFed(**{name: 0})
