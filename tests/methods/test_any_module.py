"""Every method on modules that are no Sequential: as plain torch, in any chunk, and what of them is sent."""

import copy

import pytest
import torch
from torch.nn import functional as F

import flow_pl.methods
from flow_pl.checks import check_backbone, check_fit
from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.engine.draw_check import check_draws
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import ServerRound, sent_parameters, server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import EvidenceFlow, FedAvg, FedBN, FedPer, FineTuning, Flow, Local, Method, PartialFed
from flow_pl.models.normalization import converted
from flow_pl.models.routers import InstanceRouter
from flow_pl.module import FederatedModule
from flow_pl.serving import PersonalModel, ServerModel
from flow_pl.tasks import Classification
from tests.models.nets import Residual, ResNet
from tests.support import CLASSES, FEATURES, chunk, delta, flat, loop, minibatches, select, sgd, train_alone
from tests.test_module import data, trainer

METHODS = [
    m for m in vars(flow_pl.methods).values() if isinstance(m, type) and issubclass(m, Method) and m is not Method
]
BLOCKS = ["layer1", "layer2", "layer3", "layer4", "fc"]
IMAGE = (1, 8, 8)


def bound(method, backbone, example, blocks=None):
    torch.manual_seed(1)
    method = method.bind(backbone, Classification(), blocks)
    check_fit(method, example, CLASSES)
    check_draws(method, example)
    check_backbone(method, example, True)
    return method


def pictures(sizes, epochs=2):
    """As `tests.support.chunk`, of pictures."""
    batch, generator = chunk(sizes, epochs, heldout=4), torch.Generator().manual_seed(4)

    def drawn(part):
        return Examples(torch.randn(*part.mask.shape, *IMAGE, generator=generator), part.y, part.mask, part.sizes)

    return ClientBatch(**{**vars(batch), "train": drawn(batch.train), "heldout": drawn(batch.heldout)})


def router(blocks):
    return InstanceRouter(blocks, hidden=(4,), dropout=0.0)


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)
def test_every_method_takes_any_module(make):
    """Two clients, a round and an evaluation, side by side and one by one."""
    settings = {Local: {"epochs": 2}, Flow: {"router": router}}.get(make, {})
    if make is FedBN:
        with pytest.raises(ConfigurationError, match="FedBN keeps BatchNorm layers on the clients"):
            bound(make(**settings), Residual(), torch.zeros(1, FEATURES))
        return
    torch.manual_seed(0)
    method, batch = bound(make(**settings), Residual(), torch.rand(1, FEATURES)), chunk((9, 5), epochs=4)
    server, trains = server_groups(method), loop(local_epochs=1)
    together = trains.train_clients(method, server, batch)
    evaluated = evaluate_clients(trains, method, server, batch)
    sums = delta(together)
    assert all(p.isfinite().all() for group in sums.values() for p in group.values())
    for name in sums:
        alone = sum(flat(delta(trains.train_clients(method, server, select(batch, [i])))[name]) for i in range(2))
        torch.testing.assert_close(flat(sums[name]), alone, atol=1e-4, rtol=1e-4)
    for i in range(2):
        one = evaluate_clients(trains, method, server, select(batch, [i]))
        torch.testing.assert_close(one.personalized_loss[0], evaluated.personalized_loss[i], atol=1e-4, rtol=1e-4)


def mixed(one, two, q, x):
    """`ResNet` of two copies, each of its stages and its last layer mixed by q [N, blocks, 2]."""
    h = one.maxpool(one.relu(one.bn1(one.conv1(x))))
    for i, name in enumerate(BLOCKS):
        if name == "fc":
            h = torch.flatten(one.avgpool(h), 1)
        q_global, q_local = (q[:, i, way].view(-1, *[1] * (h.ndim - 1)) for way in (0, 1))
        h = q_global * getattr(one, name)(h) + q_local * getattr(two, name)(h)
    return h


