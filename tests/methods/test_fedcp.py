"""FedCP against a plain loop of one client."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedCP
from flow_pl.methods.parts.regularizers import maximum_mean_discrepancy
from tests.methods.helpers import TASKS, client_of, copied, filled, next_server, on_task
from tests.support import FEATURES, bound, chunk, loop, minibatches, sgd, snapshot

SIZES = (11, 6)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
HEAD = 3


class Plain:
    """A client's model as its paper draws it."""

    def __init__(self, server, head):
        self.frozen = filled(server["global"])
        self.w = filled({**server["global"], **head})
        width = self.w[HEAD].in_features
        self.policy = nn.Linear(width, 2 * width)
        self.policy.load_state_dict(server["policy"])
        context = self.w[HEAD].weight.detach().sum(0)
        self.context = context / context.norm()

    def __call__(self, x):
        features = self.w[:HEAD](x)
        scores = self.policy(features * self.context)
        normal = (scores - scores.mean(-1, keepdim=True)) / (scores.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        own, others = normal.relu().reshape(len(x), 2, -1).softmax(1).unbind(1)
        return self.w[HEAD](features * own) + self.frozen[HEAD](features * others), features

    def train(self, batch, client):
        steps = sgd([*self.w.parameters(), *self.policy.parameters()])
        for rows in minibatches(batch, client, 2, 4):
            x, y = batch.train.x[client, rows], batch.train.y[client, rows]
            outputs, features = self(x)
            loss = F.cross_entropy(outputs, y) + 0.5 * discrepancy(features, self.frozen[:HEAD](x).detach())
            steps.zero_grad()
            loss.backward()
            steps.step()


def discrepancy(x, y):
    def mean(a, b):
        squares = (a[:, None] - b[None]).square().sum(-1)
        return sum((-squares / (2 * v)).exp().mean() for v in (10, 15, 20, 50))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_two_rounds_and_evaluations_are_those_of_a_plain_loop():
    method, batch, kept = bound(FedCP(regularization=0.5)), chunk(SIZES, heldout=20), None
    heads = [{n: p for n, p in snapshot(method)["global"].items() if n.startswith(f"{HEAD}.")}] * len(SIZES)
    for server in (snapshot(method), next_server(snapshot(method))):
        result = evaluate_clients(loop(), method, server, batch, None if kept is None else copied(kept))
        update = loop().train_clients(method, server, batch, kept=kept)
        kept = copied(update.kept)
        for client in range(len(SIZES)):
            alone = Plain(server, heads[client])
            alone.train(batch, client)
            outputs, _ = alone(batch.heldout.x[client])
            loss = F.cross_entropy(outputs, batch.heldout.y[client], reduction="sum")
            torch.testing.assert_close(result.personalized_loss[client], loss, **CLOSE)
            trained = {name: p.detach() for name, p in alone.w.named_parameters()}
            heads[client] = {name: trained[name] for name in heads[client]}
            torch.testing.assert_close(client_of(kept["head"], client), heads[client], **CLOSE)
            sent = {
                name: (trained[name] - p) * (0.5 if name in heads[client] else 1)
                for name, p in server["global"].items()
            }
            torch.testing.assert_close(client_of(update.difference["global"], client), sent, **CLOSE)
            moved = {name: p.detach() - server["policy"][name] for name, p in alone.policy.named_parameters()}
            torch.testing.assert_close(client_of(update.difference["policy"], client), moved, **CLOSE)


def test_the_discrepancy_is_that_of_the_real_rows():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 3, generator=generator) for _ in range(2))
    real = torch.tensor([True, True, False, True, True, False])
    found = maximum_mean_discrepancy(x.where(real[:, None], torch.nan), y.where(real[:, None], torch.inf), real)
    torch.testing.assert_close(found, discrepancy(x[real], y[real]))
    torch.testing.assert_close(maximum_mean_discrepancy(x, x, real), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert maximum_mean_discrepancy(x, y, torch.zeros(6, dtype=torch.bool)) == 0


def test_the_discrepancy_of_large_features_survives_mixed_precision():
    """A product in bfloat16 would be off by more than the squared distances."""
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(8, 16, generator=generator)
    y, real = x + 0.5 * torch.randn(8, 16, generator=generator), torch.ones(8, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = maximum_mean_discrepancy(x, y, real)
    torch.testing.assert_close(found, discrepancy(x, y), atol=1e-5, rtol=1e-4)


def test_other_tasks():
    for task in TASKS:
        update, result = on_task(FedCP(), task, epochs=8)  # at first, the policy halves the features
        assert update.finite()
        assert (result.personalized_loss < result.generalized_loss).all()


def test_a_last_block_without_a_context_is_refused():
    backbone = nn.Sequential(nn.Linear(FEATURES, 3), nn.GroupNorm(1, 3))
    with pytest.raises(ConfigurationError, match=r"ends with nn\.Linear"):
        bound(FedCP(), backbone)
    with pytest.raises(ConfigurationError, match="regularization is -1"):
        FedCP(-1.0)
