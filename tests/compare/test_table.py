"""What stands in the table of a comparison made by hand."""

import csv
import io
from dataclasses import replace

import pytest
from rich.console import Console

from flow_pl.compare.formats import MARK, caption, markdown, method_csv, rich_tables, run_csv
from flow_pl.compare.table import population_rows
from flow_pl.results.runs import Comparison
from tests.compare.fakes import comparison, run_results

NAMES = [f"client {i}" for i in range(8)]


def accuracies(shift, spread=0.0):
    """Eight clients whose own model is right in 0.4 + shift + spread x (0 ... 7) of the cases."""
    return {name: (0.3, 0.4 + shift + spread * i) for i, name in enumerate(NAMES)}


@pytest.fixture
def by_hand():
    """`better` leads by 0.10 for every client, `close` by 0.01 for half of them and not for the other half."""
    close = {
        name: (0.3, p + 0.1 + (0.01 if i % 2 else -0.0101)) for i, (name, (_, p)) in enumerate(accuracies(0).items())
    }
    runs = []
    for seed, shift in enumerate((-0.01, 0.01)):
        moved = {name: (g, p + shift) for name, (g, p) in close.items()}
        runs.append(run_results("worse", seed, {"seen": accuracies(shift)}, {10: (0.3, 0.4)}))
        runs.append(run_results("better", seed, {"seen": accuracies(0.1 + shift)}, {10: (0.3, 0.4)}))
        runs.append(run_results("close", seed, {"seen": moved}, {10: (0.3, 0.4)}))
    return comparison(runs, notes=["A note."])


def test_means_deviations_best_and_marks(by_hand):
    """Eight clients that all differ alike: p = 2 / 2^8, doubled by Holm as the smaller of two."""
    rows = {
        method: dict(zip(("all", "mean", "p10"), cells[3:6], strict=True))
        for method, cells in population_rows(by_hand, "seen").items()
    }
    worse, better, close = (rows[name]["all"] for name in ("worse", "better", "close"))
    assert better.value == pytest.approx((0.5, 0.02 / 2**0.5))
    assert (worse.best, better.best, close.best) == (False, True, False)
    assert worse.p_value == pytest.approx(2 * 2 / 2**8)
    assert worse.differs
    assert close.p_value > 0.05
    assert not close.differs
    assert better.p_value is None
    assert rows["worse"]["p10"].p_value is None


def test_methods_are_tested_against_the_one_named(by_hand):
    """Both others differ from the worst, the best of them too; its own figure is not tested."""
    rows = population_rows(replace(by_hand, reference="worse"), "seen")
    assert rows["worse"][3].p_value is None
    assert [rows[name][3].p_value for name in ("better", "close")] == pytest.approx([2 * 2 / 2**8] * 2)
    assert rows["better"][3].best


def test_the_mean_over_examples_is_tested_with_their_numbers():
    """A client of 1,000 examples gains 0.1, nine of one lose 0.5 each: better over examples, worse over clients."""
    theirs = dict.fromkeys("abcdefghij", (0.3, 0.5))
    mine = {name: (0.3, 0.6 if name == "a" else 0.0) for name in theirs}
    runs = []
    for method, found in (("mine", mine), ("theirs", theirs)):
        run = run_results(method, 0, {"seen": found})
        sizes = [c._replace(evaluated=1000 if c.name == "a" else 1) for c in run.clients]
        runs.append(replace(run, clients=sizes))
    both = comparison(runs, reference="theirs")
    examples = both.client_differences("mine", "theirs", "seen", "personalized", over_clients=False)
    clients = both.client_differences("mine", "theirs", "seen", "personalized", over_clients=True)
    assert sum(examples.values()) == pytest.approx((1000 * 0.1 - 9 * 0.5) / 1009)
    assert sum(clients.values()) == pytest.approx((0.1 - 9 * 0.5) / 10)
    over_examples, over_clients, _ = population_rows(both, "seen")["mine"][3:6]
    assert over_examples.p_value == pytest.approx(1.0)  # the sign of the large client decides the sum's
    # sums as low have at least as many signs of the nine: all, or all with the tenth changed, on both sides
    assert over_clients.p_value == pytest.approx(2 * 2 / 2**10)


