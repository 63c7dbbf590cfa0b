"""A router by pooled features: what it sees, that it moves nothing else, and who needs it."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.checks import check_fit
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.methods import Flow
from flow_pl.models import EMNISTCNN, NextWordLSTM
from flow_pl.models.feature_router import FeatureRouter
from flow_pl.models.fitting_router import fitting_router
from flow_pl.models.pooling import pooled, token_mask
from flow_pl.models.routed import RoutedModel
from flow_pl.models.routers import InstanceRouter, SequenceRouter
from flow_pl.tasks import Classification
from tests.support import CLASSES, chunk, flat, loop, select

TOKENS, T, PADDING = 9, 6, 0


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def sentences(padding_idx=PADDING):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(TOKENS, 4, padding_idx), nn.Linear(4, 5), nn.Tanh(), Mean(), nn.Linear(5, CLASSES)
    )


def ids(*shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(1, TOKENS, (*shape, T), generator=generator)
    lengths = torch.randint(1, T + 1, (*shape, 1), generator=generator)
    return x.masked_fill(torch.arange(T) >= lengths, PADDING)


def looked(backbone, x, **settings):
    model = RoutedModel(backbone)
    router = FeatureRouter([nn.Linear(1, 1)], **settings)
    parameters = {name: 2 * p.detach() for name, p in backbone.named_parameters()}
    return router.look(model, parameters, x), parameters


def test_it_sees_the_mean_of_the_real_tokens_under_the_given_parameters():
    backbone, x = sentences(), ids(3)
    found, weights = looked(backbone, x, submodule="1")
    for row in range(3):
        real = F.linear(weights["0.weight"][x[row][x[row] != PADDING]], weights["1.weight"], weights["1.bias"])
        torch.testing.assert_close(found[row], real.mean(0))
    torch.testing.assert_close(looked(sentences(None), x, submodule="1", padding=PADDING)[0], found)
    found, weights = looked(sentences(None), x, submodule="1")
    torch.testing.assert_close(found, F.linear(weights["0.weight"][x], weights["1.weight"], weights["1.bias"]).mean(1))


def test_it_sees_what_the_head_sees_where_no_submodule_is_named():
    backbone, x = sentences(), ids(3)
    found, weights = looked(backbone, x)
    expected = F.linear(weights["0.weight"][x], weights["1.weight"], weights["1.bias"]).tanh().mean(1)
    torch.testing.assert_close(found, expected)


def test_it_sees_the_mean_over_the_positions_of_an_image():
    torch.manual_seed(0)
    backbone, x = EMNISTCNN(4, (1, 8, 8)), torch.rand(2, 1, 8, 8)
    found, weights = looked(backbone, x, submodule="conv1")
    torch.testing.assert_close(found, F.conv2d(x, weights["conv1.weight"], weights["conv1.bias"]).mean((2, 3)))


def test_what_comes_behind_the_submodule_is_not_computed():
    backbone = sentences()
    backbone[4].register_forward_hook(lambda *args: pytest.fail("called"))
    found, _ = looked(backbone, ids(3), submodule="1")
    assert not found.requires_grad


def test_means_leave_padding_out():
    features = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert pooled(features, mask).tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert torch.equal(token_mask({"input_ids": mask, "attention_mask": mask}, None), mask.bool())
    assert token_mask({"input_ids": mask}, None) is None


def small(blocks):
    return FeatureRouter(blocks, "1", (4,), 0.0)


def batch(sizes):
    """Clients with sentences in place of the numbers of `chunk`."""
    made = chunk(sizes)
    return replace(made, train=replace(made.train, x=ids(*made.train.x.shape[:2])))


@pytest.mark.parametrize("route_by", ["instance", "client"])
def test_clients_side_by_side_train_as_each_alone(route_by):
    torch.manual_seed(1)
    method = Flow(router=small, route_by=route_by).bind(sentences(), Classification())
    check_fit(method, ids(1), CLASSES)
    server, clients = server_groups(method), batch((9, 6, 3))
    together = loop().train_clients(method, server, clients)
    for i in range(3):
        alone = loop().train_clients(method, server, select(clients, [i]))
        for group in ("global", "router"):
            found = {name: p[i : i + 1] for name, p in together.difference[group].items()}
            torch.testing.assert_close(flat(found), flat(alone.difference[group]), rtol=1e-4, atol=1e-6)


def test_the_routers_step_is_that_of_an_mlp_on_fixed_features():
    """Regularizer 0, one client: the router's update is written out by modules and autograd."""
    torch.manual_seed(1)
    method = Flow(router=small, regularization=0.0).bind(sentences(), Classification())
    check_fit(method, ids(1), CLASSES)
    backbone, router = copy.deepcopy(method.modules["global"]), copy.deepcopy(method.modules["router"])
    local = copy.deepcopy(backbone)
    with torch.no_grad():
        for p in local.parameters():
            p.add_(0.3)
    x, y = ids(5), torch.arange(5) % CLASSES
    features = pooled(backbone[1](backbone[0](x)), x != PADDING).detach()
    q = router(features)
    h = backbone[0](x)
    h = q[:, 0, :1, None] * backbone[1](h) + q[:, 0, 1:, None] * local[1](h)
    h = h.tanh().mean(1)
    outputs = q[:, 1, :1] * backbone[4](h) + q[:, 1, 1:] * local[4](h)
    expected = torch.autograd.grad(F.cross_entropy(outputs, y), list(router.parameters()))

    server = server_groups(method)
    psi = {name: p.clone().requires_grad_() for name, p in server["router"].items()}
    w_l = {name: p.detach() for name, p in local.named_parameters()}
    step = method.training()[-1].steps[0]
    assert step.moves == "router"
    minibatch = chunk((5,)).train  # any with five rows: x and y are replaced
    one = replace(minibatch, x=x, y=y, mask=torch.ones(5, dtype=torch.bool))
    loss = step.objective({"global": server["global"], "local": w_l, "router": psi}, one)
    torch.testing.assert_close(torch.autograd.grad(loss, list(psi.values())), expected)


def test_a_router_by_the_instance_refuses_token_ids():
    method = Flow(router=partial(InstanceRouter, hidden=(4,))).bind(sentences(), Classification())
    with pytest.raises(ConfigurationError, match=r"router is InstanceRouter.*use FeatureRouter"):
        check_fit(method, ids(1), CLASSES)


@pytest.mark.parametrize(
    ("submodule", "message"),
    [("11", "is '11', which is not a submodule of Sequential: .* '1'"), ("", "is '', which is not a submodule")],
)
def test_a_name_of_nothing_is_refused(submodule, message):
    with pytest.raises(ConfigurationError, match=f"the router's submodule {message}"):
        looked(sentences(), ids(1), submodule=submodule)


def test_a_submodule_that_is_not_called_is_refused():
    backbone = sentences()
    backbone[1].spare = nn.Linear(1, 1)
    with pytest.raises(ConfigurationError, match=r"'1\.spare' of Sequential is never called"):
        looked(backbone, ids(1), submodule="1.spare")


def test_the_fitting_router_looks_at_features_where_there_are_ids():
    def chosen(backbone):
        return type(fitting_router(RoutedModel(backbone).block_modules("a test"), backbone))

    assert chosen(sentences()) is FeatureRouter
    assert chosen(NextWordLSTM(TOKENS, 3, 4, 3)) is SequenceRouter
    assert chosen(EMNISTCNN(4)) is InstanceRouter
    method = Flow().bind(sentences(), Classification())
    assert isinstance(method.modules["router"], FeatureRouter)
