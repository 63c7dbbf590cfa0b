"""Backbones, optimizers and runs that are easy to get silently wrong."""

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flow_pl.engine.trace_cache
from flow_pl.cli import run
from flow_pl.engine.client_optimizer import StackedOptimizer
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg
from flow_pl.models.routed import RoutedModel
from flow_pl.models.routers import InstanceRouter
from tests.support import CLASSES, FEATURES, PublishedFlow, bound, chunk, delta, flat, loop
from tests.test_cli import TINY


def all_global(block, inputs, on_global, on_local):
    return torch.tensor([1.0, 0.0]).expand(len(on_global), 2)


def test_one_activation_used_twice_is_applied_twice():
    act = nn.Tanh()
    model = RoutedModel(nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 3)))
    parameters = {name: p.detach() for name, p in model.backbone.named_parameters()}
    x = torch.randn(6, 4)
    outputs, _ = model.routed(x, parameters, model.local_copy(parameters), all_global)
    torch.testing.assert_close(outputs, model.backbone(x))


def _tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, second)


class _Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (nn.Sequential(*[nn.Linear(4, 4)] * 2), r"uses a parameter twice \(1.bias, 1.weight\)"),
        (_tied(), r"uses a parameter twice \(1.weight\)"),
    ],
)
def test_backbones_that_would_be_routed_wrongly_are_refused(backbone, message):
    with pytest.raises(ConfigurationError, match=message):
        RoutedModel(backbone)


def test_a_sequential_with_a_forward_of_its_own_is_routed_within_it():
    model = RoutedModel(_Residual(nn.Linear(4, 4)))
    parameters = {name: p.detach() for name, p in model.backbone.named_parameters()}
    x = torch.randn(6, 4)
    local = {name: 2 * p for name, p in model.local_copy(parameters).items()}
    outputs, _ = model.routed(x, parameters, local, all_global)
    torch.testing.assert_close(outputs, x + model.backbone[0](x))


class _Normalise(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((FEATURES,), 0.3))

    def forward(self, x):
        return x - self.mean


