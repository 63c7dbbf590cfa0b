"""FedBN against plain loops of one client, with torch's own BatchNorm layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.checks import check_backbone, check_fit
from flow_pl.engine.server_round import ServerRound, sent_parameters
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedBN
from flow_pl.models.normalization import converted
from flow_pl.serving import PersonalModel
from flow_pl.tasks import Classification
from tests.methods.helpers import client_of, copied, next_server
from tests.support import CLASSES, FEATURES, chunk, delta, flat, loop, select, snapshot, train_alone

SIZES = (11, 6, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(FEATURES, 5)
        self.bn1 = nn.BatchNorm1d(5)
        self.inner = nn.Linear(5, 5)
        self.bn2 = nn.BatchNorm1d(5)
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x):
        h = self.bn1(self.stem(x)).tanh()
        return self.fc(h + self.bn2(self.inner(h)).tanh())


def net():
    torch.manual_seed(0)
    return Net()


def bound():
    method = FedBN().bind(converted(net(), "local"), Classification())
    check_fit(method, torch.zeros(1, FEATURES), CLASSES)
    return method


def measured(plain, x):
    """The net with the statistics of a batch, each layer's below those above it."""
    hooks = []
    for layer in (plain.bn1, plain.bn2):
        layer.momentum = 0.0

        def keep(layer, args):
            layer.kept = args[0].mean(0), args[0].var(0, unbiased=False)

        hooks.append(layer.register_forward_pre_hook(keep))
    with torch.no_grad():
        plain.train()(x)
    for layer, hook in zip((plain.bn1, plain.bn2), hooks, strict=True):
        hook.remove()
        layer.running_mean.copy_(layer.kept[0])
        layer.running_var.copy_(layer.kept[1])
    return plain.eval()


def is_norm(name):
    return name.startswith("bn")


def client_net(server, kept, batch, client):
    plain = net()
    plain.load_state_dict({**server, **kept}, strict=False)
    return measured(plain, batch.train.x[client, : SIZES[client]])


def test_all_but_the_normalization_layers_is_sent_and_they_are_kept():
    """Two rounds, the second from what was kept, against torch's layers in evaluation mode."""
    method, batch, kept = bound(), chunk(SIZES), None
    norms = [{k: p for k, p in snapshot(method)["global"].items() if is_norm(k)}] * len(SIZES)
    for server in (snapshot(method), next_server(snapshot(method))):
        body = {k: p for k, p in server["global"].items() if not is_norm(k)}
        expected = torch.zeros_like(flat(body))
        update = loop().train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        for client, n in enumerate(SIZES):
            plain = train_alone(client_net(body, norms[client], batch, client), batch, client, 2, 4)
            trained = dict(plain.named_parameters())
            norms[client] = {k: p.detach() for k, p in trained.items() if is_norm(k)}
            expected += n * (flat({k: trained[k] for k in body}) - flat(body))
            torch.testing.assert_close(client_of(kept["head"], client), norms[client], atol=1e-4, rtol=1e-4)
        assert update.difference["global"].keys() == body.keys()
        torch.testing.assert_close(flat(delta(update)["global"]), expected, atol=1e-4, rtol=1e-4)
    assert not any(map(is_norm, sent_parameters(method)["global"]))
    assert ServerRound(method).bytes_down == 4 * flat(body).numel()


def test_a_client_is_evaluated_with_its_own_statistics_and_layers_trained_on():
    method, batch = bound(), chunk(SIZES, heldout=20)
    kept = loop(local_epochs=1).train_clients(method, snapshot(method), batch).kept
    server = next_server(snapshot(method))
    result = evaluate_clients(loop(), method, server, batch, copied(kept))
    for client in range(len(SIZES)):
        plain = client_net(server["global"], client_of(kept["head"], client), batch, client)
        norms = [p for name, p in plain.named_parameters() if is_norm(name)]
        sgd = torch.optim.SGD(norms, lr=0.1, momentum=0.9, weight_decay=0.01)
        train_alone(plain, batch, client, 2, 4, optimizer=lambda _, sgd=sgd: sgd)
        measured(plain, batch.train.x[client, : SIZES[client]])
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        loss = F.cross_entropy(plain(x), y, reduction="sum")
        torch.testing.assert_close(result.personalized_loss[client], loss, rtol=1e-3, atol=1e-4)


def test_chunks_of_one_and_of_all_have_the_same_numbers():
    method, batch = bound(), chunk(SIZES)
    together = loop().train_clients(method, snapshot(method), batch)
    alone = [loop().train_clients(method, snapshot(method), select(batch, [client])) for client in range(len(SIZES))]
    summed = sum(flat(delta(update)["global"]) for update in alone)
    torch.testing.assert_close(flat(delta(together)["global"]), summed, atol=1e-4, rtol=1e-4)
    check_backbone(method, torch.rand(1, FEATURES), True)


def test_a_layer_that_is_called_twice_has_no_one_mean():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + self.fc(self.bn1(self.stem(x)))

    method = FedBN().bind(converted(copy.deepcopy(Twice()), "local"), Classification())
    with pytest.raises(ConfigurationError, match=r"block 'bn1' of the backbone is called several times in a forward"):
        check_fit(method, torch.zeros(1, FEATURES), CLASSES)


def test_a_served_model_has_the_clients_layers_and_statistics():
    method, batch = bound(), chunk(SIZES[:1])
    model = PersonalModel(method, loop().personalize(method, snapshot(method), batch))
    plain = client_net(snapshot(method)["global"], {}, batch, 0)
    norms = [p for name, p in plain.named_parameters() if is_norm(name)]
    sgd = torch.optim.SGD(norms, lr=0.1, momentum=0.9, weight_decay=0.01)
    train_alone(plain, batch, 0, 2, 4, optimizer=lambda _: sgd)
    measured(plain, batch.train.x[0, : SIZES[0]])
    x = batch.heldout.x[0]
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)
    weights = model.weights()
    for name in ("bn1.weight", "bn2.running_mean", "bn2.running_var"):
        torch.testing.assert_close(weights[name], plain.state_dict()[name], rtol=1e-3, atol=1e-4)