def test_splits_are_paired_within_and_averaged():
    """A client that loses in one split what it gains in another adds nothing."""
    runs = []
    for split, sign in ((0, 1), (4, -1)):
        for seed in (0, 1):
            runs.append(run_results("even", seed, {"seen": accuracies(0)}, split=split))
            runs.append(run_results("torn", seed, {"seen": accuracies(sign * 0.1)}, split=split))
            runs.append(run_results("ahead", seed, {"seen": accuracies(0.2 + sign * 0.1)}, split=split))
    both = comparison(runs, reference="even")
    assert (both.repeats, both.over) == (4, "2 splits x 2 seeds")
    rows = population_rows(both, "seen")
    assert rows["torn"][3].value.mean == pytest.approx(rows["even"][3].value.mean)
    assert rows["torn"][3].p_value is None
    assert rows["ahead"][3].p_value == pytest.approx(2 / 2**8)
    assert "mean ± standard deviation over 2 splits x 2 seeds." in caption(both)[0]
    assert len(both.client_accuracies("torn", "seen", "personalized")) == 2 * len(NAMES)
    (first, *_) = csv.DictReader(io.StringIO(run_csv(both)))
    assert (first["split"], first["seed"]) == ("0", "0")
    (first, *_) = csv.DictReader(io.StringIO(method_csv(both)))
    assert (first["splits"], first["seeds"], first["reference"]) == ("2", "2", "even")


def test_a_method_without_a_personal_model_is_said_to_be_without():
    same = dict.fromkeys(NAMES, (0.3, 0.3))
    both = comparison([run_results("plain", 0, {"seen": same}), run_results("own", 0, {"seen": accuracies(0)})])
    said = caption(both)
    assert "No personal model (personalized = generalized on every client): plain." in said
    assert "Equal on every client: the generalized accuracy of plain, own." in said


def test_a_gain_is_never_the_best(by_hand):
    assert not any(cells[-1].best for cells in population_rows(by_hand, "seen").values())


def test_markdown(by_hand):
    lines = markdown(by_hand).splitlines()
    assert lines[0] == "# Comparison: by hand"
    assert "## seen clients (8)" in lines
    row = next(line for line in lines if line.startswith("| worse")).split(" | ")
    assert row[4] == f"40.00 ±1.41{MARK}"
    assert row[7:] == ["+10.00 ±1.41", "5.0 s |"]
    assert "**50.00 ±1.41**" in next(line for line in lines if line.startswith("| better"))
    assert lines[-1] == "- A note."
    # all w_g are equal: none is better, and that is said
    assert row[1:3] == ["30.00 ±0.00 ="] * 2
    assert "- Equal on every client: the generalized accuracy of worse, better, close." in lines


def test_a_single_seed_has_no_deviation():
    one = comparison([run_results("only", 0, {"seen": accuracies(0)})])
    assert "| **40.00** |" in markdown(one)
    assert "one seed" in caption(one)[0]


def test_the_caption_says_what_was_tested_and_corrected_for(by_hand):
    """Three methods: two comparisons with the best of a column; two methods: one, and nothing to correct for."""
    (said,) = [line for line in caption(by_hand) if line.startswith(MARK)]
    assert said == (
        f"{MARK}: differs significantly from the best of its column, as no --reference was given: p < 0.05 "
        "in a randomization test of the difference that the column shows, which pairs the two methods on each client "
        "within each run and flips the signs of clients, with Holm's correction for up to 2 comparisons in a column."
    )
    two = comparison([run_results(name, 0, {"seen": accuracies(0)}) for name in ("one", "other")], reference="one")
    (said,) = [line for line in caption(two) if line.startswith(MARK)]
    assert "differs significantly from the reference, one: p < 0.05" in said
    assert said.endswith("flips the signs of clients.")
    absent = comparison([run_results(name, 0, {"seen": accuracies(0)}) for name in ("one", "other")], reference="third")
    assert "Nothing is tested: the reference, third, has no results." in caption(absent)
    assert all(cell.p_value is None for cell in population_rows(absent, "seen")["one"])
    alone = comparison([run_results("one", 0, {"seen": accuracies(0)})])
    assert not [line for line in caption(alone) if line.startswith(MARK)]


