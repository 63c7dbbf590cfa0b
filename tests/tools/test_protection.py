"""The benchmark of private and robust rounds goes on where it stopped, and writes its tables."""

import json
import sys

import pytest

from tools.benchmarks.protection import __main__ as benchmark
from tools.benchmarks.protection.tables import TABLES


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Run the benchmark without training; the arguments of the runs."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def measure(arguments, data, rounds, stage):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"train/bytes_up": 2e6, "test/seen/generalized_accuracy": 0.5, "test/seen/personalized_accuracy": 0.7}

    monkeypatch.setattr(benchmark, "measure", measure)
    return calls


def test_a_benchmark_that_was_cut_off_goes_on(measured, monkeypatch, tmp_path, capsys):
    command = ["protection", "bytes", "--data", "x.npz", "--seeds", "0", "1", "--only", "ditto", "--model.a=b"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    benchmark.main()
    assert len(measured) == 4 + 1
    assert all(arguments[0] == "ditto" and arguments[-1] == "--model.a=b" for arguments in measured)
    assert [json.loads(line)["run"]["seed"] for line in (tmp_path / "bytes.jsonl").read_text().splitlines()] == [
        0,
        0,
        1,
        1,
    ]
    assert "| ditto | none | 2.00 | 0.500 ± 0.000 | 0.700 ± 0.000 |" in capsys.readouterr().out


def test_tables_have_means_over_seeds_and_gaps_where_nothing_was_measured():
    def line(seed, accuracy, **labels):
        run = {"method": "fine_tuning", "deployment": "", "norm": "1", "noise": "", "epsilon": "8", **labels}
        return {**run, "seed": seed, "test/seen/generalized_accuracy": accuracy}

    written = TABLES["privacy"]([line(0, 0.4), line(1, 0.6), line(0, 0.3, epsilon="2")])
    assert written.splitlines()[2:] == [
        "|  | 1 |  | 8 | 0.500 ± 0.141 |  |  |  |",
        "|  | 1 |  | 2 | 0.300 |  |  |  |",
    ]
