"""The cost of an example in the published runs."""

import pytest

from tools.benchmarks import paper


@pytest.mark.slow
def test_a_configuration_is_measured(monkeypatch):
    """On tiny data; time is per example and epoch, and the number of them cancels."""
    monkeypatch.setitem(paper.SHAPES["emnist"], "rows", 4)
    monkeypatch.setitem(paper.SHAPES["emnist"], "clients", 1)
    monkeypatch.setattr(paper.time, "process_time", iter([0.0, 3.0, 3.0, 4.2]).__next__)
    figures = paper.measure("emnist")
    assert figures["ms"] == 100  # 1.2 s, the cheaper round, over 4 examples x 3 epochs
    assert figures["memory_mb"] > 50
