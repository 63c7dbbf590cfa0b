"""Evidence routing against an independent reference, and its edges."""

import copy
import math

import pytest
import torch
from torch import nn

from flow_pl.data.batch import GLOBAL, LOCAL
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import EvidenceFlow, FedAvg, Interpolation
from flow_pl.methods.evidence import EVIDENCE, MOMENTUM, add_to_statistics, evidence, standardize
from flow_pl.tasks import MultiLabel
from tests.models import test_sequences
from tests.support import (
    CLASSES,
    bound,
    chunk,
    delta,
    flat,
    loop,
    minibatches,
    network,
    select,
    snapshot,
    train_alone,
)
from tests.test_module import fitted

K, SHARES = 3, (0.3, 0.3, 0.4)
SIZES = (11, 6, 2, 1)
SETTINGS = {"neighbours": K, "dropout": 0.0, "hidden": (4,), "router_epochs": 2, "router_lr": 0.05}


def vote(w_g, stored, labels, x):
    """Probabilities by the nearest stored rows of the last block's inputs, and the distances of those that vote."""
    h, store = w_g[:2](x), w_g[:2](stored)
    p, far = torch.zeros(CLASSES), []
    voters = [(math.dist(h.tolist(), s.tolist()), int(y)) for s, y in zip(store, labels, strict=True)]
    for distance, label in sorted(voters)[:K]:
        p[label] += math.exp(-distance)
        far.append(distance)
    return p / p.sum(), far


