"""What tasks count, lose and predict, for outputs made by hand."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flow_pl import FederatedModule
from flow_pl.checks import check_fit, check_label_range
from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.data.store.client_store import ClientStore
from flow_pl.data.store.writer import ClientStoreWriter
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients, predict_clients
from flow_pl.methods import FedAvg
from flow_pl.methods.base import Method, Prediction
from flow_pl.serving import personalize
from flow_pl.tasks import Classification, MultiLabel, NextToken
from tests.methods.helpers import TAGS, with_tags
from tests.support import FEATURES, chunk, loop, minibatches, sgd

PAD, OOV, BOS, EOS = range(4)
TOKENS = 8


class Scripted(Method):
    """Outputs are the instance itself: its first half w_g's, its second half the personalized model's."""

    def training(self):
        return ()

    def predict(self, groups, x):
        generalized, personalized = x.chunk(2, dim=-1)
        return Prediction(generalized, personalized, local=generalized, routes=x[..., :1] > 0)


def scripted(task):
    return Scripted(1).bind(nn.Sequential(nn.Linear(1, 1)), task)


def clients(x, y, mask):
    """A chunk whose clients have these held-out examples and nothing to train on."""
    held = Examples(x, y, mask, tuple(mask.sum(1).tolist()))
    none = Examples(x[:, :0], y[:, :0], mask[:, :0], (0,) * len(x))
    order = torch.zeros(len(x), 1, 0, dtype=torch.int64)
    index = torch.arange(len(x))
    return ClientBatch(index, none, torch.zeros(len(x), 0, dtype=torch.uint8), order, held, -1, index)


def one_hot(generalized, personalized):
    """Outputs that favour given tokens [C, N, T]."""
    return torch.cat([F.one_hot(torch.tensor(t), TOKENS).float() for t in (generalized, personalized)], dim=-1)


def sentences():
    """Two clients: two sentences, and one sentence of special tokens alone (the second is padding of the chunk)."""
    y = [[[5, OOV, 6, EOS], [7, 5, EOS, PAD]], [[OOV, EOS, PAD, PAD], [6, 6, 6, 6]]]
    w_g = [[[5, OOV, 5, EOS], [5, 5, 6, PAD]], [[OOV, 5, PAD, PAD], [6, 6, 6, 6]]]
    w_p = [[[5, 6, 6, EOS], [7, 6, EOS, PAD]], [[5, EOS, PAD, PAD], [6, 6, 6, 6]]]
    return clients(one_hot(w_g, w_p), torch.tensor(y), torch.tensor([[True, True], [True, False]]))


def test_tokens_are_counted_with_and_without_the_special_ones():
    """By hand: client 0 has the words 5, 6, 7, 5 and three special tokens; client 1 special tokens alone."""
    method = scripted(NextToken())
    counts = evaluate_clients(loop(), method, {"global": {}}, sentences())
    assert counts.count.tolist() == counts.loss_count.tolist() == [7, 2]
    assert counts.generalized.tolist() == [4, 1]
    assert counts.personalized.tolist() == [5, 1]
    assert counts.subset_count.tolist() == [4, 0]
    assert counts.subset_generalized.tolist() == [2, 0]
    assert counts.subset_personalized.tolist() == [3, 0]


def test_special_tokens_are_a_setting():
    """Without unknown words alone, ends of sentences count; without any, there is one accuracy."""
    batch = sentences()
    counts = evaluate_clients(loop(), scripted(NextToken(special_tokens=(OOV,))), {"global": {}}, batch)
    assert counts.subset_count.tolist() == [6, 1]
    assert counts.subset_personalized.tolist() == [5, 1]
    plain = NextToken(special_tokens=())
    counts = evaluate_clients(loop(), scripted(plain), {"global": {}}, batch)
    assert (plain.subset, counts.subset_count) == ("", None)


@pytest.mark.parametrize("clients_left", [0, 2], ids=["no client", "clients without examples"])
def test_a_chunk_with_nothing_to_evaluate_has_the_same_fields(clients_left):
    batch = sentences()
    held = batch.heldout
    empty = clients(held.x[:clients_left, :0], held.y[:clients_left, :0], held.mask[:clients_left, :0])
    zeros = [0.0] * clients_left
    counts = evaluate_clients(loop(), scripted(NextToken()), {"global": {}}, empty)
    for name in ("count", "loss_count", "subset_count", "subset_generalized", "subset_personalized"):
        assert getattr(counts, name).tolist() == zeros, name
    assert evaluate_clients(loop(), scripted(Classification()), {"global": {}}, empty).subset_count is None
    assert not predict_clients(loop(), scripted(NextToken()), {"global": {}}, empty).mask.any()


def test_positions_without_a_label_count_nowhere_and_are_predicted():
    """The second sentence is to be predicted: where it ends is told by the tokens that are read."""
    task = NextToken()
    x = torch.tensor([[BOS, 5, 6, PAD], [BOS, 7, PAD, PAD], [BOS, 5, 6, 7]])
    y = torch.tensor([[5, 6, EOS, PAD], [-1, -1, -1, -1], [5, 6, 7, EOS]])
    mask = torch.tensor([True, True, False])
    assert task.counted(y, mask).int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert task.to_predict(x, y, mask).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_multi_label_loss_of_an_evaluation_is_that_of_training():
    """Mean over three examples of four labels, also of the example without a true label; recall is over true labels.

    By hand: true labels {0, 1, 2}, {} and {3}; w_g's top two are {0, 1}, {0, 1} and {3, 2}: it finds 3 of 4.
    """
    w_g = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, -1.0, -2.0], [-1.0, -2.0, 0.5, 2.0], [9.0, 9.0, 9.0, 9.0]])
    y = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    mask = torch.tensor([True, True, True, False])
    method = scripted(MultiLabel(k=2))
    batch = clients(torch.cat([w_g, -w_g], dim=-1)[None], y[None], mask[None])
    counts = evaluate_clients(loop(), method, {"global": {}}, batch)
    assert (counts.count.item(), counts.generalized.item()) == (4, 3)
    assert counts.loss_count.item() == 12
    for outputs, summed in ((w_g, counts.generalized_loss), (-w_g, counts.personalized_loss)):
        expected = F.binary_cross_entropy_with_logits(outputs[:3], y[:3].float())
        torch.testing.assert_close(summed / counts.loss_count, expected[None])
        torch.testing.assert_close(method.objective.loss(outputs, y, mask), expected)


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1), ("mean", 2 * 3)])
def test_multi_label_loss_is_summed_over_labels_and_examples(reduction, divisor):
    """The gradient is sigmoid(s) - y, over two real examples of three labels for the mean; a padded row has none."""
    task = MultiLabel(k=1, reduction=reduction)
    scores = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [4.0, 4.0, 4.0]], requires_grad=True)
    y, mask = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]]), torch.tensor([True, True, False])
    loss = task.loss(scores, y, mask)
    loss.backward()
    torch.testing.assert_close(
        loss * divisor, F.binary_cross_entropy_with_logits(scores[:2], y[:2].float(), reduction="sum")
    )
    torch.testing.assert_close(scores.grad[:2] * divisor, (scores.sigmoid() - y).detach()[:2])
    assert not scores.grad[2].any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_padded_rows_never_count_in_a_step(reduction):
    """A client alone and beside a longer one, whose padding holds garbage: a plain loop's steps on the real rows."""
    task = MultiLabel(k=2, reduction=reduction)
    batch = with_tags(chunk((7, 3), epochs=2))
    method = FedAvg()
    torch.manual_seed(0)
    method = method.bind(nn.Sequential(nn.Linear(FEATURES, TAGS)), task)
    before = server_groups(method)
    update = loop(batch_size=4).train_clients(method, before, batch)
    for client in range(2):
        w = copy.deepcopy(method.modules["global"])
        steps = sgd(list(w.parameters()))
        for rows in minibatches(batch, client, 2, 4):
            steps.zero_grad()
            outputs, y = w(batch.train.x[client, rows]), batch.train.y[client, rows].float()
            F.binary_cross_entropy_with_logits(outputs, y, reduction=reduction).backward()
            steps.step()
        for name, p in w.named_parameters():
            moved = update.difference["global"][name][client]
            torch.testing.assert_close(moved, p.detach() - before["global"][name], atol=1e-6, rtol=1e-5)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ConfigurationError, match="reduction is average, expected 'mean' or 'sum'"):
        MultiLabel(reduction="average")


