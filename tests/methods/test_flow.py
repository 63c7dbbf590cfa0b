"""Flow against an independent reference, and its edges."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.data.batch import GLOBAL, LOCAL
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients, predict_clients
from flow_pl.methods import FedAvg, Flow
from flow_pl.models.routers import InstanceRouter, Router
from tests.support import PublishedFlow, bound, chunk, delta, flat, loop, minibatches, network, select, sgd, train_alone

LAMBDA, EPSILON = 0.05, 1e-6


def small_router(blocks):
    return InstanceRouter(blocks, hidden=(4,), dropout=0.0)


class AllGlobal(Router):
    """A frozen router: every instance goes the global way."""

    def __init__(self, blocks):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.tensor([1.0, 0.0]).expand(len(x), 2) + 0 * self.unused

    def bind(self, parameters, x):
        return lambda *asked: self.call(parameters, x)


def routed(backbones, router, x):
    """The dynamic model of tests.support.network, written out: linear, tanh, (dropout), linear."""
    q = router(x)
    first = [backbone[0](x) for backbone in backbones]
    h = (q[:, 0, :1] * first[0] + q[:, 0, 1:] * first[1]).tanh()
    second = [backbone[3](h) for backbone in backbones]
    return q[:, 1, :1] * second[0] + q[:, 1, 1:] * second[1], q


def router_loss(backbones, router, x, y):
    outputs, q = routed(backbones, router, x)
    return F.cross_entropy(outputs, y) - LAMBDA * (q[..., 1].square() + EPSILON).log().mean()


def reference_client(method, batch, client, epochs, train_global=True):
    """Algorithm 1 by modules, autograd and optimizers of one client; personalization, where w_g does not move."""
    w_g, router = copy.deepcopy(method.modules["global"]), copy.deepcopy(method.modules["router"])
    w_l = train_alone(copy.deepcopy(w_g), batch, client, epochs, 4, bit=LOCAL, first=epochs if train_global else 0)
    move_router, move_global = sgd(list(router.parameters())), sgd(list(w_g.parameters()))
    for rows in minibatches(batch, client, epochs, 4, bit=GLOBAL):
        x, y = batch.train.x[client, rows], batch.train.y[client, rows]
        move_router.zero_grad()
        router_loss((w_g, w_l), router, x, y).backward()
        move_router.step()
        if train_global:
            move_global.zero_grad()
            F.cross_entropy(w_g(x), y).backward()
            move_global.step()
    return w_g, w_l, router


@pytest.mark.parametrize("client", [0, 1, 2])
def test_client_equals_the_published_algorithm(client):
    """What a client sends after two epochs; the last client has a single example, which is in both parts."""
    method = bound(PublishedFlow(regularization=LAMBDA, router=small_router))
    batch = chunk((11, 6, 1))
    server = server_groups(method)
    update = loop(weighting="uniform").train_clients(method, server, select(batch, [client]))
    w_g, _, router = reference_client(method, batch, client, epochs=2)
    for name, module in (("global", w_g), ("router", router)):
        expected = flat(dict(module.named_parameters())) - flat(server[name])
        torch.testing.assert_close(flat(delta(update)[name]), expected, atol=1e-6, rtol=1e-4)
    assert set(delta(update)) == {"global", "router"}, "local parameters are never sent"


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_personalized_model_equals_the_published_one(routing):
    """w_l and the router trained, w_g as it came; then hard or soft routing on the held-out examples."""
    method = bound(PublishedFlow(regularization=LAMBDA, routing=routing, router=small_router))
    batch = chunk((11, 6), heldout=40)
    evaluated = evaluate_clients(loop(), method, server_groups(method), batch)
    for client in range(2):
        w_g, w_l, router = reference_client(method, batch, client, epochs=2, train_global=False)
        x, y = batch.heldout.x[client], batch.heldout.y[client]

        def choose(x, router=router):
            q = router(x)
            return F.one_hot(q.argmax(-1), 2).float() if routing == "hard" else q

        outputs, q = routed((w_g, w_l), choose, x)
        right_g, right_p, right_l = (o.argmax(-1) == y for o in (w_g(x), outputs, w_l(x)))
        assert evaluated.personalized[client] == right_p.sum()
        assert evaluated.generalized[client] == right_g.sum()
        assert evaluated.both[client] == (right_g & right_p).sum()
        assert evaluated.global_or_local[client] == (right_g | right_l).sum()
        if routing == "hard":
            assert torch.equal(evaluated.routed_local[client], q[..., 1].sum(0))
        torch.testing.assert_close(evaluated.personalized_loss[client], F.cross_entropy(outputs, y, reduction="sum"))


def test_all_global_router_without_regularizer_is_fedavg_on_the_global_part():
    """Invariant: lambda 0 and a frozen all-global router train w_g exactly as FedAvg on zeta_g."""
    method = bound(PublishedFlow(regularization=0.0, router=AllGlobal))
    batch = chunk((11, 6, 4, 1))
    server = server_groups(method)
    update = loop().train_clients(method, server, batch)
    expected = torch.zeros_like(flat(server["global"]))
    for client, n in enumerate(batch.train.sizes):
        alone = train_alone(copy.deepcopy(method.modules["global"]), batch, client, 2, 4, bit=GLOBAL)
        expected += n * (flat(dict(alone.named_parameters())) - flat(server["global"]))
    torch.testing.assert_close(flat(delta(update)["global"]), expected, atol=1e-5, rtol=1e-5)
    assert not flat(delta(update)["router"]).any()


def test_cross_trains_the_global_model_exactly_as_fedavg():
    backbone = network()
    flow = bound(PublishedFlow(split="cross", router=small_router), copy.deepcopy(backbone))
    fedavg = bound(FedAvg(), copy.deepcopy(backbone))
    batch = chunk((11, 6, 4, 1))
    a = loop().train_clients(flow, server_groups(flow), batch)
    b = loop().train_clients(fedavg, server_groups(fedavg), batch)
    assert torch.equal(flat(delta(a)["global"]), flat(delta(b)["global"]))


def test_cross_predicts_with_a_local_model_that_saw_all_the_data():
    method = bound(PublishedFlow(split="cross", router=small_router))
    batch = chunk((11, 6))
    groups, _ = loop().run(method, server_groups(method), batch, training=False)
    for client in range(2):
        for name, bit in (("local", 0), ("probe", LOCAL)):
            alone = train_alone(copy.deepcopy(method.modules["global"]), batch, client, 2, 4, bit=bit)
            stacked = flat({k: p[client] for k, p in groups.groups[name].items()})
            torch.testing.assert_close(stacked, flat(dict(alone.named_parameters())), atol=1e-6, rtol=1e-4)


def test_routing_by_client_sends_all_instances_one_way():
    method = bound(PublishedFlow(route_by="client", router=small_router))
    batch = chunk((11, 6), heldout=30)
    groups, _ = loop(local_epochs=1).run(method, server_groups(method), batch, training=False)
    for client, n in enumerate(batch.train.sizes):
        torch.testing.assert_close(groups.groups["features"]["mean"][client], batch.train.x[client, :n].mean(0))
    routes = predict_clients(loop(local_epochs=1), method, server_groups(method), batch).routes
    assert (routes == routes[:, :1]).all()
    by_instance = bound(PublishedFlow(router=small_router))
    x = batch.heldout.x[0]
    probabilities = by_instance.local_probability(by_instance.start(server_groups(by_instance)), x)
    assert (probabilities.std(0) > 0).all()


def test_training_through_the_routed_model_moves_w_g_otherwise():
    own, through = (bound(PublishedFlow(train_global=way, router=small_router)) for way in ("own", "routed"))
    batch = chunk((11, 6))
    a, b = (loop(local_epochs=1).train_clients(m, server_groups(m), batch) for m in (own, through))
    assert not torch.allclose(flat(delta(a)["global"]), flat(delta(b)["global"]))
    # The router's first step is the same in both, and it sees the same local model.
    assert flat(delta(b)["global"]).abs().sum() > 0


def test_a_router_that_is_not_adapted_stays_the_servers():
    method = bound(PublishedFlow(adapt_router=False, router=small_router))
    groups, _ = loop(local_epochs=1).run(method, server_groups(method), chunk((11, 6)), training=False)
    assert "router" not in groups.stacked
    assert "local" in groups.stacked


def test_w_g_never_moves_in_personalization():
    for split in ("parts", "none", "cross"):
        method = bound(PublishedFlow(split=split, router=small_router))
        groups, _ = loop(local_epochs=1).run(method, server_groups(method), chunk((11, 6)), training=False)
        assert "global" not in groups.stacked


def test_router_learning_rate_is_scaled():
    """Without momentum and regularizer the first step of the router is proportional to its learning rate."""

    def plain(params):
        return torch.optim.SGD(params, lr=0.1)

    batch = chunk((2,), epochs=1)
    moved = []
    for scale in (1.0, 0.5):
        method = bound(PublishedFlow(regularization=0.0, router_lr_scale=scale, router=small_router))
        moved.append(
            flat(
                delta(loop(local_epochs=1, client_optimizer=plain).train_clients(method, server_groups(method), batch))[
                    "router"
                ]
            )
        )
    torch.testing.assert_close(moved[1], 0.5 * moved[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": -0.1}, "regularization is -0.1"),
        ({"router_lr_scale": 0.0}, "router_lr_scale is 0.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Flow(**settings)


def small_steps(params):
    return torch.optim.SGD(params, lr=0.03, momentum=0.9, weight_decay=0.01)


def test_the_local_model_takes_steps_of_its_own_size():
    method = bound(Flow(router=small_router, adapt_router=False, personal_lr_scale=0.3))
    batch = chunk((11, 6))
    groups, _ = loop().run(method, server_groups(method), batch, training=False)
    w_g = method.modules["global"]
    for client in range(2):
        w_l = train_alone(copy.deepcopy(w_g), batch, client, 2, 4, optimizer=small_steps)
        for name, p in w_l.named_parameters():
            torch.testing.assert_close(groups.groups["local"][name][client], p.data, atol=1e-5, rtol=1e-4)