def consulted(w_g, w_l, stored, labels, x):
    """Probabilities of the three experts and the evidence of one instance, number by number."""
    k, far = vote(w_g, stored, labels, x)
    experts = [p.detach() for p in (w_g(x).softmax(-1), w_l(x).softmax(-1), k)]
    sort = [p.sort(descending=True).values for p in experts]
    best = [int(p.argmax()) for p in experts]
    numbers = [sum(-float(v) * math.log(v) for v in p if v > 0) for p in experts]
    numbers += [float(s[0]) for s in sort] + [float(s[0] - s[1]) for s in sort]
    numbers += [far[0], sum(far) / len(far)]
    numbers += [float(best[a] == best[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    numbers += [float(experts[a][best[b]]) for a in range(3) for b in range(3) if a != b]
    return experts, torch.tensor(numbers)


def tuned(w_g, batch, client, epochs, bit=0, first=0):
    return train_alone(copy.deepcopy(w_g), batch, client, epochs, 4, bit=bit, first=first)


def reference_evidence(w_g, batch, client, epochs, judged):
    """For each judged example: evidence, and what each expert gives its label; none has seen the example."""
    table = {}
    for bit, other in ((LOCAL, GLOBAL), (GLOBAL, LOCAL)):
        if not bit & judged:
            continue
        w_l = tuned(w_g, batch, client, epochs, bit=other, first=2)
        seen = (batch.part[client] & other).bool()
        stored, labels = batch.train.x[client, seen], batch.train.y[client, seen]
        for row in (batch.part[client] & bit).nonzero()[:, 0].tolist():
            experts, numbers = consulted(w_g, w_l, stored, labels, batch.train.x[client, row])
            table[row] = numbers, torch.stack([p[batch.train.y[client, row]] for p in experts])
    return table


@pytest.mark.parametrize(
    ("cross_fit", "number", "judged"),
    [("both", 0, LOCAL | GLOBAL), ("both", 1, LOCAL | GLOBAL), ("alternate", 0, GLOBAL), ("alternate", 1, LOCAL)],
)
def test_a_round_equals_a_plain_loop(cross_fit, number, judged):
    """Two halves, evidence on one by the other's models, its statistics, AdamW on the router; w_g as FedAvg."""
    method, batch = bound(EvidenceFlow(cross_fit=cross_fit, **SETTINGS)), chunk(SIZES)
    server = snapshot(method)
    server["statistics"] = {
        "mean": 0.2 * torch.arange(len(EVIDENCE)) / 10,
        "square": 0.2 * (torch.arange(len(EVIDENCE)) / 10).square() + 0.2,
        "weight": torch.tensor(0.2),
    }
    start = copy.deepcopy(method.modules["router"])
    nn.init.normal_(start.head.weight, generator=torch.Generator().manual_seed(5))
    server["router"] = {name: p.detach().clone() for name, p in start.named_parameters()}
    before = {name: {key: p.clone() for key, p in group.items()} for name, group in server.items()}
    update = loop(personal_epochs=1).train_clients(method.in_round(number), server, batch)
    assert set(update.difference) == {"global", "router", "statistics"}
    assert update.kept == {}
    assert all(torch.equal(flat(server[name]), flat(before[name])) for name in server)
    for client, n in enumerate(SIZES):
        alone = tuned(method.modules["global"], batch, client, 2)
        sent = {name: {key: p[client] for key, p in group.items()} for name, group in update.difference.items()}
        change = flat(dict(alone.named_parameters())) - flat(server["global"])
        torch.testing.assert_close(flat(sent["global"]), change, atol=1e-5, rtol=1e-4)
        if n == 1:
            # whatever could judge a single example has seen it
            assert update.weights["router"][client] == update.weights["statistics"][client] == 0
            continue
        assert update.weights["router"][client] == update.weights["global"][client] == n
        table = reference_evidence(method.modules["global"], batch, client, 1, judged)
        numbers = torch.stack([numbers for numbers, _ in table.values()])
        own = {"mean": numbers.mean(0), "square": numbers.square().mean(0), "weight": torch.tensor(1.0)}
        for name, p in server["statistics"].items():
            expected = MOMENTUM * (own[name] - p)
            torch.testing.assert_close(sent["statistics"][name], expected, atol=1e-5, rtol=1e-3)
        mean = torch.arange(len(EVIDENCE)) / 10
        router = copy.deepcopy(start).requires_grad_()
        adam = torch.optim.AdamW(router.parameters(), lr=0.05, weight_decay=1e-4)
        for rows in minibatches(batch, client, 2, 4, bit=judged):
            z = torch.stack([table[row][0] for row in rows.tolist()]).sub(mean).clamp(-10, 10)
            p = torch.stack([table[row][1] for row in rows.tolist()])
            q = (router(z) + torch.tensor(SHARES).log()).softmax(-1)
            loss = -(q * p).sum(-1).log().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        moved = flat(dict(router.named_parameters())) - flat(server["router"])
        torch.testing.assert_close(flat(sent["router"]), moved, atol=2e-4, rtol=1e-2)
        assert moved.abs().max() > 0.05


def test_what_predicts_weighs_three_models_by_the_evidence():
    method, batch = bound(EvidenceFlow(**SETTINGS)), chunk(SIZES, heldout=20)
    server = snapshot(method)
    nn.init.normal_(method.modules["router"].head.weight, std=3, generator=torch.Generator().manual_seed(5))
    server["router"] = {name: p.detach().clone() for name, p in method.modules["router"].named_parameters()}
    result = evaluate_clients(loop(local_epochs=1, personal_epochs=2), method, server, batch)
    w_g = method.modules["global"]
    for client, n in enumerate(SIZES):
        w_l, loss, right = tuned(w_g, batch, client, 2), 0.0, 0
        for x, y in zip(batch.heldout.x[client], batch.heldout.y[client].tolist(), strict=True):
            experts, numbers = consulted(w_g, w_l, batch.train.x[client, :n], batch.train.y[client, :n], x)
            q = (method.modules["router"](numbers.clamp(-10, 10)) + torch.tensor(SHARES).log()).softmax(-1)
            p = sum(share * expert for share, expert in zip(q, experts, strict=True))
            loss, right = loss - math.log(p[y].item()), right + int(p.argmax() == y)
        assert result.personalized_loss[client].item() == pytest.approx(loss, rel=1e-3)
        assert result.personalized[client] == right
        assert result.mixtures.shape == (len(SIZES), 21)


@pytest.mark.parametrize("task", ["classification", "next token"])
@pytest.mark.parametrize(("alpha", "neighbour_weight"), [(0.5, 0.4), (0.7, 0.0), (0.0, 0.3), (0.5, 1.0)])
def test_a_router_that_has_learned_nothing_is_the_control(task, alpha, neighbour_weight):
    """Of a client without a stored target too, the last one of the sequences."""
    shares = {"alpha": alpha, "neighbours": K, "neighbour_weight": neighbour_weight}
    methods = EvidenceFlow(**shares), Interpolation(average="probabilities", **shares)
    if task == "classification":
        methods, batch = [bound(method, network()) for method in methods], chunk(SIZES, heldout=20)
    else:
        methods, batch = [test_sequences.bound(method) for method in methods], test_sequences.batch((6, 4, 3), 2)
        batch.train.y[2] = 0
    ours, control = (evaluate_clients(loop(), method, server_groups(method), batch) for method in methods)
    torch.testing.assert_close(ours.personalized_loss, control.personalized_loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.personalized, control.personalized)
    assert torch.equal(ours.generalized, control.generalized)


def test_w_g_trains_exactly_as_in_fedavg():
    """With dropout in the backbone too: its masks are drawn in the same order."""
    batch, sent = chunk(SIZES), []
    for method in (EvidenceFlow(), FedAvg()):
        method = bound(method, network(dropout=0.3))
        sent.append(delta(loop().train_clients(method, server_groups(method), batch))["global"])
    assert torch.equal(flat(sent[0]), flat(sent[1]))


@pytest.mark.parametrize("task", ["classification", "next token"])
@pytest.mark.parametrize("trace_after", [None, 0])
def test_clients_of_a_chunk_are_those_of_chunks_of_one(task, trace_after):
    if task == "classification":
        method, batch = bound(EvidenceFlow(**SETTINGS)), chunk(SIZES, pad_to=14)
        one = lambda i: select(batch, [i])  # noqa: E731
    else:
        method, batch = test_sequences.bound(EvidenceFlow(**SETTINGS)), test_sequences.batch((6, 4, 3), 2)
        one = lambda i: test_sequences._one(batch, i)  # noqa: E731
    server = server_groups(method)
    together = loop(trace_after=trace_after).train_clients(method, server, batch)
    for i in range(len(batch)):
        alone = loop().train_clients(method, server, one(i))
        for name, group in together.difference.items():
            ours = flat({key: p[i] for key, p in group.items()})
            torch.testing.assert_close(ours, flat(alone.difference[name]), atol=1e-4, rtol=1e-3)
    whole = evaluate_clients(loop(), method, server, batch)
    for i in range(len(batch)):
        torch.testing.assert_close(
            evaluate_clients(loop(evaluation_batch_size=2), method, server, one(i)).personalized_loss,
            whole.personalized_loss[i : i + 1],
        )


def test_a_half_without_a_target_stores_nothing_and_judges_all_the_same():
    """The first half of the sequences is all padding: no vote, so the models share what the memory would have."""
    method, batch = test_sequences.bound(EvidenceFlow(cross_fit="both", **SETTINGS)), test_sequences.batch((6, 4), 2)
    batch.train.y[0][(batch.part[0] & LOCAL).bool()] = 0
    update = loop(local_epochs=1).train_clients(method, server_groups(method), batch)
    assert all(p.isfinite().all() for group in update.difference.values() for p in group.values())
    assert update.difference["router"]["head.bias"].abs().sum(1).min() > 0


def test_equal_votes_are_for_the_first_class():
    """Two stored examples at the same place with different labels: neither order nor rounding decides."""
    votes = torch.tensor([[0.0, 0.5, 0.5]])
    rows = evidence([torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0.2, 0.3, 0.5]]), votes], torch.zeros(1, 2))
    named = dict(zip(EVIDENCE, rows[0].tolist(), strict=True))
    assert named["margin_memory"] == 0
    assert named["global_agrees_with_memory"] == 1
    assert named["local_agrees_with_memory"] == 0
    assert named["local_at_choice_of_memory"] == pytest.approx(0.3)


