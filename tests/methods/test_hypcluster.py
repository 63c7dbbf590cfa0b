"""HypCluster: which model a client picks, trains and sends."""

import copy
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

from flow_pl.engine.compression import TopK, compress_update
from flow_pl.engine.sent_updates import as_sent, receive
from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedAvg, HypCluster
from flow_pl.models import EMNISTCNN, LSTM, MLP, NextCharacterLSTM, ResNet18
from flow_pl.tasks import MultiLabel, NextToken
from tests.engine.test_rejected_clients import EmptyRounds
from tests.models import test_sequences as sequences
from tests.support import CLASSES, FEATURES, bound, chunk, delta, flat, loop, network, select, snapshot, train_alone
from tests.test_module import data, fitted, module, trainer
from tests.test_module import parameters as module_parameters

SIZES = (11, 8, 5)
PICKED = (1, 0, 1)
"""The cluster of each client's labels in `clustered`."""


def clustered(method, heldout=20):
    """Clients whose labels are what one of the models says, so that it has the lower loss on them."""
    batch = chunk(SIZES, heldout=heldout)
    for client, cluster in enumerate(PICKED):
        model = method.modules[method.models[cluster]]
        for part in (batch.train, batch.heldout):
            part.y[client] = model(part.x[client]).argmax(-1)
    return batch


def losses(method, batch, client):
    """The mean loss of every model on a client's training data."""
    n = batch.train.sizes[client]
    x, y = batch.train.x[client, :n], batch.train.y[client, :n]
    return [F.cross_entropy(method.modules[name](x), y).item() for name in method.models]


def test_each_client_trains_and_sends_the_model_of_the_lowest_loss():
    """The server's gradient is that of the weighted mean over the clients that picked a model, by plain loops."""
    method = bound(HypCluster())
    batch = clustered(method)
    server = snapshot(method)
    expected = {name: torch.zeros(len(flat(server["global"]))) for name in method.models}
    sizes = dict.fromkeys(method.models, 0)
    for client, n in enumerate(SIZES):
        found = losses(method, batch, client)
        assert found.index(min(found)) == PICKED[client], "the test's clients are to differ"
        name = method.models[PICKED[client]]
        alone = train_alone(copy.deepcopy(method.modules[name]), batch, client, epochs=2, batch_size=4)
        expected[name] += n * (flat(dict(alone.named_parameters())) - flat(server[name]))
        sizes[name] += n
    update = loop().train_clients(method, server_groups(method), batch)
    round_ = ServerRound(method)
    round_.add(update)
    round_.finish(lambda total: total, 0)
    for name in method.models:
        torch.testing.assert_close(flat(delta(update)[name]), expected[name], atol=1e-5, rtol=1e-4)
        assert update.weights[name].sum() == sizes[name]
        gradient = flat({key: p.grad for key, p in method.modules[name].named_parameters()})
        torch.testing.assert_close(gradient, -expected[name] / sizes[name], atol=1e-5, rtol=1e-4)
    assert update.kept == {}
    assert dict(method.private) == {}


def test_a_model_that_nobody_picked_stays():
    method = bound(HypCluster())
    batch = select(clustered(method), [1])
    round_ = ServerRound(method)
    round_.add(loop(local_epochs=1).train_clients(method, server_groups(method), batch))
    round_.finish(lambda total: total, 0)
    assert all(p.grad.any() for p in method.modules["global"].parameters())
    assert all(p.grad is None for p in method.modules["cluster_1"].parameters()), "momentum would move it"


@pytest.mark.filterwarnings("ignore::flow_pl.module.EmptyRoundWarning")
@pytest.mark.parametrize("plugins", [[], ["16-mixed"]], ids=str)
def test_a_round_without_any_client_moves_no_model(tmp_path, plugins):
    made = [MixedPrecision(p, device="cpu", scaler=torch.amp.GradScaler("cpu")) for p in plugins]
    start = module_parameters(module(HypCluster()))
    model, run = fitted(tmp_path, HypCluster(), 1, {"plugins": made}, deadline=1)
    assert torch.equal(module_parameters(model), start)
    assert run.global_step == 1


