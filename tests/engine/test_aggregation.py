"""Robust aggregation: against plain references, whatever the chunks, the processes and where the cohort is held."""

from threading import Barrier, Thread

import numpy as np
import pytest
import torch

from flow_pl.engine.aggregation import (
    AggregationError,
    CohortUpdates,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from flow_pl.engine.aggregation import cohort as cohort_module
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.server_round import ServerRound, sent_parameters
from flow_pl.engine.training_statistics import TrainingStatistics
from flow_pl.errors import ConfigurationError
from flow_pl.methods import FedAvg, Flow, HypCluster, Local
from tests.support import bound

CLIENTS = 9


def updates(method, clients=CLIENTS, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        name: {key: torch.randn(clients, *p.shape, generator=random) for key, p in group.items()}
        for name, group in sent_parameters(method).items()
    }


def rows(groups):
    return torch.cat([p.flatten(1) for group in groups.values() for p in group.values()], 1)


def some(groups, index):
    return {name: {key: p[index].clone() for key, p in group.items()} for name, group in groups.items()}


def chunk(client, groups, weight):
    return ClientUpdate(
        client, groups, {name: weight.clone() for name in groups}, TrainingStatistics(torch.device("cpu")), {}
    )


def combined(aggregation, method, groups, weight=None, chunks=(range(CLIENTS),), folder=None):
    """The server's update that a round of one process makes, and its figures."""
    weight = torch.ones(len(rows(groups))) if weight is None else weight
    round_ = ServerRound(method, aggregation=aggregation, folder=folder)
    for members in map(torch.tensor, map(list, chunks)):
        round_.add(chunk(members, some(groups, members), weight[members]))
    figures = round_.finish(lambda tensor: tensor, 0)
    return -torch.cat([p.grad.flatten() for group in sent_parameters(method).values() for p in group.values()]), figures


def krum_scores(matrix, bad):
    """Blanchard et al., section 4, by plain loops."""
    scores = []
    for i, row in enumerate(matrix):
        squares = sorted(float((row - other).square().sum()) for j, other in enumerate(matrix) if j != i)
        scores.append(sum(squares[: len(matrix) - bad - 2]))
    return scores


def weiszfeld(matrix, weight, iterations=200):
    """The geometric median by distances of the points themselves."""
    point = (weight[:, None] * matrix).sum(0) / weight.sum()
    for _ in range(iterations):
        pull = weight / (matrix - point).norm(dim=1).clamp_min(1e-6)
        point = (pull[:, None] * matrix).sum(0) / pull.sum()
    return point


def test_the_mean_is_bit_identical_to_a_round_without_aggregation():
    method = bound(Flow())
    groups, weight = updates(method), torch.arange(1.0, 10)
    found, _ = combined(Mean(), method, groups, weight)
    assert torch.equal(found, combined(None, method, groups, weight)[0])
    torch.testing.assert_close(found, (weight[:, None] * rows(groups)).sum(0) / weight.sum())


def test_a_norm_bound_shrinks_long_updates_and_keeps_the_weights():
    method = bound(Flow())
    groups, weight = updates(method), torch.arange(1.0, 10)
    for i in range(CLIENTS):
        for group in groups.values():
            for p in group.values():
                p[i] *= i
    matrix = rows(groups)
    short = matrix * (10.0 / matrix.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp_max(1)
    found, _ = combined(NormBound(10.0), method, groups, weight, chunks=(range(4), range(4, 9)))
    torch.testing.assert_close(found, (weight[:, None] * short).sum(0) / weight.sum())


@pytest.mark.parametrize("clients", [8, 9])
def test_the_coordinate_median_is_numpys(clients):
    method = bound(Flow())
    groups = updates(method, clients)
    found, _ = combined(CoordinateMedian(), method, groups, chunks=(range(clients),))
    np.testing.assert_allclose(found, np.median(rows(groups).numpy(), axis=0), rtol=1e-6)


def test_the_trimmed_mean_drops_a_share_at_both_ends():
    method = bound(Flow())
    groups = updates(method)
    found, _ = combined(TrimmedMean(0.25), method, groups)
    expected = np.sort(rows(groups).numpy(), axis=0)[2:-2].mean(0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(combined(TrimmedMean(0.0), method, groups)[0], rows(groups).mean(0))


def test_the_geometric_median_is_that_of_the_points_and_weighted():
    method = bound(Flow())
    groups, weight = updates(method), torch.arange(1.0, 10)
    found, _ = combined(GeometricMedian(200), method, groups, weight)
    torch.testing.assert_close(found, weiszfeld(rows(groups), weight), atol=1e-4, rtol=1e-4)


def test_the_geometric_median_of_a_majority_in_one_place_is_that_place():
    method = bound(FedAvg())
    groups = updates(method)
    for p in groups["global"].values():
        p[3:] = p[3].clone()
    found, _ = combined(GeometricMedian(100), method, groups)
    torch.testing.assert_close(found, rows(groups)[3], atol=1e-4, rtol=1e-4)


def test_krum_and_multi_krum_choose_by_their_neighbours():
    method = bound(Flow())
    groups = updates(method)
    scores = krum_scores(rows(groups), bad=2)
    best = np.argsort(scores, kind="stable")
    torch.testing.assert_close(combined(Krum(0.25), method, groups)[0], rows(groups)[best[0]])
    for selected in (None, 3):
        found, _ = combined(MultiKrum(0.25, selected), method, groups)
        torch.testing.assert_close(found, rows(groups)[best[: selected or 7].copy()].mean(0))


ALL = [CoordinateMedian, lambda **s: TrimmedMean(0.25, **s), GeometricMedian, lambda **s: Krum(0.25, **s),
       lambda **s: MultiKrum(0.25, **s)]  # fmt: skip


@pytest.mark.parametrize("make", ALL)
def test_two_of_nine_cannot_move_it_far(make):
    method = bound(FedAvg())
    groups = updates(method)
    honest = rows(groups)[2:].mean(0)
    for p in groups["global"].values():
        p[:2] = 1e4
    found, _ = combined(make(), method, groups)
    assert (found - honest).norm() < 2 * rows(groups)[2:].norm(dim=1).max()
    assert (combined(Mean(), method, groups)[0] - honest).norm() > 1e3


@pytest.mark.parametrize(
    ("make", "storage"),
    [
        pytest.param(make, storage, marks=[] if (number % 2 == 0) == (storage == "disk") else pytest.mark.slow)
        for number, make in enumerate(ALL)
        for storage in ("device", "disk")
    ],
)
def test_chunks_processes_and_storage_change_nothing(make, storage, tmp_path, monkeypatch):
    """A client whose update is not finite among them; blocks of a few columns."""
    method = bound(Flow())
    groups = updates(method)
    groups["global"][next(iter(groups["global"]))][4, 0] = torch.nan
    reference, _ = combined(make(), method, groups)
    without, _ = combined(make(), method, some(groups, torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])), chunks=(range(8),))
    torch.testing.assert_close(reference, without, atol=1e-6, rtol=1e-6)
    monkeypatch.setattr(cohort_module, "BLOCK", 64)
    other, _ = combined(
        make(storage=storage), method, groups, chunks=([8, 3], [5], [0, 4, 7, 1, 2, 6]), folder=tmp_path
    )
    torch.testing.assert_close(other, reference, atol=1e-6, rtol=1e-6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", ALL)
def test_mixed_precision_combines_in_float32(make):
    """The round ends within a training step, under its autocast."""
    method = bound(FedAvg())
    groups = updates(method)
    expected, _ = combined(make(), method, groups)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = combined(make(), method, groups)
    assert torch.equal(found, expected)


def gathered(parts, matrix):
    """What each of several processes sees of a cohort, by sums over all of them, call by call."""
    barrier, slots, results = Barrier(len(parts)), [None] * len(parts), [None] * len(parts)

    def process(rank):
        def reduce(tensor):
            slots[rank] = tensor
            barrier.wait()
            total = sum(slots)
            barrier.wait()
            return total

        held = CohortUpdates(matrix.shape[1], torch.device("cpu"))
        if parts[rank]:
            index = torch.tensor(parts[rank])
            held.add(index, {"g": {"p": matrix[index]}}, index.float() + 1, None)
        held.gathered(reduce, rank, len(parts))
        results[rank] = (held.client, held.weight, torch.cat(list(held.columns()), 1))

    threads = [Thread(target=process, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_process_sees_the_whole_cohort_in_one_order(monkeypatch):
    monkeypatch.setattr(cohort_module, "BLOCK", 20)
    matrix = torch.randn(7, 11)
    for client, weight, found in gathered([[6, 1], [], [0, 5, 2, 3, 4]], matrix):
        assert client.tolist() == list(range(7))
        assert weight.tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert torch.equal(found, matrix)


def test_a_round_without_clients_moves_nothing():
    method = bound(FedAvg())
    round_ = ServerRound(method, aggregation=CoordinateMedian())
    round_.finish(lambda tensor: tensor, 0)
    assert all(not p.grad.any() for p in method.modules["global"].parameters())


def test_too_few_clients_in_a_round_are_named():
    method = bound(FedAvg())
    with pytest.raises(AggregationError, match=r"round 0: Krum with share 0.4 takes 1 of 3 clients to be bad"):
        combined(Krum(0.4), method, updates(method, 3), chunks=(range(3),))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NormBound(0.0), "norm is 0.0"),
        (lambda: TrimmedMean(0.5), "share is 0.5, expected less than 0.5"),
        (lambda: TrimmedMean(-0.1), "share is -0.1"),
        (lambda: MultiKrum(0.2, 0), "selected is 0"),
        (lambda: GeometricMedian(0), "iterations is 0"),
        (lambda: GeometricMedian(3, -1.0), "smoothing is -1.0"),
        (lambda: CoordinateMedian("tape"), "storage is tape"),
    ],
)
def test_settings_out_of_range_are_refused(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()


@pytest.mark.parametrize(
    ("aggregation", "method", "weighting", "cohort", "attackers", "said"),
    [
        (Krum(0.4), FedAvg(), "uniform", 4, 0, r"at least 5: lower share or selected, .*data.cohort_size"),
        (MultiKrum(0.2, 9), FedAvg(), "uniform", 10, 0, "needs at least 11"),
        (TrimmedMean(0.2), FedAvg(), "uniform", 10, 3, r"3 of 10 clients are expected to attack .* tolerates 2"),
        (GeometricMedian(), FedAvg(), "examples", 10, 5, "tolerates 4"),
        (CoordinateMedian(), FedAvg(), "examples", 10, 0, "weighs all clients equally: set it to uniform"),
        (NormBound(), HypCluster(), "examples", 10, 0, "take part in some groups only"),
        (CoordinateMedian(), Local(), "uniform", 10, 0, "send nothing"),
    ],
)
def test_what_an_aggregation_cannot_serve_is_refused(aggregation, method, weighting, cohort, attackers, said):
    with pytest.raises(ConfigurationError, match=said):
        aggregation.check(bound(method), weighting, cohort, attackers)


def test_the_mean_serves_every_method():
    for method in (FedAvg(), HypCluster(), Local()):
        Mean().check(bound(method), "examples", 1, 1)
