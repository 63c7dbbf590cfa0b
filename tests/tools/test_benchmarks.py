"""The benchmarks run, and their contenders do the same work."""

import functools
import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from flow_pl.methods import Flow
from flow_pl.models.routers import InstanceRouter
from tools.benchmarks import bare_flow, ours, scale
from tools.benchmarks.__main__ import main
from tools.benchmarks.bare_flow import BatchedFlow
from tools.benchmarks.ours import LoopRounds
from tools.benchmarks.peers import run_torch
from tools.benchmarks.peers.handover import load, save
from tools.benchmarks.race import Entry, Race, entries, handed_over, run, warm_up
from tools.benchmarks.remote import Remote, RemoteError
from tools.benchmarks.report import print_race, race_figures, write
from tools.benchmarks.workloads import WORKLOADS


@pytest.mark.slow
def test_quick_benchmark_writes_its_figures_and_contenders_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--quick", "--only", "mlp"]) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    for contender in ("sequential", "optimizer", "vmap", "hand", "trainer", "overhead"):
        assert written[f"mlp.{contender}"] > 0
    facts = written["workloads"]["mlp"]
    assert set(facts["same_model"]) == {"sequential", "optimizer", "vmap", "hand", "loop", "trainer"}
    assert max(facts["same_model"].values()) < 1e-4
    assert facts["breakdown_milliseconds"]["gradients"] > 0
    assert facts["breakdown_milliseconds"]["optimizer"] > 0
    assert written["machine"]["threads"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_log_normal_sizes_have_the_mean_they_say():
    sizes = WORKLOADS["skew"].sizes()
    assert sizes == sorted(sizes, reverse=True)
    assert 50 < sum(sizes) / len(sizes) < 200


class _Rounds:
    """A process whose rounds take given seconds, by their number of threads."""

    start_seconds = 1.0

    def __init__(self, seconds):
        self.seconds = {threads: iter(each) for threads, each in seconds.items()}

    def round(self, settings):
        return SimpleNamespace(seconds=next(self.seconds[settings["threads"]]))

    def model(self):
        return np.zeros(3)


def test_the_first_round_of_a_process_gives_up_no_setting():
    """It contains what is made once, whichever setting it falls to."""
    cold, warm, slow = (Entry("loop", str(n), ("x",), 1, (("threads", n),)) for n in (1, 2, 3))
    race = Race(WORKLOADS["mlp"])
    rounds = {1: [90, 2, 2, 2, 2], 2: [3, 3, 3, 3, 3], 3: [60, 60]}
    warm_up(race, _Rounds(rounds), [cold, warm, slow], 5)
    assert race.heats == {cold: 2, warm: 3, slow: 60}


def test_a_race_is_between_the_best_settings_of_each():
    slow, fast, ours, trainer = (Entry(name, "", (), 1, ()) for name in ("bare", "pfl", "loop", "trainer"))
    also, uneven, hopeless = (replace(slow, label=label) for label in ("2 processes", "uneven", "hopeless"))
    race = Race(WORKLOADS["mlp"])
    race.seconds = {slow: [6, 6, 8], also: [2, 4, 4], uneven: [1, 2, 9], fast: [3, 3, 3]}
    race.seconds |= {ours: [1, 2, 1], trainer: [2, 2, 2]}
    race.models = dict.fromkeys(race.seconds, np.zeros(3)) | {fast: np.array([0, 0.5, 0])}
    race.starts = dict.fromkeys(race.seconds, 1.0)
    race.heats = dict.fromkeys([*race.seconds, hopeless], 9.0)
    ratios, facts = race_figures(race)
    assert ratios == {"mlp.bare": 2, "mlp.bare_over_trainer": 2, "mlp.pfl": 3, "mlp.pfl_over_trainer": 1.5}
    assert facts["best_settings"]["bare"] == "2 processes"
    assert facts["unusable"] == ["bare, uneven"]
    assert facts["same_model"] == {"bare": 0, "pfl": 0.5, "loop": 0, "trainer": 0}
    assert not race.agrees
    shown = Console(file=io.StringIO(), width=200)
    print_race(shown, race)
    lines = shown.file.getvalue().splitlines()
    assert any("NO (5e-01)" in line for line in lines)
    verdicts = {label: next(line for line in lines if label in line) for label in ("uneven", "hopeless")}
    assert "unusable: spread above 2" in verdicts["uneven"]
    assert "given up in the warm-up" in verdicts["hopeless"]


def test_a_flow_round_by_hand_is_ours(monkeypatch):
    """But for the dropout."""
    monkeypatch.setattr(bare_flow, "DROPOUT", 0.0)
    router = functools.partial(InstanceRouter, hidden=(20, 12, 8), dropout=0.0)
    monkeypatch.setattr(bare_flow, "InstanceRouter", router)
    monkeypatch.setitem(ours.METHODS, "Flow", lambda tokens: Flow(split="parts", router=router))
    workload = replace(WORKLOADS["flow_mlp"], clients=3, examples=40, lr=0.1)
    loop, hand = LoopRounds(workload, workload.data(), 3, flow=True), BatchedFlow(workload, workload.data())
    hand.router = [p.detach().clone() for p in loop.module.server["router"].parameters()]
    before = hand.flat()
    loop()
    hand()
    assert (hand.flat() - before).abs().max() > 1e-2
    torch.testing.assert_close(hand.flat(), loop.flat(), atol=1e-6, rtol=1e-4)
    for p, q in zip(hand.router, loop.module.server["router"].parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), atol=1e-6, rtol=1e-4)


