"""A long run: `python -m tools.chaos.soak`, or `make soak`: memory, open files and logs over 2,000 rounds."""

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
"""Rounds between two looks."""

WARM_UP = 0.2
"""Share of the rounds in which caches and traces are made."""

GROWTH = 0.02
"""Of resident memory behind the warm-up."""

BEND = 0.05
"""Difference between the log's bytes a round in the first and in the second half behind the warm-up."""


class Look(NamedTuple):
    """What a run takes up.

    Attributes:
        round: rounds made.
        memory: resident, in bytes.
        files: that are open.
        log: bytes of all logs.
        disk: bytes of everything else in its folder, checkpoints above all.
        seconds: since the start.
    """

    round: int
    memory: int
    files: int
    log: int
    disk: int
    seconds: float


class Looks(Callback):
    """Looks at its own process every so often, and writes what it sees to a file.

    Args:
        root: folder of the run.
        path: the file.
    """

    def __init__(self, root: str, path: str) -> None:
        self.root, self.path = Path(root), Path(path)
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch and trainer.current_epoch % max(1, min(EVERY, trainer.max_epochs // 20)) == 0:
            self._look(trainer)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self._look(trainer)

    def _look(self, trainer: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes = {path: path.stat().st_size for path in self.root.rglob("*") if path.is_file()}
        log = sum(size for path, size in sizes.items() if "logs" in path.parts)
        look = Look(
            round=trainer.global_step,
            memory=pages * os.sysconf("SC_PAGE_SIZE"),
            files=len(os.listdir("/proc/self/fd")),
            log=log,
            disk=sum(sizes.values()) - log,
            seconds=time.monotonic() - self._start,
        )
        with self.path.open("a") as file:
            file.write(json.dumps(look) + "\n")


def soak(folder: Path, method: str, rounds: int, timeout_s: float = 3600) -> list[Look]:
    """Fit, in a process of its own.

    Args:
        folder: where the run's files go.
        method: "flow" or "apfl".
        rounds: how many.
        timeout_s: after which it is stopped.

    Returns:
        What was seen on the way.

    Raises:
        RuntimeError: it failed.
    """
    path = folder / "looks.jsonl"
    words = ["--trainer.check_val_every_n_epoch=10", "--data.chunk_size=6"]
    words += ["--trainer.callbacks+=tools.chaos.soak.Looks", f"--trainer.callbacks.root={folder / 'soak' / 'run'}"]
    words += [f"--trainer.callbacks.path={path}"]
    Chain(folder, method, 1, rounds).finish("soak", "fit", *words, timeout_s=timeout_s)
    return [Look(*json.loads(line)) for line in path.read_text().splitlines()]


def failures(looks: Sequence[Look]) -> list[str]:
    """What grows that should not."""
    warm = [look for look in looks if look.round >= WARM_UP * looks[-1].round]
    half = warm[len(warm) // 2]
    found = []
    growth = max(look.memory for look in warm) / warm[0].memory - 1
    if growth > GROWTH:
        found.append(f"memory grows by {growth:.1%}, more than {GROWTH:.0%}")
    if max(look.files for look in warm) > warm[0].files:
        found.append(f"open files: {warm[0].files}, later {max(look.files for look in warm)}")
    first, second = ((b.log - a.log) / max(1, b.round - a.round) for a, b in ((warm[0], half), (half, warm[-1])))
    if abs(second / first - 1) > BEND:
        found.append(f"the log grows by {first:.0f} bytes a round, later by {second:.0f}")
    if warm[-1].disk > 1.01 * warm[0].disk:
        found.append(f"checkpoints grow from {warm[0].disk} to {warm[-1].disk} bytes")
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Run, print a table, and tell whether anything grows.

    Args:
        args: of the command line; None for those of the process.

    Returns:
        0, or 1 where something grows that should not.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.chaos.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--method", choices=METHODS, default="flow")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        looks = soak(Path(folder), options.method, options.rounds)
    table = Table("round", "memory, MB", "open files", "log, kB", "log, bytes a round", "checkpoints, kB", "s a round")
    table.title = f"{options.method}, {options.rounds} rounds"
    shown = looks[:: max(1, len(looks) // 10)]
    shown = shown if shown[-1] is looks[-1] else [*shown, looks[-1]]
    before = Look(0, 0, 0, 0, 0, 0.0)
    for look in shown:
        made = max(1, look.round - before.round)
        table.add_row(
            str(look.round), f"{look.memory / 1e6:.1f}", str(look.files), f"{look.log / 1e3:.1f}",
            f"{(look.log - before.log) / made:.0f}", f"{look.disk / 1e3:.1f}",
            f"{(look.seconds - before.seconds) / made:.4f}",
        )  # fmt: skip
        before = look
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    found = failures(looks)
    print("; ".join(found) or "nothing grows but the log, evenly")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
