"""What a backbone must not do is refused before training, by the block's name; all else is let through unchanged."""

import copy

import pytest
import torch
from torch import nn

from flow_pl.checks import check_backbone, check_fit
from flow_pl.checks.backbone import instances
from flow_pl.engine.draw_check import check_draws
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg, Flow
from flow_pl.models import EMNISTCNN, LSTM, MLP, Dropout, LogisticRegression, NextCharacterLSTM, NextWordLSTM, ResNet18
from flow_pl.tasks import Classification, NextToken
from tests.checks.blocks import (
    CLASSES,
    FEATURES,
    Block,
    between,
    clamps_its_weights,
    first,
    on_images,
    on_sequences,
    remembers,
    running_mean,
    running_mean_in_place,
    shift_in_place,
)

VECTOR, IMAGE, SEQUENCE = torch.rand(1, FEATURES), torch.rand(1, 3, 8, 8), torch.rand(1, 5, FEATURES)
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


def checked(backbone, example, method=None, objective=None, classes=CLASSES, side_by_side=True):
    torch.manual_seed(0)
    bound = (method or FedAvg()).bind(backbone, objective or Classification())
    check_fit(bound, example, classes)
    check_draws(bound, example)
    check_backbone(bound, example, side_by_side)
    return bound


def refused(backbone, example, **settings):
    with pytest.raises(ConfigurationError) as error:
        checked(backbone, example, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        (nn.Sequential(Block(shift_in_place), nn.Linear(FEATURES, CLASSES)), "'0' (Block)"),
        (nn.Sequential(Block(lambda block, x: x.data.sub_(0.5)), nn.Linear(FEATURES, CLASSES)), "'0' (Block)"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(FEATURES, CLASSES)), "'0' (ReLU)"),
        (nn.Sequential(Dropout(0.2), nn.ReLU(inplace=True), nn.Linear(FEATURES, CLASSES)), "'1' (ReLU)"),
        (nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(FEATURES, CLASSES)), "'0' (Dropout)"),
        (nn.Sequential(nn.Flatten(), nn.Sequential(nn.ELU(inplace=True), nn.Linear(FEATURES, CLASSES))), "'1.0' (ELU)"),
    ],
)
def test_data_changed_in_place(backbone, name):
    assert refused(backbone, VECTOR) == (
        f"block {name} of the backbone changes the data in place, which other models and steps read too: create a "
        "new tensor (x = x - 1, not x -= 1), or set inplace=False."
    )


def test_input_of_a_routed_block_changed_in_place():
    backbone = between(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))
    checked(copy.deepcopy(backbone), VECTOR)  # with one model alone, nobody else reads it
    assert refused(backbone, VECTOR, method=Flow()) == (
        "block '1.0' (ReLU) of the backbone changes the input of block '1' in place, which the block's other copy and "
        "the router of Flow read too: create a new tensor (x = x - 1, not x -= 1), or set inplace=False."
    )


def test_output_that_its_gradient_needs_changed_in_place():
    message = refused(between(nn.Tanh(), nn.ReLU(inplace=True)), VECTOR)
    assert message.startswith("block '2' (ReLU) of the backbone cannot be trained (one of the variables needed")
    assert message.endswith(
        "let '2' change nothing in place (inplace=False), or make its outputs differentiable by using torch operations."
    )


@pytest.mark.parametrize(
    ("backbone", "example", "name", "buffer"),
    [
        (between(Block(running_mean, mean=torch.zeros(8))), VECTOR, "'1' (Block)", "mean"),
        (
            between(nn.Sequential(nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))),
            VECTOR,
            "'1.1.parametrizations.weight.0' (_SpectralNorm)",
            "_u",
        ),
        (between(nn.utils.spectral_norm(nn.Linear(8, 8))), VECTOR, "'1' (Linear)", "weight_u"),
    ],
)
def test_buffers_written(backbone, example, name, buffer):
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    assert refused(backbone, example) == (
        f"block {name} of the backbone writes its buffer '{buffer}' when it is called in training; a client's "
        "values there would leak to the next one and cannot be averaged: use a layer without state (nn.GroupNorm "
        "or nn.LayerNorm instead of running statistics)."
    )
    assert all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())


