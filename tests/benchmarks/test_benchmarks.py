"""The benchmarks run, and their contenders do the same work."""

import json

from tests.benchmarks.__main__ import main
from tests.benchmarks.workloads import WORKLOADS


def test_quick_benchmark_writes_its_figures_and_contenders_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--quick", "--only", "mlp"]) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    for contender in ("sequential", "optimizer", "vmap", "trainer", "overhead"):
        assert written[f"mlp.{contender}"] > 0
    facts = written["workloads"]["mlp"]
    assert set(facts["same_model"]) == {"sequential", "optimizer", "vmap", "loop", "trainer"}
    assert max(facts["same_model"].values()) < 1e-4
    assert facts["breakdown_milliseconds"]["gradients"] > 0
    assert facts["breakdown_milliseconds"]["optimizer"] > 0
    assert written["machine"]["threads"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_log_normal_sizes_have_the_mean_they_say():
    sizes = WORKLOADS["skew"].sizes()
    assert sizes == sorted(sizes, reverse=True)
    assert 50 < sum(sizes) / len(sizes) < 200
