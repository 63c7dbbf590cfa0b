"""Measure how cost grows: cases that differ in one setting take turns round by round, each in its own process."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tools.benchmarks.remote import Remote
from tools.benchmarks.scaling import Case, ScaledData

WARM_UP = 3
"""Number of rounds of each case before the timed ones."""


@dataclass(frozen=True)
class Axis:
    """Lists cases that differ in one setting.

    Attributes:
        what: attribute of `Case` that differs.
        cases: the cases; others are compared with the first one.
        rounds: number of timed rounds.
    """

    what: str
    cases: tuple[Case, ...]
    rounds: int = 7


@dataclass
class Point:
    """Holds the cost of a case.

    Attributes:
        case: the case.
        store_seconds: seconds to write its store; 0 if another case had written it.
        start_seconds: seconds from the start of the process to the end of the first round, with an existing store.
        memory_mb: peak memory of the process, or of the first of several.
        seconds: duration of the timed rounds.
        processor_seconds: processor time of the same rounds, which does not grow on a busy machine.
    """

    case: Case
    store_seconds: float = 0.0
    start_seconds: float = 0.0
    memory_mb: float = 0.0
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)


def _axis(what: str, values: Sequence[object], rounds: int = 7, **others: object) -> Axis:
    return Axis(what, tuple(Case(**{**others, what: value}) for value in values), rounds)  # type: ignore[arg-type]


_FEMNIST = {"population": 10_000, "examples": 227, "spread": 0.38}
"""About the size of FEMNIST (814,277 examples of some 3,550 writers); the spread is an assumption."""
_LSTM = {"hidden": 0, "population": 20, "batch_size": 16, "chunk": 5}

AXES = {
    "cohort": _axis("cohort", (10, 100, 1000)),
    "real_sizes": _axis("cohort", (1000, 10_000), rounds=3, **_FEMNIST),
    "examples": _axis("examples", (10, 50, 250)),
    "chunk": _axis("chunk", (1, 10, 50, 100)),
    "population": _axis("population", (1000, 1_000_000), cohort=30, examples=4, chunk=30),
    "hidden": _axis("hidden", (64, 512, 4096), rounds=3, cohort=20, chunk=20),
    "processes": _axis("processes", (1, 2)),
    "lstm_examples": _axis("examples", (16, 32, 64), rounds=3, cohort=5, **_LSTM),
    "lstm_method": _axis("method", ("FedAvg", "Flow"), rounds=3, cohort=5, examples=32, **_LSTM),
    "lstm_chunk": _axis("chunk", (1, 5, 20), rounds=3, cohort=20, examples=16, **_LSTM),
}
"""Axes by the name of their table."""


def measure(axis: Axis, folder: str, rounds: int | None = None) -> list[Point]:
    """Run the cases of an axis, side by side.

    Args:
        axis: the cases.
        folder: folder of their stores.
        rounds: number of timed rounds; None for that of the axis.
    """
    points = [Point(case) for case in axis.cases]
    with ExitStack() as stack:
        remotes = []
        for point in points:
            start = time.perf_counter()
            ScaledData(point.case, folder).prepare_data()
            point.store_seconds = time.perf_counter() - start
            command = [sys.executable, "-m", "tools.benchmarks.scaling", folder, point.case.json()]
            remote = Remote(command, Path(folder), point.case.processes)
            stack.callback(remote.close)
            remotes.append(remote)
            remote.round({"threads": 1, "save": False})
            assert remote.start_seconds is not None
            point.start_seconds = remote.start_seconds
        for number in range(1, WARM_UP + (rounds or axis.rounds)):
            for point, remote in zip(points, remotes, strict=True):
                result = remote.round({"threads": 1, "save": False})
                point.memory_mb = result.memory_mb
                if number >= WARM_UP:
                    point.seconds.append(result.seconds)
                    point.processor_seconds.append(result.processor_seconds)
    return points


def growth(point: Point, base: Point) -> float:
    """Return a case's round time over that of the first one, median of the rounds."""
    return median(a / b for a, b in zip(point.seconds, base.seconds, strict=True))


def run(console: Console, names: Sequence[str], rounds: int | None = None) -> dict[str, object]:
    """Measure, print tables, and return the content of `bench.json`."""
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            axis = AXES[name]
            points = measure(axis, folder, rounds)
            console.print(f"[bold]{name}[/bold]; apart from {axis.what}: {points[0].case.others(axis.what)}")
            table = Table(
                axis.what, "ms a round", "over the first", "processor ms", "start to first round, s", "MB", "store, s"
            )
            rows: dict[str, dict[str, float]] = {}
            for point in points:
                value = str(getattr(point.case, axis.what))
                rows[value] = {
                    "milliseconds": median(point.seconds) * 1e3,
                    "over_first": growth(point, points[0]),
                    "processor_milliseconds": median(point.processor_seconds) * 1e3,
                    "start_seconds": point.start_seconds,
                    "memory_mb": point.memory_mb,
                    "store_seconds": point.store_seconds,
                }
                cells = [f"{number:.4g}" for number in rows[value].values()]
                table.add_row(value, *cells)
            console.print(table)
            results[name] = {"what": axis.what, "else": points[0].case.others(axis.what), "cases": rows}
    return results
