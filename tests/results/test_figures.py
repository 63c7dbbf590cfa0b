"""What is drawn, without looking at it."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.collections import PathCollection

from flow_pl.results.figures import accuracy_bars, client_scatter, draw, learning_curves, routes
from flow_pl.results.plotting import label_heights, line_style
from tests.compare.fakes import comparison, run_results

SEEN = {"a": (0.2, 0.6), "b": (0.5, 0.5), "c": (0.9, 0.7)}
NEW = {"d": (0.4, 0.8)}
CURVE = {10: (0.1, 0.2), 20: (0.3, 0.5)}


@pytest.fixture
def three():
    """Two methods with rounds, of which one routes, and one without; two seeds."""
    runs = []
    for seed in range(2):
        both = {"seen": SEEN, "new": NEW}
        higher = {number: (g + 0.1 * seed, p + 0.1 * seed) for number, (g, p) in CURVE.items()}
        runs.append(run_results("routing", seed, both, higher, {"conv": 0.25 + 0.5 * seed, "head": 1.0}))
        runs.append(run_results("plain", seed, both, CURVE))
        runs.append(run_results("no rounds", seed, both, {1: (0.1, 0.7)}))
    return comparison(runs)


def test_learning_curves(three):
    figure = learning_curves(three)
    generalized, personalized = figure.axes
    for axes, ends in ((generalized, (35, 30, 10)), (personalized, (55, 50, 70))):
        assert [line.get_ydata()[-1] for line in axes.lines] == pytest.approx(ends)
        assert len(axes.collections) == 2, "a band for each method with rounds"
        assert [text.get_text() for text in axes.texts if text.get_text()] == ["routing", "plain", "no rounds"]
    assert list(generalized.lines[0].get_xdata()) == [10, 20]
    band = generalized.collections[0].get_paths()[0].vertices[:, 1]
    assert max(band) - 35 == pytest.approx(100 * 0.1 / 2**0.5)


def test_rounds_of_curves_with_a_single_validation_are_whole_numbers():
    runs = [run_results(method, 0, {"seen": SEEN}, {5: (0.1, 0.2)}) for method in ("a", "b")]
    for axes in learning_curves(comparison(runs)).axes:
        assert axes.get_xlim() == (0, 5)


def test_a_method_that_diverged_is_drawn_without_its_accuracy(tmp_path):
    """A squared error that overflows makes R² minus infinity."""
    diverged = {"a": (0.2, -float("inf")), "b": (0.5, float("nan")), "c": (0.9, 0.7)}
    runs = [run_results("diverged", seed, {"seen": diverged}, CURVE) for seed in range(2)]
    runs += [run_results("worse", seed, {"seen": {"a": (0.2, -3.0)}}, CURVE) for seed in range(2)]
    found = comparison(runs)
    for axes in client_scatter(found).axes:
        assert axes.get_xlim() == pytest.approx((-312, 103))
    assert client_scatter(found).axes[0].texts[0].get_text() == "helped 0 %, harmed 67 %, diverged 33 %"
    assert [text.get_text() for text in accuracy_bars(found).axes[0].get_yticklabels()] == ["worse", "diverged"]
    assert set(draw(found, tmp_path)) == {"curves", "clients", "accuracy"}


def test_bars_of_equal_length_from_different_numbers_of_runs():
    """One of them has no standard deviation."""
    runs = [run_results("all", seed, {"seen": SEEN}) for seed in range(2)] + [run_results("one", 0, {"seen": SEEN})]
    (axes,) = accuracy_bars(comparison(runs)).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["all", "one"]


def test_client_scatter(three):
    figure = client_scatter(three)
    assert [axes.get_title() for axes in figure.axes] == ["routing", "plain", "no rounds"]
    for axes in figure.axes:
        (diagonal,) = axes.lines
        assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        seen, new = (each for each in axes.collections if isinstance(each, PathCollection))
        assert seen.get_offsets().tolist() == [[20, 60], [50, 50], [90, 70]]
        assert new.get_offsets().tolist() == [[40, 80]]
        small, middle, large = seen.get_sizes()  # 10, 20 and 30 examples
        assert middle > small
        assert large - middle == pytest.approx(middle - small)
        assert axes.texts[0].get_text() == "helped 50 %, harmed 25 %"


def test_routes(three):
    figure = routes(three)
    (axes,) = figure.axes
    assert axes.get_title() == "routing"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv", "head"]
    assert [bar.get_width() for bars in axes.containers for bar in bars if hasattr(bar, "get_width")] == [50, 100] * 2
    assert [text.get_text() for text in axes.texts] == ["50 ± 35", "100 ± 0"] * 2


def test_accuracy_bars():
    """The best on top; the line in a bar is w_g."""
    runs = [run_results(name, 0, {"seen": {"a": (0.3, p)}}) for name, p in (("low", 0.4), ("high", 0.8), ("mid", 0.6))]
    (axes,) = accuracy_bars(comparison(runs)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "mid", "low"]
    assert axes.yaxis_inverted()
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([80, 60, 40])
    assert [line.get_segments()[0][0][0] for line in axes.collections] == pytest.approx([30] * 3)


def test_scores_below_zero_are_within_the_axes():
    """R2, the accuracy of real values, has no lower bound."""
    runs = [
        run_results(name, 0, {"seen": {"a": (g, p), "b": (0.1, 0.2)}}) for name, g, p in (("x", -3, -2), ("y", -9, 1))
    ]
    (bars,) = accuracy_bars(comparison(runs)).axes
    lowest, highest = bars.get_xlim()
    ends = [bar.get_width() for bar in bars.patches] + [line.get_segments()[0][0][0] for line in bars.collections]
    assert lowest < min(ends) == pytest.approx(-445)
    assert max(ends) < highest
    for axes in client_scatter(comparison(runs)).axes:
        (low, high), points = axes.get_xlim(), axes.collections[0].get_offsets()
        assert axes.get_ylim() == (low, high)
        assert low < points.min()
        assert points.max() < high
        assert axes.lines[0].get_xdata()[0] < 0


def test_figures_name_the_accuracy_of_the_task():
    seen = {"seen": {"a": (0.1, 0.2)}}
    found = comparison([replace(run_results(name, 0, seen, {1: (0.1, 0.2)}), accuracy="R²") for name in "xy"])
    assert accuracy_bars(found).axes[0].get_xlabel() == "personalized test R² (%)"
    assert client_scatter(found).get_supylabel() == "R² of the client's own model (%)"
    assert learning_curves(found).axes[0].get_ylabel() == "validation R² (%)"


def test_files_and_what_there_is_nothing_to_draw_for(three, tmp_path):
    before = dict(rcParams)
    written = draw(three, tmp_path)
    assert sorted(written) == ["accuracy", "clients", "curves", "routes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.png" for name in written)
    for path in written.values():
        assert path.read_bytes().startswith(b"\x89PNG")
    without = comparison([run_results("plain", 0, {"seen": SEEN})])
    assert sorted(draw(without, tmp_path)) == ["accuracy", "clients"]
    assert not (tmp_path / "routes.png").exists(), "of an older comparison"
    assert dict(rcParams) == before


def test_no_two_of_many_lines_look_alike():
    assert len({str(line_style(index)) for index in range(28)}) == 28


@pytest.mark.parametrize(
    ("values", "heights"),
    [
        ([5.0, 1.0, 9.0], [5.0, 1.0, 9.0]),
        ([5.0, 5.0], [4.5, 5.5]),  # around where the lines end
        ([5.5, 5.0, 2.0], [5.75, 4.75, 2.0]),
        ([10.0, 10.0, 10.0], [8.0, 9.0, 10.0]),  # not above the axes
        ([0.0, 0.0], [0.0, 1.0]),  # nor below
    ],
)
def test_labels_keep_their_distance(values, heights):
    assert label_heights(values, 0.0, 10.0, 1.0) == pytest.approx(heights)