def test_buffers_written_in_evaluation_too():
    backbone = between(Block(running_mean_in_place, mean=torch.zeros(8)))
    bound = FedAvg().bind(backbone, Classification())
    with pytest.raises(ConfigurationError, match=r"^block '1' \(Block\) .* writes its buffer 'mean' .* in evaluation;"):
        check_backbone(bound, VECTOR, True)
    assert not backbone[1].mean.any()


def test_buffers_that_no_call_writes():
    block = Block(lambda block, x: x - block.mean, mean=torch.ones(8), unused=torch.tensor([float("nan")]))
    checked(between(block), VECTOR)


@pytest.mark.parametrize(
    ("backbone", "example", "name", "parameter"),
    [
        (on_sequences(nn.Embedding(9, 4, max_norm=0.5)), TOKENS, "'0' (Embedding)", "weight"),
        (on_sequences(nn.EmbeddingBag(9, 4, max_norm=9.0)), TOKENS, "'0' (EmbeddingBag)", "weight"),
    ],
)
def test_parameters_written(backbone, example, name, parameter):
    assert refused(backbone, example) == (
        f"block {name} of the backbone writes its parameter '{parameter}' when it is called in evaluation, which "
        "only the client's optimizer may do: remove the cause (max_norm of an embedding, for instance)."
    )


def test_parameters_written_behind_the_back_of_autograd():
    bound = FedAvg().bind(between(Block(clamps_its_weights, layer=nn.Linear(8, 8))), Classification())
    with pytest.raises(ConfigurationError, match=r"^block '1.layer' \(Linear\) .* writes its parameter 'weight' when"):
        check_backbone(bound, VECTOR, False)


def test_state_from_call_to_call():
    assert refused(between(Block(remembers, last=0.0)), VECTOR) == (
        "the backbone Sequential has different outputs when it is called again in evaluation: it keeps state "
        "between calls, which would leak from client to client. Make every call start without state."
    )


MIXES = "compute each instance's outputs from it alone (nn.GroupNorm or nn.LayerNorm in place of batch statistics)"


@pytest.mark.parametrize(
    ("backbone", "example", "name", "remedy"),
    [
        (on_images(nn.BatchNorm2d(4, track_running_stats=False)), IMAGE, "'1' (BatchNorm2d)", MIXES),
        (between(Block(lambda block, x: x - x.mean(0))), VECTOR, "'1' (Block)", MIXES),
        (between(nn.Sequential(nn.ReLU(), nn.Softmax(0))), VECTOR, "'1.1' (Softmax)", MIXES),
        (between(Block(lambda block, x: x.roll(1, 0))), VECTOR, "'1' (Block)", MIXES),
        (between(Block(lambda block, x: x / x.norm())), VECTOR, "'1' (Block)", MIXES),
        (on_sequences(first(nn.GRU(FEATURES, 4))), SEQUENCE, "'0.layer' (GRU)", "set batch_first=True"),
        (
            on_sequences(nn.TransformerEncoderLayer(FEATURES, 2, 8)),
            SEQUENCE,
            "'0.self_attn' (MultiheadAttention)",
            "set batch_first=True",
        ),
    ],
)
def test_instances_mixed(backbone, example, name, remedy):
    assert refused(backbone, example) == (
        f"block {name} of the backbone mixes instances: in evaluation, one alone has other outputs than among others, "
        f"so results would depend on the rest of a minibatch: {remedy}."
    )


@pytest.mark.parametrize("size", [4, 8, 16])
def test_instances_mixed_where_there_are_many(size):
    """Those of a window, each of which is alone where there are fewer."""

    def windows(block, x):
        return torch.cat([x[:size] - x[:size].mean(0) if len(x) >= size else x[:size], x[size:]])

    assert refused(between(Block(windows)), VECTOR) == (
        "block '1' (Block) of the backbone mixes instances: in training, one among 17 has other outputs than among "
        f"3, so results would depend on the rest of a minibatch: {MIXES}."
    )


def test_instances_mixed_in_training_alone():
    backbone = between(Block(lambda block, x: x - x.mean(0) if block.training else x))
    assert "block '1' (Block) of the backbone mixes instances: in training, one alone" in refused(backbone, VECTOR)


