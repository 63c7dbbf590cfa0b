"""Metrics over clients: exact figures, clients without examples, and reduction over processes."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, tensor
from torchmetrics import Metric

from flow_pl.evaluation.metrics import ClientAccuracy, ClientGain, RoutedShare

NAN = math.nan


def accuracy(rows: list[list[float]]) -> ClientAccuracy:
    metric = ClientAccuracy()
    metric.update(*tensor(rows).view(-1, 4).T)
    return metric


def two_accuracies(rows: list[list[float]]) -> ClientAccuracy:
    metric = ClientAccuracy("content")
    metric.update(*tensor(rows).view(-1, 6).T)
    return metric


def gain(rows: list[list[float]]) -> ClientGain:
    metric = ClientGain()
    metric.update(*tensor(rows).view(-1, 5).T)
    return metric


def routed(rows: list[list[float]]) -> RoutedShare:
    metric = RoutedShare(["first", "second"])
    table = tensor(rows).view(-1, 3)
    metric.update(table[:, 0], table[:, 1:])
    return metric


def figures(metric: Metric) -> dict[str, float]:
    values: dict[str, Tensor] = metric.compute()
    assert all(value.shape == () and value.dtype == torch.float32 for value in values.values())
    return {name: value.item() for name, value in values.items()}


def approx(**expected: float) -> dict[str, object]:
    return {name.replace("__", "/"): pytest.approx(value, nan_ok=True) for name, value in expected.items()}


def test_accuracy_over_examples_and_over_clients() -> None:
    """Accuracies 1/2, 1/4 and 3/4; 8 of 14 examples right; percentiles interpolate linearly.

    Their differences, over all ordered pairs, are 2 (1/4 + 1/4 + 1/2): Gini's coefficient is that over 2 * 9 * 1/2.
    The loss is over what was summed, here also of a client without an example to be right about.
    """
    assert figures(accuracy([[2, 1, 4.0, 20], [4, 1, 2.0, 4], [0, 0, 3.0, 6], [8, 6, 1.0, 10]])) == approx(
        accuracy=8 / 14,
        accuracy_client_mean=0.5,
        accuracy_p10=0.25 + 0.2 * 0.25,
        accuracy_p50=0.5,
        accuracy_p90=0.75 - 0.2 * 0.25,
        accuracy_worst_decile=0.25,
        accuracy_client_std=(2 / 3 * 0.25**2) ** 0.5,
        accuracy_client_gini=2 / 9,
        loss=10 / 40,
    )


def test_a_second_accuracy_is_over_clients_with_something_in_it() -> None:
    """Second: 1 of 1 and 3 of 6; the client without any counts in the first accuracy alone."""
    values = figures(two_accuracies([[2, 1, 4.0, 2, 1, 1], [4, 1, 2.0, 4, 0, 0], [8, 6, 1.0, 8, 6, 3]]))
    assert values == approx(
        accuracy=8 / 14,
        accuracy_client_mean=0.5,
        accuracy_p10=0.3,
        accuracy_p50=0.5,
        accuracy_p90=0.7,
        accuracy_worst_decile=0.25,
        accuracy_client_std=(2 / 3 * 0.25**2) ** 0.5,
        accuracy_client_gini=2 / 9,
        loss=7 / 14,
        accuracy_content=4 / 7,
        accuracy_content_client_mean=0.75,
        accuracy_content_p10=0.55,
        accuracy_content_p50=0.75,
        accuracy_content_p90=0.95,
        accuracy_content_worst_decile=0.5,
        accuracy_content_client_std=0.25,
        accuracy_content_client_gini=1 / 6,
    )


@pytest.mark.parametrize("clients", [1, 10, 11, 25])
def test_fairness_against_a_loop_over_pairs(clients: int) -> None:
    values = torch.rand(clients, generator=torch.Generator().manual_seed(clients)).mul(100).round() / 100
    found = figures(accuracy([[100, 100 * value, 0, 1] for value in values.tolist()]))
    pairs = [abs(a - b) for a in values.tolist() for b in values.tolist()]
    assert found["accuracy_client_gini"] == pytest.approx(
        sum(pairs) / (2 * clients**2 * values.mean().item()), abs=1e-6
    )
    worst = sorted(values.tolist())[: math.ceil(clients / 10)]
    assert found["accuracy_worst_decile"] == pytest.approx(sum(worst) / len(worst))
    assert found["accuracy_client_std"] == pytest.approx(values.std(correction=0).item(), abs=1e-6)


def test_no_gini_where_nothing_is_right() -> None:
    assert math.isnan(figures(accuracy([[2, 0, 1.0, 2], [3, 0, 1.0, 3]]))["accuracy_client_gini"])


def test_no_gini_where_an_accuracy_is_negative() -> None:
    """R² may be: the mean may then be near 0, and the coefficient anything."""
    found = figures(accuracy([[2, -3.0, 1.0, 2], [2, 2.0, 1.0, 2]]))
    assert math.isnan(found["accuracy_client_gini"])
    assert found["accuracy_client_std"] == pytest.approx(1.25)


def test_a_client_with_an_undefined_accuracy_is_not_left_out() -> None:
    """A real-valued prediction of NaN: sorted last, it would be among the best, and neither helped nor harmed."""
    found = figures(accuracy([[2, math.nan, 1.0, 2], *[[2, 1.0, 1.0, 2]] * 11]))
    assert math.isnan(found["accuracy_worst_decile"])
    found = figures(gain([[4, 2, math.nan, math.nan, 4], [4, 3, 1, 1, 3]]))
    assert all(math.isnan(found[name]) for name in ("gain", "clients_helped", "clients_unchanged", "clients_harmed"))
    infinite = figures(gain([[4, 2, -math.inf, 0, 4], [4, 3, 4, 1, 3]]))
    assert (infinite["clients_helped"], infinite["clients_harmed"]) == (0.5, 0.5)


def test_a_table_is_not_mixed_up_by_a_missing_column() -> None:
    with pytest.raises(AssertionError, match="4 columns in a table of 6"):
        ClientAccuracy("content").update(*torch.ones(4, 3))


def test_chunks_do_not_matter() -> None:
    rows = [[3, 1, 0.5, 3], [2, 2, 0.25, 2], [0, 0, 0.0, 0], [5, 1, 4.0, 5], [1, 0, 3.0, 1]]
    chunked = ClientAccuracy()
    for start in (0, 2, 4, 6):  # the last chunk is empty
        chunked.update(*tensor(rows)[start : start + 2].T)
    assert figures(chunked) == figures(accuracy(rows))


def test_sums_are_exact_beyond_single_precision() -> None:
    """2^24 + 1 is no single precision number."""
    assert accuracy([[2**24, 2**24, 0, 1], [1, 1, 0, 1], [2**24, 0, 0, 1]]).table()[0].sum().item() == 2**25 + 1


def test_gain_of_clients_and_examples() -> None:
    """Clients: 2 -> 3 of 4 (helped), 3 -> 1 of 4 (harmed), 2 -> 2 of 2 (unchanged), and one without examples."""
    metric = gain([[4, 2, 3, 1, 4], [4, 3, 1, 1, 3], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0]])
    assert figures(metric) == approx(
        gain=-1 / 10,
        gain_client_mean=(1 / 4 - 2 / 4) / 3,
        clients_helped=1 / 3,
        clients_unchanged=1 / 3,
        clients_harmed=1 / 3,
        examples_both_right=4 / 10,
        examples_only_generalized=3 / 10,
        examples_only_personalized=2 / 10,
        examples_neither=1 / 10,
        global_or_local_accuracy=9 / 10,
    )


def test_the_best_mixture_is_one_for_all_clients() -> None:
    """Clients' own best would get 4 of 8 right, the best single one gets 3; the personalized models get 4."""
    metric = ClientGain()
    for count, either, mixtures in ((4.0, 4.0, [2.0, 1.0, 0.0]), (4.0, 3.0, [0.0, 2.0, 2.0])):
        metric.update(*tensor([[count, 0, 2, 0, either]]).T, tensor([mixtures]))
    found = figures(metric)
    assert found["best_mixture_accuracy"] == pytest.approx(3 / 8)
    assert found["gain_over_mixture"] == pytest.approx(1 / 8)


