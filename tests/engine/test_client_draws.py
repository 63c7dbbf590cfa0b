"""What clients draw in a step: torch's distributions, and the same numbers alone and side by side."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl.data.batch import ClientBatch
from flow_pl.engine.client_draws import ClientDraws
from flow_pl.engine.draw_check import check_draws
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedAvg, Flow, PartialFed, PerFedAvg
from flow_pl.models import Dropout
from flow_pl.utils.counter_rng import step_keys
from flow_pl.utils.unit_stream import UnitStream, UnitTable, drawing_from
from tests.support import CLASSES, FEATURES, bound, chunk, delta, flat, loop

CLIENTS = 3
KEYS = step_keys(torch.arange(CLIENTS), 0, 2)


def drawn(fn, x, key=KEYS[0, 0], table=None):
    with ClientDraws(UnitStream(key, UnitTable() if table is None else table)):
        return fn(x)


def side_by_side(fn, x, keys=KEYS[0]):
    return torch.vmap(lambda key, x: drawn(fn, x, key))(keys, x.repeat(len(keys), *[1] * x.ndim))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def filled(name):
    """An empty tensor filled in place, as torchvision's StochasticDepth does it."""
    return lambda x: getattr(torch.empty(4, 6), name)()


IMAGE, TOKENS, VECTORS = torch.ones(4, 6, 3, 3), torch.ones(4, 5, 8), torch.ones(4, 6)
DRAWS = {
    "Dropout": (nn.Dropout(0.3), VECTORS),
    "Dropout in place": (lambda x: nn.Dropout(0.3, inplace=True)(x * 1), VECTORS),
    "Dropout1d": (nn.Dropout1d(0.3), TOKENS),
    "Dropout2d": (nn.Dropout2d(0.3), IMAGE),
    "Dropout3d": (nn.Dropout3d(0.3), IMAGE[..., None]),
    "AlphaDropout": (nn.AlphaDropout(0.3), VECTORS),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(0.3), IMAGE),
    "functional": (partial(F.dropout, p=0.3), VECTORS),
    "torch.dropout": (lambda x: torch.dropout(x, 0.3, True), VECTORS),
    "scaled_dot_product_attention": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3), TOKENS),
    "MultiheadAttention": (Attention(), torch.randn(4, 5, 8)),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True), torch.randn(4, 5, 8)),
    "rand": (lambda x: torch.rand(4, 6), VECTORS),
    "rand of a size": (lambda x: torch.rand(size=x.shape), VECTORS),
    "randn": (lambda x: torch.randn((4, 6)), VECTORS),
    "rand_like": (torch.rand_like, VECTORS),
    "randn_like": (torch.randn_like, VECTORS),
    "bernoulli": (lambda x: torch.bernoulli(0.3 * x), VECTORS),
    "bernoulli_": (filled("bernoulli_"), VECTORS),
    "uniform_": (filled("uniform_"), VECTORS),
    "normal_": (filled("normal_"), VECTORS),
    "gumbel_softmax": (F.gumbel_softmax, VECTORS),
}


@pytest.mark.parametrize("name", DRAWS)
def test_clients_draw_side_by_side_what_they_draw_alone(name):
    """And other clients other numbers, as other steps do; nothing is taken from torch's generator."""
    fn, x = DRAWS[name]
    state = torch.get_rng_state()
    together = side_by_side(fn, x)
    for client in range(CLIENTS):
        torch.testing.assert_close(together[client], drawn(fn, x, KEYS[0, client]), atol=1e-6, rtol=1e-5)
        assert not torch.equal(together[client], together[client - 1])
    assert not torch.equal(together[0], drawn(fn, x, KEYS[1, 0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_kept_table_changes_nothing():
    """Draws before it has grown, and after it has."""
    table = UnitTable()
    first = drawn(nn.Dropout(0.5), IMAGE, table=table)
    table.grow(torch.device("cpu"))
    assert len(table.hashes) == IMAGE.numel()
    assert torch.equal(drawn(nn.Dropout(0.5), IMAGE, table=table), first)
    longer = drawn(lambda x: F.dropout(F.dropout(x)), IMAGE, table=table)
    assert torch.equal(drawn(lambda x: F.dropout(F.dropout(x)), IMAGE), longer)


def test_the_projects_dropout_draws_what_torchs_does():
    """With functions replaced or not; outside of a step it is torch's."""
    expected = drawn(nn.Dropout(0.3), VECTORS)
    for replaced in (True, False):
        stream = UnitStream(KEYS[0, 0], UnitTable())
        with drawing_from(stream), ClientDraws(stream) if replaced else nullcontext():
            assert torch.equal(Dropout(0.3)(VECTORS), expected)
        assert stream.table.asked == VECTORS.numel()
        assert not stream.table.by_functions
    assert Dropout(0.3).eval()(VECTORS) is VECTORS


def test_every_call_draws_anew():
    first, second = drawn(lambda x: torch.stack([F.dropout(x), F.dropout(x)]), torch.ones(1000))
    assert 400 < (first == second).sum() < 600


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_is_dropped_and_the_rest_scaled(p, dtype):
    """Within four standard deviations; the gradient goes where the value goes."""
    x = torch.full((400, 500), 2.0, dtype=dtype, requires_grad=True)
    out = drawn(nn.Dropout(p), x)
    assert out.dtype == dtype
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / x.numel()))
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - p) if p < 1 else 0))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0] * 2, out)