def test_instances_mixed_behind_a_head_of_zeros():
    backbone = between(Block(lambda block, x: x - x.mean(0)))
    nn.init.zeros_(backbone[-1].weight)
    assert refused(backbone, VECTOR).startswith("block '1' (Block) of the backbone mixes instances")


def test_one_instance_alone_is_too_few():
    assert refused(between(nn.BatchNorm1d(8, track_running_stats=False)), VECTOR) == (
        "block '1' (BatchNorm1d) of the backbone mixes instances: it accepts several, but not one alone (Expected "
        "more than "
        f"1 value per channel when training, got input size torch.Size([1, 8])): {MIXES}."
    )


def test_several_instances_are_too_many():
    message = refused(between(Block(lambda block, x: x.view(1, 8))), VECTOR)
    assert message == (
        "block '1' (Block) of the backbone cannot take 3 instances at once in evaluation (shape '[1, 8]' is invalid "
        "for input of size 24): make it accept any number of them along the first axis."
    )


@pytest.mark.parametrize("last", [False, True])
def test_blocks_that_give_a_tuple(last):
    lstm = nn.LSTM(FEATURES, 4, batch_first=True)
    assert refused(nn.Sequential(lstm) if last else on_sequences(lstm), SEQUENCE) == (
        "block '0' (LSTM) of the backbone returns something other than a tensor (recurrent layers and attention "
        "return a tuple), expected one tensor for the next block: wrap it in a module whose forward returns only "
        "the outputs."
    )


@pytest.mark.parametrize("method", [FedAvg, Flow])
@pytest.mark.parametrize(
    ("backbone", "example", "classes"),
    [
        (MLP(), VECTOR, CLASSES),
        (LogisticRegression(), VECTOR, CLASSES),
        (EMNISTCNN(None, None), IMAGE, CLASSES),
        (ResNet18(None, None, groups=2), IMAGE, CLASSES),
        (NextWordLSTM(9, 4, 5, 4), TOKENS, 9),
        (NextCharacterLSTM(9, 4, 5), TOKENS, 9),
        (on_sequences(nn.Embedding(9, 4, padding_idx=0), LSTM(4, 3)), TOKENS, CLASSES),
        (on_sequences(nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True)), SEQUENCE, CLASSES),
        (
            on_sequences(nn.TransformerEncoder(nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True), 1)),
            SEQUENCE,
            CLASSES,
        ),
        (on_images(nn.InstanceNorm2d(4, affine=True), nn.Dropout2d(0.2, True), nn.ReLU(True)), IMAGE, CLASSES),
        (between(nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True), nn.LazyLinear(8)), VECTOR, CLASSES),
        (between(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.PReLU()), VECTOR, CLASSES),
        (between(nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), nn.AlphaDropout(0.2)), VECTOR, CLASSES),
    ],
)
def test_what_is_served(backbone, example, classes, method):
    objective = NextToken() if classes == 9 else Classification()
    backbone = copy.deepcopy(backbone)
    backbone.train()
    before = torch.get_rng_state(), example.clone()
    bound = method().bind(backbone, objective)
    check_fit(bound, example, classes)
    check_draws(bound, example)
    weights, state = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    check_backbone(bound, example, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(example, before[1])
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    "example",
    [
        torch.rand(1, 2, 3) * 9 - 4,
        torch.zeros(1, 4),
        torch.full((1, 2), float("inf")),
        torch.rand(1, 3, dtype=torch.float64),
        TOKENS,
        torch.full((1, 4), 7),
        torch.tensor([5]),
        torch.zeros(1, 2, dtype=torch.uint8),
    ],
)
def test_instances_are_like_the_example(example):
    made = instances(example)
    assert made.shape == (3, *example.shape[1:])
    assert made.dtype == example.dtype
    if example.is_floating_point():
        assert made.isfinite().all()
        assert not torch.equal(made[0], made[1])
    else:
        assert set(made.flatten().tolist()) <= {0, *example.flatten().tolist()}
    if example.any():
        assert not torch.equal(made[0], made[2])
