"""A trained server from its files, and a personalized model for one client, outside any trainer."""

import copy
import inspect
import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError, DataError
from flow_pl.methods import Ditto, EvidenceFlow, FedAvg, FineTuning, Flow, Interpolation, KNNPer, Local
from flow_pl.methods.evidence import EVIDENCE
from flow_pl.models.routers import InstanceRouter
from flow_pl.serving import RunFormat, ServerModel, personalize
from flow_pl.serving.inputs import labelled
from flow_pl.tasks import NextToken
from tests.models import test_sequences
from tests.support import every_method
from tests.test_module import module as trained

X, Y = torch.randn(11, 8), torch.arange(11) % 3


def small_flow(**settings):
    return Flow(router=lambda blocks: InstanceRouter(blocks, hidden=(6,)), **settings)


SMALL = {
    "flow": small_flow,
    "flow_evidence": lambda: EvidenceFlow(neighbours=3, neighbour_weight=0.4),
    "knn_per": lambda: KNNPer(neighbours=3),
    "local": lambda: Local(1),
}
"""Methods whose defaults are too large for eleven examples."""

VARIANTS = {
    "flow_hard": lambda: small_flow(routing="hard", split="cross"),
    "flow_by_client": lambda: small_flow(route_by="client"),
    "interpolation_votes": lambda: Interpolation(average="probabilities", neighbours=3, neighbour_weight=0.4),
    "interpolation_chosen": lambda: Interpolation(alpha="chosen", average="probabilities"),
}
METHODS = {Path(inspect.getfile(cls)).stem: cls for cls in every_method().values()} | SMALL | VARIANTS
"""All that the package exports by the names of their files, and variants of some."""

TRAINING_ONLY = {"scaffold"}
"""Methods whose clients keep what only their training reads."""

STATEFUL = [name for name, make in METHODS.items() if make().private and name not in TRAINING_ONLY]
with_each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


@with_each_method
def test_what_is_kept_predicts_as_an_evaluation_does(make, monkeypatch):
    """All of a client's groups under `Method.predict`, against the few that its model keeps."""
    module, groups = trained(make()), {}
    personalized = module.loop.personalize
    monkeypatch.setattr(module.loop, "personalize", lambda *args: groups.update(personalized(*args)) or groups)
    model = personalize(module, X, Y)
    module.eval()
    predicted = module.method.predict(groups, X)
    torch.testing.assert_close(model(X), predicted.personalized)
    torch.testing.assert_close(ServerModel(module)(X), predicted.generalized)
    assert not any(p.requires_grad for p in model.state_dict().values())
    assert not list(model.parameters())


@with_each_method
def test_a_personal_model_is_copied_pickled_saved_and_loaded(make):
    module = trained(make())
    model, other = personalize(module, X, Y), personalize(module, X.flip(0) + 1, (Y + 1) % 3)
    expected = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in (*model.buffers(), *module.parameters()):
            p.zero_()  # of none of these is it a part
    for each in (*copies, other):
        assert torch.equal(each(X), expected)


@with_each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_personal_model_takes_another_precision(make, dtype):
    model = personalize(trained(make()), X, Y)
    expected = model(X)
    found = model.to(dtype)(X.to(dtype))
    # a way or a neighbour may be another one where two are as good
    close = (found.float().softmax(-1) - expected.softmax(-1)).abs().amax(-1) < 0.02
    assert close.float().mean() > 0.8
    assert {p.dtype for p in model.buffers() if p.is_floating_point()} == {dtype}


def test_a_personal_model_of_sequences_takes_another_precision():
    (x,), (y,) = test_sequences.sequences(1, 9)
    torch.manual_seed(0)
    method = Flow(router=test_sequences.router)
    model = personalize(FederatedModule(test_sequences.small_words(), method, FederatedLoop(4), NextToken()), x, y)
    expected = model(x)
    torch.testing.assert_close(model.half()(x).float(), expected, atol=0.02, rtol=0.02)


def test_evidence_of_large_distances_survives_half_precision():
    """The statistics hold mean squares, which overflow there: what is served holds means and deviations."""
    module = trained(EvidenceFlow())
    statistics, router = (module.method.modules[name] for name in ("statistics", "router"))
    place = EVIDENCE.index("mean_distance")
    with torch.no_grad():
        statistics.weight.fill_(1)
        statistics.square.fill_(1)
        statistics.mean[place], statistics.square[place] = 645, 645**2 + 500**2
        nn.init.normal_(router.head.weight, generator=torch.Generator().manual_seed(0))
    model = personalize(module, X, Y)
    expected = model(X).softmax(-1)
    torch.testing.assert_close(model.half()(X.half()).float().softmax(-1), expected, atol=0.05, rtol=0)