@pytest.mark.parametrize("batch_norm", [pytest.param("group", marks=pytest.mark.slow), "frozen"])
def test_a_residual_net_is_routed_as_two_deep_copies_mixed_by_hand(batch_norm):
    torch.manual_seed(0)
    net = converted(ResNet(CLASSES, width=4), batch_norm)
    method = bound(Flow(router=router, regularization=0.05), net, torch.rand(1, *IMAGE), BLOCKS)
    batch = pictures((9, 5))
    server = server_groups(method)
    trains = loop(weighting="uniform")
    update = trains.train_clients(method, server, select(batch, [0]))

    w_g, psi = copy.deepcopy(net), copy.deepcopy(method.modules["router"])
    local = [name for name, _ in net.named_parameters() if name.partition(".")[0] in BLOCKS]

    def of_blocks(module):
        return [p for name, p in module.named_parameters() if name in local]

    w_l = copy.deepcopy(net)
    optimizer = sgd(of_blocks(w_l))
    train_alone(w_l, batch, 0, 2, 4, optimizer=lambda _: optimizer, first=2)
    move_router, move_global = sgd(list(psi.parameters())), sgd(list(w_g.parameters()))
    for rows in minibatches(batch, 0, 2, 4):
        x, y = batch.train.x[0, rows], batch.train.y[0, rows]
        q = psi(x)
        loss = F.cross_entropy(mixed(w_g, w_l, q, x), y) - 0.05 * (q[..., 0].square() + 1e-6).log().mean()
        move_router.zero_grad()
        loss.backward()
        move_router.step()
        move_global.zero_grad()
        F.cross_entropy(w_g(x), y).backward()
        move_global.step()
    for name, module in (("global", w_g), ("router", psi)):
        expected = flat(dict(module.named_parameters())) - flat(server[name])
        torch.testing.assert_close(flat(delta(update)[name]), expected, atol=1e-5, rtol=1e-3)

    together = delta(trains.train_clients(method, server, batch))
    other = delta(trains.train_clients(method, server, select(batch, [1])))
    for name in together:
        summed = flat(delta(update)[name]) + flat(other[name])
        torch.testing.assert_close(flat(together[name]), summed, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_traced_steps_have_the_numbers_of_others():
    net = Residual(dropout=0.3)
    batch, found = chunk((9, 8)), []
    for trace_after in (None, 0):
        method = bound(Flow(router=router), copy.deepcopy(net), torch.rand(1, FEATURES), ["stem", "head"])
        trains = FederatedLoop(2, batch_size=4, client_optimizer=sgd, trace_after=trace_after)
        found.append(flat(delta(trains.train_clients(method, server_groups(method), batch))["global"]))
    assert torch.equal(*found)


@pytest.mark.parametrize("make", [FedAvg, FedPer, Flow])
def test_frozen_parameters_are_neither_stacked_nor_sent(make):
    """One copy for all clients: bytes on the way and of the groups are those of what is trained."""
    torch.manual_seed(0)
    net = Residual(hidden=64)
    for p in net.inner.parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(net.inner.state_dict())
    settings = {"router": router} if make is Flow else {}
    method, batch = bound(make(**settings), net, torch.rand(1, FEATURES)), chunk((9, 5))
    server = server_groups(method)
    groups, _ = loop().run(method, server, batch, training=True)
    names = {key for group in groups.groups.values() for key in group}
    assert not any(name.startswith("inner") for name in names)
    trained = 64 + 64 * FEATURES + 64 + CLASSES * 64 + CLASSES
    psi = sum(p.numel() for p in server.get("router", {}).values())
    sent = {FedAvg: trained, FedPer: 64 + 64 * FEATURES + 64, Flow: trained + psi}[make]
    assert sum(p.numel() for group in sent_parameters(method).values() for p in group.values()) == sent
    assert ServerRound(method).bytes_down == 4 * sent
    stacked = sum(p.numel() for name in groups.stacked for p in groups.groups[name].values())
    assert stacked <= 2 * (2 * trained + psi)
    assert all(torch.equal(p, before[name]) for name, p in net.inner.state_dict().items())


def test_bytes_of_a_round_are_those_of_what_is_trained(tmp_path):
    net = Residual(8, 3, hidden=5)
    net.inner.requires_grad_(False)
    run = trainer(1)
    run.fit(FederatedModule(net, FedAvg()), datamodule=data(tmp_path / "cache"))
    trained = 5 + 8 * 5 + 5 + 5 * 3 + 3
    assert run.callback_metrics["train/bytes_up"] == 6 * 4 * trained
    assert run.callback_metrics["train/bytes_down"] == 6 * 4 * trained


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(FineTuning(), marks=pytest.mark.slow),
        pytest.param(Flow(router=router), marks=pytest.mark.slow),
        Flow(router=router, routing="hard"),
    ],
)
def test_a_model_with_frozen_parameters_is_served(method):
    torch.manual_seed(0)
    net = Residual()
    net.inner.weight.requires_grad_(False)
    method, batch = bound(method, net, torch.rand(1, FEATURES)), chunk((9,))
    groups = loop().personalize(method, server_groups(method), batch)
    x = batch.heldout.x[0]
    model = PersonalModel(method, groups)
    assert model.method.modules["global"].inner.weight.data_ptr() == net.inner.weight.data_ptr()
    for module in method.modules.values():
        module.eval()
    torch.testing.assert_close(model(x), method.personalized(groups, x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))


def test_partialfed_chooses_by_blocks():
    method = PartialFed().bind(Residual(), Classification(), ["stem", "inner"])
    strategy = method.start(server_groups(method))["strategy"]
    assert strategy["logits"].shape == (4, 2), "stem, inner, and by their names scale and head"


class Behind(Residual):
    """Its last layer is not its end."""

    def forward(self, x):
        return super().forward(x).log_softmax(-1)


@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)
def test_methods_that_need_the_head_alone_say_so(make):
    method = make().bind(Behind(), Classification(), ["stem", "head"]) if make is not FedBN else None
    if method is not None and method.needs == "head":
        with pytest.raises(ConfigurationError, match=rf"{make.__name__} computes outputs from features .*'head' "):
            check_fit(method, torch.rand(1, FEATURES), CLASSES)
    elif method is not None:
        check_fit(method, torch.rand(1, FEATURES), CLASSES)
    assert EvidenceFlow.needs == "head"


def test_served_by_the_server(tmp_path):
    net = Residual()

    class Bound:
        method = bound(FedAvg(), net, torch.rand(1, FEATURES))

    x = torch.randn(3, FEATURES)
    torch.testing.assert_close(ServerModel(Bound)(x), net(x))
