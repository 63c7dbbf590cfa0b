"""Measure what privacy, robust aggregation and compression cost in accuracy, on real clients.

    python -m tools.benchmarks.protection norms --data unipen_writers.npz
    python -m tools.benchmarks.protection privacy --data unipen_writers.npz --seeds 0 1 2
    python -m tools.benchmarks.protection robustness --data unipen_writers.npz
    python -m tools.benchmarks.protection bytes --data unipen_writers.npz
    python -m tools.benchmarks.protection cost
    python -m tools.benchmarks.protection overhead

Each run is one of the command line. Its results are added to a file when it ends, and a run whose results are in the
file is not repeated: the command can be stopped and goes on when it is started again. At the end the table is printed
as Markdown. A seed is that of a run (`seed_everything`) and of the split of its data (`data.split_seed`). Other
arguments go to the command line of every run, such as --model.server_optimizer.init_args.momentum=0. Runs with
correlated noise need the extra matrix-factorization, and are left out where it is not installed. `cost` is the
processor time of the server's part of a round, `overhead` that of a round with and without privacy; both on one thread
with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

from flow_pl.cli import run
from tools.benchmarks.protection.cost import print_overhead, print_server_cost
from tools.benchmarks.protection.runs import RUNS
from tools.benchmarks.protection.tables import TABLES

COSTS = {"cost": print_server_cost, "overhead": print_overhead}

ROUNDS = {"norms": 20, "privacy": 20, "robustness": 15, "bytes": 15}

KEPT = ("privacy/", "train/bytes", "train/attackers", "val/", "test/seen/")
"""How the names of the metrics begin that are kept."""


def measure(arguments: list[str], data: str, rounds: int, stage: str) -> dict[str, float]:
    """Run once, and return the results by name."""
    method, *settings = arguments
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cli = run([
            "fit", "--config=task/array", f"--config=method/{method}",
            f"--data.path={data}", "--data.chunk_size=25", f"--trainer.max_epochs={rounds}",
            "--trainer.check_val_every_n_epoch=1000", "--trainer.num_sanity_val_steps=0", "--trainer.logger=false",
            "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
            "--trainer.devices=1", f"--trainer.default_root_dir={folder}", *settings,
        ])  # fmt: skip
        figures = dict(cli.trainer.callback_metrics)
        evaluate = cli.trainer.test if stage == "test" else cli.trainer.validate
        evaluate(cli.model, datamodule=cli.datamodule, verbose=False)
        figures |= cli.trainer.callback_metrics
    return {name: float(value) for name, value in figures.items() if name.startswith(KEPT)}


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Return the runs of a file, by what tells them apart."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {json.dumps(line["run"]): line for line in map(json.loads, lines)}


def main() -> None:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*RUNS, *COSTS])
    parser.add_argument("--data", help="file for task/array")
    parser.add_argument("--rounds", type=int, help="rounds of a run; by default 20 with noise and 15 without")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="only the runs whose labels contain this")
    parser.add_argument("--out", type=Path, help="file of the results; by default TABLE.jsonl")
    options, others = parser.parse_known_args()
    if options.table in COSTS:
        COSTS[options.table]()
        return
    if options.data is None:
        parser.error("--data is missing: a .npz file with arrays x, y and client, as task/array expects")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    path = options.out or Path(f"{options.table}.jsonl")
    rounds = options.rounds or ROUNDS[options.table]
    known, lines = finished(path), []
    for seed in options.seeds:
        for each in RUNS[options.table]():
            if options.only not in " | ".join(each.labels.values()):
                continue
            label = {**each.labels, "seed": seed, "rounds": rounds, **({"settings": others} if others else {})}
            line = known.get(json.dumps(label))
            if line is None:
                arguments = [*each.arguments, f"--seed_everything={seed}", f"--data.split_seed={seed}", *others]
                stage = "validate" if options.table == "norms" else "test"
                line = {"run": label, "results": measure(arguments, options.data, rounds, stage)}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            lines.append({**line["run"], **line["results"]})
    print(TABLES[options.table](lines))


if __name__ == "__main__":
    main()
