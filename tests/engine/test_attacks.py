"""Simulated attackers: who they are, and what they do to data and updates."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flow_pl.engine.attacks import Attack, Backdoor, GaussianAttack, LabelFlip, SignFlip
from flow_pl.errors import ConfigurationError
from tests.support import CLASSES, FEATURES, chunk


def chosen(attack, population=20, seed=0):
    attack.choose(np.arange(population)[::-1].copy(), population, seed)
    return attack


def updates(clients):
    return {"global": {"a": torch.ones(clients, 2, 3), "b": torch.full((clients, 4), 2.0)}}


def test_a_share_of_the_clients_attacks_and_the_seed_says_which():
    attack = chosen(Attack(0.3))
    assert len(attack.clients) == 6
    assert attack.members(torch.arange(20)).nonzero()[:, 0].tolist() == attack.clients.tolist()
    assert chosen(Attack(0.3)).clients.tolist() == attack.clients.tolist()
    assert chosen(Attack(0.3), seed=1).clients.tolist() != attack.clients.tolist()
    assert attack.expected(10) == 3
    assert chosen(Attack(0.1), 30).expected(30) == 3


def test_only_those_who_are_trained_on_attack():
    attack = Attack(1.0)
    attack.choose(np.array([3, 5]), 10, 0)
    assert attack.clients.tolist() == [3, 5]


def test_labels_of_attackers_are_flipped():
    batch, attack = chunk([6, 4, 3]), Attack(1.0)
    attack = LabelFlip(1.0)
    attack.choose(np.array([1]), 3, 0)
    poisoned = attack.poison(batch, CLASSES)
    assert torch.equal(poisoned.train.y[1], CLASSES - 1 - batch.train.y[1])
    assert torch.equal(poisoned.train.y[[0, 2]], batch.train.y[[0, 2]])
    assert torch.equal(poisoned.train.x, batch.train.x)


def test_attackers_send_the_opposite():
    attack, sent = chosen(SignFlip(0.5, scale=3.0), 4), updates(4)
    attack.corrupt(sent, torch.arange(4), 0)
    factor = torch.where(attack.members(torch.arange(4)), -3.0, 1.0)
    assert torch.equal(sent["global"]["a"], factor.view(4, 1, 1).expand(4, 2, 3))
    assert torch.equal(sent["global"]["b"], 2 * factor.view(4, 1).expand(4, 4))


def test_gaussian_updates_differ_by_client_and_round_alone():
    attack, clients = chosen(GaussianAttack(0.5, std=2.0), 40), torch.arange(40)
    big = {"global": {"a": torch.ones(40, 500), "b": torch.ones(40, 500)}}
    attack.corrupt(big, clients, 0)
    bad = attack.members(clients)
    noise = torch.cat([big["global"]["a"][bad], big["global"]["b"][bad]], 1)
    assert (big["global"]["a"][~bad] == 1).all()
    assert float(noise.std()) == pytest.approx(2.0, rel=0.05)
    assert len(noise[:, :3].flatten().unique()) == 60
    assert not torch.equal(noise[:, :500], noise[:, 500:])
    some = {"global": {"a": torch.ones(1, 500), "b": torch.ones(1, 500)}}
    first = bad.nonzero()[0]
    attack.corrupt(some, first, 0)
    assert torch.equal(some["global"]["b"][0], big["global"]["b"][first[0]])


def backdoor(**settings):
    attack = Backdoor(1.0, **{"target": 1, "size": 2, "poisoned": 0.5, **settings})
    attack.choose(np.array([0]), 2, 0)
    return attack


def test_a_part_of_an_attackers_examples_gets_trigger_and_target():
    batch, attack = chunk([400, 400]), backdoor()
    poisoned = attack.poison(batch, CLASSES)
    marked = (poisoned.train.x[0] != batch.train.x[0]).any(1)
    assert float(marked.float().mean()) == pytest.approx(0.5, abs=0.15)
    assert (poisoned.train.x[0, marked, -2:] == 1).all()
    assert torch.equal(poisoned.train.x[0, :, :-2], batch.train.x[0, :, :-2])
    assert (poisoned.train.y[0, marked] == 1).all()
    assert torch.equal(poisoned.train.y[0, ~marked], batch.train.y[0, ~marked])
    assert torch.equal(poisoned.train.x[1], batch.train.x[1])
    sent = updates(2)
    attack.corrupt(sent, torch.arange(2), 0)
    assert sent["global"]["a"].flatten(1).amax(1).tolist() == [10.0, 1.0]


def test_the_trigger_of_an_image_is_a_patch_in_its_corner():
    x = torch.zeros(1, 2, 3, 8, 8)
    stamped = backdoor().stamped(x)
    assert stamped.sum() == 2 * 3 * 4
    assert (stamped[..., -2:, -2:] == 1).all()
    assert not x.any()


def test_success_is_asked_for_on_examples_of_other_classes():
    batch = chunk([3, 3], heldout=50)
    triggered = backdoor().triggered(batch)
    assert torch.equal(triggered.heldout.mask, batch.heldout.mask & (batch.heldout.y != 1))
    assert (triggered.heldout.y == 1).all()
    assert (triggered.heldout.x[..., -2:] == 1).all()
    assert triggered.train is batch.train


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SignFlip(0.0), "share is 0.0"),
        (lambda: SignFlip(1.5), "share is 1.5"),
        (lambda: SignFlip(0.1, scale=0.0), "scale is 0.0"),
        (lambda: GaussianAttack(0.1, std=-1.0), "std is -1.0"),
        (lambda: Backdoor(target=-1), "target is -1"),
        (lambda: Backdoor(poisoned=0.0), "poisoned is 0.0"),
        (lambda: Backdoor(size=0), "size is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()


@pytest.mark.parametrize(
    ("attack", "example", "label", "said"),
    [
        (Backdoor(target=9), torch.zeros(1, FEATURES), (), r"target is 9, but the classes are 0 to 2"),
        (Backdoor(size=7), torch.zeros(1, FEATURES), (), r"size is 7, .* at most 6"),
        (Backdoor(), torch.zeros(1, FEATURES, dtype=torch.int64), (), "no place for the trigger"),
        (Backdoor(), torch.zeros(1, FEATURES), (4,), r"labels of shape \[4\]"),
        (LabelFlip(), torch.zeros(1, FEATURES), (4,), r"labels of shape \[4\]"),
    ],
)
def test_data_that_cannot_be_attacked_is_refused(attack, example, label, said):
    with pytest.raises(ConfigurationError, match=said):
        attack.check(example, CLASSES, label)


def test_padding_of_a_poisoned_batch_stays_padding():
    batch = chunk([5, 2])
    assert torch.equal(backdoor().poison(replace(batch), CLASSES).train.mask, batch.train.mask)