@pytest.mark.parametrize("shape", [(50, 40, 7), (50, 40, 3, 3), (50, 40, 2, 2, 2)])
def test_whole_channels_are_dropped(shape):
    layer = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}[len(shape)](0.3)
    out = drawn(layer, torch.ones(shape)).flatten(2)
    assert (out == out[..., :1]).all()
    assert 0.2 < (out[..., 0] == 0).float().mean() < 0.4


def test_without_a_batch_channels_come_first():
    for layer, shape in ((nn.Dropout1d(0.5), (64, 9)), (nn.Dropout3d(0.5), (64, 2, 2, 2))):
        out = drawn(layer, torch.ones(shape)).flatten(1)
        assert (out == out[:, :1]).all()
        assert 0 < (out[:, 0] == 0).sum() < 64


@pytest.mark.parametrize("layer", [nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2)])
def test_alpha_dropout_keeps_mean_and_variance(layer):
    torch.manual_seed(0)
    out = drawn(layer, torch.randn(500, 400))
    assert abs(out.mean()) < 0.02
    assert abs(out.var() - 1) < 0.02


def test_distributions():
    for fn, mean, variance in ((torch.rand_like, 0.5, 1 / 12), (torch.randn_like, 0.0, 1.0)):
        out = drawn(fn, torch.ones(200_000))
        assert abs(out.mean() - mean) < 0.01
        assert abs(out.var() - variance) < 0.01
    assert abs(drawn(lambda x: torch.bernoulli(x * 0.2), torch.ones(100_000)).mean() - 0.2) < 0.006
    # a draw of the Gumbel-softmax is largest where its logit says, as often as the softmax says
    logits = torch.tensor([0.0, 1.0, 2.0])
    taken = drawn(lambda x: F.gumbel_softmax(x, hard=True), logits.expand(100_000, 3))
    torch.testing.assert_close(taken.mean(0), logits.softmax(-1), atol=0.008, rtol=0)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril().bool()}], ids=str)
def test_attention_without_drops_is_torchs(options):
    """With a share so small that nothing is dropped."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 8).unbind()
    out = drawn(lambda q: F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9, **options), q)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, **options))


def test_in_evaluation_nothing_is_drawn():
    for layer in (nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Dropout2d(0.5)):
        assert drawn(layer.eval(), IMAGE) is IMAGE


class Noise(nn.Module):
    """Noise on its inputs in training."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