def test_the_caption_names_the_accuracy_of_the_task():
    run = run_results("a", 0, {"seen": {"c": (0.5, 0.25)}})
    assert caption(comparison([run]))[0].startswith("Test accuracy in percent")
    assert caption(comparison([replace(run, accuracy="R²")]))[0].startswith("Test R² in percent")


def test_a_figure_that_is_not_defined_is_left_out():
    run = run_results("only", 0, {"seen": accuracies(0), "new": accuracies(0)})
    run.populations["seen"]["gain"] = None
    both = comparison([run])
    assert population_rows(both, "seen")["only"][-1].value is None
    (row,) = csv.DictReader(io.StringIO(method_csv(both)))
    assert row["seen/gain"] == ""
    assert float(row["new/gain"]) == pytest.approx(0.1)


def test_a_run_that_diverged_is_told_and_never_significant():
    """NaN is neither better nor worse than a number; the run's mean is left out, which the caption says."""
    lost = run_results("lost", 0, {"seen": accuracies(0) | {NAMES[0]: (0.3, float("nan"))}})
    for metric in ("personalized_accuracy", "personalized_accuracy_client_mean", "personalized_accuracy_p10", "gain"):
        lost.populations["seen"][metric] = None
    good = [run_results("good", seed, {"seen": accuracies(0.1)}) for seed in (0, 1)]
    both = comparison([*good, lost, run_results("lost", 1, {"seen": accuracies(0)})])
    assert (
        "lost diverged in 1 of 2 runs: their personalized accuracy on seen clients is undefined, and left out of the "
        "mean." in caption(both)
    )
    cells = population_rows(both, "seen")
    assert [cell.p_value for cell in cells["lost"]] == [None] * 7
    assert cells["lost"][3].value.mean == pytest.approx(0.4)
    assert cells["good"][3].best
    assert not any("diverged" in line for line in caption(comparison(good)))


@pytest.mark.parametrize(("width", "tables"), [(200, 1), (80, 2)])
def test_no_number_is_cut_on_the_screen(by_hand, width, tables):
    console = Console(record=True, width=width, file=io.StringIO())
    shown = list(rich_tables(by_hand, console))
    assert len(shown) == tables
    for table in shown:
        console.print(table)
    text = console.export_text()
    for number in (f"40.00 ±1.41{MARK}", "50.00 ±1.41", "30.00 ±0.00", "+10.00 ±1.41"):
        assert number in text


def test_what_only_some_methods_train_with_has_a_column() -> None:
    runs = {name: [run_results(name, 0, {"seen": {"a": (0.5, 0.6), "b": (0.4, 0.6)}})] for name in ("fedavg", "local")}
    comparison = Comparison("tiny", runs, ["seen"], 1, budgets={"fedavg": "", "local": "epochs 30, lr_scale 0.5"})
    lines = markdown(comparison).splitlines()
    assert next(line for line in lines if line.startswith("| method")).endswith("| train time | own budget |")
    assert next(line for line in lines if line.startswith("| local")).endswith("| epochs 30, lr_scale 0.5 |")
    assert next(line for line in lines if line.startswith("| fedavg")).endswith("| - |")
    rows = list(csv.DictReader(io.StringIO(method_csv(comparison))))
    assert [row["own_budget"] for row in rows] == ["", "epochs 30, lr_scale 0.5"]
    assert "own budget" not in markdown(replace(comparison, budgets={"fedavg": "", "local": ""}))
    for width in (90, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        for table in rich_tables(comparison, console):
            console.print(table)
        assert console.export_text().count("lr_scale 0.5") == 1
