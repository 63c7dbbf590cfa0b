import numpy as np
import pytest

from flow_pl.data import CohortSampler
from flow_pl.errors import ConfigurationError


def ranks(world_size, clients, sizes, epoch=0, **settings):
    """The chunks of every process in a round."""
    settings = {"cohort_size": 10, "chunk_size": 4, "seed": 0} | settings
    found = []
    for rank in range(world_size):
        sampler = CohortSampler(np.array(clients), np.array(sizes), rank=rank, world_size=world_size, **settings)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


def cohort(chunks_of_ranks):
    return sorted(client for chunks in chunks_of_ranks for chunk in chunks for client in chunk.clients)


SIZES = np.random.default_rng(0).lognormal(4, 2, 60).astype(int) + 1
CLIENTS = np.arange(60) * 3


def test_one_process_cuts_the_cohort_by_decreasing_size():
    (chunks,) = ranks(1, [7, 8, 9, 10, 11], [5, 9, 1, 9, 2], cohort_size=None, chunk_size=2, epoch=6)
    assert chunks == [(6, (8, 10)), (6, (7, 11)), (6, (9,))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("cohort_size", [1, 2, 5, 20, 59, None])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_processes_share_one_cohort_in_equally_many_chunks(world_size, cohort_size, chunk_size):
    for epoch in (0, 1):
        settings = {"cohort_size": cohort_size, "chunk_size": chunk_size, "epoch": epoch}
        found = ranks(world_size, CLIENTS, SIZES, **settings)
        assert cohort(found) == cohort(ranks(1, CLIENTS, SIZES, **settings))
        assert len(cohort(found)) == len(set(cohort(found))) == (cohort_size or 60)
        assert len({len(chunks) for chunks in found}) == 1
        for chunks in found:
            filled = [len(chunk.clients) for chunk in chunks]
            assert filled == sorted(filled, reverse=True)  # empty chunks last, at most one partly filled
            assert sum(0 < count < chunk_size for count in filled) <= 1
            sizes = [SIZES[client // 3] for chunk in chunks for client in chunk.clients]
            assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("world_size", "cohort_size", "chunk_size", "chunks"),
    [(1, 10, 4, 3), (2, 10, 4, 3), (2, 3, 4, 1), (4, 2, 1, 2), (3, 60, 10, 3), (1, 1, 1, 1)],
)
def test_number_of_chunks(world_size, cohort_size, chunk_size, chunks):
    """ceil(cohort / (processes x chunk size)), and one more where several processes share several chunks."""
    found = ranks(world_size, CLIENTS, SIZES, cohort_size=cohort_size, chunk_size=chunk_size)
    assert [len(of_rank) for of_rank in found] == [chunks] * world_size


@pytest.mark.parametrize("epoch", range(5))
def test_processes_get_equal_work(epoch):
    """Longest processing time is within 4/3 of the best, which is at least the mean and the largest client."""
    sizes = np.random.default_rng(epoch).lognormal(4, 2, 500).astype(int) + 50
    found = ranks(4, np.arange(500), sizes, cohort_size=100, chunk_size=10, epoch=epoch)
    loads = [sum(sizes[client] for chunk in chunks for client in chunk.clients) for chunks in found]
    largest = max(sizes[client] for client in cohort(found))
    assert max(loads) <= 4 / 3 * max(np.mean(loads), largest)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_processes_are_within_a_tenth_of_each_other_on_log_normal_sizes(world_size):
    """100 clients with a mean of 100 examples, sigma 1."""
    sizes = np.random.default_rng(0).lognormal(np.log(100) - 0.5, 1, 100).astype(int) + 1
    found = ranks(world_size, np.arange(100), sizes, cohort_size=None, chunk_size=10)
    loads = [sum(sizes[client] for chunk in chunks for client in chunk.clients) for chunks in found]
    assert sum(loads) == sizes.sum()
    assert max(loads) <= 1.1 * min(loads)


def test_a_process_gets_no_more_clients_than_its_chunks_hold():
    """One client outweighs all others together, yet the other process cannot take all of those."""
    found = ranks(2, np.arange(16), [1000] + [1] * 15, cohort_size=None, chunk_size=4)
    assert sorted(sum(len(chunk.clients) for chunk in chunks) for chunks in found) == [4, 12]


def test_cohorts_depend_on_seed_round_and_purpose_alone():
    """In evaluation not on the round: a best one can only be chosen among rounds of the same clients."""
    draws = [
        cohort(ranks(1, CLIENTS, SIZES, **settings))
        for settings in ({}, {"seed": 1}, {"epoch": 1}, {"training": False}, {"training": False, "epoch": 1})
    ]
    assert len({tuple(each) for each in draws}) == 4
    assert draws[3] == draws[4]
    assert cohort(ranks(3, CLIENTS, SIZES, chunk_size=1)) == draws[0]


def test_every_client_is_drawn_equally_often():
    """1,000 rounds of 10 out of 60: 167 +- 12 times each."""
    sampler = CohortSampler(CLIENTS, SIZES, cohort_size=10, chunk_size=10, seed=0)
    counts = dict.fromkeys(CLIENTS.tolist(), 0)
    for epoch in range(1000):
        sampler.set_epoch(epoch)
        for chunk in sampler:
            for client in chunk.clients:
                counts[client] += 1
    assert 167 - 5 * 12 < min(counts.values()) <= max(counts.values()) < 167 + 5 * 12


def test_a_large_population_costs_no_pass_over_it():
    clients = np.arange(2_000_000)
    sampler = CohortSampler(clients, clients, cohort_size=5, chunk_size=5, seed=0)
    import tracemalloc

    tracemalloc.start()
    assert len(list(sampler)) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e5


def test_evaluation_has_no_round():
    (chunks,) = ranks(1, CLIENTS, SIZES, training=False, epoch=4)
    assert {chunk.round for chunk in chunks} == {-1}


def test_a_population_without_clients_has_no_chunks():
    assert ranks(2, np.arange(0), np.arange(0), cohort_size=None) == [[], []]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cohort_size": 61}, "cohort_size is 61, but there are only 60 clients to draw from: set cohort_size to 60"),
        ({"cohort_size": 61, "setting": "val_clients"}, "val_clients is 61, but there are only 60 clients"),
        ({"cohort_size": 0}, "cohort_size is 0, expected a whole number of 1 or more"),
        ({"chunk_size": -1}, "chunk_size is -1, expected a whole number of 1 or more"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ranks(1, CLIENTS, SIZES, **settings)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_process_knows_how_many_clients_all_of_them_serve(world_size):
    """Chunk by chunk the sum over processes, the same in each: a progress bar shows it without asking the others."""
    samplers = [
        CohortSampler(
            CLIENTS, SIZES, cohort_size=7, chunk_size=2, seed=0, rank=rank, world_size=world_size, training=True
        )
        for rank in range(world_size)
    ]
    chunks = [list(sampler) for sampler in samplers]
    expected = [sum(len(chunk.clients) for chunk in at_once) for at_once in zip(*chunks, strict=True)]
    assert [sampler.served for sampler in samplers] == [expected] * world_size
    assert sum(expected) == 7
