import numpy as np
import pytest
import torch

from flow_pl.data import GLOBAL, LOCAL, Chunk, ClientDataset, Federation, part_sizes

SIZES = [1, 2, 10, 30, 10, 3]


@pytest.fixture
def federation(make_store):
    return Federation(make_store(SIZES), new_client_fraction=0)


def by_client(batch):
    """What a batch says of each client, without its padding."""
    found = {}
    for i, client in enumerate(batch.client.tolist()):
        n = batch.train.sizes[i]
        found[client] = [
            batch.train.x[i, :n].tolist(),
            batch.train.y[i, :n].tolist(),
            batch.part[i, :n].tolist(),
            batch.order[i, :, :n].tolist(),
        ]
        if batch.heldout is not None:
            m = batch.heldout.sizes[i]
            found[client] += [batch.heldout.x[i, :m].tolist(), batch.heldout.y[i, :m].tolist()]
    return found


def test_clients_come_by_decreasing_number_of_training_examples(federation):
    batch = ClientDataset(federation, seed=0)[Chunk(3, (0, 4, 3, 5, 2))]
    assert batch.client.tolist() == [3, 4, 2, 0, 5]  # 4 and 2, 0 and 5 are of equal size
    assert batch.train.sizes == (21, 7, 7, 1, 1)
    assert len(batch) == 5
    assert batch.round == 3
    assert batch.heldout is None


def test_rows_are_those_of_the_split_and_padding_is_zero(federation):
    batch = ClientDataset(federation, seed=0, heldout="test")[Chunk(-1, (2, 3))]
    for examples, part in ((batch.train, "train"), (batch.heldout, "test")):
        assert examples.x.shape == (2, max(examples.sizes), 2)
        assert examples.x.dtype == torch.float32
        assert examples.y.dtype == torch.int64
        for i, client in enumerate([3, 2]):
            rows, n = getattr(federation.split(client), part), examples.sizes[i]
            assert examples.mask[i].tolist() == [True] * n + [False] * (max(examples.sizes) - n)
            np.testing.assert_array_equal(examples.x[i, :n], np.stack([np.full(n, client), rows], axis=1))
            np.testing.assert_array_equal(examples.y[i, :n], rows % 3)
            assert not examples.x[i, n:].any()
            assert not examples.y[i, n:].any()


def test_predict_has_the_test_rows_and_those_without_a_label(make_store):
    federation = Federation(make_store([10, 12], unlabelled=[0, 4]), new_client_fraction=0)
    batch = ClientDataset(federation, seed=0, heldout="predict")[Chunk(-1, (0, 1))]
    assert batch.train.sizes == (7, 5)
    assert batch.heldout.sizes == (2, 6)
    assert batch.heldout.y[1, :2].min() >= 0
    assert batch.heldout.y[1, 2:].tolist() == [-1] * 4
    assert batch.heldout.x[1, 2:, 1].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 31])
def test_parts_are_a_fixed_random_half(make_store, n):
    federation = Federation(make_store([n, n]), val_fraction=0, test_fraction=0, new_client_fraction=0)
    batch = ClientDataset(federation, seed=0)[Chunk(5, (0, 1))]
    local_size, global_size = part_sizes(n)
    is_local, is_global = (batch.part & LOCAL) > 0, (batch.part & GLOBAL) > 0
    assert batch.part.dtype == torch.uint8
    assert is_local.sum(1).tolist() == [local_size] * 2
    assert is_global.sum(1).tolist() == [global_size] * 2
    assert (is_local | is_global).all()
    assert (is_local & is_global).sum() == (2 if n == 1 else 0)
    again = ClientDataset(federation, seed=0, heldout="test")[Chunk(-1, (0, 1))]
    assert torch.equal(batch.part, again.part)
    if n == 31:
        assert not torch.equal(batch.part[0], batch.part[1])
        assert not torch.equal(batch.part, ClientDataset(federation, seed=1)[Chunk(5, (0, 1))].part)


def test_orders_are_permutations_with_the_real_examples_first(federation):
    batch = ClientDataset(federation, seed=0, orders=3)[Chunk(5, tuple(range(6)))]
    assert batch.order.shape == (6, 3, 21)
    assert batch.order.dtype == torch.int64
    for i, n in enumerate(batch.train.sizes):
        for epoch in range(3):
            assert sorted(batch.order[i, epoch, :n].tolist()) == list(range(n))
            assert batch.order[i, epoch, n:].tolist() == list(range(n, 21))
    assert not torch.equal(batch.order[0, 0], batch.order[0, 1])


def test_orders_depend_on_seed_round_and_client(federation):
    def order(seed, round_, heldout=None):
        return ClientDataset(federation, seed, heldout)[Chunk(round_, (3,))].order.tolist()

    orders = [order(0, 5), order(1, 5), order(0, 6), order(0, -1, "val"), order(0, 0)]
    assert len({str(each) for each in orders}) == 5
    assert order(0, 5) == orders[0]
    assert order(0, -1, "test") == orders[3]


def test_more_epochs_do_not_change_the_first(federation):
    few, many = (ClientDataset(federation, 0, orders=epochs)[Chunk(5, (3,))].order for epochs in (1, 4))
    assert torch.equal(few, many[:, :1])


@pytest.mark.parametrize(("round_", "heldout"), [(2, None), (-1, "val"), (-1, "test"), (-1, "predict")])
def test_a_client_is_the_same_in_any_chunk(federation, round_, heldout):
    dataset = ClientDataset(federation, seed=7, heldout=heldout, orders=2)
    together = by_client(dataset[Chunk(round_, (0, 1, 2, 3, 4, 5))])
    apart = {}
    for clients in ((5,), (1, 3), (4, 2, 0)):
        apart |= by_client(dataset[Chunk(round_, clients)])
    assert together == apart


@pytest.mark.parametrize("heldout", [None, "val"])
def test_an_empty_chunk_has_the_right_shapes(federation, heldout):
    batch = ClientDataset(federation, seed=0, heldout=heldout, orders=2)[Chunk(1, ())]
    full = ClientDataset(federation, seed=0, heldout=heldout, orders=2)[Chunk(1, (3, 4))]
    assert len(batch) == 0
    assert batch.client.shape == (0,)
    assert batch.train.x.shape == (0, 0, 2)
    assert batch.train.sizes == ()
    assert batch.order.shape == (0, 2, 0)
    for name in ("client", "part", "order"):
        assert getattr(batch, name).dtype == getattr(full, name).dtype
    for name in ("x", "y", "mask"):
        assert getattr(batch.train, name).dtype == getattr(full.train, name).dtype
        if heldout:
            assert getattr(batch.heldout, name).dtype == getattr(full.heldout, name).dtype


def test_the_key_of_a_client_depends_on_run_round_and_client_alone(federation):
    def key(run, round_, *clients):
        batch = ClientDataset(federation, run)[Chunk(round_, clients)]
        return dict(zip(batch.client.tolist(), batch.key.tolist(), strict=True))

    together = key(0, 1, 3, 2)
    assert {**key(0, 1, 3), **key(0, 1, 2)} == together
    keys = [*together.values(), key(1, 1, 3)[3], key(0, 2, 3)[3], key(0, -1, 3)[3]]
    assert len(set(keys)) == 5
    assert key(0, 1) == {}
