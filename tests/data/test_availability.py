"""Dropouts and stragglers."""

import numpy as np
import pytest

from flow_pl.data.availability import Availability
from flow_pl.data.sampler import CohortSampler
from flow_pl.errors import ConfigurationError

CLIENTS = np.arange(2000)


def test_a_share_of_the_clients_drops_out():
    arrivals = Availability(dropout=0.2).arrivals(0, 3, CLIENTS, CLIENTS + 1)
    assert abs(arrivals.dropped - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5  # four standard deviations
    assert arrivals.in_time.sum() == 2000 - arrivals.dropped
    assert arrivals.late == 0


def test_the_deadline_is_a_number_of_examples():
    arrivals = Availability(deadline=100).arrivals(0, 0, CLIENTS, CLIENTS)
    assert np.flatnonzero(arrivals.in_time).tolist() == list(range(101))
    assert arrivals.late == 1899


def test_slow_clients_miss_it_and_fast_ones_do_not():
    """With a log-normal speed, a client with deadline / e examples is late with probability P(z < -1 / spread)."""
    sizes = np.full(2000, round(1000 / np.e))
    arrivals = Availability(deadline=1000, speed_spread=0.5).arrivals(0, 0, CLIENTS, sizes)
    assert abs(arrivals.late / 2000 - 0.02275) < 4 * (0.02275 * 0.97725 / 2000) ** 0.5


def test_a_draw_depends_on_seed_round_and_client_alone():
    all_of_them = Availability(dropout=0.5).arrivals(0, 1, CLIENTS, CLIENTS).in_time
    some = CLIENTS[::-7]
    assert np.array_equal(Availability(dropout=0.5).arrivals(0, 1, some, some).in_time, all_of_them[some])
    for seed, round_ in ((1, 1), (0, 2)):
        other = Availability(dropout=0.5).arrivals(seed, round_, CLIENTS, CLIENTS).in_time
        assert 800 < (other != all_of_them).sum() < 1200


@pytest.mark.parametrize("world_size", [1, 3])
def test_processes_agree_on_who_reports_back(world_size):
    settings = {"cohort_size": 40, "chunk_size": 4, "seed": 0, "availability": Availability(0.3, deadline=1500)}
    found = []
    for rank in range(world_size):
        sampler = CohortSampler(CLIENTS, CLIENTS + 1, rank=rank, world_size=world_size, **settings)
        sampler.set_epoch(2)
        chunks = list(sampler)
        assert len(chunks) == len(sampler)
        found += [client for chunk in chunks for client in chunk.clients]
        absent = sampler.absent
    assert 40 - len(found) == absent["dropped"] + absent["late"]
    assert absent["dropped"] > 0
    assert absent["late"] > 0
    assert max(found) < 1500
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "dropout is 1.0, expected a share"),
        ({"deadline": 0}, "deadline is 0, expected a whole number of 1 or more"),
        ({"speed_spread": -1.0}, "speed_spread is -1.0, expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Availability(**settings)
