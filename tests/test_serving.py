"""A personalized model for one client, outside any trainer."""

import pytest
import torch

from flow_pl.errors import DataError
from flow_pl.methods import FedAvg, FineTuning, Flow, KNNPer
from flow_pl.serving import personalize
from tests.test_module import module as trained

X, Y = torch.randn(11, 8), torch.arange(11) % 3


def test_without_personalization_it_is_w_g():
    module = trained(FedAvg(1))
    assert torch.equal(personalize(module, X, Y)(X), module(X))


def test_fine_tuning_moves_a_copy():
    module = trained(FineTuning(2))
    before = module(X)
    model = personalize(module, X, Y)
    assert torch.equal(module(X), before)
    loss = torch.nn.functional.cross_entropy
    assert loss(model(X), Y) < loss(before, Y)


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_it_predicts_as_an_evaluation_does(routing):
    """The same client, evaluated by the loop: the personalized outputs are equal."""
    module = trained(Flow(1, split="none", routing=routing, regularization=0.0))
    model = personalize(module, X, Y)
    module.eval()  # without dropout
    predicted = module.method.predict(model._groups, X)
    torch.testing.assert_close(model(X), predicted.personalized)
    assert not torch.equal(predicted.personalized, predicted.generalized)


def test_the_seed_draws_the_order():
    module = trained(FineTuning(1))
    first, again, other = (personalize(module, X, Y, seed)(X) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_modules_keep_their_modes():
    module = trained(KNNPer(1)).train()
    personalize(module, X, Y)(X)
    assert module.backbone.training


@pytest.mark.parametrize(("x", "y"), [(X[:0], Y[:0]), (X, Y[:3])])
def test_examples_and_targets_must_match(x, y):
    with pytest.raises(DataError, match="expected one for each, and at least one"):
        personalize(trained(FedAvg(1)), x, y)
