"""Any number of processes trains the cohort that a single one would."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_pl.data import CohortSampler


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    share=st.floats(0.05, 1),
    world_size=st.integers(2, 7),
    chunk_size=st.integers(1, 9),
    sampling=st.sampled_from(["fixed", "poisson"]),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
    round_=st.integers(0, 1000),
)
def test_shares_make_up_the_cohort_of_one_process(
    sizes, share, world_size, chunk_size, sampling, training, seed, round_
):
    cohort_size = max(1, int(share * len(sizes)))

    def chunks(rank, processes):
        sampler = CohortSampler(
            np.arange(len(sizes)) * 2,
            np.array(sizes),
            cohort_size=cohort_size,
            chunk_size=chunk_size,
            seed=seed,
            rank=rank,
            world_size=processes,
            training=training,
            sampling=sampling,
        )
        sampler.set_epoch(round_)
        return list(sampler), sampler.served

    alone, _ = chunks(0, 1)
    shares = [chunks(rank, world_size) for rank in range(world_size)]
    members = Counter(client for found, _ in shares for chunk in found for client in chunk.clients)
    assert members == Counter(client for chunk in alone for client in chunk.clients)
    assert max(members.values(), default=1) == 1
    if sampling == "fixed":
        assert len(members) == cohort_size
    # collective operations need equally many chunks, and the same counts of clients on all processes
    assert len({len(found) for found, _ in shares}) == 1
    filled = [sum(len(chunk.clients) for chunk in together) for together in zip(*(f for f, _ in shares), strict=True)]
    assert all(served == filled for _, served in shares)
    assert {chunk.round for found, _ in shares for chunk in found} <= {round_ if training else -1}
