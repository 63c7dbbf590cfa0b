"""Two copies of each block, mixed per instance before the non-linearity."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.errors import ConfigurationError
from flow_pl.methods.parts.regularizers import routing_regularizer
from flow_pl.models import EMNISTCNN, MLP, LogisticRegression, ResNet18
from flow_pl.models.routed import RoutedModel, one_hot_routes
from flow_pl.models.routers import InstanceRouter


def _two_copies(backbone):
    first = {name: p.detach() for name, p in backbone.named_parameters()}
    second = {name: p + 0.3 * torch.randn_like(p) for name, p in first.items()}
    return first, second


def any_blocks(number):
    return [nn.Linear(1, 1)] * number


def given(q):
    """A route of given probabilities [N, blocks, 2]."""
    return lambda block, inputs, on_global, on_local: q[:, block]


def test_mixture_is_taken_before_the_non_linearity():
    torch.manual_seed(0)
    model = RoutedModel(MLP(4, 3, (5,)))
    g, w = _two_copies(model.backbone)
    x = torch.randn(6, 4)
    q = torch.rand(6, 2, 1)
    q = torch.cat([q, 1 - q], -1)
    h = q[:, 0, :1] * F.linear(x, g["linear1.weight"], g["linear1.bias"])
    h = (h + q[:, 0, 1:] * F.linear(x, w["linear1.weight"], w["linear1.bias"])).relu()
    expected = q[:, 1, :1] * F.linear(h, g["head.weight"], g["head.bias"])
    expected = expected + q[:, 1, 1:] * F.linear(h, w["head.weight"], w["head.bias"])
    torch.testing.assert_close(model.routed(x, g, w, given(q))[0], expected)


def test_two_instances_of_a_batch_take_different_ways():
    """Hard routing: row 0 through both global blocks, row 1 through both local ones, row 2 crosses over."""
    torch.manual_seed(0)
    model = RoutedModel(EMNISTCNN(num_classes=4, in_shape=(1, 8, 8), dropout=(0.0, 0.0)))
    g, w = _two_copies(model.backbone)
    x = torch.randn(3, 1, 8, 8)
    local = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    q = torch.stack([1 - local, local], -1).float()
    out, decided = model.routed(x, g, w, given(q), hard=True)
    assert torch.equal(decided, q)
    mixed = {name: (w if name.startswith("conv") else g)[name] for name in g}
    for row, parameters in enumerate((g, w, mixed)):
        torch.testing.assert_close(out[row], model.plain(x, parameters)[row])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_hard_routing_ahead_computes_the_way_taken_and_no_other(share):
    """The same outputs, with as many rows through the blocks as there are instances."""
    model = RoutedModel(EMNISTCNN(4))
    g, w = _two_copies(model.backbone.eval())
    x = torch.randn(9, 1, 28, 28)
    local = (torch.rand(9, len(model.blocks), 1) < share).float()
    q = torch.cat([1 - local, local], -1)
    rows = []
    hooks = [block.register_forward_hook(lambda m, args, out: rows.append(len(out))) for block in _blocks(model)]
    expected, decided = model.routed(x, g, w, given(q), hard=True)
    assert sum(rows) == 2 * 9 * len(model.blocks)
    rows.clear()
    found, again = model.routed(x, g, w, given(q), hard=True, ahead=True)
    assert sum(rows) == 9 * len(model.blocks)
    torch.testing.assert_close(found, expected)
    assert torch.equal(decided, again)
    for hook in hooks:
        hook.remove()


def _blocks(model):
    return [getattr(model.backbone, name) for name in model.blocks]


def test_clients_side_by_side_are_routed_hard_ahead_too():
    model = RoutedModel(MLP(4, 3, (5,)))
    g, w = _two_copies(model.backbone)
    x, local = torch.randn(3, 6, 4), (torch.rand(3, 6, 2, 1) < 0.5).float()
    q = torch.cat([1 - local, local], -1)
    found = torch.vmap(lambda x, q: model.routed(x, g, w, given(q), hard=True, ahead=True)[0])(x, q)
    expected = torch.stack([model.routed(*pair[:1], g, w, given(pair[1]), hard=True)[0] for pair in zip(x, q)])  # noqa: B905
    torch.testing.assert_close(found, expected)


def test_hard_routes_are_the_larger_probability_and_global_on_ties():
    q = torch.tensor([[[0.4, 0.6], [0.5, 0.5], [0.9, 0.1]]])
    assert one_hot_routes(q)[0].tolist() == [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]


def test_regularizer_of_known_probabilities():
    """Two real instances, one block: -(log(0.25^2 + e) + log(1 + e)) / 2; the third is padding."""
    q = torch.tensor([[[0.75, 0.25]], [[0.0, 1.0]], [[1.0, 0.0]]])
    mask = torch.tensor([True, True, False])
    eps = 1e-6
    expected = -(math.log(0.0625 + eps) + math.log(1 + eps)) / 2
    assert routing_regularizer(q, mask, eps).item() == pytest.approx(expected, rel=1e-5)
    other_way = -(math.log(0.5625 + eps) + math.log(eps)) / 2
    assert routing_regularizer(q, mask, eps, "global").item() == pytest.approx(other_way, rel=1e-5)
    assert routing_regularizer(q, torch.zeros(3), eps) == 0


def test_embedding_tables_are_shared_and_not_routed():
    model = RoutedModel(nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 2)))
    assert model.blocks == ["2"]
    g, w = _two_copies(model.backbone)
    assert set(model.local_copy(w)) == {"2.weight", "2.bias"}
    x = torch.randint(10, (3, 2))
    all_local = torch.tensor([0.0, 1.0]).expand(3, 1, 2)
    expected = F.linear(F.embedding(x, g["0.weight"]).flatten(1), w["2.weight"], w["2.bias"])
    torch.testing.assert_close(model.routed(x, g, model.local_copy(w), given(all_local))[0], expected)
    torch.testing.assert_close(model.plain(x, g, model.local_copy(w)), expected)


@pytest.mark.parametrize(
    ("blocks", "hidden", "layers"),
    [(4, (350, 150, 50), [0, 1, 2, 2]), (6, (1000, 750, 350, 150, 50), [0, 1, 2, 3, 4, 4]), (1, (8, 6), [1])],
)
def test_router_has_an_early_exit_per_block(blocks, hidden, layers):
    router = InstanceRouter(any_blocks(blocks), hidden)
    q = router(torch.randn(5, 3, 4))
    assert q.shape == (5, blocks, 2)
    torch.testing.assert_close(q.sum(-1), torch.ones(5, blocks))
    assert [head.in_features for head in router.exits.heads] == [hidden[layer] for layer in layers]


def test_router_dropout_is_off_in_evaluation():
    router = InstanceRouter(any_blocks(2), (32,), dropout=0.5)
    x = torch.randn(4, 6)
    assert not torch.equal(router(x), router(x))
    router.eval()
    assert torch.equal(router(x), router(x))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "block '1' .* BatchNorm2d with running statistics"),
        (nn.Sequential(nn.Embedding(3, 2)), "no block with trainable parameters"),
    ],
)
def test_backbones_that_cannot_be_routed_are_refused(backbone, message):
    with pytest.raises(ConfigurationError, match=message):
        RoutedModel(backbone)


@pytest.mark.parametrize("settings", [{"hidden": ()}, {"hidden": (0,)}, {"dropout": 1.0}])
def test_router_settings_are_checked(settings):
    with pytest.raises(ConfigurationError, match="the router's"):
        InstanceRouter(any_blocks(2), **settings)


def test_published_parameter_count_of_the_cnn():
    assert sum(p.numel() for p in EMNISTCNN().parameters()) == 1_206_590


@pytest.mark.parametrize(("classes", "count"), [(10, 11_181_642), (100, 11_227_812)])
def test_resnet_has_the_published_size_and_six_routed_blocks(classes, count):
    backbone = ResNet18(classes)
    assert sum(p.numel() for p in backbone.parameters()) == count
    model = RoutedModel(backbone)
    assert model.blocks == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
    g = {name: p.detach() for name, p in backbone.named_parameters()}
    x = torch.randn(2, 3, 32, 32)
    half = torch.full((2, 6, 2), 0.5)
    torch.testing.assert_close(model.routed(x, g, g, given(half))[0], model.plain(x, g))


def test_resnet_refuses_groups_that_do_not_divide_its_width():
    with pytest.raises(ConfigurationError, match="groups is 7"):
        ResNet18(groups=7)


def test_backbones_take_shapes():
    assert LogisticRegression([2, 3], 4)(torch.zeros(5, 2, 3)).shape == (5, 4)
    assert MLP([2, 3], 4, (7, 6))(torch.zeros(5, 2, 3)).shape == (5, 4)
    assert EMNISTCNN(10, (3, 12, 14))(torch.zeros(5, 3, 12, 14)).shape == (5, 10)
