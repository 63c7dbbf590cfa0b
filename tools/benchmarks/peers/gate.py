"""A contender's side of a contest: it waits for its turn, runs a round, and reports the time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Settings = dict[str, Any]
"""Settings of a round: `threads`; whether to `save` the model after it; for our loop, `chunk_size`."""


def rank() -> int:
    """Return the rank of this process among those of the contender."""
    return int(os.environ["RANK"])


def processes() -> int:
    """Return the number of processes of the contender."""
    return int(os.environ["WORLD_SIZE"])


def memory_mb() -> float:
    """Return the peak memory of this process in MB.

    Uses Linux's count for the program, since that of getrusage starts from the parent's memory.
    """
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


class Gate:
    """Separates two rounds.

    Only the first process of a contender reads and writes the pipes; `share` passes on what it read to the others, so
    that none of them starts before its turn.

    Args:
        share: sends a value from the first process to all; called by all.
    """

    def __init__(self, share: Callable[[Settings | None], Settings | None] = lambda settings: settings) -> None:
        self._share = share
        self._start, self._processor = 0.0, 0.0
        self._settings: Settings | None = None
        if rank() == 0:
            self._turns = os.fdopen(int(os.environ["BENCH_READ"]), encoding="utf-8")
            self._results = os.fdopen(int(os.environ["BENCH_WRITE"]), "w", encoding="utf-8")

    def next(self, model: Callable[[], np.ndarray]) -> Settings | None:
        """End a round, if one was run, and wait for the next one.

        Args:
            model: returns the parameters as one vector, in torch's order.

        Returns:
            The settings of the next round, or None at the end of the contest.
        """
        now, processor = time.perf_counter(), time.process_time()
        settings = None
        if rank() == 0:
            if self._settings is not None:
                if self._settings["save"]:
                    np.save(os.environ["BENCH_MODEL"], model())
                used = processor - self._processor
                result = {"seconds": now - self._start, "processor_seconds": used, "memory_mb": memory_mb()}
                print(json.dumps(result), file=self._results, flush=True)
            line = self._turns.readline()
            settings = json.loads(line) if line else None
        settings = self._settings = self._share(settings)
        self._start, self._processor = time.perf_counter(), time.process_time()
        return settings