def test_statistics_run_over_rounds_and_stand_for_all_that_went_in():
    """After two clients with the same evidence it is standardized to mean 0 and deviation 1, however little is in."""
    rows = torch.randn(50, len(EVIDENCE)) * 3 + 2
    running = {"mean": torch.zeros(len(EVIDENCE)), "square": torch.zeros(len(EVIDENCE)), "weight": torch.tensor(0.0)}
    assert torch.equal(standardize(rows, running), rows.clamp(-10, 10))
    counted = torch.ones(50, dtype=torch.bool)
    for _ in range(2):
        running, own = add_to_statistics(running, rows, counted)
        for z in (standardize(rows, running), standardize(rows, {**running, "weight": torch.tensor(0.0)}, own)):
            torch.testing.assert_close(z.mean(0), torch.zeros(len(EVIDENCE)), atol=1e-4, rtol=0)
            torch.testing.assert_close(z.std(0, correction=0), torch.ones(len(EVIDENCE)), atol=1e-3, rtol=0)
    assert running["weight"].item() == pytest.approx(1 - (1 - MOMENTUM) ** 2)


@pytest.mark.parametrize("server", ["sgd", "adam"])
def test_the_servers_optimizer_scales_neither_router_nor_statistics(server, tmp_path):
    """They are the mean of what clients sent."""
    make = {"sgd": None, "adam": lambda params: torch.optim.Adam(params, lr=0.01)}[server]
    settings = {} if make is None else {"module_settings": {"server_optimizer": make}}
    model, _ = fitted(tmp_path, EvidenceFlow(router_lr=0.01), rounds=1, **settings)
    assert model.server["statistics"].weight.item() == pytest.approx(MOMENTUM)
    mean = model.server["statistics"].mean / MOMENTUM
    assert 0 < mean[EVIDENCE.index("largest_global")] < 1
    moved = model.server["router"].head.bias.abs().max().item()
    assert moved > 0
    assert moved != pytest.approx(0.01, rel=0.01), "Adam's first step"


