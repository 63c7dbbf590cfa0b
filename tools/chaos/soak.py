"""Check memory, open files and logs over 2,000 rounds: `python -m tools.chaos.soak`, or `make soak`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from tools.chaos.runs import METHODS, Chain

ROUNDS = 2000
EVERY = 50
"""Number of rounds between two measurements."""

WARM_UP = 0.2
"""Share of the rounds for filling caches and tracing."""

GROWTH = 0.02
"""Largest growth of resident memory after the warm-up."""

BEND = 0.05
"""Largest difference of the log's bytes per round between the halves after the warm-up."""


class Usage(NamedTuple):
    """Holds the resources that a run uses.

    Attributes:
        round: number of rounds so far.
        memory: resident memory in bytes.
        files: number of open files.
        log: bytes of all logs.
        disk: bytes of all other files in its folder, mainly checkpoints.
        seconds: seconds since the start.
    """

    round: int
    memory: int
    files: int
    log: int
    disk: int
    seconds: float


class UsageLog(Callback):
    """Measures its own process at intervals, and writes the results to a file.

    Args:
        root: folder of the run.
        path: file of the results.
    """

    def __init__(self, root: str, path: str) -> None:
        self.root, self.path = Path(root), Path(path)
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch and trainer.current_epoch % max(1, min(EVERY, trainer.max_epochs // 20)) == 0:
            self._measure(trainer)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self._measure(trainer)

    def _measure(self, trainer: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes = {path: path.stat().st_size for path in self.root.rglob("*") if path.is_file()}
        log = sum(size for path, size in sizes.items() if "logs" in path.parts)
        usage = Usage(
            round=trainer.global_step,
            memory=pages * os.sysconf("SC_PAGE_SIZE"),
            files=len(os.listdir("/proc/self/fd")),
            log=log,
            disk=sum(sizes.values()) - log,
            seconds=time.monotonic() - self._start,
        )
        with self.path.open("a") as file:
            file.write(json.dumps(usage) + "\n")


def soak(folder: Path, method: str, rounds: int, timeout_s: float = 3600) -> list[Usage]:
    """Fit in a separate process.

    Args:
        folder: folder of the run's files.
        method: "flow" or "apfl".
        rounds: number of rounds.
        timeout_s: seconds after which the run is stopped.

    Returns:
        The measurements.

    Raises:
        RuntimeError: the run failed.
    """
    path = folder / "usage.jsonl"
    words = ["--trainer.check_val_every_n_epoch=10", "--data.chunk_size=6"]
    words += ["--trainer.callbacks+=tools.chaos.soak.UsageLog", f"--trainer.callbacks.root={folder / 'soak' / 'run'}"]
    words += [f"--trainer.callbacks.path={path}"]
    Chain(folder, method, 1, rounds).finish("soak", "fit", *words, timeout_s=timeout_s)
    return [Usage(*json.loads(line)) for line in path.read_text().splitlines()]


def failures(usages: Sequence[Usage]) -> list[str]:
    """Return what grows and should not."""
    warm = [usage for usage in usages if usage.round >= WARM_UP * usages[-1].round]
    half = warm[len(warm) // 2]
    found = []
    growth = max(usage.memory for usage in warm) / warm[0].memory - 1
    if growth > GROWTH:
        found.append(f"memory grows by {growth:.1%}, more than {GROWTH:.0%}")
    if max(usage.files for usage in warm) > warm[0].files:
        found.append(f"open files: {warm[0].files}, later {max(usage.files for usage in warm)}")
    first, second = ((b.log - a.log) / max(1, b.round - a.round) for a, b in ((warm[0], half), (half, warm[-1])))
    if abs(second / first - 1) > BEND:
        found.append(f"the log grows by {first:.0f} bytes a round, later by {second:.0f}")
    # both checkpoints hold the rows of the log
    if warm[-1].disk > 1.01 * warm[0].disk + 2 * (warm[-1].log - warm[0].log):
        found.append(f"checkpoints grow from {warm[0].disk} to {warm[-1].disk} bytes")
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Run, print a table, and report whether anything grows.

    Args:
        args: arguments of the command line; None for those of the process.

    Returns:
        0, or 1 if something grows and should not.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.chaos.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--method", choices=METHODS, default="flow")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        usages = soak(Path(folder), options.method, options.rounds)
    table = Table("round", "memory, MB", "open files", "log, kB", "log, bytes a round", "checkpoints, kB", "s a round")
    table.title = f"{options.method}, {options.rounds} rounds"
    shown = usages[:: max(1, len(usages) // 10)]
    shown = shown if shown[-1] is usages[-1] else [*shown, usages[-1]]
    before = Usage(0, 0, 0, 0, 0, 0.0)
    for usage in shown:
        made = max(1, usage.round - before.round)
        table.add_row(
            str(usage.round), f"{usage.memory / 1e6:.1f}", str(usage.files), f"{usage.log / 1e3:.1f}",
            f"{(usage.log - before.log) / made:.0f}", f"{usage.disk / 1e3:.1f}",
            f"{(usage.seconds - before.seconds) / made:.4f}",
        )  # fmt: skip
        before = usage
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    found = failures(usages)
    print("; ".join(found) or "nothing grows but the log, evenly")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
