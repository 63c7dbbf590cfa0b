"""Break down our round's time: functions of the engine timed from outside, in rounds by Lightning's Trainer."""

from __future__ import annotations

import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.fx import GraphModule

import flow_pl.engine.gradients
import flow_pl.engine.loop
import flow_pl.engine.trace_cache
import flow_pl.module.server_step
from flow_pl.data import ClientDataset, CohortSampler
from flow_pl.engine.client_groups import ClientGroups
from flow_pl.engine.client_optimizer import StackedOptimizer
from flow_pl.engine.gradients import BoundStep
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import ServerRound
from flow_pl.module import FederatedModule
from tools.benchmarks.contest import WARM_UP
from tools.benchmarks.ours import WorkloadData, fit
from tools.benchmarks.workloads import Workload

MATHS = ("gradients", "optimizer")
"""Sections that any simulator has; the rest of a round is overhead."""
REST = "Lightning"
"""The rest of a round: Lightning's loops, hooks and callbacks, and the loader."""


@dataclass(frozen=True)
class Section:
    """Names functions whose time is counted together.

    Attributes:
        name: name of the section.
        owner: module or class that holds the function.
        attribute: name of the function there.
        within: section that a call must come from to be counted; None for any.
    """

    name: str
    owner: Any
    attribute: str
    within: str | None = None


SECTIONS = (
    Section("load", CohortSampler, "_draw"),
    Section("load", ClientDataset, "__getitem__"),
    Section("move", WorkloadData, "transfer_batch_to_device"),
    Section("move", WorkloadData, "on_after_batch_transfer"),
    Section("loop, update", FederatedLoop, "train_clients"),
    Section("schedule", flow_pl.engine.loop, "make_schedule"),
    Section("copies", ClientGroups, "stack"),
    Section("copies", ClientGroups, "prefix"),
    Section("gather", torch.Tensor, "index_select", within="loop, update"),
    Section("engine", BoundStep, "__call__"),
    Section("gradients", flow_pl.engine.gradients, "step_gradients"),
    Section("optimizer calls", StackedOptimizer, "__init__"),
    Section("optimizer calls", StackedOptimizer, "narrow"),
    Section("optimizer calls", StackedOptimizer, "step"),
    Section("optimizer", import_module("torch.optim.sgd"), "sgd", within="optimizer calls"),
    Section("reduce", ServerRound, "__init__"),
    Section("reduce", ServerRound, "add"),
    Section("reduce", ServerRound, "finish"),
    Section("server", FederatedModule, "_server_step"),
    Section("log", flow_pl.module.server_step, "log_round"),
)


class Stopwatch:
    """Sums the time spent in sections, without that of nested sections."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[tuple[str, float]] = []

    def reset(self) -> None:
        """Reset all sums."""
        self.seconds.clear()
        self.calls.clear()

    def timed(self, name: str, function: Callable[..., Any], within: str | None = None) -> Callable[..., Any]:
        """Wrap a function such that its time is counted under `name`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if within is not None and not (self._open and self._open[-1][0] == within):
                return function(*args, **kwargs)
            start = time.perf_counter()
            self._open.append((name, 0.0))
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                _, inside = self._open.pop()
                self.seconds[name] += spent - inside
                self.calls[name] += 1
                if self._open:
                    outer, others = self._open[-1]
                    self._open[-1] = (outer, others + spent)

        return call

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Time the sections within the context."""
        trace = flow_pl.engine.trace_cache.trace

        def timed_trace(*args: Any) -> Callable[..., Any]:
            traced: Callable[..., Any] = trace(*args)
            if not isinstance(traced, GraphModule):
                return self.timed("gradients", traced)
            traced.forward = self.timed("gradients", traced.forward)
            return traced

        with ExitStack() as stack:
            for part in SECTIONS:
                timed = self.timed(part.name, getattr(part.owner, part.attribute), part.within)
                stack.enter_context(patch.object(part.owner, part.attribute, timed))
            stack.enter_context(patch.object(flow_pl.engine.trace_cache, "trace", timed_trace))
            yield


class _Rounds(Callback):
    """Times the Trainer's rounds after the warm-up, in total and by section."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.start = self.seconds = 0.0
        self.sections: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start after the warm-up; stop at the start of the last round."""
        if trainer.current_epoch == WARM_UP:
            self.stopwatch.reset()
            self.start = time.perf_counter()
        elif trainer.current_epoch + 1 == trainer.max_epochs:
            self.seconds = time.perf_counter() - self.start
            self.sections, self.calls = dict(self.stopwatch.seconds), dict(self.stopwatch.calls)


@dataclass(frozen=True)
class Breakdown:
    """Holds the time of a workload's rounds by section.

    Attributes:
        milliseconds: milliseconds per round by section; their sum is the round.
        calls: calls per round by section.
    """

    milliseconds: dict[str, float]
    calls: dict[str, float]

    @property
    def overhead(self) -> float:
        """Return the share of a round outside of gradients and the optimizer's arithmetic."""
        return 1 - sum(self.milliseconds[name] for name in MATHS) / sum(self.milliseconds.values())


def break_down(workload: Workload, chunk_size: int, rounds: int) -> Breakdown:
    """Run rounds of a workload by the Trainer, and break down their time.

    Args:
        workload: the workload.
        chunk_size: clients trained side by side.
        rounds: number of timed rounds, over which times are averaged.
    """
    stopwatch = Stopwatch()
    watched = _Rounds(stopwatch)
    with tempfile.TemporaryDirectory() as folder, stopwatch.attached():
        fit(workload, workload.data(), chunk_size, WARM_UP + rounds + 1, folder, [watched])
    sections = {**watched.sections, REST: watched.seconds - sum(watched.sections.values())}
    ordered = [name for name in (*dict.fromkeys(part.name for part in SECTIONS), REST) if name in sections]
    return Breakdown(
        {name: sections[name] / rounds * 1e3 for name in ordered},
        {name: watched.calls.get(name, 0) / rounds for name in ordered},
    )
