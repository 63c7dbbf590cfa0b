"""The engine: a vectorized client equals the same client trained alone."""

import copy
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from flow_pl.checks import check_fit
from flow_pl.engine.client_optimizer import StackedOptimizer, check_elementwise
from flow_pl.engine.schedule import make_schedule
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients, predict_clients
from flow_pl.methods import FedAvg, FineTuning, Flow
from flow_pl.models import Dropout
from flow_pl.tasks import Classification
from tests.support import (
    CLASSES,
    FEATURES,
    PublishedFlow,
    bound,
    chunk,
    delta,
    flat,
    loop,
    minibatches,
    network,
    select,
    snapshot,
    train_alone,
)

SIZES = (11, 7, 4, 1)


def test_vectorized_clients_equal_plain_loops():
    """delta = sum_m n_m (w_m - w), with w_m from an independent loop over ragged clients."""
    batch = chunk(SIZES)
    method = bound(FedAvg())
    expected = torch.zeros(len(flat(server_groups(method)["global"])))
    for client, n in enumerate(SIZES):
        alone = train_alone(copy.deepcopy(method.modules["global"]), batch, client, epochs=2, batch_size=4)
        expected += n * (flat(dict(alone.named_parameters())) - flat(server_groups(method)["global"]))
    update = loop().train_clients(method, server_groups(method), batch)
    torch.testing.assert_close(flat(delta(update)["global"]), expected, atol=1e-5, rtol=1e-5)
    assert update.weights["global"].sum() == sum(SIZES)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.01),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam"],
)
def test_any_elementwise_optimizer(optimizer):
    batch = chunk(SIZES)
    method = bound(FedAvg())
    groups, _ = loop(client_optimizer=optimizer).run(method, server_groups(method), batch, training=True)
    for client in range(len(SIZES)):
        alone = train_alone(copy.deepcopy(method.modules["global"]), batch, client, 2, 4, optimizer=optimizer)
        stacked = {name: p[client] for name, p in groups.groups["global"].items()}
        torch.testing.assert_close(flat(stacked), flat(dict(alone.named_parameters())), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method",
    [FedAvg(), PublishedFlow(), PublishedFlow(split="cross"), FineTuning()],
    ids=lambda m: type(m).__name__,
)
def test_chunk_size_changes_nothing(method):
    """One chunk of four, chunks of 3 and 1, and four chunks of one: the same sums."""
    batch = chunk(SIZES)
    method = bound(method)
    if isinstance(method, Flow):
        method.router.exits.dropout.p = 0.0
    server = server_groups(method)

    def total(cuts):
        updates = [loop().train_clients(method, server, select(batch, cut)) for cut in cuts]
        return {name: sum(flat(delta(update)[name]) for update in updates) for name in method.shared}

    def accuracy(cuts):
        parts = [evaluate_clients(loop(), method, server, select(batch, cut)) for cut in cuts]
        return torch.cat([part.personalized_loss for part in parts])

    whole = total([range(4)])
    for cuts in ([range(3), [3]], [[0], [1], [2], [3]]):
        for name, summed in total(cuts).items():
            torch.testing.assert_close(summed, whole[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(accuracy(cuts), accuracy([range(4)]), atol=1e-5, rtol=1e-4)


def test_channels_last_changes_nothing_but_the_layout():
    """Of a client that is trained alone; side by side they stay as they are."""
    batch = chunk(SIZES)
    images = {part: getattr(batch, part) for part in ("train", "heldout")}
    images = {part: replace(found, x=found.x.view(*found.mask.shape, 1, 2, 3)) for part, found in images.items()}
    batch = replace(batch, **images)
    method = PublishedFlow(router=lambda blocks: _constant_router(blocks))
    backbone = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES))
    method = method.bind(backbone, Classification())
    check_fit(method, batch.train.x[0, :1], CLASSES)
    server, seen = server_groups(method), []
    method.modules["global"].get_submodule("0").register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    for clients in ([0], range(4)):
        part, found = select(batch, clients), {}
        for flag in (True, False):
            seen.clear()
            engine = loop(channels_last=flag)
            update, counts = engine.train_clients(method, server, part), evaluate_clients(engine, method, server, part)
            found[flag] = {**delta(update), "counts": {"loss": counts.personalized_loss}}
            strides = {stride[1] for stride in seen}  # of the channel: of several clients the largest goes on alone
            assert strides == ({6} if not flag else {1} if len(clients) == 1 else {1, 6})
        for name, group in found[True].items():
            torch.testing.assert_close(flat(group), flat(found[False][name]), atol=1e-6, rtol=1e-5)


def test_padding_changes_nothing():
    method = bound(PublishedFlow(router=lambda blocks: _constant_router(blocks)))
    narrow, wide = chunk(SIZES), chunk(SIZES, pad_to=20)
    order = wide.order.clone()
    order[:, :, :11] = narrow.order
    wide = type(wide)(wide.client, wide.train, _pad(narrow.part, 20), order, wide.heldout, 0, narrow.key)
    a = loop().train_clients(method, server_groups(method), narrow)
    b = loop().train_clients(method, server_groups(method), wide)
    for name in method.shared:
        assert torch.equal(flat(delta(a)[name]), flat(delta(b)[name]))


