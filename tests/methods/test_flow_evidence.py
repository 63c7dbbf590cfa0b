"""Evidence routing against an independent reference, and its edges."""

import copy
import math

import pytest
import torch
from torch import nn

from flow_pl.data.batch import FOLD_BIT, FOLDS
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import EvidenceFlow, FedAvg, Interpolation
from flow_pl.methods.evidence import CANDIDATES, EVIDENCE, LEAST, OF_CLASS, UNSEEN, Evidence, evidence
from flow_pl.methods.evidence_router import MOMENTUM, add_to_statistics, standardization, standardize
from flow_pl.methods.flow_evidence import EPS
from flow_pl.methods.parts.local_memory import NEAR
from flow_pl.methods.steps import Minibatch
from flow_pl.tasks import MultiLabel
from tests.models import test_sequences
from tests.support import (
    CLASSES,
    FEATURES,
    bound,
    chunk,
    delta,
    flat,
    loop,
    network,
    select,
    snapshot,
    train_alone,
)
from tests.test_module import fitted

K, SHARES = 3, (0.3, 0.3, 0.4)
SIZES = (11, 6, 2, 1)
SETTINGS = {"neighbours": K, "dropout": 0.0, "hidden": (4, 3), "router_epochs": 2, "router_lr": 0.05}
NUMBERS = len(EVIDENCE) + len(OF_CLASS)


def nearest(w_g, stored, labels, x):
    """Distances and labels of the nearest stored rows of the last block's inputs."""
    h, store = w_g[:2](x), w_g[:2](stored)
    return sorted((math.dist(h.tolist(), s.tolist()), int(y)) for s, y in zip(store, labels, strict=True))[:K]


