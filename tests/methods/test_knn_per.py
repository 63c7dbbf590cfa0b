"""kNN-Per: what it stores, who votes, and what it takes."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients, predict_clients
from flow_pl.methods import FedAvg, KNNPer, Minibatch
from flow_pl.methods.parts import local_memory as memory_module
from flow_pl.methods.parts.local_memory import nearest
from flow_pl.models import MLP, NextCharacterLSTM
from flow_pl.tasks import Classification, MultiLabel, NextToken
from tests.models import test_sequences as sequences
from tests.support import CLASSES, bound, chunk, delta, flat, loop

SIZES = (11, 3)


def evaluated(method, batch, **settings):
    return evaluate_clients(loop(**settings), method, server_groups(method), batch)


def mixed(base, query, stored, labels, k, share):
    """Probabilities of one instance by a plain loop: base [classes], query [D], stored [M, D]; of equals the first."""
    voters = [(math.dist(query, s), label) for s, label in zip(stored, labels, strict=True)]
    ranked = sorted(voters, key=lambda voter: round(voter[0], 5))[:k]
    total = sum(math.exp(-distance) for distance, _ in ranked)
    p = [(1 - share) * value for value in base]
    for distance, label in ranked:
        p[label] += share * math.exp(-distance) / total
    return p


def test_the_neighbours_vote_beside_w_g():
    """Client 1 has 3 examples for k = 5, and padding full of garbage that is nobody's neighbour."""
    method, batch = bound(KNNPer(neighbours=5, neighbour_weight=0.4)), chunk(SIZES, heldout=7)
    result = evaluated(method, batch)
    body, head = method.modules["global"][:2], method.modules["global"][3]
    for client, n in enumerate(SIZES):
        stored = body(batch.train.x[client, :n]).tolist()
        labels = batch.train.y[client, :n].tolist()
        loss, right = 0.0, 0
        for x, y in zip(batch.heldout.x[client], batch.heldout.y[client].tolist(), strict=True):
            query = body(x)
            p = mixed(head(query).softmax(-1).tolist(), query.tolist(), stored, labels, 5, 0.4)
            loss -= math.log(p[y])
            right += p.index(max(p)) == y
        assert result.personalized_loss[client].item() == pytest.approx(loss, rel=1e-5)
        assert result.personalized[client] == right


def test_a_stored_instance_gets_its_own_label_from_one_neighbour():
    method, batch = bound(KNNPer(neighbours=1, neighbour_weight=1.0)), chunk(SIZES)
    batch.heldout = batch.train
    result = evaluated(method, batch)
    assert result.personalized.tolist() == list(SIZES)
    assert result.personalized_loss.tolist() == [0.0, 0.0]
    assert torch.equal(result.global_or_local, result.personalized)


def test_it_trains_as_fedavg_and_keeps_nothing():
    method, batch = bound(KNNPer()), chunk(SIZES)
    fedavg = bound(FedAvg())
    update = loop().train_clients(method, server_groups(method), batch)
    expected = loop().train_clients(fedavg, server_groups(fedavg), batch)
    assert torch.equal(flat(delta(update)["global"]), flat(delta(expected)["global"]))
    assert dict(method.private) == {}
    assert update.kept == {}


def test_without_weight_it_is_fedavg():
    method, fedavg, batch = bound(KNNPer(neighbour_weight=0.0)), bound(FedAvg()), chunk(SIZES, heldout=20)
    ours, theirs = evaluated(method, batch), evaluated(fedavg, batch)
    for name, value in vars(theirs).items():
        assert value is None if getattr(ours, name) is None else torch.equal(getattr(ours, name), value)


@pytest.mark.parametrize("sizes", [(11, 8, 3), (11,)])
def test_neither_chunks_nor_slices_nor_turns_change_anything(sizes, monkeypatch):
    method, batch = bound(KNNPer(neighbours=4)), chunk(sizes, heldout=9)
    whole = evaluated(method, batch)
    sliced = evaluated(method, batch, evaluation_batch_size=2)
    monkeypatch.setattr(memory_module, "BUDGET", 60)  # three queries at once
    in_turns = evaluated(method, batch)
    for name in ("personalized", "personalized_loss", "global_or_local"):
        torch.testing.assert_close(getattr(sliced, name), getattr(whole, name))
        torch.testing.assert_close(getattr(in_turns, name), getattr(whole, name))


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_distances_are_bounded(monkeypatch):
    """2,000 queries against 3,000 stored ones would be 6 million numbers at once."""
    queries, stored = torch.randn(2000, 4), torch.randn(3000, 4)
    memory = {"representation": stored, "label": torch.zeros(3000, dtype=torch.long), "real": torch.ones(3000) > 0}
    monkeypatch.setattr(memory_module, "BUDGET", 30_000)
    with Largest() as largest:
        labels, weights, distances = nearest(queries, memory, 3)
    assert labels.shape == weights.shape == distances.shape == (2000, 3)
    assert largest.numel == 30_000


