import inspect

import pytest
import torch
from torch import nn

from flow_pl import methods
from flow_pl.checks import check_fit
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg, HypCluster, Method
from flow_pl.models import EMNISTCNN, MLP, LogisticRegression, ResNet18, VisionTransformer
from flow_pl.tasks import Classification

IMAGE, VECTOR = torch.rand(1, 2, 12, 10), torch.rand(1, 7)


def sizes(module):
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}


@pytest.mark.parametrize(
    ("backbone", "explicit", "example"),
    [
        (lambda: MLP(), lambda: MLP(7, 5), VECTOR),
        (lambda: MLP(hidden=[]), lambda: MLP(7, 5, []), VECTOR),
        (lambda: MLP(hidden=[3, 4]), lambda: MLP([2, 12, 10], 5, [3, 4]), IMAGE),
        (lambda: MLP(in_features=7), lambda: MLP(7, 5), VECTOR),
        (lambda: MLP(num_classes=5), lambda: MLP(7, 5), VECTOR),
        (lambda: LogisticRegression(), lambda: LogisticRegression(7, 5), VECTOR),
        (lambda: EMNISTCNN(None, None), lambda: EMNISTCNN(5, (2, 12, 10)), IMAGE),
        (lambda: ResNet18(None, None, groups=2), lambda: ResNet18(5, 2, groups=2), IMAGE),
        (
            lambda: VisionTransformer(patch_size=2, depth=1),
            lambda: VisionTransformer(5, 2, patch_size=2, depth=1),
            IMAGE,
        ),
    ],
)
def test_sizes_that_are_left_out_are_those_of_the_data(backbone, explicit, example):
    backbone, explicit = backbone(), explicit()
    method = FedAvg().bind(backbone, Classification())
    check_fit(method, example, 5, ())
    assert sizes(backbone) == sizes(explicit)
    assert [type(module) for module in backbone.modules()] == [
        type(backbone),
        *[type(m) for m in explicit.modules()][1:],
    ]
    assert [repr(module) for module in backbone] == [repr(module) for module in explicit]


def test_initial_weights_follow_from_the_seed_alone():
    def weights():
        torch.manual_seed(3)
        backbone = MLP(hidden=[4])
        method = FedAvg().bind(backbone, Classification())
        torch.rand(9)  # whatever is drawn in between
        check_fit(method, VECTOR, 5, ())
        return backbone.state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def every_method():
    names = [name for name, cls in vars(methods).items() if inspect.isclass(cls) and issubclass(cls, Method)]
    return [n for n in names if not inspect.isabstract(getattr(methods, n)) and n != "FedBN"]  # asks for BatchNorm


@pytest.mark.parametrize("name", every_method())
def test_w_g_starts_alike_under_every_method(name):
    """Or a comparison would be one of initial weights, too."""

    def weights(method):
        torch.manual_seed(3)
        backbone = MLP(hidden=[4])
        check_fit(method.bind(backbone, Classification()), VECTOR, 5, ())
        return backbone.state_dict()

    expected = weights(FedAvg())
    assert all(torch.equal(p, expected[key]) for key, p in weights(getattr(methods, name)()).items())


def test_every_model_of_a_method_gets_its_sizes():
    method = HypCluster(clusters=3).bind(MLP(hidden=[4]), Classification())
    check_fit(method, VECTOR, 5, ())
    assert len({tuple(sizes(module).items()) for module in method.modules.values()}) == 1


def test_a_checkpoint_gives_the_sizes():
    backbone = MLP(hidden=[4])
    backbone.load_state_dict(MLP(7, 5, [4]).state_dict())
    assert backbone(VECTOR).shape == (1, 5)
    assert type(backbone.head) is nn.Linear


def test_without_data_the_number_of_classes_is_asked_for():
    with pytest.raises(RuntimeError, match="the number of classes is not known yet: give the backbone num_classes"):
        MLP()(VECTOR)


@pytest.mark.parametrize(
    ("example", "backbone", "message"),
    [
        (
            torch.ones(1, 7, dtype=torch.int64),
            MLP(7, 5),
            "MLP takes numbers, the data has tokens .*data.tokens to false",
        ),
        (torch.ones(1, 7), nn.Sequential(nn.Embedding(9, 5), nn.Flatten()), "takes tokens, the data has numbers"),
        (torch.ones(1, 28, 28, 3), EMNISTCNN(5, (3, 28, 28)), r"channels first.* last: permute them to \[3, 28, 28\]"),
        (torch.ones(1, 6), MLP(7, 5), "give MLP the features' shape, or the data module the shape that MLP expects"),
    ],
)
def test_features_that_a_backbone_cannot_take(example, backbone, message):
    blocks = backbone if not isinstance(backbone[0], nn.Embedding) else nn.Sequential(*backbone, nn.Linear(35, 5))
    method = FedAvg().bind(blocks, Classification())
    with pytest.raises(ConfigurationError, match=message):
        check_fit(method, example, 5, ())
