"""Pass damaged files to every reader: `python -m tools.fuzz --cases 3000`, or `make fuzz`.

Each case must be refused by a `FlowError` or read to the end; otherwise the exit status is 1. A single case is repeated
by `python -m tools.fuzz --only hdf5 --case 123`, with its traceback.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tools.fuzz.readers import READERS
from tools.fuzz.trial import Outcome, attempt, outcomes

STATUSES = ("refused", "read", "failed", "crashed", "hung")


def main(args: Sequence[str] | None = None) -> int:
    """Run the cases and print a table.

    Args:
        args: arguments of the command line; None for those of the process.

    Returns:
        0, or 1 if a case was neither refused nor read.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=3000, help="number of cases, shared by the readers")
    parser.add_argument("--only", choices=READERS, action="append", help="one reader; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--case", type=int, help="one case of one reader, in this process")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds after which a reader hangs")
    options = parser.parse_args(args)
    readers = options.only or list(READERS)
    if options.case is not None:
        for reader in readers:
            outcome = attempt(reader, options.case, options.seed)
            print(f"{reader} {outcome.case}: {outcome.status}\n{outcome.message}")
        return 0
    console = Console(width=None if sys.stdout.isatty() else 100)
    log = Path(tempfile.mkdtemp(prefix="fuzz-log-")) / "log.txt"
    cases = [(reader, case) for reader in readers for case in range(options.cases // len(readers))]
    found: list[Outcome] = []
    progress = Console(stderr=True)
    stream = outcomes(cases, options.seed, options.timeout, log)
    for outcome in track(stream, "Fuzzing", len(cases), console=progress, disable=not progress.is_terminal):
        found.append(outcome)
        if outcome.status not in ("refused", "read"):
            print(f"{outcome.reader} {outcome.case}: {outcome.status}\n{outcome.message}", flush=True)
    console.print(_table(found))
    return int(any(outcome.status not in ("refused", "read") for outcome in found))


def _table(found: Sequence[Outcome]) -> Table:
    table = Table("reader", *(("cases"), *STATUSES, "seconds", "slowest"), title="Damaged files")
    for reader in dict.fromkeys(outcome.reader for outcome in found):
        mine = [outcome for outcome in found if outcome.reader == reader]
        counts = collections.Counter(outcome.status for outcome in mine)
        seconds = [outcome.seconds for outcome in mine]
        numbers = [len(mine), *(counts[status] for status in STATUSES)]  # type: ignore[index]
        table.add_row(reader, *map(str, numbers), f"{sum(seconds):.1f}", f"{max(seconds):.2f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
