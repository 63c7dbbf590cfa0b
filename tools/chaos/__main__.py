"""Kill runs: `python -m tools.chaos`, or `make chaos`.

A small run is killed (SIGKILL to all its processes) at random moments, while it starts, writes its clients, trains,
validates and writes checkpoints, and resumed with `--ckpt_path last` each time. In the end its checkpoints, test
metrics and log must equal those of an undisturbed run, bit by bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.chaos.runs import METHODS, ROUNDS, Chain


def main(args: Sequence[str] | None = None) -> int:
    """Run the scenarios, one after the other.

    Args:
        args: arguments of the command line; None for those of the process.

    Returns:
        0, or 1 if a killed run ended differently from the undisturbed one.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each scenario")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--method", choices=METHODS, action="append", help="one method; may be repeated")
    parser.add_argument("--processes", type=int, action="append", help="number of processes; may be repeated")
    parser.add_argument("--folder", type=Path, help="where the runs are left for inspection")
    options = parser.parse_args(args)
    table = Table("method", "processes", "kills", "while it was ...", "minutes", "end", title="Killed and resumed")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        for processes in options.processes or (1, 2):
            for method in options.method or METHODS:
                folder = (options.folder or Path(temporary)) / f"{method}-{processes}"
                chain, start = Chain(folder, method, processes, options.rounds), time.monotonic()
                try:
                    end = ", ".join(scenario(chain, options.kills, options.seed)) or "bit-identical"
                except RuntimeError as error:
                    end = str(error)
                good = good and end == "bit-identical" and chain.kills.total() >= options.kills
                at = ", ".join(f"{stage} {count}" for stage, count in sorted(chain.kills.items()))
                minutes = f"{(time.monotonic() - start) / 60:.1f}"
                table.add_row(method, str(processes), str(chain.kills.total()), at, minutes, end)
                print(
                    f"{method} on {processes}: {chain.kills.total()} kills ({at}), {minutes} minutes: {end}", flush=True
                )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return 0 if good else 1


def scenario(chain: Chain, kills: int, seed: int) -> list[str]:
    """Compare an undisturbed run with one that is killed this many times.

    Returns:
        The differences.
    """
    seconds = chain.undisturbed()
    # to spread the kills over the rounds
    chain.kill_repeatedly(seed, seconds / (2 * kills), kills)
    return chain.differences()


if __name__ == "__main__":
    sys.exit(main())
