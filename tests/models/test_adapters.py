"""Adapters are trained, averaged, copied and routed; the backbone around which they sit is one, and stays."""

import copy

import lightning
import pytest
import torch
from torch import nn

from flow_pl import FederatedModule
from flow_pl.checks import check_backbone, check_fit
from flow_pl.engine.client_groups import ClientGroups
from flow_pl.engine.draw_check import check_draws
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.export import export_model
from flow_pl.methods import FedAvg, FineTuning, Flow
from flow_pl.methods.flow_evidence import EvidenceFlow
from flow_pl.models import LoRA, TextEncoder, VisionTransformer
from flow_pl.models.routed import RoutedModel
from flow_pl.models.routers import InstanceRouter
from flow_pl.serving import personalize
from flow_pl.tasks import Classification
from tests.support import CLASSES, FEATURES, bound, chunk, flat, loop, minilm, network, select, train_alone
from tests.test_module import data, trainer

peft = pytest.importorskip("peft", reason="peft is not installed")

R, ALPHA = 2, 6.0


def adapted(dropout=0.0, train=("3",)):
    """`tests.support.network` with adapters that are no longer zero: of its first layer, and of the last if frozen."""
    model = LoRA(network(), R, ALPHA, dropout=dropout, train=train)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    return model


def routed(**settings):
    return Flow(router=lambda blocks: InstanceRouter(blocks, (4,), settings.get("dropout", 0.0)))


def test_outputs_are_those_of_the_formula():
    model, x = adapted(train=()), torch.randn(4, FEATURES)
    w = dict(model.named_parameters())

    def layer(i, h):
        at = f"backbone.{i}"
        low = h @ w[f"{at}.lora_A.default.weight"].T @ w[f"{at}.lora_B.default.weight"].T
        return h @ w[f"{at}.base_layer.weight"].T + w[f"{at}.base_layer.bias"] + ALPHA / R * low

    torch.testing.assert_close(model(x), layer(3, layer(0, x).tanh()))


def test_a_client_alone_trains_as_a_plain_loop_with_peft_does():
    method, clients = bound(FedAvg(), adapted()), chunk((9,))
    plain = peft.inject_adapter_in_model(peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]), network())
    plain[3].requires_grad_(True)
    plain.load_state_dict({k.removeprefix("backbone."): p for k, p in method.modules["global"].state_dict().items()})
    frozen = copy.deepcopy(plain.state_dict())
    before = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
    update = loop().train_clients(method, server_groups(method), clients)
    after = dict(train_alone(plain, clients, 0, 2, 4).named_parameters())
    assert sorted(before) == ["0.lora_A.default.weight", "0.lora_B.default.weight", "3.bias", "3.weight"]
    for name, p in before.items():
        found = update.difference["global"][f"backbone.{name}"][0]
        torch.testing.assert_close(found, (after[name] - p).detach(), rtol=1e-4, atol=1e-6)
    for name, p in method.modules["global"].state_dict().items():  # the server's has not moved
        torch.testing.assert_close(p, frozen[name.removeprefix("backbone.")])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_clients_side_by_side_train_as_each_alone(dropout):
    """A local copy born from the adapters, routed; and dropout drawn for each client by itself."""
    method, clients = bound(routed(), adapted(dropout)), chunk((9, 6, 3))
    server = server_groups(method)
    together = loop().train_clients(method, server, clients)
    for i in range(3):
        alone = loop().train_clients(method, server, select(clients, [i]))
        for group in ("global", "router"):
            found = {name: p[i : i + 1] for name, p in together.difference[group].items()}
            torch.testing.assert_close(flat(found), flat(alone.difference[group]), rtol=1e-4, atol=1e-6)


def test_only_adapters_are_copied_for_clients():
    """Bytes of a client: two copies of the adapters and the head (w_g and w_l), and the router."""
    method, clients = bound(routed(), adapted()), chunk((9, 6, 3))
    groups, _ = loop().run(method, server_groups(method), clients, True)
    assert isinstance(groups, ClientGroups)
    sizes = {name: sum(p[0].numel() for p in groups.groups[name].values()) for name in groups.stacked}
    small = R * FEATURES + 5 * R + 5 * CLASSES + CLASSES
    router = sum(p.numel() for p in method.modules["router"].parameters())
    assert sizes == {"global": small, "local": small, "router": router}


def test_only_adapters_are_sent(tmp_path):
    lightning.seed_everything(0, verbose=False)
    model = LoRA(nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 3)), R, train=["2"])
    module = FederatedModule(model, FineTuning(), loop())
    frozen = model.backbone[0].base_layer.weight.clone()
    run = trainer(1)
    run.fit(module, datamodule=data(tmp_path))
    assert run.callback_metrics["train/bytes_up"] == 6 * 4 * (R * 8 + 50 * R + 50 * 3 + 3)
    assert torch.equal(model.backbone[0].base_layer.weight, frozen)


def test_blocks_are_those_of_the_backbone():
    vit = LoRA(VisionTransformer(3, 1, depth=2, width=8, heads=2))
    assert RoutedModel(vit).blocks == ["backbone.patches", "backbone.layer1", "backbone.layer2", "backbone.head"]
    some = LoRA(VisionTransformer(3, 1, depth=2, width=8, heads=2), target_modules=["query_key_value"])
    assert RoutedModel(some).blocks == ["backbone.layer1", "backbone.layer2", "backbone.head"]
    assert RoutedModel(some).chosen


@pytest.mark.parametrize("method", [routed(), EvidenceFlow(neighbours=2), FineTuning()], ids=lambda m: type(m).__name__)
def test_it_passes_the_checks_of_a_backbone(method):
    backbone = LoRA(VisionTransformer(depth=1, width=8, heads=2), dropout=0.2)  # patches and head get shapes from data
    method, example = method.bind(backbone, Classification()), torch.rand(1, 8, 8)
    check_fit(method, example, CLASSES)
    check_draws(method, example)
    check_backbone(method, example, side_by_side=True)


@pytest.mark.slow
def test_a_client_of_a_real_encoder_takes_a_fiftieth_of_its_memory():
    model = RoutedModel(LoRA(TextEncoder(minilm(), CLASSES)))
    everything = sum(p.numel() for p in model.backbone.parameters())
    assert len(model.blocks) == 7
    assert sum(p.numel() for p in model.backbone.parameters() if p.requires_grad) < everything / 50


def test_a_personalized_model_can_be_exported(tmp_path):
    module = FederatedModule(adapted(), FineTuning(), loop())
    x, y = torch.randn(4, FEATURES), torch.arange(4) % CLASSES
    model = personalize(module, x, y)
    path = tmp_path / "model.pt2"
    export_model(model, path, x)
    torch.testing.assert_close(torch.export.load(path).module()(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ["heed"]}, "train names 'heed', which is not a submodule of VisionTransformer: .* 'head'"),
        ({"target_modules": ["query"]}, r"target_modules is \['query'\], but these layers of"),
        ({"target_modules": ["norm1"]}, r"target_modules is \['norm1'\], but these layers of"),
        ({"r": 0}, "r is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"target_modules": []}, "target_modules is .*at least one"),
    ],
)
def test_what_cannot_be_adapted_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        LoRA(VisionTransformer(3, 1, depth=1, width=8, heads=2), **settings)


def test_adapters_around_adapters_are_refused():
    with pytest.raises(ConfigurationError, match="LoRA already has adapters"):
        LoRA(adapted(), train=["backbone.3"])
