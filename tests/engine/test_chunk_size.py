"""The number of clients trained side by side: measured, bounded by the memory, without effect on results."""

from unittest.mock import patch

import pytest
import torch

from flow_pl.engine import chunk_size as chunking
from flow_pl.engine.chunk_size import ChunkSize
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import server_groups
from flow_pl.errors import ConfigurationError
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.methods import FedAvg, FineTuning
from tests.support import bound, chunk, delta, flat, loop, sgd
from tests.test_module import data, fitted, module, parameters, trainer

SIZES = (20, 9, 9, 4, 1)


def rounds(sizes, cost, number=12, **settings):
    """Piece sizes of each round, with a clock on which a piece costs `cost(size)` for each example."""
    clock = [0.0]
    tuner = ChunkSize(automatic=True, **settings)
    batch = chunk(sizes)

    def train(piece):
        clock[0] += cost(len(piece)) * sum(piece.train.sizes)
        return len(piece)

    seen = []
    with patch("flow_pl.engine.chunk_size.time.perf_counter", lambda: clock[0]):
        for _ in range(number):
            seen.append(list(tuner.run(batch, train)))
            tuner.end_round()
    return seen, tuner


@pytest.mark.parametrize(("best", "pieces"), [(16, [16]), (4, [4] * 4), (1, [1] * 16)])
def test_the_fastest_size_is_kept(best, pieces):
    seen, tuner = rounds([3] * 16, lambda size: 1 + abs(size - best))
    assert seen[:6] == [[16]] * 2 + [[4] * 4] * 2 + [[1] * 16] * 2
    assert seen[6:] == [pieces] * 6
    assert tuner.settled
    again = ChunkSize(automatic=True)
    again.load_state_dict(tuner.state_dict())
    assert list(again.run(chunk([3] * 16), len)) == pieces


def test_what_is_slow_at_first_is_not_held_against_a_size():
    calls = []

    def cost(size):
        calls.append(size)
        return 100 if calls.count(16) <= 1 else 1 + (16 - size)

    assert rounds([3] * 16, cost)[0][-1] == [16]


def test_memory_bounds_the_candidates(monkeypatch):
    monkeypatch.setattr(chunking, "_free_memory", lambda device: 2 * chunking.COPIES * 100 * 5)
    seen, _ = rounds([3] * 16, lambda size: 1.0, client_bytes=100)
    assert max(max(sizes) for sizes in seen) == 5


def test_pieces_train_as_the_whole_chunk():
    """Each piece is padded to its own longest client; what is sent is the same."""
    method, batch = bound(FedAvg()), chunk(SIZES, pad_to=25)
    pieces = [batch.clients(0, 2), batch.clients(2, 4), batch.clients(4, 5)]
    assert [p.train.x.shape[1] for p in pieces] == [20, 9, 1]
    assert [p.client.tolist() for p in pieces] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([p.key for p in pieces]), batch.key)
    whole = flat(delta(loop().train_clients(method, server_groups(method), batch))["global"])
    parts = [flat(delta(loop().train_clients(method, server_groups(method), p))["global"]) for p in pieces]
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-5)
    result = evaluate_clients(loop(), method, server_groups(method), batch)
    again = [evaluate_clients(loop(), method, server_groups(method), p) for p in pieces]
    assert torch.equal(torch.cat([r.generalized for r in again]), result.generalized)


def test_auto_gives_the_numbers_of_a_fixed_size(tmp_path):
    reference, run = fitted(tmp_path, FedAvg(), rounds=5)
    other, other_run = fitted(tmp_path, FedAvg(), rounds=5, chunk_size="auto")
    torch.testing.assert_close(parameters(other), parameters(reference), atol=1e-5, rtol=1e-4)
    name = "val/personalized_accuracy"
    assert other_run.callback_metrics[name] == run.callback_metrics[name]
    assert other.chunks.settled


class _Scarce(FederatedLoop):
    """A loop whose device holds so many clients."""

    holds = 2
    asked: list[int]

    def train_clients(self, method, server, batch, *args):
        self.asked.append(len(batch))
        if len(batch) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return super().train_clients(method, server, batch, *args)


def scarce(holds):
    made = _Scarce(1, None, 5, sgd)
    made.holds, made.asked = holds, []
    return made


def test_a_chunk_that_does_not_fit_is_halved_and_nothing_is_lost(tmp_path):
    reference, _ = fitted(tmp_path, FedAvg(), rounds=2, chunk_size=6)
    model = module(FedAvg())
    limited = scarce(2)
    limited.client_optimizer = model.loop.client_optimizer
    model.loop = limited
    with pytest.warns(UserWarning, match="6 clients side by side do not fit .* continuing with 3"):
        trainer(2).fit(model, datamodule=data(tmp_path / "cache", chunk_size=6))
    assert limited.asked == [6, 3, 1, 1, 1, 1, 1, 1] + [1] * 6
    torch.testing.assert_close(parameters(model), parameters(reference), atol=1e-5, rtol=1e-4)


def test_a_client_that_does_not_fit_is_told(tmp_path):
    tuner = ChunkSize()

    def full(piece):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")

    with (
        pytest.warns(UserWarning, match="do not fit"),
        pytest.raises(ConfigurationError, match=r"one client, with 20 training .* \(CUDA out.*GiB\.\): lower"),
    ):
        list(tuner.run(chunk((20, 9)), full))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def broken(piece):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(ChunkSize().run(chunk((3, 2)), broken))


def test_predictions_of_pieces_are_put_together(tmp_path):
    """A run with pieces predicts what a run with whole chunks predicts."""

    def predicted(**settings):
        torch.manual_seed(0)
        model = module(FineTuning())
        run = trainer()
        model.chunks.load_state_dict({"size": settings.pop("size", None)})
        return run.predict(model, datamodule=data(tmp_path, **settings))

    whole, pieces = predicted(chunk_size=6), predicted(chunk_size=6, size=2)
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one.client, other.client)
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.prediction[one.mask], other.prediction[one.mask])
