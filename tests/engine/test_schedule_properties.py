"""The minibatches of any chunk are those of a plain loop over clients, epochs and minibatches."""

from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from flow_pl.data.batch import FOLDS, GLOBAL, LOCAL
from flow_pl.engine.schedule import make_schedule
from flow_pl.methods.steps import Part
from tests.support import chunk


def plain(batch, client, part, orders, batch_size):
    """A client's minibatches, one after the other."""
    bits = {"local": LOCAL, "global": GLOBAL}
    fold = batch.round % FOLDS
    inside = {"all": lambda _: True, "fold": lambda b: b >> 2 == fold, "other_folds": lambda b: b >> 2 != fold}.get(
        part, lambda b: b & bits[part]
    )
    for epoch in orders:
        rows = [
            row
            for row in batch.order[client, epoch].tolist()
            if row < batch.train.sizes[client] and inside(int(batch.part[client, row]))
        ]
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5).map(lambda sizes: sorted(sizes, reverse=True)),
    part=st.sampled_from(get_args(Part)),
    number=st.integers(0, 5),
    first=st.integers(0, 2),
    epochs=st.integers(0, 3),
    batch_size=st.integers(1, 14),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_schedule_is_that_of_a_plain_loop(sizes, part, number, first, epochs, batch_size, padding, seed):
    batch = chunk(sizes, epochs=3, seed=seed, pad_to=sizes[0] + padding)
    batch.round = number
    orders = range(first, first + epochs)
    schedule = make_schedule(batch, part, orders, batch_size)
    expected = [list(plain(batch, client, part, orders, batch_size)) for client in range(len(sizes))]
    longest = batch.train.mask.shape[1]
    steps = max(map(len, expected))
    assert schedule.index.shape == schedule.mask.shape == (steps, len(sizes), batch_size)
    assert schedule.active == tuple(sum(len(rows) > t for rows in expected) for t in range(steps))
    assert schedule.examples == sum(len(rows) for client in expected for rows in client)
    for t in range(steps):
        for client, minibatches in enumerate(expected):
            rows = minibatches[t] if t < len(minibatches) else []
            # the minibatch in its order at the start of the row, and nothing else
            assert schedule.mask[t, client].tolist() == [i < len(rows) for i in range(batch_size)]
            assert (schedule.index[t, client, : len(rows)] - client * longest).tolist() == rows