@pytest.mark.filterwarnings("ignore::flow_pl.module.EmptyRoundWarning")
def test_momentum_moves_no_model_in_a_round_without_clients(tmp_path):
    settings = {"server_optimizer": partial(torch.optim.SGD, lr=1.0, momentum=0.9)}
    found = []
    for rounds in (1, 2):
        lightning.seed_everything(0, verbose=False)
        model, clients = module(HypCluster(), **settings), data(tmp_path / "cache")
        clients.availability = EmptyRounds((1,))
        trainer(rounds, limit_val_batches=0).fit(model, datamodule=clients)
        found.append(module_parameters(model))
    assert torch.equal(*found)


def test_the_update_of_the_picked_model_is_compressed():
    """And counted once, whatever the number of models; the distances between models say nothing about it."""
    method = bound(HypCluster(clusters=3))
    batch, server = clustered(method), server_groups(method)
    plain = loop().train_clients(method, server, batch)
    compressed = loop().train_clients(method, server, batch)
    sent = as_sent(method, compressed)
    assert list(sent) == ["global"]
    compress_update(TopK(0.25), sent, compressed.client, None, 0, 0)
    receive(method, compressed, sent)
    for client, cluster in enumerate(PICKED):
        for i, name in enumerate(method.models):
            arrived = flat({key: p[client] for key, p in compressed.difference[name].items()})
            if i != cluster:
                assert not arrived.any()
                continue
            whole = flat({key: p[client] for key, p in plain.difference[name].items()})
            least = whole.abs().sort(descending=True).values[-(-len(whole) // 4) - 1]
            assert torch.equal(arrived, torch.where(whole.abs() >= least, whole, 0.0))


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_it_trains_with_compression(tmp_path, share):
    """By the larger part of the update; all of it changes nothing."""
    _, plain = fitted(tmp_path, HypCluster(), rounds=1)
    settings = {"compression": TopK(share, error_feedback=False)}
    _, run = fitted(tmp_path, HypCluster(), rounds=1, module_settings=settings)
    kept = (run.callback_metrics["train/update_norm"] / plain.callback_metrics["train/update_norm"]).item()
    assert kept == 1 if share == 1 else 0.5 < kept < 1


def test_the_picked_model_predicts_and_the_mean_is_the_general_one():
    method = bound(HypCluster())
    batch = clustered(method)
    result = evaluate_clients(loop(local_epochs=1), method, server_groups(method), batch)
    for client in range(3):
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        outputs = [method.modules[name](x) for name in method.models]
        picked = outputs[PICKED[client]]
        mean = sum(o.softmax(-1) for o in outputs) / 2
        nll = F.nll_loss(mean.log(), y, reduction="sum")
        torch.testing.assert_close(result.generalized_loss[client], nll, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            result.personalized_loss[client], F.cross_entropy(picked, y, reduction="sum"), rtol=1e-4, atol=1e-5
        )
        right_p, right_g = picked.argmax(-1) == y, mean.argmax(-1) == y
        assert result.personalized[client] == right_p.sum() == 20
        assert result.generalized[client] == right_g.sum()
        assert result.global_or_local[client] == 20


def test_chunks_change_nothing():
    method = bound(HypCluster(clusters=3))
    batch, server = chunk((9, 7, 3)), server_groups(method)
    whole = delta(loop().train_clients(method, server, batch))
    alone = [delta(loop().train_clients(method, server, select(batch, [i]))) for i in range(3)]
    for name in method.models:
        torch.testing.assert_close(flat(whole[name]), sum(flat(d[name]) for d in alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(11, 6), (11,)])
def test_one_model_is_fedavg_bit_for_bit(sizes):
    """Dropout included: picking draws nothing."""
    batch, updates, evaluations = chunk(sizes, heldout=20), [], []
    for method in (FedAvg(), HypCluster(clusters=1)):
        method = bound(method, network(dropout=0.5))
        assert set(method.modules) == {"global"}
        updates.append(loop().train_clients(method, server_groups(method), batch))
        evaluations.append(evaluate_clients(loop(), method, server_groups(method), batch))
    assert torch.equal(flat(delta(updates[0])["global"]), flat(delta(updates[1])["global"]))
    assert torch.equal(updates[0].weights["global"], updates[1].weights["global"])
    for name in ("generalized", "personalized", "generalized_loss", "personalized_loss"):
        assert torch.equal(getattr(evaluations[0], name), getattr(evaluations[1], name))


def test_one_lazy_model_has_fedavgs_initial_weights():
    fedavg, method = (bound(m, lazy()) for m in (FedAvg(), HypCluster(clusters=1)))
    assert torch.equal(flat(server_groups(fedavg)["global"]), flat(server_groups(method)["global"]))


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(CLASSES))


def recurrent():
    return nn.Sequential(nn.Unflatten(1, (1, FEATURES)), LSTM(FEATURES, CLASSES), nn.Flatten())


@pytest.mark.parametrize("backbone", [network, lazy, recurrent])
def test_models_start_from_weights_of_their_own(backbone):
    method = bound(HypCluster(clusters=3), backbone())
    weights = [flat(group) for group in server_groups(method).values()]
    assert len(weights) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(weights[a], weights[b])


@pytest.mark.parametrize("model", [lambda: EMNISTCNN(3), lambda: ResNet18(3), lambda: NextCharacterLSTM(9)])
def test_every_block_of_the_projects_backbones_draws_new_weights(model):
    method = HypCluster()
    method = method.bind(model(), NextToken())
    same = [
        key
        for key, p in method.modules["global"].named_parameters()
        if p.ndim > 1 and torch.equal(p, method.modules["cluster_1"].get_parameter(key))
    ]
    assert same == []


def test_models_that_would_stay_the_same_are_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(FEATURES, CLASSES))

        def forward(self, x):
            return x @ self.weight

    with pytest.raises(ConfigurationError, match=r"2 models of HypCluster .* same weights.*reset_parameters"):
        bound(HypCluster(), nn.Sequential(Scale()))
    bound(HypCluster(clusters=1), nn.Sequential(Scale()))