def _pad(t, length):
    out = torch.zeros(len(t), length, dtype=t.dtype)
    out[:, : t.shape[1]] = t
    return out


def _constant_router(blocks):
    from flow_pl.models.routers import InstanceRouter

    return InstanceRouter(blocks, hidden=(4,), dropout=0.0)


def test_traced_steps_equal_eager_ones_bit_for_bit():
    """Dropout included: a trace draws what the traced function does."""
    batch = chunk((16, 16, 16), epochs=4)
    method = bound(PublishedFlow(router=lambda blocks: _constant_router(blocks)), network(dropout=0.5))
    eager = loop(local_epochs=4, trace_after=None).train_clients(method, server_groups(method), batch)
    engine = loop(local_epochs=4, trace_after=2)
    traced = engine.train_clients(method, server_groups(method), batch)
    assert engine.engine.traced, "nothing was traced"
    for name in method.shared:
        assert torch.equal(flat(delta(eager)[name]), flat(delta(traced)[name]))


def test_nothing_is_traced_while_anomalies_are_looked_for():
    """A trace has no values to look at; tracing would fail, with pages of warnings."""
    batch, method = chunk((16, 16, 16), epochs=4), bound(PublishedFlow(router=_constant_router), network(dropout=0.0))
    engine = loop(local_epochs=4, trace_after=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.set_detect_anomaly(True):
            engine.train_clients(method, server_groups(method), batch)
    assert not engine.engine.traced


@pytest.mark.parametrize("precision", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_traced_steps_of_our_own_modules_equal_eager_ones_bit_for_bit(precision):
    """Linear layers, activations in place, and dropout by uniform draws; a minibatch that is not full too."""
    backbone = nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(inplace=True), Dropout(0.5), nn.Linear(5, CLASSES))
    method, batch = bound(PublishedFlow(), backbone), chunk((18, 18, 18), epochs=4)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        eager = loop(local_epochs=4, trace_after=None).train_clients(method, server_groups(method), batch)
        engine = loop(local_epochs=4, trace_after=2)
        traced = engine.train_clients(method, server_groups(method), batch)
    assert engine.engine.traced, "nothing was traced"
    for name in method.shared:
        assert torch.equal(flat(delta(eager)[name]), flat(delta(traced)[name]))


def test_the_server_is_never_written():
    method = bound(PublishedFlow())
    before = snapshot(method)
    loop().train_clients(method, server_groups(method), chunk(SIZES))
    evaluate_clients(loop(), method, server_groups(method), chunk(SIZES))
    for name, group in server_groups(method).items():
        assert torch.equal(flat(group), flat(before[name]))


def test_schedule_is_a_shrinking_prefix_in_the_drawn_order():
    batch = chunk(SIZES)
    schedule = make_schedule(batch, "all", range(2), batch_size=4)
    # 3, 2, 1 and 1 minibatches an epoch
    assert schedule.active == (4, 4, 2, 2, 1, 1)
    assert schedule.examples == 2 * sum(SIZES)
    n = batch.train.mask.shape[1]
    for client in range(len(SIZES)):
        expected = [rows.tolist() for rows in minibatches(batch, client, 2, 4)]
        for t, rows in enumerate(expected):
            real = schedule.mask[t, client]
            assert (schedule.index[t, client][real] - client * n).tolist() == rows
        assert not schedule.mask[len(expected) :, client].any()


@pytest.mark.parametrize("chunk_size", [1, 10, 30])
def test_padding_is_little_on_log_normal_sizes(chunk_size):
    """30 clients with a mean of 100 examples, sigma 1: what is computed beyond them is at most 15 %."""
    sizes = sorted(np.random.default_rng(0).lognormal(np.log(100) - 0.5, 1, 30).astype(int) + 1, reverse=True)
    rows = 0
    for start in range(0, 30, chunk_size):
        part = chunk([int(n) for n in sizes[start : start + chunk_size]], epochs=1)
        rows += 10 * sum(make_schedule(part, "all", range(1), batch_size=10).active)
    assert 1 - sum(sizes) / rows <= 0.15


@pytest.mark.parametrize("part", ["local", "global"])
def test_schedule_of_a_part_visits_it_once_an_epoch(part):
    batch = chunk(SIZES)
    schedule = make_schedule(batch, part, range(2), batch_size=4)
    bit = 1 if part == "local" else 2
    n = batch.train.mask.shape[1]
    for client in range(len(SIZES)):
        seen = (schedule.index[:, client][schedule.mask[:, client]] - client * n).tolist()
        members = [r for r in range(n) if int(batch.part[client, r]) & bit]
        assert sorted(seen) == sorted(members * 2)


def test_uniform_weighting_counts_clients_alike():
    batch, method = chunk(SIZES), bound(FedAvg())
    server = server_groups(method)
    update = loop(weighting="uniform").train_clients(method, server, batch)
    alone = [loop(weighting="uniform").train_clients(method, server, select(batch, [i])) for i in range(4)]
    torch.testing.assert_close(
        flat(delta(update)["global"]), sum(flat(delta(u)["global"]) for u in alone), atol=1e-6, rtol=1e-4
    )
    assert update.weights["global"].sum() == 4


def test_evaluation_in_slices_equals_evaluation_at_once():
    batch, method = chunk(SIZES, heldout=9), bound(PublishedFlow(router=lambda blocks: _constant_router(blocks)))
    server = server_groups(method)
    whole = evaluate_clients(loop(local_epochs=1), method, server, batch)
    sliced = evaluate_clients(loop(local_epochs=1, evaluation_batch_size=2), method, server, batch)
    for name in (
        "count",
        "generalized",
        "personalized",
        "both",
        "global_or_local",
        "mixtures",
        "routed",
        "routed_local",
    ):
        assert torch.equal(getattr(whole, name), getattr(sliced, name))
    one_by_one = predict_clients(loop(local_epochs=1, evaluation_batch_size=2), method, server, batch)
    assert torch.equal(one_by_one.personalized_correct.sum(1).float(), whole.personalized)
    assert torch.equal(one_by_one.generalized_correct.sum(1).float(), whole.generalized)
    assert torch.equal(one_by_one.routes.sum(1).float(), whole.routed_local)


@pytest.mark.parametrize(
    ("make", "way"),
    [
        (torch.optim.SGD, "fused"),
        (torch.optim.AdamW, "fused"),
        (torch.optim.RMSprop, "foreach"),  # which torch has no fused kernel of
        (partial(torch.optim.SGD, foreach=True), "foreach"),
        (partial(torch.optim.SGD, foreach=False), None),
    ],
)
def test_optimizers_take_their_fastest_way_unless_one_is_chosen(make, way):
    torch.manual_seed(0)
    start, grads = torch.randn(3, 4), torch.randn(5, 3, 4)
    stacked, alone = start.clone(), start.clone()
    together, plain = StackedOptimizer(partial(make, lr=0.1), [stacked]), make([alone], lr=0.1)
    (group,) = together.optimizer.param_groups
    assert [name for name in ("fused", "foreach") if group.get(name)] == ([] if way is None else [way])
    for grad in grads:
        together.step([grad])
        alone.grad = grad
        plain.step()
    torch.testing.assert_close(stacked, alone)


def test_an_optimizer_that_mixes_clients_is_refused():
    class Normalized(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = p.grad / p.grad.norm()
            return super().step(closure)

    with pytest.raises(ConfigurationError, match=r"Normalized mixes clients .* element-wise"):
        check_elementwise(lambda p: Normalized(p, lr=0.1))
    with pytest.raises(ConfigurationError, match="LBFGS cannot train clients side by side"):
        check_elementwise(lambda p: torch.optim.LBFGS(p))
    check_elementwise(lambda p: torch.optim.Adam(p, lr=0.1))


def test_too_few_orders_are_refused():
    method = bound(FedAvg())
    with pytest.raises(ConfigurationError, match="the batch has 4 minibatch orders of each client, expected 5"):
        loop(local_epochs=5).train_clients(method, server_groups(method), chunk(SIZES, epochs=2))


def test_a_step_that_is_not_finite_is_skipped_for_that_client_alone():
    """Client 0 has an infinite feature; with loss scaling it stays at the server's parameters, client 1 does not."""
    batch = chunk((8, 8), epochs=1)
    batch.train.x[0] = torch.inf
    method = bound(FedAvg())
    server = server_groups(method)
    scale = torch.tensor(1024.0)
    update = loop(local_epochs=1).train_clients(method, server, batch, scale)
    alone = loop(local_epochs=1).train_clients(method, server, select(batch, [1]))
    torch.testing.assert_close(flat(delta(update)["global"]), flat(delta(alone)["global"]), atol=1e-5, rtol=1e-4)
    assert update.statistics.skipped == 2


def test_a_backbone_given_by_name_of_a_foreign_class_is_trained():
    class Foreign(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
                nn.Sequential(nn.Linear(4 * (FEATURES - 2), 8), nn.GELU(), nn.Linear(8, CLASSES)),
            )  # fmt: skip

    method = bound(PublishedFlow(), Foreign())
    assert method.route_names == ["1", "2", "5"]
    update = loop(local_epochs=1).train_clients(method, server_groups(method), chunk(SIZES))
    assert flat(delta(update)["router"]).abs().sum() > 0
    assert evaluate_clients(loop(local_epochs=1), method, server_groups(method), chunk(SIZES)).routed_local.shape == (
        4,
        3,
    )