def test_the_bare_loop_is_run_where_ours_was_asked_for_first(monkeypatch):
    called = []
    turns = iter([{"threads": 1, "chunk_size": 2}, {"threads": 1}, {"threads": 1, "chunk_size": 2}, None])
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(run_torch, "Gate", lambda share: SimpleNamespace(next=lambda model: next(turns)))
    monkeypatch.setattr(run_torch.BareShare, "__call__", lambda self: called.append("bare"))
    monkeypatch.setattr(run_torch.LoopRounds, "__call__", lambda self: called.append("ours"))
    run_torch.loops(replace(WORKLOADS["mlp"], clients=2, examples=10))
    assert called == ["ours", "bare", "ours"]


def test_peers_start_from_the_same_data_and_model(tmp_path):
    given = handed_over(replace(WORKLOADS["lstm"], clients=2))
    save(str(tmp_path / "handover.npz"), given)
    back = load(str(tmp_path / "handover.npz"))
    assert back[:2] == given[:2]
    assert back[4:] == given[4:]
    for (x, y), (xs, ys) in zip(given.clients, back.clients, strict=True):
        np.testing.assert_array_equal(x, xs)
        np.testing.assert_array_equal(y, ys)
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])  # the next token
    for p, q in zip(given.parameters, back.parameters, strict=True):
        np.testing.assert_array_equal(p, q)


def test_a_peer_takes_part_only_where_it_is_installed(tmp_path):
    workload = WORKLOADS["mlp"]
    without = {entry.contender for entry in entries(workload, 30, {}, "", tmp_path)}
    assert without == {"bare", "loop", "trainer"}
    both = entries(workload, 30, {"pfl": "/a/python", "fedjax": "/b/python"}, "", tmp_path)
    assert {entry.contender for entry in both} == without | {"pfl", "fedjax"}
    assert {entry.command[0] for entry in both if entry.contender == "pfl"} == {"/a/python"}


def test_a_contender_that_fails_says_why(tmp_path):
    with (
        Remote([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path) as remote,
        pytest.raises(RemoteError, match="no such thing"),
    ):
        remote.round({"threads": 1, "save": False})


def test_the_part_that_was_not_measured_stays(tmp_path):
    path = tmp_path / "bench.json"
    write(path, {"mlp.pfl": 2.0, "mlp.gone": 1.0})
    write(path, {"scale": {"cohort": 1}})
    write(path, {"mlp.pfl": 3.0})
    assert json.loads(path.read_text()) == {"mlp.pfl": 3.0, "scale": {"cohort": 1}}


@pytest.mark.slow
@pytest.mark.extended
def test_contenders_in_their_own_processes_make_the_same_model():
    """The bare loop, ours and the Trainer, in one process and in two."""
    race = run(WORKLOADS["skew"], 30, {}, rounds=1, heats=1)
    assert not race.failures
    assert {(entry.contender, entry.processes) for entry in race.models} == {
        (name, processes) for name in ("bare", "loop", "trainer") for processes in (1, 2)
    }
    assert race.agrees


@pytest.mark.slow
def test_scale_compares_cases_with_the_first(tmp_path):
    axis = scale.Axis("cohort", (scale.Case(20, 2, 4, 2), scale.Case(20, 4, 4, 2)))
    few, more = scale.measure(axis, str(tmp_path), rounds=2)
    assert few.store_seconds > 0
    assert min(few.memory_mb, more.memory_mb, few.start_seconds, more.start_seconds) > 0
    assert len(few.seconds) == len(more.seconds) == 2
    assert scale.growth(few, few) == 1
