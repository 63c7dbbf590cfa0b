import pytest

from flow_pl.utils.rng import Stream, client_generators, client_keys, generator, key


def draw(*args):
    return generator(*args).integers(2**62)


def test_same_arguments_draw_the_same_numbers():
    assert draw(3, Stream.ORDER, 7, 11) == draw(3, Stream.ORDER, 7, 11)


def test_every_argument_matters():
    draws = [
        draw(3, Stream.ORDER, 7, 11),
        draw(4, Stream.ORDER, 7, 11),
        draw(3, Stream.PART, 7, 11),
        draw(3, Stream.ORDER, 8, 11),
        draw(3, Stream.ORDER, 7, 12),
        draw(3, Stream.ORDER, 11, 7),
        draw(3, Stream.ORDER, 7),
        draw(3, Stream.ORDER, 7, 0),
        draw(2**32 + 3, Stream.ORDER, 7, 11),
    ]
    assert len(set(draws)) == len(draws)


def test_numbers_are_the_same_in_every_process_and_version():
    # fixed by numpy's SeedSequence and PCG64, whose raw output is guaranteed not to change
    assert generator(0, Stream.COHORT, 5).bit_generator.random_raw() == 11369596001314027012


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 1, 2**140])
@pytest.mark.parametrize("keys", [(), (0,), (2**33, 7)])
def test_clients_draw_together_what_each_draws_alone(seed, keys):
    clients = [0, 1, 2**31, 2**32 - 1]
    alone = [generator(seed, Stream.ORDER, *keys, client) for client in clients]
    together = client_generators(seed, Stream.ORDER, *keys, clients=clients)
    assert [g.bit_generator.state for g in together] == [g.bit_generator.state for g in alone]
    expected = [key(seed, Stream.DROPOUT, *keys, client) for client in clients]
    assert client_keys(seed, Stream.DROPOUT, *keys, clients=clients).tolist() == expected


def test_large_numbers_and_none_are_clients_too():
    assert client_keys(1, Stream.ORDER, 2, clients=[3, 2**40]).tolist() == [
        key(1, Stream.ORDER, 2, 3),
        key(1, Stream.ORDER, 2, 2**40),
    ]
    assert client_keys(1, Stream.ORDER, 2, clients=[]).shape == (0,)
    assert client_generators(1, Stream.ORDER, 2, clients=[]) == []
