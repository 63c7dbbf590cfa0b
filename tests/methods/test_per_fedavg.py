"""Per-FedAvg against an independent reference, and its inner gradient wherever a step runs."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from flow_pl.checks import check_fit
from flow_pl.engine.gradients import GradientEngine
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedAvg, Minibatch, PerFedAvg
from flow_pl.methods.per_fedavg import halves
from flow_pl.models import EMNISTCNN, LSTM, MLP, NextCharacterLSTM, NextWordLSTM, ResNet18
from flow_pl.tasks import Classification, NextToken
from flow_pl.utils.counter_rng import step_keys
from tests.methods.helpers import TASKS, client_of, on_task
from tests.support import bound, chunk, delta, flat, loop, minibatches, network, sgd, train_alone

SIZES, ALPHA = (11, 9, 1), 0.3
TOKENS, CLASSES = 7, 3


def loss_of(model, batch, client, rows):
    return F.cross_entropy(model(batch.train.x[client, rows]), batch.train.y[client, rows])


def reference(backbone, batch, client, epochs, batch_size):
    """Algorithm 1, first order: the gradient at a stepped copy of the model moves the model itself."""
    optimizer = sgd(list(backbone.parameters()))
    for rows in minibatches(batch, client, epochs, batch_size):
        first, second = (rows, rows) if len(rows) == 1 else (rows[0::2], rows[1::2])
        stepped = copy.deepcopy(backbone)
        inner = torch.optim.SGD(stepped.parameters(), lr=ALPHA)
        loss_of(stepped, batch, client, first).backward()
        inner.step()
        inner.zero_grad()
        loss_of(stepped, batch, client, second).backward()
        for p, q in zip(backbone.parameters(), stepped.parameters(), strict=True):
            p.grad = q.grad
        optimizer.step()
    return backbone


@pytest.mark.parametrize(
    ("batch_size", "trace_after"),
    [(4, None), (3, None), (1, None), (3, 0), *(pytest.param(size, 0, marks=pytest.mark.slow) for size in (4, 1))],
)
def test_clients_send_what_the_paper_says(batch_size, trace_after):
    """Ragged clients: minibatches partly filled, down to a single example; all by vmap, then the last ones alone."""
    method, batch = bound(PerFedAvg(alpha=ALPHA)), chunk(SIZES)
    server = server_groups(method)
    expected = torch.zeros_like(flat(server["global"]))
    for client, n in enumerate(SIZES):
        alone = reference(copy.deepcopy(method.modules["global"]), batch, client, 2, batch_size)
        expected += n * (flat(dict(alone.named_parameters())) - flat(server["global"]))
    update = loop(batch_size, trace_after=trace_after).train_clients(method, server, batch)
    torch.testing.assert_close(flat(delta(update)["global"]), expected, atol=1e-5, rtol=1e-5)
    assert update.kept == {}, "it is stateless"


def test_the_personal_model_takes_plain_steps_of_alpha():
    """Not the client optimizer's, which has momentum and another learning rate; the server's model stays."""
    method, batch = bound(PerFedAvg(alpha=ALPHA)), chunk(SIZES, heldout=20)
    result = evaluate_clients(loop(local_epochs=1, personal_epochs=2), method, server_groups(method), batch)
    w_g = method.modules["global"]
    for client in range(len(SIZES)):
        x, y = batch.heldout.x[client], batch.heldout.y[client]
        plain = lambda params: torch.optim.SGD(params, lr=ALPHA)  # noqa: E731
        tuned = train_alone(copy.deepcopy(w_g), batch, client, 2, 4, optimizer=plain)
        for found, model in ((result.generalized_loss, w_g), (result.personalized_loss, tuned)):
            loss = F.cross_entropy(model(x), y, reduction="sum")
            torch.testing.assert_close(found[client], loss, rtol=1e-4, atol=1e-5)


def test_alpha_0_on_single_examples_is_fedavg():
    batch, updates = chunk(SIZES), []
    for method in (PerFedAvg(alpha=0.0), FedAvg()):
        method = bound(method)
        updates.append(flat(delta(loop(batch_size=1).train_clients(method, server_groups(method), batch))["global"]))
    torch.testing.assert_close(*updates)
    result = evaluate_clients(loop(), bound(PerFedAvg(alpha=0.0)), server_groups(method), batch)
    assert torch.equal(result.personalized_loss, result.generalized_loss)


@pytest.mark.parametrize(("size", "real"), [(1, 0), (1, 1), (2, 1), (2, 2), (5, 0), (5, 1), (5, 4), (5, 5), (6, 3)])
def test_both_halves_have_real_examples(size, real):
    """Every real example is in one of them, and in both only where it is the only one."""
    rows = torch.arange(size)
    first, second = halves(Minibatch(rows + 10, rows, rows < real))
    seen = [half.y[half.mask].tolist() for half in (first, second)]
    assert all(torch.equal(half.x, half.y + 10) for half in (first, second))
    if real == 1:
        assert seen == [[0], [0]]
    else:
        assert sorted(seen[0] + seen[1]) == list(range(real))
        assert real == 0 or all(seen)


def test_traced_steps_draw_dropout_anew_as_eager_ones_do():
    """Bit for bit; two steps on the same minibatch from the same weights get different gradients."""
    method, batch = bound(PerFedAvg(alpha=ALPHA), network(dropout=0.5)), chunk((16, 16, 16), epochs=4)
    server = server_groups(method)
    eager = loop(local_epochs=4, trace_after=None).train_clients(method, server, batch)
    traced = loop(local_epochs=4, trace_after=2)
    update = traced.train_clients(method, server, batch)
    assert traced.engine.traced, "nothing was traced"
    assert torch.equal(flat(delta(eager)["global"]), flat(delta(update)["global"]))

    engine, (step,) = GradientEngine(0), method.phases[0].steps
    method.modules["global"].train()
    views = {"global": {name: p.expand(2, *p.shape).clone() for name, p in server["global"].items()}}
    x, y = (t[:1, :8].expand(2, 8, *t.shape[2:]) for t in (batch.train.x, batch.train.y))
    minibatch = Minibatch(x, y, torch.ones(2, 8, dtype=torch.bool))
    keys = step_keys(batch.key[:2], 0, 2)
    losses = torch.cat([engine(step, views, {"global"}, minibatch, None, key)[1] for key in keys])
    assert len(set(losses.tolist())) == 4, "clients and steps draw for themselves"


BACKBONES = {
    "mlp": lambda: MLP((1, 8, 8), CLASSES, (5,)),
    "cnn": lambda: EMNISTCNN(CLASSES, (1, 8, 8), dropout=(0.0, 0.0)),
    "resnet": lambda: ResNet18(CLASSES, in_channels=1, groups=2),
    "words": lambda: NextWordLSTM(TOKENS, embedding=4, hidden=6, projection=3),
    "characters": lambda: NextCharacterLSTM(TOKENS, embedding=3, hidden=4),
}


def step_on(name, alpha=ALPHA):
    """The step of a bound method, its parameters, and minibatches of two clients, one of them partly filled."""
    torch.manual_seed(0)
    method, language = PerFedAvg(alpha=alpha), name in ("words", "characters")
    method = method.bind(BACKBONES[name](), NextToken() if language else Classification())
    x = torch.randint(4, TOKENS, (2, 5, 6)) if language else torch.rand(2, 5, 1, 8, 8)
    y = torch.randint(1, TOKENS, (2, 5, 6)) if language else torch.randint(CLASSES, (2, 5))
    check_fit(method, x[0], TOKENS if language else CLASSES)
    (step,) = method.phases[0].steps
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    return step, server_groups(method)["global"], Minibatch(x, y, mask), method


def gradients(step, parameters, minibatch, alone):
    """Of the two clients: side by side, or one by one without vmap."""
    engine = GradientEngine(None)
    stacked = {name: p.expand(2, *p.shape) for name, p in parameters.items()}
    if not alone:
        return engine(step, {"global": stacked}, {"global"}, minibatch, None)[0]
    single = [
        engine(step, {"global": parameters}, set(), Minibatch(*(t[i : i + 1] for t in minibatch)), None)[0]
        for i in range(2)
    ]
    return [torch.cat(pair) for pair in zip(*single, strict=True)]


@pytest.mark.parametrize("alone", [False, True], ids=["vmap", "alone"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_takes_the_first_order_gradient(name, alone):
    """Against autograd on copies of the model; nothing falls back to a loop over clients."""
    step, parameters, minibatch, method = step_on(name)
    backbone = method.modules["global"].train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(step, parameters, minibatch, alone)
    for client, n in enumerate((5, 3)):
        stepped = copy.deepcopy(backbone)
        for rows in (range(0, n, 2), range(1, n, 2)):
            stepped.zero_grad()
            x, y = minibatch.x[client, list(rows)], minibatch.y[client, list(rows)]
            method.objective.loss(stepped(x), y, torch.ones(len(x), dtype=torch.bool)).backward()
            if rows.start == 0:
                torch.optim.SGD(stepped.parameters(), lr=ALPHA).step()
        for g, p in zip(found, stepped.parameters(), strict=True):
            torch.testing.assert_close(g[client], p.grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("alone", [False, True], ids=["vmap", "alone"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mlp", torch.bfloat16), ("mlp", torch.float16), ("words", torch.bfloat16), ("words", torch.float16)],
)
def test_autocast_changes_little(name, alone, dtype):
    """The inner step is in the lower precision too, the weights it starts from are not."""
    step, parameters, minibatch, method = step_on(name)
    method.modules["global"].train()
    exact = gradients(step, parameters, minibatch, alone)
    with torch.autocast("cpu", dtype):
        found = gradients(step, parameters, minibatch, alone)
    assert all(g.dtype == torch.float32 for g in found)
    for g, e in zip(found, exact, strict=True):
        assert not torch.equal(g, e)
        torch.testing.assert_close(g, e, atol=0.02 * float(e.abs().max()) + 1e-4, rtol=0.05)


def test_small_inner_gradients_survive_float16():
    """8e-8, what one instance sends back to the first block, has not two digits in float16; its loss is scaled up."""
    method, n = PerFedAvg(), 64
    method = method.bind(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2)), Classification())
    w = {"0.weight": torch.ones(1, 1), "0.bias": torch.zeros(1), "1.weight": torch.tensor([[0.0], [1e-5]])}
    w["1.bias"] = torch.zeros(2)
    minibatch = Minibatch(torch.rand(n, 1), torch.ones(n, dtype=torch.long), torch.ones(n, dtype=torch.bool))
    exact = method._inner_gradient(w, minibatch)
    with torch.autocast("cpu", torch.float16):
        found = method._inner_gradient(w, minibatch)
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0.0)


def test_an_lstm_under_a_gradient_under_vmap_runs_its_own_recurrence():
    block, x = LSTM(3, 4), torch.randn(2, 5, 6, 3)
    total = lambda x: block(x).square().sum()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's kernel would be called client by client, with a warning
        found = vmap(grad(total))(x)
    x.requires_grad_()
    total(x.flatten(0, 1)).backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_are_trained(task):
    update, result = on_task(PerFedAvg(alpha=0.1), task)
    assert all(client_of(update.difference["global"], 0)[name].abs().sum() > 0 for name in update.difference["global"])
    assert (result.personalized_loss < result.generalized_loss).all()


def test_bad_settings_are_refused():
    with pytest.raises(ConfigurationError, match=r"alpha is -0.1, expected 0 or more"):
        PerFedAvg(alpha=-0.1)
