"""Let contenders take turns round by round, so that a busy machine slows them equally, and compare them."""

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
from flow_pl.kernels.allocator import keep_freed_memory
from tools.benchmarks.bare import contenders
from tools.benchmarks.bare_flow import BatchedFlow
from tools.benchmarks.ours import LoopRounds, fit, flat
from tools.benchmarks.workloads import Clients, Workload

TOLERANCE = 1e-4
"""Largest difference of a parameter after the first round between contenders that agree."""
WARM_UP = 3
"""Number of rounds before the timed ones; all tracing is finished by then."""


class Contender(Protocol):
    """Runs a round when it is called."""

    def __call__(self) -> None: ...

    def flat(self) -> Tensor: ...


@dataclass
class Outcome:
    """Holds the result of a workload's contest.

    Attributes:
        workload: the workload.
        chunk_size: chunk size of our loop, the fastest of the candidates.
        candidates: milliseconds of the fastest round by chunk size, if there was a choice.
        seconds: seconds of the timed rounds, by contender.
        models: the server's model after the first round, by contender.
        busy: processor time over wall time in the bare contenders' timed rounds; below 1, other processes used this
            core.
    """

    workload: Workload
    chunk_size: int
    candidates: dict[int, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    models: dict[str, Tensor] = field(default_factory=dict)
    busy: float = 1.0

    def milliseconds(self, name: str) -> float:
        """Return a contender's median round time in milliseconds."""
        return median(self.seconds[name]) * 1e3

    def ratios(self, name: str, ours: str = "loop") -> tuple[float, float, float]:
        """Return quartiles and median of a contender's round time over ours, round by round, in ascending order."""
        each = [a / b for a, b in zip(self.seconds[name], self.seconds[ours], strict=True)]
        if len(each) == 1:
            return each[0], each[0], each[0]
        low, middle, high = quantiles(each, n=4, method="inclusive")
        return low, middle, high

    def difference(self, name: str) -> float:
        """Return the largest difference of a parameter from our loop's model after the first round."""
        return float((self.models[name] - self.models["loop"]).abs().max())

    @property
    def agrees(self) -> bool:
        """Return whether all contenders with a model have the same one."""
        return all(self.difference(name) <= TOLERANCE for name in self.models)


class Turns:
    """Calls every contender once a round and records the times."""

    def __init__(self, contenders: dict[str, Contender]) -> None:
        self.contenders = contenders
        self.seconds: dict[str, list[float]] = {name: [] for name in contenders}
        self.processor: list[float] = []
        self.models: dict[str, Tensor] = {}

    def __call__(self) -> None:
        """Run a round with every contender."""
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
    """Lets the other contenders run a round between two rounds of the Trainer, which are timed from start to start."""

    def __init__(self, turns: Callable[[], None]) -> None:
        self.turns = turns
        self.seconds: list[float] = []
        self.model: Tensor | None = None
        self._start: float | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop the clock, let the others run a round, and start the clock again."""
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
    """Return the milliseconds of the fastest of a few rounds by chunk size; candidates take turns after a warm-up."""
    turns = Turns({str(size): LoopRounds(workload, clients, size, workload.flow) for size in workload.chunk_sizes})
    for _ in range(4):
        turns()
    return {size: min(turns.seconds[str(size)][1:]) * 1e3 for size in workload.chunk_sizes}


def compete(workload: Workload, rounds: int) -> Outcome:
    """Run a workload.

    Args:
        workload: the workload.
        rounds: number of timed rounds.

    Returns:
        The outcome; contenders are the bare ones, "loop" and "trainer", or "loop", "fedavg" and "hand" for Flow.
    """
    clients = workload.data()
    candidates = try_chunk_sizes(workload, clients) if len(workload.chunk_sizes) > 1 else {}
    outcome = Outcome(workload, min(workload.chunk_sizes, key=lambda size: candidates.get(size, 0.0)), candidates)
    ours = LoopRounds(workload, clients, outcome.chunk_size, workload.flow)
    if workload.flow:
        fedavg = LoopRounds(workload, clients, outcome.chunk_size)
        by_hand = {"hand": BatchedFlow(workload, clients)} if workload.kind == "mlp" else {}
        keep_freed_memory()  # as the Trainer does
        turns = Turns({"fedavg": fedavg, "loop": ours, **by_hand})
        for _ in range(WARM_UP + rounds):
            turns()
        outcome.seconds = {name: seconds[WARM_UP:] for name, seconds in turns.seconds.items()}
    else:
        turns = Turns({**{name: make(workload, clients) for name, make in contenders(workload).items()}, "loop": ours})
        conductor = Conductor(turns)
        with tempfile.TemporaryDirectory() as folder:
            # One more round, since the Trainer's rounds are timed from start to start
            fit(workload, clients, outcome.chunk_size, WARM_UP + rounds + 1, folder, [conductor])
        assert conductor.model is not None
        every = {**turns.seconds, "trainer": conductor.seconds}
        outcome.seconds = {name: seconds[WARM_UP:] for name, seconds in every.items()}
        outcome.models = {**turns.models, "trainer": conductor.model}
    wall = sum(sum(seconds[WARM_UP:]) for seconds in turns.seconds.values())
    outcome.busy = sum(turns.processor[WARM_UP:]) / wall
    return outcome
