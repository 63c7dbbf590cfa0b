"""Pieces of the page, and what its figures are made of."""

import base64
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.patches import StepPatch

from flow_pl.data import ArrayData
from flow_pl.report.client_figures import accuracy_by_size, accuracy_ranks, gain_histogram, size_groups
from flow_pl.report.evidence import Evidence
from flow_pl.report.instances import picture, probability_color, probability_range, token_probabilities
from flow_pl.report.names import class_names, count_classes
from flow_pl.report.page import report
from flow_pl.report.routes import Instance, Routes
from flow_pl.report.tables import worst_clients
from flow_pl.results.curves import accuracy_curves, route_curves
from flow_pl.results.runs import Client
from flow_pl.tasks import Classification, MultiLabel

NASTY = '<script>alert("&")</script>'


def evidence(name="a", blocks=(), routes=None, **settings):
    """What a test of one client of the given name has found out."""
    clients = {name: [Client(name, name, 4, 0.5, 0.75)]}
    settings = {"kind": "vector", "classes": [name], "tokens": None, "names": {}, "curve": {}, **settings}
    return Evidence(
        method=name, backbone=name, data=name, rounds=1, blocks=blocks, clients=clients, shares={name: [[]]},
        decisions={name: [math.nan]}, routes=routes or {}, common=0, **settings,
    )  # fmt: skip


def test_text_is_escaped_everywhere(tmp_path):
    png = tmp_path / "gains.png"
    png.write_bytes(b"picture")
    text = report(evidence(NASTY), {"gains": png}, {NASTY: [[NASTY, NASTY]]}, {NASTY: {NASTY: NASTY}})
    assert "<script" not in text
    # title and heading with two names each, below it two, three of the tile, header, group, row, worst client with two
    assert text.count("alert(&#34;&amp;&#34;)") == 15
    assert f"data:image/png;base64,{base64.b64encode(b'picture').decode()}" in text
    assert 'name="viewport"' in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_accuracy_of_the_task_is_named():
    assert "accuracy: R²" not in report(evidence("R"), {}, {}, {})
    assert "1 R clients tested; accuracy: R²" in report(evidence("R", accuracy="R²"), {}, {}, {})
    (axes,) = accuracy_ranks({"seen": SEEN}, "R²").axes
    assert axes.get_ylabel() == "R² (%)"


def test_a_section_without_content_is_left_out():
    text = report(evidence(), {}, {}, {})
    assert re.findall('<section id="([a-z]+)">', text) == ["clients", "results", "rounds"]
    assert re.findall('<a href="#([a-z]+)">', text) == ["clients", "results", "rounds"]


def clients(*rows):
    return [Client(f"c{i}", "seen", *row) for i, row in enumerate(rows)]


SEEN = clients((10, 0.5, 0.75), (10, 0.5, 0.5), (30, 0.25, 0.5), (40, 1.0, 0.5))


def test_clients_that_diverged_are_the_worst() -> None:
    members = [*SEEN, SEEN[0]._replace(name="wild", personalized=math.nan)]
    found = replace(evidence("seen"), clients={"seen": members}, shares={"seen": [[]] * len(members)})
    table = worst_clients(found)
    assert [row[0] for row in table.rows] == ["wild", "c1", "c2"]
    assert table.rows[0][-2:] == [None, None]
    assert "nan" not in report(found, {}, {}, {})
    (axes,) = accuracy_ranks({"seen": members}).axes
    lowest = [steps.get_data().values[0] for steps in axes.patches if isinstance(steps, StepPatch)]
    assert lowest == pytest.approx([25, math.nan], nan_ok=True)


def test_clients_that_diverged_are_counted_beside_the_gains() -> None:
    wild = [SEEN[0]._replace(personalized=value) for value in (-float("inf"), float("nan"))]
    figure = gain_histogram({"seen": [*SEEN, *wild], "new": wild[:1]})
    expected = 100 * np.mean([client.personalized - client.generalized for client in SEEN])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"seen: mean {expected:+.1f} (2 diverged)", "new: no mean (1 diverged)"]


def test_gains_are_counted_in_bins_around_zero():
    """Gains of +25, 0, +25 and -50 points: the bar in the middle is of clients that do not change."""
    (axes,) = gain_histogram({"seen": SEEN}).axes
    bars = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in axes.patches if bar.get_height()}
    assert sorted(bars.values()) == [25, 25, 50]
    assert min(bars, key=abs) == pytest.approx(0)
    assert max(bars, key=bars.get) == pytest.approx(25, abs=2.5)


def test_ranks_are_sorted():
    (axes,) = accuracy_ranks({"seen": SEEN}).axes
    steps = [patch.get_data().values.tolist() for patch in axes.patches if hasattr(patch, "get_data")]
    assert steps == [[25, 50, 50, 100], [50, 50, 50, 75]]


def test_groups_by_size_have_whole_sizes():
    assert size_groups([3, 3, 3]) == [[0, 1, 2]]
    groups = size_groups([1, 1, 1, 1, 2, 3, 4, 5, 6, 7])
    assert [i for group in groups for i in group] == list(range(10))
    assert groups[0] == [0, 1, 2, 3]
    (axes,) = accuracy_by_size({"seen": SEEN}).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10\nn = 2", "30\nn = 1", "40\nn = 1"]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([50, 25, 100])