def consulted(w_g, w_l, stored, labels, x):
    """The fixed mixture, the evidence on an instance and on each class, the likeliest first, and the representation."""
    voters = nearest(w_g, stored, labels, x)
    k = torch.zeros(CLASSES)
    for distance, label in voters:
        k[label] += math.exp(-distance)
    k, far = k / k.sum(), [distance for distance, _ in voters]
    experts = [p.detach() for p in (w_g(x).softmax(-1), w_l(x).softmax(-1), k)]
    sort = [p.sort(descending=True).values for p in experts]
    best = [int(p.argmax()) for p in experts]
    numbers = [sum(-float(v) * math.log(v) for v in p if v > 0) for p in experts]
    numbers += [float(s[0]) for s in sort] + [float(s[0] - s[1]) for s in sort]
    numbers += [far[0], sum(far) / len(far)]
    numbers += [float(best[a] == best[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    numbers += [float(experts[a][best[b]]) for a in range(3) for b in range(3) if a != b]
    mixture = sum(share * p for share, p in zip(SHARES, experts, strict=True))
    order = mixture.argsort(descending=True)[:CANDIDATES].tolist()
    of_class = []
    for c in order:
        row = [math.log(max(float(p[c]), LEAST)) for p in experts]
        row.append(max([(far[0] + NEAR) / (distance + NEAR) for distance, label in voters if label == c], default=0.0))
        row.append(math.log((sum(int(y) == c for y in labels) + UNSEEN) / (len(labels) + 1)))
        of_class.append([*row, math.log(max(float(mixture[c]), LEAST))])
    h = w_g[:2](x).detach()
    seen = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
    return mixture, order, torch.tensor(numbers), torch.tensor(of_class), seen


def tuned(w_g, batch, client, epochs, first=0, **part):
    return train_alone(copy.deepcopy(w_g), batch, client, epochs, 4, first=first, **part)


def corrected(router, mixture, order, z, of_class, seen):
    """What is predicted: the mixture with scores added to the logarithms of the candidates, normalized."""
    p = mixture.clone()
    p[order] = p[order] * router(z, of_class, seen).exp()
    return p / p.sum()


def rows_in(batch, client, fold):
    """A client's training examples in a fold, and those outside."""
    folds = batch.part[client] >> FOLD_BIT
    rows = range(batch.train.sizes[client])
    return [r for r in rows if folds[r] == fold], [r for r in rows if folds[r] != fold]


@pytest.mark.parametrize("number", [0, 3])
def test_a_round_equals_a_plain_loop(number):
    """A model of three folds, evidence on the fourth, its statistics, AdamW on the router; w_g as FedAvg."""
    method, batch = bound(EvidenceFlow(**SETTINGS)), chunk(SIZES, epochs=3)
    batch.round = number
    server = snapshot(method)
    means = torch.arange(NUMBERS) / 10
    server["statistics"] = {
        "mean": 0.2 * means,
        "square": 0.2 * means.square() + 0.2,
        "weight": torch.tensor(0.2),
    }
    start = copy.deepcopy(method.modules["router"])
    nn.init.normal_(start.head.weight, generator=torch.Generator().manual_seed(5))
    server["router"] = {name: p.detach().clone() for name, p in start.named_parameters()}
    before = {name: {key: p.clone() for key, p in group.items()} for name, group in server.items()}
    update = loop(personal_epochs=1).train_clients(method.in_round(number, server), server, batch)
    assert set(update.difference) == {"global", "router", "statistics"}
    assert update.kept == {}
    assert all(torch.equal(flat(server[name]), flat(before[name])) for name in server)
    for client, n in enumerate(SIZES):
        alone = tuned(method.modules["global"], batch, client, 2)
        sent = {name: {key: p[client] for key, p in group.items()} for name, group in update.difference.items()}
        change = flat(dict(alone.named_parameters())) - flat(server["global"])
        torch.testing.assert_close(flat(sent["global"]), change, atol=1e-5, rtol=1e-4)
        judged, others = rows_in(batch, client, number % FOLDS)
        if not judged or not others:
            # nothing to judge, or whatever could judge it has seen it
            assert update.weights["router"][client] == update.weights["statistics"][client] == 0
            continue
        assert update.weights["router"][client] == update.weights["global"][client] == n
        w_g = method.modules["global"]
        w_l = tuned(w_g, batch, client, 1, first=2, within=others)
        stored = batch.train.x[client, others], batch.train.y[client, others]
        table = {row: consulted(w_g, w_l, *stored, batch.train.x[client, row]) for row in judged}
        instance = torch.stack([numbers for _, _, numbers, *_ in table.values()])
        classes = torch.stack([rows for *_, rows, _ in table.values()]).flatten(0, 1)
        own = {
            "mean": torch.cat([instance.mean(0), classes.mean(0)]),
            "square": torch.cat([instance.square().mean(0), classes.square().mean(0)]),
            "weight": torch.tensor(1.0),
        }
        for name, p in server["statistics"].items():
            expected = MOMENTUM * (own[name] - p)
            torch.testing.assert_close(sent["statistics"][name], expected, atol=1e-5, rtol=1e-3)
        router = copy.deepcopy(start).requires_grad_()
        adam = torch.optim.AdamW(router.parameters(), lr=0.05, weight_decay=1e-4, eps=EPS)
        size = len(EVIDENCE)
        for epoch in (0, 1):
            visited = [r for r in batch.order[client, epoch].tolist() if r in table]
            for at in range(0, len(visited), 4):
                loss = torch.tensor(0.0)
                for row in visited[at : at + 4]:
                    mixture, order, numbers, of_class, seen = table[row]
                    z = (numbers - means[:size]).clamp(-10, 10)
                    p = corrected(router, mixture, order, z, (of_class - means[size:]).clamp(-10, 10), seen)
                    loss = loss - p[batch.train.y[client, row]].log() / len(visited[at : at + 4])
                adam.zero_grad()
                loss.backward()
                adam.step()
        moved = flat(dict(router.named_parameters())) - flat(server["router"])
        torch.testing.assert_close(flat(sent["router"]), moved, atol=2e-3, rtol=1e-2)
        assert moved.abs().max() > 0.05


def test_what_predicts_is_the_mixture_corrected_class_by_class():
    method, batch = bound(EvidenceFlow(**SETTINGS)), chunk(SIZES, heldout=20)
    server = snapshot(method)
    nn.init.normal_(method.modules["router"].head.weight, std=3, generator=torch.Generator().manual_seed(5))
    server["router"] = {name: p.detach().clone() for name, p in method.modules["router"].named_parameters()}
    result = evaluate_clients(loop(local_epochs=1, personal_epochs=2), method, server, batch)
    w_g = method.modules["global"]
    for client, n in enumerate(SIZES):
        w_l, loss, right = tuned(w_g, batch, client, 2), 0.0, 0
        for x, y in zip(batch.heldout.x[client], batch.heldout.y[client].tolist(), strict=True):
            mixture, order, numbers, of_class, seen = consulted(
                w_g, w_l, batch.train.x[client, :n], batch.train.y[client, :n], x
            )
            z = numbers.clamp(-10, 10), of_class.clamp(-10, 10)
            p = corrected(method.modules["router"], mixture, order, *z, seen)
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


@pytest.mark.parametrize(
    ("task", "trace_after"),
    [
        ("classification", 0),
        ("next token", None),
        pytest.param("classification", None, marks=pytest.mark.slow),
        pytest.param("next token", 0, marks=pytest.mark.slow),
    ],
)
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


def test_folds_without_a_target_store_nothing_and_judge_all_the_same():
    """The sequences of three folds are all padding: no vote, so the models share what the memory would have."""
    method, batch = test_sequences.bound(EvidenceFlow(**SETTINGS)), test_sequences.batch((6, 4), 2)
    batch.train.y[0][(batch.part[0] >> FOLD_BIT) != 0] = 0
    update = loop(local_epochs=1).train_clients(method, server_groups(method), batch)
    assert all(p.isfinite().all() for group in update.difference.values() for p in group.values())
    assert update.difference["router"]["head.weight"].abs().sum((1, 2)).min() > 0


def test_other_classes_keep_their_shares_of_what_the_candidates_leave():
    backbone = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CANDIDATES + 3))
    method = bound(EvidenceFlow(**SETTINGS), backbone)
    nn.init.normal_(method.modules["router"].head.weight, std=3, generator=torch.Generator().manual_seed(5))
    server, examples = snapshot(method), Minibatch(torch.randn(9, FEATURES), torch.arange(9), torch.ones(9).bool())
    server["router"] = {name: p.detach().clone() for name, p in method.modules["router"].named_parameters()}
    w_g = server["global"]
    memory = method.memory.store(backbone[:2](examples.x).detach(), examples)
    by = standardization(server["statistics"])
    groups = {
        **server,
        "local": {name: 1.5 * p for name, p in w_g.items()},
        "memory": memory,
        "standardization": by,
    }
    x = torch.randn(4, FEATURES)
    ours = method.predict(groups, x).personalized.softmax(-1)
    router = {"router": {name: torch.zeros_like(p) for name, p in server["router"].items()}}
    start = method.predict({**groups, **router}, x).personalized.softmax(-1)
    others = start.argsort(-1, descending=True)[:, CANDIDATES:]
    ratio = ours.gather(-1, others) / start.gather(-1, others)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=0)
    assert (ratio[:, 0] - 1).abs().min() > 1e-3
    torch.testing.assert_close(ours.sum(-1), torch.ones(4))


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
    nothing = torch.zeros(50, 4)
    rows = Evidence(
        torch.randn(50, len(EVIDENCE)) * 3 + 2,
        torch.randn(50, 4, len(OF_CLASS)) * 3 + 2,
        nothing.long(),
        nothing,
        nothing[:, :0],
    )
    running = {"mean": torch.zeros(NUMBERS), "square": torch.zeros(NUMBERS), "weight": torch.tensor(0.0)}
    assert torch.equal(standardize(rows, standardization(running)).instance, rows.instance.clamp(-10, 10))
    counted = torch.ones(50, dtype=torch.bool)
    for _ in range(2):
        running, own = add_to_statistics(running, rows, counted)
        none = {**running, "weight": torch.tensor(0.0)}
        for z in (standardize(rows, by) for by in (standardization(running), standardization(none, own))):
            for numbers in (z.instance, z.classes.flatten(0, 1)):
                size = numbers.shape[-1]
                torch.testing.assert_close(numbers.mean(0), torch.zeros(size), atol=1e-4, rtol=0)
                torch.testing.assert_close(numbers.std(0, correction=0), torch.ones(size), atol=1e-3, rtol=0)
    assert running["weight"].item() == pytest.approx(1 - (1 - MOMENTUM) ** 2)


