"""Modules that are no Sequential, found wrong before training; and checkpoints of other blocks."""

import pytest
import torch
from torch import nn

from flow_pl.checks import check_backbone, check_fit
from flow_pl.engine.loop import FederatedLoop
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg, FedPer, Flow
from flow_pl.module import FederatedModule
from flow_pl.tasks import Classification
from tests.models.nets import Residual, ResNet
from tests.models.test_any_module import Odd
from tests.support import CLASSES, FEATURES
from tests.test_module import data, flow, trainer

X = torch.rand(1, FEATURES)


def checked(net, method=None, blocks=None):
    torch.manual_seed(0)
    method = (method or Flow()).bind(net, Classification(), blocks)
    check_fit(method, X, CLASSES)
    check_backbone(method, X, True)


def gru(net, x):
    return net.b(net.gru(x[:, None])[0][:, 0])


@pytest.mark.parametrize(
    ("net", "blocks", "message"),
    [
        (Odd(lambda m, x: m.b(m.a(m.a(x)))), None, r"block 'a' \(Linear\) of the backbone is called several times"),
        (
            Odd(lambda m, x: m.b(x)),
            None,
            r"block 'a' \(Linear\) of the backbone is never called in a forward",
        ),
        (
            Odd(lambda m, x: m.b(x)),
            ["b", "a"],
            "is never called in a forward pass, .* other submodules in model.blocks",
        ),
        (
            Odd(gru, gru=nn.GRU(6, 6, batch_first=True)),
            ["gru", "b"],
            r"block 'gru' \(GRU\) .* returns a tuple, not",
        ),
        (
            Odd(lambda m, x: (m.b(m.a(x)), 0)),
            None,
            "the backbone Odd returns something other than a tensor",
        ),
        (Odd(lambda m, x: {"logits": m.b(m.a(x))}), ["a"], "the backbone Odd returns something other than a tensor"),
    ],
)
def test_calls_are_looked_at_before_training(net, blocks, message):
    with pytest.raises(ConfigurationError, match=message):
        checked(net, blocks=blocks)


@pytest.mark.parametrize("method", [FedAvg(), FedPer()])
def test_methods_that_route_nothing_do_not_mind(method):
    checked(Odd(lambda m, x: m.b(m.a(m.a(x)))), method)


def test_the_representation_is_called_once():
    net = Odd(lambda m, x: m.b(m.a(x)) + m.b(x))
    with pytest.raises(ConfigurationError, match=r"block 'b' \(Linear\) .* the last of .* is called 2 times"):
        checked(net, Needs())


class Needs(FedAvg):
    """A method that needs features."""

    needs = "features"


def test_hooks_that_change_what_a_block_gives():
    net = Residual()
    net.stem.register_forward_hook(lambda module, args, output: None)
    checked(net)
    net.stem.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ConfigurationError, match=r"the mean of two equal copies .* a block has a forward hook"):
        checked(net)


def made(blocks, backbone=None, **settings):
    torch.manual_seed(0)
    backbone = Residual(8, 3) if backbone is None else backbone
    loop = FederatedLoop(1, None, 5, lambda p: torch.optim.SGD(p, lr=0.1))
    return FederatedModule(backbone, flow(), loop, blocks=blocks, **settings)


def test_a_checkpoint_of_other_blocks_is_refused(tmp_path):
    run = trainer(1)
    run.fit(made(["stem", "head"]), datamodule=data(tmp_path / "cache"))
    run.save_checkpoint(tmp_path / "a.ckpt")
    goes_on = trainer(2)
    goes_on.fit(made(["stem", "head"]), datamodule=data(tmp_path / "cache"), ckpt_path=tmp_path / "a.ckpt")
    assert goes_on.global_step == 2
    message = "the checkpoint was written with the blocks stem, head, this configuration has stem, inner, head"
    with pytest.raises(ConfigurationError, match=message):
        trainer(2).fit(made("auto"), datamodule=data(tmp_path / "cache"), ckpt_path=tmp_path / "a.ckpt")
    settings = {"backbone": Residual(8, 3), "method": flow(), "blocks": ["head", "stem"]}
    with pytest.raises(ConfigurationError, match="with the blocks stem, head, this configuration has head, stem"):
        FederatedModule.load_from_checkpoint(tmp_path / "a.ckpt", **settings)


def test_what_has_become_of_batch_norm_is_part_of_the_identity():
    blocks = ["layer1", "fc"]
    identity = made(blocks, ResNet(width=16), batch_norm="group").identity()
    assert identity == {"method": "Flow", "backbone": "ResNet", "blocks": "layer1, fc", "batch_norm": "group"}
    assert "blocks" not in FederatedModule(nn.Sequential(nn.Linear(2, 2)), FedAvg()).identity()