def _accuracies(model, mean, low, high):
    return dict(
        zip((f"{model}_accuracy_{name}" for name in ("client_mean", "p10", "p90")), (mean, low, high), strict=True)
    )


CURVE = {
    10: {**_accuracies("generalized", 0.5, 0.25, 0.75), **_accuracies("personalized", 0.5, 0.25, 0.75)},
    20: {"round": 20.0},
    30: {**_accuracies("generalized", 0.75, 0.5, 1.0), "routed_local/a": 0.5},
}


def test_accuracy_curves_with_their_bands():
    (axes,) = accuracy_curves(CURVE, tested=30).axes
    generalized, personalized, tested = axes.lines
    assert generalized.get_xydata().tolist() == [[10, 50], [30, 75]]
    assert personalized.get_xydata().tolist() == [[10, 50]]
    assert tested.get_xdata() == [30, 30]
    low, high = (f(axes.collections[0].get_paths()[0].vertices[:, 1]) for f in (min, max))
    assert (low, high) == (25, 100)
    assert accuracy_curves({1: {"routed_local/a": 0.5}}) is None


def test_route_curves():
    (axes,) = route_curves(CURVE, ["a", "b"]).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[30, 50]], []]
    assert route_curves(CURVE, []) is None


def text_instance(ways, x=(4, 5, 6), client=0):
    mask = np.array([way is not None for way in ways])
    local = np.array([0.0 if way is None else way for way in ways])[:, None]
    right = np.array([True] * len(ways))
    return Instance(client, np.array(x), np.array(x), right, ~right, mask, local)


NAMES = ["<pad>", "<oov>", "<bos>", "<eos>", "to", NASTY, "be"]


def test_tokens_are_coloured_by_their_way():
    local, global_ = text_instance([0.9, 0.5, 0.7]), text_instance([0.1, 0.2, None], client=1)
    routes = Routes(blocks=1, classes=1)
    routes.decisions, routes.most_local, routes.most_global = 5, [local], [global_]
    found = evidence(blocks=["b"], routes={"a": routes}, kind="text", tokens=NAMES, names={0: "a", 1: "b"})
    text = report(found, {}, {}, {})
    low, high = probability_range([local, global_])
    assert 0.1 <= low < high <= 0.9
    spans = f'<div class="tokens words"><span style="background:{probability_color(high, low, high)}">to</span><span'
    assert spans in text, "white space between tokens would be shown"
    assert text.count("alert(") == 2
    assert "<script" not in text
    assert text.count(">be<") == 1, "the padding is not shown"
    assert "a: 70 % local; 3 with w_g and 0 with its own model of 3 right" in text


def test_colours_run_from_global_to_local():
    blue, white, orange = (probability_color(way, 0.2, 0.6) for way in (0.2, 0.4, 0.6))
    assert int(blue[1:3], 16) < int(blue[5:], 16)
    assert int(orange[1:3], 16) > int(orange[5:], 16)
    assert min(int(white[i : i + 2], 16) for i in (1, 3, 5)) > 250


def test_padding_has_no_way():
    assert np.isnan(token_probabilities(text_instance([0.5, None, 0.5]))).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "x"), [("image", np.zeros((1, 4, 4))), ("image", np.ones((3, 4, 4))), ("vector", np.arange(5.0) - 2)]
)
def test_a_picture_has_a_panel_for_each_instance(kind, x):
    right = np.array(True)
    instance = Instance(0, x, np.array(1), right, ~right, np.array(True), np.array([0.5, 0.25]))
    figure = picture([instance] * 5, kind, ["zero", "$one"], None)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 5
    assert shown[0].get_title() == "$one  38 %"
    assert [text.get_text() for text in shown[0].texts] == ["g ✓", "p ✗"]


def test_a_real_value_is_shown_as_it_is():
    """It has no name, and is neither right nor wrong."""
    values = np.array([-0.12345, 2.0, np.nan])
    score = np.array(0.5)
    instances = [Instance(0, np.ones(3), y, score, score, np.array(True), np.array([0.5])) for y in values]
    figure = picture(instances, "vector", ["0"], None)
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == ["-0.1235  50 %", "2  50 %", "?  50 %"]
    assert not any(axes.texts for axes in figure.axes)


def test_classes_have_the_names_of_the_data(tmp_path):
    """Those of text labels, in the order of their numbers."""
    np.savez(tmp_path / "t.npz", client=[0] * 4 + [1] * 4, x=np.ones((8, 2), np.float32), y=["dog", "cat"] * 4)
    data = ArrayData(tmp_path / "t.npz", cohort_size=1, cache_dir=tmp_path)
    data.prepare_data()
    data.setup()
    assert class_names(data, Classification()) == ["cat", "dog"]


def test_classes_of_several_labels_are_the_labels(tmp_path):
    """Not the zeros and ones of which a file's labels consist."""
    y = np.tile(np.array([[1, 0, 1], [0, 1, 0]], np.float32), (4, 1))
    np.savez(tmp_path / "t.npz", client=[0] * 4 + [1] * 4, x=np.ones((8, 2), np.float32), y=y)
    data = ArrayData(tmp_path / "t.npz", cohort_size=1, cache_dir=tmp_path)
    data.prepare_data()
    data.setup()
    assert class_names(data, MultiLabel(k=1)) == ["0", "1", "2"]
    assert count_classes(data, MultiLabel(k=1)) == 3