def deep(dropout=0.4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.AlphaDropout(dropout), nn.ReLU(inplace=True), nn.Dropout(dropout), Noise(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


METHODS = {
    "fedavg": FedAvg,
    "flow": Flow,
    "cross": partial(Flow, split="cross"),
    "per_fedavg": PerFedAvg,
    "partial": PartialFed,
}
TRACED = ("fedavg", "partial")
"""Those traced in the quick suite; the others trace more steps."""


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"trace_after": None}) for name in METHODS),
        *(pytest.param(name, {"trace_after": 2}, marks=[] if name in TRACED else pytest.mark.slow) for name in METHODS),
        *(pytest.param(name, {"trace_after": 0}, marks=pytest.mark.slow) for name in METHODS),
    ],
    ids=str,
)
def test_clients_train_and_are_personalized_in_any_company(name, settings):
    """All at once, in pieces and one by one; traced and not. Dropout is in the backbone and in the router."""
    method, batch = bound(METHODS[name](), deep()), chunk((9, 9, 7, 2), epochs=4)
    server = server_groups(method)
    reference = loop(local_epochs=2, trace_after=None)
    expected = reference.train_clients(method, server, batch)
    evaluated = evaluate_clients(reference, method, server, batch)
    pieces = [(0, 4)] if settings["trace_after"] is not None else []
    for cuts in (pieces, [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 3), (3, 4)]):
        engine = loop(local_epochs=2, **settings)
        sums = {}
        for start, stop in cuts:
            piece = batch.clients(start, stop)
            for group, values in delta(engine.train_clients(method, server, piece)).items():
                sums[group] = sums.get(group, 0) + flat(values)
            one = evaluate_clients(engine, method, server, piece)
            torch.testing.assert_close(
                one.personalized_loss, evaluated.personalized_loss[start:stop], rtol=1e-5, atol=1e-5
            )
        for group, total in sums.items():
            torch.testing.assert_close(total, flat(delta(expected)[group]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dropout", [nn.Dropout, Dropout, None])
def test_a_client_alone_goes_on_as_it_began(dropout):
    """What the first step has shown of the draws, the others keep to; the numbers are those of many clients."""
    layers = [nn.Linear(FEATURES, 8), *([] if dropout is None else [dropout(0.4)]), nn.Linear(8, CLASSES)]
    method, batch = bound(FedAvg(), nn.Sequential(*layers)), chunk((40, 40), epochs=4)
    server = server_groups(method)
    engine = loop(trace_after=None)
    together = flat(delta(engine.train_clients(method, server, batch))["global"])
    (step,) = method.phases[0].steps
    assert engine.engine.draws(step) == (dropout is not None)
    alone = loop(trace_after=None)
    updates = [flat(delta(alone.train_clients(method, server, batch.clients(i, i + 1)))["global"]) for i in (0, 1)]
    torch.testing.assert_close(sum(updates), together, atol=2e-5, rtol=1e-4)


def test_dropout_is_drawn_at_all():
    """Or the test above would show nothing."""
    batch = chunk((9, 9), epochs=4)
    found = []
    for backbone in (deep(), deep(1e-9)):
        method = bound(FedAvg(), backbone)
        found.append(flat(delta(loop().train_clients(method, server_groups(method), batch))["global"]))
    assert (found[0] - found[1]).abs().max() > 0.01


def test_another_key_is_another_dropout():
    method, batch = bound(FedAvg(), deep()), chunk((9,), epochs=4)
    other = ClientBatch(**{**vars(batch), "key": batch.key + 1})
    updates = [flat(delta(loop().train_clients(method, server_groups(method), b))["global"]) for b in (batch, other)]
    assert (updates[0] - updates[1]).abs().max() > 0.01


class Always(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3)


class Categorical(nn.Module):
    def forward(self, x):
        return x + torch.randint(3, x.shape) if self.training else x


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x + torch.rand(x.shape, generator=self.generator) if self.training else x


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, FEATURES, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(1))[0].squeeze(1)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Always(), r"block 'global.1' \(Always\) draws random numbers \(bernoulli\) in evaluation too"),
        (Categorical(), r"block 'global.1' \(Categorical\) draws random numbers by randint"),
        (OwnGenerator(), r"block 'global.1' \(OwnGenerator\) draws random numbers by rand"),
        (Recurrent(), r"block 'global.1.lstm' \(LSTM\) draws random numbers by bernoulli.*Use nn.Dropout between"),
    ],
)
def test_what_cannot_be_drawn_for_each_client_is_refused_by_name(block, message):
    method = bound(FedAvg(), nn.Sequential(nn.Linear(FEATURES, FEATURES), block, nn.Linear(FEATURES, CLASSES)))
    with pytest.raises(ConfigurationError, match=message):
        check_draws(method, torch.zeros(1, FEATURES))


def test_the_check_leaves_everything_as_it_was():
    backbone = deep().eval()
    backbone.register_buffer("seen", torch.zeros(2))
    method = bound(Flow(), backbone)
    method.modules["global"][1].train()
    before, state = {k: v.clone() for k, v in backbone.state_dict().items()}, torch.get_rng_state()
    check_draws(method, torch.zeros(1, FEATURES))
    assert [module.training for module in method.modules["global"]] == [False, True, False, False, False, False]
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
