"""Shows the progress of a run: bars on a terminal, a few lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


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
        self._tasks: dict[str, TaskID] = {}
        self._live = console.is_interactive or console.is_jupyter
        self._bars = _Bars(console, disable=not self._live)
        self._bars.start()

    def show(self, bar: str, label: str, status: str, position: float, total: float | None, clients: int) -> str:
        """Draw or redraw a bar, on a terminal.

        Args:
            bar: name of the bar.
            label: text before it.
            status: text after it.
            position: current position.
            total: end position; None if unknown.
            clients: number of clients processed since the bar was first shown.

        Returns:
            What the bar says, without the bar itself.
        """
        if bar not in self._tasks:
            self._tasks[bar] = self._bars.add_task(
                label, total=total, completed=int(position), status=status, clients=clients
            )
        task = self._tasks[bar]
        self._bars.update(task, description=label, completed=position, total=total, status=status, clients=clients)
        return self._bars.text(task)

    def remove(self, bar: str) -> None:
        """Remove a bar, if it is shown."""
        if bar in self._tasks:
            self._bars.remove_task(self._tasks.pop(bar))

    def caption(self, text: str) -> None:
        """Set the line under the bars; without a terminal, do nothing."""
        self._bars.caption = text

    def line(self, text: str) -> None:
        """Print a line if there is no terminal, or keep it for `flush` if the last one is recent."""
        if not self._live:
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
        self._bars.stop()


class _ClientSpeedColumn(ProgressColumn):
    """Shows the mean number of clients per second since the bar was first shown."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed or 0.0
        return Text(f"{task.fields['clients'] / max(seconds, 1e-9):.3g} clients/s")


class _TimeLeftColumn(TimeRemainingColumn):
    """Shows Rich's estimate of the time left, with a label; nothing if the end is unknown."""

    def render(self, task: Task) -> Text:
        return Text.assemble("time left ", super().render(task)) if task.total is not None else Text()


class _Bars(Progress):
    """Renders Rich bars with a line of text under them."""

    def __init__(self, console: Console, disable: bool) -> None:
        self.caption = ""
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            _ClientSpeedColumn(),
            _TimeLeftColumn(),
            console=console,
            disable=disable,
            # of all that was done: a round may take longer than any period
            speed_estimate_period=float("inf"),
        )

    def text(self, task_id: TaskID) -> str:
        """Return what the columns of a task say, but for the bar."""
        task = next(task for task in self.tasks if task.id == task_id)
        texts = [column.render(task) for column in self.columns if isinstance(column, ProgressColumn)]
        return "  ".join(text.plain for text in texts if isinstance(text, Text) and text.plain)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bars, then the caption."""
        yield from super().get_renderables()
        if self.caption:
            yield Text(self.caption)
