"""Language models in blocks, routed per token and, in a cell, per time step."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn, vmap
from torch.func import functional_call

from flow_pl.checks import check_fit
from flow_pl.data.batch import FOLD_BIT, FOLDS, GLOBAL, LOCAL, ClientBatch, Examples
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients, predict_clients
from flow_pl.evaluation.convergence import OBSERVED, observed
from flow_pl.evaluation.counts import count_client, predict_client
from flow_pl.methods import FedAvg, Flow, Minibatch
from flow_pl.models import LSTM, MLP, NextCharacterLSTM, NextWordLSTM
from flow_pl.models.routed import RoutedModel
from flow_pl.models.routers import SequenceRouter
from flow_pl.tasks import Classification, MultiLabel, NextToken
from tests.support import PublishedFlow, delta, flat, loop

TOKENS, T = 11, 5


def small_words():
    torch.manual_seed(0)
    return NextWordLSTM(TOKENS, embedding=4, hidden=6, projection=3)


def router(blocks):
    return SequenceRouter(blocks, hidden=(5, 4), hidden_behind=(6, 4), dropout=0.0)


def sequences(clients, n, seed=0):
    """Sentences of different lengths: padding is token 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(4, TOKENS, (clients, n, T), generator=generator)
    y = torch.randint(1, TOKENS, (clients, n, T), generator=generator)
    lengths = torch.randint(2, T + 1, (clients, n, 1), generator=generator)
    padding = torch.arange(T) >= lengths
    return x.masked_fill(padding, 0), y.masked_fill(padding, 0)


def batch(sizes, epochs=1):
    def examples(n, seed):
        x, y = sequences(len(sizes), n, seed)
        return x, y

    n = max(sizes)
    x, y = examples(n, 0)
    mask = torch.arange(n) < torch.tensor(sizes)[:, None]
    part = torch.where(torch.arange(n) % 2 == 0, LOCAL, GLOBAL) | torch.arange(n) % FOLDS << FOLD_BIT
    part = part.to(torch.uint8).expand(len(sizes), n) * mask
    order = torch.arange(n).expand(len(sizes), 2 * epochs, n).clone()
    hx, hy = examples(4, 1)
    held = Examples(hx, hy, torch.ones(len(sizes), 4, dtype=torch.bool), (4,) * len(sizes))
    clients = torch.arange(len(sizes))
    return ClientBatch(clients, Examples(x, y, mask, tuple(sizes)), part, order, held, 0, clients)


def bound(method, backbone=None):
    method = method.bind(small_words() if backbone is None else backbone, NextToken())
    check_fit(method, sequences(1, 1)[0][0], TOKENS)
    return method


def test_published_parameter_counts():
    for model, count in ((NextWordLSTM(), 4_053_428), (NextCharacterLSTM(), 822_570)):
        assert sum(p.numel() for p in model.parameters()) == count


def test_autocast_needs_no_fused_kernel(monkeypatch):
    """Where oneDNN has none for half precision, a single client's LSTM runs its own recurrence."""
    torch.manual_seed(0)
    lstm, x = LSTM(3, 4), torch.randn(2, 5, 3)
    exact = lstm(x)
    monkeypatch.setattr("flow_pl.models.recurrent.has_kernel", lambda x: False)
    monkeypatch.setattr(torch, "lstm", None)
    with torch.autocast("cpu", torch.bfloat16):
        found = lstm(x)
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)


def test_lstm_equals_torchs_in_both_of_its_forms():
    """Alone it runs the fused kernel, under vmap its own recurrence."""
    ours, theirs = LSTM(3, 4), nn.LSTM(3, 4, batch_first=True)
    theirs.load_state_dict({f"{name}_l0": p for name, p in ours.state_dict().items()})
    x = torch.randn(2, 6, 7, 3)
    expected = torch.stack([theirs(one)[0] for one in x])
    torch.testing.assert_close(torch.stack([ours(one) for one in x]), expected)
    torch.testing.assert_close(torch.vmap(ours)(x), expected)


def test_gradients_of_many_lstms_are_those_of_torchs():
    """Inputs, weights and biases of three clients, one sequence shared by all of them too."""
    ours, theirs = LSTM(3, 4), nn.LSTM(3, 4, batch_first=True)
    weights = {name: torch.randn(3, *p.shape, requires_grad=True) for name, p in ours.named_parameters()}
    for shared in (False, True):
        x = torch.randn(*(() if shared else (3,)), 6, 7, 3, requires_grad=True)
        outputs = vmap(lambda w, one: functional_call(ours, w, (one,)), in_dims=(0, None if shared else 0))(weights, x)
        target = torch.randn_like(outputs)
        found = torch.autograd.grad((outputs * target).sum(), [x, *weights.values()])
        expected = []
        for client in range(3):
            one = {f"{name}_l0": p[client] for name, p in weights.items()}
            expected.append(functional_call(theirs, one, (x if shared else x[client],))[0])
        torch.testing.assert_close(outputs, torch.stack(expected))
        expected = torch.autograd.grad((torch.stack(expected) * target).sum(), [x, *weights.values()])
        torch.testing.assert_close(found, expected)