def test_runs_in_other_chunks_end_the_same(tmp_path):
    whole, _ = fitted(tmp_path, EvidenceFlow(), rounds=2)
    small, _ = fitted(tmp_path, EvidenceFlow(), rounds=2, chunk_size=1)
    for name, p in whole.server.named_parameters():
        torch.testing.assert_close(dict(small.server.named_parameters())[name], p, atol=2e-3, rtol=1e-2)


def test_it_learns_whom_to_trust():
    """Labels that w_g and the local model cannot know but the nearest example does: the memory's share grows."""
    method = bound(EvidenceFlow(neighbours=1, router_lr=0.05, router_epochs=2, dropout=0.0))
    batch = chunk((40,))
    x = torch.randn(20, batch.train.x.shape[-1], generator=torch.Generator().manual_seed(0))
    batch.train.x[0], batch.train.y[0] = x.repeat(2, 1), (torch.arange(20) % CLASSES).repeat(2)
    batch.part[0] = torch.tensor([LOCAL, GLOBAL]).repeat_interleave(20)
    update = loop(local_epochs=1).train_clients(method, server_groups(method), batch)
    router = copy.deepcopy(method.modules["router"])
    router.load_state_dict({k: p + update.difference["router"][k][0] for k, p in router.state_dict().items()})
    shares = (router(torch.zeros(len(EVIDENCE))) + torch.tensor(SHARES).log()).softmax(-1)
    assert shares[2] > 0.6


def test_several_labels_are_refused():
    with pytest.raises(ConfigurationError, match=r"the task MultiLabel has several labels.*EvidenceFlow weights"):
        EvidenceFlow().bind(network(), MultiLabel(k=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 1.5},
        {"neighbours": 0},
        {"neighbour_weight": -0.1},
        {"hidden": []},
        {"dropout": 1.0},
        {"router_epochs": 0},
        {"router_lr": 0.0},
        {"router_weight_decay": -1.0},
    ],
)
def test_bad_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ConfigurationError, match=f"{name} is "):
        EvidenceFlow(**settings)