def test_it_trains_on_sequences():
    method, batch = sequences.bound(HypCluster()), sequences.batch((6, 5))
    update = loop(local_epochs=1).train_clients(method, server_groups(method), batch)
    assert (update.weights["global"] + update.weights["cluster_1"]).tolist() == [6, 5]
    for client in range(2):
        n = batch.train.sizes[client]
        x, y = batch.train.x[client, :n], batch.train.y[client, :n]
        found = [
            F.cross_entropy(method.modules[name](x).flatten(0, 1), y.flatten(), ignore_index=0).item()
            for name in method.models
        ]
        assert update.weights[method.models[found.index(min(found))]][client] == n
    assert torch.isfinite(
        evaluate_clients(loop(local_epochs=1), method, server_groups(method), batch).generalized_loss
    ).all()


def test_several_labels_have_mean_probabilities_too():
    """Outputs of a mixture give back its probabilities, so that its binary cross-entropy is that of the mean."""
    method = HypCluster()
    method = method.bind(MLP(4, 3, (5,)), MultiLabel(k=1))
    method.initialize(torch.zeros(1, 4))
    x, groups = torch.randn(6, 4), method.start(server_groups(method))
    mean = sum(method.modules[name](x).sigmoid() for name in method.models) / 2
    torch.testing.assert_close(method.predict(groups, x).generalized.sigmoid(), mean)
    extreme = torch.tensor([0.0, 1e-30, 0.25, 1.0])
    outputs = method.objective.outputs(extreme)
    torch.testing.assert_close(outputs.sigmoid(), extreme)
    assert torch.isfinite(outputs).all()
    assert (outputs.diff() > 0).all()


@pytest.mark.parametrize("clusters", [0, -1])
def test_bad_settings_are_refused(clusters):
    with pytest.raises(ConfigurationError, match=f"clusters is {clusters}"):
        HypCluster(clusters=clusters)