def test_nothing_is_mixed_without_a_local_model() -> None:
    metric = ClientGain()
    metric.update(*tensor([[4.0, 2, 3, 1]]).T)
    assert not {"global_or_local_accuracy", "best_mixture_accuracy", "gain_over_mixture"} & metric.compute().keys()


def test_routed_share_by_block() -> None:
    """Client shares: (2 + 4) / 8 and (1 + 0) / 4; blocks: 3 of 6 and 4 of 6 decisions."""
    assert figures(routed([[4, 2, 4], [2, 1, 0], [0, 0, 0]])) == approx(
        routed_local=7 / 12,
        routed_local_p10=0.25 + 0.1 * 0.5,
        routed_local_p50=0.5,
        routed_local_p90=0.25 + 0.9 * 0.5,
        routed_local__first=3 / 6,
        routed_local__second=4 / 6,
    )


@pytest.mark.parametrize("make", [accuracy, two_accuracies, gain, routed])
def test_no_client_gives_nan(make) -> None:
    assert all(math.isnan(value) for value in figures(make([])).values())


ROWS = {
    accuracy: [[2, 1, 0.5, 2], [4, 1, 3.0, 9], [8, 6, 2.0, 8], [1, 0, 1.0, 1]],
    two_accuracies: [[2, 1, 0.5, 2, 1, 1], [4, 1, 3.0, 9, 3, 1], [8, 6, 2.0, 8, 0, 0], [1, 0, 1.0, 1, 1, 0]],
    gain: [[4, 2, 3, 1, 4], [4, 3, 1, 1, 3], [2, 2, 2, 2, 2], [1, 0, 1, 0, 1]],
    routed: [[4, 2, 4], [2, 1, 0], [3, 3, 3], [1, 0, 1]],
}


EMPTY = {two_accuracies: lambda: ClientAccuracy("content"), routed: lambda: RoutedShare(["first", "second"])}
"""How to make a metric that saw no client, where that takes an argument."""


def _reduce(rank: int, folder: str) -> dict[tuple[str, int], dict[str, float]]:
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank, world_size=2)
    results = {}
    for split in (1, 4):  # 1 and 3 clients, then 4 and none at all
        for make, rows in ROWS.items():
            if rank == 1 and split == 4:
                metric = EMPTY.get(make, type(make([])))()
            else:
                metric = make(rows[:split] if rank == 0 else rows[split:])
            results[make.__name__, split] = figures(metric)
    dist.destroy_process_group()
    return results


def _second_process(_: int, folder: str) -> None:
    torch.save(_reduce(1, folder), f"{folder}/second.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_processes_get_the_figures_of_one(tmp_path) -> None:
    expected = {(make.__name__, split): figures(make(rows)) for make, rows in ROWS.items() for split in (1, 4)}
    second = torch.multiprocessing.spawn(_second_process, args=(str(tmp_path),), join=False)
    assert _reduce(0, str(tmp_path)) == expected
    second.join()
    assert torch.load(tmp_path / "second.pt") == expected
