"""Measure `ThreadTuner` against fixed numbers of threads: `python -m tools.benchmarks.threads`, on an idle machine.

Every workload is trained by the Trainer with each fixed number, and with the tuner, which chooses among them in its
first rounds; the fits take turns. Printed are the medians of the second half of the rounds, in milliseconds, and the
number of threads at the end. `OMP_NUM_THREADS` must not be set: the tuner then leaves the number alone.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from statistics import median

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flow_pl.callbacks.thread_tuner import SET_BY_USER, ThreadTuner
from tools.benchmarks.ours import fit
from tools.benchmarks.workloads import WORKLOADS

CASES = {"mlp": (30, 200), "cnn": (1, 16), "lstm": (1, 16)}
"""Clients side by side and rounds of each workload."""
TURNS = 3
"""Fits with each number of threads."""


class _Clock(Callback):
    """Times every round, and keeps the number of threads that it had."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.threads = 0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.threads = torch.get_num_threads()


def measure(name: str, threads: int | None) -> tuple[float, int]:
    """Train a workload with a number of threads, or by the tuner; return milliseconds a round, and the number."""
    workload = WORKLOADS[name]
    chunk, rounds = CASES[name]
    clock = _Clock()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        fit(workload, workload.data(), chunk, rounds, folder, [clock] if threads else [ThreadTuner(), clock])
    return 1e3 * median(clock.seconds[rounds // 2 :]), clock.threads


def main() -> None:
    """Print a line for each workload and setting.

    Raises:
        SystemExit: a variable sets the number of threads.
    """
    if given := [name for name in SET_BY_USER if name in os.environ]:
        raise SystemExit(f"{given[0]} is set, so that the tuner would leave the number of threads alone: unset it.")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = [*range(1, (os.cpu_count() or 1) + 1), None]
    for name in CASES:
        found: dict[int | None, list[tuple[float, int]]] = {threads: [] for threads in settings}
        for _ in range(TURNS):
            for threads in settings:
                found[threads].append(measure(name, threads))
        for threads, each in found.items():
            label = "tuner" if threads is None else f"{threads} threads"
            turns = ", ".join(f"{ms:.1f} ({count})" for ms, count in each)
            print(f"{name} {label}: {median(ms for ms, _ in each):.1f} ms (threads at the end of each: {turns})")


if __name__ == "__main__":
    main()