def test_blocks_with_buffers_are_traced():
    method = bound(FedAvg(), nn.Sequential(_Normalise(), nn.Linear(FEATURES, CLASSES)))
    batch = chunk((12, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = loop(trace_after=1).train_clients(method, server_groups(method), batch)
    eager = loop(trace_after=None).train_clients(method, server_groups(method), batch)
    assert torch.equal(flat(delta(traced)["global"]), flat(delta(eager)["global"]))


def test_a_step_that_cannot_be_traced_runs_untraced_and_says_so(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no trace today")

    monkeypatch.setattr(flow_pl.engine.trace_cache, "trace", refuse)
    method, batch = bound(FedAvg()), chunk((12, 12))
    with pytest.warns(UserWarning, match="runs untraced, with the same results: no trace today"):
        untraced = loop(trace_after=1).train_clients(method, server_groups(method), batch)
    eager = loop(trace_after=None).train_clients(method, server_groups(method), batch)
    assert torch.equal(flat(delta(untraced)["global"]), flat(delta(eager)["global"]))


def test_traces_are_bounded_and_do_not_thrash(monkeypatch):
    """Three kinds of steps in room for two: a dropped one is traced again only when it has been asked for anew."""
    monkeypatch.setattr(flow_pl.engine.trace_cache, "MAX_TRACES", 2)
    made = []
    trace = flow_pl.engine.trace_cache.trace
    monkeypatch.setattr(flow_pl.engine.trace_cache, "trace", lambda *args: made.append(1) or trace(*args))
    method, engine = bound(FedAvg()), loop(local_epochs=1, batch_size=1, trace_after=3)
    for _ in range(4):
        for clients in (2, 3, 4):
            engine.train_clients(method, server_groups(method), chunk((2,) * clients))
    assert engine.engine.traced <= 2
    assert len(made) <= 6, "24 steps of three kinds"


class _Sum(nn.Module):
    """Two parameters with one gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(CLASSES, FEATURES)) for _ in range(2))

    def forward(self, x):
        return F.linear(x, self.a + self.b)


@pytest.mark.parametrize("clients", [1, 3])
def test_parameters_with_one_gradient_each_take_their_own_step(clients):
    torch.manual_seed(0)
    method = bound(FedAvg(), nn.Sequential(_Sum()))
    batch = chunk((8,) * clients, epochs=1)

    def nesterov(params):
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)

    server = server_groups(method)
    update = loop(local_epochs=1, client_optimizer=nesterov).train_clients(method, server, batch)
    scaled = loop(local_epochs=1, client_optimizer=nesterov).train_clients(method, server, batch, torch.tensor(1024.0))
    a, b = delta(update)["global"].values()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(delta(scaled)["global"]["0.a"], a, atol=1e-6, rtol=1e-4)
    plain = nn.Sequential(_Sum())
    plain.load_state_dict(method.modules["global"].state_dict())
    optimizer = nesterov(plain.parameters())
    for start in (0, 4):
        rows = batch.order[0, 0, start : start + 4]
        optimizer.zero_grad()
        F.cross_entropy(plain(batch.train.x[0, rows]), batch.train.y[0, rows]).backward()
        optimizer.step()
    first = loop(local_epochs=1, client_optimizer=nesterov)
    groups, _ = first.run(method, server, batch, training=True)
    torch.testing.assert_close(groups.groups["global"]["0.a"][0], plain[0].a.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    ],
)
def test_a_skipped_first_step_leaves_no_trace_in_the_optimizer(make):
    """Client 0 skips, then steps: the same as a client whose first step that is."""
    start, grad = torch.ones(2, 3), torch.full((2, 3), 0.5)
    both, alone = start.clone(), start[:1].clone()
    optimizer, fresh = StackedOptimizer(make, [both]), StackedOptimizer(make, [alone])
    optimizer.step([grad], keep=torch.tensor([False, True]))
    assert torch.equal(both[0], start[0])
    optimizer.step([grad], keep=torch.tensor([True, True]))
    fresh.step([grad[:1]])
    torch.testing.assert_close(both[:1], alone)


def test_fused_optimizers_take_gradients_of_any_layout():
    batch, method = chunk((8, 8)), bound(FedAvg())
    fused, plain = (
        loop(client_optimizer=lambda p, fused=fused: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=fused))
        for fused in (True, False)
    )
    server = server_groups(method)
    a, b = (delta(each.train_clients(method, server, batch))["global"] for each in (fused, plain))
    torch.testing.assert_close(flat(a), flat(b), atol=1e-6, rtol=1e-5)


def test_autocast_keeps_no_copies_of_the_model(monkeypatch):
    """Every step of a single client makes new leaves, whose casts autocast would keep to the end of the round."""
    cleared = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(1) or clear())
    method, batch = bound(FedAvg()), chunk((12,), epochs=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loop(local_epochs=1).train_clients(method, server_groups(method), batch)
        assert len(cleared) == 3, "one for each step"


def test_local_and_global_model_take_different_minibatches_where_both_see_all_the_data():
    """Without a split, the same order would train the same model twice."""

    def router(blocks):
        return InstanceRouter(blocks, hidden=(4,), dropout=0.0)

    method = bound(PublishedFlow(split="none", router=router))
    assert loop().orders(method) == 4
    groups, _ = loop().run(method, server_groups(method), chunk((11, 6), epochs=4), training=True)
    local = torch.cat([p.flatten(1) for p in groups.groups["local"].values()], 1)
    trained = torch.cat([p.flatten(1) for p in groups.groups["global"].values()], 1)
    assert ((local - trained).abs().amax(1) > 1e-4).all()


CLI = [sys.executable, "-m", "flow_pl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["fit", *(pytest.param(command, marks=pytest.mark.extended) for command in ("test", "predict"))]
)
def test_two_processes_through_the_command_line(tmp_path, command):
    """Flow with every callback, and fewer clients than processes have room for."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(root=tmp_path).replace("devices: 1", "devices: 2\n  strategy: ddp"))
    options = ["--data.cohort_size=1", "--data.new_client_fraction=0.13"]  # one new client: an empty chunk
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for each in dict.fromkeys(["fit", command]):
        done = subprocess.run(
            [*CLI, each, "--config", str(config), *options], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    if command == "predict":
        assert len((tmp_path / "run" / "predictions.csv").read_text().splitlines()) > 8


@pytest.mark.slow
def test_a_run_killed_by_a_signal_resumes_bit_identical(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(root=tmp_path).replace("max_epochs: 2", "max_epochs: 300"))
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.check_val_every_n_epoch=7"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen([*CLI, "fit", "--config", str(config), *quiet], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = torch.load(last, weights_only=True)["global_step"]
    assert 0 < reached < 300, "killed in the middle"
    rounds = reached + 5

    def weights(*options):
        cli = run(["fit", "--config", str(config), *quiet, f"--trainer.max_epochs={rounds}", *options])
        return torch.cat([p.detach().flatten() for p in cli.model.server.parameters()])

    resumed = weights("--ckpt_path", str(last))
    assert torch.equal(resumed, weights(f"--trainer.default_root_dir={tmp_path}/whole"))
