"""Instances that are a mapping: the loop treats every one of their tensors as it does a single one."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl import methods
from flow_pl.checks import check_backbone, check_fit
from flow_pl.engine.attacks import Backdoor
from flow_pl.engine.draw_check import check_draws
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients, predict_clients
from flow_pl.evaluation.convergence import gradient_sums
from flow_pl.methods import FedAvg, Flow
from flow_pl.methods.per_fedavg import halves
from flow_pl.methods.steps import Minibatch
from flow_pl.models import MLP
from flow_pl.models.routers import InstanceRouter, Router
from flow_pl.tasks import Classification
from flow_pl.utils.inputs import take
from tests.named_inputs import LENGTH, TOKENS, encoder, named_chunk
from tests.support import CLASSES, delta, flat, loop, minibatches, sgd

SIZES = (11, 7, 4, 1)
EXAMPLE = {"input_ids": torch.tensor([[3, 1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}


class LengthRouter(Router):
    """Routes by the length of a sentence."""

    sees_outputs = False

    def __init__(self, blocks):
        super().__init__()
        self.linear, self.count = nn.Linear(1, 2), len(blocks)

    def forward(self, x):
        q = self.linear(x["attention_mask"].float().mean(1, keepdim=True)).softmax(-1)
        return q.unsqueeze(1).expand(-1, self.count, 2)

    def bind(self, parameters, x):
        q = self.call(parameters, x)
        return lambda block, *tensors: q[:, block]


def bound(method, backbone=None):
    torch.manual_seed(1)
    method = method.bind(encoder() if backbone is None else backbone, Classification())
    check_fit(method, EXAMPLE, CLASSES, ())
    return method


def every_method():
    names = [name for name in methods.__all__ if isinstance(getattr(methods, name), type)]
    made = {n: getattr(methods, n) for n in names if issubclass(getattr(methods, n), methods.Method)}
    for other in ("Method", "FedBN"):  # which is for backbones with batch normalization
        made.pop(other)
    routed = functools.partial(Flow, router=LengthRouter)
    by_client = functools.partial(Flow, route_by="client")
    return {**made, "routed": routed, "hard": functools.partial(routed, routing="hard"), "by client": by_client}


def outcome(method, batch, **settings):
    """What a chunk sends and how it is evaluated, flat."""
    engine, server = loop(**settings), server_groups(method)
    update = engine.train_clients(method, server, batch)
    found = evaluate_clients(engine, method, server, batch)
    counts = torch.cat([t.sum(0).reshape(-1) for t in vars(found).values() if t is not None and t.is_floating_point()])
    return torch.cat([*(flat(group) for group in delta(update).values()), counts])


def test_vectorized_clients_equal_plain_loops():
    batch, method = named_chunk(SIZES), bound(FedAvg())
    base = flat(server_groups(method)["global"])
    expected = torch.zeros_like(base)
    for client, n in enumerate(SIZES):
        alone = copy.deepcopy(method.modules["global"])
        optimizer = sgd(list(alone.parameters()))
        for rows in minibatches(batch, client, epochs=2, batch_size=4):
            loss = F.cross_entropy(alone(take(batch.train.x, (client, rows))), batch.train.y[client, rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected += n * (flat(dict(alone.named_parameters())) - base)
    update = loop().train_clients(method, server_groups(method), batch)
    torch.testing.assert_close(flat(delta(update)["global"]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", every_method())
def test_any_method_gives_the_same_in_one_chunk_and_client_by_client(name):
    batch, method = named_chunk(SIZES, epochs=15), bound(every_method()[name]())
    whole = outcome(method, batch)
    alone = sum(outcome(method, batch.clients(i, i + 1)) for i in range(len(SIZES)))
    assert whole.isfinite().all()
    torch.testing.assert_close(whole, alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("real", "second"), [(4, [1, 3]), (1, [0, 2])])
def test_halves_of_a_minibatch_keep_features_and_labels_together(real, second):
    rows = torch.arange(4)
    minibatch = Minibatch({"input_ids": rows, "attention_mask": 10 * rows}, rows, rows < real)
    first_half, second_half = halves(minibatch)
    for half, expected in ((first_half, [0, 2]), (second_half, second)):
        assert half.y.tolist() == half.x["input_ids"].tolist() == expected
        assert half.x["attention_mask"].tolist() == [10 * row for row in expected]


def test_traced_steps_equal_eager_ones_bit_for_bit():
    batch, method = named_chunk(SIZES), bound(FedAvg())
    eager = loop(local_epochs=2, trace_after=None).train_clients(method, server_groups(method), batch)
    engine = loop(local_epochs=2, trace_after=1)
    traced = engine.train_clients(method, server_groups(method), batch)
    assert engine.engine.traced, "nothing was traced"
    assert torch.equal(flat(delta(eager)["global"]), flat(delta(traced)["global"]))


def test_a_trace_is_of_its_names():
    """Features of other names, of the same shapes, are not what a trace was made of."""
    batch, method = named_chunk((8, 8)), bound(FedAvg())
    engine = loop(trace_after=0)
    first = delta(engine.train_clients(method, server_groups(method), batch))
    x = batch.train.x
    batch.train.x = {"attention_mask": x["attention_mask"], "input_ids": x["input_ids"]}
    again = delta(engine.train_clients(method, server_groups(method), batch))
    assert torch.equal(flat(first["global"]), flat(again["global"]))


def test_evaluation_in_slices_and_predictions_are_those_of_each_instance():
    batch, method = named_chunk((6, 4)), bound(FedAvg())
    server = server_groups(method)
    evaluated = evaluate_clients(FederatedLoop(evaluation_batch_size=2), method, server, batch)
    predicted = predict_clients(FederatedLoop(evaluation_batch_size=2), method, server, batch)
    right = 0
    for client in range(2):
        outputs = method.modules["global"](take(batch.heldout.x, client))
        assert predicted.prediction[client].tolist() == outputs.argmax(1).tolist()
        right += int((outputs.argmax(1) == batch.heldout.y[client]).sum())
    assert int(evaluated.generalized.sum()) == right


def test_the_gradient_of_a_population_is_that_of_all_its_sentences():
    batch, method = named_chunk((6, 4)), bound(FedAvg())
    sums = gradient_sums(method, server_groups(method), batch, "examples")
    backbone = method.modules["global"]
    losses = [
        F.cross_entropy(backbone(take(batch.train.x, (c, slice(n)))), batch.train.y[c, :n]) * n
        for c, n in enumerate((6, 4))
    ]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(sum(losses), list(backbone.parameters()))])
    torch.testing.assert_close(sums[5:], expected, atol=1e-5, rtol=1e-4)


def test_a_backbone_that_takes_the_mapping_passes_the_checks():
    method = bound(FedAvg())
    check_draws(method, EXAMPLE)
    check_backbone(method, EXAMPLE, side_by_side=True)


class Mixing(nn.Module):
    """Subtracts the mean over the sentences of a minibatch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(TOKENS, 5)

    def forward(self, x):
        h = self.table(x["input_ids"]).mean(1)
        return h - h.mean(0)


