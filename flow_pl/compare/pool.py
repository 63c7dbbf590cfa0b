"""Execute runs in parallel, each in a process of its own, so that a failure or crash does not affect the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

from flow_pl.compare.display import Display
from flow_pl.compare.runs import Run
from flow_pl.compare.worker import work
from flow_pl.errors import FlowError

GRACE_S = 30.0
"""Seconds that a run may take to stop once asked to."""

# A fork server imports everything once and forks a fresh process for each run; forking is unsafe on other systems.
_CONTEXT = (
    multiprocessing.get_context("forkserver") if sys.platform == "linux" else multiprocessing.get_context("spawn")
)


class RunProcess:
    """The process of a run.

    Args:
        run: the run, prepared.
        one_thread: whether to compute in one thread.
    """

    def __init__(self, run: Run, one_thread: bool) -> None:
        self.run = run
        self.started = time.monotonic()
        alive, self._alive = _CONTEXT.Pipe(duplex=False)
        args = (str(run.folder), run.checkpoint, str(run.log), dict(os.environ), one_thread, alive)
        self.process: BaseProcess = _CONTEXT.Process(target=work, args=args)
        self.process.start()
        alive.close()

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def failure(self) -> str | None:
        """Handle the end of the process: return why the run failed, or None after writing its results."""
        self.process.join()
        self._alive.close()
        assert self.process.exitcode is not None
        if self.process.exitcode != 0:
            return self.run.failure(self.process.exitcode)
        try:
            self.run.finish(self.seconds)
        except FlowError as error:
            return str(error)
        return None

    def ask_to_stop(self) -> None:
        """Ask the run to stop; its last checkpoint is that of its last finished round."""
        self._alive.close()

    def stop(self, grace_s: float) -> None:
        """Wait until the process has stopped, then kill it and its children if it has not."""
        self.process.join(grace_s)
        if self.process.is_alive() and self.process.pid is not None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):  # not yet a process group of its own
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def execute(runs: Sequence[Run], jobs: int, display: Display) -> dict[Run, str]:
    """Execute the runs in order; if the user interrupts, stop the active ones cleanly.

    Args:
        runs: runs that are not done.
        jobs: number of parallel runs; with more than one, each computes in one thread.
        display: receives the start and end of each run.

    Returns:
        The reason for each failure, by run.
    """
    if _CONTEXT.get_start_method() == "forkserver":
        _CONTEXT.set_forkserver_preload(["flow_pl.compare.worker"])
    waiting, active, failures = deque(runs), list[RunProcess](), dict[Run, str]()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                waiting[0].prepare()
                active.append(RunProcess(waiting.popleft(), one_thread=jobs > 1))
                display.start(active[-1].run)
            multiprocessing.connection.wait([each.process.sentinel for each in active], timeout=0.5)
            for each in [each for each in active if not each.process.is_alive()]:
                active.remove(each)
                failure = each.failure()
                if failure is not None:
                    failures[each.run] = failure
                display.end(each.run, failure)
    finally:
        for each in active:
            each.ask_to_stop()
        deadline = time.monotonic() + GRACE_S
        for each in active:
            each.stop(max(deadline - time.monotonic(), 0.0))
    return failures