def test_many_lstms_under_autocast():
    """In bfloat16, which holds some three digits; the weights' gradients are float32 all the same."""
    ours, x = LSTM(3, 4), torch.randn(2, 6, 7, 3)
    weights = {name: p.detach().expand(2, *p.shape).clone().requires_grad_() for name, p in ours.named_parameters()}

    def gradients():
        outputs = vmap(lambda w, one: functional_call(ours, w, (one,)))(weights, x)
        return outputs.float(), *torch.autograd.grad(outputs.float().square().sum(), list(weights.values()))

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients()
    assert {g.dtype for g in found} == {torch.float32}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


def reference(backbone, local, psi, x):
    """The routed model, token by token and step by step, by nn.LSTMCell."""

    def cell(weights):
        made = nn.LSTMCell(4, 6)
        made.load_state_dict({name: weights[f"lstm.{name}"] for name in made.state_dict()})
        return made

    def mlp(name, features):
        outputs, exits = features, []
        module = getattr(psi, name) if name == "behind" else psi.cells[0]
        for layer in module.layers:
            outputs = layer(outputs).relu()
            exits.append(outputs)
        return exits, module.heads

    w_g = dict(backbone.named_parameters())
    first, second = cell(w_g), cell(local)
    h = c = torch.zeros(len(x), 6)
    logits, routes = [], []
    for t in range(x.shape[1]):
        e = w_g["embedding.weight"][x[:, t]]
        (h_g, c_g), (h_l, c_l) = first(e, (h, c)), second(e, (h, c))
        hidden, heads = mlp("cells", torch.cat([e, h_g, h_l], -1))
        q_cell = heads[0](hidden[1]).softmax(-1)  # one exit, on the last layer
        h, c = (q_cell[:, :1] * g + q_cell[:, 1:] * w for g, w in ((h_g, h_l), (c_g, c_l)))
        out_g, out_l = (h @ w["linear.weight"].T + w["linear.bias"] for w in (w_g, local))
        hidden, heads = mlp("behind", torch.cat([out_g, out_l], -1))
        q_linear, q_head = (heads[i](hidden[i]).softmax(-1) for i in range(2))
        z = q_linear[:, :1] * out_g + q_linear[:, 1:] * out_l
        end_g, end_l = (z @ w["head.weight"].T + w["head.bias"] for w in (w_g, local))
        logits.append(q_head[:, :1] * end_g + q_head[:, 1:] * end_l)
        routes.append(torch.stack([q_cell, q_linear, q_head], 1))
    return torch.stack(logits, 1), torch.stack(routes, 1)


def test_routed_lstm_equals_a_loop_over_steps():
    method = bound(PublishedFlow(router=router))
    model = method.model
    w_g = {name: p.detach() for name, p in model.backbone.named_parameters()}
    local = {name: p + 0.5 * torch.randn_like(p) for name, p in model.local_copy(w_g).items()}
    x = sequences(1, 6)[0][0]
    with torch.no_grad():
        outputs, q = model.routed(x, w_g, local, method.router.eval().bind(None, x))
        expected, routes = reference(model.backbone, local, method.router, x)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(q, routes)


def test_tokens_of_one_sentence_take_different_ways():
    """A router whose cell exit looks at the embedding alone sends one word left and another right."""
    model = RoutedModel(small_words())
    w_g = {name: p.detach() for name, p in model.backbone.named_parameters()}
    local = model.local_copy({name: 2 * p for name, p in w_g.items()})
    mark = w_g["embedding.weight"][7]

    def route(block, inputs, on_global, on_local):
        if block:
            return torch.tensor([1.0, 0.0]).expand(*on_global.shape[:-1], 2)
        to_local = (inputs == mark).all(-1, keepdim=True).float()
        return torch.cat([1 - to_local, to_local], -1)

    x = torch.tensor([[5, 7, 5, 7, 5]])
    outputs, q = model.routed(x, w_g, local, route, hard=True)
    assert q[0, :, 0, 1].tolist() == [0, 1, 0, 1, 0]
    assert not torch.allclose(outputs, model.plain(x, w_g))