@pytest.mark.parametrize("server", ["sgd", "adam"])
def test_the_servers_optimizer_scales_neither_router_nor_statistics(server, tmp_path):
    """They are the mean of what clients sent."""
    make = {"sgd": None, "adam": lambda params: torch.optim.Adam(params, lr=0.01)}[server]
    settings = {} if make is None else {"module_settings": {"server_optimizer": make}}
    model, _ = fitted(tmp_path, EvidenceFlow(router_lr=0.02), rounds=1, **settings)
    assert model.server["statistics"].weight.item() == pytest.approx(MOMENTUM)
    mean = model.server["statistics"].mean / MOMENTUM
    assert 0 < mean[EVIDENCE.index("largest_global")] < 1
    moved = model.server["router"].head.weight.abs().max().item()
    assert moved > 0
    assert moved != pytest.approx(0.01, rel=0.01), "Adam's first step"


@pytest.mark.slow
def test_runs_in_other_chunks_end_the_same(tmp_path):
    whole, _ = fitted(tmp_path, EvidenceFlow(), rounds=2)
    small, _ = fitted(tmp_path, EvidenceFlow(), rounds=2, chunk_size=1)
    for name, p in whole.server.named_parameters():
        torch.testing.assert_close(dict(small.server.named_parameters())[name], p, atol=2e-3, rtol=1e-2)


def test_it_learns_whom_to_trust():
    """Labels that w_g and the local model cannot know but the nearest example does: its class gains."""
    method = bound(EvidenceFlow(neighbours=1, neighbour_weight=0.1, router_lr=0.05, router_epochs=3, dropout=0.0))
    batch = chunk((80,))
    x = torch.randn(20, batch.train.x.shape[-1], generator=torch.Generator().manual_seed(0))
    batch.train.x[0], batch.train.y[0] = x.repeat(4, 1), (torch.arange(20) % CLASSES).repeat(4)
    batch.part[0] = torch.arange(4, dtype=torch.uint8).repeat_interleave(20) << FOLD_BIT
    update = loop(local_epochs=1).train_clients(method, server_groups(method), batch)
    router = copy.deepcopy(method.modules["router"])
    router.load_state_dict({k: p + update.difference["router"][k][0] for k, p in router.state_dict().items()})
    of_class = torch.zeros(2, len(OF_CLASS))
    of_class[:, OF_CLASS.index("closeness")] = torch.tensor([-1.0, 1.0])
    far, near = router(torch.zeros(len(EVIDENCE)), of_class, torch.zeros(5))
    assert near - far > 1


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
