"""The vision transformer against torch's own layers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.errors import ConfigurationError
from flow_pl.models import VisionTransformer
from flow_pl.models.routed import RoutedModel
from flow_pl.models.vit import EncoderLayer, Patches, positions


def test_an_encoder_layer_is_torchs_with_the_same_weights():
    torch.manual_seed(0)
    ours = EncoderLayer(8, 2, 12, dropout=0.1).eval()
    theirs = nn.TransformerEncoderLayer(8, 2, 12, 0.1, "gelu", batch_first=True, norm_first=True).eval()
    names = {
        "query_key_value.weight": "self_attn.in_proj_weight",
        "query_key_value.bias": "self_attn.in_proj_bias",
        "projection.weight": "self_attn.out_proj.weight",
        "projection.bias": "self_attn.out_proj.bias",
    }
    weights = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    ours.load_state_dict(weights)
    theirs.load_state_dict({names.get(name, name): p for name, p in weights.items()})
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("channels", [None, 2])
def test_patches_are_those_of_a_convolution(channels):
    torch.manual_seed(0)
    patches = Patches(channels, 3, 8)
    x = torch.randn(2, 2, 6, 9)
    found = patches(x)
    weight = patches.linear.weight.view(8, 2, 3, 3)
    expected = F.conv2d(x, weight, patches.linear.bias, stride=3).flatten(2).mT + positions(2, 3, 8)
    torch.testing.assert_close(found, expected)


def test_positions_are_sines_and_cosines_of_row_and_column():
    found = positions(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = [f(at * rate) for at in (row, column) for f in (math.sin, math.cos) for rate in (1, 1e-4)]
            torch.testing.assert_close(found[3 * row + column], torch.tensor(expected))


def test_sizes_and_blocks():
    model = VisionTransformer(10, 3)
    assert sum(p.numel() for p in model.parameters()) == 137_674
    assert RoutedModel(model).blocks == ["patches", "layer1", "layer2", "layer3", "layer4", "head"]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert model(torch.rand(2, 3, 28, 28)).shape == (2, 10)


def test_a_picture_without_an_axis_of_channels_has_one():
    model = VisionTransformer(10, 1)
    x = torch.rand(2, 28, 28)
    assert torch.equal(model(x), model(x.unsqueeze(1)))


@pytest.mark.parametrize("shape", [(3, 30, 32), (3, 32, 30), (30, 32), (32,)])
def test_pictures_that_are_not_cut_into_patches_are_refused(shape):
    with pytest.raises(ConfigurationError, match="patch_size 4"):
        VisionTransformer(10, 3)(torch.rand(2, *shape))


@pytest.mark.parametrize("settings", [{"width": 62}, {"width": 64, "heads": 3}, {"depth": 0}])
def test_sizes_that_do_not_fit_are_refused(settings):
    with pytest.raises(ConfigurationError, match="expected"):
        VisionTransformer(10, 3, **settings)
