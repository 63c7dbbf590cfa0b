"""Show progress while the runs execute: the run's number, how far each one is, and the time left."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from flow_pl.compare.runs import Run


class Display:
    """Shows live lines on a terminal, and elsewhere one line at the start and end of each run. A context manager.

    Args:
        console: the console to write to.
        waiting: the runs to execute.
        done: the number of other runs, which are done already.
        seconds: the known durations of each method's runs.
        jobs: the number of parallel runs.
    """

    def __init__(
        self, console: Console, waiting: Sequence[Run], done: int, seconds: Mapping[str, Sequence[float]], jobs: int
    ) -> None:
        self._console = console
        self._waiting = list(waiting)
        self._total = len(waiting) + done
        self._ended = done
        self._failed = 0
        self._seconds = {method: list(known) for method, known in seconds.items()}
        self._jobs = jobs
        self._running: dict[Run, float] = {}
        self._bar = Progress(
            TextColumn("Runs"), BarColumn(bar_width=30), TextColumn("{task.fields[status]}"), console=console
        )
        self._task = self._bar.add_task("", total=self._total, completed=done, status="")
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_interactive:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def start(self, run: Run) -> None:
        """Record that a run has started."""
        self._waiting.remove(run)
        self._running[run] = time.monotonic()
        if self._live is None:
            number = self._ended + len(self._running)
            self._print(f"run {number} of {self._total}: {run.name}{self._time_left()}")

    def end(self, run: Run, failure: str | None) -> None:
        """Record that a run has ended.

        Args:
            run: the run.
            failure: the reason for its failure; None if it succeeded.
        """
        seconds = time.monotonic() - self._running.pop(run)
        self._ended += 1
        if failure is None:
            self._seconds.setdefault(run.method, []).append(seconds)
            self._print(f"  {run.name}: done in {_duration(seconds)}")
        else:
            self._failed += 1
            self._print(f"  {run.name}: failed after {_duration(seconds)}: {failure}")

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _time_left(self) -> str:
        """Estimate the remaining time from runs of the same method, or from all runs; empty while none has ended."""
        known = [seconds for runs in self._seconds.values() for seconds in runs]
        if not known:
            return ""
        now, seconds = time.monotonic(), 0.0
        for run in (*self._waiting, *self._running):
            alike = self._seconds.get(run.method) or known
            seconds += max(sum(alike) / len(alike) - (now - self._running.get(run, now)), 0.0)
        return f", time left {_duration(seconds / self._jobs)}"

    def _render(self) -> Group:
        failed = f", {self._failed} failed" if self._failed else ""
        status = f"{self._ended} of {self._total} done{failed}{self._time_left()}"
        self._bar.update(self._task, completed=self._ended, status=status)
        width = max(self._console.width - 1, 20)
        lines = [f"  {run.name}: {_last_line(run.log) or 'starting'}"[:width] for run in self._running]
        return Group(self._bar, *map(Text, lines))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _last_line(log: Path) -> str:
    """Return the last nonempty line of a run's log."""
    try:
        with log.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 4096, 0))
            said = file.read().decode("utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(said) if line.strip()), "")
