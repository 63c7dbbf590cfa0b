"""What becomes of BatchNorm layers, against plain torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg, FedBN
from flow_pl.models.normalization import ClientBatchNorm, FixedBatchNorm, converted, group_count, statistics_of
from flow_pl.module import FederatedModule
from tests.models.nets import ResNet


def drawn(layer):
    """With weights and statistics that are not those it begins with."""
    with torch.no_grad():
        for t in (*layer.parameters(), layer.running_mean, layer.running_var):
            t.copy_(torch.rand_like(t) + 0.5)
    return layer


def net():
    torch.manual_seed(0)
    made = ResNet(width=16)
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            drawn(layer)
    return made


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (8, 1), (16, 1), (31, 1), (32, 2), (48, 3), (50, 2), (64, 4), (512, 32), (2048, 32)],
)
def test_groups_have_16_channels_or_there_are_32_of_them(channels, groups):
    assert group_count(channels) == groups


@pytest.mark.parametrize("shape", [(5, 32), (5, 32, 7), (5, 32, 4, 3)])
def test_group_norm_keeps_the_affine_weights(shape):
    layer = drawn({2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](32, eps=0.1))
    x = torch.randn(shape)
    expected = F.group_norm(x, 2, layer.weight, layer.bias, 0.1)
    found = converted(layer, "group")
    assert type(found) is nn.GroupNorm
    torch.testing.assert_close(found(x), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 4, 3), (5, 6, 2, 2, 2)])
def test_frozen_statistics_are_those_of_evaluation_also_in_training(shape, affine):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = drawn(kind(6, affine=affine))
    found = converted(copy.deepcopy(layer), "frozen").train()
    x = torch.randn(shape)
    torch.testing.assert_close(found(x), layer.eval()(x))
    assert [name for name, _ in found.named_buffers()] == ["running_mean", "running_var"]


def test_a_whole_net_with_frozen_statistics_has_the_outputs_and_gradients_of_evaluation():
    plain, x = net().eval(), torch.randn(3, 1, 12, 12)
    found = converted(copy.deepcopy(plain), "frozen").train()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in found.modules())
    for model in (plain, found):
        model(x).square().sum().backward()
    torch.testing.assert_close(found(x), plain(x))
    grads = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in found.named_parameters():
        torch.testing.assert_close(p.grad, grads.pop(name), rtol=1e-3, atol=1e-4)
    assert not grads


def test_statistics_are_those_by_which_a_batch_of_the_real_instances_is_normalized():
    layer, x, mask = ClientBatchNorm(drawn(nn.BatchNorm2d(6))), torch.randn(7, 6, 4, 3), torch.arange(7) < 4
    x[4:] = 1e6
    mean, var = statistics_of(x, mask, (layer.running_mean, layer.running_var))
    expected = F.batch_norm(x[:4], None, None, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(layer.normalize(x, mean, var)[:4], expected, rtol=1e-4, atol=1e-5)
    none = statistics_of(x, torch.zeros(7, dtype=torch.bool), (layer.running_mean, layer.running_var))
    assert torch.equal(none[0], layer.running_mean)
    assert torch.equal(none[1], layer.running_var)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("backbone", "choice", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "group", "batch_norm is group, but Sequential has no BatchNorm layer"),
        (nn.Sequential(Activated(4)), "frozen", r"block '0' \(Activated\) of the backbone does more than"),
        (nn.Sequential(nn.LazyBatchNorm2d()), "group", r"'0' \(LazyBatchNorm2d\) .* has no shape yet"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), "frozen", "has no running statistics"),
        (nn.Sequential(nn.BatchNorm1d(4)), "layer", "batch_norm is layer, expected"),
    ],
)
def test_layers_that_cannot_be_converted(backbone, choice, message):
    with pytest.raises(ConfigurationError, match=message):
        converted(backbone, choice)


def test_without_a_choice_batch_norm_is_refused_with_all_three_of_them():
    message = r"block 'bn1' of the backbone is a BatchNorm2d .* model.batch_norm to group .* frozen .* or local .*FedBN"
    with pytest.raises(ConfigurationError, match=message):
        FederatedModule(net(), FedAvg())


def test_layers_of_the_client_need_a_method_that_keeps_them():
    message = "batch_norm is local, but clients of FedAvg do not keep .*'bn1'.* use FedBN"
    with pytest.raises(ConfigurationError, match=message):
        FederatedModule(net(), FedAvg(), batch_norm="local")
    with pytest.raises(ConfigurationError, match=r"FedBN keeps BatchNorm layers .* ResNet has 0 such layers"):
        FederatedModule(net(), FedBN(), batch_norm="frozen")
    kept = FederatedModule(net(), FedBN(), batch_norm="local").backbone
    assert isinstance(kept.layer2[0].downsample[1], ClientBatchNorm)
    assert isinstance(kept.bn1, FixedBatchNorm)
