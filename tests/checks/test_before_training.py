"""The checks of backbones in a fit: nothing is trained before them, and what they let through trains right."""

import copy

import lightning
import pytest
import torch
from torch import nn

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.data import DigitsData
from flow_pl.errors import ConfigurationError
from flow_pl.methods import Ditto, FedAvg, FineTuning, Flow, HypCluster, Interpolation, KNNPer, PerFedAvg
from tests.checks.blocks import Block, first, running_mean, shift_in_place


def fit(backbone, method=None, chunk_size=4):
    torch.manual_seed(1)
    loop = FederatedLoop(1, batch_size=10, client_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module = FederatedModule(copy.deepcopy(backbone), method or FedAvg(), loop)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, inference_mode=False, use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=DigitsData(num_clients=8, cohort_size=4, chunk_size=chunk_size))
    return {name: p.detach() for name, p in module.backbone.named_parameters()}


def digits(*blocks, width=64):
    torch.manual_seed(0)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width, 10))


@pytest.mark.parametrize(
    "method", [FedAvg(), FineTuning(), Flow(), PerFedAvg(), Interpolation(), Ditto(), KNNPer(), HypCluster()]
)
def test_data_changed_in_place_are_refused_for_every_method(method):
    with pytest.raises(ConfigurationError, match=r"^block '0' \(Block\) of the backbone changes the data in place"):
        fit(digits(Block(shift_in_place)), method)


def test_a_recurrent_layer_of_torch_trains_one_client_at_a_time():
    backbone = digits(nn.Flatten(), nn.Unflatten(1, (8, 8)), first(nn.GRU(8, 4, batch_first=True)), width=32)
    with pytest.raises(ConfigurationError, match=r"^block '2.layer' \(GRU\) .* set data.chunk_size to 1, or"):
        fit(backbone)
    moved = fit(backbone, chunk_size=1)
    assert not torch.equal(moved["2.layer.weight_hh_l0"], backbone[2].layer.weight_hh_l0)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_buffers_written_are_refused_side_by_side_and_alone(chunk_size):
    block = Block(running_mean, mean=torch.zeros(64))
    with pytest.raises(ConfigurationError, match=r"^block '1' \(Block\) of the backbone writes its buffer 'mean' "):
        fit(digits(nn.Flatten(), block), chunk_size=chunk_size)


@pytest.mark.parametrize("method", [FedAvg(), pytest.param(Flow(), marks=pytest.mark.slow)])
def test_activations_in_place_train_as_others_do(method):
    def backbone(inplace):
        torch.manual_seed(0)
        activation = nn.ReLU(inplace), nn.Dropout(0.3, inplace)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), activation[1], activation[0], nn.Linear(8, 10))

    for chunk_size in (1, 4):
        in_place, other = (fit(backbone(inplace), method, chunk_size) for inplace in (True, False))
        for name, value in other.items():
            torch.testing.assert_close(in_place[name], value)
