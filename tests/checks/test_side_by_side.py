"""What clients side by side cannot have is refused by the block's name, and served one at a time."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flow_pl.checks import check_backbone, check_fit
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg
from flow_pl.models.recurrent import has_client_axis
from flow_pl.tasks import Classification
from tests.checks.blocks import CLASSES, FEATURES, Block, between, first, on_images, on_sequences

VECTOR, IMAGE, SEQUENCE = torch.rand(1, FEATURES), torch.rand(1, 3, 8, 8), torch.rand(1, 5, FEATURES)
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])
OTHER, LSTM = "use another layer", "use flow_pl.models.LSTM, which supports many clients"


def bound(backbone, example):
    torch.manual_seed(0)
    method = FedAvg().bind(backbone, Classification())
    check_fit(method, example, CLASSES)
    return method


@pytest.mark.parametrize(
    ("backbone", "example", "name", "other"),
    [
        (on_sequences(first(nn.GRU(FEATURES, 4, batch_first=True))), SEQUENCE, "'0.layer' (GRU)", LSTM),
        (on_sequences(first(nn.LSTM(FEATURES, 4, batch_first=True))), SEQUENCE, "'0.layer' (LSTM)", LSTM),
        (on_sequences(first(nn.RNN(FEATURES, 4, batch_first=True))), SEQUENCE, "'0.layer' (RNN)", LSTM),
        (between(first(nn.LSTMCell(8, 8))), VECTOR, "'1.layer' (LSTMCell)", LSTM),
        (on_images(nn.CrossMapLRN2d(3)), IMAGE, "'1' (CrossMapLRN2d)", OTHER),
        (between(nn.RReLU(0.1, 0.1)), VECTOR, "'1' (RReLU)", OTHER),
        (between(Block(lambda block, x: x if x.abs().sum() > 0 else -x)), VECTOR, "'1' (Block)", OTHER),
        (between(Block(lambda block, x: x * float(x.abs().sum() > 0))), VECTOR, "'1' (Block)", OTHER),
        (between(Block(lambda block, x: torch.zeros(x.shape).add_(x))), VECTOR, "'1' (Block)", OTHER),
        (
            between(Block(lambda block, x: checkpoint(block.layer, x, use_reentrant=False), layer=nn.Linear(8, 8))),
            VECTOR,
            # before torch 2.13 what fails is the saving of inputs, in the block itself
            ("'1.layer' (Linear)", "'1' (Block)"),
            OTHER,
        ),
    ],
)
def test_what_cannot_be_run_side_by_side(backbone, example, name, other):
    method = bound(backbone, example)
    check_backbone(method, example, side_by_side=False)
    with pytest.raises(ConfigurationError) as error:
        check_backbone(method, example, side_by_side=True)
    message = str(error.value)
    names = (name,) if isinstance(name, str) else name
    refused = "of the backbone cannot be run for several clients side by side ("
    assert message.startswith(tuple(f"block {name} {refused}" for name in names))
    assert message.endswith(f"): set data.chunk_size to 1, or {other}.")


@pytest.mark.parametrize("layer", [nn.Embedding(9, 4, sparse=True), nn.EmbeddingBag(9, 4, sparse=True)])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_sparse_gradients(layer, side_by_side):
    with pytest.raises(ConfigurationError) as error:
        check_backbone(bound(on_sequences(layer), TOKENS), TOKENS, side_by_side)
    assert str(error.value) == (
        f"block '0' ({type(layer).__name__}) of the backbone has sparse gradients, which the clients' optimizers do "
        "not accept: set sparse=False."
    )


def test_gradients_that_are_wrong_beside_others():
    """Gradients that a batching rule leaves out, as torch's does those of an embedding's padding row."""

    def scaled(block, x):
        return x * (block.scale.detach() if has_client_axis(x) else block.scale)

    scale = Block(scaled, scale=nn.Parameter(torch.ones(8)))
    method = bound(between(nn.Sequential(nn.ReLU(), scale)), VECTOR)
    check_backbone(method, VECTOR, side_by_side=False)
    with pytest.raises(ConfigurationError) as error:
        check_backbone(method, VECTOR, side_by_side=True)
    assert str(error.value) == (
        "block '1.1' (Block) of the backbone has different gradients of 'scale' beside other clients than alone: set "
        "data.chunk_size to 1, or use another layer."
    )


def test_outputs_that_are_wrong_beside_others():
    """In evaluation alone: outputs that depend on whether vmap is at work."""
    block = Block(lambda block, x: x + 1 if has_client_axis(x) and not block.training else x)
    with pytest.raises(ConfigurationError) as error:
        check_backbone(bound(between(block), VECTOR), VECTOR, side_by_side=True)
    assert str(error.value) == (
        "the backbone Sequential has different outputs for a client beside others than alone, in evaluation: set "
        "data.chunk_size to 1, or use other layers."
    )


def test_what_has_no_gradient():
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no gradient")

    with pytest.raises(ConfigurationError) as error:
        check_backbone(bound(between(Block(lambda block, x: Refuses.apply(x))), VECTOR), VECTOR, side_by_side=False)
    assert str(error.value) == (
        "the backbone Sequential cannot be trained (no gradient): make its outputs differentiable by using torch "
        "operations."
    )
