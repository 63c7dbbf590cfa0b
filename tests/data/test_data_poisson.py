"""Poisson cohorts, of all clients or of groups in turn: every client apart, with one probability."""

import numpy as np
import pytest
from scipy import stats

from flow_pl.data import SyntheticData
from flow_pl.data.sampler import CohortSampler
from flow_pl.errors import ConfigurationError


def sampler(clients=40, cohort=8, chunk=3, rank=0, world=1, seed=0, **settings):
    sizes = np.arange(1, clients + 1)
    return CohortSampler(
        np.arange(clients) + 100, sizes, cohort_size=cohort, chunk_size=chunk, seed=seed, rank=rank, world_size=world,
        **{"sampling": "poisson", **settings},
    )  # fmt: skip


def cohort(made, epoch):
    made.set_epoch(epoch)
    return [client for chunk in made for client in chunk.clients]


def test_every_client_comes_apart_with_the_same_probability():
    """Sizes are binomial, and so is how often a client comes and how often two come together."""
    rounds, made = 3000, sampler()
    came = np.zeros((rounds, 40))
    for epoch in range(rounds):
        came[epoch, np.array(cohort(made, epoch), dtype=int) - 100] = 1
    sizes, rate = came.sum(1), 0.2
    assert sizes.mean() == pytest.approx(8, abs=6 * np.sqrt(8 * 0.8 / rounds))
    assert sizes.var() == pytest.approx(8 * 0.8, rel=0.2)
    expected = stats.binom.pmf(np.arange(3, 14), 40, rate) * rounds
    found = np.array([(sizes == size).sum() for size in range(3, 14)])
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all()
    assert (np.abs(came.mean(0) - rate) < 5 * np.sqrt(rate * (1 - rate) / rounds)).all()
    together = (came.T @ came / rounds)[np.triu_indices(40, 1)]
    assert together.mean() == pytest.approx(rate**2, rel=0.03)


def test_the_number_of_chunks_is_the_same_in_every_round_and_nobody_is_lost():
    """A cohort that has no room in chunks of the usual size comes in larger ones."""
    for chunk in (1, 3, 50):
        made = sampler(chunk=chunk)
        for epoch in range(50):
            made.set_epoch(epoch)
            chunks = list(made)
            assert len(chunks) == len(made)
            assert sorted(c for chunk in chunks for c in chunk.clients) == sorted(cohort(sampler(chunk=7), epoch))
    made = sampler()
    made._room, made._draw = 3, lambda: np.arange(10)
    chunks = list(made)
    assert len(chunks) == len(made) == 1
    assert len(chunks[0].clients) == 10


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_cohort(world):
    for epoch in range(30):
        shares = [cohort(sampler(rank=rank, world=world), epoch) for rank in range(world)]
        assert sorted(client for share in shares for client in share) == sorted(cohort(sampler(), epoch))


def test_all_clients_come_where_the_cohort_is_the_population():
    assert sorted(cohort(sampler(cohort=40), 3)) == list(range(100, 140))


def test_the_seed_says_who_comes():
    assert cohort(sampler(), 1) == cohort(sampler(), 1)
    assert cohort(sampler(), 1) != cohort(sampler(seed=1), 1)
    assert cohort(sampler(), 1) != cohort(sampler(), 2)


CYCLIC = {"sampling": "cyclic_poisson", "cycle_length": 3}


def test_groups_are_drawn_from_in_turn():
    """Whoever comes in round t comes in no round but t mod 3, with probability 3 x cohort / clients."""
    cycles, made = 1000, sampler(**CYCLIC)
    came = np.zeros((3, 40))
    for epoch in range(3 * cycles):
        came[epoch % 3, np.array(cohort(made, epoch), dtype=int) - 100] += 1
    assert ((came > 0).sum(0) == 1).all()
    rate = 3 * 8 / 40
    assert (np.abs(came.max(0) / cycles - rate) < 5 * np.sqrt(rate * (1 - rate) / cycles)).all()
    for world in (2, 3):
        shares = [cohort(sampler(rank=rank, world=world, **CYCLIC), 4) for rank in range(world)]
        assert sorted(client for share in shares for client in share) == sorted(cohort(made, 4))


def test_clients_are_in_a_group_apart_from_each_other():
    """Sizes of groups are binomial, so they differ from seed to seed."""
    sizes = []
    for seed in range(300):
        made = sampler(clients=30, cohort=10, seed=seed, **CYCLIC)  # the whole group in its turn
        groups = [cohort(made, epoch) for epoch in range(3)]
        assert sorted(client for group in groups for client in group) == list(range(100, 130))
        sizes += [len(groups[0])]
    assert np.mean(sizes) == pytest.approx(10, abs=6 * np.sqrt(20 / 3 / 300))
    assert np.var(sizes) == pytest.approx(20 / 3, rel=0.4)


def test_a_single_group_is_poisson_sampling():
    for epoch in range(20):
        assert cohort(sampler(sampling="cyclic_poisson"), epoch) == cohort(sampler(), epoch)


def test_another_sampling_is_refused():
    with pytest.raises(ConfigurationError, match="sampling is bernoulli, expected 'fixed' or 'poisson' or"):
        SyntheticData(sampling="bernoulli")
    with pytest.raises(ConfigurationError, match="cycle_length is 3 and sampling poisson, which has no groups"):
        SyntheticData(sampling="poisson", cycle_length=3)
    with pytest.raises(ConfigurationError, match=r"only 40 clients, 13.3333 in a group on average: set cohort_size to"):
        sampler(cohort=20, **CYCLIC)
