"""Contenders that take turns round by round, so that a busy machine slows them alike; and what comes out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Protocol

import lightning
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from flow_pl import FederatedModule
from tools.benchmarks.bare import contenders
from tools.benchmarks.ours import LoopRounds, fit, flat
from tools.benchmarks.workloads import Clients, Workload

TOLERANCE = 1e-4
"""Largest difference of a parameter after the first round between contenders that made the same round."""
WARM_UP = 3
"""Rounds before the timed ones; all tracing is over by then."""


class Contender(Protocol):
    """Makes a round when it is called."""

    def __call__(self) -> None: ...

    def flat(self) -> Tensor: ...


@dataclass
class Outcome:
    """What a workload's contest gave.

    Attributes:
        workload: what was trained.
        chunk_size: of our loop, the fastest of the candidates.
        candidates: milliseconds of the fastest round by chunk size, where there was a choice.
        seconds: of the timed rounds, by contender.
        models: the server's model after the first round, by contender.
        busy: processor time over wall time in the bare contenders' timed rounds: below 1, others used this core.
    """

    workload: Workload
    chunk_size: int
    candidates: dict[int, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    models: dict[str, Tensor] = field(default_factory=dict)
    busy: float = 1.0

    def milliseconds(self, name: str) -> float:
        """Median round of a contender."""
        return median(self.seconds[name]) * 1e3

    def ratios(self, name: str, ours: str = "loop") -> tuple[float, float, float]:
        """A contender's round time over ours, round by round: lower quartile, median, upper quartile."""
        each = [a / b for a, b in zip(self.seconds[name], self.seconds[ours], strict=True)]
        if len(each) == 1:
            return each[0], each[0], each[0]
        low, middle, high = quantiles(each, n=4, method="inclusive")
        return low, middle, high

    def difference(self, name: str) -> float:
        """Largest difference of a parameter to our loop's model, after the first round."""
        return float((self.models[name] - self.models["loop"]).abs().max())

    @property
    def agrees(self) -> bool:
        """Whether all contenders with a model made the same one."""
        return all(self.difference(name) <= TOLERANCE for name in self.models)


class Turns:
    """Calls every contender once a round and keeps the times."""

    def __init__(self, contenders: dict[str, Contender]) -> None:
        self.contenders = contenders
        self.seconds: dict[str, list[float]] = {name: [] for name in contenders}
        self.processor: list[float] = []
        self.models: dict[str, Tensor] = {}

    def __call__(self) -> None:
        """Make a round with every contender."""
        used = 0.0
        for name, contender in self.contenders.items():
            start, processor = time.perf_counter(), time.thread_time()
            contender()
            self.seconds[name].append(time.perf_counter() - start)
            used += time.thread_time() - processor
            if name not in self.models:
                self.models[name] = contender.flat().clone()
        self.processor.append(used)


class Conductor(Callback):
    """Lets the other contenders make a round between two rounds of the Trainer, whose own are timed start to start."""

    def __init__(self, turns: Callable[[], None]) -> None:
        self.turns = turns
        self.seconds: list[float] = []
        self.model: Tensor | None = None
        self._start: float | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop the clock, let the others make a round, and start it again."""
        now = time.perf_counter()
        if self._start is not None:
            self.seconds.append(now - self._start)
            if self.model is None:
                assert isinstance(pl_module, FederatedModule)
                self.model = flat(pl_module)
        assert trainer.max_epochs is not None
        if trainer.current_epoch + 1 < trainer.max_epochs:
            self.turns()
        self._start = time.perf_counter()


def try_chunk_sizes(workload: Workload, clients: Clients) -> dict[int, float]:
    """Milliseconds of the fastest round of a few, by chunk size; the candidates take turns, behind a warm-up round."""
    turns = Turns({str(size): LoopRounds(workload, clients, size, workload.flow) for size in workload.chunk_sizes})
    for _ in range(4):
        turns()
    return {size: min(turns.seconds[str(size)][1:]) * 1e3 for size in workload.chunk_sizes}


def compete(workload: Workload, rounds: int) -> Outcome:
    """Run a workload.

    Args:
        workload: what is trained.
        rounds: timed rounds.

    Returns:
        The outcome; contenders are the bare ones, "loop" and "trainer", or "loop" and "fedavg" for Flow.
    """
    clients = workload.data()
    candidates = try_chunk_sizes(workload, clients) if len(workload.chunk_sizes) > 1 else {}
    outcome = Outcome(workload, min(workload.chunk_sizes, key=lambda size: candidates.get(size, 0.0)), candidates)
    ours = LoopRounds(workload, clients, outcome.chunk_size, workload.flow)
    if workload.flow:
        turns = Turns({"fedavg": LoopRounds(workload, clients, outcome.chunk_size), "loop": ours})
        for _ in range(WARM_UP + rounds):
            turns()
        outcome.seconds = {name: seconds[WARM_UP:] for name, seconds in turns.seconds.items()}
    else:
        turns = Turns({**{name: make(workload, clients) for name, make in contenders(workload).items()}, "loop": ours})
        conductor = Conductor(turns)
        with tempfile.TemporaryDirectory() as folder:
            # One round more: the Trainer's rounds are timed from start to start.
            fit(workload, clients, outcome.chunk_size, WARM_UP + rounds + 1, folder, [conductor])
        assert conductor.model is not None
        every = {**turns.seconds, "trainer": conductor.seconds}
        outcome.seconds = {name: seconds[WARM_UP:] for name, seconds in every.items()}
        outcome.models = {**turns.models, "trainer": conductor.model}
    wall = sum(sum(seconds[WARM_UP:]) for seconds in turns.seconds.values())
    outcome.busy = sum(turns.processor[WARM_UP:]) / wall
    return outcome
