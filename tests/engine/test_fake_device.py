"""Rounds, evaluations and predictions without a GPU, on tensors that only say where they are.

Torch's fake tensors on the `meta` device hold no values: a tensor left on the host that meets them raises, and so does
whatever would make a GPU wait (`item`, `nonzero`, a mask as an index). All but the one question of a round may not.
"""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flow_pl import methods
from flow_pl.checks import check_fit
from flow_pl.data.batch import _map
from flow_pl.engine.aggregation import NormBound
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.privacy import GaussianMechanism, Sampling
from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.evaluation.clients import evaluate_clients, predict_clients
from flow_pl.models import EMNISTCNN, MLP, NextCharacterLSTM, NextWordLSTM, ResNet18
from flow_pl.models.normalization import converted
from flow_pl.tasks import Classification, NextToken
from tests.support import PublishedFlow, chunk, every_method

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

CLASSES, VOCABULARY = 5, 11
BACKBONES = {
    "mlp": (lambda: MLP(6, CLASSES, (8,)), (6,)),
    "cnn": (lambda: EMNISTCNN(CLASSES, (1, 8, 8)), (1, 8, 8)),
    "resnet": (lambda: ResNet18(CLASSES, 1), (1, 32, 32)),
    "words": (lambda: NextWordLSTM(VOCABULARY, 4, 6, 5), (4,)),
    "characters": (lambda: NextCharacterLSTM(VOCABULARY, 4, 6), (4,)),
}
TOKENS = ("words", "characters")


METHODS = {
    **every_method(),
    "Flow, published": PublishedFlow,
    "Interpolation, chosen": functools.partial(methods.Interpolation, alpha="chosen"),
    "Interpolation, votes": functools.partial(methods.Interpolation, neighbour_weight=0.4),
}
QUICK = ("APFL", "Ditto", "FedAvg", "Flow, published", "HypCluster", "Scaffold")
"""One of each kind: interpolated, kept, global, routed, in clusters, with corrections. The others are slow."""


@pytest.fixture(autouse=True)
def _autocast_knows_the_device(monkeypatch):
    """Autocast has no settings for a device that computes nothing; it is off there, as it is on the host."""
    enabled, dtype, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast
    host = lambda device: "cpu" if device == "meta" else device  # noqa: E731
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": enabled(host(device)))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: dtype(host(device)))
    monkeypatch.setattr(torch, "autocast", lambda device, **settings: autocast(host(device), **settings))


def there(t):
    """A tensor on the device, in place of one on the host; to be called in the fake mode."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def move(module):
    """Move the parameters and buffers of a module to the device."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(there(p), requires_grad=p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = there(buffer)


def on_the_host(make, backbone, sizes, engine):
    """A method and a chunk of clients for its backbone."""
    build, shape = BACKBONES[backbone]
    tokens = backbone in TOKENS
    method = make().bind(build(), NextToken() if tokens else Classification())
    kind = torch.int64 if tokens else torch.float32
    check_fit(method, torch.ones(1, *shape, dtype=kind), VOCABULARY if tokens else CLASSES)
    batch = chunk(sizes, epochs=-(-engine.orders(method) // 2))
    for part in (batch.train, batch.heldout):
        part.x = torch.ones(*part.mask.shape, *shape, dtype=kind)
        part.y = torch.ones(*part.mask.shape, *(shape if tokens else ()), dtype=torch.int64)
    return method, batch


def run(monkeypatch, make, backbone, sizes, trace_after=None, **server_round):
    """Make a round, an evaluation and a prediction there; returns how many questions were asked of the device."""
    engine = FederatedLoop(1, batch_size=4, trace_after=trace_after)
    method, batch = on_the_host(make, backbone, sizes, engine)
    questions = []

    def answer(tensor):
        questions.append(tensor)
        return [1.0] * tensor.numel()

    with FakeTensorMode(allow_non_fake_inputs=True):  # `torch.tensor` makes others there
        for module in method.modules.values():
            move(module)
        batch = _map(batch, there)
        server = server_groups(method)
        state = method.initial_state(server) if method.private else {}
        kept = {
            name: {key: p.expand(len(batch), *p.shape).clone() for key, p in group.items()}
            for name, group in state.items()
        }
        update = engine.train_clients(method, server, batch, kept=kept or None)
        round_ = ServerRound(method, **server_round)
        round_.add(update)
        with monkeypatch.context() as patch:
            patch.setattr(FakeTensor, "tolist", answer)
            round_.finish(lambda total: total, 0)
        for function in (evaluate_clients, predict_clients):
            function(engine, method, server, batch, kept or None)
    return len(questions)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_every_method_asks_the_device_once_a_round(monkeypatch, name):
    assert run(monkeypatch, METHODS[name], "mlp", (9, 6, 1)) == 1


@pytest.mark.parametrize(
    "name",
    ["FedAvg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Flow, published", "EvidenceFlow")), "KNNPer"],
)
def test_a_client_alone_asks_no_more(monkeypatch, name):
    assert run(monkeypatch, METHODS[name], "mlp", (6,)) == 1


@pytest.mark.parametrize(
    "name", ["FedAvg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Flow", "EvidenceFlow", "PerFedAvg"))]
)
def test_traced_steps_ask_no_more(monkeypatch, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a step cannot be traced")
        assert run(monkeypatch, METHODS[name], "mlp", (9, 6, 1), trace_after=0) == 1


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("backbone", ["cnn", "words"])
def test_traced_steps_of_other_backbones_ask_no_more(monkeypatch, backbone):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a step cannot be traced")
        assert run(monkeypatch, METHODS["Flow, published"], backbone, (6, 4), trace_after=0) == 1


def test_batch_norm_that_clients_keep_asks_no_more(monkeypatch):
    def net():
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, CLASSES)
        return converted(nn.Sequential(*layers), "local")

    monkeypatch.setitem(BACKBONES, "norms", (net, (1, 8, 8)))
    assert run(monkeypatch, methods.FedBN, "norms", (6, 4)) == 1


def test_bounded_and_private_updates_ask_no_more(monkeypatch):
    privacy = GaussianMechanism(1e-4, noise_multiplier=1.0, accountant="rdp")
    privacy.plan(Sampling("poisson", 100, 10), 10, 0)
    for settings in ({"aggregation": NormBound()}, {"privacy": privacy}):
        assert run(monkeypatch, methods.FedAvg, "mlp", (9, 1), **settings) == 1


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("backbone", ["cnn", "words"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_images_and_words(monkeypatch, name, backbone):
    assert run(monkeypatch, METHODS[name], backbone, (6, 4)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(6, 4), pytest.param((6,), marks=pytest.mark.extended)], ids=["chunk", "alone"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", [pytest.param("FedAvg", marks=pytest.mark.extended), "Flow, published"])
def test_every_backbone(monkeypatch, name, backbone, sizes):
    assert run(monkeypatch, METHODS[name], backbone, sizes) == 1


def test_a_tensor_left_on_the_host_and_a_wait_are_found(monkeypatch):
    class Left(nn.Module):
        def forward(self, x):
            return x + torch.ones(6)

    class Waits(nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    for block, said in ((Left(), "device"), (Waits(), "item|data-dependent|_local_scalar_dense")):
        monkeypatch.setitem(BACKBONES, "bad", (lambda block=block: nn.Sequential(block, nn.Linear(6, CLASSES)), (6,)))
        with pytest.raises(Exception, match=said):
            run(monkeypatch, METHODS["FedAvg"], "bad", (6,))