def test_flow_on_sequences_is_the_same_in_any_chunk():
    method = bound(PublishedFlow(router=router, split="parts"))
    whole = batch((6, 5, 3))
    server = server_groups(method)
    together = loop(local_epochs=1).train_clients(method, server, whole)
    evaluated = evaluate_clients(loop(local_epochs=1), method, server, whole)
    for name in ("global", "router"):
        alone = sum(
            flat(delta(loop(local_epochs=1).train_clients(method, server, _one(whole, i)))[name]) for i in range(3)
        )
        torch.testing.assert_close(flat(delta(together)[name]), alone, atol=1e-5, rtol=1e-4)
    for i in range(3):
        one = evaluate_clients(loop(local_epochs=1), method, server, _one(whole, i))
        assert torch.equal(one.personalized, evaluated.personalized[i : i + 1])
        torch.testing.assert_close(one.personalized_loss, evaluated.personalized_loss[i : i + 1])
    assert evaluated.routed_local.shape == (3, 3)
    assert torch.equal(evaluated.routed, evaluated.count), "decisions are counted per token, padding is not"
    assert torch.equal(evaluated.count, (whole.heldout.y != 0).sum((1, 2)).float())


def _one(batch, i):
    def pick(e):
        return Examples(e.x[i : i + 1], e.y[i : i + 1], e.mask[i : i + 1], e.sizes[i : i + 1])

    return ClientBatch(
        batch.client[i : i + 1],
        pick(batch.train),
        batch.part[i : i + 1],
        batch.order[i : i + 1],
        pick(batch.heldout),
        0,
        batch.key[i : i + 1],
    )


def test_embedding_table_moves_in_the_global_step_alone():
    method = bound(PublishedFlow(router=router))
    groups, _ = loop(local_epochs=1).run(method, server_groups(method), batch((6, 5)), training=False)
    assert "embedding.weight" not in groups.groups["local"]
    update = loop(local_epochs=1).train_clients(method, server_groups(method), batch((6, 5)))
    assert delta(update)["global"]["embedding.weight"].abs().sum() > 0


def test_next_token_loss_and_accuracy_of_fedavg():
    method = bound(FedAvg())
    data = batch((6, 5))
    evaluated = evaluate_clients(loop(local_epochs=1), method, server_groups(method), data)
    logits = torch.stack([copy.deepcopy(method.modules["global"])(x) for x in data.heldout.x])
    real = data.heldout.y != 0
    right = (logits.argmax(-1) == data.heldout.y) & real
    assert torch.equal(evaluated.generalized, right.sum((1, 2)).float())
    loss = nn.functional.cross_entropy(
        logits[0].flatten(0, 1), data.heldout.y[0].flatten(), ignore_index=0, reduction="sum"
    )
    torch.testing.assert_close(evaluated.generalized_loss[0], loss)


def test_characters_have_two_routed_cells_that_see_their_memory():
    torch.manual_seed(0)
    backbone = NextCharacterLSTM(TOKENS, embedding=3, hidden=4)
    make = lambda blocks: SequenceRouter(blocks, hidden=(5,), hidden_behind=(4,), cell_state=True)  # noqa: E731
    method = bound(PublishedFlow(router=make), backbone)
    assert method.route_names == ["lstm1", "lstm2", "head"]
    assert [cell.layers[0].in_features for cell in method.router.cells] == [3 + 4 * 4, 4 + 4 * 4]
    assert loop(local_epochs=1).train_clients(method, server_groups(method), batch((4, 3))).weights[
        "global"
    ].tolist() == [4, 3]


def test_sequence_router_refuses_blocks_that_are_not_recurrent():
    with pytest.raises(ConfigurationError, match=r"routes recurrent blocks followed by others.*Linear"):
        bound(PublishedFlow(router=SequenceRouter), MLP(T, TOKENS, (3,)))


def test_multi_label_recall_has_the_true_labels_as_its_denominator():
    """Three labels of which two are among the top 2; an example without labels counts nowhere."""
    task = MultiLabel(k=2)
    outputs = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    y = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    mask = torch.tensor([True, True])
    assert task.counted(y, mask).sum() == 3
    assert (task.correct(outputs, y) & task.counted(y, mask)).sum() == 2
    expected = nn.functional.binary_cross_entropy_with_logits(outputs, y.float())
    torch.testing.assert_close(task.loss(outputs, y, mask), expected)
    only_first = nn.functional.binary_cross_entropy_with_logits(outputs[:1], y[:1].float())
    torch.testing.assert_close(task.loss(outputs, y, torch.tensor([True, False])), only_first)