def test_a_personal_model_moves_with_its_buffers():
    """Also those of the backbone's blocks, which no method sees; the device `meta` has shapes alone."""

    class Shifted(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.register_buffer("shift", torch.full((3,), 2.0))

        def forward(self, x):
            return super().forward(x) + self.shift

    module = FederatedModule(nn.Sequential(Shifted()), FineTuning(), FederatedLoop(5))
    model = personalize(module, X, Y)
    weights = model.tensors()["model"]
    torch.testing.assert_close(model(X), X @ weights["0.weight"].t() + weights["0.bias"] + 2)
    moved = model.to("meta")
    assert {p.device.type for p in moved.state_dict().values()} == {"meta"}
    assert moved(X.to("meta")).shape == (11, 3)


def test_dropout_has_no_place_in_a_prediction():
    backbone = nn.Sequential(nn.Linear(8, 30), nn.Dropout(0.5), nn.Linear(30, 3))
    model = personalize(FederatedModule(backbone, FineTuning(), FederatedLoop(5)), X, Y).train()
    assert model.training
    assert torch.equal(model(X), model(X))


def test_a_prediction_of_its_own_is_what_is_served():
    """A subclass that overrides `predict` alone."""

    class Doubled(FineTuning):
        def predict(self, groups, x):
            found = super().predict(groups, x)
            return replace(found, personalized=2 * found.personalized)

    found, plain = (personalize(trained(method), X, Y)(X) for method in (Doubled(1), FineTuning()))
    torch.testing.assert_close(found, 2 * plain)


def test_numpy_arrays_and_lists_are_taken():
    module = trained(FineTuning())
    expected = personalize(module, X, Y)(X)
    for x, y in (
        (X.numpy(), Y.numpy()),
        (X.numpy().astype(np.float64), Y.numpy().astype(np.uint8)),
        (X.numpy(), Y.numpy().astype(np.float64)),
        (X.tolist(), Y.tolist()),
        (np.asfortranarray(X.numpy()), Y.numpy()[::-1][::-1]),
        (X.numpy().astype(">f4"), Y.numpy().astype(">i4")),
        (X.numpy(), Y.numpy().astype(np.float16)),
        (X.numpy(), Y.numpy().astype(np.uint64)),
        (X.numpy(), Y.numpy()[:, None]),
    ):
        torch.testing.assert_close(personalize(module, x, y)(X), expected)


def test_a_sequence_of_one_is_no_single_label():
    x = torch.randint(1, 5, (6, 1), generator=torch.Generator().manual_seed(0))
    module = FederatedModule(test_sequences.small_words(), FineTuning(), FederatedLoop(1), NextToken())
    assert personalize(module, x, x)(x).shape[:2] == (6, 1)


def test_the_largest_byte_is_a_class():
    """Compared as a byte, -1 is 255, and the examples of that class would be taken for unlabelled ones."""
    y = torch.tensor([255, 3, 255], dtype=torch.uint8)
    assert labelled(torch.ones(3, 2), y, False)[1].tolist() == [255, 3, 255]
    with pytest.raises(DataError, match="y has labels of type uint64: encode them"):
        labelled(torch.ones(1, 2), torch.from_numpy(np.array([2**64 - 1], dtype=np.uint64)), False)


def test_examples_without_a_label_have_no_part():
    module = trained(KNNPer())
    some = torch.where(torch.arange(11) < 6, Y, -1)
    assert torch.equal(personalize(module, X, some)(X), personalize(module, X[:6], Y[:6])(X))


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (
            X,
            torch.full((11,), -1),
            DataError,
            "none of the 11 examples has a label.*, or .*ServerModel",
        ),
        (X, Y + 0.5, DataError, "labels of type float32: encode them as integers"),
        (X, Y - 2, DataError, "has the label -2"),
        (X, Y + 1, DataError, "labels run from 0 to 3 but the backbone has 3 outputs"),
        (X.log(), Y, DataError, "NaN or an infinite value in row 0"),
        (X[:, :5], Y, ConfigurationError, r"features have shape \[5\]"),
        (X, Y[:, None].expand(-1, 2), ConfigurationError, r"label of the data has shape \[2\]"),
        (["a"], [0], DataError, "x has values of type <U1, expected numbers"),
        (X[0, 0], Y, DataError, "expected one target for each"),
    ],
)
def test_examples_that_cannot_be_used_are_refused(x, y, error, words):
    with pytest.raises(error, match=words):
        personalize(trained(FineTuning()), x, y)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_a_client_kept_is_where_it_goes_on_from(name):
    """As in an evaluation by the loop of one client with its state."""
    module = trained(METHODS[name]())
    initial = module.method.initial_state(server_groups(module.method))
    kept = {group: {key: p + 0.3 for key, p in tensors.items()} for group, tensors in initial.items()}
    if "strategy" in kept:
        kept["strategy"]["logits"] += torch.tensor([0.0, 9.0])  # to what was kept
    before = copy.deepcopy(kept)
    with_state, without = personalize(module, X, Y, kept=kept), personalize(module, X, Y)
    assert not torch.equal(with_state(X), without(X))
    assert torch.equal(personalize(module, X, Y, kept=initial)(X), without(X))
    for group, tensors in before.items():
        assert all(torch.equal(kept[group][key], p) for key, p in tensors.items())


