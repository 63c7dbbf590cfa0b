"""The convergence analysis in numbers: estimates from a sample, the fitted bound, sequences and several labels."""

from itertools import combinations

import pytest
import torch

from flow_pl.engine.server_round import server_groups
from flow_pl.evaluation.convergence import (
    HEAD,
    OBSERVED,
    dissimilarity_bound,
    gradient_figures,
    gradient_sums,
    has_global_model,
    observed,
)
from flow_pl.methods import APFL, EvidenceFlow, FedAvg, Flow, HypCluster, Local
from flow_pl.tasks import MultiLabel
from tests.methods.helpers import TAGS, with_tags
from tests.models import test_sequences
from tests.support import FEATURES, PublishedFlow, bound, chunk, flat, loop, select


def test_the_estimate_from_a_sample_is_unbiased():
    """Over all pairs of 5 clients the means of both estimates are ||grad F||^2 and the diversity of all 5, exactly."""
    g = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    mean = g.mean(0)

    def figures(clients):
        one = g[list(clients)]
        n = torch.tensor(float(len(one)))
        scalars = torch.stack([n, n, n, torch.zeros(()), one.square().sum()])
        return gradient_figures(torch.cat([scalars, one.sum(0)]), population=5)

    pairs = [figures(pair) for pair in combinations(range(5), 2)]
    diversity = torch.stack([pair["gradient_diversity"] for pair in pairs]).mean()
    # mean ||grad f_m||^2 less the diversity is the square before it is cut off at 0
    square = torch.stack([pair["client_gradient_norm"] ** 2 - pair["gradient_diversity"] for pair in pairs]).mean()
    torch.testing.assert_close(diversity, (g - mean).square().sum(1).mean())
    torch.testing.assert_close(square, mean.square().sum())
    everyone = figures(range(5))
    torch.testing.assert_close(everyone["gradient_norm"], mean.norm())
    torch.testing.assert_close(everyone["sample_gradient_norm"], mean.norm())


@pytest.mark.parametrize(
    ("gradients", "clients", "g2", "b2"),
    [
        ([1.0, 2.0, 3.0], [5.0, 8.0, 11.0], 2.0, 3.0),  # on a line
        ([1.0, 2.0, 3.0], [5.0, 6.0, 11.0], 2.0, 3.0),  # one below it
        ([1.0], [4.0], 3.0, 1.0),  # one point: all that is not the gradient's is heterogeneity
        ([1.0, 2.0], [4.0, 3.0], 3.0, 1.0),  # falling: B is 1 at least
        ([0.5, 2.0], [1.0, 9.0], 0.0, 4.5),  # steep: G is not negative
        ([0.0, 0.0], [2.0, 3.0], 3.0, 1.0),
    ],
)
def test_dissimilarity_bound_holds_everywhere_and_is_tight(gradients, clients, g2, b2):
    g, b = dissimilarity_bound(gradients, clients)
    assert (g**2, b**2) == pytest.approx((g2, b2))
    assert all(y <= g**2 + b**2 * x + 1e-9 for x, y in zip(gradients, clients, strict=True))


def test_chunks_add_up():
    method, batch = bound(FedAvg()), chunk((11, 7, 4, 1))
    server = server_groups(method)
    parts = [gradient_sums(method, server, select(batch, cut), "examples") for cut in ([0, 1, 2], [3])]
    torch.testing.assert_close(sum(parts), gradient_sums(method, server, batch, "examples"), atol=1e-5, rtol=1e-5)
    assert parts[0][1] == 22


def test_sequences_have_gradients_and_probabilities_per_token():
    """The mean gradient of two clients is that of torch on the loss of their tokens, padding left out."""
    method = test_sequences.bound(PublishedFlow(router=test_sequences.router))
    server, batch = server_groups(method), test_sequences.batch((6, 5))
    sums = gradient_sums(method, server, batch, "uniform")
    backbone, total = method.modules["global"], 0
    for client, n in enumerate(batch.train.sizes):
        x, y = batch.train.x[client, :n], batch.train.y[client, :n]
        total = total + torch.nn.functional.cross_entropy(backbone(x).flatten(0, 1), y.flatten(), ignore_index=0)
    grads = torch.autograd.grad(total, list(backbone.parameters()))
    torch.testing.assert_close(sums[HEAD:], flat(dict(enumerate(grads))), atol=1e-5, rtol=1e-4)
    seen = loop(local_epochs=1).train_clients(observed(method, server), server, batch).kept[OBSERVED]
    assert seen["q_local"].shape == (2, len(method.route_names))
    assert ((seen["deviation"] > 0) & (seen["deviation"] < seen["local_progress"])).all()


def test_mixed_precision_does_not_round_the_averages(monkeypatch):
    """bfloat16 has three digits."""
    method, batch = bound(PublishedFlow()), chunk((6, 4))
    server, blocks = server_groups(method), len(method.route_names)
    monkeypatch.setattr(Flow, "local_probability", lambda self, groups, x: torch.full((len(x), blocks), 0.3))
    with torch.autocast("cpu", torch.bfloat16):
        seen = loop().train_clients(observed(method, server), server, batch).kept[OBSERVED]
    torch.testing.assert_close(seen["q_local"], torch.full((2, blocks), 0.3))
    torch.testing.assert_close(seen["deviation"], 0.09 * seen["local_progress"])


def test_several_labels_have_gradients_of_all_of_them():
    """Those of torch's binary cross-entropy, over every label of every example."""
    batch = with_tags(chunk((6, 4)))
    method = FedAvg()
    torch.manual_seed(0)
    method = method.bind(torch.nn.Sequential(torch.nn.Linear(FEATURES, TAGS)), MultiLabel(k=2))
    sums = gradient_sums(method, server_groups(method), batch, "uniform")
    backbone, total = method.modules["global"], 0
    for client, n in enumerate(batch.train.sizes):
        scores, y = backbone(batch.train.x[client, :n]), batch.train.y[client, :n].float()
        total = total + torch.nn.functional.binary_cross_entropy_with_logits(scores, y)
    grads = torch.autograd.grad(total, list(backbone.parameters()))
    torch.testing.assert_close(sums[HEAD:], flat(dict(enumerate(grads))), atol=1e-5, rtol=1e-4)


def test_models_are_found_by_what_the_method_trains():
    method, batch = bound(APFL()), chunk((5, 4))
    server = server_groups(method)
    update = loop(local_epochs=1).train_clients(observed(method, server), server, batch)
    distance = sum((update.kept["personal"][k] - p).square().flatten(1).sum(1) for k, p in server["global"].items())
    torch.testing.assert_close(update.kept[OBSERVED]["local_progress"], distance)
    assert "q_local" not in update.kept[OBSERVED]
    assert has_global_model(method)
    assert not has_global_model(bound(Local(1)))
    assert not has_global_model(bound(HypCluster()))
    assert has_global_model(bound(EvidenceFlow()))