def test_routes_of_a_multi_label_instance_count_once():
    """Two instances of three labels in two blocks: routed is 2, not the number of true labels."""
    method = PublishedFlow()
    method = method.bind(MLP(T, 3, (4,)), MultiLabel(k=1))
    check_fit(method, torch.zeros(1, T), 3)
    server = server_groups(method)
    groups = method.start(server)
    examples = Minibatch(torch.randn(2, T), torch.tensor([[1, 1, 0], [0, 0, 1]]), torch.tensor([True, True]))
    counts = count_client(method, groups, examples)
    assert counts["routed"] == 2
    assert counts["routed_local"].shape == (2,)
    assert counts["count"] == 3


def test_one_way_per_client_needs_a_router_that_sees_no_outputs():
    with pytest.raises(ConfigurationError, match=r"route_by is 'client', but SequenceRouter .* or use FeatureRouter"):
        bound(PublishedFlow(route_by="client", router=SequenceRouter), NextWordLSTM(TOKENS, 3, 4, 3))


class MeanOverTokens(nn.Module):
    def forward(self, hidden):
        return hidden.mean(1)


def one_label_per_sequence(length, regularization=0.1):
    """Flow with an LSTM that is routed per token, and two clients whose sequences have one label of three."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Embedding(TOKENS, 4), LSTM(4, 5), MeanOverTokens(), nn.Linear(5, 3))
    method = Flow(regularization, router=router).bind(backbone, Classification())
    whole = batch((8, 6))

    def labelled(part):
        x = part.x[..., :1].expand(*part.x.shape[:2], length).contiguous()
        return Examples(x, part.x[..., 0] % 3, part.mask, part.sizes)

    found = replace(whole, train=labelled(whole.train), heldout=labelled(whole.heldout))
    check_fit(method, found.train.x[0], 3)
    return method, found


@pytest.mark.parametrize("length", [1, 4, 7])
def test_sequences_with_one_label_are_routed_per_token(length):
    """Also where the number of tokens is that of a minibatch, 4, or of labels."""
    method, clients = one_label_per_sequence(length)
    server = server_groups(method)
    update = loop(local_epochs=1).train_clients(observed(method, server), server, clients)
    assert all(p.isfinite().all() for group in update.difference.values() for p in group.values())
    assert ((update.kept[OBSERVED]["q_local"] > 0) & (update.kept[OBSERVED]["q_local"] < 1)).all()
    found = evaluate_clients(loop(local_epochs=1, evaluation_batch_size=4), method, server, clients)
    assert found.count.tolist() == [4, 4]
    assert found.routed.tolist() == [4 * length, 4 * length]
    assert (found.routed_local <= found.routed.unsqueeze(-1)).all()
    predicted = predict_clients(loop(local_epochs=1), method, server, clients)
    assert predicted.routes.shape == predicted.local_probability.shape == (2, 4, len(method.route_names))


def test_a_prediction_for_a_sequence_has_the_mean_of_its_tokens_routes():
    method, clients = one_label_per_sequence(3)
    groups = method.start(server_groups(method))
    # w_l is another model than w_g, so that tokens differ
    groups["local"] = {name: p + torch.randn_like(p) for name, p in groups["local"].items()}
    one = Minibatch(clients.heldout.x[0], clients.heldout.y[0], clients.heldout.mask[0])
    q = method.predict(groups, one.x).local_probability
    assert q.shape == (4, 3, len(method.route_names))
    found = predict_client(method, groups, one)
    torch.testing.assert_close(found["local_probability"], q.mean(1))
    assert torch.equal(found["routes"], (q > 0.5).sum(1) >= 2)
    counts = count_client(method, groups, one)
    torch.testing.assert_close(counts["routed_local"], (q > 0.5).flatten(0, 1).sum(0).float())


def test_the_decisions_that_count_have_the_shape_of_the_routes():
    mask = torch.tensor([True, False])
    words = torch.tensor([[4, 0, 5], [4, 4, 4]])
    assert NextToken().decided(words, mask, torch.Size((2, 3))).tolist() == [[True, False, True], [False] * 3]
    assert NextToken().decided(words, mask, torch.Size((2,))).tolist() == [True, False]
    every = [[True] * 3, [False] * 3]
    # three labels are not three tokens
    for task, y in ((Classification(), torch.tensor([1, 1])), (MultiLabel(1), torch.tensor([[0, 1, 0], [1, 0, 0]]))):
        assert task.decided(y, mask, torch.Size((2, 3))).tolist() == every
        assert task.decided(y, mask, torch.Size((2,))).tolist() == [True, False]