def test_what_does_not_fit_as_kept_is_refused():
    with pytest.raises(ConfigurationError, match="clients of FedAvg keep nothing"):
        personalize(trained(FedAvg()), X, Y, kept={"personal": {}})
    module = trained(Ditto())
    kept = module.method.initial_state(server_groups(module.method))
    with pytest.raises(ConfigurationError, match=r"kept has no personal\.head\.bias, a client of Ditto keeps personal"):
        personalize(module, X, Y, kept={"personal": {k: p for k, p in kept["personal"].items() if k != "head.bias"}})


def test_without_personalization_it_is_w_g():
    module = trained(FedAvg())
    assert torch.equal(personalize(module, X, Y)(X), module(X))


def test_fine_tuning_moves_a_copy():
    module = trained(FineTuning())
    before = module(X)
    model = personalize(module, X, Y)
    assert torch.equal(module(X), before)
    loss = torch.nn.functional.cross_entropy
    assert loss(model(X), Y) < loss(before, Y)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_it_predicts_as_an_evaluation_does(routing):
    """The same client, evaluated by the loop: the personalized outputs are equal."""
    module = trained(Flow(split="none", routing=routing, regularization=0.0))
    model = personalize(module, X, Y)
    module.eval()  # without dropout
    predicted = module.method.predict(model.tensors(), X)
    torch.testing.assert_close(model(X), predicted.personalized)
    assert not torch.equal(predicted.personalized, predicted.generalized)


def test_the_seed_draws_the_order():
    module = trained(FineTuning())
    first, again, other = (personalize(module, X, Y, seed)(X) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_modules_keep_their_modes():
    module = trained(KNNPer()).train()
    personalize(module, X, Y)(X)
    assert module.backbone.training


@pytest.mark.parametrize(("x", "y"), [(X[:0], Y[:0]), (X, Y[:3])])
def test_examples_and_targets_must_match(x, y):
    with pytest.raises(DataError, match="expected one target for each example, and at least one"):
        personalize(trained(FedAvg()), x, y)


BITS, BYTES, TOKENS, REALS = np.bool_, np.uint8, np.int32, np.float32


@pytest.mark.parametrize(
    ("stored", "given", "becomes"),
    [
        (BITS, np.bool_, torch.bool),
        (BITS, np.uint8, torch.bool),
        (BITS, np.float64, torch.bool),
        (BYTES, np.uint8, torch.uint8),
        (BYTES, np.int64, torch.uint8),
        (BYTES, np.bool_, None),
        (BYTES, np.float32, None),
        (TOKENS, np.uint16, torch.int64),
        (TOKENS, np.uint8, torch.int64),
        (TOKENS, np.float32, None),
        (REALS, np.int64, torch.float32),
        (REALS, np.bool_, torch.float32),
        (REALS, np.float64, torch.float64),
        (REALS, np.uint8, None),
    ],
)
def test_features_get_the_types_of_the_run(stored, given, becomes):
    """An array of zeros and ones of any type; None where a pixel could be taken for a number, or the reverse."""
    x = np.array([[0, 1], [1, 1]]).astype(given)
    found = RunFormat(np.dtype(stored).name)
    if becomes is None:
        with pytest.raises(DataError, match=rf"x has features of type .*, in the run they are {np.dtype(stored).name}"):
            found.inputs(x)
    else:
        assert found.inputs(x).dtype == becomes
        assert found.inputs(torch.from_numpy(x)).tolist() == x.tolist()


def test_values_outside_of_a_type_are_refused():
    for stored, x in ((BITS, [[2, 0]]), (BYTES, [[256, 0]]), (BYTES, [[-1, 0]])):
        with pytest.raises(DataError, match="x has features of type int64, in the run they are"):
            RunFormat(np.dtype(stored).name).inputs(np.array(x))


def test_inputs_have_the_names_of_the_run():
    found, ids = RunFormat({"ids": "int64", "mask": "bool"}), np.ones((2, 3), dtype=np.int64)
    inputs = found.inputs({"mask": ids, "client": np.array(["a", "b"]), "ids": ids})
    assert {name: each.dtype for name, each in inputs.items()} == {"ids": torch.int64, "mask": torch.bool}
    with pytest.raises(DataError, match=r"there is no mask, only ids, client: name the run's features so"):
        found.inputs({"ids": ids, "client": ids})
    with pytest.raises(DataError, match=r"there is no ids and no mask, only one array"):
        found.inputs(ids)
    with pytest.raises(DataError, match=r"there is no x, only ids: the run has one array of features"):
        RunFormat("float32").inputs({"ids": ids})
    assert RunFormat().inputs(ids).dtype == torch.int64  # of an older checkpoint, as they are


def test_names_of_classes_become_their_numbers():
    found = RunFormat("float32", ("ash", "élm", "oak"))
    texts = np.array(["oak", "", "élm", "oak"])
    for y in (texts, texts.tolist(), np.char.encode(texts, "utf-8")):
        assert found.labels(y).tolist() == [2, -1, 1, 2]
    assert found.labels([2, -1]).tolist() == [2, -1]
    with pytest.raises(DataError, match=r"y has the label 'fir', expected one of the run's classes, ash, élm, oak"):
        found.labels(["oak", "fir"])
    with pytest.raises(DataError, match=r"y has texts, but the checkpoint holds no names of classes"):
        RunFormat("float32").labels(texts)
