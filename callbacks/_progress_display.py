"""Shows the progress of a run: bars on a terminal, a few lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text


class Pace:
    """Tracks how many clients were processed, how fast, and how much time is left.

    Args:
        position: where the work starts, in the units of `time_left` (a resumed fit does not start at 0).
    """

    def __init__(self, position: float = 0.0) -> None:
        self.clients = 0
        self._position = position
        self._started = time.monotonic()
        self._paused = 0.0
        self._pause_started: float | None = None

    def pause(self) -> None:
        """Stop the clock of the speed, while something else runs."""
        self._pause_started = time.monotonic()

    def resume(self) -> None:
        """Start the clock of the speed again."""
        if self._pause_started is not None:
            self._paused += time.monotonic() - self._pause_started
            self._pause_started = None

    def speed(self) -> str:
        """Return the clients per second while the clock ran."""
        seconds = time.monotonic() - self._started - self._paused
        return f"{self.clients / max(seconds, 1e-9):.3g} clients/s"

    def time_left(self, position: float, total: float | None) -> str | None:
        """Estimate the time until `total`, pauses included, at the rate so far; None if unknown."""
        if total is None or position <= self._position:
            return None
        seconds = (time.monotonic() - self._started) * (total - position) / (position - self._position)
        return f"time left {timedelta(seconds=int(max(seconds, 0)))}"


class ProgressDisplay:
    """Shows progress: live bars on a terminal or in a notebook, lines at most every few seconds elsewhere.

    Args:
        console: the console to write to.
        interval_s: minimum number of seconds between two lines when there is no terminal.
    """

    def __init__(self, console: Console, interval_s: float) -> None:
        self._console = console
        self._interval_s = interval_s
        self._last_line = -float("inf")
        self._pending = ""
        self._bars: dict[str, TaskID] = {}
        self._live: _Bars | None = None
        if console.is_interactive or console.is_jupyter:
            self._live = _Bars(console)
            self._live.start()

    def show(self, bar: str, label: str, status: str, position: float, total: float | None) -> None:
        """Draw or redraw a bar; without a terminal, do nothing.

        Args:
            bar: name of the bar.
            label: text before it.
            status: text after it.
            position: current position.
            total: end position; None if unknown.
        """
        if self._live is None:
            return
        if bar not in self._bars:
            self._bars[bar] = self._live.add_task(label, total=total, status=status)
        self._live.update(self._bars[bar], description=label, completed=position, total=total, status=status)

    def remove(self, bar: str) -> None:
        """Remove a bar, if it is shown."""
        if self._live is not None and bar in self._bars:
            self._live.remove_task(self._bars.pop(bar))

    def caption(self, text: str) -> None:
        """Set the line under the bars; without a terminal, do nothing."""
        if self._live is not None:
            self._live.caption = text

    def line(self, text: str) -> None:
        """Print a line if there is no terminal, or keep it for `flush` if the last one is recent."""
        if self._live is None:
            self._pending = text
            if time.monotonic() - self._last_line >= self._interval_s:
                self.flush()

    def flush(self) -> None:
        """Print the line that was kept, if any."""
        if self._pending:
            self._console.print(self._pending, soft_wrap=True, highlight=False, markup=False)
            self._last_line = time.monotonic()
            self._pending = ""

    def stop(self) -> None:
        """Leave the last state on screen and release the terminal."""
        self.flush()
        if self._live is not None:
            self._live.stop()


class _Bars(Progress):
    """Renders Rich bars with a line of text under them."""

    def __init__(self, console: Console) -> None:
        self.caption = ""
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bars, then the caption."""
        yield from super().get_renderables()
        if self.caption:
            yield Text(self.caption)