def test_distances_are_exact_where_representations_are_large():
    """|q|^2 of 1e8 leaves no digit of a distance of 1 in float32; the nearest is at 0, the next at 1."""
    q = torch.full((1, 1), 1e4)
    memory = {"representation": torch.tensor([[1e4], [1e4 + 1]]), "label": torch.tensor([0, 1])}
    labels, weights, distances = nearest(q, memory | {"real": torch.tensor([True, True])}, 2)
    assert distances.tolist() == [[0.0, 1.0]]
    by_label = weights[0][labels[0].argsort()]
    torch.testing.assert_close(by_label, torch.tensor([1.0, math.exp(-1)]) / (1 + math.exp(-1)))


def test_each_token_is_stored_and_padding_never():
    method = sequences.bound(KNNPer(neighbours=3, neighbour_weight=0.5))
    batch = sequences.batch((6, 4))
    groups, _ = loop(local_epochs=1).run(method, server_groups(method), batch, training=False)
    result = evaluated(method, batch)
    *body, head = method.modules["global"].eval()
    body = nn.Sequential(*body)
    for client, n in enumerate((6, 4)):
        x, y = batch.train.x[client, :n], batch.train.y[client, :n]
        stored, labels = body(x)[y != 0].tolist(), y[y != 0].tolist()
        assert groups.groups["memory"]["real"][client].sum() == len(labels)
        loss = 0.0
        held_x, held_y = batch.heldout.x[client], batch.heldout.y[client]
        for query, target in zip(body(held_x)[held_y != 0], held_y[held_y != 0].tolist(), strict=True):
            p = mixed(head(query).softmax(-1).tolist(), query.tolist(), stored, labels, 3, 0.5)
            loss -= math.log(p[target])
        assert result.personalized_loss[client].item() == pytest.approx(loss, rel=1e-4)


def test_a_client_without_a_single_token_has_w_g():
    method, batch = sequences.bound(KNNPer()), sequences.batch((6, 4))
    batch.train.y[1] = 0
    result = evaluated(method, batch)
    assert result.personalized[1] == result.generalized[1] == result.global_or_local[1]
    torch.testing.assert_close(result.personalized_loss[1], result.generalized_loss[1])
    assert result.personalized_loss[0] != result.generalized_loss[0]


def test_characters_train_and_predict():
    method = sequences.bound(KNNPer(), NextCharacterLSTM(sequences.TOKENS, embedding=3, hidden=4))
    batch = sequences.batch((4, 3))
    assert (
        delta(loop(local_epochs=1).train_clients(method, server_groups(method), batch))["global"]["head.bias"]
        .abs()
        .sum()
        > 0
    )
    assert torch.isfinite(evaluated(method, batch).personalized_loss).all()


def test_feature_maps_are_flattened():
    head = nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 4, CLASSES))
    method = KNNPer()
    method = method.bind(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), head), Classification())
    examples = Minibatch(torch.randn(70, 1, 6, 6), torch.arange(70) % CLASSES, torch.ones(70) > 0)
    groups = server_groups(method)
    memory = method.memory.stages()[0].compute(groups, examples)["memory"]
    assert memory["representation"].shape == (70, 32)
    torch.testing.assert_close(memory["representation"], method.model.backbone[:2](examples.x).flatten(1))
    predicted = method.predict({**groups, "memory": memory}, examples.x[:5])
    torch.testing.assert_close(predicted.personalized.exp().sum(-1), torch.ones(5))


def test_predictions_are_made_for_unlabelled_instances():
    method, batch = bound(KNNPer()), chunk(SIZES)
    held = batch.heldout
    batch = ClientBatch(
        batch.client, batch.train, batch.part, batch.order,
        Examples(held.x, torch.full_like(held.y, -1), held.mask, held.sizes), 0, batch.key,
    )  # fmt: skip
    assert predict_clients(loop(local_epochs=1), method, server_groups(method), batch).prediction.shape == (2, 5)


def test_several_labels_are_refused():
    with pytest.raises(ConfigurationError, match=r"the task MultiLabel has several.*neighbours vote.*Interpolation"):
        KNNPer().bind(MLP(4, 3, (5,)), MultiLabel(k=1))
    KNNPer().bind(MLP(4, 3, (5,)), NextToken())


@pytest.mark.parametrize("settings", [{"neighbours": 0}, {"neighbour_weight": 1.5}, {"neighbour_weight": -0.1}])
def test_bad_settings_are_refused(settings):
    (name, value), = settings.items()  # fmt: skip
    with pytest.raises(ConfigurationError, match=f"{name} is {value}"):
        KNNPer(**settings)
