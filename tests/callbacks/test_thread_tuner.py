"""The number of threads, by rounds whose times are given."""

from types import SimpleNamespace

import pytest
import torch

from flow_pl.callbacks import ThreadTuner
from tests.test_module import module


class Machine:
    """A machine whose rounds take a time that depends on the number of threads."""

    def __init__(self, monkeypatch, threads, seconds):
        self.threads, self.seconds, self.now = threads, seconds, 0.0
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(self, "threads", count))
        monkeypatch.setattr("flow_pl.callbacks.thread_tuner.time.perf_counter", lambda: self.now)

    def run(self, tuner, rounds, model=None, sizes=((6, 4), (5,))):
        """Run rounds of two chunks and return the number of threads of each."""
        model = module() if model is None else model
        used = []
        for round_ in range(rounds):
            used.append(self.threads)
            for chunk in sizes:
                batch = SimpleNamespace(train=SimpleNamespace(sizes=chunk))
                tuner.on_train_batch_start(None, model, batch, 0)
                self.now += self.seconds(self.threads, round_) * sum(chunk)
                tuner.on_train_batch_end(None, model, None, batch, 0)
            tuner.on_train_epoch_end(None, model)
        return used


def fit(machine, rounds, tuner=None, **settings):
    tuner = ThreadTuner() if tuner is None else tuner
    tuner.on_train_start(None, settings.get("model") or module())
    return tuner, machine.run(tuner, rounds, **settings)


@pytest.mark.parametrize(
    ("cores", "times", "expected"),
    [
        (2, {1: 1.0, 2: 10.0}, 1),
        (2, {1: 1.0, 2: 0.97}, 1),  # not worth it
        (2, {1: 1.0, 2: 0.6}, 2),
        (8, {1: 1.0, 2: 0.6, 4: 0.4, 8: 0.5}, 4),
        (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.3}, 6),
    ],
)
def test_the_fastest_number_is_found(monkeypatch, cores, times, expected):
    machine = Machine(monkeypatch, cores, lambda threads, round_: times[threads])
    tuner, used = fit(machine, 20)
    assert used[:6] == [1, 1, 2, 1, 2, used[5]]
    assert machine.threads == expected
    assert times[expected] <= 1.1 * min(times.values())
    tuner.on_fit_end(None, None)
    assert machine.threads == cores, "the program's own number is restored"


def test_one_slow_round_of_a_number_does_not_decide(monkeypatch):
    machine = Machine(monkeypatch, 2, lambda threads, round_: (9 if round_ == 2 else 1) / threads)
    fit(machine, 8)
    assert machine.threads == 2


def test_a_machine_that_becomes_busy_gets_one_thread(monkeypatch):
    machine = Machine(monkeypatch, 2, lambda threads, round_: 1.0 if threads == 1 else 0.6 if round_ < 10 else 6.0)
    tuner, used = fit(machine, 15)
    assert used[5:] == [2] * 7 + [1] * 3, "two slow rounds, then one thread"
    assert tuner.state_dict()["threads"] == 1


def test_a_resumed_run_keeps_its_number(monkeypatch):
    machine = Machine(monkeypatch, 2, lambda threads, round_: 1 / threads)
    tuner, _ = fit(machine, 8)
    resumed = ThreadTuner()
    resumed.load_state_dict(tuner.state_dict())
    machine.threads = 2
    assert fit(machine, 3, resumed)[1] == [2, 2, 2]
    unfinished, _ = fit(machine, 3)
    assert unfinished.state_dict()["threads"] is None


def test_a_second_fit_is_measured_anew(monkeypatch):
    machine = Machine(monkeypatch, 2, lambda threads, round_: 1 / threads)
    tuner, first = fit(machine, 8)
    tuner.on_fit_end(None, None)
    assert fit(machine, 8, tuner)[1][1:] == first[1:] == [1, 2, 1, 2, 2, 2, 2]


def test_a_number_that_the_user_sets_is_left_alone(monkeypatch):
    machine = Machine(monkeypatch, 4, lambda threads, round_: 1.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert fit(machine, 8)[1] == [4] * 8


def test_the_chunk_is_measured_first(monkeypatch):
    machine = Machine(monkeypatch, 2, lambda threads, round_: 1 / threads)
    model = module()
    model.chunks = SimpleNamespace(settled=False)
    assert fit(machine, 5, model=model)[1] == [1] * 5
