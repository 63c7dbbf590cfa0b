"""Clipping of clients' gradients: of each client's step by itself, as torch clips that of a model."""

import copy

import pytest
import torch
from torch.nn import functional as F

from flow_pl.engine.client_norms import clipped
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg
from tests.support import bound, chunk, delta, flat, loop, minibatches, sgd
from tests.test_module import data, fitted, module, trainer

SIZES, NORM = (11, 8, 3), 0.3


def test_gradients_are_clipped_as_torch_clips_them():
    torch.manual_seed(0)
    grads = [torch.randn(4, 3, 2) * torch.tensor([0.01, 1, 10, 0])[:, None, None], torch.randn(4, 5)]
    found = clipped(grads, 2.0)
    for client in range(4):
        leaves = [torch.zeros_like(g[client], requires_grad=True) for g in grads]
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = g[client].clone()
        torch.nn.utils.clip_grad_norm_(leaves, 2.0)
        for leaf, g in zip(leaves, found, strict=True):
            torch.testing.assert_close(g[client], leaf.grad, rtol=1e-5, atol=1e-6)


def alone(method, batch, client):
    """A client's training by a plain loop with `clip_grad_norm_`; the model, and how many steps were clipped."""
    model = copy.deepcopy(method.modules["global"])
    optimizer, count = sgd(list(model.parameters())), 0
    for rows in minibatches(batch, client, 2, 4):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.train.x[client, rows]), batch.train.y[client, rows]).backward()
        count += int(torch.nn.utils.clip_grad_norm_(model.parameters(), NORM) > NORM)
        optimizer.step()
    return flat(dict(model.named_parameters())), count


@pytest.mark.parametrize("trace_after", [None, 0])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_round_equals_plain_loops(trace_after, scale):
    """Traced and not; with a scaled loss the gradient itself is clipped."""
    method, batch = bound(FedAvg()), chunk(SIZES)
    server = server_groups(method)
    engine = loop(local_epochs=2, trace_after=trace_after, max_grad_norm=NORM)
    update = engine.train_clients(method, server, batch, None if scale is None else torch.tensor(scale))
    counts = []
    for client in range(len(SIZES)):
        expected, count = alone(method, batch, client)
        sent = torch.cat([p[client].flatten() for p in update.difference["global"].values()])
        torch.testing.assert_close(flat(server["global"]) + sent, expected, atol=1e-5, rtol=1e-4)
        counts.append(count)
    assert sum(counts) > 0
    unclipped = loop(local_epochs=2).train_clients(method, server, batch)
    assert (flat(delta(unclipped)["global"]) - flat(delta(update)["global"])).abs().max() > 1e-3


def test_a_step_that_is_not_finite_is_skipped_still():
    """In 16-mixed, of that client alone."""
    method, batch = bound(FedAvg()), chunk((8, 8))
    batch.train.x[1] = torch.nan
    server = server_groups(method)
    update = loop(local_epochs=1, max_grad_norm=NORM).train_clients(method, server, batch, torch.tensor(2.0))
    sent = torch.cat([p.flatten(1) for p in update.difference["global"].values()], 1)
    assert sent[0].abs().max() > 0
    assert not sent[1].any()
    assert update.statistics.skipped == 2


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_that_is_none_is_refused(norm):
    with pytest.raises(ConfigurationError, match="max_grad_norm is"):
        FederatedLoop(max_grad_norm=norm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val is 0.5, expected null: .* set model.loop.max_grad_norm"),
        ({"accumulate_grad_batches": 4}, r"accumulate_grad_batches is 4, expected 1: .* raise data.cohort_size"),
    ],
)
def test_what_the_trainer_offers_instead_is_refused_in_our_words(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        fitted(tmp_path, FedAvg(), trainer_settings=settings)


def test_other_stages_do_not_ask(tmp_path):
    trainer(1, gradient_clip_val=0.5).validate(module(FedAvg()), datamodule=data(tmp_path / "cache"), verbose=False)