def test_predictions_for_tokens_have_the_shape_of_tokens():
    batch = sentences()
    found = predict_clients(loop(evaluation_batch_size=1), scripted(NextToken()), {"global": {}}, batch)
    assert found.mask.int().tolist() == [[[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]]
    assert torch.equal(found.label, batch.heldout.y)
    assert found.prediction[0].tolist() == [[5, 6, 6, EOS], [7, 6, EOS, PAD]]
    assert (found.personalized_correct & found.mask).sum((1, 2)).tolist() == [5, 1]
    assert (found.generalized_correct & found.mask).sum((1, 2)).tolist() == [4, 1]
    assert found.routes.shape == (2, 2, 4, 1)


def test_a_way_of_an_instance_is_that_of_its_tokens():
    """A method that routes whole sentences: each of its tokens has the sentence's way."""

    class BySentence(Scripted):
        def predict(self, groups, x):
            found = super().predict(groups, x)
            first = torch.tensor([True, False]).unsqueeze(1)
            return Prediction(found.generalized, found.personalized, routes=first)

    method = BySentence(1)
    method = method.bind(nn.Sequential(nn.Linear(1, 1)), NextToken())
    found = predict_clients(loop(), method, {"global": {}}, sentences())
    assert found.routes[0, :, :, 0].tolist() == [[True] * 4, [False] * 4]


def test_predictions_of_several_labels_are_ranked():
    outputs = torch.tensor([[0.1, 3.0, -1.0, 2.0], [1.0, 0.0, 5.0, -2.0]])
    batch = clients(torch.cat([outputs, outputs], dim=-1)[None], torch.eye(4, dtype=torch.int64)[None, 1:3], _real(2))
    found = predict_clients(loop(), scripted(MultiLabel(k=2)), {"global": {}}, batch)
    assert found.prediction.tolist() == [[[1, 3], [2, 0]]]
    assert found.personalized_correct.sum(-1).tolist() == [[1, 1]]
    assert found.mask.shape == (1, 2)


def _real(n):
    return torch.ones(1, n, dtype=torch.bool)


def test_more_predicted_labels_than_there_are_is_refused():
    with pytest.raises(ConfigurationError, match=r"k is 5, but the backbone has 3 outputs.*objective\.k"):
        MultiLabel(k=5).check(torch.zeros(1, 3), num_classes=2)


@pytest.mark.parametrize(
    ("objective", "label_shape", "expected"),
    [(Classification(), (3,), r"\[\]"), (MultiLabel(k=2), (), r"\[3\]"), (MultiLabel(k=2), (2,), r"\[3\]")],
)
def test_labels_of_another_task_are_refused(objective, label_shape, expected):
    method = FedAvg()
    method = method.bind(nn.Sequential(nn.Linear(4, 3)), objective)
    name = type(objective).__name__
    with pytest.raises(ConfigurationError, match=rf"label of the data has shape .*, {name} .* expects {expected}"):
        check_fit(method, torch.zeros(1, 4), 2, label_shape)
    check_fit(method, torch.zeros(1, 4), 2, (3,) if isinstance(objective, MultiLabel) else ())


def test_counts_are_no_several_labels(tmp_path):
    """Binary cross-entropy has no minimum for a label of 2."""
    y = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 2, 0]])
    store = {}
    for name, labels in (("right", np.minimum(y, 1)), ("wrong", y)):
        with ClientStoreWriter(tmp_path / name, num_classes=3) as writer:
            writer.add("a", np.zeros((2, 4), dtype=np.float32), labels[:2])
            writer.add("b", np.zeros((2, 4), dtype=np.float32), labels[2:])
        store[name] = SimpleNamespace(store=ClientStore.open(tmp_path / name))
    assert store["wrong"].store.meta.largest_label == 2
    check_label_range(MultiLabel(k=2), store["right"])
    check_label_range(NextToken(), store["wrong"])
    with pytest.raises(ConfigurationError, match=r"client 'b' has the label 2, MultiLabel expects 0 and 1: write 1"):
        check_label_range(MultiLabel(k=2), store["wrong"])
    module = FederatedModule(nn.Sequential(nn.Linear(4, 3)), FedAvg(), objective=MultiLabel(k=2))
    with pytest.raises(ConfigurationError, match=r"y has the label 2, MultiLabel expects 0 and 1"):
        personalize(module, np.zeros((4, 4), dtype=np.float32), y)


