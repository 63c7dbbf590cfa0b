"""Run the benchmarks: `python -m tools.benchmarks`, or `make bench`. Prints tables and writes `bench.json` here.

Contenders take turns round by round, and results are medians of per-round ratios, so they are valid on a busy machine.
Contenders run first in one process and one thread, and then each in its own processes, with 1 and 2 threads and
processes; these include the other simulators installed by `make bench-peers`. Repeat one workload with
`python -m tools.benchmarks --only mlp`, with more rounds by `--rounds 100`.

Ratios are of rounds after a warm-up in which all gradients are traced, with the same cohort in every round.

`python -m tools.benchmarks --scale` measures how cost grows instead, `--scale population cohort` two of its tables.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tools.benchmarks.breakdown import Breakdown, break_down
from tools.benchmarks.contest import Outcome, compete
from tools.benchmarks.race import Race, interpreters, run
from tools.benchmarks.report import figures, print_breakdown, print_outcome, print_race, surroundings, write
from tools.benchmarks.scale import AXES
from tools.benchmarks.scale import run as scale
from tools.benchmarks.startup import first_round
from tools.benchmarks.workloads import WORKLOADS

QUICK_ROUNDS = 2
BROKEN_DOWN = ("mlp", "cnn", "lstm")


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        args: arguments of the command line; None for those of the process.

    Returns:
        0, or 1 if contenders did not end with the same model.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=WORKLOADS, action="append", help="one workload; may be repeated")
    parser.add_argument("--rounds", type=int, help="timed rounds of each workload")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: a smoke test, no peers")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch's operations")
    parser.add_argument("--scale", nargs="*", metavar="TABLE", help=f"how cost grows: {', '.join(AXES)}")
    parser.add_argument(
        "--peers-python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="interpreter with a peer (pfl, flwr, fedjax, blazefl, fluke); those of make bench-peers are found",
    )
    options = parser.parse_args(args)
    if options.threads < 1 or (options.rounds is not None and options.rounds < 1):
        parser.error("--threads and --rounds must be 1 or more")
    if not set(options.scale or ()) <= set(AXES):
        parser.error(f"--scale takes tables among {', '.join(AXES)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 150)
    outcomes: list[Outcome] = []
    breakdowns: dict[str, Breakdown] = {}
    races: list[Race] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if options.scale is not None:
                tables = scale(console, options.scale or list(AXES), options.rounds)
                write(Path("bench.json"), {"scale": {**tables, **surroundings()}})
                return 0
            for name in options.only or WORKLOADS:
                workload = WORKLOADS[name]
                rounds = options.rounds or (QUICK_ROUNDS if options.quick else workload.rounds)
                outcomes.append(compete(workload, rounds))
                print_outcome(console, outcomes[-1])
                if name in BROKEN_DOWN:
                    breakdowns[name] = break_down(workload, outcomes[-1].chunk_size, rounds)
                    print_breakdown(console, name, breakdowns[name])
                if workload.peers and not options.quick:
                    pythons = interpreters(options.peers_python)
                    final = options.rounds or workload.peer_rounds
                    races.append(run(workload, outcomes[-1].chunk_size, pythons, final, workload.peer_heats))
                    print_race(console, races[-1])
            start = {} if options.quick else first_round()
            for name, value in start.items():
                console.print(f"{name}: {value:.1f}")
        write(Path("bench.json"), figures(outcomes, breakdowns, races, start))
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)
    return 0 if all(contest.agrees for contest in (*outcomes, *races)) else 1


if __name__ == "__main__":
    sys.exit(main())