class Writing(nn.Module):
    """Changes the mask that others read."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(TOKENS, 5)

    def forward(self, x):
        return self.table(x["input_ids"]).mul(x["attention_mask"].sub_(1).unsqueeze(-1)).sum(1)


@pytest.mark.parametrize(
    ("block", "message"), [(Mixing, "mixes instances"), (Writing, "'0' .* changes the data in place")]
)
def test_the_checks_see_every_feature(block, message):
    method = bound(FedAvg(), nn.Sequential(block(), nn.Linear(5, CLASSES)))
    with pytest.raises(ConfigurationError, match=message):
        check_backbone(method, EXAMPLE, side_by_side=True)


def asks_for_segments():
    class Segments(nn.Module):
        def forward(self, x):
            return x["token_type_ids"].float()

    return nn.Sequential(Segments(), nn.Linear(LENGTH, CLASSES))


NAMES = r"input_ids \[4\] \(torch.int64\), attention_mask \[4\] \(torch.int64\)"


@pytest.mark.parametrize(
    ("method", "backbone", "message"),
    [
        (FedAvg(), MLP(LENGTH, CLASSES), rf"several features by name \({NAMES}\), which MLP cannot take"),
        (FedAvg(), asks_for_segments(), r"it uses 'token_type_ids', which is not among them"),
        (Flow(router=InstanceRouter), encoder(), r"the router is InstanceRouter, .* or several tensors: use FeatureR"),
        (Flow(router=LengthRouter, route_by="client"), encoder(), r"route_by is client, .* set it to instance"),
    ],
)
def test_what_takes_one_tensor_is_refused_before_training(method, backbone, message):
    with pytest.raises(ConfigurationError, match=message):
        bound(method, backbone)


def test_an_attack_on_one_tensor_is_refused():
    with pytest.raises(ConfigurationError, match=r"several inputs by name .* Backdoor puts its trigger into one"):
        Backdoor().check(EXAMPLE, CLASSES, ())