def test_tokens_have_a_label_each():
    assert NextToken().label_shape(torch.zeros(1, 7, 9)) == (7,)


class Ordered(Classification):
    """Classes in order: output i is the score of being above class i."""

    def check(self, outputs, num_classes):
        pass

    def label_shape(self, outputs):
        return ()

    def predictions(self, outputs):
        return (outputs > 0).sum(-1)

    def probabilities(self, outputs):
        one = torch.ones_like(outputs[..., :1])
        above = torch.cat([one, outputs.sigmoid(), 0 * one], -1)
        return (above[..., :-1] - above[..., 1:]).clamp_min(0)


class Mixable(Ordered):
    """The same, whose probabilities can be converted back."""

    def outputs(self, probabilities):
        return probabilities.flip(-1).cumsum(-1).flip(-1)[..., 1:].logit(1e-6)


def test_a_task_whose_mixtures_would_predict_something_else_is_refused():
    """The logarithms of probabilities are all below 0, which these predictions take for the first class."""
    model = nn.Sequential(nn.Linear(3, 4))
    check_fit(FedAvg().bind(model, Mixable()), torch.zeros(1, 3), 5, ())
    with pytest.raises(ConfigurationError, match=r"Ordered predicts 0 from .* and 2 from .* override `outputs`"):
        check_fit(FedAvg().bind(model, Ordered()), torch.zeros(1, 3), 5, ())
